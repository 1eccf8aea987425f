"""The KV cache of one sequence: what is stored of a span, an empty cache filled with it, room, packing."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from small_model import random_model

from mlx_diffusiongemma.cache import (
    GROWTH,
    FullCache,
    KVQuantization,
    PrefixCache,
    QuantizedCache,
    SlidingCache,
    kv_quantization,
)

WINDOW = 5


def numbered(start: int, stop: int) -> tuple[mx.array, mx.array]:
    """Return keys and values [1, 2, L, 3] that say which token they are of."""
    keys = mx.broadcast_to(mx.arange(start, stop, dtype=mx.float32)[None, None, :, None], (1, 2, stop - start, 3))
    return keys, -keys


def tokens_of(keys: mx.array) -> list[int]:
    return [int(number) for number in keys[0, 0, :, 0].tolist()]


@pytest.mark.parametrize("make", [FullCache, lambda: SlidingCache(WINDOW)], ids=["full", "sliding"])
@pytest.mark.parametrize("borders", [(0, 7), (0, 2, 7), (0, 1, 2, 3, 7, 20), (0, 3, 4)])
def test_a_restored_cache_is_what_was_stored(make, borders):
    original = make()
    parts = []
    for start, stop in pairwise(borders):
        original.append(*numbered(start, stop))
        parts.append(original.since(start))
    restored = make()
    restored.restore(parts, borders[-1])
    assert restored.offset == original.offset == borders[-1]
    for cache in (original, restored):
        cache.append(*numbered(borders[-1], borders[-1] + 2))
    assert tokens_of(restored.view().keys) == tokens_of(original.view().keys)
    assert tokens_of(-restored.view().values) == tokens_of(original.view().keys)


def test_a_span_of_a_sliding_layer_holds_no_more_than_the_window():
    cache = SlidingCache(WINDOW)
    cache.append(*numbered(0, 9))
    keys, values = cache.since(0)
    assert tokens_of(keys) == [5, 6, 7, 8] == tokens_of(-values)
    assert tokens_of(cache.since(7)[0]) == [7, 8]


def random_arrays(tokens: int, seed: int, heads: int = 2, head_dim: int = 32) -> list[mx.array]:
    return [mx.random.normal((1, heads, tokens, head_dim), key=key) for key in mx.random.split(mx.random.key(seed))]


def peak_of_storing(cache: FullCache, arrays: list[mx.array]) -> int:
    """Return the bytes that storing a chunk takes beyond what was active before."""
    mx.eval(arrays)
    mx.synchronize()
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    cache.append(*arrays)
    mx.eval(cache.view())
    return mx.get_peak_memory() - active


def test_reserved_room_is_written_in_place_unless_a_view_is_held():
    """4,096 tokens of 64 numbers for keys and as many for values: a copy of one buffer is 1 MiB."""
    cache = FullCache()
    cache.reserve(4096)
    first, second, third, fourth = (random_arrays(1000, seed) for seed in range(4))
    cache.append(*first)
    mx.eval(cache.view())
    allocated = cache.nbytes
    assert allocated == 2 * 4096 * 64 * 4
    assert peak_of_storing(cache, second) < allocated / 8
    held = cache.view()
    mx.eval(held)
    assert peak_of_storing(cache, third) > allocated / 2  # the measurement sees a copy
    del held
    assert peak_of_storing(cache, fourth) < allocated / 8
    assert cache.nbytes == allocated


def test_a_cache_grows_beyond_what_was_reserved():
    cache = FullCache()
    cache.reserve(10)
    for start in range(0, 2 * GROWTH + 5, 100):
        stop = min(start + 100, 2 * GROWTH + 5)
        cache.append(*numbered(start, stop))
    assert tokens_of(cache.view().keys) == list(range(2 * GROWTH + 5)) == tokens_of(-cache.view().values)
    assert cache.nbytes == 2 * 3 * GROWTH * 2 * 3 * 4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("borders", [(0, 7), (0, 2, 7), (0, 1, 2, 3, 7, 20)])
def test_a_packed_cache_holds_what_mlx_packs_and_is_restored_bit_by_bit(bits, borders):
    keys, values = random_arrays(borders[-1], 0)
    original = QuantizedCache(KVQuantization(bits, 32))
    parts = []
    for start, stop in pairwise(borders):
        original.append(keys[:, :, start:stop], values[:, :, start:stop])
        parts.append(original.since(start))
    packed = [*mx.quantize(keys, group_size=32, bits=bits), *mx.quantize(values, group_size=32, bits=bits)]
    restored = QuantizedCache(KVQuantization(bits, 32))
    restored.restore(parts, borders[-1])
    assert restored.offset == original.offset == borders[-1]
    for cache in (original, restored):
        for stored, expected in zip(cache.view(), packed, strict=True):
            np.testing.assert_array_equal(np.array(stored), np.array(expected))


@pytest.mark.parametrize("bits", [4, 8])
def test_only_full_attention_layers_are_packed(bits):
    config = random_model().config.text
    cache = PrefixCache(config, KVQuantization(bits, 32))
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [SlidingCache, SlidingCache, QuantizedCache]


@pytest.mark.parametrize(
    ("bits", "group_size", "message"),
    [
        (2, None, "kv_bits: got 2, expected 4 or 8"),
        (True, None, "kv_bits: got True, expected 4 or 8"),
        (8, 48, "kv_group_size: got 48, expected 32, 64 or 128"),
        (None, 64, "kv_group_size: got 64 without kv_bits, expected both"),
    ],
)
def test_what_cannot_be_packed(bits, group_size, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        kv_quantization(bits, group_size)


def test_a_group_must_divide_the_heads():
    message = "^kv_group_size: got 64 for full-attention heads of 32, expected 32$"
    with pytest.raises(ValueError, match=message):
        KVQuantization(8, 64).check(random_model().config.text)
    with pytest.raises(ValueError, match=r"heads of 24, expected no kv_bits: no group size divides it$"):
        KVQuantization(8, 64).check(random_model(global_head_dim=24).config.text)
    assert kv_quantization(8) == (8, 64)
    assert kv_quantization(None) is None
