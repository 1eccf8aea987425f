"""The streaming vocabulary pass against the naive one in float64, and its draws against counts."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_diffusiongemma.vocabulary import CanvasReading, DrawShape, TextOnly, read_canvas, soft_embed

SOFTCAP, C, D = 30.0, 24, 32


def table(V: int, scale: float = 1.0) -> nn.Embedding:
    embedding = nn.Embedding(V, D)
    embedding.weight = mx.random.normal((V, D), key=mx.random.key(V)) * scale
    return embedding


def inputs(seed: int = 0) -> tuple[mx.array, mx.array]:
    key = mx.random.split(mx.random.key(seed))
    return mx.random.normal((C, D), key=key[0]), mx.random.uniform(shape=(C,), key=key[1])


def probabilities(hidden: mx.array, embedding: nn.Embedding, temperature: float) -> np.ndarray:
    logits = np.array(hidden, np.float64) @ np.array(embedding.weight, np.float64).T
    logits = np.tanh(logits / SOFTCAP) * SOFTCAP / temperature
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def read(embedding: nn.Module, shape: DrawShape = DrawShape(), seed: int = 0, **options) -> CanvasReading:  # noqa: B008
    hidden, uniforms = inputs(seed)
    return read_canvas(hidden, embedding, SOFTCAP, mx.array(0.6), uniforms, shape, **options)


@pytest.mark.parametrize("V", [96, 1024, 5 * 512])  # 96 is not a multiple of the draw's block
def test_equals_the_naive_pass(V: int) -> None:
    hidden, uniforms = inputs()
    embedding = table(V)
    reading = read(embedding)
    p = probabilities(hidden, embedding, 0.6)
    assert np.array(reading.argmax).tolist() == p.argmax(-1).tolist()
    np.testing.assert_allclose(np.array(reading.entropy), -(p * np.log(p)).sum(-1), atol=2e-5)
    np.testing.assert_allclose(np.array(reading.soft_embeddings), p @ np.array(embedding.weight, np.float64), atol=2e-5)
    expected = [
        int(np.searchsorted(np.cumsum(row), u, side="right")) for row, u in zip(p, np.array(uniforms), strict=True)
    ]
    assert np.array(reading.draw).tolist() == expected


def test_entropy_of_a_large_vocabulary_keeps_its_digits() -> None:
    """A plain float32 sum over the real vocabulary size is 4.7e-4 nats off on the CPU; in two levels 2.4e-6."""
    embedding = table(1 << 18, scale=0.3)
    p = probabilities(inputs()[0][:2], embedding, 0.6)
    hidden, uniforms = inputs()
    reading = read_canvas(hidden[:2], embedding, SOFTCAP, mx.array(0.6), uniforms[:2], DrawShape())
    np.testing.assert_allclose(np.array(reading.entropy), -(p * np.log(p)).sum(-1), atol=1e-5)


@pytest.mark.parametrize("rows", [5, 24])
def test_positions_that_take_text_only(rows: int) -> None:
    """There the distribution is that of a vocabulary without control tokens; elsewhere nothing is different."""
    embedding = table(1024)
    positions, control = np.arange(C) % 3 == 1, np.arange(1024) % 2 == 0
    text_only = TextOnly(mx.array(positions), mx.array(control))
    reading = read(embedding, text_only=text_only, chunk_elements=rows * 1024)
    p = probabilities(inputs()[0], embedding, 0.6)
    assert control[p[positions].argmax(-1)].any()
    p[np.ix_(positions, control)] = 0
    p /= p.sum(-1, keepdims=True)
    assert np.array(reading.argmax).tolist() == p.argmax(-1).tolist()
    entropy = -(p * np.log(p, out=np.zeros_like(p), where=p > 0)).sum(-1)
    np.testing.assert_allclose(np.array(reading.entropy), entropy, atol=2e-5)
    np.testing.assert_allclose(np.array(reading.soft_embeddings), p @ np.array(embedding.weight, np.float64), atol=2e-5)
    assert not control[np.array(reading.draw)[positions]].any()


@pytest.mark.parametrize("rows", [1, 5, 24])
def test_chunks_change_nothing(rows: int) -> None:
    embedding = table(1024)
    whole, parts = read(embedding), read(embedding, chunk_elements=rows * 1024)
    assert np.array(parts.argmax).tolist() == np.array(whole.argmax).tolist()
    assert np.array(parts.draw).tolist() == np.array(whole.draw).tolist()
    np.testing.assert_allclose(np.array(parts.entropy), np.array(whole.entropy), atol=1e-5)
    np.testing.assert_allclose(np.array(parts.soft_embeddings), np.array(whole.soft_embeddings), atol=1e-5)


def test_peak_memory_is_a_few_chunks() -> None:
    V, rows = 1 << 17, 1
    embedding = table(V)
    mx.eval(embedding.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(read(embedding, chunk_elements=rows * V))
    chunk = rows * V * 4
    # Measured 7: the back end runs some operations ahead. Three arrays of the whole canvas would be 72.
    assert mx.get_peak_memory() - before < 10 * chunk


def counts(shape: DrawShape, draws: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Draw many times from one row of four likely tokens; return counts and the row's probabilities."""
    embedding = table(1024, scale=0.05)
    base = np.zeros((1024, D), np.float32)
    base[[3, 600, 601, 1023], 0] = np.log([4.0, 3.0, 2.0, 1.0]) * 0.6 + 6
    embedding.weight = mx.array(base)
    hidden = mx.zeros((draws, D)).at[:, 0].add(1.0)
    uniforms = (mx.arange(draws) + 0.5) / draws
    reading = read_canvas(hidden, embedding, SOFTCAP, mx.array(0.6), uniforms, shape)
    p = probabilities(hidden[:1], embedding, 0.6)[0]
    return np.bincount(np.array(reading.draw), minlength=1024) / draws, p


