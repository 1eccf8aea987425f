"""What a caller holds of a submitted request: its events, its result, and a way to cancel it.

Threads iterate it, asyncio iterates it with `async for`; one reader at a time. The model thread never waits for a
reader: from `MAX_UNREAD` unread events on, a draft or progress event replaces the one directly before it.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from .events import DenoisingStep, Event, Finished, PrefillProgress, Result

MAX_UNREAD = 256  # events


class EngineError(RuntimeError):
    """A request that the engine could not serve."""


class Handle:
    """One submitted request. Leaving it as a context manager cancels it."""

    def __init__(self, on_cancel: Callable[[Handle], None] | None = None) -> None:
        """Begin without events; `on_cancel` is told of every `cancel`."""
        self._on_cancel = on_cancel
        self._condition = threading.Condition()
        self._unread: deque[Event] = deque()
        self._wakers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._cancelled = threading.Event()

    # -- the caller's side ------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """End the request within a denoising step or a chunk of its prompt. Its last event is still `Finished`."""
        self._cancelled.set()
        if self._on_cancel is not None:
            self._on_cancel(self)

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    @property
    def is_done(self) -> bool:
        """Whether the request has ended, well or not. Events may still be unread."""
        return self._result is not None or self._error is not None

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the end and return the result.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            TimeoutError: it did not end in time. It goes on.
            Exception: what the request failed with.
            EngineError: the model thread ended, and another one goes on.
            EngineClosedError: an `EngineError`: the engine was closed first.
        """
        with self._condition:
            if not self._condition.wait_for(lambda: self.is_done, timeout):
                raise TimeoutError(f"the request did not end within {timeout} s")
            if self._error is not None:
                raise self._error
            assert self._result is not None
            return self._result

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[Event]:
        """Yield the events, `Finished` last; raise the error of a request that failed."""
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._unread or self.is_done)
                event = self._take()
            if event is None:
                return
            yield event

    def __aiter__(self) -> AsyncIterator[Event]:
        """Yield the events as `__iter__` does, without holding up the event loop."""
        return _Events(self)

    async def next(self) -> Event | None:
        """Wait for the next event and return it; None behind the last. Raise the error of a request that failed.

        Waiting may be given up (`asyncio.wait_for`, a cancelled task): no event is lost.
        """
        loop = asyncio.get_running_loop()
        while True:
            with self._condition:
                if self._unread or self.is_done:
                    return self._take()
                woken: asyncio.Future[None] = loop.create_future()
                self._wakers.append((loop, woken))
            try:
                await woken
            finally:  # a wait that was given up leaves nothing behind
                with self._condition:
                    self._wakers = [waker for waker in self._wakers if waker[1] is not woken]

    def _take(self) -> Event | None:
        """Return the next event; None behind the last one. Raise the error of a request that failed."""
        if self._unread:
            return self._unread.popleft()
        if self._error is not None:
            raise self._error
        return None

    # -- the model thread's side -------------------------------------------------------------------------------------

    def put(self, event: Event) -> None:
        """Hand an event to the reader."""
        with self._condition:
            replaceable = isinstance(event, DenoisingStep | PrefillProgress)
            if replaceable and len(self._unread) >= MAX_UNREAD and type(self._unread[-1]) is type(event):
                self._unread.pop()
            self._unread.append(event)
            if isinstance(event, Finished):
                self._result = event.result
            self._wake()

    def fail(self, error: BaseException) -> None:
        """End with an error, unless it has ended."""
        with self._condition:
            if not self.is_done:
                self._error = error
                self._wake()

    def _wake(self) -> None:
        self._condition.notify_all()
        wakers, self._wakers = self._wakers, []
        for loop, woken in wakers:
            try:
                loop.call_soon_threadsafe(_set, woken)
            except RuntimeError:  # its loop was closed: nobody reads any more
                continue


class _Events(AsyncIterator[Event]):
    """The events of a handle for `async for`. Not a generator, which would be over once a wait is given up."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    async def __anext__(self) -> Event:
        event = await self._handle.next()
        if event is None:
            raise StopAsyncIteration
        return event


def _set(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
