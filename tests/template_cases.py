"""Conversations that show what a chat template does, by name: messages, tools and template arguments.

The names are those of `../shared/reference/template_renders.txt`, which holds what Google's two published templates
make of them. `tests/data/tiny_renders.json` holds the same for the template of `tiny`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """The arguments of one rendering."""

    messages: list[Message]
    tools: list[Message] | None = None
    options: dict[str, Any] = field(default_factory=dict)


THINK = {"enable_thinking": True}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "City"},
                    "unit": {"type": "string", "enum": ["c", "f"]},
                    "days": {"type": "integer"},
                    "tags": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["city"],
            },
        },
    }
]


def user(content: Any = "Hi") -> Message:
    return {"role": "user", "content": content}


def assistant(content: Any = "", **fields: Any) -> Message:
    return {"role": "assistant", "content": content, **fields}


def system(content: Any, role: str = "system") -> Message:
    return {"role": role, "content": content}


def call(name: str, arguments: Any, call_id: str = "1") -> Message:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content: Any, call_id: str = "1") -> Message:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def text(value: str) -> Message:
    return {"type": "text", "text": value}


WEATHER = [call("get_weather", {"city": "Paris", "days": 2, "flag": True, "x": None})]
CALLS = assistant(tool_calls=WEATHER)
THOUGHT_CALLS = assistant(tool_calls=WEATHER, reasoning="because")
SUNNY = result("sunny")
IMAGE = {"type": "image"}

CASES: dict[str, Case] = {
    "plain off": Case([user()]),
    "plain on": Case([user()], None, THINK),
    "sys off": Case([system("S"), user()]),
    "sys on": Case([system("S"), user()], None, THINK),
    "tools off": Case([user()], TOOLS),
    "sys+tools on": Case([system("S"), user()], TOOLS, THINK),
    "tool call + result": Case([user(), CALLS, SUNNY], TOOLS),
    "tool call + dict result, think": Case([user(), CALLS, result({"ok": True})], TOOLS, THINK),
    "tool call pending": Case([user(), CALLS], TOOLS),
    "multi-turn w/ thinking history": Case([user(), assistant("<|channel>thought\nhm\n<channel|>Hello"), user("More")]),
    "image": Case([user([IMAGE, text("What?")])]),
    "sys list content": Case([system([text("S1"), text("S2")]), user()]),
    "content+call+result": Case([user(), assistant("Let me look", tool_calls=WEATHER), SUNNY], TOOLS),
    "args as string": Case([user(), assistant(tool_calls=[call("f", '{"a":1}')]), result("r")]),
    "no tools: call+result off": Case([user(), CALLS, SUNNY]),
    "no tools: call+result think on": Case([user(), CALLS, SUNNY], None, THINK),
    "reasoning+call+result think on": Case([user(), THOUGHT_CALLS, SUNNY], None, THINK),
    "reasoning_content+call+result think on": Case(
        [user(), assistant(tool_calls=WEATHER, reasoning_content="because"), SUNNY], None, THINK
    ),
    "reasoning+call+result think off": Case([user(), THOUGHT_CALLS, SUNNY]),
    "tool_responses dict": Case(
        [
            user(),
            {**CALLS, "tool_responses": [{"name": "get_weather", "response": {"t": 21, "ok": True, "s": "x"}}]},
        ]
    ),
    "two parallel": Case(
        [
            user(),
            assistant(tool_calls=[call("f", {}, "1"), call("g", {"k": [1, "two", {"z": 1.5}]}, "2")]),
            result("A", "1"),
            result("B", "2"),
        ]
    ),
    "then final answer + next user": Case([user(), CALLS, SUNNY, assistant("It is sunny"), user("ok")]),
    "final answer with reasoning history": Case([user(), assistant("It is", reasoning="r"), user("ok")]),
    "preserve_thinking history": Case(
        [user(), assistant("It is", reasoning="r"), user("ok")], None, {"preserve_thinking": True}
    ),
    "preserve_thinking w call": Case(
        [user(), assistant(tool_calls=WEATHER, reasoning="r"), SUNNY, assistant("It is sunny"), user("ok")],
        None,
        {"preserve_thinking": True},
    ),
    "tool content list": Case([user(), CALLS, result([text("sun"), text("ny")])]),
    "tool content img": Case([user(), CALLS, result([text("sunny"), IMAGE])]),
    "user whitespace": Case([user("  Hi \n")]),
    "system whitespace": Case([system(" S \n"), user()]),
    "assistant prefill no gen": Case([user(), assistant("Sure")], None, {"add_generation_prompt": False}),
    "developer": Case([system("D", "developer"), user()]),
    "system mid": Case([user(), system("D"), user()]),
    "two imgs": Case([user([IMAGE, IMAGE, text("What?"), {"type": "video"}, {"type": "audio"}])]),
    "image_url": Case([user([{"type": "image_url", "image_url": {"url": "u"}}, text("x")])]),
    "double user": Case([user(), user()]),
    "double assistant": Case([user(), assistant("A"), assistant("B"), user()]),
}
