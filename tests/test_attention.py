"""Masks, chunks, caches and layers against naive attention."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from small_model import random_model

from mlx_diffusiongemma import attention, masks
from mlx_diffusiongemma.cache import FullCache, KeysAndValues, KVQuantization, QuantizedCache, SlidingCache, View
from mlx_diffusiongemma.layers import ReadOnlyPrefix
from mlx_diffusiongemma.model import SoftBlock


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
    out = attention.causal_attention(queries, KeysAndValues(keys, values), window)
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


def unrotated(x: mx.array, offset: mx.array) -> mx.array:
    return x


def test_canvas_rows_see_their_own_prefix_and_the_whole_canvas() -> None:
    key = mx.random.split(mx.random.key(1), 5)
    lengths, starts = (3, 5), (0, 3)
    queries = mx.random.normal((1, 4, 8, 16), key=key[0])
    keys, values = (mx.random.normal((1, 2, 8, 16), key=k) for k in key[1:3])
    views = [KeysAndValues(*(mx.random.normal((1, 2, S, 16), key=k) for k in key[3:])) for S in (2, 6)]
    out = ReadOnlyPrefix(views, [mx.array(2), mx.array(6)], lengths).attend(
        mx.concatenate([queries, keys], axis=1), values, unrotated
    )
    for view, start, length in zip(views, starts, lengths, strict=True):
        own = np.s_[0, :, start : start + length]
        all_keys = np.concatenate([np.array(view.keys)[0], np.array(keys)[own]], axis=1)
        all_values = np.concatenate([np.array(view.values)[0], np.array(values)[own]], axis=1)
        allowed = np.ones((length, all_keys.shape[1]), bool)
        expected = naive_attention(np.array(queries)[own], all_keys, all_values, allowed)
        np.testing.assert_allclose(np.array(out)[own], expected, atol=1e-5)


def test_on_the_cpu_a_canvas_asks_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    key = mx.random.split(mx.random.key(2), 5)
    queries = mx.random.normal((1, 4, 40, 16), key=key[0])
    canvas, prefix = (
        KeysAndValues(*(mx.random.normal((1, 2, S, 16), key=k) for k in pair))
        for S, pair in ((40, key[1:3]), (6, key[3:]))
    )
    whole = attention.canvas_attention(queries, prefix, canvas)
    asked: list[int] = []
    plain = mx.fast.scaled_dot_product_attention

    def counted(rows: mx.array, *rest: mx.array, scale: float) -> mx.array:
        asked.append(rows.shape[2])
        return plain(rows, *rest, scale=scale)

    monkeypatch.setattr(masks, "CACHED_SCORES", 4 * 46 * 16)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", counted)
    blocks = attention.canvas_attention(queries, prefix, canvas)
    assert asked == [16, 16, 8]
    np.testing.assert_allclose(np.array(blocks), np.array(whole), atol=1e-6)


@pytest.mark.parametrize(("heads", "keys", "queries"), [(8, 288, 32), (4, 128, 256), (16, 10**5, 16), (1, 1 << 17, 16)])
def test_blocks_of_a_canvas_are_powers_of_two(heads: int, keys: int, queries: int) -> None:
    assert masks.cached_queries(heads, keys) == queries


def unpacked(view: View, bits: int) -> list[np.ndarray]:
    """Return the keys and the values that packed ones stand for, each [K, S, H]."""
    halves = view[:3], view[3:]
    return [np.array(mx.dequantize(*half, group_size=32, bits=bits))[0] for half in halves]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("key_block", [4, 8192])
@pytest.mark.parametrize("spans", [(), [(1, 5)]], ids=["text", "image"])
def test_causal_attention_over_packed_keys(bits: int, key_block: int, spans, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "MAX_QUERY_BLOCK", 4)
    monkeypatch.setattr(masks, "MIN_QUERY_BLOCK", 1)
    monkeypatch.setattr(attention, "KEY_BLOCK", key_block)
    key = mx.random.split(mx.random.key(0), 3)
    queries = mx.random.normal((1, 4, 9, 32), key=key[0])
    cache = QuantizedCache(KVQuantization(bits, 32))
    keys, values = (mx.random.normal((1, 2, 14, 32), key=k) for k in key[1:])
    cache.append(keys[:, :, :5], values[:, :, :5])
    out = attention.causal_attention(queries, cache.append(keys[:, :, 5:], values[:, :, 5:]), None, spans)
    together = [5 + place for start, stop in spans for place in range(start, stop)]
    allowed = np.array([[k <= q + 5 or (k in together and q + 5 in together) for k in range(14)] for q in range(9)])
    expected = naive_attention(np.array(queries)[0], *unpacked(cache.view(), bits), allowed)
    np.testing.assert_allclose(np.array(out)[0], expected, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("key_block", [4, 8192])
def test_a_canvas_behind_a_long_or_packed_prefix(
    bits: int | None, key_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One softmax over prefix and canvas, in blocks of queries, without joining their keys."""
    monkeypatch.setattr(masks, "MAX_SCORES", 4 * 2 * 20)  # blocks of two queries
    monkeypatch.setattr(masks, "MIN_QUERY_BLOCK", 1)
    monkeypatch.setattr(attention, "KEY_BLOCK", key_block)
    key = mx.random.split(mx.random.key(1), 5)
    queries = mx.random.normal((1, 4, 7, 32), key=key[0])
    canvas = KeysAndValues(*(mx.random.normal((1, 2, 7, 32), key=k) for k in key[1:3]))
    cache = FullCache() if bits is None else QuantizedCache(KVQuantization(bits, 32))
    view = cache.append(*(mx.random.normal((1, 2, 13, 32), key=k) for k in key[3:]))
    out = attention.canvas_attention(queries, view, canvas)
    prefix = [np.array(array)[0] for array in view] if bits is None else unpacked(view, bits)
    keys, values = (np.concatenate([a, np.array(b)[0]], axis=1) for a, b in zip(prefix, canvas, strict=True))
    expected = naive_attention(np.array(queries)[0], keys, values, np.ones((7, 20), bool))
    np.testing.assert_allclose(np.array(out)[0], expected, atol=1e-5)


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
    mx.eval(model.denoise([mx.zeros(8, mx.int32)], [mx.zeros((8, 64))], [cache.views()], [mx.array(20)]))
    assert cache.offset == 20
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(before, cache.arrays(), strict=True))


