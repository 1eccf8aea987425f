"""OpenAI's dialect: /v1/chat/completions, /v1/completions, /v1/models. /v1/responses is in `responses.py`."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from . import infill
from .bodies import JsonRoute
from .catalog import ModelEntry
from .errors import is_anthropic, refuse
from .fields import (
    SamplingBody,
    check_tool_choice,
    sampling_options,
    thinking,
    token_limit,
    wants_frames,
)
from .logprobs import Spelled, TextLogprobs, chat_logprobs, chat_options, completion_options
from .media import resolve_media
from .replies import json_reply, service_of
from .reports import timings, usage
from .service import Answer, Ask, Call, Delta, Done, Frame, Piece, PrefillProgress, Service
from .streaming import EventStream, collect, error_event, event, merge

router = APIRouter(route_class=JsonRoute)
Report = Callable[[Done], dict[str, Any]]
Reporter = Callable[[Service, Sequence[Answer]], Awaitable[Report]]
FINISH_REASONS = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "cancelled": "stop"}


class ChatBody(SamplingBody):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    stream_options: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    return_progress: bool | None = None
    modalities: list[str] | None = None
    image_tokens: int | None = None
    fps: float | None = None
    video_frames: int | None = None


class CompletionBody(SamplingBody):
    """The body of /v1/completions."""

    prompt: str | list[Any] = ""
    max_tokens: int | None = None
    suffix: str | None = None
    infill_length: int | list[int] | None = None
    echo: bool | None = None
    best_of: int | None = None
    stream_options: dict[str, Any] | None = None


# -- chat -------------------------------------------------------------------------------------------------------------


@router.post("/v1/chat/completions")
@router.post("/chat/completions", include_in_schema=False)
async def chat_completions(request: Request, body: ChatBody) -> Response:
    """Answer a conversation."""
    return await answer_chat(request, body)


async def answer_chat(request: Request, body: ChatBody, reporter: Reporter | None = None) -> Response:
    """Answer a conversation; `reporter` makes what adds fields to the ends of answers."""
    service = service_of(request)
    answers = await service.open(await chat_ask(service, body))
    report = _no_more if reporter is None else await reporter(service, answers)
    reply_id = f"chatcmpl-{uuid.uuid4().hex}"
    if body.stream:
        source = chat_events(ChatChunks(reply_id, answers, body, report), answers)
        return EventStream(source, answers, error_event, service.settings.send_seconds)
    dones = await collect(request, answers)
    return json_reply(chat_reply(reply_id, answers, dones) | report(dones[0]))


def _no_more(done: Done) -> dict[str, Any]:
    return {}


async def chat_ask(service: Service, body: ChatBody) -> Ask:
    """Turn a body into an `Ask`. Raise `ApiError` for what cannot be done."""
    if body.functions:
        raise refuse("functions", "is not supported, expected tools")
    if set(body.modalities or ["text"]) != {"text"}:
        raise refuse("modalities", f"got {body.modalities!r}, expected ['text']")
    options = sampling_options(body) | chat_options(body)
    template = dict(body.chat_template_kwargs or {})
    from_template = template.pop("enable_thinking", None)
    if from_template is not None and not isinstance(from_template, bool):
        raise refuse("chat_template_kwargs.enable_thinking", f"got {from_template!r}, expected true or false")
    messages = await resolve_media(body.messages, service.settings)
    if body.continue_final_message:
        messages, options["prefill_response"] = _split_prefill(messages)
    for name in ("image_tokens", "fps", "video_frames"):
        options[name] = getattr(body, name)
    return Ask(
        messages=messages,
        model=body.model,
        tools=body.tools,
        tool_choice=check_tool_choice(body.tool_choice),
        max_tool_calls=1 if body.parallel_tool_calls is False else None,
        enable_thinking=thinking("reasoning_effort", body.reasoning_effort, body.enable_thinking, from_template),
        options={
            **options,
            "max_tokens": token_limit(body.max_completion_tokens, body.max_tokens),
            "template_kwargs": template or None,
        },
        n=1 if body.n is None else body.n,
        wants_frames=wants_frames(body),
        ttl=body.ttl,
    )


def _split_prefill(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise refuse("continue_final_message", "expected a last message of role assistant whose content is text")
    return list(messages[:-1]), last["content"]


def chat_reply(reply_id: str, answers: Sequence[Answer], dones: Sequence[Done]) -> dict[str, Any]:
    """Return the whole answer as a `chat.completion`."""
    choices = [
        {
            "index": index,
            "message": chat_message(done),
            "finish_reason": FINISH_REASONS[done.finish_reason],
            "logprobs": None if done.logprobs is None else chat_logprobs(done.logprobs),
        }
        for index, done in enumerate(dones)
    ]
    return {
        "id": reply_id,
        "object": "chat.completion",
        "created": answers[0].created,
        "model": answers[0].model,
        "choices": choices,
        "usage": usage(dones, len(dones)),
        "system_fingerprint": None,
        "timings": timings(dones[0]),
    }


def chat_message(done: Done) -> dict[str, Any]:
    """Return the assistant's message."""
    result = done.result
    message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
    if result.reasoning:
        message["reasoning_content"] = result.reasoning
    if done.calls:
        message["content"] = result.text or None
        message["tool_calls"] = [tool_call(call) for call in done.calls]
    return message


