"""Drawing an answer while it is generated: on a terminal, or as plain text where there is none.

`LiveScreen` redraws the current canvas in place. Its one rule keeps the scrollback whole: between two draws the cursor
rests at the start of the first line of what is drawn, the region.

    text that is finished, printed once, never touched again
    > line that is not finished yet          <- the cursor rests here, hidden
      the draft of the current canvas           the region: less than one window high, erased
      canvas 2, step 7 of 48                    and drawn again at every step

A terminal that wraps anew after a change of size takes the cursor along with its line, so nothing has to be guessed:
erasing from the cursor down removes the region and no more, whatever the window's new size.

What is drawn (which text, which style) is decided in `answer.py`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TextIO

from rich.cells import get_character_cell_size

if TYPE_CHECKING:
    from rich.progress import Progress

# Select Graphic Rendition codes by style.
STYLES = {"reasoning": "2", "tool": "36", "settled": "32", "unsettled": "2;33", "status": "2"}
RESET = "\x1b[0m"
ERASE_DOWN = "\x1b[J"
ERASE_RIGHT = "\x1b[K"
HIDE_CURSOR = "\x1b[?25l"
SHOW_CURSOR = "\x1b[?25h"

EMOJI_PRESENTATION = "\ufe0f"  # makes the character before it two cells wide on some terminals
UNSETTLED_MARK = "·"  # stands for an unsettled character where there is no colour
PREFILL_BAR_FROM = 1024  # prompt tokens; a shorter prompt gets no progress bar


@dataclass(frozen=True)
class Span:
    """A piece of text in one style; the empty style is the terminal's own."""

    style: str
    text: str


Row = list[Span]


def printable(text: str) -> str:
    """Return text that moves no cursor: control characters but newline become pictures of themselves."""
    return "".join(_picture(character) for character in text.replace("\r\n", "\n").replace("\t", "    "))


def _picture(character: str) -> str:
    code = ord(character)
    if character == "\n" or code >= 0xA0 or 0x20 <= code < 0x7F:
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd"


def cell_width(character: str) -> int:
    """Return how many cells a character takes, rather one too many than one too few.

    A row taken for wider than it is ends early; one taken for narrower would wrap and spoil the count of rows.
    """
    return 1 if character == EMOJI_PRESENTATION else get_character_cell_size(character)


def wrap(spans: Iterable[Span], width: int) -> list[Row]:
    """Break spans into rows of at most `width` cells, at newlines and where a row is full."""
    rows: list[Row] = [[]]
    used = 0
    for span in spans:
        start = 0
        for position, character in enumerate(span.text):
            cells = cell_width(character)
            if character != "\n" and used + cells <= width:
                used += cells
                continue
            rows[-1].append(Span(span.style, span.text[start:position]))
            rows.append([])
            start, used = (position + 1, 0) if character == "\n" else (position, cells)
        rows[-1].append(Span(span.style, span.text[start:]))
    return rows


def draft_spans(pieces: Sequence[str], accepted: Sequence[bool], *, color: bool) -> list[Span]:
    """Return the draft canvas as spans, one per token.

    Args:
        pieces: text of every token.
        accepted: whether it settled in this step.
        color: False shows unsettled characters as dots instead of in another colour.
    """
    spans = []
    for piece, settled in zip(pieces, accepted, strict=False):
        text = printable(piece)
        if not settled and not color:
            text = "".join(c if c.isspace() else UNSETTLED_MARK * cell_width(c) for c in text)
        spans.append(Span("settled" if settled else "unsettled", text))
    return spans


def paint(spans: Iterable[Span], *, color: bool) -> str:
    """Return spans as one string with colour codes."""
    if not color:
        return "".join(span.text for span in spans)
    painted, style = [], ""
    for span in spans:
        if not span.text:
            continue
        if span.style != style:
            painted.append(RESET if style else "")
            painted.append(f"\x1b[{STYLES[span.style]}m" if span.style else "")
            style = span.style
        painted.append(span.text)
    return "".join(painted) + (RESET if style else "")


