"""The chat of LM Studio's REST v1: /api/v1/chat, streamed as named events and not, continued by `previous_response_id`.

chat.start, model_load.start, .progress, .end, prompt_processing.start, .progress, .end
reasoning.start, .delta, .end, message.start, .delta, .end, tool_call.failure
chat.end with the whole result, also behind an error
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
from fastapi import APIRouter, Request
from starlette.responses import Response

from .blocks import Block, Blocks, Change, Grown, Opened, with_end
from .bodies import JsonRoute
from .catalog import ModelEntry
from .errors import ApiError, refuse, short
from .fields import SamplingBody, refuse_more_than_text, sampling_options, thinking, token_limit
from .lmstudio_models import check_context_length, context_length
from .media import resolve_media
from .replies import json_reply, service_of
from .reports import seconds_to_text
from .service import Answer, Ask, Delta, Done, Piece, PrefillProgress, Service
from .store import Store, Stored
from .streaming import EventStream, drain, named_event

Event = dict[str, Any]
Message = dict[str, Any]
PROGRESS_SECONDS = 0.5  # between two reports of how far the loading is
NAMES = {"reasoning": "reasoning", "text": "message"}  # of blocks


class ChatBodyV1(SamplingBody):
    """The body of /api/v1/chat."""

    model: str
    input: str | list[dict[str, Any]]
    system_prompt: str | None = None
    integrations: list[Any] | None = None
    max_output_tokens: int | None = None
    reasoning: str | None = None
    context_length: int | None = None
    store: bool | None = None
    previous_response_id: str | None = None


class ChatEvents:
    """Turns the pieces of one answer into events. `result` is complete behind the last piece, and partly before it."""

    def __init__(self, model: str) -> None:
        """Begin an answer of the model with this name."""
        self.result: dict[str, Any] = {"model_instance_id": model, "output": [], "stats": {}}
        self.load_seconds: float | None = None
        self._blocks = Blocks()
        self._is_processing = False

    def take(self, piece: Piece) -> Iterator[Event]:
        """Take the next piece and yield its events."""
        if isinstance(piece, PrefillProgress):
            if not self._is_processing:
                self._is_processing = True
                yield {"type": "prompt_processing.start"}
            yield {"type": "prompt_processing.progress", "progress": piece.processed / piece.total}
            return
        if self._is_processing:
            self._is_processing = False
            yield {"type": "prompt_processing.end"}
        if isinstance(piece, Delta):
            changes: Iterator[Change] = self._blocks.feed(piece)
        else:
            changes = self._blocks.close()
        for change in changes:
            yield from self._events(change)
        self.result["output"] = [_item(block) for block in self._blocks.all]
        if isinstance(piece, Done):
            self.result["stats"] = self._stats(piece)

    def _events(self, change: Change) -> Iterator[Event]:
        block = change.block
        if block.call is not None:
            if isinstance(change, Opened):
                yield {"type": "tool_call.failure", **_failed_call(block.call.name)}
        elif isinstance(change, Grown):
            yield {"type": f"{NAMES[block.kind]}.delta", "content": change.text}
        else:
            yield {"type": f"{NAMES[block.kind]}.{'start' if isinstance(change, Opened) else 'end'}"}

    def _stats(self, done: Done) -> dict[str, Any]:
        stats = done.result.stats
        numbers = {
            "input_tokens": stats.prompt_tokens,
            "total_output_tokens": stats.generated_tokens,
            "reasoning_output_tokens": done.reasoning_tokens,
            "tokens_per_second": stats.tokens_per_second,
            "time_to_first_token_seconds": seconds_to_text(stats),
        }
        return numbers | ({} if self.load_seconds is None else {"model_load_time_seconds": self.load_seconds})


def make_router() -> APIRouter:
    """Return the route of the chat, and with it a memory of its own."""
    router = APIRouter(prefix="/api/v1/chat", route_class=JsonRoute)
    store = Store()

    @router.post("")
    async def chat(request: Request, body: ChatBodyV1) -> Response:
        """Answer an input, perhaps as the continuation of an earlier answer."""
        service = service_of(request)
        entry = await service.find(body.model)
        conversation = _conversation(body, store.conversation(body.previous_response_id))
        ask = _ask(body, await resolve_media(conversation, service.settings))
        check_context_length(body.context_length, context_length(entry.config()))
        events = ChatEvents(entry.id)

        def remember() -> None:
            if body.store is not False:
                events.result["response_id"] = key = f"resp_{uuid.uuid4().hex}"
                store.put(key, Stored(events.result, [*conversation, *_answer_messages(events.result["output"])]))

        take = with_end(events.take, remember)

        async def load() -> None:
            events.load_seconds = (await service.load(entry.id))[1]

        async def open_answer() -> Answer:
            await _check_fits(service, ask, body.context_length)
            return (await service.open(ask))[0]

        is_loaded = service.is_loaded(entry)
        if not body.stream:
            if not is_loaded:
                await load()
            await drain(request, await open_answer(), take)
            return json_reply(events.result)
        answers = [await open_answer()] if is_loaded else []

        async def stream() -> AsyncIterator[bytes]:
            yield named_event({"type": "chat.start", "model_instance_id": entry.id})
            if not answers:
                yield named_event({"type": "model_load.start", "model_instance_id": entry.id})
                async for progress in _progress(load(), entry):
                    yield named_event(
                        {"type": "model_load.progress", "model_instance_id": entry.id, "progress": progress}
                    )
                loaded = {"model_instance_id": entry.id, "load_time_seconds": events.load_seconds}
                yield named_event({"type": "model_load.end", **loaded})
                answers.append(await open_answer())
            async for piece in answers[0]:
                for data in take(piece):
                    yield named_event(data)
            yield named_event({"type": "chat.end", "result": events.result})

        def fail(error: ApiError) -> bytes:
            end = named_event({"type": "chat.end", "result": events.result})
            return named_event({"type": "error", **error.lmstudio()}) + end

        return EventStream(stream(), answers, fail, service.settings.send_seconds)

    return router


async def _progress(loading: Coroutine[Any, Any, None], entry: ModelEntry) -> AsyncIterator[float]:
    """Load; meanwhile yield how much of the weights is in memory, 1 at the end."""
    task, last = asyncio.ensure_future(loading), 0.0
    nbytes = await asyncio.to_thread(entry.nbytes)
    while not (await asyncio.wait({task}, timeout=PROGRESS_SECONDS))[0]:
        share = min(0.99, mx.get_active_memory() / nbytes) if nbytes else 0.0
        if share > last:
            yield (last := share)
    task.result()
    yield 1.0


def _ask(body: ChatBodyV1, messages: list[Message]) -> Ask:
    """Turn a body into an `Ask`. Raise `ApiError` for what cannot be done."""
    if body.integrations:
        raise refuse("integrations", f"got {len(body.integrations)}, expected none: this server runs no tools")
    refuse_more_than_text(body)
    options = sampling_options(body)
    limit = token_limit(body.max_output_tokens)
    return Ask(
        messages=messages,
        model=body.model,
        enable_thinking=thinking("reasoning", body.reasoning),
        options=options if limit is None else {**options, "max_tokens": limit},
        ttl=body.ttl,
    )


def _conversation(body: ChatBodyV1, earlier: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return what was said before, with the system prompt of this request if it has one, and the input behind it."""
    messages = list(earlier)
    if body.system_prompt is not None:
        messages = [message for message in messages if message["role"] != "system"]
        messages.insert(0, {"role": "system", "content": body.system_prompt})
    content = body.input
    if not isinstance(content, str):
        content = [_part(f"input[{index}]", item) for index, item in enumerate(content)]
    return [*messages, {"role": "user", "content": content}]


