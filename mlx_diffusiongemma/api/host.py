"""uvicorn, held the way this server needs it: own sockets, heads of requests in time, an end that tells the clients."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # in which the head of a request must have arrived
HEAD_BYTES = 32 * 1024
KEEP_ALIVE_SECONDS = 30
MAX_CONNECTIONS = 512
GRACE_SECONDS = 4  # for running requests to tell their clients that the server ends


class Protocol(H11Protocol):
    """A connection that is closed when the head of a request does not arrive in time."""

    head_seconds = HEAD_SECONDS
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take data; wait no longer than before for the rest of a head."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._timer is None:
            self._wait_for_head()

    def _wait_for_head(self) -> None:
        self._timer = self.loop.call_later(self.head_seconds, self._give_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()


class Server(uvicorn.Server):
    """A uvicorn server that says when it ends, and returns when a signal has ended it."""

    def __init__(
        self, app: ASGIApp, on_end: Callable[[], None], drain: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Bind the application.

        Args:
            app: what is served.
            on_end: called as soon as the end has begun.
            drain: awaited before that, after a signal; a second signal does not wait for it. None for nothing.
        """
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=HEAD_BYTES,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=GRACE_SECONDS,
                limit_concurrency=MAX_CONNECTIONS,
            )
        )
        self._on_end = on_end
        self._drain = drain
        self._draining: asyncio.Task[None] | None = None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell the clients, then close the connections."""
        self._on_end()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End in order on SIGTERM and SIGINT. uvicorn would raise them again afterwards, and exit with their codes."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._drain is not None and self._draining is None:
            self._draining = asyncio.ensure_future(self._end_after(self._drain))
            return
        self.force_exit = self.should_exit  # the second one does not wait for clients
        self.should_exit = True

    async def _end_after(self, drain: Callable[[], Awaitable[None]]) -> None:
        await drain()
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raise `OSError` with a line that says where."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}") from None


def listen_on_path(path: Path) -> socket.socket:
    """Return a listening unix socket for this user alone. Raise `OSError` when a server has it already."""
    _remove_dead_socket(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {path}: {error.strerror or error}") from None
    finally:
        os.umask(mask)
    return listener


def _remove_dead_socket(path: Path) -> None:
    """Remove the socket of a server that ended without doing so."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(f"cannot listen on {path}: it exists and is no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
                return
        raise OSError(f"cannot listen on {path}: another server listens there")


def url_of(listener: socket.socket) -> str:
    """Return where a socket can be reached."""
    address: Any = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{address}"
    host, port = address[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


async def watch_parent(pid: int, on_gone: Callable[[], None], seconds: float = 1.0) -> None:
    """Wait until a process has gone, our parent or another, and say so."""
    is_parent = os.getppid() == pid
    while (os.getppid() == pid) if is_parent else _exists(pid):
        await asyncio.sleep(seconds)
    on_gone()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
