"""The Responses API: POST /v1/responses, streamed and not, and GET and DELETE of what is remembered.

Answers are remembered in memory, within bounds (`store.py`), unless `store` is false. How input items are read is in
`responses_input.py`, how an answer is told in `responses_output.py`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from .blocks import Take, with_end
from .bodies import JsonRoute
from .errors import ApiError, refuse, short
from .fields import (
    SamplingBody,
    check_tool_choice,
    refuse_choices_and_drafts,
    sampling_options,
    thinking,
    token_limit,
)
from .logprobs import response_options
from .media import resolve_media
from .replies import json_reply, service_of
from .responses_input import messages_of, tool_choice_of, tools_of
from .responses_output import ResponseEvents, new_id
from .service import Answer, Ask
from .store import Store, Stored
from .streaming import EventStream, drain, named_event


class ResponsesBody(SamplingBody):
    """The body of /v1/responses."""

    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    max_output_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    include: list[str] | None = None
    background: bool | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    truncation: str | None = None
    user: str | None = None


def refuse_impossible(body: ResponsesBody) -> None:
    """Raise `ApiError` for what this server cannot do."""
    if body.background:
        raise refuse("background", "got true, expected false: answers are given while the client waits")
    for name in ("conversation", "prompt"):
        if getattr(body, name) is not None:
            raise refuse(name, f"got {short(getattr(body, name))}, expected none: this server keeps no such objects")
    refuse_choices_and_drafts(body)


def make_router() -> APIRouter:
    """Return the routes of the Responses API, and with them a memory of their own."""
    router = APIRouter(prefix="/v1/responses", route_class=JsonRoute)
    store = Store()

    @router.post("")
    async def create(request: Request, body: ResponsesBody) -> Response:
        """Answer an input, perhaps as the continuation of an earlier answer."""
        service = service_of(request)
        refuse_impossible(body)
        conversation = [*store.conversation(body.previous_response_id), *messages_of(body.input)]
        ask = _ask(body, await resolve_media(conversation, service.settings))
        answers = await service.open(ask) if ask.messages else []
        # Agents send an empty input to have the model loaded.
        model = answers[0].model if answers else (await service.load(body.model))[0].id
        events = ResponseEvents(_response(body, ask, model))

        def remember() -> None:
            if body.store is not False:
                messages = [*conversation, *messages_of(events.response["output"])]
                store.put(events.response["id"], Stored(events.response, messages))

        take = with_end(events.take, remember)
        if body.stream:
            source = _stream(answers, events, take, remember)
            return EventStream(
                source, answers, lambda error: named_event(events.fail(error)), service.settings.send_seconds
            )
        if answers:
            await drain(request, answers[0], take)
        else:
            events.finish_empty()
            remember()
        return json_reply(events.response)

    @router.get("/{response_id}")
    async def retrieve(response_id: str, stream: bool = False) -> Response:
        """Return an answer that is remembered."""
        if stream:
            raise refuse("stream", "got true, expected false: events are not kept")
        return json_reply(_find(store, response_id).body)

    @router.delete("/{response_id}")
    async def delete(response_id: str) -> Response:
        """Forget an answer."""
        _find(store, response_id)
        store.delete(response_id)
        return json_reply({"id": response_id, "object": "response", "deleted": True})

    @router.post("/{response_id}/cancel")
    async def cancel(response_id: str) -> Response:
        """Refuse: only answers in the background could be cancelled."""
        _find(store, response_id)
        raise refuse("response_id", "only background responses can be cancelled, and this server has none")

    return router


def _ask(body: ResponsesBody, conversation: Sequence[Mapping[str, Any]]) -> Ask:
    """Turn a body into an `Ask`. Raise `ApiError` for what cannot be done."""
    effort = (body.reasoning or {}).get("effort")
    if effort is not None and not isinstance(effort, str):
        raise refuse("reasoning.effort", f"got {short(effort)}, expected text")
    choice, tools = tool_choice_of(body.tool_choice, tools_of(body.tools))
    options = sampling_options(body) | response_options(body, body.include or ())
    if (wanted := (body.text or {}).get("format")) is not None:
        options["response_format"] = _nested(wanted)
    if (limit := token_limit(body.max_output_tokens)) is not None:
        if limit < 1:
            raise refuse("max_output_tokens", f"got {limit}, expected at least 1")
        options["max_tokens"] = limit
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    return Ask(
        messages=[*system, *conversation],
        model=body.model,
        tools=tools,
        tool_choice=check_tool_choice(choice),
        max_tool_calls=1 if body.parallel_tool_calls is False else None,
        enable_thinking=thinking("reasoning.effort", effort),
        options=options,
        ttl=body.ttl,
    )


def _nested(wanted: Any) -> Any:
    """Return `text.format` in the form of the chat API, which has the schema one level further down."""
    if isinstance(wanted, Mapping) and wanted.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {name: wanted[name] for name in wanted if name != "type"}}
    return wanted


def _response(body: ResponsesBody, ask: Ask, model: str) -> dict[str, Any]:
    """Return a response that has everything but the answer. Its `tools` are those that the model has."""
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "usage": None,
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "tools": [{"type": "function", **tool["function"], "strict": False} for tool in ask.tools or ()],
        "tool_choice": ask.tool_choice,
        "parallel_tool_calls": ask.max_tool_calls is None,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
        "text": {"format": {"type": "text"}},
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "top_logprobs": body.top_logprobs or 0,
        "truncation": "disabled",
        "store": body.store is not False,
        "background": False,
        "service_tier": "default",
        "metadata": body.metadata or {},
        "user": body.user,
        "safety_identifier": None,
        "prompt_cache_key": None,
    }


async def _stream(
    answers: Sequence[Answer], events: ResponseEvents, take: Take, remember: Callable[[], None]
) -> AsyncIterator[bytes]:
    for data in events.start():
        yield named_event(data)
    for answer in answers:
        async for piece in answer:
            for data in take(piece):
                yield named_event(data)
    if not answers:
        last = events.finish_empty()
        remember()
        yield named_event(last)


def _find(store: Store, response_id: str) -> Stored:
    stored = store.get(response_id)
    if stored is None:
        raise ApiError(404, f"response_id: got {short(response_id)}, expected one that is remembered", code="not_found")
    return stored
