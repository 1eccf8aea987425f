"""Frozen rows: a step without them against one with all rows, and which rows are frozen."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from small_model import random_model

from mlx_diffusiongemma import sampler
from mlx_diffusiongemma.compaction import OpenRows
from mlx_diffusiongemma.denoise import Denoiser, StepInput, StepResult, StepRules, denoising_step, first_state
from mlx_diffusiongemma.model import DiffusionGemma
from mlx_diffusiongemma.policies import Policy
from mlx_diffusiongemma.vocabulary import DrawShape

C = 8
RULES = StepRules(4.0, 0.005, DrawShape())
FREEZING = Policy("freezing", freeze_confidence=0.9)
READ = ("argmax", "entropy", "confidence")  # not `accepted`: the entropy bound holds for the rows that are computed


def first_input(model: DiffusionGemma, prompt: int = 11) -> StepInput:
    """Return the input of a first step behind a prompt longer than the window of the small model."""
    cache = model.make_cache()
    mx.eval(model.prefill(mx.arange(5, 5 + prompt), cache))
    noise = sampler.noise(1, 0, 1, C, 96)
    offset = mx.array(cache.offset)
    return StepInput(first_state(model, noise.token_ids, 2), noise, mx.array(0.8), cache.views(), offset)


def frozen(rows: OpenRows, row: StepInput, model: DiffusionGemma, certain: list[int]) -> tuple[StepInput, StepResult]:
    """Take a first step after which these rows are certain; return the input without them, and the step."""
    [result] = denoising_step(model, [rows.narrowed(row)], [RULES])
    confidence = np.zeros(C)
    confidence[certain] = 0.95
    rows.widened(result)
    rows.choose(confidence, C)
    return rows.narrowed(row), result


@pytest.mark.parametrize("certain", [[0, 1, 2], [7], [1, 3, 4, 6], [0, 2, 3, 4, 5, 6, 7]])
@pytest.mark.parametrize("prompt", [3, 11])
def test_open_rows_are_as_in_a_whole_step_of_the_same_input(certain: list[int], prompt: int) -> None:
    """The same input twice: what the frozen rows had is what they would have again."""
    model = random_model()
    row = first_input(model, prompt)
    rows = OpenRows(FREEZING, C)
    narrow, whole = frozen(rows, row, model, certain)
    open_rows = [i for i in range(C) if i not in certain]
    assert (narrow.offset - row.offset).tolist() == open_rows
    assert narrow.frozen is not None and {layer.keys.shape[2] for layer in narrow.frozen} == {len(certain)}
    [result] = denoising_step(model, [narrow], [RULES])
    np.testing.assert_allclose(np.array(result.hidden), np.array(whole.hidden)[open_rows], atol=1e-5)
    merged = rows.widened(result)
    for name in READ:
        np.testing.assert_allclose(np.array(getattr(merged, name)), np.array(getattr(whole, name)), atol=1e-5)
    assert merged.state.canvas[mx.array(open_rows)].tolist() == result.state.canvas.tolist()
    assert np.array(merged.accepted)[open_rows].tolist() == result.accepted.tolist()
    assert merged.state.canvas[mx.array(certain)].tolist() == row.state.canvas[mx.array(certain)].tolist()
    assert merged.state.soft_embeddings.shape == (C, 64)
    assert merged.state.history.shape == (2, C)


def test_a_ban_on_an_early_end_is_that_of_the_first_row() -> None:
    rows, model = OpenRows(FREEZING, C), random_model()
    frozen(rows, first_input(model), model, [1, 2, 3])
    assert rows.has_first
    frozen(rows, first_input(model), model, [0, 1, 2])
    assert not rows.has_first


def test_what_is_frozen_twice_comes_from_the_step_that_computed_it() -> None:
    model = random_model()
    row = first_input(model)
    rows = OpenRows(FREEZING, C)
    narrow, first = frozen(rows, row, model, [5, 1])
    [second] = denoising_step(model, [narrow], [RULES])
    rows.widened(second)
    rows.choose(np.array([0.1, 0.95, 0.1, 0.92, 0.1, 0.95, 0.1, 0.1]), C)
    again = rows.narrowed(row)
    assert first.seen is not None and second.seen is not None and again.frozen is not None
    for of_first, of_second, known in zip(first.seen, second.seen, again.frozen, strict=True):
        for name in ("keys", "values"):
            expected = [getattr(of_first, name)[:, :, 1], getattr(of_second, name)[:, :, 2 + 2]]  # open: 0, 2, 3, ...
            expected.append(getattr(of_first, name)[:, :, 5])
            np.testing.assert_array_equal(np.array(getattr(known, name)), np.stack([np.array(e) for e in expected], 2))


def test_compiled_and_in_a_batch_a_narrowed_step_is_the_same() -> None:
    model = random_model()
    row, other = first_input(model), first_input(model, 4)
    narrow, _ = frozen(OpenRows(FREEZING, C), row, model, [0, 3])
    [alone] = denoising_step(model, [narrow], [RULES])
    for results in (
        denoising_step(model, [other, narrow], [RULES] * 2),
        Denoiser(model, compiled=True)([other, narrow], [RULES] * 2),
    ):
        np.testing.assert_allclose(np.array(results[1].hidden), np.array(alone.hidden), atol=1e-5)
        assert results[0].seen is None and results[1].seen is not None


def chosen(rows: int, confidence: list[float], canvas_length: int = 16, **policy: object) -> list[int]:
    """Return what is frozen after a step of so many confidences, for a canvas of `rows` rows."""
    model = random_model()
    open_rows = OpenRows(Policy("rule", **{"freeze_confidence": 0.9, **policy}), canvas_length)  # type: ignore[arg-type]
    cache = model.make_cache()
    mx.eval(model.prefill(mx.arange(5), cache))
    noise = sampler.noise(1, 0, 1, len(confidence), 96)
    row = StepInput(first_state(model, noise.token_ids, 1), noise, mx.array(0.8), cache.views(), mx.array(5))
    [result] = denoising_step(model, [open_rows.narrowed(row)], [RULES])
    open_rows.widened(result)
    open_rows.choose(np.array(confidence), rows)
    more = mx.zeros((max(0, rows - len(confidence)),), mx.int32)
    state = first_state(model, mx.concatenate([row.state.canvas, more])[:rows], 1)
    noise = sampler.noise(1, 0, 2, rows, 96)
    narrow = open_rows.narrowed(row._replace(state=state, noise=noise))
    return sorted(set(range(rows)) - set((narrow.offset - 5).tolist() if narrow.frozen else range(rows)))


def test_buckets_of_an_eighth_are_open_and_the_most_certain_rows_frozen() -> None:
    assert chosen(8, [0.95, 0.5, 0.99, 0.92, 0.1, 0.5, 0.1, 0.1]) == [0, 2]  # five are open: six are computed
    assert chosen(8, [0.95] * 7 + [0.5]) == [0, 1, 2, 3, 4, 5]
    assert chosen(8, [0.95] * 8) == [0, 1, 2, 3, 4, 5]  # something is computed in every step
    assert chosen(8, [0.5] * 8) == []


def test_rows_that_are_added_are_open_and_those_that_are_dropped_forgotten() -> None:
    assert chosen(8, [0.95, 0.95, 0.95, 0.95]) == [0, 1, 2, 3]
    assert chosen(4, [0.95, 0.95, 0.5, 0.5, 0.95, 0.95, 0.95, 0.95]) == [0, 1]


def test_a_refresh_computes_all_rows() -> None:
    assert chosen(8, [0.95] * 4 + [0.1] * 4, refresh_steps=1) == []
    assert chosen(8, [0.95] * 4 + [0.1] * 4, refresh_steps=2) == [0, 1, 2, 3]