def test_draws_follow_the_probabilities() -> None:
    drawn, p = counts(DrawShape())
    np.testing.assert_allclose(drawn, p, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        (DrawShape(top_k=1), [3]),
        (DrawShape(top_k=2), [3, 600]),
        (DrawShape(top_p=0.35), [3]),
        (DrawShape(top_p=0.5), [3, 600]),  # the first covers 0.4 of the likely mass: the second crosses the bound
        (DrawShape(min_p=0.45), [3, 600, 601]),
        (DrawShape(min_p=1.0), [3]),
        (DrawShape(top_k=3, min_p=0.7), [3, 600]),
        (DrawShape(greedy=True), [3]),
    ],
)
def test_rules_narrow_the_draw_only(shape: DrawShape, kept: list[int]) -> None:
    drawn, p = counts(shape)
    assert np.flatnonzero(drawn).tolist() == kept
    np.testing.assert_allclose(drawn[kept], p[kept] / p[kept].sum(), atol=1e-3)
    plain, narrowed = read(table(1024)), read(table(1024), shape)
    for name in ("entropy", "argmax", "soft_embeddings"):
        assert np.array_equal(np.array(getattr(plain, name)), np.array(getattr(narrowed, name))), name


@pytest.mark.parametrize("shape", [DrawShape(top_k=0), DrawShape(top_k=5000), DrawShape(top_p=1.0), DrawShape(min_p=0)])
def test_rules_that_narrow_nothing(shape: DrawShape) -> None:
    assert np.array(read(table(1024), shape).draw).tolist() == np.array(read(table(1024)).draw).tolist()


@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-24])
@pytest.mark.parametrize("V", [96, 1024])
def test_extreme_uniforms_never_draw_an_impossible_token(u: float, V: int) -> None:
    embedding = table(V)
    embedding.weight = mx.zeros((V, D)).at[5, 0].add(29.0).at[V - 9, 0].add(29.0)
    hidden = mx.zeros((4, D)).at[:, 0].add(10.0)
    reading = read_canvas(hidden, embedding, SOFTCAP, mx.array(0.1), mx.full((4,), u), DrawShape())
    assert set(np.array(reading.draw).tolist()) == {5 if u == 0 else V - 9}


def test_ban_holds_at_position_0_and_in_the_signal() -> None:
    embedding = table(1024)
    free = read(embedding)
    banned = int(free.argmax[0].item())
    reading = read(embedding, banned=mx.array([banned]))
    assert reading.argmax[0].item() != banned
    assert np.isfinite(np.array(reading.entropy)).all()
    hidden, _ = inputs()
    p = probabilities(hidden, embedding, 0.6)[0]
    p[banned] = 0
    expected = p / p.sum() @ np.array(embedding.weight, np.float64)
    np.testing.assert_allclose(np.array(reading.soft_embeddings)[0], expected, atol=2e-5)
    assert np.array(reading.argmax)[1:].tolist() == np.array(free.argmax)[1:].tolist()


