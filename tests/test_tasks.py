"""Task files: what is read, one clear line for everything that is not, and when an answer is right."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_diffusiongemma.output import ToolCall
from mlx_diffusiongemma.tasks import Task, make_task, read_tasks

ASK = {"messages": [{"role": "user", "content": "What is 2 + 3?"}]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_every_key_is_read(tmp_path):
    full = {
        **ASK,
        "tools": [TOOL],
        "enable_thinking": True,
        "expected": "5\u20285",
        "expected_reasoning": "2 and 3",
        "expected_tool_calls": [{"name": "add", "arguments": {"a": 2}}],
        "family": "sums",
    }
    line = json.dumps(full, ensure_ascii=False)  # a line separator inside the text does not end the line
    assert read_tasks(write(tmp_path / "t.jsonl", line, "", ASK)) == [Task(**full), Task(**ASK)]


def test_null_is_a_key_left_out():
    assert make_task({**ASK, "tools": None, "expected": None, "family": None}) == Task(**ASK)


BAD = [
    ("{", "line 1: not JSON: Expecting property name"),
    ("[" * 100_000, "line 1: not JSON: maximum recursion depth"),
    ([1], "line 1: got [1], expected a JSON object"),
    ({"expected": "5"}, "line 1: messages: got null, expected a list of messages"),
    ({"messages": "hello"}, 'line 1: messages: got "hello", expected a list of messages'),
    ({"messages": []}, "line 1: the prompt is empty"),
    ({"messages": [{"role": "cat", "content": "x"}]}, "line 1: messages[0].role must be one of"),
    (
        {**ASK, "answer": "5"},
        "line 1: unknown key 'answer', expected one of messages, tools, enable_thinking, expected",
    ),
    ({**ASK, "expected": 5}, "line 1: expected: got 5, expected text"),
    ({**ASK, "expected_reasoning": 5}, "line 1: expected_reasoning: got 5, expected text"),
    ({**ASK, "family": ["a"]}, 'line 1: family: got ["a"], expected text'),
    ({**ASK, "enable_thinking": "yes"}, 'line 1: enable_thinking: got "yes", expected true or false'),
    ({**ASK, "tools": {}}, "line 1: tools: got {}, expected a list of tools"),
    ({**ASK, "tools": [{}]}, "line 1: tools[0]: expected"),
    ({**ASK, "expected_tool_calls": {}}, "line 1: expected_tool_calls: got {}, expected a list of tool calls"),
    ({**ASK, "expected_tool_calls": [{"name": "f"}]}, 'line 1: expected_tool_calls[0]: got {"name": "f"}, expected'),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_line(tmp_path, line, message):
    path = write(tmp_path / "t.jsonl", line)
    with pytest.raises(ValueError) as caught:
        read_tasks(path)
    assert str(caught.value).startswith(f"{path} {message}")


def test_the_line_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"t.jsonl line 3: not JSON"):
        read_tasks(write(tmp_path / "t.jsonl", ASK, "", "nonsense"))


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file(tmp_path, text):
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"t.jsonl is empty, expected one JSON object per line"):
        read_tasks(path)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"none.jsonl: No such file or directory"):
        read_tasks(tmp_path / "none.jsonl")


def test_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"messages": "\xff"}')
    with pytest.raises(ValueError, match=r"line 1: not JSON: 'utf-8' codec can't decode byte 0xff"):
        read_tasks(path)


CALLS = (ToolCall("call_1", "add", {"a": 2, "b": "x"}),)
EXPECTED_CALLS = [{"name": "add", "arguments": {"b": "x", "a": 2}}]


@pytest.mark.parametrize(
    ("expected", "right"),
    [
        ({}, None),
        ({"expected": "5"}, True),
        ({"expected": "5 "}, False),
        ({"expected": ""}, False),
        ({"expected": "5", "expected_reasoning": "Hm."}, True),
        ({"expected": "5", "expected_reasoning": ""}, False),
        ({"expected_reasoning": "Hm."}, True),
        ({"expected_tool_calls": EXPECTED_CALLS}, True),
        ({"expected_tool_calls": []}, False),
        ({"expected_tool_calls": EXPECTED_CALLS * 2}, False),
        ({"expected": "6", "expected_tool_calls": EXPECTED_CALLS}, False),
    ],
)
def test_when_an_answer_is_right(expected, right):
    result = SimpleNamespace(text="5", reasoning="Hm.", tool_calls=CALLS)
    assert make_task({**ASK, **expected}).is_right(result) is right


def test_no_reasoning_is_empty_reasoning():
    result = SimpleNamespace(text="5", reasoning=None, tool_calls=())
    assert make_task({**ASK, "expected_reasoning": "", "expected_tool_calls": []}).is_right(result)
