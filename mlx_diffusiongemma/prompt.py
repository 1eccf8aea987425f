"""Messages -> Prompt: validation, the chat template, and the template defects worked round.

Here: what messages and tools may look like, and that generation always starts inside an open model turn. The template
itself is rendered in `tokenizer.py`. Google's two published templates go wrong on (each has a test of that name):

- an assistant message with text and tool calls: the text comes after the results and the turn is closed;
- an answer after a tool result (newer template): a second turn header inside the open turn;
- a user message right after a tool result (older template): the model turn is never closed;
- two assistant messages in a row (older template): the second lies outside any turn;
- None among the arguments (older template): printed as Python's `None`, not `null`;
- arguments as a JSON string, and objects as tool results: refused, or printed with double braces;
- tool parameters without a type: a brace is missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .tokenizer import SPELLINGS, Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
MEDIA = ("image", "image_url", "input_image", "video", "video_url", "audio", "input_audio")
RESERVED = ("messages", "tools", "add_generation_prompt")
THOUGHT = SPELLINGS["channel_open"] + "thought\n"
MODEL_TURN = SPELLINGS["turn_open"] + "model\n"
END_OF_TURN = SPELLINGS["turn_close"] + "\n"

Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for prefill.

    `text` is the rendered text and `token_ids` its L ids, BOS included. `thinking_open` says that generation starts
    inside a thought whose opening is part of the prompt.
    """

    text: str
    token_ids: tuple[int, ...]
    thinking_open: bool


def build_prompt(
    tokenizer: Tokenizer,
    messages: str | Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool = False,
    prefill_response: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    raw: bool = False,
) -> Prompt:
    """Turn a string (one user message) or OpenAI-style messages into a prompt that ends where the answer begins.

    `tools` are OpenAI tools or bare function objects. `prefill_response` is the beginning of the answer, appended as it
    is. `template_kwargs` go to the template; `enable_thinking` among them wins over the argument. With `raw` the string
    is encoded as it is, with BOS in front if it lacks one. Raises ValueError naming the message and what was expected.
    """
    prefill = _prefill(prefill_response)
    if raw:
        return _encode(tokenizer, _raw_text(tokenizer, messages, tools) + prefill)
    options: dict[str, Any] = {"enable_thinking": enable_thinking, **(template_kwargs or {})}
    if clash := sorted(set(RESERVED) & set(options)):
        raise ValueError(f"template_kwargs must not contain {clash[0]!r}: it has an argument of its own")
    chat = _fold(_check_messages(messages))
    text = _render(tokenizer, chat, [_check_tool(i, tool) for i, tool in enumerate(tools or ())], options)
    if prefill and text.endswith(THOUGHT):  # the caller begins the answer himself: no thought is open before it
        text = text.removesuffix(THOUGHT)
    return _encode(tokenizer, text + prefill)


def _prefill(prefill_response: str | None) -> str:
    if prefill_response is not None and not isinstance(prefill_response, str):
        raise ValueError(f"prefill_response must be text, got {type(prefill_response).__name__}")
    return prefill_response or ""


def _raw_text(tokenizer: Tokenizer, text: Any, tools: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"a raw prompt must be one string, got {type(text).__name__}")
    if tools:
        raise ValueError("tools need the chat template; a raw prompt takes none")
    _refuse_blank(text)
    bos = tokenizer.bos_token
    return text if bos is None or text.startswith(bos) else bos + text


def _encode(tokenizer: Tokenizer, text: str) -> Prompt:
    token_ids = tuple(tokenizer.encode(text))
    return Prompt(text=text, token_ids=token_ids, thinking_open=_thinking_open(tokenizer, token_ids))


def _thinking_open(tokenizer: Tokenizer, token_ids: Sequence[int]) -> bool:
    """Say whether the last turn has a channel that is opened and not closed."""
    special = tokenizer.special
    for token_id in reversed(token_ids):
        if token_id == special.channel_open:
            return True
        if token_id in (special.channel_close, special.turn_open, special.turn_close):
            return False
    return False


# --- validation -----------------------------------------------------------------------------------------------------


def _refuse_blank(text: str) -> None:
    if not text.strip():
        raise ValueError(f"the prompt is empty: got {text[:20]!r}, expected some text")