def _part(where: str, item: Mapping[str, Any]) -> Message:
    kind = item.get("type")
    if kind in ("message", "text") and isinstance(item.get("content"), str):
        return {"type": "text", "text": item["content"]}
    if kind == "image" and isinstance(item.get("data_url"), str):
        return {"type": "image_url", "image_url": {"url": item["data_url"]}}
    expected = '{"type": "text", "content": "..."} or {"type": "image", "data_url": "data:..."}'
    raise refuse(where, f"got {short(item)}, expected {expected}")


def _answer_messages(output: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return an answer as the message of an assistant, for the requests that go on with it."""
    texts = {kind: "".join(item["content"] for item in output if item["type"] == kind) for kind in NAMES.values()}
    message: Message = {"role": "assistant", "content": texts["message"]}
    return [message | ({"reasoning_content": texts["reasoning"]} if texts["reasoning"] else {})]


async def _check_fits(service: Service, ask: Ask, context: int | None) -> None:
    """Raise `ApiError` for a prompt longer than the context that the request wants."""
    if context is not None and (tokens := await service.count_tokens(ask)) > context:
        raise refuse("context_length", f"got {context}, expected at least the {tokens} tokens of the prompt")


def _item(block: Block) -> dict[str, Any]:
    if block.call is not None:
        return {"type": "invalid_tool_call", **_failed_call(block.call.name)}
    return {"type": NAMES[block.kind], "content": block.text}


def _failed_call(name: str) -> dict[str, Any]:
    metadata = {"type": "invalid_name", "tool_name": name}
    return {"reason": f"Cannot find tool with name {name}.", "metadata": metadata}
