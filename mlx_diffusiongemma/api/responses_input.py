"""Input items of the Responses API as OpenAI-style messages: plain functions from dictionaries to dictionaries.

message                  a message of its role; input_text, output_text and refusal are text, input_image an image
reasoning                reasoning_content of the assistant; what is only encrypted cannot be read and is left out
function_call            a tool call of the assistant; the prompt builder joins calls that follow each other
function_call_output     a message of role tool
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import refuse, short

Message = dict[str, Any]
ROLES = ("user", "assistant", "system", "developer")
TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}  # and where their text is
# Tools that OpenAI's servers run and that agents offer unasked. The answer does not have them; its `tools` says so.
LEFT_OUT = ("web_search", "web_search_preview", "web_search_2025_08_26")


def messages_of(given: str | Sequence[Message] | None) -> list[Message]:
    """Return the messages of `input`: text, or a list of items. Nothing at all gives no messages."""
    if not given:
        return []
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    return [message for index, item in enumerate(given) for message in _item(f"input[{index}]", item)]


def tools_of(given: Sequence[Message] | None) -> list[Message]:
    """Return the tools that the model gets, in the form of the chat API."""
    tools = []
    for index, tool in enumerate(given or ()):
        kind = tool.get("type")
        if kind in LEFT_OUT:
            continue
        if kind != "function":
            expected = "expected function: this server runs no tools itself, and free text cannot be held to a grammar"
            raise refuse(f"tools[{index}]", f"got a tool of type {short(kind)}, {expected}")
        names = ("name", "description", "parameters")
        function = {name: tool[name] for name in names if tool.get(name) is not None}
        tools.append({"type": "function", "function": function})
    return tools


def tool_choice_of(choice: str | Message | None, tools: list[Message]) -> tuple[Any, list[Message]]:
    """Return `tool_choice` in the form of the chat API, and the tools that it allows."""
    if choice is None or isinstance(choice, str):
        return choice, tools
    kind = choice.get("type")
    if kind == "allowed_tools" and isinstance(choice.get("tools"), list):
        names = [tool.get("name") for tool in choice["tools"] if isinstance(tool, Mapping)]
        return choice.get("mode", "auto"), [tool for tool in tools if tool["function"].get("name") in names]
    if kind == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}, tools
    raise refuse("tool_choice", f"got {short(choice)}, expected auto, none, required, a function or allowed_tools")


def _item(where: str, item: Mapping[str, Any]) -> list[Message]:
    kind = item.get("type", "message")
    if kind == "message":
        return [_message(where, item)]
    if kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        if not isinstance(parts, list):
            raise refuse(f"{where}.content", f"got {short(parts)}, expected a list of parts")
        texts = [part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        return [{"role": "assistant", "content": "", "reasoning_content": "\n".join(texts)}] if texts else []
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return [{"role": "assistant", "content": "", "tool_calls": [call]}]
    if kind == "function_call_output":
        output = item.get("output")
        content = output if isinstance(output, str) else _parts(f"{where}.output", "tool", output)
        return [{"role": "tool", "tool_call_id": item.get("call_id"), "content": content}]
    expected = "message, reasoning, function_call or function_call_output"
    raise refuse(where, f"got an item of type {short(kind)}, expected {expected}")


def _message(where: str, item: Mapping[str, Any]) -> Message:
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise refuse(f"{where}.role", f"got {short(role)}, expected one of {', '.join(ROLES)}")
    return {"role": role, "content": content if isinstance(content, str) else _parts(f"{where}.content", role, content)}


def _parts(where: str, role: str, parts: Any) -> str | list[Message]:
    """Return content parts in the form of the chat API; mere text as one string."""
    if not isinstance(parts, list):
        raise refuse(where, f"got {short(parts)}, expected text or a list of parts")
    converted = [_part(f"{where}[{index}]", part) for index, part in enumerate(parts)]
    if role != "user" and all(part["type"] == "text" for part in converted):
        return "".join(part["text"] for part in converted)
    return converted


def _part(where: str, part: Any) -> Message:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind in TEXTS:
        text = part.get(TEXTS[kind])
        if not isinstance(text, str):
            raise refuse(f"{where}.{TEXTS[kind]}", f"got {short(text)}, expected text")
        return {"type": "text", "text": text}
    if kind == "input_image":
        if not isinstance(part.get("image_url"), str):
            got = "a file_id" if part.get("file_id") else short(part.get("image_url"))
            raise refuse(f"{where}.image_url", f"got {got}, expected a data URL: this server keeps no files")
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    raise refuse(where, f"got a part of type {short(kind)}, expected input_text, output_text or input_image")
