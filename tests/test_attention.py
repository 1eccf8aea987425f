"""Masks, chunks, caches and layers against naive attention."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from small_model import random_model

from mlx_diffusiongemma import masks
from mlx_diffusiongemma.cache import FullCache, KeysAndValues, SlidingCache
from mlx_diffusiongemma.layers import ReadOnlyPrefix


def naive_attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Attend head by head in float64; [N, L, H]."""
    groups = queries.shape[0] // keys.shape[0]
    out = np.zeros_like(queries, dtype=np.float64)
    for head in range(queries.shape[0]):
        scores = queries[head].astype(np.float64) @ keys[head // groups].astype(np.float64).T
        weights = np.where(allowed, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        out[head] = weights / weights.sum(-1, keepdims=True) @ values[head // groups]
    return out


def test_causal_mask_as_drawn() -> None:
    rows = np.array(masks.causal_mask(3, 5, 3)).astype(int).tolist()
    assert rows == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert np.array(masks.causal_mask(2, 4, None)).astype(int).tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_chunks_lie_at_absolute_multiples() -> None:
    assert list(masks.chunks(0, 10, 4)) == [(0, 4), (4, 8), (8, 10)]
    assert list(masks.chunks(3, 10, 4)) == [(3, 4), (4, 8), (8, 10)]
    assert list(masks.chunks(8, 8, 4)) == []


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("block", [1, 4, 512])
def test_causal_attention_in_blocks(window: int | None, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "MAX_QUERY_BLOCK", block)
    monkeypatch.setattr(masks, "MIN_QUERY_BLOCK", 1)
    key = mx.random.split(mx.random.key(0), 3)
    queries = mx.random.normal((1, 4, 9, 16), key=key[0])
    keys, values = (mx.random.normal((1, 2, 14, 16), key=k) for k in key[1:])
    out = masks.causal_attention(queries, keys, values, window)
    allowed = np.array([[k <= q + 5 and (window is None or k > q + 5 - window) for k in range(14)] for q in range(9)])
    expected = naive_attention(*(np.array(a)[0] for a in (queries, keys, values)), allowed)
    np.testing.assert_allclose(np.array(out)[0], expected, atol=1e-5)


def test_query_blocks_bound_the_scores() -> None:
    for keys in (100, 10_000, 262_144):
        block = masks.query_block(16, keys)
        assert block == masks.MIN_QUERY_BLOCK or 16 * block * keys <= masks.MAX_SCORES
    assert masks.query_block(16, 1535) == masks.MAX_QUERY_BLOCK


@pytest.mark.parametrize("lengths", [[20], [5, 1, 1, 7, 6], [1] * 20, [3, 17]])
def test_sliding_cache_keeps_the_last_window_less_one(lengths: list[int]) -> None:
    cache = SlidingCache(sliding_window=8)
    tokens = mx.arange(20, dtype=mx.float32).reshape(1, 1, 20, 1)
    start = 0
    for length in lengths:
        known = cache.append(tokens[:, :, start : start + length], -tokens[:, :, start : start + length])
        start += length
        first = max(0, start - length - 7)
        assert known.keys.flatten().tolist() == list(range(first, start))
    assert cache.offset == 20
    view = cache.view()
    assert view.keys.flatten().tolist() == list(range(13, 20))
    assert view.values.flatten().tolist() == [-float(i) for i in range(13, 20)]


def test_window_of_one_sees_no_prefix() -> None:
    cache = SlidingCache(sliding_window=1)
    cache.append(mx.ones((1, 1, 3, 2)), mx.ones((1, 1, 3, 2)))
    assert cache.view().keys.shape == (1, 1, 0, 2)


def test_full_cache_keeps_everything() -> None:
    cache = FullCache()
    for length in (300, 1, 5):
        cache.append(mx.ones((1, 1, length, 2)), mx.ones((1, 1, length, 2)))
    assert cache.offset == 306
    assert cache.view().keys.shape == (1, 1, 306, 2)


@pytest.mark.parametrize("cache", [SlidingCache(4), FullCache()])
def test_empty_cache_has_no_view(cache: SlidingCache | FullCache) -> None:
    with pytest.raises(ValueError, match="the cache is empty: prefill at least one token first"):
        cache.view()


def test_canvas_rows_see_their_own_prefix_and_the_whole_canvas() -> None:
    key = mx.random.split(mx.random.key(1), 5)
    queries = mx.random.normal((2, 4, 3, 16), key=key[0])
    keys, values = (mx.random.normal((2, 2, 3, 16), key=k) for k in key[1:3])
    views = [KeysAndValues(*(mx.random.normal((1, 2, S, 16), key=k) for k in key[3:])) for S in (2, 6)]
    out = ReadOnlyPrefix(views, mx.array([2, 6])).attend(queries, keys, values)
    for row, view in enumerate(views):
        all_keys = np.concatenate([np.array(view.keys)[0], np.array(keys)[row]], axis=1)
        all_values = np.concatenate([np.array(view.values)[0], np.array(values)[row]], axis=1)
        allowed = np.ones((3, all_keys.shape[1]), bool)
        expected = naive_attention(np.array(queries)[row], all_keys, all_values, allowed)
        np.testing.assert_allclose(np.array(out)[row], expected, atol=1e-5)


@pytest.mark.parametrize("step", [1, 3, 8, 16])
def test_prefill_in_pieces_equals_one_pass(step: int) -> None:
    model = random_model()
    tokens = mx.random.randint(0, 96, (37,), key=mx.random.key(3))
    whole, pieces = model.make_cache(), model.make_cache()
    hidden = model.prefill(tokens, whole)
    parts = [model.prefill(tokens[a:b], pieces) for a, b in masks.chunks(0, 37, step)]
    np.testing.assert_allclose(np.array(mx.concatenate(parts, axis=1)), np.array(hidden), atol=2e-5)
    for one, other in zip(whole.views(), pieces.views(), strict=True):
        np.testing.assert_allclose(np.array(one.keys), np.array(other.keys), atol=2e-5)
        np.testing.assert_allclose(np.array(one.values), np.array(other.values), atol=2e-5)


def test_the_decoder_leaves_the_cache_as_it_was() -> None:
    model = random_model()
    cache = model.make_cache()
    model.prefill(mx.arange(20), cache)
    before = [np.array(array) for array in cache.arrays()]
    mx.eval(model.denoise(mx.zeros((1, 8), mx.int32), mx.zeros((1, 8, 64)), [cache.views()], mx.array([20])))
    assert cache.offset == 20
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(before, cache.arrays(), strict=True))


def test_rows_of_a_batch_equal_the_rows_alone() -> None:
    model = random_model()
    caches = []
    for length in (5, 19, 11):
        caches.append(model.make_cache())
        model.prefill(mx.random.randint(0, 96, (length,), key=mx.random.key(length)), caches[-1])
    canvases = mx.random.randint(0, 96, (3, 8), key=mx.random.key(9))
    soft = mx.random.normal((3, 8, 64), key=mx.random.key(10))
    offsets = mx.array([cache.offset for cache in caches])
    together = model.denoise(canvases, soft, [cache.views() for cache in caches], offsets)
    for row, cache in enumerate(caches):
        rows = slice(row, row + 1)
        alone = model.denoise(canvases[rows], soft[rows], [cache.views()], offsets[rows])
        np.testing.assert_allclose(np.array(together[row]), np.array(alone[0]), atol=1e-5)


def test_self_conditioning_runs_on_the_first_step_too() -> None:
    """With no signal the post-norm still applies: the stack's input has unit mean square."""
    model = random_model()
    module = model.model.decoder.self_conditioning
    embeddings = model.embed(mx.arange(8)[None])
    out = module(embeddings, mx.zeros_like(embeddings))
    np.testing.assert_allclose(np.array((out * out).mean(-1)), 1.0, atol=1e-4)


def test_embedding_scale_is_rounded_to_the_dtype_of_the_table() -> None:
    from small_model import config_dict

    from mlx_diffusiongemma.config import ModelConfig
    from mlx_diffusiongemma.model import DiffusionGemma

    model = DiffusionGemma(ModelConfig.from_dict(config_dict(hidden_size=2816, vocab_size=4)))
    model.set_dtype(mx.bfloat16)
    assert model.embedding_scale.item() == 53.0


def test_a_long_prompt_allocates_nothing_square() -> None:
    """32k tokens: one bool array of 32k x 32k would be 1 GB; scores of one query block are what is needed."""
    model = random_model(num_attention_heads=1, num_key_value_heads=1, sliding_window=64, max_position_embeddings=40000)
    cache = model.make_cache()
    tokens = mx.random.randint(0, 96, (32768,), key=mx.random.key(0))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for start, stop in masks.chunks(0, 32768, 2048):
        model.prefill(tokens[start:stop], cache)
        mx.eval(cache.arrays())
    assert mx.get_peak_memory() - before < 300e6
