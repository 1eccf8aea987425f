"""Holes and edits over HTTP: `suffix` of /v1/completions, llama.cpp's /infill, and /v1/edits.

/v1/edits has the form of OpenAI's retired endpoint (input, instruction), with a selection and a diff besides.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..edit import edit_plan
from ..infill import FILL_OPTIONS, Filler, InfillResult
from ..lengths import lengths_to_try
from ..options import MAX_SEED
from ..prepare import Preparer
from .bodies import JsonRoute
from .errors import from_exception, refuse
from .fields import SamplingBody, refuse_more_than_text, sampling_options, token_limit
from .plans import run_plan
from .replies import json_reply, service_of
from .streaming import EventStream, error_event, event

router = APIRouter(route_class=JsonRoute)


class InfillBody(SamplingBody):
    """The body of llama.cpp's /infill. `prompt` is how the hole begins."""

    input_prefix: str
    input_suffix: str
    input_extra: list[dict[str, Any]] | None = None
    prompt: str | None = None
    n_predict: int | None = None
    infill_length: int | list[int] | None = None


class EditBody(SamplingBody):
    """The body of /v1/edits."""

    input: str
    instruction: str | None = None
    messages: list[dict[str, Any]] | None = None
    selection: list[Any] | None = None
    max_tokens: int | None = None
    infill_length: int | list[int] | None = None


# -- holes ------------------------------------------------------------------------------------------------------------


async def complete(request: Request, body: Any, prompts: Sequence[str]) -> Response:
    """Answer a /v1/completions with a suffix: fill the hole between each prompt and it."""
    refuse_frames(body)
    service, n = service_of(request), 1 if body.n is None else body.n
    if not 1 <= n <= service.settings.max_choices:
        raise refuse("n", f"got {n}, expected 1 to {service.settings.max_choices}")
    limit = token_limit(body.max_tokens)
    entry, preparer = await service.preparer_of(body.model)
    filled = [
        await _fill(request, body, preparer, (prompt, body.suffix), limit, index)
        for prompt in prompts
        for index in range(n)
    ]
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": entry.id,
    }
    choices = [
        {
            "index": index,
            "text": (prompts[index // n] if body.echo else "") + each.text,
            "logprobs": None,
            "finish_reason": "stop",
        }
        for index, each in enumerate(filled)
    ]
    usage = _usage(filled)
    if not body.stream:
        return json_reply({**head, "choices": choices, "usage": usage})
    events = [{**head, "choices": [choice]} for choice in choices]
    if (body.stream_options or {}).get("include_usage"):
        events.append({**head, "choices": [], "usage": usage})
    return _stream(service.settings.send_seconds, [*events, "[DONE]"])


@router.post("/infill")
async def infill(request: Request, body: InfillBody) -> Response:
    """Fill a hole in a file, as llama.cpp does."""
    refuse_more_than_text(body)
    extra = "".join(_extra(each) for each in body.input_extra or ())
    before = extra + body.input_prefix + (body.prompt or "")
    service = service_of(request)
    entry, preparer = await service.preparer_of(body.model)
    filled = await _fill(request, body, preparer, (before, body.input_suffix), token_limit(body.n_predict))
    stats = filled.stats
    reply = {
        "index": 0,
        "content": filled.text,
        "tokens": list(filled.token_ids),
        "stop": True,
        "model": entry.id,
        "tokens_predicted": filled.length,
        "tokens_evaluated": stats.prompt_tokens,
        "tokens_cached": stats.cached_tokens,
        "stop_type": "eos",
        "stopping_word": "",
        "truncated": False,
        "timings": {
            "prompt_n": stats.prompt_tokens - stats.cached_tokens,
            "prompt_ms": 1e3 * stats.prefill_seconds,
            "predicted_n": filled.length,
            "predicted_ms": 1e3 * stats.denoising_seconds,
            "diffusion": True,
            "diffusion_steps": filled.canvas_steps,
            "seed": filled.seed,
        },
    }
    if not body.stream:
        return json_reply(reply)
    first = {"index": 0, "content": filled.text, "tokens": list(filled.token_ids), "stop": False}
    return _stream(service.settings.send_seconds, [first, {**reply, "content": "", "tokens": []}])


def _extra(piece: dict[str, Any]) -> str:
    text, name = piece.get("text"), piece.get("filename", "")
    if not isinstance(text, str) or not isinstance(name, str):
        raise refuse("input_extra", "expected objects with a text, and a filename or none")
    return f"{name}\n{text}\n\n" if name else f"{text}\n\n"


async def _fill(
    request: Request,
    body: Any,
    preparer: Preparer,
    around: tuple[str, str],
    max_tokens: int | None,
    index: int = 0,
) -> InfillResult:
    options = hole_options(body)
    if options.get("seed") is not None:
        options["seed"] = (options["seed"] + index) % (MAX_SEED + 1)
    try:
        tries = lengths_to_try(body.infill_length, max_tokens)
        plan = Filler(preparer, None, options).infill(*around, tries)
    except ValueError as error:
        raise from_exception(error) from None
    return await run_plan(request, service_of(request), body.model, plan)


# -- edits ------------------------------------------------------------------------------------------------------------


@router.post("/v1/edits")
async def edits(request: Request, body: EditBody) -> Response:
    """Change a text as an instruction says: all of it, or a selection."""
    refuse_more_than_text(body)
    if body.stream:
        raise refuse("stream", "got true, expected false: an edit comes as a whole")
    service = service_of(request)
    entry, preparer = await service.preparer_of(body.model)
    try:
        plan = edit_plan(
            preparer,
            body.input,
            body.instruction,
            messages=body.messages,
            selection=body.selection,
            length=body.infill_length,
            max_tokens=token_limit(body.max_tokens),
            **hole_options(body),
        )
    except ValueError as error:
        raise from_exception(error) from None
    result = await run_plan(request, service, body.model, plan)
    changes = [vars(change) for change in result.changes]
    return json_reply(
        {
            "object": "edit",
            "created": int(time.time()),
            "model": entry.id,
            "choices": [{"index": 0, "text": result.text, "diff": result.diff, "changes": changes}],
            "usage": _usage(result.holes),
            "timings": {"diffusion": True, "diffusion_steps": result.canvas_steps, "seed": result.seed},
        }
    )


# -- both -------------------------------------------------------------------------------------------------------------


def hole_options(body: SamplingBody) -> dict[str, Any]:
    """Return the options of a body that holes may have. Raise `ApiError` for the others."""
    options = sampling_options(body)
    if (options.get("response_format") or {}).get("type") == "text":
        del options["response_format"]
    if others := sorted(options.keys() - FILL_OPTIONS):
        raise refuse(others[0], "expected none where a hole is filled")
    return options


def refuse_frames(body: Any) -> None:
    """Raise `ApiError` for drafts: the canvases of several lengths are denoised together."""
    if body.diffusion_frames or body.diffusing:
        raise refuse("diffusion_frames", "got true, expected false where a hole is filled")


def _usage(filled: Sequence[InfillResult]) -> dict[str, int]:
    prompt = sum(each.stats.prompt_tokens for each in filled)
    completion = sum(each.length for each in filled)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _stream(send_seconds: float, events: Sequence[Any]) -> EventStream:
    async def source() -> AsyncIterator[bytes]:
        for each in events:
            yield event(each)

    return EventStream(source(), (), error_event, send_seconds)
