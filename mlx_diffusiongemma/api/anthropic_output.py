"""The pieces of an answer as events of Anthropic's message stream, and as the message that they add up to."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from ..events import PrefillProgress, Stats
from .blocks import Block, Blocks, Change, Grown, Opened
from .reports import has_filled_context
from .service import Delta, Done, Piece

Event = dict[str, Any]
SIGNATURE = "unsigned"  # clients drop thoughts whose signature is empty; nobody checks this one


class MessageEvents:
    """Turns the pieces of one answer into events. `message` is complete behind the last piece."""

    def __init__(self, model: str, *, max_tokens: int, shows_thoughts: bool) -> None:
        """Begin a message.

        Args:
            model: its name for the client.
            max_tokens: what the request allowed; an answer that ended before that has filled the context.
            shows_thoughts: whether thinking blocks have their text.
        """
        self.message: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex[:24]}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        self._max_tokens = max_tokens
        self._shows_thoughts = shows_thoughts
        self._blocks = Blocks()
        self._started = False

    def take(self, piece: Piece) -> Iterator[Event]:
        """Take the next piece and yield its events."""
        if not self._started:
            self._started = True
            yield self._start(piece)
        if isinstance(piece, Delta):
            for change in self._blocks.feed(piece):
                yield from self._block_events(change)
        elif isinstance(piece, Done):
            for change in self._blocks.close():
                yield from self._block_events(change)
            yield from self._end(piece)

    def _start(self, piece: Piece) -> Event:
        """Begin with the first piece: it tells how long the prompt is."""
        if isinstance(piece, PrefillProgress):
            usage = _usage(piece.total, piece.processed, 0)
        else:
            usage = _usage_of(piece.result.stats) if isinstance(piece, Done) else _usage(0, 0, 0)
        return {
            "type": "message_start",
            "message": {**self.message, "content": [], "usage": {**usage, "output_tokens": 0}},
        }

    def _block_events(self, change: Change) -> Iterator[Event]:
        block = change.block
        at = {"index": block.index}
        if isinstance(change, Opened):
            empty = _content(block, "") if block.kind != "tool_call" else {**_content(block, "{}"), "input": {}}
            yield {"type": "content_block_start", **at, "content_block": empty}
        elif isinstance(change, Grown):
            if block.kind != "reasoning" or self._shows_thoughts:
                yield {"type": "content_block_delta", **at, "delta": _delta(block, change.text)}
        else:
            if block.kind == "reasoning":
                signature = {"type": "signature_delta", "signature": SIGNATURE}
                yield {"type": "content_block_delta", **at, "delta": signature}
            yield {"type": "content_block_stop", **at}

    def _end(self, done: Done) -> Iterator[Event]:
        stop = {"stop_reason": self._stop_reason(done), "stop_sequence": done.stop_sequence}
        usage = _usage_of(done.result.stats)
        usage["output_tokens_details"] = {"thinking_tokens": done.reasoning_tokens}
        content = [self._complete(block) for block in self._blocks.all]
        self.message |= {"content": content, **stop, "usage": usage}
        yield {"type": "message_delta", "delta": stop, "usage": usage}
        yield {"type": "message_stop"}

    def _complete(self, block: Block) -> Mapping[str, Any]:
        if block.kind != "reasoning":
            return _content(block, block.text)
        return {"type": "thinking", "thinking": block.text if self._shows_thoughts else "", "signature": SIGNATURE}

    def _stop_reason(self, done: Done) -> str:
        if done.finish_reason == "tool_calls":
            return "tool_use"
        if done.finish_reason == "length":
            return "model_context_window_exceeded" if has_filled_context(done, self._max_tokens) else "max_tokens"
        return "end_turn" if done.stop_sequence is None else "stop_sequence"


def _content(block: Block, text: str) -> dict[str, Any]:
    """Return a content block with the given text, JSON for a call."""
    if block.call is not None:
        identity = "toolu_" + block.call.id.removeprefix("call_")
        return {"type": "tool_use", "id": identity, "name": block.call.name, "input": json.loads(text)}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text}


def _delta(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "tool_call":
        return {"type": "input_json_delta", "partial_json": text}
    if block.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "text_delta", "text": text}


def _usage(prompt_tokens: int, cached_tokens: int, output_tokens: int) -> dict[str, Any]:
    """Return token counts; the three of the input add up to the prompt."""
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": output_tokens,
    }


def _usage_of(stats: Stats) -> dict[str, Any]:
    return _usage(stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens)
