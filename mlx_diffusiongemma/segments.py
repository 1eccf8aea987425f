"""Stored prefixes as a tree of segments, each the tokens between two places where a prompt, turn or canvas ended.

    [system turn] --- [first question] --- [canvas] --- [second question]
                 \
                  --- [another question]

A segment is kept or dropped whole: a sliding layer knows the last tokens of a segment only, so it cannot be cut.
What a segment holds is up to `prefixes.py` (arrays) and `prefix_store.py` (files).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from .media import ImageBlock

Keys = NDArray[np.int64]
Content = TypeVar("Content")


def prefix_keys(token_ids: Sequence[int], blocks: Sequence[ImageBlock] = ()) -> Keys:
    """Return what a prompt is found again by; [L].

    The keys are the token ids, and in place of an image's soft tokens negative numbers that its content gives: other
    images have the same ids. An image of four soft tokens or more has all of its hash in them.
    """
    keys = np.array(token_ids, dtype=np.int64)
    for block in blocks:
        start, stop = block.span
        words = -1 - (np.frombuffer(block.image.digest, dtype="<u8") >> np.uint64(1)).astype(np.int64)
        keys[start:stop] = np.resize(words, stop - start)
    return keys


class Segment(Generic[Content]):
    """A run of tokens, at positions `start` to `stop` of every prefix that goes through it; the root is empty."""

    def __init__(self, keys: Keys, content: Content, parent: Segment[Content] | None = None) -> None:
        """Hang a segment under its parent."""
        self.keys = keys
        self.content = content
        self.parent = parent
        self.start: int = 0 if parent is None else parent.stop
        self.stop: int = self.start + len(keys)
        self.children: list[Segment[Content]] = []
        if parent is not None:
            parent.children.append(self)

    def path(self) -> list[Segment[Content]]:
        """Return the segments that make up the prefix which ends here, the first one first, without the root."""
        path, segment = [], self
        while segment.parent is not None:
            path.append(segment)
            segment = segment.parent
        return path[::-1]

    def longest(self, keys: Keys) -> Segment[Content]:
        """Return the end of the longest stored prefix of `keys`; the root where there is none. Called on the root."""
        best, waiting = self, [self]
        while waiting:
            segment = waiting.pop()
            if segment.stop > best.stop:
                best = segment
            waiting += [
                child for child in segment.children if np.array_equal(child.keys, keys[child.start : child.stop])
            ]
        return best

    def remove(self) -> list[Segment[Content]]:
        """Take the segment out of the tree; return it and all that hung under it."""
        assert self.parent is not None
        self.parent.children.remove(self)
        removed = [self]
        for segment in removed:
            removed += segment.children
        return removed
