"""What a terminal shows while the canvas is redrawn in place: on an emulated terminal, with a fake pipeline."""

from __future__ import annotations

import io
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from terminal import Emulator, Session, shown

from mlx_diffusiongemma import display
from mlx_diffusiongemma.display import Span, cell_width, draft_spans, paint, printable, wrap

FAKE = str(Path(__file__).parent / "fake_pipeline.py")
BEFORE = "".join(f"before {number}\n" for number in range(30))
RULE = "=" * 10
PIECES = [
    ["The ", "quick ", "brown ", "fox ", "jumps ", "over ", "the lazy dog.\n", "Then ", "it "],
    ["sleeps ", "until ", "noon.\n\n", "- ", "日本語のテキスト", " と ", "cafe\u0301 ", "👍 ", "end", "ing"],
    [" with", " more", ".", "\n"],
]
LONG = [[f"word{number} " for number in range(300)], ["and ", "the ", "end."]]
SIZES = [(80, 24), (20, 6), (10, 4), (200, 60), (40, 3), (33, 2), (7, 24)]
SGR = re.compile(rb"\x1b\[[0-9;]*m")


@pytest.fixture
def start() -> Iterator[Any]:
    """Start the command line on a fake pipeline in an emulated terminal; end it when the test ends."""
    sessions: list[Session] = []

    def start_session(script: dict[str, Any], *flags: str, **terminal: Any) -> Session:
        sessions.append(Session([FAKE, json.dumps({"before": BEFORE, **script}), "-p", "x", *flags], **terminal))
        return sessions[-1]

    yield start_session
    for session in sessions:
        session.close()


def answer_lines(emulator: Emulator) -> list[str]:
    """Return what is shown between the two rules."""
    lines = emulator.lines()
    first, second = [number for number, line in enumerate(lines) if line == RULE]
    return lines[first + 1 : second]


def text_of(canvases: list[list[str]]) -> str:
    return "".join(piece for canvas in canvases for piece in canvas)


# -- the whole ----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that is an emulated terminal, for a screen in this process."""

    def __init__(self, columns: int, lines: int, each: Callable[[Emulator], None]) -> None:
        super().__init__()
        self.emulator = Emulator(columns, lines)
        self._each = each

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.emulator.feed(text.replace("\n", "\r\n").encode())
        self._each(self.emulator)
        return len(text)


