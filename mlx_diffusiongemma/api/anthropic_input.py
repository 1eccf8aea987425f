"""A request of Anthropic's Messages API as an `Ask`: plain functions from dictionaries to dictionaries.

    system, messages with blocks        OpenAI-style messages; a tool_result becomes a message of role tool
    thinking blocks                     reasoning_content; redacted ones cannot be read and are left out
    an assistant message at the end     the beginning of the answer
    tools with input_schema             functions; tools that Anthropic's servers run are refused

`cache_control`, `metadata`, `service_tier` and `betas` ask for nothing that changes the answer. Budgets of thinking and
efforts are not enforced: thinking is on or off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .errors import refuse, short

Message = dict[str, Any]
THINKING = {"enabled": True, "adaptive": True, "between_tools": True, "disabled": False}
ERROR = "Error: "  # in front of a tool result with is_error; templates have no place for it


def messages_of(given: Sequence[Message], system: str | Sequence[Message] | None) -> tuple[list[Message], str | None]:
    """Return messages behind the system text, and the text that the answer begins with if they give one."""
    if not given:
        raise refuse("messages", f"got {short(given)}, expected a list of at least one message")
    messages = [{"role": "system", "content": text}] if (text := _system_text(system)) else []
    for index, message in enumerate(given):
        messages += _message(f"messages[{index}]", message)
    last = messages[-1]
    if last["role"] == "assistant" and not last.get("tool_calls") and last["content"]:
        return messages[:-1], last["content"]
    return messages, None


def tools_of(tools: Sequence[Message] | None) -> list[Message] | None:
    """Return the tools as OpenAI-style functions."""
    return None if tools is None else [_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools)]


def tool_choice_of(choice: Message | None) -> tuple[Any, bool]:
    """Return `tool_choice` in OpenAI's form, and whether several calls are allowed."""
    if choice is None:
        return None, True
    kind = choice.get("type")
    parallel = not choice.get("disable_parallel_tool_use")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}, parallel
    names = {"auto": "auto", "any": "required", "none": "none"}
    if not isinstance(kind, str) or kind not in names:
        raise refuse("tool_choice", f"got {short(choice)}, expected a type of auto, any, tool or none")
    return names[kind], parallel


def thinking_of(thinking: Message | None) -> bool | None:
    """Return whether the model is to think, None where nothing is said."""
    if thinking is None:
        return None
    kind = thinking.get("type")
    if not isinstance(kind, str) or kind not in THINKING:
        raise refuse("thinking", f"got {short(thinking)}, expected a type of {', '.join(THINKING)}")
    return THINKING[kind]


def response_format_of(config: Message | None) -> dict[str, Any] | None:
    """Return `output_config.format` in OpenAI's form; None for text. Raise `ApiError` for one that is no schema."""
    wanted = (config or {}).get("format")
    if wanted is None:
        return None
    if not isinstance(wanted, Mapping) or wanted.get("type") != "json_schema" or "schema" not in wanted:
        raise refuse("output_config.format", f"got {short(wanted)}, expected type json_schema and a schema")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted["schema"]}}


def shows_thoughts(thinking: Message | None) -> bool:
    """Tell whether the client wants to read the thoughts."""
    return thinking is None or thinking.get("display") != "omitted"


def _system_text(system: str | Sequence[Message] | None) -> str:
    if system is None or isinstance(system, str):
        return system or ""
    return "\n".join(_text(f"system[{index}]", block) for index, block in enumerate(system))


def _message(where: str, message: Mapping[str, Any]) -> Iterator[Message]:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise refuse(f"{where}.role", f"got {short(role)}, expected user, assistant or system")
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    if not isinstance(content, list):
        raise refuse(f"{where}.content", f"got {short(content)}, expected text or a list of blocks")
    if role == "assistant":
        yield _assistant(f"{where}.content", content)
    elif role == "system":
        yield {"role": role, "content": "\n".join(_text(f"{where}.content[{i}]", b) for i, b in enumerate(content))}
    else:
        yield from _user(f"{where}.content", content)


def _user(where: str, blocks: Sequence[Any]) -> Iterator[Message]:
    """Yield the tool results of a user message, and what stands between and behind them as user messages."""
    parts: list[Message] = []
    for index, block in enumerate(blocks):
        if isinstance(block, Mapping) and block.get("type") == "tool_result":
            if parts:
                yield {"role": "user", "content": parts}
                parts = []
            yield _tool_result(f"{where}[{index}]", block)
        else:
            parts += _parts(f"{where}[{index}]", block)
    if parts or not blocks:
        yield {"role": "user", "content": parts}


