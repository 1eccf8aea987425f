"""Messages, images and videos -> Prompt, with the defects of chat templates worked round.

Here: that generation always starts inside an open model turn. What messages may look like is in `messages.py`, where
their images come from in `parts.py`, where those stand among the ids in `placeholders.py`; the template itself is
rendered in `tokenizer.py`. Google's two published templates go wrong on (each has a named test):

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

from .media import ImageBlock, Sight, read_media
from .messages import check_messages, check_tool, fold, model_text, refuse_blank
from .parts import KINDS, Message, as_list, match_placeholders, take_media
from .placeholders import CONTROL, EncodedPrompt, Typed, encode_prompt, placeholder_kinds
from .placeholders import RESERVED as RESERVED_FOR_MEDIA
from .tokenizer import SPELLINGS, Tokenizer

RESERVED = ("messages", "tools", "add_generation_prompt")
OPEN_THOUGHT = SPELLINGS["channel_open"] + "thought\n"
SYSTEM_TURN = SPELLINGS["turn_open"] + "system\n"
MODEL_TURN = SPELLINGS["turn_open"] + "model\n"
END_OF_TURN = SPELLINGS["turn_close"] + "\n"
NOT_RENDERED = ("role", "type", "id", "tool_call_id")
USUAL_LONGEST = 16  # characters of a token: only for longer texts is the longest looked for, which takes a while


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for prefill.

    `text` is the rendered text and `token_ids` its L ids, BOS included. `thinking_open` says that generation starts
    inside a thought whose opening is part of the prompt. `blocks` has every image and every frame of a video, in order.
    `system_tokens` of the ids, BOS included, are the system turn, which other conversations may share; 0 without one.
    """

    text: str
    token_ids: tuple[int, ...]
    thinking_open: bool
    blocks: tuple[ImageBlock, ...] = ()
    system_tokens: int = 0


def build_prompt(
    tokenizer: Tokenizer,
    messages: str | Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool = False,
    prefill_response: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    raw: bool = False,
    literal: bool = False,
    images: Any = None,
    videos: Any = None,
    sight: Sight | None = None,
    max_prompt_tokens: int | None = None,
) -> Prompt:
    """Turn a string (one user message) or OpenAI-style messages into a prompt that ends where the answer begins.

    Args:
        tokenizer: of the checkpoint.
        messages: content is text or a list of parts: text, images, videos. Parts name no files (see `parts.py`).
        tools: OpenAI tools or bare function objects.
        enable_thinking: lets the model think first; among `template_kwargs` it wins over this one.
        prefill_response: the beginning of the answer, appended as it is.
        template_kwargs: for the template.
        raw: the string is encoded as it is, with BOS in front if it lacks one; <|image|> and <|video|> in it are
            placeholders.
        literal: every control token that is spelled in messages, tools and the prefilled answer is text, not only those
            of media: for messages that strangers write.
        images: files, bytes, data URLs or Pillow images. They fill the image parts that have no content, in order;
            where no message has an image part, they go in front of the last user message's text.
        videos: the same for videos: files, bytes, data URLs or lists of frames with times.
        sight: how images and videos are read; None for a model that cannot see.
        max_prompt_tokens: a text that must have more is refused before it is encoded, which would take long.

    Raises:
        ValueError: names the message, and says what was got and expected.
    """
    prefill = _prefill(prefill_response)
    given = {kind: as_list(kind, value) for kind, value in zip(KINDS, (images, videos), strict=True)}
    sight = sight or Sight()
    if raw:
        text = _raw_text(tokenizer, messages, tools) + prefill
        _refuse_too_long(tokenizer, text, max_prompt_tokens)
        media = read_media(match_placeholders(placeholder_kinds(text), given), sight)
        return _finish(tokenizer, encode_prompt(tokenizer, text, media))
    options: dict[str, Any] = {"enable_thinking": enable_thinking, **(template_kwargs or {})}
    if clash := sorted(set(RESERVED) & set(options)):
        raise ValueError(f"template_kwargs must not contain {clash[0]!r}: it has an argument of its own")
    chat, sources = take_media(fold(check_messages(messages, may_be_blank=any(given.values()))), given)
    if tools is not None and not isinstance(tools, list | tuple):
        raise ValueError(f"tools: got {type(tools).__name__}, expected a list of tools")
    declared = [check_tool(i, tool) for i, tool in enumerate(tools or ())]
    _refuse_too_long(tokenizer, [chat, declared, prefill], max_prompt_tokens)
    if literal:
        chat = [_without_thoughts(message) for message in chat]
    typed = Typed(chat, declared, options, prefill, reserved=CONTROL if literal else RESERVED_FOR_MEDIA)
    text = _render(tokenizer, typed.hide(chat), typed.hide(declared), typed.hide(options))
    if prefill and text.endswith(OPEN_THOUGHT):  # the caller begins the answer himself: no thought is open before it
        text = text.removesuffix(OPEN_THOUGHT)
    return _finish(tokenizer, encode_prompt(tokenizer, text + typed.hide(prefill), read_media(sources, sight), typed))


