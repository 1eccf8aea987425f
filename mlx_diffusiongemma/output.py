"""Generated ids -> text, reasoning and tool calls, one canvas at a time.

Everything is recognised by token id: all of Gemma 4's control tokens are "special", so text detokenized without special
tokens has lost the thoughts and the calls. Ids are taken one by one and the state lives between canvases, so a block
may straddle them anywhere, and how the ids are cut into canvases does not change the result.

    <|channel>thought\\n ... <channel|>         reasoning; an empty block gives nothing
    <|tool_call>call:name{...}<tool_call|>     a ToolCall (`tool_calls.py`), or text if it cannot be read
    <|turn>model\n                             nothing: a turn header in the middle of an answer
    any other control token                    nothing
    the rest                                   text, up to the first stop string

Cutting at end tokens and at `max_tokens` is the caller's work (`request.py`).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .tokenizer import Tokenizer
from .tool_calls import QUOTE, parse_tool_calls

THOUGHT = "thought\n"  # first line of a thought, the channel's name
ROLE = "model\n"  # what follows a turn marker
MARKERS = {
    "pad": "·",
    "eos": "∎",
    "turn_close": "∎",
    "channel_open": "⟨",
    "channel_close": "⟩",
    "tool_call_open": "⟦",
    "tool_call_close": "⟧",
    "quote": '"',
}


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called. `arguments` is the parsed object, `id` is unique."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class OutputDelta:
    """What became certain since the last delta.

    `stopped` is the stop string met; it is not part of `text`. `text_tokens` are the places, among all ids of the
    answer, of those that `text` was written with.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    stopped: str | None = None
    text_tokens: tuple[int, ...] = field(default=(), compare=False)

    def __add__(self, other: OutputDelta) -> OutputDelta:
        """Return both as one, `other` behind."""
        return OutputDelta(
            text=self.text + other.text,
            reasoning=self.reasoning + other.reasoning,
            tool_calls=self.tool_calls + other.tool_calls,
            stopped=self.stopped or other.stopped,
            text_tokens=self.text_tokens + other.text_tokens,
        )