def _tool_result(where: str, block: Mapping[str, Any]) -> Message:
    content = block.get("content")
    if not isinstance(block.get("tool_use_id"), str):
        raise refuse(f"{where}.tool_use_id", f"got {short(block.get('tool_use_id'))}, expected text")
    if content is None or isinstance(content, str):
        parts = [{"type": "text", "text": content or ""}]
    elif isinstance(content, list):
        parts = [part for index, item in enumerate(content) for part in _parts(f"{where}.content[{index}]", item)]
    else:
        raise refuse(f"{where}.content", f"got {short(content)}, expected text or a list of blocks")
    if block.get("is_error"):
        parts = [{"type": "text", "text": ERROR}, *parts]
    if all(part["type"] == "text" for part in parts):
        return {"role": "tool", "tool_call_id": block["tool_use_id"], "content": "".join(p["text"] for p in parts)}
    return {"role": "tool", "tool_call_id": block["tool_use_id"], "content": parts}


def _assistant(where: str, blocks: Sequence[Any]) -> Message:
    """Return one message: thoughts, text and calls are told apart by their fields, not by their order."""
    texts, thoughts, calls = [], [], []
    for index, block in enumerate(blocks):
        here = f"{where}[{index}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "thinking":
            thoughts.append(_string(f"{here}.thinking", block.get("thinking")))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input")}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "text":
            texts.append(_text(here, block))
        elif kind != "redacted_thinking":
            raise refuse(here, f"got a block of type {short(kind)}, expected text, thinking or tool_use")
    message: Message = {"role": "assistant", "content": "".join(texts)}
    if any(thoughts):
        message["reasoning_content"] = "\n".join(filter(None, thoughts))
    return message | ({"tool_calls": calls} if calls else {})


def _parts(where: str, block: Any) -> list[Message]:
    """Return a block of a user message or a tool result as OpenAI-style parts."""
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind == "text":
        return [{"type": "text", "text": _text(where, block)}]
    if kind == "image":
        return [{"type": "image_url", "image_url": {"url": _address(f"{where}.source", block.get("source"))}}]
    if kind == "document":
        return _document(f"{where}.source", block)
    raise refuse(where, f"got a block of type {short(kind)}, expected text, image, document or tool_result")


def _document(where: str, block: Mapping[str, Any]) -> list[Message]:
    """Return the parts of a document that is text or made of blocks, its title and context in front."""
    source = block.get("source")
    kind = source.get("type") if isinstance(source, Mapping) else None
    heading = "".join(f"{block[name]}\n" for name in ("title", "context") if block.get(name))
    front = [{"type": "text", "text": heading}] if heading else []
    if isinstance(source, Mapping) and kind == "text":
        return [*front, {"type": "text", "text": _string(f"{where}.data", source.get("data"))}]
    content = source.get("content") if isinstance(source, Mapping) and kind == "content" else None
    if isinstance(content, str):
        return [*front, {"type": "text", "text": content}]
    if isinstance(content, list):
        return front + [part for i, item in enumerate(content) for part in _parts(f"{where}.content[{i}]", item)]
    raise refuse(where, f"got a document of type {short(kind)}, expected text or content: no other format is read")


def _address(where: str, source: Any) -> str:
    """Return the data URL or address of an image."""
    kind = source.get("type") if isinstance(source, Mapping) else None
    if kind == "base64":
        media_type = _string(f"{where}.media_type", source.get("media_type"))
        return f"data:{media_type};base64,{_string(f'{where}.data', source.get('data'))}"
    if kind == "url":
        return _string(f"{where}.url", source.get("url"))
    raise refuse(where, f"got a source of type {short(kind)}, expected base64 or url")


def _tool(where: str, tool: Mapping[str, Any]) -> Message:
    if (kind := tool.get("type")) not in ("custom", None):
        raise refuse(where, f"got a tool of type {short(kind)}, expected custom: this server runs no tools itself")
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema") or {}}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _text(where: str, block: Any) -> str:
    if not isinstance(block, Mapping) or block.get("type") != "text":
        raise refuse(where, f"got {short(block)}, expected a text block")
    return _string(f"{where}.text", block.get("text"))


def _string(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise refuse(where, f"got {short(value)}, expected text")
    return value
