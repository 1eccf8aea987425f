"""The processes that run one model together: MLX's distributed group, and how counts are divided among its ranks.

A collective is an operation that every rank takes part in, in the same order; MLX runs them (`mlx.core.distributed`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx


class Share(NamedTuple):
    """Items start to stop of a number of them: what one rank has."""

    start: int
    stop: int
    of: int

    @property
    def size(self) -> int:
        """How many items."""
        return self.stop - self.start

    def times(self, factor: int) -> Share:
        """Return the share of items that each consist of `factor` smaller ones."""
        return Share(self.start * factor, self.stop * factor, self.of * factor)


def divide(what: str, count: int, ranks: int, rank: int) -> Share:
    """Divide a count as evenly as it goes, the first ranks having one more.

    Raises:
        ValueError: fewer items than ranks; the message names `what`.
    """
    if count < ranks:
        raise ValueError(f"{what}: got {count} to divide among {ranks} ranks, expected one for each at least")
    size, rest = divmod(count, ranks)
    start = rank * size + min(rank, rest)
    return Share(start, start + size + (rank < rest), count)


class Ranks:
    """A group of ranks, and this process's place in it.

    Its collectives run one after the other, in the order of the calls, whatever order a graph could be evaluated in.
    """

    def __init__(self, group: mx.distributed.Group) -> None:
        """Bind a group of MLX's."""
        self.group = group
        self.size = int(group.size())
        self.rank = int(group.rank())
        self._last: mx.array | None = None

    def all_sum(self, x: mx.array) -> mx.array:
        """Return the sum of the arrays of all ranks."""
        return self._run(mx.distributed.all_sum, x)

    def all_max(self, x: mx.array) -> mx.array:
        """Return the largest values of the arrays of all ranks."""
        return self._run(mx.distributed.all_max, x)

    def all_min(self, x: mx.array) -> mx.array:
        """Return the smallest values of the arrays of all ranks."""
        return self._run(mx.distributed.all_min, x)

    def all_gather(self, x: mx.array) -> mx.array:
        """Return the arrays [...] of all ranks; [ranks, ...]."""
        return self._run(mx.distributed.all_gather, x[None])

    def same(self, number: int) -> bool:
        """Tell whether all ranks have come with the same number; waits for them."""
        numbers = self.all_gather(mx.array([number], dtype=mx.int32))
        mx.eval(numbers)
        return bool(mx.all(numbers == number).item())

    def _run(self, collective: Callable[..., mx.array], x: mx.array) -> mx.array:
        x = x if self._last is None else mx.depends(x, [self._last])
        self._last = collective(x, group=self.group)
        return self._last
