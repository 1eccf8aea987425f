"""Caches without a model, for tests of what is stored: every key says which token it is of, and where it stands."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from small_model import config_dict

from mlx_diffusiongemma.cache import PrefixCache
from mlx_diffusiongemma.config import ModelConfig

CONFIG = ModelConfig.from_dict(config_dict()).text  # two sliding layers with a window of 8, a full one
WINDOW = CONFIG.sliding_window
TOKEN_BYTES = 2 * 2 * 4  # of one layer: keys and values [1, 1, 1, 2] in float32


def grow(cache: PrefixCache, tokens: Sequence[int], dtype: mx.Dtype = mx.float32) -> PrefixCache:
    """Append tokens, all in one."""
    numbers = np.array([10 * token + 0.001 * (cache.offset + i) for i, token in enumerate(tokens)], np.float32)
    keys = mx.array(np.stack([numbers, numbers + 0.5], axis=-1)[None, None]).astype(dtype)
    for layer in cache.layers:
        layer.append(keys, -keys)
    return cache


def cold(tokens: Sequence[int], dtype: mx.Dtype = mx.float32) -> PrefixCache:
    """Return the cache of a prompt of which nothing was known."""
    return grow(PrefixCache(CONFIG), tokens, dtype)


def assert_cold(cache: PrefixCache, tokens: Sequence[int], dtype: mx.Dtype = mx.float32) -> None:
    """Check that a cache holds what it holds for `tokens` when nothing was known, and goes on alike."""
    expected = cold(tokens, dtype)
    for _ in range(2):
        assert cache.offset == expected.offset
        for one, other in zip(cache.arrays(), expected.arrays(), strict=True):
            assert one.dtype == other.dtype and bool(mx.array_equal(one, other))
        for each in (cache, expected):
            grow(each, [7, 8, 9], dtype)
