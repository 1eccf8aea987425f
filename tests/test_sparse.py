"""Sparse self-conditioning against the dense sum, from one row to whole answers."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from small_model import random_model

from mlx_diffusiongemma import pipeline as pipeline_module
from mlx_diffusiongemma import request as request_module
from mlx_diffusiongemma import sampler, vocabulary
from mlx_diffusiongemma.denoise import StepInput, StepRules, complete, denoising_step, first_state
from mlx_diffusiongemma.pipeline import Pipeline, load
from mlx_diffusiongemma.vocabulary import LEFT_OUT, DrawShape, TextOnly, read_canvas

C, D, V = 24, 32, 4096
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
ROUNDING = {mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}  # of one number, relative to the largest


def canvas_of_all_kinds(dtype: mx.Dtype) -> tuple[mx.array, nn.Embedding]:
    """Return hidden states [C, D], from flat to one sure token, and a table."""
    key = mx.random.split(mx.random.key(7))
    table = nn.Embedding(V, D)
    table.weight = mx.random.normal((V, D), key=key[0]).astype(dtype)
    sharpness = mx.linspace(0, 6, C)[:, None]
    return (mx.random.normal((C, D), key=key[1]) * sharpness).astype(dtype), table


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_elements", [5 * V, None])
def test_sparse_equals_dense_but_where_it_says_so(dtype: mx.Dtype, chunk_elements: int | None) -> None:
    hidden, table = canvas_of_all_kinds(dtype)
    dense, sparse = (
        read_canvas(hidden, table, 30.0, mx.array(0.3), mx.zeros(C), DrawShape(), None, None, chunk_elements, sparse=s)
        for s in (False, True)
    )
    for name in ("entropy", "argmax", "draw"):
        assert mx.array_equal(getattr(sparse, name), getattr(dense, name))
    wide = np.array(sparse.wide)
    assert not np.array(dense.wide).any() and wide[0] and 0 < wide.sum() < C
    largest = np.abs(np.array(dense.soft_embeddings.astype(mx.float32))).max()
    error = np.array(mx.abs(sparse.soft_embeddings.astype(mx.float32) - dense.soft_embeddings.astype(mx.float32)))
    assert error[~wide].max() <= ROUNDING[dtype] * largest
    assert error[wide].max() > ROUNDING[dtype] * largest  # what is left out there matters
    logits = 30 * np.tanh(np.array(table.as_linear(hidden).astype(mx.float32), np.float64) / 30) / 0.3
    p = np.exp(logits - logits.max(-1, keepdims=True))
    left_out = 1 - np.sort(p / p.sum(-1, keepdims=True), axis=-1)[:, -64:].sum(-1)
    clear = (left_out < LEFT_OUT[dtype] / 4) | (left_out > LEFT_OUT[dtype] * 4)
    assert (wide == (left_out > LEFT_OUT[dtype]))[clear].all() and clear.sum() > C / 2


@pytest.mark.parametrize("case", ["plain", "banned", "text only", "pinned"])
def test_a_completed_state_is_the_dense_one(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "CARRIERS", 4)  # so that what they lack is more than rounding
    model = random_model(vocab_size=V)
    cache = model.make_cache()
    model.prefill(mx.arange(5), cache)
    draws = sampler.noise(1, 0, 1, 8, V)
    row = StepInput(first_state(model, draws.token_ids, 1), draws, mx.array(0.07), cache.views(), mx.array(5))
    rules = StepRules(4.0, 0.005, DrawShape())
    [free] = denoising_step(model, [row], [replace(rules, sparse=True)])
    wide = np.array(free.wide)
    assert 1 < wide.sum() < 8
    if case == "banned":
        rules = replace(rules, banned=tuple(np.array(free.argmax)[:1].tolist()))
    elif case == "text only":
        row = row._replace(text_only=TextOnly(mx.arange(8) % 2 == 0, mx.arange(V) % 3 == 0))
    elif case == "pinned":
        row = row._replace(pins=mx.where(mx.arange(8) % 2 == 1, 7, -1))
    [dense] = denoising_step(model, [row], [rules])
    [sparse] = denoising_step(model, [row], [replace(rules, sparse=True)])
    completed = complete(model, row, replace(rules, sparse=True), sparse)
    expected = np.array(dense.state.soft_embeddings)
    np.testing.assert_allclose(np.array(completed.soft_embeddings), expected, atol=2e-6 * np.abs(expected).max())
    assert mx.array_equal(completed.canvas, dense.state.canvas)
    if np.array(sparse.wide).any():
        assert np.abs(np.array(sparse.state.soft_embeddings) - expected).max() > 1e-4 * np.abs(expected).max()
    if case == "pinned":
        assert not np.array(sparse.wide)[1::2].any()


PROMPTS = ["What is 17 + 25?", "Tell me a story about a fox.", "Count to 30."]


def answers(tiny: Pipeline, seeds: range) -> list[tuple]:
    results = [tiny.generate(prompt, max_tokens=96, seed=seed) for prompt in PROMPTS for seed in seeds]
    return [(result.token_ids, result.stats.denoising_steps) for result in results]


def test_answers_of_tiny_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is tried sparsely, whatever its entropy."""
    dense = answers(load("tiny"), range(1))
    monkeypatch.setattr(pipeline_module, "SPARSE_VOCABULARY", 1)
    monkeypatch.setattr(request_module, "WIDE_ENTROPY", 100.0)
    monkeypatch.setattr(request_module, "MAX_WIDE_SHARE", 1.0)
    tried = []
    monkeypatch.setattr(
        request_module, "complete", lambda *args: tried.append(np.array(args[3].wide)) or complete(*args)
    )
    assert answers(load("tiny"), range(1)) == dense
    wide = np.array([each.mean() for each in tried])
    assert len(tried) > 3 and (wide > 0).any() and (wide < 0.5).any()
    tried.clear()
    assert answers(load("tiny", sparse_self_conditioning=False), range(1)) == dense
    assert not tried
