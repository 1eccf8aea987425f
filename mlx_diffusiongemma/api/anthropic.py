"""Anthropic's Messages API: /v1/messages, streamed and not, and /v1/messages/count_tokens.

How a request is read is in `anthropic_input.py`, how an answer is told in `anthropic_output.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from .anthropic_input import messages_of, response_format_of, shows_thoughts, thinking_of, tool_choice_of, tools_of
from .anthropic_output import MessageEvents
from .bodies import JsonRoute
from .errors import ApiError, refuse, short
from .fields import SamplingBody, check_tool_choice, refuse_more_than_text, sampling_options
from .media import resolve_media
from .replies import json_reply, service_of
from .service import Answer, Ask, Service
from .streaming import EventStream, drain, named_event

router = APIRouter(prefix="/v1/messages", route_class=JsonRoute)


class CountBody(SamplingBody):
    """What both endpoints read."""

    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    container: str | dict[str, Any] | None = None
    mcp_servers: list[dict[str, Any]] | None = None


class MessagesBody(CountBody):
    """The body of /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None


def refuse_impossible(body: CountBody) -> None:
    """Raise `ApiError` for what would change the answer and cannot be done."""
    for name in ("container", "mcp_servers"):
        if getattr(body, name):
            raise refuse(name, f"got {short(getattr(body, name))}, expected nothing: this server runs no tools")
    refuse_more_than_text(body)


async def ask_of(service: Service, body: CountBody) -> Ask:
    """Return what a request asks for. Raise `ApiError` for what cannot be done."""
    refuse_impossible(body)
    options = sampling_options(body)
    if (wanted := response_format_of(body.output_config)) is not None:
        options["response_format"] = wanted
    messages, beginning = messages_of(body.messages, body.system)
    choice, parallel = tool_choice_of(body.tool_choice)
    if isinstance(body, MessagesBody):
        if body.max_tokens < 0:
            raise refuse("max_tokens", f"got {body.max_tokens}, expected at least 0")
        options["max_tokens"] = body.max_tokens
        if body.stop_sequences:
            options["stop"] = body.stop_sequences
    if beginning is not None:
        options["prefill_response"] = beginning
    return Ask(
        messages=await resolve_media(messages, service.settings),
        model=body.model,
        tools=tools_of(body.tools),
        tool_choice=check_tool_choice(choice),
        max_tool_calls=None if parallel else 1,
        enable_thinking=thinking_of(body.thinking),
        options=options,
        ttl=body.ttl,
    )


@router.post("")
async def create(request: Request, body: MessagesBody) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    [answer] = await service.open(await ask_of(service, body))
    shows = shows_thoughts(body.thinking)
    events = MessageEvents(answer.model, max_tokens=body.max_tokens, shows_thoughts=shows)
    if body.stream:
        return EventStream(_stream(answer, events), [answer], _error, service.settings.send_seconds)
    await drain(request, answer, events.take)
    return json_reply(events.message)


@router.post("/count_tokens")
async def count_tokens(request: Request, body: CountBody) -> Response:
    """Count the tokens of a prompt."""
    service = service_of(request)
    return json_reply({"input_tokens": await service.count_tokens(await ask_of(service, body))})


async def _stream(answer: Answer, events: MessageEvents) -> AsyncIterator[bytes]:
    async for piece in answer:
        for data in events.take(piece):
            yield named_event(data)


def _error(error: ApiError) -> bytes:
    return named_event(error.anthropic())