def test_rows_of_a_batch_equal_the_rows_alone() -> None:
    model = random_model()
    caches = []
    for length in (5, 19, 11):
        caches.append(model.make_cache())
        model.prefill(mx.random.randint(0, 96, (length,), key=mx.random.key(length)), caches[-1])
    canvases = [mx.random.randint(0, 96, (length,), key=mx.random.key(9)) for length in (8, 5, 8)]
    soft = [mx.random.normal((len(canvas), 64), key=mx.random.key(10)) for canvas in canvases]
    offsets = [mx.array(cache.offset) for cache in caches]
    together = model.denoise(canvases, soft, [cache.views() for cache in caches], offsets)
    for row, cache in enumerate(caches):
        [alone] = model.denoise([canvases[row]], [soft[row]], [cache.views()], [offsets[row]])
        np.testing.assert_allclose(np.array(together[row]), np.array(alone), atol=1e-5)


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


def test_the_mask_of_an_image_as_drawn() -> None:
    """Window 3, an image at 1 to 4: what the docstring of `masks` draws."""
    allowed = masks.causal_mask(6, 6, 3) | masks.same_image(range(6), range(6), [(1, 5)])
    assert np.array(allowed).astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]


def test_images_side_by_side_do_not_see_each_other() -> None:
    same = np.array(masks.same_image(range(2, 6), range(-1, 6), [(1, 3), (3, 5)])).astype(int).tolist()
    assert same == [[0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 0], [0] * 7]


def test_cuts_inside_an_image_move_behind_it() -> None:
    assert list(masks.chunks(0, 20, 4, [(3, 7), (8, 9), (10, 19)])) == [(0, 7), (7, 8), (8, 19), (19, 20)]
    assert list(masks.chunks(0, 9, 4, [(2, 9)])) == [(0, 9)]
    assert list(masks.chunks(0, 8, 4, [(0, 4), (4, 8)])) == [(0, 4), (4, 8)]


def test_borders_do_not_depend_on_where_the_uncached_part_begins() -> None:
    spans = [(3, 7), (8, 9), (10, 19), (30, 90), (91, 100)]
    outside = [place for place in range(120) if not any(start < place < stop for start, stop in spans)]
    for step in (1, 4, 7, 50):
        borders = {stop for _, stop in masks.chunks(0, 120, step, spans)}
        for start in outside:
            assert {stop for _, stop in masks.chunks(start, 120, step, spans)} == {b for b in borders if b > start}


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("block", [1, 2, 4, 512])
@pytest.mark.parametrize("spans", [[(0, 9)], [(1, 5)], [(0, 2), (2, 4), (6, 9)], [(3, 4)]])
def test_attention_with_images_in_blocks(
    window: int | None, block: int, spans: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "MAX_QUERY_BLOCK", block)
    monkeypatch.setattr(masks, "MIN_QUERY_BLOCK", 1)
    key = mx.random.split(mx.random.key(0), 3)
    queries = mx.random.normal((1, 4, 9, 16), key=key[0])
    keys, values = (mx.random.normal((1, 2, 14, 16), key=k) for k in key[1:])
    out = attention.causal_attention(queries, KeysAndValues(keys, values), window, spans)
    allowed = np.array([[k <= q + 5 and (window is None or k > q + 5 - window) for k in range(14)] for q in range(9)])
    for start, stop in spans:
        allowed[start:stop, 5 + start : 5 + stop] = True
    expected = naive_attention(*(np.array(a)[0] for a in (queries, keys, values)), allowed)
    np.testing.assert_allclose(np.array(out)[0], expected, atol=1e-5)