def is_terminal(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that understands cursor movement."""
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


def wants_color(stream: TextIO) -> bool:
    """Return whether to colour what goes to a stream: a terminal, and NO_COLOR (no-color.org) not set."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def window_size(stream: TextIO) -> tuple[int, int]:
    """Return columns and lines of the terminal; 80 x 24 where it does not say."""
    try:
        size = os.get_terminal_size(stream.fileno())
    except OSError:
        return 80, 24
    return size.columns or 80, size.lines or 24


class Screen(Protocol):
    """Where an answer is shown."""

    color: bool

    def write(self, style: str, text: str) -> None:
        """Show text that is final."""

    def draft(self, spans: Sequence[Span], status: str) -> None:
        """Show text that may still change, in place of the last draft."""

    def suspend(self) -> None:
        """Give the terminal back until the next draw."""

    def finish(self, *, keep_draft: bool = False) -> None:
        """End the last line and leave the terminal as it was found."""


class PlainScreen:
    """Shows final text only: one canvas at a time, no cursor movement, and no colour unless on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.color = wants_color(stream)
        self._stream = stream
        self._terminal = stream.isatty()
        self._line_open = False

    def write(self, style: str, text: str) -> None:
        """Print text as it is; on a terminal without its control characters."""
        if text:
            shown = printable(text) if self._terminal else text
            self._stream.write(paint([Span(style, shown)], color=self.color))
            self._stream.flush()
            self._line_open = not text.endswith("\n")

    def draft(self, spans: Sequence[Span], status: str) -> None:
        """Show nothing."""

    def suspend(self) -> None:
        """Nothing to give back."""

    def finish(self, *, keep_draft: bool = False) -> None:
        """End the last line."""
        if self._line_open:
            self._stream.write("\n")
        self._stream.flush()
        self._line_open = False


class LiveScreen:
    """Redraws the draft canvas below the finished text; see the module's docstring."""

    def __init__(self, stream: TextIO) -> None:
        self.color = wants_color(stream)
        self._stream = stream
        self._open_line: list[Span] = []  # final text after the last newline: drawn with the draft
        self._draft: list[Span] = []
        self._status = ""
        self._drawn = False

    def write(self, style: str, text: str) -> None:
        """Replace the draft by final text."""
        *lines, rest = printable(text).split("\n")
        finished = []
        for line in lines:
            finished += [*self._open_line, Span(style, line), Span("", "\n")]
            self._open_line = []
        self._open_line.append(Span(style, rest))
        self._draft, self._status = [], ""
        self._stream.write(self._erased() + paint(finished, color=self.color))
        self._draw()

    def draft(self, spans: Sequence[Span], status: str) -> None:
        """Draw the draft after the finished text, and the status below."""
        self._draft, self._status = list(spans), status
        self._draw()

    def suspend(self) -> None:
        """Erase the region and show the cursor; the next draw puts the region where the cursor is then."""
        self._stream.write(self._erased())
        self._stream.flush()

    def finish(self, *, keep_draft: bool = False) -> None:
        """Erase the region, print the open line (with `keep_draft` the whole draft too), show the cursor."""
        spans = list(self._open_line)
        if keep_draft and self._draft:
            spans += [*self._draft, Span("", "\n"), Span("status", f"stopped in {self._status}")]
        end = "\n" if any(span.text for span in spans) else ""
        self._stream.write(self._erased() + paint(spans, color=self.color) + end)
        self._stream.flush()
        self._open_line, self._draft = [], []

    def _erased(self) -> str:
        """Return the codes that remove the region and show the cursor."""
        codes = f"\r{ERASE_DOWN}{SHOW_CURSOR}" if self._drawn else ""
        self._drawn = False
        return codes

    def _draw(self) -> None:
        """Draw the region in one write, and bring the cursor back to its start."""
        columns, lines = window_size(self._stream)
        rows = self._visible_rows(columns - 1, max(1, lines - 1))
        body = f"{ERASE_RIGHT}\r\n".join(paint(row, color=self.color) for row in rows)
        up = f"\x1b[{len(rows) - 1}A" if len(rows) > 1 else ""
        self._stream.write(f"{HIDE_CURSOR}\r{body}{ERASE_DOWN}\r{up}")
        self._stream.flush()
        self._drawn = True

    def _visible_rows(self, width: int, height: int) -> list[Row]:
        """Return the rows of the region, cut to the window: the open line loses its beginning, the draft its end."""
        rows = wrap([*self._open_line, *self._draft], max(1, width))
        draft_start = len(wrap(self._open_line, max(1, width))) - 1
        with_status = bool(self._status) and height > 2
        room = height - with_status
        skipped = min(draft_start, max(0, len(rows) - room))
        shown = rows[skipped : skipped + room]
        hidden = len(rows) - skipped - len(shown)
        if with_status:
            more = f" · {hidden} more rows" if hidden else ""
            shown.append(wrap([Span("status", self._status + more)], max(1, width))[0])
        return shown


def open_screen(stream: TextIO | None, *, live: bool) -> Screen:
    """Return the screen for a stream; None shows nothing. `live` asks for drafts, which only a terminal can show."""
    if stream is None:
        return PlainScreen(io.StringIO())
    return LiveScreen(stream) if live and is_terminal(stream) else PlainScreen(stream)


class PrefillBar:
    """A progress bar on stderr for the prefill of a long prompt; nothing where stderr is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._progress: Progress | None = None

    def show(self, processed: int, total: int) -> None:
        """Draw the bar, and remove it when everything is processed."""
        if processed >= total:
            self.close()
        elif total >= PREFILL_BAR_FROM and is_terminal(self._stream):
            if self._progress is None:
                self._progress = self._start(total)
            self._progress.update(self._progress.task_ids[0], completed=processed, refresh=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = None

    def _start(self, total: int) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        progress = Progress(
            TextColumn("Prefill"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            console=Console(file=self._stream),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        progress.add_task("prefill", total=total)
        progress.start()
        return progress
