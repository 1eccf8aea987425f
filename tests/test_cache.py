"""The KV cache of one sequence: what is stored of a span, and an empty cache filled with it."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import pytest

from mlx_diffusiongemma.cache import FullCache, SlidingCache

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
