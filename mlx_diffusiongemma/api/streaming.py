"""Server-sent events, and what happens when the client goes away.

A stream that fails after it has begun ends with an event that carries the error. A comment keeps the connection alive
while nothing else is sent.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError, from_exception
from .service import Answer, Ask, Done, Piece, Service

logger = logging.getLogger("mlx_diffusiongemma.server")

KEEP_ALIVE_SECONDS = 15.0
COMMENT = b": keep-alive\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
T = TypeVar("T")


def dump(value: Any) -> str:
    """Return compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def event(data: Any, name: str | None = None) -> bytes:
    """Return one server-sent event. Text goes out as it is, everything else as JSON."""
    text = data if isinstance(data, str) else dump(data)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


def named_event(data: Mapping[str, Any]) -> bytes:
    """Return one server-sent event that is named by its `type`."""
    return event(data, data["type"])


def error_event(error: ApiError) -> bytes:
    """Return the last event of a stream that fails, in OpenAI's form."""
    return event(error.openai())


class EventStream(Response):
    """A response of server-sent events whose source is stopped within a denoising step when the client goes away."""

    media_type = "text/event-stream"

    def __init__(
        self,
        source: AsyncIterator[bytes],
        answers: Sequence[Answer],
        on_error: Callable[[ApiError], bytes],
        send_seconds: float,
    ) -> None:
        """Bind the source.

        Args:
            source: events, as `event` makes them.
            answers: what is cancelled when the client goes away.
            on_error: gives the last event of a stream that fails.
            send_seconds: for which a client may take no data.
        """
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]  # nobody knows it yet
        self._source = source
        self._answers = answers
        self._on_error = on_error
        self._send_seconds = send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(until_disconnect(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for answer in self._answers:
                answer.cancel()
            leaving.cancel()
            if not sending.done():
                sending.cancel()
            with suppress(asyncio.CancelledError, OSError, TimeoutError):
                await sending

    async def _send(self, send: Send) -> None:
        async def put(data: bytes, more: bool = True) -> None:
            async with asyncio.timeout(self._send_seconds):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        source = with_keep_alive(self._source)
        while True:
            try:
                data = await anext(source)
            except StopAsyncIteration:
                break
            except Exception as error:
                if not isinstance(error, ApiError):
                    logger.exception("a stream failed")
                await put(self._on_error(from_exception(error)))
                break
            await put(data)
        await put(b"", more=False)


async def with_keep_alive(source: AsyncIterator[bytes], seconds: float = KEEP_ALIVE_SECONDS) -> AsyncIterator[bytes]:
    """Yield what the source gives, and a comment whenever it gives nothing for so long."""
    coming: asyncio.Future[bytes] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(source))
            done, _ = await asyncio.wait({coming}, timeout=seconds)
            if not done:
                yield COMMENT
                continue
            finished, coming = coming, None
            try:
                yield finished.result()
            except StopAsyncIteration:
                return
    finally:
        if coming is not None:
            coming.cancel()


async def until_disconnect(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do some work; stop it when the client goes away. Raise `ApiError` then, which nobody reads."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(until_disconnect(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client has gone", code="client_gone")
        return working.result()
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()


async def collect(request: Request, answers: Sequence[Answer]) -> list[Done]:
    """Wait for the ends of all answers. They are cancelled when the client goes away or one of them fails."""

    async def last(answer: Answer) -> Done:
        async for piece in answer:
            if isinstance(piece, Done):
                return piece
        raise ApiError(500, "the answer has no end", code="internal_error")

    async def all_of_them() -> list[Done]:
        return list(await asyncio.gather(*(last(answer) for answer in answers)))

    try:
        return await unless_gone(request, all_of_them())
    finally:
        for answer in answers:
            answer.cancel()


async def open_and_collect(request: Request, service: Service, asks: Sequence[Ask]) -> list[Done]:
    """Let the service answer several requests of one client, and wait for their ends as `collect` does."""
    answers: list[Answer] = []
    try:
        for ask in asks:
            answers += await service.open(ask)
        return await collect(request, answers)
    finally:
        for answer in answers:
            answer.cancel()


async def drain(request: Request, answer: Answer, take: Callable[[Piece], Iterable[Any]]) -> None:
    """Hand every piece of an answer to `take` and drop the events it makes. The client's leaving ends the answer."""

    async def read() -> None:
        async for piece in answer:
            for _ in take(piece):
                pass

    try:
        await unless_gone(request, read())
    finally:
        answer.cancel()


async def merge(answers: Sequence[Answer]) -> AsyncIterator[tuple[Answer, Piece]]:
    """Yield the pieces of several answers as they come."""
    if len(answers) == 1:
        async for piece in answers[0]:
            yield answers[0], piece
        return
    queue: asyncio.Queue[tuple[Answer, Piece] | BaseException | None] = asyncio.Queue(maxsize=64)

    async def read(answer: Answer) -> None:
        try:
            async for piece in answer:
                await queue.put((answer, piece))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    readers = [asyncio.ensure_future(read(answer)) for answer in answers]
    try:
        open_answers = len(answers)
        while open_answers:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise from_exception(item)
            if item is None:
                open_answers -= 1
            else:
                yield item
    finally:
        for reader in readers:
            reader.cancel()
