"""The KV cache of one sequence: written by the encoder role, read by the decoder role.

Full-attention layers keep every key, in buffers that are reserved for the whole prompt at once: mlx-lm's `KVCache`
copies all it holds whenever it grows. They may keep them quantised (`KVQuantization`). Sliding layers keep the last
`sliding_window - 1` keys in temporal order; mlx-lm's `RotatingKVCache` is not used there because it stores single
tokens out of order and keeps up to a whole chunk more, while the decoder must see exactly the last
`sliding_window - 1` prefix tokens.

A chunk is written into a buffer in place, unless somebody holds a view of it: then MLX copies the buffer first.

Reference: transformers `DynamicCache` with `DynamicSlidingWindowLayer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx

from .config import TextConfig

EMPTY = "the cache is empty: prefill at least one token first"
GROWTH = 1024  # tokens by which a buffer grows beyond what was reserved; each time it is copied
KV_BITS = (4, 8)
KV_GROUP_SIZES = (32, 64, 128)  # those of `mx.quantize`
DEFAULT_KV_GROUP_SIZE = 64


class KVQuantization(NamedTuple):
    """How keys and values of full-attention layers are packed: affine, a scale and a bias per group."""

    bits: int
    group_size: int

    def check(self, text: TextConfig) -> None:
        """Raise `ValueError` when the group size does not divide the heads of full-attention layers."""
        head_dim = text.attention_shape("full_attention").head_dim
        if head_dim % self.group_size:
            fitting = [str(size) for size in KV_GROUP_SIZES if head_dim % size == 0]
            expected = " or ".join(fitting) if fitting else "no kv_bits: no group size divides it"
            raise ValueError(
                f"kv_group_size: got {self.group_size} for full-attention heads of {head_dim}, expected {expected}"
            )


def kv_quantization(bits: int | None, group_size: int | None = None) -> KVQuantization | None:
    """Return how to pack keys and values, None for not at all. Raise `ValueError` for what MLX cannot do."""
    if bits is None:
        if group_size is not None:
            raise ValueError(f"kv_group_size: got {group_size!r} without kv_bits, expected both")
        return None
    group_size = DEFAULT_KV_GROUP_SIZE if group_size is None else group_size
    if isinstance(bits, bool) or bits not in KV_BITS:
        raise ValueError(f"kv_bits: got {bits!r}, expected 4 or 8")
    if isinstance(group_size, bool) or group_size not in KV_GROUP_SIZES:
        raise ValueError(f"kv_group_size: got {group_size!r}, expected 32, 64 or 128")
    return KVQuantization(bits, group_size)


class KeysAndValues(NamedTuple):
    """What one layer knows of the prefix: keys and values, each [1, K, S, H]. Keys are normed and rotated."""

    keys: mx.array
    values: mx.array

    def span(self, start: int, stop: int) -> KeysAndValues:
        """Return the tokens from `start` to `stop`."""
        return KeysAndValues(self.keys[:, :, start:stop], self.values[:, :, start:stop])


class QuantizedKeysAndValues(NamedTuple):
    """The same, packed by `mx.quantize`; shapes and the head size of the queries tell bits and group size."""

    keys: mx.array  # [1, K, S, H * bits / 32] uint32
    key_scales: mx.array  # [1, K, S, H / group size]
    key_biases: mx.array
    values: mx.array
    value_scales: mx.array
    value_biases: mx.array

    def span(self, start: int, stop: int) -> QuantizedKeysAndValues:
        """Return the tokens from `start` to `stop`."""
        return QuantizedKeysAndValues(*(array[:, :, start:stop] for array in self))


View = KeysAndValues | QuantizedKeysAndValues


def as_view(arrays: Sequence[mx.array]) -> View:
    """Return the view whose arrays these are."""
    return KeysAndValues(*arrays) if len(arrays) == len(KeysAndValues._fields) else QuantizedKeysAndValues(*arrays)


class LayerCache(Protocol):
    """The cache of one layer."""

    @property
    def offset(self) -> int:
        """Number of tokens stored so far, dropped ones included."""

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated, reserved ones included."""

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all, so that storing them copies nothing that is stored already."""

    def append(self, keys: mx.array, values: mx.array) -> View:
        """Store new keys and values [1, K, L, H]; return every key a new token may attend to, new ones last."""

    def view(self) -> View:
        """Return what a canvas after the prefix attends to. Raise `ValueError` for an empty cache."""

    def since(self, start: int) -> tuple[mx.array, ...]:
        """Return a copy of what is stored of the tokens from `start` on; arrays [1, K, S, ...].

        A sliding layer has the last of them only.
        """

    def restore(self, parts: Sequence[tuple[mx.array, ...]], offset: int) -> None:
        """Fill an empty cache with what `since` gave for neighbouring spans of tokens, the last ending at `offset`."""


class _GrowingCache:
    """Every token of the prefix, in one buffer [1, K, room, ...] for each array of the view."""

    def __init__(self) -> None:
        self._buffers: list[mx.array] = []
        self._offset = 0
        self._reserved = 0

    @property
    def offset(self) -> int:
        return self._offset

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    def reserve(self, tokens: int) -> None:
        self._reserved = max(self._reserved, tokens)

    def _store(self, arrays: Sequence[mx.array]) -> View:
        stop = self._offset + arrays[0].shape[2]
        self._make_room(arrays, stop)
        for buffer, array in zip(self._buffers, arrays, strict=True):
            buffer[:, :, self._offset : stop] = array
        self._offset = stop
        return self.view()

    def _make_room(self, like: Sequence[mx.array], tokens: int) -> None:
        room = self._buffers[0].shape[2] if self._buffers else 0
        if tokens <= room:
            return
        room = self._reserved if tokens <= self._reserved else -(-tokens // GROWTH) * GROWTH
        free = [mx.zeros((*a.shape[:2], room - self._offset, a.shape[3]), a.dtype) for a in like]
        if self._buffers:
            stored = [buffer[:, :, : self._offset] for buffer in self._buffers]
            free = [mx.concatenate([old, new], axis=2) for old, new in zip(stored, free, strict=True)]
            mx.eval(free)  # layer by layer: else the copies of all layers exist at one time
        self._buffers = free

    def view(self) -> View:
        if self._offset == 0:
            raise ValueError(EMPTY)
        return as_view([buffer[:, :, : self._offset] for buffer in self._buffers])

    def since(self, start: int) -> tuple[mx.array, ...]:
        return tuple(mx.contiguous(array[:, :, start:]) for array in self.view())

    def restore(self, parts: Sequence[tuple[mx.array, ...]], offset: int) -> None:
        self.reserve(offset)
        for part in parts:
            self._store(part)


class FullCache(_GrowingCache):
    """Every key of the prefix."""

    def append(self, keys: mx.array, values: mx.array) -> View:
        return self._store((keys, values))


class QuantizedCache(_GrowingCache):
    """Every key of the prefix, packed.

    New tokens attend to their own packed keys too: otherwise a result would depend on where chunks end, and a restored
    prefix would differ from a cold one.
    """

    def __init__(self, quantization: KVQuantization) -> None:
        super().__init__()
        self._quantization = quantization

    def append(self, keys: mx.array, values: mx.array) -> View:
        bits, group_size = self._quantization
        packed = (mx.quantize(array, group_size=group_size, bits=bits) for array in (keys, values))
        return self._store([array for arrays in packed for array in arrays])


class SlidingCache:
    """The last `sliding_window - 1` keys of the prefix, oldest first."""

    def __init__(self, sliding_window: int) -> None:
        self._kept = sliding_window - 1
        self._stored: KeysAndValues | None = None
        self._offset = 0

    @property
    def offset(self) -> int:
        return self._offset

    @property
    def nbytes(self) -> int:
        return 0 if self._stored is None else sum(array.nbytes for array in self._stored)

    def reserve(self, tokens: int) -> None:
        pass  # holds no more than the window, however many come

    def append(self, keys: mx.array, values: mx.array) -> KeysAndValues:
        self._offset += keys.shape[2]
        if self._stored is not None:
            keys = mx.concatenate([self._stored.keys, keys], axis=2)
            values = mx.concatenate([self._stored.values, values], axis=2)
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

    def __init__(self, config: TextConfig, quantization: KVQuantization | None = None) -> None:
        """Make empty caches; `quantization` is that of full-attention layers, None for plain keys and values."""
        self.layers: list[LayerCache] = []
        for kind in config.layer_types:
            if kind == "sliding_attention":
                self.layers.append(SlidingCache(config.sliding_window))
            else:
                self.layers.append(FullCache() if quantization is None else QuantizedCache(quantization))

    @property
    def offset(self) -> int:
        """Number of tokens in the prefix, which is also the position of the first canvas token."""
        return self.layers[0].offset

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, reserved ones included."""
        return sum(layer.nbytes for layer in self.layers)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all before the first is stored."""
        for layer in self.layers:
            layer.reserve(tokens)

    def views(self) -> list[View]:
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