@pytest.mark.parametrize(("columns", "lines"), SIZES)
@pytest.mark.parametrize("canvases", [PIECES, LONG], ids=["mixed", "long"])
def test_text_is_left_once_and_nothing_above_it_changes(monkeypatch, columns, lines, canvases):
    before, final = shown(BEFORE, columns, lines), shown(BEFORE + text_of(canvases), columns, lines)

    def check(emulator: Emulator) -> None:
        assert emulator.lines()[: len(before)] == before

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(display, "window_size", lambda stream: (columns, lines))
    terminal = Terminal(columns, lines, lambda emulator: None)
    terminal.write(BEFORE)
    terminal._each = check
    screen = display.open_screen(terminal, live=True)
    for canvas in canvases:
        for settled in range(0, len(canvas) + 1, 1 + len(canvas) // 6):
            spans = draft_spans(canvas, [i < settled for i in range(len(canvas))], color=True)
            screen.draft(spans, f"{settled} settled")
            assert terminal.emulator.screen.cursor.hidden
        screen.write("", "".join(canvas))
    screen.finish()
    assert terminal.emulator.lines() == final
    assert not terminal.emulator.screen.cursor.hidden
    assert terminal.emulator.screen.cursor.x == 0


def test_text_is_left_once_by_the_command_line(start):
    session = start({"canvases": PIECES}, "--show-denoising", "--verbose", "False")
    assert session.finish() == 0
    assert session.emulator.lines() == shown(BEFORE + text_of(PIECES), 80, 24)


def test_footer_follows_the_text(start):
    session = start({"canvases": PIECES}, "--show-denoising", columns=100)
    assert session.finish() == 0
    assert session.emulator.lines()[-5:] == [
        RULE,
        "Prompt: 7 tokens, 14.000 tokens-per-sec",
        "Generation: 23 tokens, 11.500 tokens-per-sec",
        "Peak memory: 1.250 GB",
        "Diffusion: 3 blocks, 9 steps, 3.0 steps/block, 2.6 tokens/step, 4.5 steps-per-sec",
    ]
    assert answer_lines(session.emulator) == shown(text_of(PIECES), 100, 24)


def test_draft_is_drawn_at_every_step_in_two_colours(start):
    session = start({"canvases": [["alpha ", "beta ", "gamma ", "delta"]], "delay": 0.1}, "--show-denoising")
    session.watch(lambda emulator: any("step 1 of at most 48" in line for line in emulator.lines()))
    assert session.emulator.colors("alpha") == {"green"}
    assert session.emulator.colors("delta") == {"brown"}  # pyte's name of SGR 33
    assert session.emulator.screen.cursor.hidden
    session.watch(lambda emulator: any("step 2 of at most 48 · 4 of 6 settled" in line for line in emulator.lines()))
    assert session.emulator.colors("delta") == {"green"}
    assert session.finish() == 0
    assert session.emulator.colors("delta") == {"default"}
    assert b"step 3 of" in session.written


def test_end_tokens_at_the_end_of_the_canvas_are_not_drawn(start):
    session = start({"canvases": [["one"]]}, "--show-denoising")
    session.finish()
    assert "¶".encode() not in session.written


def test_draft_never_fills_more_than_the_window(start):
    session = start({"canvases": LONG, "delay": 0.05}, "--show-denoising", columns=30, lines=10)
    session.watch(lambda emulator: any(line.startswith("canvas 1 · step 2") for line in emulator.lines()))
    assert session.emulator.lines()[-9].startswith("word0 ")
    session.finish()
    assert not any("settled" in line for line in session.emulator.lines())
    ups = [int(count) for count in re.findall(rb"\x1b\[(\d+)A", session.written)]
    assert max(ups) <= 8


@pytest.mark.parametrize("columns", [30, 120])
def test_change_of_width_while_denoising(start, columns):
    session = start({"canvases": PIECES, "delay": 0.05}, "--show-denoising", "--verbose", "False", columns=60)
    session.watch(lambda emulator: "step 2" in "".join(emulator.screen.display))
    session.resize(columns, 24)
    assert session.finish() == 0
    lines = session.emulator.lines()
    assert [line for line in lines if line.startswith("before")] == BEFORE.splitlines()
    assert not any("settled" in line for line in lines)
    assert lines[30:] == shown(text_of(PIECES), columns, 24)  # nothing of it was final before the change


# -- without colour, without a terminal ---------------------------------------------------------------------------


def test_no_color_shows_unsettled_characters_as_dots(start):
    script = {"canvases": [["alpha ", "beta ", "日本 ", "delta"]], "delay": 0.1}
    session = start(script, "--show-denoising", env={"NO_COLOR": "1"})
    session.watch(lambda emulator: any("alpha beta ···· ·····" in line for line in emulator.lines()))
    assert session.finish() == 0
    assert not SGR.search(session.written)
    assert answer_lines(session.emulator) == ["alpha beta 日本 delta"]


def test_dumb_terminal_gets_plain_text(start):
    session = start({"canvases": PIECES}, "--show-denoising", env={"TERM": "dumb"})
    assert session.finish() == 0
    assert b"\x1b" not in session.written


def test_without_show_denoising_no_cursor_moves(start):
    session = start({"canvases": PIECES})
    assert session.finish() == 0
    assert b"\x1b" not in session.written
    assert b"quick" in session.written


def test_control_characters_of_the_model_do_not_reach_the_terminal(start):
    session = start({"canvases": [["a\x1b[2J", "b\x07\x9b1A\r", "c\td"]]}, "--show-denoising", "--verbose", "False")
    assert session.finish() == 0
    assert session.emulator.lines()[-1] == "a␛[2Jb␇\ufffd1A␍c    d"


# -- thought, tools -----------------------------------------------------------------------------------------------


def test_thought_is_dim_and_apart(start):
    session = start({"canvases": [["<think>", "I add."], ["It is 42."]]}, "--show-denoising")
    assert session.finish() == 0
    assert answer_lines(session.emulator) == ["I add.", "", "It is 42."]
    assert b"\x1b[2mI add." in session.written


def test_tool_call_has_its_own_line(start):
    call = {"id": "call_1", "name": "get_weather", "arguments": {"city": "Köln"}}
    session = start({"canvases": [["Let me look."]], "tool_calls": [call]}, "--show-denoising")
    assert session.finish() == 0
    assert answer_lines(session.emulator) == ["Let me look.", '[tool call] get_weather {"city": "Köln"}']


# -- signals ------------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_text_and_draft_and_exits_with_130(start):
    script = {"canvases": [["First.\n", "Second"], [" part", " three"]], "steps": 40, "delay": 0.02}
    session = start(script, "--show-denoising")
    session.watch(lambda emulator: any("canvas 2 · step 3 " in line for line in emulator.lines()))
    session.type("\x03")
    assert session.finish() == 130
    assert answer_lines(session.emulator)[:2] == ["First.", "Second part three"]
    assert answer_lines(session.emulator)[2].startswith("stopped in canvas 2 · step ")
    assert not session.emulator.screen.cursor.hidden
    assert "Diffusion: 1 blocks, 40 steps" in "\n".join(session.emulator.lines())


def test_sigterm_restores_the_terminal(start):
    session = start({"canvases": [["One"]], "steps": 400, "delay": 0.02}, "--show-denoising")
    session.watch(lambda emulator: any("step 3 " in line for line in emulator.lines()))
    session.process.send_signal(signal.SIGTERM)
    assert session.finish() == 143
    assert not session.emulator.screen.cursor.hidden


def test_ctrl_z_gives_the_terminal_back(monkeypatch):
    """The stop itself is not sent: a test's process group has no shell that would wake it."""
    from mlx_diffusiongemma import answer

    class Screen:
        suspended = 0

        def suspend(self) -> None:
            self.suspended += 1

    killed, screen = [], Screen()
    monkeypatch.setattr(answer.os, "kill", lambda pid, number: killed.append(number))
    with answer.Interrupts() as interrupts:
        interrupts.stop_if_asked(screen)
        assert screen.suspended == 0
        signal.raise_signal(signal.SIGTSTP)
        interrupts.stop_if_asked(screen)
        assert (screen.suspended, killed) == (1, [signal.SIGTSTP])
        assert signal.getsignal(signal.SIGTSTP) == interrupts._note
    assert signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL


def test_prefill_of_a_long_prompt_has_a_bar_that_disappears(start):
    session = start({"canvases": [["Text."]], "prompt_tokens": 8000, "chunks": 4, "delay": 0.05}, columns=100)
    session.watch(lambda emulator: any("Prefill" in line and "4000/8000 tokens" in line for line in emulator.lines()))
    assert session.finish() == 0
    assert answer_lines(session.emulator) == ["Text."]
    assert not session.emulator.screen.cursor.hidden


# -- pieces -------------------------------------------------------------------------------------------------------


def test_wrap_breaks_where_a_row_is_full_and_at_newlines():
    rows = wrap([Span("a", "abc"), Span("b", "defg\n\nh")], 4)
    assert [[(span.style, span.text) for span in row] for row in rows] == [
        [("a", "abc"), ("b", "d")],
        [("b", "efg")],
        [("b", "")],
        [("b", "h")],
    ]


def test_wide_characters_are_not_cut_and_marks_stay_with_their_letter():
    rows = ["".join(span.text for span in row) for row in wrap([Span("", "ab日cde\u0301f")], 3)]
    assert rows == ["ab", "日c", "de\u0301f"]
    assert [cell_width(c) for c in "a日\u0301👍\ufe0f"] == [1, 2, 0, 2, 1]


def test_paint_without_colour_is_the_text():
    spans = [Span("settled", "a"), Span("", "b"), Span("unsettled", "c")]
    assert paint(spans, color=False) == "abc"
    assert paint(spans, color=True) == "\x1b[32ma\x1b[0mb\x1b[2;33mc\x1b[0m"


def test_draft_spans_without_colour():
    spans = draft_spans(["ab", "c d\n", "日"], [True, False, False], color=False)
    assert [span.text for span in spans] == ["ab", "· ·\n", "··"]


def test_printable():
    assert printable("a\tb\r\nc\x00\x7f\x85é") == "a    b\nc␀␡\ufffdé"
