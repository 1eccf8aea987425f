"""The KV cache of one sequence: written by the encoder role, read by the decoder role.

Full-attention layers keep every key in mlx-lm's `KVCache`. Sliding layers keep the last `sliding_window - 1` keys in
temporal order; mlx-lm's `RotatingKVCache` is not used there because it stores single tokens out of order and keeps up
to a whole chunk more, while the decoder must see exactly the last `sliding_window - 1` prefix tokens.

Reference: transformers `DynamicCache` with `DynamicSlidingWindowLayer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from .config import TextConfig

EMPTY = "the cache is empty: prefill at least one token first"


class KeysAndValues(NamedTuple):
    """What one layer knows of the prefix: keys and values, each [1, K, S, H]. Keys are normed and rotated."""

    keys: mx.array
    values: mx.array


class LayerCache(Protocol):
    """The cache of one layer."""

    @property
    def offset(self) -> int:
        """Number of tokens stored so far, dropped ones included."""

    def append(self, keys: mx.array, values: mx.array) -> KeysAndValues:
        """Store new keys and values [1, K, L, H]; return every key a new token may attend to, new ones last."""

    def view(self) -> KeysAndValues:
        """Return what a canvas after the prefix attends to. Raise `ValueError` for an empty cache."""

    def since(self, start: int) -> tuple[mx.array, ...]:
        """Return a copy of what is stored of the tokens from `start` on; arrays [1, K, S, ...].

        A sliding layer has the last of them only.
        """

    def restore(self, parts: Sequence[tuple[mx.array, ...]], offset: int) -> None:
        """Fill an empty cache with what `since` gave for neighbouring spans of tokens, the last ending at `offset`."""


class FullCache:
    """Every key of the prefix."""

    def __init__(self) -> None:
        self._cache = KVCache()

    @property
    def offset(self) -> int:
        return int(self._cache.offset)

    def append(self, keys: mx.array, values: mx.array) -> KeysAndValues:
        return KeysAndValues(*self._cache.update_and_fetch(keys, values))

    def view(self) -> KeysAndValues:
        if self._cache.offset == 0:
            raise ValueError(EMPTY)
        return KeysAndValues(*self._cache.keys_and_values())

    def since(self, start: int) -> tuple[mx.array, ...]:
        return tuple(mx.contiguous(array[:, :, start:]) for array in self.view())

    def restore(self, parts: Sequence[tuple[mx.array, ...]], offset: int) -> None:
        self._cache.update_and_fetch(*_joined(parts))


class SlidingCache:
    """The last `sliding_window - 1` keys of the prefix, oldest first."""

    def __init__(self, sliding_window: int) -> None:
        self._kept = sliding_window - 1
        self._stored: KeysAndValues | None = None
        self._offset = 0

    @property
    def offset(self) -> int:
        return self._offset

    def append(self, keys: mx.array, values: mx.array) -> KeysAndValues:
        if self._stored is not None:
            keys = mx.concatenate([self._stored.keys, keys], axis=2)
            values = mx.concatenate([self._stored.values, values], axis=2)
        before = 0 if self._stored is None else self._stored.keys.shape[2]
        self._offset += keys.shape[2] - before
        first = max(0, keys.shape[2] - self._kept)
        # A slice would keep the whole concatenation alive, so the kept part is copied out of it.
        self._stored = KeysAndValues(mx.contiguous(keys[:, :, first:]), mx.contiguous(values[:, :, first:]))
        return KeysAndValues(keys, values)

    def view(self) -> KeysAndValues:
        if self._stored is None:
            raise ValueError(EMPTY)
        return self._stored

    def since(self, start: int) -> tuple[mx.array, ...]:
        stored = self.view()
        first = max(0, stored.keys.shape[2] - (self._offset - start))
        return tuple(mx.contiguous(array[:, :, first:]) for array in stored)

    def restore(self, parts: Sequence[tuple[mx.array, ...]], offset: int) -> None:
        first = tokens = 0
        for first in range(len(parts) - 1, -1, -1):  # joining what is too old would cost memory
            tokens += parts[first][0].shape[2]
            if tokens >= self._kept:
                break
        self.append(*_joined(parts[first:]))
        self._offset = offset


class PrefixCache:
    """One cache per layer for one sequence."""

    def __init__(self, config: TextConfig) -> None:
        self.layers: list[LayerCache] = [
            FullCache() if kind == "full_attention" else SlidingCache(config.sliding_window)
            for kind in config.layer_types
        ]

    @property
    def offset(self) -> int:
        """Number of tokens in the prefix, which is also the position of the first canvas token."""
        return self.layers[0].offset

    def views(self) -> list[KeysAndValues]:
        """Return the read-only prefix of every layer for the decoder role."""
        return [layer.view() for layer in self.layers]

    def arrays(self) -> list[mx.array]:
        """Return every stored array, to evaluate them together."""
        return [array for view in self.views() for array in view]


def _joined(parts: Sequence[tuple[mx.array, ...]]) -> list[mx.array]:
    """Join the arrays of neighbouring spans along their tokens."""
    if len(parts) == 1:
        return list(parts[0])
    return [mx.concatenate(list(arrays), axis=2) for arrays in zip(*parts, strict=True)]
