"""Infilling and editing for an endpoint: a plan whose requests the service answers."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any, TypeVar, cast

from fastapi import Request

from ..events import Result
from ..infill import ROWS
from ..prepare import Asked
from .errors import from_exception
from .service import Ask, Service
from .streaming import open_and_collect

T = TypeVar("T")
OF_THE_ASK = ("raw_prompt", "literal", "tools")  # what `Ask` has a field for, or the service says itself


async def run_plan(
    request: Request, service: Service, model: str | None, plan: Generator[list[Asked], list[Result], T]
) -> T:
    """Run a plan; its requests end when the client goes away. Raise `ApiError`."""
    results: list[Result] | None = None
    while True:
        asked, value = await asyncio.to_thread(_advance, plan, results)
        if asked is None:
            return value
        results = []
        for start in range(0, len(asked), ROWS):
            asks = [_as_ask(model, each) for each in asked[start : start + ROWS]]
            results += [done.result for done in await open_and_collect(request, service, asks)]


def _advance(
    plan: Generator[list[Asked], list[Result], T], results: list[Result] | None
) -> tuple[list[Asked] | None, T]:
    """Send results to a plan; return what it asks, or None and what it returns. Raise `ApiError`."""
    try:
        return (next(plan) if results is None else plan.send(results)), cast(T, None)
    except StopIteration as end:
        return None, cast(T, end.value)
    except Exception as error:
        raise from_exception(error) from None


def _as_ask(model: str | None, asked: Asked) -> Ask:
    messages, options = asked
    rest: dict[str, Any] = {name: value for name, value in options.items() if name not in OF_THE_ASK}
    return Ask(
        messages=messages,
        model=model,
        tools=options.get("tools"),
        enable_thinking=False,  # what is asked for is text of the answer
        options=rest,
        raw="raw_prompt" in options,
    )
