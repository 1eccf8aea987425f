"""The pieces of an answer as events of the Responses API, and as the response that they add up to.

    created, in_progress
    output_item.added, content_part.added, output_text.delta ..., output_text.done, content_part.done, output_item.done
    output_item.added, function_call_arguments.delta, function_call_arguments.done, output_item.done
    completed, or incomplete, or failed

Every event has a sequence number that counts from 0.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from .blocks import Block, Blocks, Change, Grown, Opened
from .errors import ApiError
from .logprobs import token_logprobs
from .service import Delta, Done, Piece

Event = dict[str, Any]
PREFIXES = {"text": "msg", "reasoning": "rs", "tool_call": "fc"}
PART_TYPES = {"text": "output_text", "reasoning": "reasoning_text"}


def new_id(prefix: str) -> str:
    """Return an identifier that is unique."""
    return f"{prefix}_{uuid.uuid4().hex}"


class ResponseEvents:
    """Turns the pieces of one answer into events. `response` is complete behind the last piece."""

    def __init__(self, response: dict[str, Any]) -> None:
        """Begin with a response that has everything but the answer."""
        self.response = response
        self._blocks = Blocks()
        self._ids: list[str] = []
        self._statuses: list[str] = []  # that items have once they are done
        self._sequence_number = -1

    def start(self) -> Iterator[Event]:
        """Yield the events before the first piece."""
        yield self._event("response.created", response=dict(self.response))
        yield self._event("response.in_progress", response=dict(self.response))

    def take(self, piece: Piece) -> Iterator[Event]:
        """Take the next piece and yield its events."""
        if isinstance(piece, Delta):
            for change in self._blocks.feed(piece):
                yield from self._item_events(change)
        elif isinstance(piece, Done):
            status = "incomplete" if piece.finish_reason == "length" else "completed"
            for change in self._blocks.close():
                self._statuses[change.block.index] = status
                yield from self._item_events(change)
            yield self._end(status, piece)

    def finish_empty(self) -> Event:
        """End a response that has nothing to answer."""
        return self._complete("completed", _usage(0, 0, 0, 0))

    def fail(self, error: ApiError) -> Event:
        """End with an error."""
        code = "rate_limit_exceeded" if error.code == "queue_full" else "server_error"
        self.response |= {"status": "failed", "error": {"code": code, "message": error.message}}
        self.response["output"] = [self._item(block, "incomplete") for block in self._blocks.all]
        return self._event("response.failed", response=self.response)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._sequence_number += 1
        return {"type": kind, "sequence_number": self._sequence_number, **fields}

    def _item_events(self, change: Change) -> Iterator[Event]:
        block = change.block
        if isinstance(change, Opened):
            self._ids.append(new_id(PREFIXES[block.kind]))
            self._statuses.append("completed")
            item = self._item(block, "in_progress")
            item["arguments" if block.kind == "tool_call" else "content"] = "" if block.kind == "tool_call" else []
            yield self._event("response.output_item.added", output_index=block.index, item=item)
            if block.kind != "tool_call":
                part = _part(Block(block.index, block.kind))
                yield self._event("response.content_part.added", **self._at(block), part=part)
            return
        name = "function_call_arguments" if block.kind == "tool_call" else PART_TYPES[block.kind]
        said = change.logprobs if isinstance(change, Grown) else block.logprobs
        logprobs: dict[str, Any] = {"logprobs": token_logprobs(said)} if block.kind == "text" else {}
        if isinstance(change, Grown):
            yield self._event(f"response.{name}.delta", **self._at(block), delta=change.text, **logprobs)
            return
        field = "arguments" if block.kind == "tool_call" else "text"
        extra = {"name": block.call.name} if block.call is not None else {}
        yield self._event(f"response.{name}.done", **self._at(block), **{field: block.text}, **logprobs, **extra)
        if block.kind != "tool_call":
            part = _part(block)
            yield self._event("response.content_part.done", **self._at(block), part=part)
        item = self._item(block, self._statuses[block.index])
        yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _at(self, block: Block) -> dict[str, Any]:
        at = {"item_id": self._ids[block.index], "output_index": block.index}
        return at if block.kind == "tool_call" else {**at, "content_index": 0}

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._ids[block.index], "status": status}
        if block.call is not None:
            call = {"call_id": block.call.id, "name": block.call.name, "arguments": block.text}
            return {**item, "type": "function_call", **call}
        content = [_part(block)]
        if block.kind == "reasoning":
            return {**item, "type": "reasoning", "summary": [], "content": content}
        return {**item, "type": "message", "role": "assistant", "content": content}

    def _end(self, status: str, done: Done) -> Event:
        stats = done.result.stats
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        usage = _usage(stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens, done.reasoning_tokens)
        return self._complete(status, usage)

    def _complete(self, status: str, usage: dict[str, Any]) -> Event:
        items = [self._item(block, self._statuses[block.index]) for block in self._blocks.all]
        self.response |= {"status": status, "output": items, "usage": usage}
        if status == "completed":
            self.response["completed_at"] = int(time.time())
        return self._event(f"response.{status}", response=self.response)


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    logprobs = token_logprobs(block.logprobs)
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": logprobs}


def _usage(prompt_tokens: int, cached_tokens: int, output_tokens: int, reasoning_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens, "cache_write_tokens": 0},
        "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": prompt_tokens + output_tokens,
    }
