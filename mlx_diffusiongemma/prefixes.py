"""Prefix reuse: what the encoder computed for a prompt or a canvas serves every later prompt that begins so.

After a prompt, after its system turn and after every encoded canvas the cache is stored: a segment of the tree in
`segments.py` holds, for every layer, what `LayerCache.since` gives for its span. Branches share the segments that they
have in common. A full-attention layer costs its keys and values of the span; a sliding layer at most
`sliding_window - 1` tokens per segment, which is what makes a prefix usable at the end of every segment.

The least recently used segments go first, in a bound of bytes. On disk (`prefix_store.py`) they survive a restart.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .cache import PrefixCache
from .config import check_integer
from .prefix_store import MAX_BYTES, Disk, LayerArrays
from .segments import Keys, Segment

# For 26B a segment of n tokens takes 20 KB x n in the full layers and 205 KB x min(n, 1,023) in the sliding ones: a
# long prompt 209 MB and 20 KB per token, a canvas 58 MB. 2 GiB hold a chat of nine long prompts, or 37 canvases.
DEFAULT_BYTES = 2 * 2**30


class PrefixCounts(NamedTuple):
    """What became of the prompts that were looked up, and of what was stored."""

    hits: int  # prompts of which at least one token was stored
    misses: int
    tokens_reused: int
    evictions: int  # segments dropped from memory
    segments: int  # now in memory
    nbytes: int  # of these


class _Stored(NamedTuple):
    """What a segment holds: for every layer its arrays [1, K, S, ...]."""

    layers: list[LayerArrays]
    nbytes: int


_Segment = Segment[_Stored]


class Prefixes:
    """Remembers prefixes. Use it from the thread that runs the model."""

    def __init__(
        self, max_bytes: int = DEFAULT_BYTES, *, disk: Disk | None = None, agree: Callable[[int], bool] | None = None
    ) -> None:
        """Remember at most `max_bytes` in memory; 0 remembers nothing there. Raises ValueError for less.

        Args:
            max_bytes: of memory.
            disk: where it is kept too.
            agree: asked whether a prefix of so many tokens may be used; None for always. Ranks that share a model each
                hold a part of every prefix, and can use one only together.
        """
        check_integer("prefix_bytes", max_bytes, 0, MAX_BYTES)
        self.max_bytes = self._bound = max_bytes
        self._disk = disk
        self._agree = agree
        self._hits = self._misses = self._reused = self._evictions = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything in memory. The disk keeps what it has, and the counts go on."""
        self._nbytes = 0
        self._root: _Segment = Segment(np.empty(0, np.int64), _Stored([], 0))
        # Oldest use first. A use moves a whole path behind everything else, its end first, so every segment comes after
        # all that hang under it, and the first of all is a leaf.
        self._by_use: OrderedDict[_Segment, None] = OrderedDict()

    def limit_to(self, nbytes: int) -> None:
        """Hold at most `nbytes` until told otherwise, and never more than `max_bytes`; what exceeds that is dropped."""
        self._bound = min(self.max_bytes, max(0, nbytes))
        while self._nbytes > self._bound:
            self._drop(next(iter(self._by_use)))

    @property
    def nbytes(self) -> int:
        """Bytes stored in memory."""
        return self._nbytes

    @property
    def counts(self) -> PrefixCounts:
        """Hits, misses and sizes so far."""
        return PrefixCounts(self._hits, self._misses, self._reused, self._evictions, len(self._by_use), self._nbytes)

    # -- reading ------------------------------------------------------------------------------------------------

    def restore(self, keys: Sequence[int] | Keys, cache: PrefixCache) -> int:
        """Fill an empty cache with the longest stored prefix.

        Args:
            keys: of a whole prompt [L]; see `segments.prefix_keys`.
            cache: filled, and evaluated.

        Returns:
            how many tokens are in the cache now; 0 when nothing fits.

        Raises:
            ValueError: a cache that is not empty.
        """
        if cache.offset:
            raise ValueError(f"the cache holds {cache.offset} tokens, expected an empty one")
        keys = np.asarray(keys, dtype=np.int64)
        path = self._root.longest(keys).path()
        length = path[-1].stop if path else 0
        parts = [segment.content.layers for segment in path]
        if from_disk := self._disk.load(keys, longer_than=length) if self._disk else None:
            length, parts = from_disk
        if self._agree is not None and not self._agree(length):
            length = 0
        if length:
            for layer, arrays in zip(cache.layers, zip(*parts, strict=True), strict=True):
                layer.restore(arrays, length)
                mx.eval(*layer.view())  # layer by layer: joining makes copies
            mx.clear_cache()
            self._touch(path)
            if from_disk:
                self._keep(keys[:length], cache)
        self._hits += length > 0
        self._misses += length == 0
        self._reused += length
        return length

    def _touch(self, path: Sequence[_Segment]) -> None:
        for segment in reversed(path):
            self._by_use.move_to_end(segment)

    # -- writing ------------------------------------------------------------------------------------------------

    def save(self, keys: Sequence[int] | Keys, cache: PrefixCache) -> None:
        """Store a prefix, in memory and on disk; what is stored already is used again.

        Args:
            keys: of the tokens in the cache [L].
            cache: not changed.

        Raises:
            ValueError: another number of keys than the cache has tokens.
        """
        if len(keys) != cache.offset:
            raise ValueError(f"got {len(keys)} keys, expected {cache.offset}: one for each token in the cache")
        keys = np.array(keys, dtype=np.int64)
        if self._disk is not None:
            self._disk.save(keys, cache)
        self._keep(keys, cache)

    def _keep(self, keys: Keys, cache: PrefixCache) -> None:
        """Store in memory what is not yet there."""
        path = self._root.longest(keys).path()
        self._touch(path)
        if (path[-1].stop if path else 0) == len(keys):
            return
        fitting = self._fit(path, cache)
        if fitting is None:
            return
        kept, stored = fitting
        if len(kept) < len(path):
            self._drop(path[len(kept)])
        while self._nbytes + stored.nbytes > self._bound:
            self._drop(next(iter(self._by_use)))  # never one of `kept`: they fit, and are the last used
        mx.eval(stored.layers)  # copies, so that the cache may grow or go
        parent = kept[-1] if kept else self._root
        self._by_use[Segment(keys[parent.stop :].copy(), stored, parent)] = None
        self._nbytes += stored.nbytes
        self._touch(kept)

    def _fit(self, path: Sequence[_Segment], cache: PrefixCache) -> tuple[Sequence[_Segment], _Stored] | None:
        """Return the part of a path to keep, and the new segment behind it; None where they exceed the bound.

        A conversation that has become too long for the bound gets one segment in place of its last few: its sliding
        layers then hold one window instead of one per segment.
        """
        for count in range(len(path), -1, -1):
            start = path[count - 1].stop if count else 0
            layers = [layer.since(start) for layer in cache.layers]
            stored = _Stored(layers, sum(array.nbytes for arrays in layers for array in arrays))
            if stored.nbytes + sum(segment.content.nbytes for segment in path[:count]) <= self._bound:
                return path[:count], stored
        return None

    def _drop(self, segment: _Segment) -> None:
        for removed in segment.remove():
            del self._by_use[removed]
            self._nbytes -= removed.content.nbytes
            self._evictions += 1
