"""Prompts to measure a checkpoint with, and what the right answers are.

A file of tasks has one JSON object per line. `messages` is needed, everything else is optional:

    {"messages": [{"role": "user", "content": "What is 2 + 3?"}], "expected": "5", "family": "sums",
     "tools": [...], "enable_thinking": true, "expected_reasoning": "...",
     "expected_tool_calls": [{"name": "add", "arguments": {"a": 2, "b": 3}}]}

Every `expected...` that is there is compared exactly with what the model writes. A task without any has no right
answer and counts for the denoising steps only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .events import Result
from .messages import check_messages, check_tool

ANY_FAMILY = "other"  # where a task names no family


@dataclass(frozen=True)
class Task:
    """One prompt; the fields are the keys of the file."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    enable_thinking: bool = False
    expected: str | None = None
    expected_reasoning: str | None = None
    expected_tool_calls: list[dict[str, Any]] | None = None
    family: str = ANY_FAMILY

    @property
    def prompt_options(self) -> dict[str, Any]:
        """What rendering the prompt needs besides the messages."""
        return {"tools": self.tools, "enable_thinking": self.enable_thinking}

    def is_right(self, result: Result) -> bool | None:
        """Tell whether a result is exactly the expected one; None where nothing is expected."""
        calls = [{"name": call.name, "arguments": call.arguments} for call in result.tool_calls]
        compared = [
            (self.expected, result.text),
            (self.expected_reasoning, result.reasoning or ""),
            (self.expected_tool_calls, calls),
        ]
        judged = [wanted == got for wanted, got in compared if wanted is not None]
        return all(judged) if judged else None


KEYS = tuple(field.name for field in fields(Task))


def read_tasks(path: Path) -> list[Task]:
    """Read a file of tasks; empty lines are skipped. Raise `ValueError` naming the line and what was expected."""
    return read_lines(path, "JSON object", lambda line: make_task(_parse(line)))


def read_lines(path: Path, expected: str, read: Callable[[bytes], Task]) -> list[Task]:
    """Read one task from every line of a file that is not empty.

    Args:
        path: of the file.
        expected: what a line is, for the error where there is none.
        read: makes a task of a line, or raises `ValueError` with what is wrong.

    Raises:
        ValueError: with the file, the line and what was expected.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    tasks = []
    for number, line in enumerate(lines, 1):
        try:
            if stripped := line.strip():
                tasks.append(read(stripped))
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from None
    if not tasks:
        raise ValueError(f"{path} is empty, expected one {expected} per line")
    return tasks


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


def make_task(values: Any) -> Task:
    """Check one object of a task file. Raise `ValueError` with got and expected."""
    if not isinstance(values, Mapping):
        raise ValueError(f"got {json.dumps(values)[:60]}, expected a JSON object")
    unknown = sorted(set(values) - set(KEYS))
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}, expected one of {', '.join(KEYS)}")
    given = {key: value for key, value in values.items() if value is not None}
    if not isinstance(given.get("messages"), list):
        raise ValueError(f"messages: got {json.dumps(given.get('messages'))[:60]}, expected a list of messages")
    check_messages(given["messages"])
    for key in ("expected", "expected_reasoning", "family"):
        _check(key, given.get(key, ""), str, "text")
    _check("enable_thinking", given.get("enable_thinking", False), bool, "true or false")
    _check("tools", given.get("tools", []), list, "a list of tools")
    for index, tool in enumerate(given.get("tools", [])):
        check_tool(index, tool)
    _check("expected_tool_calls", given.get("expected_tool_calls", []), list, "a list of tool calls")
    for index, call in enumerate(given.get("expected_tool_calls", [])):
        _check_expected_call(index, call)
    return Task(**given)


def _check(key: str, value: Any, kind: type, expected: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{key}: got {json.dumps(value)[:60]}, expected {expected}")


def _check_expected_call(index: int, call: Any) -> None:
    good = (
        isinstance(call, Mapping)
        and set(call) == {"name", "arguments"}
        and isinstance(call["name"], str)
        and isinstance(call["arguments"], Mapping)
    )
    if not good:
        expected = 'an object like {"name": "add", "arguments": {"a": 1}}'
        raise ValueError(f"expected_tool_calls[{index}]: got {json.dumps(call)[:60]}, expected {expected}")


def _ask(prompt: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], **more}


WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

# Ordinary prompts without one right answer, in the form of a task file: what is used without a file.
PROMPTS: tuple[dict[str, Any], ...] = (
    _ask("Why is the sky blue? Answer in one paragraph."),
    _ask("Write a short story about a lighthouse keeper who finds a letter."),
    _ask("Write a Python function that returns the n-th Fibonacci number, with a docstring."),
    _ask("A train leaves at 9:40 and arrives at 13:05. How long does it take?", enable_thinking=True),
    _ask("Translate into French: The library opens at nine and closes at six."),
    _ask("List five ways to save water at home."),
    _ask("What is the weather in Lisbon?", tools=[WEATHER_TOOL]),
    _ask("Explain to a ten-year-old what a prime number is."),
    _ask('Write as JSON with the keys name, age and city: "Mara is 34 years old and lives in Graz."'),
    _ask("Which is heavier, a litre of water or a litre of oil, and why?", enable_thinking=True),
    _ask("Summarise in one sentence: Bees visit flowers for nectar and carry pollen from one to the next. Many plants "
         "can bear fruit only in this way, so fewer bees mean smaller harvests."),
    {
        "messages": [
            {"role": "user", "content": "Name a large river in Europe."},
            {"role": "assistant", "content": "The Danube."},
            {"role": "user", "content": "Which countries does it flow through?"},
        ]
    },
)  # fmt: skip
