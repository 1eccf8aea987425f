"""A program on an emulated terminal, watched chunk by chunk. The emulator is pyte."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyte

import mlx_diffusiongemma

PACKAGE_PARENT = str(Path(mlx_diffusiongemma.__file__).parents[1])
SCROLLBACK = 1000


def run_in_process(main: Callable[..., int], capsys, *argv: str) -> tuple[int, str, str]:
    """Run a command line in this process; return exit code, stdout and stderr."""
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def environment(**more: str) -> dict[str, str]:
    """Return the environment for a program under test: no colour settings, and the package that is being tested."""
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES", "TERM")}
    return {**kept, "PYTHONPATH": PACKAGE_PARENT, **more}


class Emulator:
    """A terminal's screen with its scrollback."""

    def __init__(self, columns: int, lines: int) -> None:
        self.screen = pyte.HistoryScreen(columns, lines, history=SCROLLBACK, ratio=0.5)
        self._stream = pyte.ByteStream(self.screen)

    def feed(self, data: bytes) -> None:
        """Show bytes that a program wrote."""
        self._stream.feed(data)

    def lines(self) -> list[str]:
        """Return every line, from the top of the scrollback to the last line with anything on it."""
        scrollback = [_line_text(line, self.screen.columns) for line in self.screen.history.top]
        lines = [line.rstrip() for line in scrollback + self.screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def colors(self, text: str) -> set[str]:
        """Return the colours of the cells of the first place on the screen that shows a text."""
        for number, line in enumerate(self.screen.display):
            if (start := line.find(text)) >= 0:
                return {self.screen.buffer[number][column].fg for column in range(start, start + len(text))}
        return set()


def _line_text(line: Mapping[int, pyte.screens.Char], columns: int) -> str:
    return "".join(line[column].data for column in range(columns))


def shown(text: str, columns: int, lines: int) -> list[str]:
    """Return the lines a terminal shows for plain text that is simply printed."""
    emulator = Emulator(columns, lines)
    emulator.feed(text.replace("\n", "\r\n").encode())
    return emulator.lines()


class Session:
    """A Python program whose stdin, stdout and stderr are an emulated terminal."""

    def __init__(
        self, arguments: Sequence[str], columns: int = 80, lines: int = 24, env: Mapping[str, str] | None = None
    ) -> None:
        self.emulator = Emulator(columns, lines)
        self.written = b""
        self._main, side = pty.openpty()
        self._set_size(columns, lines)
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=side,
            stdout=side,
            stderr=side,
            env=environment(**{"TERM": "xterm-256color", **(env or {})}),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(side)

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._main, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns: int, lines: int) -> None:
        """Change the window's size, as seen by the program and by the emulator."""
        self._set_size(columns, lines)
        self.emulator.screen.resize(lines, columns)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._main, text.encode())

    def watch(self, until: Callable[[Emulator], bool], timeout: float = 120) -> None:
        """Read what the program writes until the screen satisfies a condition; fail when it never does."""
        deadline = time.monotonic() + timeout
        while not until(self.emulator):
            if not self._read(deadline - time.monotonic()):
                raise AssertionError("never shown; the terminal has:\n" + "\n".join(self.emulator.lines()))

    def finish(self, each: Callable[[Emulator], None] = lambda emulator: None, timeout: float = 120) -> int:
        """Read to the end, calling `each` after every chunk; return the exit code."""
        deadline = time.monotonic() + timeout
        while self._read(deadline - time.monotonic()):
            each(self.emulator)
        return self.process.wait(timeout=60)

    def close(self) -> None:
        """End the program if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._main)

    def _read(self, timeout: float) -> bool:
        """Feed one chunk to the emulator; False at the end of the program or of the time."""
        if not select.select([self._main], [], [], max(0.0, timeout))[0]:
            return False
        try:
            data = os.read(self._main, 65536)
        except OSError:  # Linux says EIO when the program has closed its side
            return False
        self.written += data
        self.emulator.feed(data)
        return bool(data)
