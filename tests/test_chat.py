"""The conversation in the terminal, with a fake pipeline."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from terminal import Session
from test_cli import Stdin, run_main

from mlx_diffusiongemma import chat

FAKE = str(Path(__file__).parent / "fake_pipeline.py")


@pytest.fixture
def converse(fake, capsys, monkeypatch):
    """Run --chat on given lines of input; return the pipeline, exit code, stdout and stderr."""

    def run(lines: bytes, *flags: str, **script: object):
        pipeline = fake(**{"canvases": [["An answer."]], **script})
        monkeypatch.setattr(sys, "stdin", Stdin(lines))
        return pipeline, *run_main(capsys, "--chat", *flags)

    return run


def test_history_is_kept_and_reset(converse):
    pipeline, code, out, err = converse(b"one\n\ntwo\r\nr\nthree\nq\nnever\n", "--system", "Be kind.")
    system = {"role": "system", "content": "Be kind."}
    answer = {"role": "assistant", "content": "An answer."}
    one, two, three = ({"role": "user", "content": text} for text in ("one", "two", "three"))
    assert (code, err) == (0, "")
    assert [messages for messages, _ in pipeline.requests] == [
        [system, one],
        [system, one, answer, two],
        [system, three],
    ]
    assert out.count("An answer.") == 3
    assert "  1 tokens · 0.5 tok/s · prompt 14.0 tok/s · peak 1.25 GB · 3 steps\n" in out


def test_prompt_is_the_first_line(converse):
    pipeline, code, *_ = converse(b"", "-p", r"a\nb")
    assert code == 0
    assert [messages for messages, _ in pipeline.requests] == [[{"role": "user", "content": "a\nb"}]]


def test_thoughts_are_shown_and_not_kept(converse):
    pipeline, _, out, _ = converse(b"one\ntwo\n", canvases=[["<think>", "Hm."], ["Yes."]])
    assert "Hm." in out
    assert pipeline.requests[1][0][1] == {"role": "assistant", "content": "Yes."}


def test_help(converse):
    assert chat.HELP in converse(b"h\n")[2]


def test_results_of_tools_are_asked_for(converse):
    call = {"id": "c1", "name": "add", "arguments": {"a": 1}}
    pipeline, code, *_ = converse(b"sum\n42\n", tool_calls=[call], canvases=[["Wait."]])
    assert code == 0
    assert pipeline.requests[1][0] == [
        {"role": "user", "content": "sum"},
        {
            "role": "assistant",
            "content": "Wait.",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "42"},
    ]


def test_bad_input_leaves_the_conversation_as_it_was(converse):
    _, code, _, err = converse(b"one\nq\n", error="too long")
    assert (code, err) == (0, "error: too long\n")


def test_input_that_is_not_utf8(converse):
    _, code, _, err = converse(b"\xff\n")
    assert code == 2
    assert err.startswith("error: standard input is not valid UTF-8")
    assert err.count("\n") == 1


def test_conversation_on_a_terminal():
    script = json.dumps({"canvases": [["An ", "answer."]], "steps": 60, "delay": 0.02})
    session = Session([FAKE, script, "--model", "tiny", "--chat", "--show-denoising", "-m", "99"])
    try:
        session.watch(lambda emulator: emulator.lines()[-1:] == [chat.PROMPT.strip()])
        assert session.emulator.lines()[0].startswith("╭─ mlx_diffusiongemma ─")
        assert "model        tiny" in session.emulator.lines()[1]
        session.type("hello\n")
        session.watch(lambda emulator: any("step 3 " in line for line in emulator.lines()))
        assert session.emulator.screen.cursor.hidden
        session.type("\x03")  # ends the answer, not the conversation
        session.watch(lambda emulator: emulator.lines()[-1] == chat.PROMPT.strip() and len(emulator.lines()) > 7)
        assert "An answer." in session.emulator.lines()
        assert not session.emulator.screen.cursor.hidden
        session.type("again\n")
        session.watch(lambda emulator: "  2 tokens · 1.0 tok/s" in "\n".join(emulator.lines()))
        session.watch(lambda emulator: emulator.lines()[-1] == chat.PROMPT.strip())
        session.type("q\n")
        assert session.finish() == 0
    finally:
        session.close()


def test_ctrl_c_at_the_prompt_ends_the_conversation():
    session = Session([FAKE, "{}", "--chat"])
    try:
        session.watch(lambda emulator: emulator.lines()[-1:] == [chat.PROMPT.strip()])
        time.sleep(1)  # input() of CPython misses a signal between printing its prompt and waiting for a key
        session.type("\x03")
        assert session.finish() == 130
        assert "Traceback" not in "\n".join(session.emulator.lines())
    finally:
        session.close()


def test_a_given_beginning_stays_part_of_the_conversation(converse):
    pipeline, *_ = converse(b"one\ntwo\n", "--prefill-response", "So: ")
    assert [message["content"] for message in pipeline.requests[1][0]] == ["one", "So: An answer.", "two"]