def _check_messages(messages: Any) -> list[Message]:
    if isinstance(messages, str):
        _refuse_blank(messages)
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a string or a list of messages, got {type(messages).__name__}")
    if not messages:
        raise ValueError("the prompt is empty: got no messages, expected at least one")
    checked = [_check_message(f"messages[{index}]", message) for index, message in enumerate(messages)]
    if not any(message.get("tool_calls") or _plain_text(message.get("content")).strip() for message in checked):
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
        return [_check_part(f"{where}[{index}]", part) for index, part in enumerate(content)]
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


def _check_part(where: str, part: Any) -> Message:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in MEDIA:
        raise ValueError(f"{where}: {kind} parts are not supported yet by this version, only text")
    if kind != "text":
        raise ValueError(f'{where} must be a part like {{"type": "text", "text": "..."}}, got {part!r}')
    return {"type": "text", "text": _check_text(f"{where}.text", part.get("text"))}


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


def _check_tool(index: int, tool: Any) -> Message:
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


# --- one conversation that every template renders well --------------------------------------------------------------


def _fold(messages: Sequence[Message]) -> list[Message]:
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
    merged["content"] = _model_text(first["content"]) + _model_text(second["content"])
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
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())


def _model_text(content: Any) -> str:
    """Text of an assistant message without its thoughts, as the templates show it."""
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    opening, closing = SPELLINGS["channel_open"], SPELLINGS["channel_close"]
    return "".join("".join(piece.split(opening)[0] for piece in text.split(closing)).strip() for text in texts)


# --- rendering ------------------------------------------------------------------------------------------------------


def _render(tokenizer: Tokenizer, chat: list[Message], tools: list[Message], options: Mapping[str, Any]) -> str:
    """Render, with stand-ins for what templates print wrongly, and end inside a model turn."""
    dump = json.dumps(chat, default=str)
    null, mark = 7046029254386353131, "text-before-call-"
    while str(null) in dump:
        null += 1
    while mark in dump:
        mark += "x-"
    texts: list[str] = []  # of assistant messages that also call tools: they belong before the first call
    for index, message in enumerate(chat):
        if message.get("tool_responses"):
            chat[index] = {**message, "tool_responses": _without_none(message["tool_responses"], null)}
        elif message.get("tool_calls"):
            text = _model_text(message["content"])
            chat[index] = _stand_in(message, f"{mark}{len(texts)}:" if text else "", null)
            texts += [text] if text else []
    rendered = tokenizer.render(chat, tools=tools or None, **options).replace(str(null), "null")
    call = SPELLINGS["tool_call_open"] + "call:"
    rendered = re.sub(re.escape(call + mark) + r"(\d+):", lambda match: texts[int(match[1])] + call, rendered)
    rendered = re.sub(re.escape(mark) + r"\d+:", "", rendered)
    return rendered if tokenizer.special.turn_open is None else _in_model_turn(_mend_turns(rendered))


def _stand_in(message: Message, mark: str, null: int) -> Message:
    """Move the text of a message with calls into a mark on the first call's name, and None into a number."""
    calls = []
    for index, call in enumerate(message["tool_calls"]):
        function = call["function"]
        name = (mark if index == 0 else "") + function["name"]
        calls.append({**call, "function": {"name": name, "arguments": _without_none(function["arguments"], null)}})
    return {**message, "content": "", "tool_calls": calls}


def _without_none(value: Any, null: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item, null) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_none(item, null) for item in value]
    return null if value is None else value


def _mend_turns(text: str) -> str:
    """After a tool result: no second header when the model goes on, an end of turn when somebody else does."""
    result = re.escape(SPELLINGS["tool_response_close"])
    text = re.sub(f"({result}){re.escape(MODEL_TURN)}", r"\1", text)
    return re.sub(f"({result})(?={re.escape(SPELLINGS['turn_open'])})", lambda match: match[1] + END_OF_TURN, text)


def _in_model_turn(text: str) -> str:
    """Open a model turn if the text does not end in one."""
    opened, closed = text.rfind(SPELLINGS["turn_open"]), text.rfind(SPELLINGS["turn_close"])
    if opened == closed == -1 or (opened > closed and text.startswith(MODEL_TURN, opened)):
        return text
    return text + (END_OF_TURN if opened > closed else "") + MODEL_TURN
