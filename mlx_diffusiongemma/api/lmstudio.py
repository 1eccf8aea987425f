"""LM Studio's REST API: v0 (OpenAI's bodies with statistics) and the models of v1. `lmstudio_chat.py` has its chat.

`/lmstudio-greeting` is left out on purpose: clients that find it go on with a protocol that is not spoken here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from .. import __version__
from .bodies import JsonRoute
from .catalog import ModelEntry
from .fields import Body, token_limit
from .lmstudio_models import architecture, check_context_length, context_length, model_v0, model_v1, quantization_name
from .openai import ChatBody, CompletionBody, Report, answer_chat, answer_completions
from .replies import json_reply, service_of
from .reports import has_filled_context, seconds_to_text
from .service import Answer, Done, Service

router = APIRouter(route_class=JsonRoute)
RUNTIME = {"name": "mlx_diffusiongemma", "version": __version__, "supported_formats": ["mlx"]}


class LoadBody(Body):
    """The body of /api/v1/models/load. What only llama.cpp knows is ignored."""

    model: str
    context_length: int | None = None
    echo_load_config: bool | None = None


class UnloadBody(Body):
    """The body of /api/v1/models/unload."""

    instance_id: str


# -- v0 ---------------------------------------------------------------------------------------------------------------


@router.get("/api/v0/models")
async def models_v0(request: Request) -> Response:
    """List the models."""
    service = service_of(request)
    models = [await _described_v0(service, entry) for entry in service.models()]
    return json_reply({"object": "list", "data": models})


@router.get("/api/v0/models/{name:path}")
async def one_model_v0(request: Request, name: str) -> Response:
    """Describe one model."""
    service = service_of(request)
    return json_reply(await _described_v0(service, await service.find(name)))


async def _described_v0(service: Service, entry: ModelEntry) -> dict[str, Any]:
    return await asyncio.to_thread(model_v0, entry, is_loaded=service.is_loaded(entry))


@router.post("/api/v0/chat/completions")
async def chat_completions_v0(request: Request, body: ChatBody) -> Response:
    """Answer a conversation."""
    limit = token_limit(body.max_completion_tokens, body.max_tokens)
    return await answer_chat(request, body, partial(_reporter, limit))


@router.post("/api/v0/completions")
async def completions_v0(request: Request, body: CompletionBody) -> Response:
    """Continue a text."""
    return await answer_completions(request, body, partial(_reporter, token_limit(body.max_tokens)))


async def _reporter(limit: int | None, service: Service, answers: Sequence[Answer]) -> Report:
    """Return what makes LM Studio's fields beside OpenAI's body, for answers of at most `limit` tokens."""
    entry = await service.find(answers[0].model)
    config = await asyncio.to_thread(entry.config)
    described = {
        "arch": architecture(config),
        "quant": quantization_name(config),
        "format": "mlx",
        "context_length": context_length(config),
    }

    def report(done: Done) -> dict[str, Any]:
        stats = done.result.stats
        numbers = {
            "tokens_per_second": stats.tokens_per_second,
            "time_to_first_token": seconds_to_text(stats),
            "generation_time": stats.denoising_seconds,
            "stop_reason": stop_reason(done, service.settings.max_tokens if limit is None else limit),
        }
        return {"stats": numbers, "model_info": described, "runtime": RUNTIME}

    return report


def stop_reason(done: Done, max_tokens: int) -> str:
    """Return LM Studio's word for why an answer ended."""
    if done.finish_reason == "length":
        return "contextLengthReached" if has_filled_context(done, max_tokens) else "maxPredictedTokensReached"
    if done.finish_reason == "stop" and done.stop_sequence is not None:
        return "stopStringFound"
    return {"stop": "eosFound", "tool_calls": "toolCalls", "cancelled": "userStopped"}[done.finish_reason]


# -- the models of v1 -------------------------------------------------------------------------------------------------


@router.get("/api/v1/models")
async def models_v1(request: Request) -> Response:
    """List the models."""
    service = service_of(request)
    thinks, parallel = service.settings.enable_thinking, service.settings.engine.max_batch
    models = [
        await asyncio.to_thread(
            model_v1, entry, is_loaded=service.is_loaded(entry), parallel=parallel, thinks_by_default=thinks
        )
        for entry in service.models()
    ]
    return json_reply({"models": models})


@router.post("/api/v1/models/load")
async def load(request: Request, body: LoadBody) -> Response:
    """Load a model, in the place of the one before."""
    service = service_of(request)
    context = context_length(await asyncio.to_thread((await service.find(body.model)).config))
    check_context_length(body.context_length, context)
    entry, seconds = await service.load(body.model)
    reply = {"type": "llm", "instance_id": entry.id, "load_time_seconds": seconds, "status": "loaded"}
    return json_reply(reply | ({"load_config": {"context_length": context}} if body.echo_load_config else {}))


@router.post("/api/v1/models/unload")
async def unload(request: Request, body: UnloadBody) -> Response:
    """Let the requests under way end and free the model."""
    entry = await service_of(request).unload(body.instance_id)
    return json_reply({"instance_id": entry.id})