def tool_call(call: Call) -> dict[str, Any]:
    """Return a tool call in OpenAI's form."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


class ChatChunks:
    """The chunks of one stream: what they have in common, and how many tool calls each choice has had."""

    def __init__(self, reply_id: str, answers: Sequence[Answer], body: ChatBody, report: Report) -> None:
        self._report = report
        self._head = {
            "id": reply_id,
            "object": "chat.completion.chunk",
            "created": answers[0].created,
            "model": answers[0].model,
        }
        self._body = body
        self._calls = [0] * len(answers)
        self.has_usage = bool((body.stream_options or {}).get("include_usage"))

    def chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish: str | None = None,
        logprobs: dict[str, Any] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Return one chunk."""
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        usage_field = {"usage": None} if self.has_usage else {}
        return {**self._head, "choices": [choice], **usage_field, **more}

    def of_piece(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Return the chunks that tell of a piece."""
        if isinstance(piece, Delta):
            logprobs = None if piece.logprobs is None else chat_logprobs(piece.logprobs)
            return [
                self.chunk(index, delta, logprobs=logprobs if "content" in delta else None)
                for delta in self._deltas(index, piece)
            ]
        if isinstance(piece, Frame):
            return [self.chunk(index, {}, **frame_fields(piece))]
        if isinstance(piece, Done):
            finish = FINISH_REASONS[piece.finish_reason]
            return [self.chunk(index, {}, finish, timings=timings(piece), **self._report(piece))]
        return self._progress(index, piece)

    def _deltas(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        if delta.reasoning:
            deltas.append({"reasoning_content": delta.reasoning})
        if delta.text:
            deltas.append({"content": delta.text})
        for call in delta.tool_calls:
            place = self._calls[index]
            self._calls[index] += 1
            opening = {**tool_call(call), "function": {"name": call.name, "arguments": ""}}
            deltas.append({"tool_calls": [{"index": place, **opening}]})
            deltas.append({"tool_calls": [{"index": place, "function": {"arguments": call.arguments}}]})
        return deltas

    def _progress(self, index: int, piece: PrefillProgress) -> list[dict[str, Any]]:
        if not self._body.return_progress:
            return []
        return [self.chunk(index, {}, prompt_progress={"total": piece.total, "processed": piece.processed})]

    def last(self, dones: Sequence[Done]) -> list[dict[str, Any]]:
        """Return the chunk with the totals, if the client asked for it."""
        if not self.has_usage:
            return []
        return [{**self._head, "choices": [], "usage": usage(dones, len(dones)), "timings": timings(dones[0])}]


def frame_fields(frame: Frame) -> dict[str, Any]:
    """Return what a chunk says of a draft; the first five are those of other players of diffusion."""
    return {
        "type": "diffusion_frame",
        "block": frame.block,
        "step": frame.step,
        "total": frame.total,
        "text": frame.text,
        "diffusion": {
            "tokens": frame.tokens,
            "settled": frame.settled,
            "pinned": frame.pinned,
            "entropies": [round(value, 4) for value in frame.entropies],
            "mean_entropy": frame.entropy,
            "finished": frame.finished,
        },
    }


async def chat_events(chunks: ChatChunks, answers: Sequence[Answer]) -> AsyncIterator[bytes]:
    """Yield the events of a stream, the totals and the end mark behind them."""
    for answer in answers:
        yield event(chunks.chunk(answer.index, {"role": "assistant", "content": ""}))
    dones: dict[int, Done] = {}
    async for answer, piece in merge(answers):
        if isinstance(piece, Done):
            dones[answer.index] = piece
        for chunk in chunks.of_piece(answer.index, piece):
            yield event(chunk)
    for chunk in chunks.last([dones[index] for index in sorted(dones)]):
        yield event(chunk)
    yield event("[DONE]")


# -- text -------------------------------------------------------------------------------------------------------------


@router.post("/v1/completions")
@router.post("/completions", include_in_schema=False)
async def completions(request: Request, body: CompletionBody) -> Response:
    """Continue a text: the model gets the prompt as it is, without the chat template."""
    return await answer_completions(request, body)


async def answer_completions(request: Request, body: CompletionBody, reporter: Reporter | None = None) -> Response:
    """Continue texts; `reporter` makes what adds fields to the ends of answers."""
    service = service_of(request)
    if body.suffix:
        return await infill.complete(request, body, _prompts(body))
    answers, echoes = await open_completions(service, body)
    report = _no_more if reporter is None else await reporter(service, answers)
    head = completion_head(answers)
    if body.stream:
        source = completion_events(body, head, answers, echoes, report)
        return EventStream(source, answers, error_event, service.settings.send_seconds)
    dones = await collect(request, answers)
    return json_reply(completion_reply(body, head, dones, echoes) | report(dones[0]))


@dataclass(frozen=True)
class Echo:
    """What a text completion begins with: the prompt, where it is to be repeated, and its tokens where scored."""

    text: str = ""
    tokens: tuple[Spelled, ...] = ()


async def open_completions(service: Service, body: CompletionBody) -> tuple[list[Answer], list[Echo]]:
    """Return an answer for every choice of every prompt, and the text that each begins with. Raise `ApiError`."""
    prompts = _prompts(body)
    engine = service.settings.engine
    wanted, limit = len(prompts) * (body.n or 1), engine.max_active + engine.max_queue
    if wanted > limit:  # coming back later would not help
        raise refuse("prompt", f"got {len(prompts)} prompts for {wanted} answers, expected at most {limit} answers")
    echoes = [await _echo(service, body, prompt) for prompt in prompts]
    answers: list[Answer] = []
    try:
        for prompt in prompts:
            for answer in await service.open(_completion_ask(body, prompt)):
                answer.index = len(answers)
                answers.append(answer)
    except BaseException:
        for answer in answers:
            answer.cancel()
        raise
    return answers, [echo for echo in echoes for _ in range(len(answers) // len(prompts))]


async def _echo(service: Service, body: CompletionBody, prompt: str) -> Echo:
    if not body.echo:
        return Echo()
    top = completion_options(body).get("logprobs")
    return Echo(prompt, () if top is None else tuple(await service.score(body.model, prompt, top)))


def completion_head(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return what a `text_completion` and its chunks have in common."""
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": answers[0].created,
        "model": answers[0].model,
    }


