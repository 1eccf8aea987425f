"""One denoising step: against a naive composition, compiled against plain, alone against batched."""

from __future__ import annotations

import gc
import weakref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.lora import LoRALinear
from small_model import random_model

from mlx_diffusiongemma import sampler
from mlx_diffusiongemma.denoise import (
    Denoiser,
    StepInput,
    StepResult,
    StepRules,
    denoising_step,
    first_state,
    pin_state,
    place,
)
from mlx_diffusiongemma.model import DiffusionGemma
from mlx_diffusiongemma.vocabulary import DrawShape, TextOnly

RULES = StepRules(entropy_bound=4.0, confidence_threshold=0.005, shape=DrawShape())


def make_row(model: DiffusionGemma, prompt_length: int, seed: int, stability_threshold: int = 1) -> StepInput:
    cache = model.make_cache()
    model.prefill(mx.random.randint(0, 96, (prompt_length,), key=mx.random.key(prompt_length)), cache)
    state = first_state(model, sampler.noise(seed, 0, 0, 8, 96).token_ids, stability_threshold)
    return StepInput(state, sampler.noise(seed, 0, 1, 8, 96), mx.array(0.8), cache.views(), mx.array(cache.offset))


def values(result: StepResult) -> dict[str, np.ndarray]:
    return {
        "canvas": np.array(result.state.canvas),
        "soft_embeddings": np.array(result.state.soft_embeddings),
        "history": np.array(result.state.history),
        "argmax": np.array(result.argmax),
        "accepted": np.array(result.accepted),
        "mean_entropy": np.array(result.mean_entropy),
        "entropy": np.array(result.entropy),
        "finished": np.array(result.finished),
    }


def assert_same(one: StepResult, other: StepResult) -> None:
    for (name, a), b in zip(values(one).items(), values(other).values(), strict=True):
        if a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, atol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_step_equals_the_parts() -> None:
    model = random_model()
    row = make_row(model, 11, seed=1)
    (result,) = denoising_step(model, [row], [RULES])
    table = model.model.decoder.embed_tokens.weight
    [hidden] = model.denoise([row.state.canvas], [mx.zeros((8, 64))], [row.prefix], [row.offset])
    logits = mx.tanh(hidden @ table.T / 30) * 30 / 0.8
    p = np.array(mx.softmax(logits, axis=-1), np.float64)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
    accepted = np.array(sampler.accept(mx.array(entropy.astype(np.float32)), 4.0))
    draw = [
        int(np.searchsorted(np.cumsum(r), u, side="right"))
        for r, u in zip(p, np.array(row.noise.uniforms), strict=True)
    ]
    assert 0 < accepted.sum() < 8  # both branches are taken
    expected = np.where(accepted, draw, np.array(row.noise.token_ids))
    got = values(result)
    np.testing.assert_array_equal(got["accepted"], accepted)
    np.testing.assert_array_equal(got["argmax"], p.argmax(-1))
    np.testing.assert_array_equal(got["canvas"], expected)
    np.testing.assert_allclose(got["soft_embeddings"], p @ np.array(table, np.float64), atol=1e-5)
    np.testing.assert_allclose(got["mean_entropy"], entropy.mean(), atol=1e-5)
    np.testing.assert_allclose(got["entropy"], entropy, atol=1e-5)


def test_pins_are_certain_and_enter_the_signal_exactly() -> None:
    """Acceptance, canvas, stop test and self-conditioning of a step with pins, from those of the free positions."""
    model = random_model()
    free = make_row(model, 11, seed=1)
    pins = np.array([-1, 7, -1, -1, 90, -1, -1, 7])
    row = free._replace(
        state=free.state._replace(canvas=place(mx.array(pins), free.state.canvas)), pins=mx.array(pins, dtype=mx.int32)
    )
    (plain,), (pinned,) = (denoising_step(model, [each], [RULES]) for each in (row._replace(pins=None), row))
    before, after, fixed = values(plain), values(pinned), pins >= 0
    assert not np.array_equal(before["argmax"][fixed], pins[fixed])
    entropy = np.where(fixed, 0, before["entropy"])
    np.testing.assert_array_equal(after["entropy"], entropy)
    np.testing.assert_array_equal(after["argmax"], np.where(fixed, pins, before["argmax"]))
    accepted = np.array(sampler.accept(mx.array(entropy), RULES.entropy_bound))
    np.testing.assert_array_equal(after["accepted"], accepted)
    assert accepted[fixed].all() and 0 < accepted[~fixed].sum() < 5
    assert (after["canvas"][fixed] == pins[fixed]).all()
    np.testing.assert_array_equal(after["canvas"][~accepted], np.array(row.noise.token_ids)[~accepted])
    table = np.array(model.model.decoder.embed_tokens.weight)
    np.testing.assert_array_equal(after["soft_embeddings"][fixed], table[pins[fixed]])
    np.testing.assert_array_equal(after["soft_embeddings"][~fixed], before["soft_embeddings"][~fixed])
    np.testing.assert_allclose(after["mean_entropy"], entropy.mean(), rtol=1e-6)
    np.testing.assert_array_equal(after["history"][-1], after["argmax"])


def test_tokens_are_put_into_a_canvas_under_way() -> None:
    model = random_model()
    (result,) = denoising_step(model, [make_row(model, 11, seed=1)], [RULES])
    state = pin_state(model, result.state, mx.array([-1, 7, -1, -1, -1, -1, -1, -1]))
    table = np.array(model.model.decoder.embed_tokens.weight)
    canvas, soft = np.array(result.state.canvas), np.array(result.state.soft_embeddings)
    canvas[1], soft[1] = 7, table[7]
    np.testing.assert_array_equal(np.array(state.canvas), canvas)
    np.testing.assert_array_equal(np.array(state.soft_embeddings), soft)
    np.testing.assert_array_equal(np.array(state.history), np.array(result.state.history))


