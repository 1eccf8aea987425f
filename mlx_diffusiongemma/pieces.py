"""Compiled pieces of a step: methods of modules, traced once and called with whatever weights the module has then.

`mx.compile` takes arrays that a function refers to as constants, so a piece hands every array of its module in as an
argument. It is traced again when a shape changes or when a module is replaced, and never because of a prefix: attention
over it is in no piece.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

MAX_PIECES = 512  # more than a model has, by far: variants that nobody asks for any more make room


class Pieces:
    """Functions compiled on their first call."""

    def __init__(self) -> None:
        self.retraces = 0  # traces so far: one per piece and set of shapes
        self._compiled: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()

    def __call__(self, method: Callable[..., Any], *arrays: Any) -> Any:
        """Call a method of a module."""
        owner: nn.Module = method.__self__  # type: ignore[attr-defined]
        return self.call((id(owner), method.__name__), owner, method, *arrays)

    def call(self, key: Hashable, owner: nn.Module, function: Callable[..., Any], *arrays: Any) -> Any:
        """Call a function that reads the weights of a module.

        Args:
            key: of the function; functions with one key do the same.
            owner: all of whose weights the function may read.
            function: from arrays to arrays.
            arrays: in lists and tuples of any depth.
        """
        if key not in self._compiled:
            self._compiled[key] = mx.compile(self._traceable(owner, function))
            while len(self._compiled) > MAX_PIECES:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return self._compiled[key]([container[name] for container, name in _places(owner)], *arrays)

    def _traceable(self, owner: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
        def traced(weights: list[mx.array], *arrays: Any) -> Any:
            self.retraces += 1
            places = _places(owner)
            own = [container[name] for container, name in places]
            try:
                for (container, name), weight in zip(places, weights, strict=True):
                    container[name] = weight
                return function(*arrays)
            finally:
                for (container, name), array in zip(places, own, strict=True):
                    container[name] = array

        return traced


def _places(module: Any) -> list[tuple[Any, Any]]:
    """Return where a module and those in it keep arrays: (dict or list, key), in an order that follows the names."""
    found: list[tuple[Any, Any]] = []
    open_containers = [module]
    while open_containers:
        container = open_containers.pop()
        for name, value in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(value, mx.array):
                found.append((container, name))
            elif isinstance(value, dict | list):
                open_containers.append(value)
    return found