def completion_reply(
    body: CompletionBody,
    head: dict[str, Any],
    dones: Sequence[Done],
    echoes: Sequence[Echo],
) -> dict[str, Any]:
    """Return the whole answer as a `text_completion`."""
    choices = [
        _text_choice(
            index,
            echoes[index].text + done.result.text,
            FINISH_REASONS[done.finish_reason],
            None if done.logprobs is None else TextLogprobs().of([*echoes[index].tokens, *done.logprobs]),
        )
        for index, done in enumerate(dones)
    ]
    return {**head, "choices": choices, "usage": usage(dones, body.n or 1), "timings": timings(dones[0])}


def _prompts(body: CompletionBody) -> list[str]:
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise refuse("prompt", "expected a string or a list of strings; token ids are not supported")
    if body.best_of not in (None, 1, body.n):
        raise refuse("best_of", f"got {body.best_of}, expected none: answers are not ranked")
    return prompts


def _completion_ask(body: CompletionBody, prompt: str) -> Ask:
    return Ask(
        messages=prompt,
        model=body.model,
        options={**sampling_options(body), **completion_options(body), "max_tokens": token_limit(body.max_tokens)},
        n=1 if body.n is None else body.n,
        raw=True,
        wants_frames=wants_frames(body),
        ttl=body.ttl,
    )