@pytest.mark.slow
def test_compiled_equals_plain() -> None:
    """Off by default on the CPU, where compiling costs seconds; equal there all the same."""
    model = random_model()
    rules = [RULES, StepRules(0.1, 0.005, DrawShape(top_k=5), banned=(1, 2))]
    pins = mx.array([-1, -1, 5, -1, -1, -1, 9, -1])
    text_only = TextOnly(mx.arange(8) > 3, mx.arange(96) < 20)
    rows = [
        make_row(model, 11, seed=1)._replace(pins=pins),
        make_row(model, 4, seed=2, stability_threshold=2)._replace(text_only=text_only),
    ]
    plain, compiled = Denoiser(model, compiled=False), Denoiser(model, compiled=True)
    for step in range(1, 4):
        expected, got = plain(rows, rules), compiled(rows, rules)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
        rows = [
            row._replace(state=result.state, noise=sampler.noise(3, 0, step, 8, 96), temperature=mx.array(0.7))
            for row, result in zip(rows, expected, strict=True)
        ]


def test_nothing_is_traced_twice() -> None:
    """Longer prefixes, later canvases and other requests find every piece; a new kind of input adds one."""
    model = random_model()
    denoiser = Denoiser(model, compiled=True)  # lazy: nothing is compiled before it is evaluated, but traced
    denoiser([make_row(model, 3, seed=1)], [RULES])
    pieces = 2 * len(model.layers) + 3  # before and behind attention, entrance, exit, vocabulary
    assert denoiser.retraces == pieces
    for length in range(4, 12):
        denoiser([make_row(model, length, seed=length)], [RULES])
    assert denoiser.retraces == pieces
    pinned = make_row(model, 12, seed=1)._replace(pins=mx.array([-1, 7, -1, -1, -1, -1, -1, -1]))
    for _ in range(2):
        denoiser([pinned], [RULES])
    assert denoiser.retraces == pieces + 1
    for length in range(4, 7):
        denoiser([make_row(model, length, seed=1), pinned], [RULES, RULES])
    assert denoiser.retraces == pieces + 1 + pieces - 1  # twice the tokens: all but the vocabulary, which goes by rows
    assert Denoiser(model, compiled=False).retraces == 0


def test_compiled_pieces_see_weights_that_change() -> None:
    """New arrays, and a new module in place of an old one, as an adapter puts there."""
    model = random_model()
    row, plain, compiled = make_row(model, 5, seed=1), Denoiser(model, compiled=False), Denoiser(model, compiled=True)
    changes = [
        lambda attention, mlp: None,
        lambda attention, mlp: mlp.update({"gate_proj": {"weight": -mlp.gate_proj.weight}}),
        lambda attention, mlp: attention.update_modules(
            {"q_proj": LoRALinear.from_base(attention.q_proj, r=2), "k_proj": scaled(attention.k_proj, 0.5)}
        ),
    ]
    seen = []
    for change in changes:
        change(model.layers[1].self_attn, model.layers[1].mlp)
        mx.random.seed(0)
        lora = model.layers[1].self_attn.q_proj
        if isinstance(lora, LoRALinear):
            lora.lora_b = mx.random.normal(lora.lora_b.shape)
        [expected], [got] = plain([row], [RULES]), compiled([row], [RULES])
        assert_same(got, expected)
        seen.append(np.array(got.hidden))
    assert not np.allclose(seen[0], seen[1], atol=1e-3) and not np.allclose(seen[1], seen[2], atol=1e-3)


def scaled(linear: nn.Linear, factor: float) -> nn.Linear:
    other = nn.Linear(*reversed(linear.weight.shape), bias=False)
    other.weight = linear.weight * factor
    return other


def test_a_denoiser_that_is_gone_keeps_no_weights() -> None:
    model = random_model()
    denoiser = Denoiser(model, compiled=True)
    mx.eval(denoiser([make_row(model, 5, seed=1)], [RULES]))
    gone = weakref.ref(model)
    del model, denoiser
    gc.collect()
    assert gone() is None


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    model = random_model()
    rows = [make_row(model, length, seed=length) for length in (3, 21, 9)]
    together = denoising_step(model, rows, [RULES] * 3)
    for row, result in zip(rows, together, strict=True):
        assert_same(result, denoising_step(model, [row], [RULES])[0])


def test_banned_ids_cannot_stand_at_position_0() -> None:
    model = random_model()
    row = make_row(model, 5, seed=4)
    (free,) = denoising_step(model, [row], [RULES])
    first = int(free.argmax[0].item())
    (guarded,) = denoising_step(model, [row], [StepRules(4.0, 0.005, DrawShape(), banned=(first,))])
    assert guarded.argmax[0].item() != first
    assert np.array(guarded.argmax)[1:].tolist() == np.array(free.argmax)[1:].tolist()


@pytest.mark.parametrize(("threshold", "finishes_at"), [(0, 1), (1, 2), (2, 3)])
def test_stability_counts_earlier_steps(threshold: int, finishes_at: int) -> None:
    """A model whose prediction never changes is stable after exactly `stability_threshold` more steps."""
    model = random_model()
    model.model.decoder.norm.weight = mx.zeros((64,))  # uniform logits: argmax 0 everywhere
    rules = StepRules(0.1, confidence_threshold=100.0, shape=DrawShape())
    row = make_row(model, 5, seed=4, stability_threshold=threshold)
    finished = []
    for _ in range(4):
        (result,) = denoising_step(model, [row], [rules])
        finished.append(bool(result.finished.item()))
        row = row._replace(state=result.state)
    assert finished.index(True) + 1 == finishes_at