SPANS = [(2, 9), (9, 14), (20, 34)]  # one shorter than the window of 8, one longer, one shorter


def soft_blocks(spans: list[tuple[int, int]], first: int = 0) -> list[SoftBlock]:
    """Random soft tokens for each span, the same for the same place."""
    return [SoftBlock(a - first, mx.random.normal((b - a, 64), key=mx.random.key(abs(a)))) for a, b in spans]


@pytest.mark.parametrize("step", [1, 3, 8, 16])
def test_prefill_with_images_in_pieces_equals_one_pass(step: int) -> None:
    model = random_model()
    tokens = mx.random.randint(0, 96, (37,), key=mx.random.key(3))
    whole, pieces = model.make_cache(), model.make_cache()
    hidden = model.prefill(tokens, whole, soft_blocks(SPANS))
    parts = [
        model.prefill(tokens[a:b], pieces, soft_blocks([span for span in SPANS if a <= span[0] < b], a))
        for a, b in masks.chunks(0, 37, step, SPANS)
    ]
    assert len(parts) > 2
    np.testing.assert_allclose(np.array(mx.concatenate(parts, axis=1)), np.array(hidden), atol=2e-5)
    for one, other in zip(whole.views(), pieces.views(), strict=True):
        np.testing.assert_allclose(np.array(one.keys), np.array(other.keys), atol=2e-5)
        np.testing.assert_allclose(np.array(one.values), np.array(other.values), atol=2e-5)


def test_images_see_themselves_both_ways_and_only_where_the_checkpoint_says_so() -> None:
    """The last soft token changes the first one's state; with causal images it does not."""
    for mode, sees in (("vision", True), (None, False)):
        model = random_model(use_bidirectional_attention=mode)
        first, second = (mx.random.normal((6, 64), key=mx.random.key(k)) for k in (0, 1))
        changed = mx.concatenate([first[:5], second[5:]])
        states = [
            np.array(model.prefill(mx.zeros(12, mx.int32), model.make_cache(), [SoftBlock(3, soft)])[0])
            for soft in (first, changed)
        ]
        assert np.array_equal(states[0][:3], states[1][:3])
        assert np.array_equal(states[0][3], states[1][3]) != sees


def test_soft_tokens_stand_unscaled_in_place_of_the_ids() -> None:
    model = random_model()
    [soft] = soft_blocks([(2, 5)])
    h = model._embed_prompt(mx.arange(7), [soft])
    assert h.shape == (1, 7, 64)
    np.testing.assert_array_equal(np.array(h[0, 2:5]), np.array(soft.soft_tokens))
    text = np.array(model.embed(mx.arange(7)))
    np.testing.assert_array_equal(np.array(h[0])[[0, 1, 5, 6]], text[[0, 1, 5, 6]])


@pytest.mark.parametrize("spans", [[(5, 9)], [(0, 3), (2, 4)], [(-1, 2)]])
def test_images_outside_the_chunk_are_refused(spans: list[tuple[int, int]]) -> None:
    model = random_model()
    with pytest.raises(ValueError, match=r"images: got one at .*, expected places from"):
        model.prefill(mx.arange(7), model.make_cache(), soft_blocks(spans))


def peak_of_prefill(images: int) -> int:
    """Return the bytes that a prompt of images of 280 tokens needs at its worst."""
    model = random_model(num_attention_heads=1, num_key_value_heads=1, sliding_window=64, max_position_embeddings=40000)
    spans = [(10 + 290 * i, 290 + 290 * i) for i in range(images)]
    length = 290 * images + 20
    cache = model.make_cache()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for start, stop in masks.chunks(0, length, 2048, spans):
        blocks = soft_blocks([span for span in spans if start <= span[0] < stop], start)
        model.prefill(mx.zeros(stop - start, mx.int32), cache, blocks)
        mx.eval(cache.arrays())
        mx.clear_cache()
    return mx.get_peak_memory() - before


def test_memory_of_images_grows_with_their_number_not_with_its_square() -> None:
    """20, 40 and 80 images of 280 tokens: one bool array of the prompts squared would be 34, 135 and 540 MB."""
    few, more, many = (peak_of_prefill(images) for images in (20, 40, 80))
    print(f"peak memory of 20, 40 and 80 images of 280 tokens: {few / 1e6:.1f}, {more / 1e6:.1f}, {many / 1e6:.1f} MB")
    assert more < 2 * few and many < 2 * more
    assert many < 60e6
