"""What an answer says as blocks that open, grow and close: the skeleton of the event streams of three dialects.

A canvas gives its reasoning, its text and its tool calls at once. They are told in this order, the one of writing, and
text that goes on in the next canvas goes on in the block that is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from .logprobs import Spelled
from .service import Call, Delta, Done, Piece

Kind = Literal["reasoning", "text", "tool_call"]


@dataclass
class Block:
    """A stretch of reasoning or text, or a tool call; `text` is what it has so far, JSON for a call.

    `logprobs` are those of the tokens of a text, where asked for.
    """

    index: int
    kind: Kind
    text: str = ""
    call: Call | None = None
    logprobs: list[Spelled] = field(default_factory=list)


@dataclass(frozen=True)
class Opened:
    """A block begins. Its text is still empty."""

    block: Block


@dataclass(frozen=True)
class Grown:
    """A block has more text, and the log-probabilities of its tokens."""

    block: Block
    text: str
    logprobs: tuple[Spelled, ...] = ()


@dataclass(frozen=True)
class Closed:
    """A block is complete."""

    block: Block


Change = Opened | Grown | Closed
Take = Callable[[Piece], Iterable[Any]]  # takes a piece and gives its events


class Blocks:
    """Sorts the deltas of one answer into blocks."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None

    def feed(self, delta: Delta) -> Iterator[Change]:
        """Take a delta and yield what changes."""
        if delta.reasoning:
            yield from self._grow("reasoning", delta.reasoning)
        if delta.text:
            yield from self._grow("text", delta.text, delta.logprobs or ())
        for call in delta.tool_calls:
            yield from self.close()
            yield from self._begin("tool_call", call)
            yield from self._grow("tool_call", call.arguments)
            yield from self.close()

    def close(self) -> Iterator[Change]:
        """End the block that is open, if one is."""
        if self._open is not None:
            block, self._open = self._open, None
            yield Closed(block)

    def _begin(self, kind: Kind, call: Call | None = None) -> Iterator[Change]:
        self._open = Block(len(self.all), kind, call=call)
        self.all.append(self._open)
        yield Opened(self._open)

    def _grow(self, kind: Kind, text: str, logprobs: tuple[Spelled, ...] = ()) -> Iterator[Change]:
        if self._open is None or self._open.kind != kind:
            yield from self.close()
            yield from self._begin(kind)
        assert self._open is not None
        self._open.text += text
        self._open.logprobs += logprobs
        yield Grown(self._open, text, logprobs)


def with_end(take: Take, at_end: Callable[[], None]) -> Take:
    """Return `take`, and behind the last piece `at_end`: what an answer adds up to is complete then."""

    def take_and_end(piece: Piece) -> Iterable[Any]:
        found = list(take(piece))
        if isinstance(piece, Done):
            at_end()
        return found

    return take_and_end
