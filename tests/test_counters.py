"""What a step does, counted: host waits, traces, bytes, keys read, encoder passes."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from small_model import random_model

from mlx_diffusiongemma import layers, sampler
from mlx_diffusiongemma.checkpoint import load_checkpoint
from mlx_diffusiongemma.denoise import Denoiser, StepInput, StepResult, StepRules, first_state
from mlx_diffusiongemma.events import CanvasCommitted, DenoisingStep
from mlx_diffusiongemma.pipeline import Pipeline, load
from mlx_diffusiongemma.prefixes import Prefixes
from mlx_diffusiongemma.request import Request
from mlx_diffusiongemma.vocabulary import DrawShape

STORY = "Tell me a story about a fox."


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return load("tiny")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that evaluate arrays, as they happen."""
    calls: list[str] = []

    def counted(name: str) -> Callable[..., None]:
        plain = getattr(mx, name)

        def call(*arrays: Any) -> None:
            calls.append(name)
            plain(*arrays)

        return call

    for name in ("eval", "async_eval", "synchronize"):
        monkeypatch.setattr(mx, name, counted(name))
    return calls


@pytest.mark.parametrize("count", [1, 2])
def test_the_host_waits_once_per_step(
    tiny: Pipeline, waits: list[str], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many requests share it; taking it over computes nothing."""
    denoise, absorb, steps = Pipeline.denoise, Request.absorb, []

    def counted_denoise(pipeline: Pipeline, requests: list[Request]) -> list[StepResult]:
        waits.clear()
        results = denoise(pipeline, requests)
        steps.append(list(waits))
        waits.clear()
        return results

    def counted_absorb(*args: Any) -> DenoisingStep:
        waits.clear()  # another row of the step may have committed its canvas
        event = absorb(*args)
        assert not waits
        return event

    monkeypatch.setattr(Pipeline, "denoise", counted_denoise)
    monkeypatch.setattr(Request, "absorb", counted_absorb)
    tiny.generate_batch([STORY] * count, max_tokens=128, seed=list(range(count)))
    assert len(steps) >= 4 and all(calls == ["eval"] for calls in steps)


def test_what_is_read_after_the_wait_is_there(tiny: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking over a step computes nothing more: with every primitive of the loop gone, it still works."""
    request = tiny.open(tiny.prepare(STORY, {"max_tokens": 64, "seed": 1}))
    for _ in request.prefill():
        pass
    [result] = tiny.denoise([request])

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("something was computed after the step")

    for name in ("where", "concatenate", "mean", "argmax", "take_along_axis", "array", "zeros"):
        monkeypatch.setattr(mx, name, forbidden)
    event = request.absorb(result)
    assert len(event.token_ids) == len(event.entropies) == 64


def test_sliding_layers_read_their_window_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()  # a window of 8
    cache = model.make_cache()
    model.prefill(mx.arange(90), cache)
    read: list[tuple[int, int]] = []
    plain = layers.canvas_attention

    def counted(queries: mx.array, prefix: Any, canvas: Any, **options: Any) -> mx.array:
        read.append((prefix.keys.shape[2], sum(array.nbytes for array in prefix)))
        return plain(queries, prefix, canvas, **options)

    monkeypatch.setattr(layers, "canvas_attention", counted)
    mx.eval(model.denoise([mx.arange(8)], [mx.zeros((8, 64))], [cache.views()], [mx.array(90)]))
    sliding, full = (
        (7, 2 * 7 * 2 * 16 * 4),
        (90, 2 * 90 * 1 * 32 * 4),
    )  # keys and values x tokens x heads x size x bytes
    assert read == [sliding, sliding, full]


def test_a_canvas_is_encoded_only_when_another_follows(tiny: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    plain = Request.encode_canvas
    monkeypatch.setattr(Request, "encode_canvas", lambda request: encoded.append(request) or plain(request))
    for max_tokens, canvases in ((64, 1), (160, 3)):
        encoded.clear()
        result = tiny.generate(STORY, max_tokens=max_tokens, seed=1, extra_eos_tokens=[])
        assert result.stats.canvases <= canvases and len(encoded) == result.stats.canvases - 1
    assert encoded


def test_a_step_never_holds_canvas_times_vocabulary() -> None:
    C, V = 256, 1 << 16
    model = random_model(vocab_size=V)
    cache = model.make_cache()
    model.prefill(mx.arange(9), cache)
    draws = sampler.noise(1, 0, 1, C, V)
    row = StepInput(first_state(model, draws.token_ids, 1), draws, mx.array(0.8), cache.views(), mx.array(9))
    mx.eval(model.parameters(), cache.arrays(), list(row.state), list(draws))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(Denoiser(model, compiled=False)([row], [StepRules(0.1, 0.005, DrawShape())]))
    temporaries = (mx.get_peak_memory() - before) / (4 * C * V)
    print(f"temporaries of a step: {temporaries:.2f} arrays of canvas x vocabulary; an eager step holds five")
    assert temporaries < 0.5  # measured 0.33


@pytest.mark.slow
def test_no_step_is_traced_again() -> None:
    """The first request finds what the warm-up traced, and so do later canvases and other requests."""
    pipeline = Pipeline(load_checkpoint("tiny"), compiled=True, prefixes=Prefixes(0))
    pipeline.warm_up()
    traced = pipeline.retraces
    pipeline.generate(STORY, max_tokens=192, seed=1, guard_empty=True)
    assert pipeline.retraces == traced  # the first request finds everything compiled
    pieces = 2 * len(pipeline.model.layers) + 3
    assert pieces <= traced <= pieces + 1  # the first canvas bans an end at its start, the others do not
    results = [pipeline.generate(f"{STORY} {'Again. ' * n}", max_tokens=192, seed=n) for n in range(3)]
    assert max(result.stats.canvases for result in results) > 1
    assert pipeline.retraces == traced


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.timeout(1800)
def test_a_hundred_generations_stay_as_fast_and_as_small() -> None:
    """Prompts grow and start over; times per step and memory after the first ten do not."""
    pipeline = Pipeline(load_checkpoint("tiny"), prefixes=Prefixes(4 * 2**20))
    seconds, cached, active = [], [], []
    for number in range(100):
        prompt = STORY + " Then go on. " * (3 * (number % 20))
        began = time.process_time()  # of this process, whatever else the machine does
        events = list(pipeline.stream(prompt, max_tokens=128, seed=number))
        steps = sum(isinstance(event, DenoisingStep) for event in events)
        assert any(isinstance(event, CanvasCommitted) for event in events)
        seconds.append((time.process_time() - began) / steps)
        cached.append(mx.get_cache_memory())
        active.append(mx.get_active_memory())
    early, late = (median(seconds[first : first + 40]) for first in (10, 60))
    print(f"seconds per step {early:.4f} then {late:.4f}; active bytes {max(active[20:40])} then {max(active[80:])}")
    assert late < 1.25 * early
    assert max(active[80:]) < 1.05 * max(active[20:40])
    assert max(cached[80:]) < 1.5 * max(cached[20:40]) + 2**20
    assert np.isfinite(seconds).all()
