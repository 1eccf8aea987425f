"""Typed decisions over HTTP: /v1/systemone, and /v1/decisions in System One's and in OpenAI's form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..decisions import Decision, DecisionOptions, Plan, make_plan, waves
from ..events import Result
from ..questions import is_conversation
from .bodies import JsonRoute
from .decision_answers import (
    ListedReply,
    StateReply,
    decision_timings,
    listed_answer,
    listed_usage,
    state_answer,
    state_usage,
)
from .decision_bodies import DecisionBody, SystemOneBody, typed
from .errors import from_exception, refuse
from .media import resolve_media
from .replies import json_reply, service_of
from .responses_input import messages_of
from .service import Ask, Service
from .streaming import open_and_collect

router = APIRouter(route_class=JsonRoute)
OPTION_NAMES = tuple(field.name for field in fields(DecisionOptions))


@router.post("/v1/systemone", responses={200: {"model": StateReply}})
async def systemone(request: Request, body: SystemOneBody) -> Response:
    """Answer named questions about a state, each with probabilities."""
    model, decisions = await _decide(request, body, body.state, _named(body.questions))
    return json_reply(_state_reply(model, body.questions, decisions))


@router.post("/v1/decisions", responses={200: {"model": StateReply | ListedReply}})
async def decisions(request: Request, body: DecisionBody) -> Response:
    """Answer questions about a state or an input, each with probabilities."""
    questions = body.questions
    if isinstance(questions, dict):
        if body.state is None:
            raise refuse("state", "got nothing, expected a state beside named questions", "invalid_value")
        model, decided = await _decide(request, body, body.state, _named(questions))
        return json_reply(_state_reply(model, questions, decided))
    if body.input is None:
        raise refuse("input", "got nothing, expected an input beside a list of questions", "invalid_value")
    state = body.input if isinstance(body.input, str) else messages_of(body.input) or None
    asked = {f"questions[{index}]": question for index, question in enumerate(questions)}
    model, decided = await _decide(request, body, state, asked)
    answers = [listed_answer(decision, question) for decision, question in zip(decided, questions, strict=True)]
    reply = ListedReply(model=model, answers=answers, usage=listed_usage(decided), timings=decision_timings(decided))
    return json_reply(reply.model_dump())


def _named(questions: dict[str, Any]) -> dict[str, Any]:
    return {f"questions.{name}": question for name, question in questions.items()}


def _state_reply(model: str, questions: dict[str, Any], decided: Sequence[Decision]) -> dict[str, Any]:
    answers = {
        name: state_answer(decision, question)
        for (name, question), decision in zip(questions.items(), decided, strict=True)
    }
    reply = StateReply(model=model, answers=answers, usage=state_usage(decided), timings=decision_timings(decided))
    return reply.model_dump()


async def _decide(
    request: Request, body: SystemOneBody | DecisionBody, state: Any, asked: dict[str, Any]
) -> tuple[str, list[Decision]]:
    """Return the model's name and the decisions on questions by their place in the body. Raise `ApiError`."""
    service = service_of(request)
    questions = [typed(where, question) for where, question in asked.items()]
    state = await _shown(state, body.images or (), service)
    entry, preparer = await service.preparer_of(body.model)
    try:
        options = DecisionOptions(**{name: getattr(body, name) for name in OPTION_NAMES})
        plans = [make_plan(preparer.tokenizer, question, state, options) for question in questions]
    except ValueError as error:
        raise from_exception(error) from None
    return entry.id, await _read(request, service, body.model, plans)


async def _shown(state: Any, images: Sequence[str], service: Service) -> Any:
    """Return a state whose images are data, those beside it in front of its text."""
    if images:
        if not isinstance(state, str):
            raise refuse("images", "go with a state that is text; a conversation holds its own, expected none")
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
        state = [{"role": "user", "content": [*parts, {"type": "text", "text": state}]}]
    return await resolve_media(state, service.settings) if is_conversation(state) else state


async def _read(request: Request, service: Service, model: str | None, plans: Sequence[Plan]) -> list[Decision]:
    """Run the rows of all plans, a few batches at a time: the queue is for everybody."""
    rows = [row for plan in plans for row in plan.asks]
    shared = service.settings.engine
    results: dict[int, Result] = {}
    for wave in waves(rows, shared.max_queue, shared.max_batch):
        asks = [
            Ask(rows[place].messages, model=model, enable_thinking=False, options=rows[place].options) for place in wave
        ]
        read = await open_and_collect(request, service, asks)
        results.update(zip(wave, [done.result for done in read], strict=True))
    in_order = (results[place] for place in range(len(rows)))
    return [plan.decision([next(in_order) for _ in plan.asks]) for plan in plans]
