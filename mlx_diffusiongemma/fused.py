"""Projections of one input as one matmul: query, key and value, with the norms behind them; gate and up.

The parts stay where they are, under the names of the checkpoint: their arrays become views of the joined ones, so that
nothing is held twice, and whoever saves, quantises or adapts the model sees what it always saw. A part that is replaced
later, by an adapter for instance, makes its owner go back to one matmul per part.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

ARRAYS = ("weight", "scales", "biases")
SETTINGS = ("group_size", "bits", "mode")


class _Origin:
    """What the joined arrays were made of: not a parameter, and no array that a compiled function should see."""

    def __init__(self, parts: Sequence[Any], rows: Sequence[int]) -> None:
        self.parts = [(part, {name: part[name] for name in ARRAYS if name in part}) for part in parts]
        self.stops = list(itertools.accumulate(rows))[:-1]

    def is_current(self, parts: Sequence[Any]) -> bool:
        """Tell whether `parts` are the modules that were joined, with the same arrays."""
        return all(
            part is known and all(part.get(name) is array for name, array in arrays.items())
            for part, (known, arrays) in zip(parts, self.parts, strict=True)
        )


class Projections(nn.Module):
    """A module some of whose linear layers read one input, and may be joined."""

    def __init__(self) -> None:
        super().__init__()
        self._origin: _Origin | None = None
        self._joined: dict[str, mx.array] = {}

    @property
    def joinable(self) -> tuple[str, ...]:
        """Names of the layers that read one input."""
        raise NotImplementedError

    @property
    def others(self) -> tuple[str, ...]:
        """Names of more layers that are joined with these: `join_others` does that."""
        return ()

    def join_others(self, rows: Sequence[int]) -> None:
        """Join what belongs to parts with so many rows; their layers get views of it too."""

    def join(self) -> None:
        """Join the weights if all parts are of one kind: plain, or quantised in the same way. Nothing is computed."""
        parts = [self[name] for name in self.joinable]
        if not _are_alike(parts):
            return
        rows = [part["weight"].shape[0] for part in parts]
        stops = list(itertools.accumulate(rows))
        self._joined = {}
        for name in ARRAYS:
            if name in parts[0]:
                self._joined[name] = joined = mx.concatenate([part[name] for part in parts])
                for part, stop, count in zip(parts, stops, rows, strict=True):
                    part[name] = joined[stop - count : stop]
        self.join_others(rows)
        self._origin = _Origin(self._tracked(), rows)

    def drop_stale(self) -> None:
        """Forget the joined weights if a part has got others since. A trace of a compiled function must not ask."""
        if self._origin is not None and not self._origin.is_current(self._tracked()):
            self._origin, self._joined = None, {}

    def _tracked(self) -> list[nn.Module]:
        return [self[name] for name in (*self.joinable, *self.others)]

    def project(self, x: mx.array) -> list[mx.array]:
        """Return what each of the parts gives for x [..., D]."""
        if self._origin is None:
            return [self[name](x) for name in self.joinable]
        return list(mx.split(self.project_joined(x), self._origin.stops, axis=-1))

    def project_joined(self, x: mx.array) -> mx.array:
        """Return the same in one array, one behind the other; only where the parts are joined."""
        first, joined = self[self.joinable[0]], self._joined
        if "scales" in joined:
            return mx.quantized_matmul(
                x,
                joined["weight"],
                joined["scales"],
                joined.get("biases"),
                transpose=True,
                group_size=first.group_size,
                bits=first.bits,
                mode=first.mode,
            )
        return x @ joined["weight"].T


def _are_alike(parts: Sequence[nn.Module]) -> bool:
    """Tell whether the parts are linear layers of one kind, one dtype and one way of packing, without a bias."""
    kinds = {
        (
            type(part),
            *((name in part and part[name].dtype) for name in ARRAYS),
            *(getattr(part, name, None) for name in SETTINGS),
        )
        for part in parts
    }
    return len(kinds) == 1 and type(parts[0]) in (nn.Linear, nn.QuantizedLinear) and all("bias" not in p for p in parts)