class OutputParser:
    """Reads the ids of one answer, canvas by canvas.

    `stop` strings end the visible text (not the reasoning); text that may be the beginning of one is held back.
    `thinking_open` says that the prompt has opened a thought already. `new_call_id` names the tool calls; random by
    default, because clients want ids that are unique across a conversation.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        thinking_open: bool = False,
        new_call_id: Callable[[], str] = lambda: f"call_{uuid.uuid4().hex[:24]}",
    ):
        self._tokenizer = tokenizer
        self._special = tokenizer.special
        self._new_call_id = new_call_id
        self._detokenizer = tokenizer.detokenizer()
        self._text = _Text((stop,) if isinstance(stop, str) else tuple(stop))
        self._thoughts = _Thoughts()
        self._calls: list[ToolCall] = []
        self._mode: Literal["text", "thought", "call"] = "thought" if thinking_open else "text"
        self._fed = 0  # ids taken so far
        self._start = 0  # index of the first id whose text is still in the detokenizer, or of the open call
        self._call_ids: list[int] = []
        self._role = _Header(ROLE)

    @property
    def token_count_at_stop(self) -> int | None:
        """How many of the ids fed so far have a part in the answer before the stop string; None before one is met."""
        return self._text.count_at_stop

    def feed(self, token_ids: Sequence[int]) -> OutputDelta:
        """Take the kept ids of a canvas, the end token not among them. Gives nothing once a stop string was met."""
        for token_id in token_ids:
            if self._text.stopped is not None:
                break
            self._take(token_id)
        return self._delta()

    def finish(self) -> OutputDelta:
        """End the answer: release held-back text, an unclosed thought, and an unclosed tool call as text."""
        if self._text.stopped is None:
            self._leave(self._fed)
            self._mode = "text"
            self._text.finish()
        return self._delta()

    def _take(self, token_id: int) -> None:
        special = self._special
        self._fed += 1
        if token_id == special.channel_open:
            self._enter("thought")
        elif token_id == special.channel_close:
            self._close_channel()
        elif token_id == special.tool_call_open:
            self._enter("call")
        elif token_id == special.tool_call_close:
            if self._mode == "call":
                self._close_call()
        elif self._mode == "call" and token_id == special.quote:
            self._call_ids.append(token_id)
        elif token_id in self._tokenizer.all_special_ids:  # turns, images, audio, padding: never part of an answer
            if token_id == special.turn_open:
                self._role.expect()
        elif self._mode == "call":
            self._call_ids.append(token_id)
        else:
            if not self._detokenizer.has_pending:
                self._start = self._fed - 1
            self._detokenizer.add_token(token_id)
            self._emit(self._detokenizer.last_segment, self._fed)

    def _enter(self, mode: Literal["thought", "call"]) -> None:
        self._leave(self._fed - 1)
        self._mode = mode
        self._start = self._fed - 1
        self._text.release_opening()

    def _leave(self, end: int) -> None:
        """End the block that is open, closed by its marker or not; `end` is one past the last id that is part of it."""
        if self._mode == "call":
            if shown := self._detokenize(self._call_ids).replace(QUOTE, '"'):
                self._text.add(shown, self._start, end)
            self._call_ids = []
            return
        self._detokenizer.finalize()
        self._emit(self._detokenizer.last_segment, end)
        self._detokenizer.reset()
        if self._mode == "thought":
            self._thoughts.end_block()

    def _emit(self, piece: str, end: int) -> None:
        piece = self._role.strip(piece)
        if self._mode == "thought":
            self._thoughts.add(piece)
        elif piece:
            self._text.add(piece, self._start, end)

    def _close_channel(self) -> None:
        if self._mode == "thought":
            self._leave(self._fed - 1)
            self._mode = "text"
            self._text.release_opening()
        elif self._mode == "text":  # a thought whose opening marker is missing, or a stray marker
            self._leave(self._fed - 1)
            self._thoughts.add(self._text.take_leaked_thought())
            self._thoughts.end_block()

    def _close_call(self) -> None:
        calls = parse_tool_calls(self._detokenize(self._call_ids))
        if calls is None:
            self._leave(self._fed)  # unreadable: shown as text
        else:
            self._calls += [ToolCall(self._new_call_id(), name, arguments) for name, arguments in calls]
            self._call_ids = []
        self._mode = "text"

    def _detokenize(self, ids: Sequence[int]) -> str:
        detokenizer = self._tokenizer.detokenizer()
        for token_id in ids:
            detokenizer.add_token(token_id)
        detokenizer.finalize()
        return detokenizer.text

    def _delta(self) -> OutputDelta:
        calls, self._calls = tuple(self._calls), []
        text, text_tokens = self._text.take()
        return OutputDelta(text, self._thoughts.take(), calls, self._text.take_stopped(), text_tokens)


class _Header:
    """Takes one given line away from the beginning of a stretch of text."""

    def __init__(self, line: str) -> None:
        self._line = line
        self._seen: str | None = None  # the stretch so far while it may be the line; None when that is decided

    def expect(self) -> None:
        """A stretch begins here."""
        self._seen = ""

    def strip(self, piece: str) -> str:
        """Return what of the stretch so far is not the line: nothing while that is undecided."""
        if self._seen is None:
            return piece
        self._seen += piece
        if self._line.startswith(self._seen):
            return ""
        rest, self._seen = self._seen.removeprefix(self._line), None
        return rest


class _Thoughts:
    """Reasoning without its header line and its outer newlines; several blocks are joined by a newline."""

    def __init__(self) -> None:
        self._ready = ""
        self._header = _Header(THOUGHT)
        self._header.expect()
        self._newlines = ""  # held back: dropped at the end of the block
        self._blocks = 0  # that have text
        self._in_block = False  # whether this one has

    def add(self, piece: str) -> None:
        piece = self._newlines + self._header.strip(piece)
        body = piece.rstrip("\n")
        self._newlines = piece[len(body) :]
        if body and not self._in_block:
            body = ("\n" if self._blocks else "") + body.lstrip("\n")
            self._in_block = True
            self._blocks += 1
        self._ready += body

    def end_block(self) -> None:
        self._header.expect()
        self._newlines, self._in_block = "", False

    def take(self) -> str:
        ready, self._ready = self._ready, ""
        return ready


@dataclass
class _Piece:
    text: str
    first: int  # index of its first id among all ids
    end: int  # one past its last


class _Text:
    """Visible text on its way out: a leaked thought header and possible stop strings are held back."""

    def __init__(self, stops: tuple[str, ...]):
        given: tuple[Any, ...] = stops
        if wrong := [stop for stop in given if not isinstance(stop, str) or not stop]:
            raise ValueError(f"stop must be one or more non-empty strings, got {wrong[0]!r}")
        self._stops = stops
        self._ready = ""
        self._ready_tokens: list[int] = []
        self._released = 0  # ids; pieces of broken characters overlap
        self._held: list[_Piece] = []
        self._opening: list[_Piece] | None = []  # the answer's first text while it may be a leaked header
        self.stopped: str | None = None
        self.count_at_stop: int | None = None
        self._told = False

    def add(self, text: str, first: int, end: int) -> None:
        piece = _Piece(text, first, end)
        if self._opening is None:
            self._filter(piece)
            return
        self._opening.append(piece)
        opening = "".join(piece.text for piece in self._opening)
        if not (THOUGHT.startswith(opening) or opening.startswith(THOUGHT)):
            self.release_opening()

    def release_opening(self) -> None:
        """Let the answer's first text go, without a leaked header."""
        pieces, self._opening = self._opening or [], None
        leaked = len(THOUGHT) if "".join(piece.text for piece in pieces).startswith(THOUGHT) else 0
        for piece in _without(pieces, leaked):
            if self.stopped is None:
                self._filter(piece)

    def take_leaked_thought(self) -> str:
        """Return the answer so far if it is a thought that lacks its opening marker, header included."""
        opening = "".join(piece.text for piece in self._opening or ())
        if opening.startswith(THOUGHT) or opening == THOUGHT.rstrip():
            self._opening = None
            return opening
        self.release_opening()
        return ""

    def finish(self) -> None:
        self.release_opening()
        if self.stopped is None:
            self._release(sum(len(piece.text) for piece in self._held))

    def take(self) -> tuple[str, tuple[int, ...]]:
        """Return the text that can be shown, and the indices of its ids."""
        ready, self._ready = self._ready, ""
        tokens, self._ready_tokens = tuple(self._ready_tokens), []
        return ready, tokens

    def take_stopped(self) -> str | None:
        if self.stopped is None or self._told:
            return None
        self._told = True
        return self.stopped

    def _filter(self, piece: _Piece) -> None:
        self._held.append(piece)
        held = "".join(piece.text for piece in self._held)
        found = [(held.find(stop) + len(stop), held.find(stop), stop) for stop in self._stops if stop in held]
        if found:
            _, start, self.stopped = min(found)  # the one that is complete first, as if characters came singly
            self._release(start)
            self.count_at_stop = self._held[0].first
            self._held = []
            return
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        self._release(len(held) - keep)

    def _release(self, count: int) -> None:
        """Let the first `count` characters that are held go, and with them the ids that have a part in them."""
        before = 0
        for piece in self._held:
            if before < count:
                self._ready += piece.text[: count - before]
                self._ready_tokens += range(max(piece.first, self._released), piece.end)
                self._released = piece.end
            before += len(piece.text)
        self._held = _without(self._held, count)


def _without(pieces: Sequence[_Piece], count: int) -> list[_Piece]:
    """Drop the first `count` characters. A piece that is cut has its ids in what was dropped."""
    rest: list[_Piece] = []
    for piece in pieces:
        if count < len(piece.text):
            rest.append(piece if count <= 0 else _Piece(piece.text[count:], piece.end, piece.end))
        count -= len(piece.text)
    return rest


def preview(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Give display text for a draft canvas, one string per id; control tokens are one-character markers.

    A character whose bytes are spread over several ids stands at the last of them; the others are empty.
    """
    markers = {getattr(tokenizer.special, name): marker for name, marker in MARKERS.items()}
    detokenizer = tokenizer.detokenizer()
    shown = []
    for token_id in ids:
        if token_id in tokenizer.all_special_ids:
            detokenizer.reset()  # bytes of an unfinished character are not shown
            shown.append(markers.get(token_id, "◦"))
        else:
            detokenizer.add_token(token_id)
            shown.append(detokenizer.last_segment)
    return shown