def _refuse_too_long(tokenizer: Tokenizer, texts: Any, max_tokens: int | None) -> None:
    """Raise `ValueError` for text in lists and mappings that is too long, whatever tokens it becomes."""
    got = 0 if max_tokens is None else _characters(texts)
    if max_tokens is None or got <= max_tokens * USUAL_LONGEST or got <= max_tokens * tokenizer.longest_token:
        return
    least = -(-got // tokenizer.longest_token)
    raise ValueError(f"the prompt has {least} tokens or more; expected at most {max_tokens}")


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_characters(item) for key, item in value.items() if key not in NOT_RENDERED)
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 0


def _without_thoughts(message: Message) -> Message:
    """Take the thoughts out of an assistant's text, as the template would where it still saw their markers."""
    marked = any(SPELLINGS[name] in json.dumps(message["content"]) for name in ("channel_open", "channel_close"))
    return (
        {**message, "content": model_text(message["content"])} if message["role"] == "assistant" and marked else message
    )


def _prefill(prefill_response: str | None) -> str:
    if prefill_response is not None and not isinstance(prefill_response, str):
        raise ValueError(f"prefill_response must be text, got {type(prefill_response).__name__}")
    return prefill_response or ""


def _raw_text(tokenizer: Tokenizer, text: Any, tools: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"a raw prompt must be one string, got {type(text).__name__}")
    if tools:
        raise ValueError("tools need the chat template; a raw prompt takes none")
    refuse_blank(text)
    bos = tokenizer.bos_token
    return text if bos is None or text.startswith(bos) else bos + text


def _finish(tokenizer: Tokenizer, encoded: EncodedPrompt) -> Prompt:
    text, token_ids, blocks = encoded
    system_tokens = _system_tokens(tokenizer, text, token_ids)
    return Prompt(text, token_ids, _thinking_open(tokenizer, token_ids), blocks, system_tokens)


def _system_tokens(tokenizer: Tokenizer, text: str, token_ids: Sequence[int]) -> int:
    """Count the ids up to the second turn, if the first is the system's."""
    if not text.removeprefix(tokenizer.bos_token or "").startswith(SYSTEM_TURN):
        return 0
    turns = [index for index, token_id in enumerate(token_ids) if token_id == tokenizer.special.turn_open]
    return turns[1] if len(turns) > 1 else 0


def _thinking_open(tokenizer: Tokenizer, token_ids: Sequence[int]) -> bool:
    """Say whether the last turn has a channel that is opened and not closed."""
    special = tokenizer.special
    for token_id in reversed(token_ids):
        if token_id == special.channel_open:
            return True
        if token_id in (special.channel_close, special.turn_open, special.turn_close):
            return False
    return False


def _render(tokenizer: Tokenizer, chat: list[Message], tools: list[Message], options: Mapping[str, Any]) -> str:
    """Render, with stand-ins for what templates print wrongly, and end inside a model turn.

    A None among arguments becomes a number that occurs nowhere else, replaced by `null` in the rendered text. Text
    beside a tool call is taken out and a mark put before the call's name: `call:text-before-call-0:get_weather`
    becomes `<the text><|tool_call>call:get_weather`, the order in which the model wrote it.
    """
    dump = json.dumps(chat, default=str)
    null, mark = 7046029254386353131, "text-before-call-"
    while str(null) in dump:
        null += 1
    while mark in dump:
        mark += "x-"
    texts: list[str] = []  # of messages that also call tools: they belong before the first call
    for index, message in enumerate(chat):
        calls, responses = message.get("tool_calls"), message.get("tool_responses")
        text = model_text(message["content"]) if calls and not responses else ""
        if calls:
            message = {**message, "tool_calls": _marked(calls, f"{mark}{len(texts)}:" if text else "", null)}
        if responses:
            message = {**message, "tool_responses": _without_none(responses, null)}
        chat[index] = {**message, "content": ""} if text else message
        texts += [text] if text else []
    rendered = tokenizer.render(chat, tools=tools or None, **options).replace(str(null), "null")
    call = SPELLINGS["tool_call_open"] + "call:"
    rendered = re.sub(re.escape(call + mark) + r"(\d+):", lambda match: texts[int(match[1])] + call, rendered)
    rendered = re.sub(re.escape(mark) + r"\d+:", "", rendered)
    return rendered if tokenizer.special.turn_open is None else _in_model_turn(_mend_turns(rendered))


def _marked(calls: Sequence[Message], mark: str, null: int) -> list[Message]:
    """Put a mark before the first call's name, and a number for every None among the arguments."""
    marked = []
    for index, call in enumerate(calls):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        function = {"name": name if index else mark + name, "arguments": _without_none(arguments, null)}
        marked.append({**call, "function": function})
    return marked


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
