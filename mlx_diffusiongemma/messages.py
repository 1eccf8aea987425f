"""OpenAI-style messages and tools, checked and brought into one form that every chat template renders well.

Here: dictionaries in, dictionaries out, ValueError with got and expected. Parts of a message's content are in
`parts.py`, rendering in `prompt.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .parts import Message, check_part, media_count
from .tokenizer import SPELLINGS

ROLES = ("system", "developer", "user", "assistant", "tool")


def refuse_blank(text: str) -> None:
    """Raise ValueError if there is nothing but whitespace."""
    if not text.strip():
        raise ValueError(f"the prompt is empty: got {text[:20]!r}, expected some text")


def check_messages(messages: Any, *, may_be_blank: bool = False) -> list[Message]:
    """Check a string (one user message) or a list of messages; return copies with the fields that templates know.

    `developer` becomes `system`, arguments in JSON text become objects, an object as tool result becomes JSON text.
    `may_be_blank` allows messages without text: there are images beside them.
    """
    if isinstance(messages, str):
        if not may_be_blank:
            refuse_blank(messages)
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a string or a list of messages, got {type(messages).__name__}")
    if not messages:
        raise ValueError("the prompt is empty: got no messages, expected at least one")
    checked = [_check_message(f"messages[{index}]", message) for index, message in enumerate(messages)]
    has_text = any(message.get("tool_calls") or _plain_text(message.get("content")).strip() for message in checked)
    if not has_text and not may_be_blank and not media_count(checked):
        raise ValueError("the prompt is empty: no message has any text")
    return checked


def _check_message(where: str, message: Any) -> Message:
    """Check one message and return a copy with the fields that templates know."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must be an object with role and content, got {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}")
    checked: Message = {"role": "system" if role == "developer" else role}
    checked["content"] = _check_content(f"{where}.content", role, message)
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            checked[name] = _check_text(f"{where}.{name}", message[name])
    if role == "assistant":
        checked |= _check_assistant(where, message)
    return checked


def _check_text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be text, got {type(value).__name__}")
    return value


def _check_content(where: str, role: str, message: Mapping[str, Any]) -> str | list[Message]:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        return [check_part(f"{where}[{index}]", role, part) for index, part in enumerate(content)]
    if role == "tool":  # both published templates fail on objects; OpenAI's form is JSON text
        return "" if content is None else _json_text(where, content)
    if content is None and role == "assistant" and (message.get("tool_calls") or message.get("tool_responses")):
        return ""
    raise ValueError(f"{where} must be text or a list of parts, got {'nothing' if content is None else repr(content)}")


def _json_text(where: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} must be text or plain JSON data: {error}") from None


def _check_assistant(where: str, message: Mapping[str, Any]) -> Message:
    """Return the fields that only assistant messages have: reasoning, tool calls, embedded tool responses."""
    checked: Message = {}
    names = ("reasoning_content", "thinking", "reasoning")  # the order in which transformers looks
    if name := next((name for name in names if message.get(name) is not None), None):
        reasoning = _check_text(f"{where}.{name}", message[name])
        checked |= {"reasoning": reasoning, "reasoning_content": reasoning}
    calls = message.get("tool_calls") or []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ValueError(f"{where}.tool_calls must be a list, got {type(calls).__name__}")
    if calls:
        checked["tool_calls"] = [_check_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    if message.get("tool_responses"):  # Gemma's own form: results inside the assistant message
        checked["tool_responses"] = message["tool_responses"]
    return checked


def _check_call(where: str, call: Any) -> Message:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        expected = '{"id", "type": "function", "function": {"name", "arguments"}}'
        raise ValueError(f"{where} must be like {expected}, got {call!r}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise ValueError(f"{where}.function.arguments is not JSON ({error}): got {arguments!r}") from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}.function.arguments must be a JSON object, got {arguments!r}")
    call_id = call.get("id") or where  # results find their call by it
    return {"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def check_tool(index: int, tool: Any) -> Message:
    """Check one tool and return it in OpenAI's form; a bare function object is wrapped."""
    where = f"tools[{index}]"
    expected = 'expected {"type": "function", "function": {"name", "description", "parameters"}}'
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        raise ValueError(f"{where}: {expected}, got {tool!r}")
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{where}: {expected}, got {tool!r}")
    function = {name: value for name, value in function.items() if name != "type" and value is not None}
    function["description"] = _check_text(f"{where} description", function.get("description", ""))
    parameters = function.get("parameters", {})
    if not isinstance(parameters, Mapping):
        raise ValueError(f"{where} parameters must be a JSON schema object, got {parameters!r}")
    function["parameters"] = {**parameters, "type": parameters.get("type") or "object"}
    return {"type": "function", "function": function}


def fold(messages: Sequence[Message]) -> list[Message]:
    """Merge assistant messages that follow each other, and give every tool result the id of its call."""
    chat: list[Message] = []
    for index, message in enumerate(messages):
        last = chat[-1] if chat else {}
        if message["role"] == "tool":
            chat.append(_answer(f"messages[{index}]", message, chat))
        elif message["role"] == last.get("role") == "assistant" and not (
            last.get("tool_responses") and message.get("tool_calls")
        ):
            chat[-1] = _merge(last, message)
        else:
            _refuse_unanswered(index, last)
            chat.append(message)
    _refuse_unanswered(len(messages), chat[-1])
    return chat


def _refuse_unanswered(index: int, last: Message) -> None:
    if last.get("tool_calls") and not last.get("tool_responses"):
        names = ", ".join(repr(call["function"]["name"]) for call in last["tool_calls"])
        raise ValueError(f"messages[{index - 1}] calls {names}, expected a tool message with the result after it")


def _merge(first: Message, second: Message) -> Message:
    """Join two assistant messages into one, text to text as the newer template does."""
    merged = {**first, **second}
    merged["content"] = model_text(first["content"]) + model_text(second["content"])
    for name in ("reasoning", "reasoning_content"):
        if name in merged:
            merged[name] = "\n".join(part[name] for part in (first, second) if part.get(name))
    if calls := [*first.get("tool_calls", ()), *second.get("tool_calls", ())]:
        merged["tool_calls"] = calls
    return merged


def _answer(where: str, message: Message, chat: Sequence[Message]) -> Message:
    """Find the call that a tool message answers: by id, else by name, else by position."""
    caller = next((index for index in reversed(range(len(chat))) if chat[index]["role"] != "tool"), None)
    calls = [] if caller is None else chat[caller].get("tool_calls", [])
    if caller is None or not calls:
        raise ValueError(f"{where} is a tool result, expected an assistant message with tool_calls before it")
    wanted, name = message.get("tool_call_id"), message.get("name")
    place = len(chat) - caller - 1
    if wanted is not None:
        found = [call for call in calls if call["id"] == wanted]
    else:
        found = [call for call in calls if call["function"]["name"] == name] or calls[place : place + 1]
    if not found:
        known = ", ".join(repr(call["id"]) for call in calls)
        raise ValueError(f"{where} answers no call: got tool_call_id {wanted!r}, expected one of {known}")
    return {**message, "tool_call_id": found[0]["id"], "name": found[0]["function"]["name"]}


def _plain_text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or ())


def model_text(content: Any) -> str:
    """Return the text of an assistant message without its thoughts, as the templates show it."""
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    opening, closing = SPELLINGS["channel_open"], SPELLINGS["channel_close"]
    return "".join("".join(piece.split(opening)[0] for piece in text.split(closing)).strip() for text in texts)
