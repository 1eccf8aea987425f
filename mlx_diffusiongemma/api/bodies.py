"""JSON bodies, read so that a large one does not hold up the event loop.

A parser keeps Python's lock from its first byte to its last: however many threads there are, nothing else runs. So what
a body may cost is bounded before it is parsed, pydantic's parser does it (many times faster than `json` for long text),
and what is checked value by value is checked in a thread.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request as StarletteRequest
from starlette.responses import Response

from .errors import ApiError

MAX_DEPTH = 64  # of a body's objects and lists
MAX_VALUES = 100_000  # keys, texts, numbers, objects, lists
MAX_SEPARATORS = 500_000  # commas and opening brackets, those inside of texts among them
SEPARATORS = (b",", b"[", b"{")
PIECE = 2**20  # bytes that are looked through before other threads have their turn
SMALL = 2**16  # bytes that are parsed on the spot: sooner done than handed to a thread


class JsonRoute(APIRoute):
    """A route that parses the bodies of its requests itself."""

    def get_route_handler(self) -> Callable[[StarletteRequest], Coroutine[Any, Any, Response]]:
        """Return what answers a request. Its body is parsed by then, where it has one and says that it is JSON."""
        handle = super().get_route_handler()

        async def parse_and_handle(request: StarletteRequest) -> Response:
            parsed = _Parsed(request.scope, request.receive)
            body = await parsed.body()
            if body and "json" in request.headers.get("content-type", ""):
                parsed.value = parse(body) if len(body) <= SMALL else await asyncio.to_thread(parse, body)
            return await handle(parsed)

        return parse_and_handle


class _Parsed(Request):
    """A request whose body has been parsed."""

    value: Any = None

    async def json(self) -> Any:
        return self.value


def parse(body: bytes) -> Any:
    """Return what a JSON body says. Raise `ApiError` for one that is no JSON, or has too many or too deep values."""
    _check_separators(body)
    try:
        data = from_json(body.removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    _check_values(data)
    return data


def _check_separators(body: bytes) -> None:
    found = 0
    for start in range(0, len(body), PIECE):
        found += sum(body.count(each, start, start + PIECE) for each in SEPARATORS)
    if found > MAX_SEPARATORS:
        got = f"{found:,} commas and opening brackets"
        raise ApiError(400, f"the body has {got}, expected at most {MAX_SEPARATORS:,}", code="too_many_values")


def _check_values(data: Any) -> None:
    level, depth, count = [data], 0, 0
    while level:
        count += len(level)
        if depth > MAX_DEPTH:
            raise ApiError(400, f"the body is nested more than {MAX_DEPTH} levels deep", code="too_deep")
        if count > MAX_VALUES:
            raise ApiError(400, f"the body has more than {MAX_VALUES:,} values", code="too_many_values")
        below: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                below += value
        level, depth = below, depth + 1