def _text_choice(index: int, text: str, finish: str | None, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


async def completion_events(
    body: CompletionBody,
    head: dict[str, Any],
    answers: Sequence[Answer],
    echoes: Sequence[Echo],
    report: Report,
) -> AsyncIterator[bytes]:
    """Yield the events of a stream, the totals and the end mark behind them."""
    logprobs = [TextLogprobs() for _ in answers]
    for answer in answers:
        if (echo := echoes[answer.index]).text:
            own = logprobs[answer.index].of(echo.tokens) if echo.tokens else None
            yield event({**head, "choices": [_text_choice(answer.index, echo.text, None, own)]})
    dones: dict[int, Done] = {}
    async for answer, piece in merge(answers):
        index = answer.index
        if isinstance(piece, Delta) and piece.text:
            own = None if piece.logprobs is None else logprobs[index].of(piece.logprobs)
            yield event({**head, "choices": [_text_choice(index, piece.text, None, own)]})
        elif isinstance(piece, Frame):
            yield event({**head, "choices": [_text_choice(index, "", None)], **frame_fields(piece)})
        elif isinstance(piece, Done):
            dones[index] = piece
            choice = _text_choice(index, "", FINISH_REASONS[piece.finish_reason])
            yield event({**head, "choices": [choice], "timings": timings(piece), **report(piece)})
    if (body.stream_options or {}).get("include_usage"):
        totals = usage([dones[index] for index in sorted(dones)], body.n or 1)
        yield event({**head, "choices": [], "usage": totals})
    yield event("[DONE]")


# -- models -----------------------------------------------------------------------------------------------------------


@router.get("/v1/models")
@router.get("/models", include_in_schema=False)
async def models(request: Request) -> Response:
    """List the models that requests may name, in Anthropic's form for its clients."""
    service = service_of(request)
    entries = service.models()
    if not is_anthropic(request.headers):
        return json_reply({"object": "list", "data": [_model(service, entry) for entry in entries]})
    data = [_model_for_anthropic(service, entry) for entry in entries]
    return json_reply({"data": data, "has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """Describe one model."""
    service = service_of(request)
    describe = _model_for_anthropic if is_anthropic(request.headers) else _model
    return json_reply(describe(service, await service.find(name)))


def _model(service: Service, entry: ModelEntry) -> dict[str, Any]:
    state = "loaded" if service.is_loaded(entry) else "not-loaded"
    return {
        "id": entry.id,
        "object": "model",
        "created": service.started,
        "owned_by": entry.publisher,
        "state": state,
    }


def _model_for_anthropic(service: Service, entry: ModelEntry) -> dict[str, Any]:
    created = datetime.fromtimestamp(service.started, UTC).isoformat()
    return {"type": "model", "id": entry.id, "display_name": entry.id, "created_at": created}
