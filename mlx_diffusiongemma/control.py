"""The line between rank 0 and the ranks that follow it: commands, their outcomes, and whether everybody is alive.

What ranks compute together goes through MLX's own collectives; that cannot tell who has died or stalled, nor wait for
hours without using the processor. So each follower also has a connection to rank 0 (`multiprocessing.connection`, which
authenticates both ends with a key that rank 0 draws and sends around through MLX).

    rank 0                                             follower
    command number, name, arguments     ──────▶        run in the thread that owns MLX
    what became of each                 ◀──────        value, or the error
    a beat every second                 ◀─────▶        a beat every second

Silence for `SILENT_SECONDS`, or a closed connection, is the end: rank 0 reports who it was, a follower just ends.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .ranks import Ranks

BEAT_SECONDS = 1.0
SILENT_SECONDS = 6.0  # a thread may hold Python's lock for a while; a fault is reported within 10
ANSWER_SECONDS = 3.0  # for the outcome of a command that another rank has ended with an error
JOIN_SECONDS = 30.0  # for the connections of all followers
ADDRESS_BYTES = 512  # for rank 0's address and key, pickled: some 310 with the longest name of a host
KEPT = 4096  # outcomes of commands, by far more than one rank can be ahead of another


class RankError(RuntimeError):
    """A rank that has ended, stalled, failed alone or does not fit the others; the message is one line and names it."""


@dataclass
class _Follower:
    """What rank 0 knows of another one."""

    rank: int
    connection: Connection
    name: str  # host and process, for people
    heard: float  # on the clock of `time.monotonic`
    outcomes: dict[int, tuple[str | None, Any]] = field(default_factory=dict)  # error and value of recent commands
    lock: threading.Lock = field(default_factory=threading.Lock)  # of one message

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.name})"


class Leader:
    """Rank 0's end of all lines. Commands come from one thread; `on_fault` is called from another."""

    def __init__(self, ranks: Ranks, details: dict[str, str]) -> None:
        """Wait for all followers.

        Args:
            ranks: of which this process is the first.
            details: what must be the same on all ranks, such as versions.

        Raises:
            RankError: a follower does not come, or differs; the message has both values.
        """
        self.size = ranks.size  # not the ranks: threads that outlive the program would keep MPI from being closed
        self._changed = threading.Condition()
        self._fault: RankError | None = None
        self._on_fault: Callable[[RankError], None] = lambda error: None
        self._closing = threading.Event()
        self._count = 0
        self._mine: dict[int, bool | None] = {}  # whether a recent command failed here; None where that says nothing
        self.dropped: deque[int] = deque()  # numbers of objects that followers may let go of; any thread may add one
        self._followers = [_joined(connection, hello) for connection, hello in _accept(ranks)]
        for follower, own in ((f, f.outcomes.pop(0)[1]) for f in self._followers):
            for name, value in details.items():
                if own.get(name) != value:
                    self.close()
                    raise RankError(f"{follower} has {name} {own.get(name)}, expected {value} as rank 0 has")
        for follower in self._followers:
            threading.Thread(target=self._listen, args=(follower,), daemon=True).start()
        for target in (self._watch, self._beat):  # apart: who stalls may hold up a message
            threading.Thread(target=target, daemon=True).start()

    def on_fault(self, report: Callable[[RankError], None]) -> None:
        """Let `report` be called once, from a thread of its own, when a rank is lost; at once if that has happened."""
        with self._changed:
            self._on_fault, fault = report, self._fault
        if fault is not None:
            report(fault)

    @contextmanager
    def command(self, name: str, *arguments: Any) -> Iterator[None]:
        """Send a command that this rank runs too, in the body.

        Raises:
            RankError: a rank is lost, or another one did not end the command as this one did.
        """
        number = self.send(name, *arguments)
        try:
            yield
        except Exception:
            self._settle(number, failed=True)
            self._wait_for(number, ANSWER_SECONDS)  # unless all have failed, they are no longer together
            self.check()
            raise
        self._settle(number, failed=False)
        self.check()

    def send(self, name: str, *arguments: Any) -> int:
        """Send a command; return its number, for `outcomes`. Raise `RankError` when a rank is lost."""
        self.check()
        self._count += 1
        self._send((self._count, name, arguments, self._drained()))
        return self._count

    def outcomes(self, number: int) -> list[Any]:
        """Wait until all followers have run a command; return their values. Raise `RankError` for one that failed."""
        self._wait_for(number, None)
        self._settle(number, failed=False)
        self.check()
        return [follower.outcomes[number][1] for follower in self._followers]

    def _wait_for(self, number: int, seconds: float | None) -> None:
        """Wait until all followers have run a command, or a rank is lost; one that is late by `seconds` is."""
        deadline = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            while self._fault is None and (late := [f for f in self._followers if number not in f.outcomes]):
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    self._lose(RankError(f"{late[0]} did not end a command that failed on rank 0"))
                    return
                self._changed.wait(left)

    @property
    def fault(self) -> RankError | None:
        """How a rank was lost; None while all are there."""
        return self._fault

    def check(self) -> None:
        """Raise `RankError` when a rank is lost."""
        if self._fault is not None:
            raise RankError(str(self._fault))

    def close(self) -> None:
        """Tell the followers to end."""
        self._closing.set()
        for follower in self._followers:
            try:
                if follower.lock.acquire(timeout=BEAT_SECONDS):
                    follower.connection.send(None)
                    follower.connection.close()
            except (OSError, ValueError):
                continue

    def _drained(self) -> list[int]:
        numbers = []
        while self.dropped:
            numbers.append(self.dropped.popleft())
        return numbers

    def _send(self, message: Any) -> None:
        data = pickle.dumps(message)
        for follower in self._followers:
            try:
                with follower.lock:
                    follower.connection.send_bytes(data)
            except (OSError, ValueError):
                if not self._closing.is_set():
                    self._report(f"{follower} has ended")

    def _settle(self, number: int, *, failed: bool) -> None:
        """Note how a command ended here, and compare with those that have ended it already."""
        with self._changed:
            self._mine[number] = failed
            self._mine.pop(number - KEPT, None)
        self._compare(number)

    def forgive(self, number: int) -> None:
        """Let followers end a command as they may: it failed here, before ranks did anything together."""
        with self._changed:
            self._mine[number] = None

    def _compare(self, number: int) -> None:
        """Lose a follower that ended a command otherwise than this rank did."""
        with self._changed:
            failed = self._mine.get(number)
            for follower in self._followers if failed is not None else ():
                if number not in follower.outcomes:
                    continue
                error, _ = follower.outcomes[number]
                if error is not None and not failed:
                    self._lose(RankError(f"{follower}: {error}"))
                if error is None and failed:
                    self._lose(RankError(f"{follower} ended a command that failed on rank 0"))

    def _listen(self, follower: _Follower) -> None:
        try:
            while True:
                message = follower.connection.recv()
                follower.heard = time.monotonic()
                if message is None:
                    continue
                number, error, value = message
                with self._changed:
                    follower.outcomes[number] = error, value
                    follower.outcomes.pop(number - KEPT, None)
                    self._changed.notify_all()
                self._compare(number)
                if error is not None:
                    blaming = threading.Timer(ANSWER_SECONDS, self._blame, (follower, number, error))
                    blaming.daemon = True
                    blaming.start()
        except (OSError, EOFError, TypeError):  # TypeError: `close` in another thread has taken the connection away
            self._report(f"{follower} has ended")

    def _blame(self, follower: _Follower, number: int, error: str) -> None:
        """Report a rank that failed where this one still waits for it."""
        with self._changed:
            if number == self._count and number not in self._mine:
                self._lose(RankError(f"{follower}: {error}"))

    def _watch(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            now = time.monotonic()
            for follower in self._followers:
                if now - follower.heard > SILENT_SECONDS:
                    self._report(f"{follower} has not been heard of for {now - follower.heard:.0f} s")

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            self._send((0, "drop", (), self._drained()))

    def _report(self, message: str) -> None:
        with self._changed:
            if not self._closing.is_set():
                self._lose(RankError(message))

    def _lose(self, error: RankError) -> None:
        """Note the first fault, and report it. The lock is held."""
        if self._fault is None:
            self._fault = error
            self._changed.notify_all()
            threading.Thread(target=self._on_fault, args=(error,), daemon=True).start()


class Line:
    """A follower's end. When rank 0 has gone, or is silent, the process ends, whatever it is in the middle of."""

    def __init__(self, ranks: Ranks, details: dict[str, str]) -> None:
        """Connect to rank 0; `details` are those of `Leader`."""
        address, key = _receive_address(ranks)
        self._connection = Client(address, authkey=key)
        self._lock = threading.Lock()
        self._heard = time.monotonic()
        self._commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._send((ranks.rank, f"{socket.gethostname()}, process {os.getpid()}", details))
        for target in (self._listen, self._beat):
            threading.Thread(target=target, daemon=True).start()

    def commands(self) -> Iterator[tuple[int, str, tuple[Any, ...], list[int]]]:
        """Yield number, name, arguments, and the numbers of objects to let go of, until rank 0 says that it is over."""
        while (command := self._commands.get()) is not None:
            yield command

    def report(self, number: int, error: str | None, value: Any = None) -> None:
        """Tell rank 0 what became of a command."""
        self._send((number, error, value))

    def _send(self, message: Any) -> None:
        try:
            with self._lock:
                self._connection.send(message)
        except (OSError, ValueError):
            os._exit(1)

    def _listen(self) -> None:
        try:
            while True:
                message = self._connection.recv()
                self._heard = time.monotonic()
                self._commands.put(message)
                if message is None:
                    ending = threading.Timer(SILENT_SECONDS, os._exit, (0,))
                    ending.daemon = True
                    ending.start()  # the process may wait for ranks that have ended
                    return
        except (OSError, EOFError):
            os._exit(1)

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            self._send(None)
            if time.monotonic() - self._heard > SILENT_SECONDS:
                os._exit(1)


# -- finding each other -----------------------------------------------------------------------------------------------


def _own_host() -> str:
    """Return the address at which other ranks reach rank 0, as its launcher knows it."""
    if path := os.environ.get("MLX_HOSTFILE"):
        return str(json.loads(Path(path).read_text())[0][0]).rpartition(":")[0]
    for name in ("MLX_JACCL_COORDINATOR", "NCCL_HOST_IP"):
        if name in os.environ:
            return os.environ[name].partition(":")[0]
    return socket.gethostname()


def _accept(ranks: Ranks) -> Iterator[tuple[Connection, Any]]:
    """Listen, send the address around, and yield the connection of every follower with its first message."""
    key = secrets.token_bytes(32)
    joined: queue.Queue[tuple[Connection, Any]] = queue.Queue()

    def accept() -> None:
        while True:
            try:
                connection = listener.accept()
                joined.put((connection, connection.recv()))
            except (AuthenticationError, EOFError):  # somebody else
                continue
            except OSError:
                return

    with Listener((_own_host(), 0), backlog=ranks.size, authkey=key) as listener:
        _share_address(ranks, pickle.dumps((listener.address, key)))
        threading.Thread(target=accept, daemon=True).start()
        for count in range(1, ranks.size):
            try:
                yield joined.get(timeout=JOIN_SECONDS)
            except queue.Empty:
                raise RankError(f"{count} of {ranks.size} ranks have come within {JOIN_SECONDS:.0f} s") from None


def _joined(connection: Connection, hello: tuple[int, str, dict[str, str]]) -> _Follower:
    rank, name, details = hello
    return _Follower(rank, connection, name, time.monotonic(), {0: (None, details)})


def _share_address(ranks: Ranks, data: bytes) -> bytes:
    """Return what rank 0 gives, on every rank."""
    padded = np.zeros(ADDRESS_BYTES, np.int32)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    shared = ranks.all_sum(mx.array(padded))
    mx.eval(shared)
    return np.array(shared).astype(np.uint8).tobytes()


def _receive_address(ranks: Ranks) -> tuple[Any, bytes]:
    address, key = pickle.loads(_share_address(ranks, b""))
    return address, key
