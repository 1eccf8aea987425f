"""The sampler against answers known by hand and against naive loops."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffusiongemma import sampler


def accepted(entropy: list[float], bound: float) -> list[bool]:
    return np.array(sampler.accept(mx.array(entropy), bound)).tolist()


def test_accept_at_the_bound() -> None:
    # ascending 0.25, 0.5, 1.0: sums before each are 0, 0.25, 0.75
    assert accepted([1.0, 0.25, 0.5], 0.25) == [False, True, True]
    assert accepted([1.0, 0.25, 0.5], 0.2499) == [False, True, False]
    assert accepted([1.0, 0.25, 0.5], 0.75) == [True, True, True]


def test_accept_always_takes_the_most_certain() -> None:
    assert accepted([9.0, 8.0, 9.5], 0.1) == [False, True, False]
    assert accepted([9.0], 0.1) == [True]


def test_accept_all() -> None:
    assert accepted([0.0, 0.0, 0.0], 0.1) == [True, True, True]
    assert accepted([0.01] * 8, 0.1) == [True] * 8


@pytest.mark.parametrize("seed", range(20))
def test_accept_equals_a_loop(seed: int) -> None:
    entropy = np.random.default_rng(seed).exponential(0.05, 64).astype(np.float32)
    expected, total = [False] * 64, np.float32(0)
    for index in np.argsort(entropy, kind="stable"):
        expected[index] = bool(total <= 0.1)
        total += entropy[index]
    assert accepted(entropy.tolist(), 0.1) == expected


def test_renoise_keeps_nothing_from_before() -> None:
    canvas = sampler.renoise(mx.array([True, False]), mx.array([5, 6]), mx.array([7, 8]))
    assert canvas.tolist() == [5, 8]


def test_temperature_schedule_by_hand() -> None:
    assert sampler.temperature(1.0, 0.4, 0.8) == pytest.approx(0.8, abs=1e-7)
    assert sampler.temperature(1 / 48, 0.4, 0.8) == pytest.approx(0.4 + 0.4 / 48, abs=1e-7)
    assert sampler.temperature(0.5, 1.0, 1.0) == 1.0


def test_stability_needs_every_remembered_canvas() -> None:
    history = sampler.empty_history(2, 3)
    canvas, other = mx.array([1, 2, 3]), mx.array([1, 2, 4])
    assert not sampler.is_stable(history, canvas).item()  # a first step is never stable
    history = sampler.remember(history, canvas)
    assert not sampler.is_stable(history, canvas).item()  # one equal step of two
    history = sampler.remember(history, canvas)
    assert sampler.is_stable(history, canvas).item()
    assert not sampler.is_stable(history, other).item()
    assert not sampler.is_stable(sampler.remember(history, other), canvas).item()


def test_stability_threshold_zero_is_always_stable() -> None:
    history = sampler.empty_history(0, 3)
    assert sampler.is_stable(history, mx.array([1, 2, 3])).item()
    assert sampler.remember(history, mx.array([1, 2, 3])).shape == (0, 3)


def test_confidence_is_strict() -> None:
    assert not sampler.is_confident(mx.array([0.5, 0.5]), 0.5).item()
    assert sampler.is_confident(mx.array([0.5, 0.25]), 0.5).item()


def test_noise_can_be_drawn_out_of_order() -> None:
    first = sampler.noise(7, 2, 5, 16, 1000)
    again = sampler.noise(7, 2, 5, 16, 1000)
    assert first.uniforms.tolist() == again.uniforms.tolist()
    assert first.token_ids.tolist() == again.token_ids.tolist()
    for seed, canvas, step in [(8, 2, 5), (7, 3, 5), (7, 2, 6), (2**64 - 1, 0, 0)]:
        assert sampler.noise(seed, canvas, step, 16, 1000).token_ids.tolist() != first.token_ids.tolist()


def test_noise_is_uniform() -> None:
    draws = [sampler.noise(1, 0, step, 256, 10) for step in range(200)]
    uniforms = np.concatenate([np.array(draw.uniforms) for draw in draws])
    counts = np.bincount(np.concatenate([np.array(draw.token_ids) for draw in draws]), minlength=10)
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    n = uniforms.size
    assert abs(uniforms.mean() - 0.5) < 5 / math.sqrt(12 * n)  # five standard errors
    assert counts.size == 10
    assert np.abs(counts - n / 10).max() < 5 * math.sqrt(n * 0.09)