def test_half_precision_signal_is_rounded_where_the_reference_rounds() -> None:
    """Logits are stored in the table's dtype before the softmax of the soft embeddings, in float32 for all else."""
    embedding = table(1024)
    embedding.weight = embedding.weight.astype(mx.bfloat16)
    hidden, uniforms = inputs()
    hidden = hidden.astype(mx.bfloat16)
    reading = read_canvas(hidden, embedding, SOFTCAP, mx.array(0.6), uniforms, DrawShape())
    logits = mx.tanh((hidden @ embedding.weight.T).astype(mx.float32) / SOFTCAP) * SOFTCAP / 0.6
    signal = mx.softmax(logits.astype(mx.bfloat16).astype(mx.float32), axis=-1).astype(mx.bfloat16) @ embedding.weight
    assert mx.array_equal(reading.soft_embeddings, signal)
    exact = mx.softmax(logits, axis=-1)
    np.testing.assert_allclose(np.array(reading.entropy), np.array(-(exact * mx.log(exact)).sum(-1)), atol=1e-4)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_quantised_table(mode: str) -> None:
    settings = {"affine": (64, 8), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[mode]
    plain = nn.Embedding(128, 64)
    quantised = plain.to_quantized(*settings, mode=mode)
    group_size, bits = settings
    dense = mx.dequantize(
        quantised.weight, quantised.scales, quantised.get("biases"), group_size=group_size, bits=bits, mode=mode
    )
    p = mx.softmax(mx.random.normal((3, 128)), axis=-1)
    np.testing.assert_allclose(np.array(soft_embed(quantised, p)), np.array(p @ dense.astype(mx.float32)), atol=1e-5)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_quantised_table_is_read_like_its_values(mode: str) -> None:
    """Head and soft embeddings of a packed table against the same table unpacked, in float32 and in bfloat16."""
    settings = {"affine": (32, 8), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[mode]
    quantised = table(1024).to_quantized(*settings, mode=mode)
    assert (quantised.scales.dtype == mx.uint8) == (mode != "affine")  # not a dtype to compute in
    dense = nn.Embedding(1024, D)
    dense.weight = quantised(mx.arange(1024)).astype(mx.float32)
    hidden, uniforms = inputs()
    expected, got = read(dense), read(quantised)
    assert got.soft_embeddings.dtype == mx.float32
    assert got.argmax.tolist() == expected.argmax.tolist()
    np.testing.assert_allclose(np.array(got.entropy), np.array(expected.entropy), atol=1e-5)
    np.testing.assert_allclose(np.array(got.soft_embeddings), np.array(expected.soft_embeddings), atol=1e-5)

    # In bfloat16 the CPU adds up in bfloat16 too, so both matmuls are coarser than one rounding (2**-8).
    quantised.set_dtype(mx.bfloat16)
    values = quantised(mx.arange(1024)).astype(mx.float32)
    hidden = hidden.astype(mx.bfloat16)
    reading = read_canvas(hidden, quantised, SOFTCAP, mx.array(0.6), uniforms, DrawShape())
    assert reading.soft_embeddings.dtype == mx.bfloat16
    logits = quantised.as_linear(hidden).astype(mx.float32)
    assert furthest(logits, hidden.astype(mx.float32) @ values.T) < 0.02  # measured 0.008 (nvfp4) to 0.0144 (mxfp4)
    stored = (mx.tanh(logits / SOFTCAP) * SOFTCAP / 0.6).astype(mx.bfloat16).astype(mx.float32)
    p = mx.softmax(stored, axis=-1).astype(mx.bfloat16).astype(mx.float32)
    assert furthest(reading.soft_embeddings, p @ values) < 0.02  # measured 0.006 (mxfp4) to 0.012 (nvfp4)


def furthest(got: mx.array, expected: mx.array) -> float:
    """Return the largest error, relative to the largest number."""
    return float((mx.abs(got.astype(mx.float32) - expected).max() / mx.abs(expected).max()).item())
