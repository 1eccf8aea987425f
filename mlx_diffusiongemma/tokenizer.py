"""The checkpoint's own tokenizer and chat template.

Here: a folder -> ids, text, rendered prompts. What messages may look like is in `messages.py`, what generated ids
mean in `output.py`. Every token is looked up by its spelling: the same token has other ids in other checkpoints.

The Rust `tokenizers` and Jinja's sandbox do the work, with the settings that transformers' `render_jinja_template` uses
(an oracle test compares the two). `AutoTokenizer` is not used: it loads PyTorch wherever PyTorch is installed, which
costs seconds, and this file costs 0.1 s. mlx-lm's detokenizers are not used because they eat a leading space.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

REPLACEMENT = "\ufffd"  # what detokenizing gives for bytes that are not UTF-8 (yet)
MAX_PARTIAL = 3  # tokens that an unfinished UTF-8 character can span: three of its four bytes, one byte each
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # how a vocabulary with byte fallback spells one byte
TEMPLATE_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")  # variables that templates may name


def _token(spelling: str) -> Any:
    return field(default=None, metadata={"spelling": spelling})


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of Gemma 4's control tokens, found by spelling; None where the tokenizer lacks one."""

    pad: int | None = _token("<pad>")
    bos: int | None = _token("<bos>")
    eos: int | None = _token("<eos>")
    unk: int | None = _token("<unk>")
    mask: int | None = _token("<mask>")
    turn_open: int | None = _token("<|turn>")
    turn_close: int | None = _token("<turn|>")
    channel_open: int | None = _token("<|channel>")
    channel_close: int | None = _token("<channel|>")
    think: int | None = _token("<|think|>")
    tool_open: int | None = _token("<|tool>")
    tool_close: int | None = _token("<tool|>")
    tool_call_open: int | None = _token("<|tool_call>")
    tool_call_close: int | None = _token("<tool_call|>")
    tool_response_open: int | None = _token("<|tool_response>")
    tool_response_close: int | None = _token("<tool_response|>")
    quote: int | None = _token('<|"|>')
    boi: int | None = _token("<|image>")
    image: int | None = _token("<|image|>")
    eoi: int | None = _token("<image|>")
    boa: int | None = _token("<|audio>")
    audio: int | None = _token("<|audio|>")
    eoa: int | None = _token("<audio|>")
    video: int | None = _token("<|video|>")

    @classmethod
    def find(cls, token_to_id: Callable[[str], int | None]) -> SpecialTokens:
        """Look every spelling up with `token_to_id`."""
        return cls(**{name: token_to_id(spelling) for name, spelling in SPELLINGS.items()})


SPELLINGS: dict[str, str] = {item.name: item.metadata["spelling"] for item in fields(SpecialTokens)}


class Tokenizer:
    """Text to ids and back, and the chat template. Never adds BOS: the template writes it.

    `backend` is a `tokenizers.Tokenizer`; `chat_template` Jinja source or None; `template_variables` what the template
    may name besides the messages (`bos_token` and the like; by default the spellings that the vocabulary has).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        chat_template: str | None = None,
        template_variables: Mapping[str, str] | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._encoding = (
            threading.RLock()
        )  # the backend has one setting for all threads, which `encode_letters` changes
        self.chat_template = chat_template
        self.special = SpecialTokens.find(backend.token_to_id)
        self.vocab_size = int(backend.get_vocab_size(with_added_tokens=True))
        added = backend.get_added_tokens_decoder()
        self.largest_id = max([backend.get_vocab_size(with_added_tokens=False) - 1, *added])
        marked = {token_id for token_id, token in added.items() if token.special}
        self.all_special_ids = frozenset(marked | {i for i in vars(self.special).values() if i is not None})
        found = {name: SPELLINGS[name[:-6]] for name in TEMPLATE_TOKENS if getattr(self.special, name[:-6]) is not None}
        self._variables = {**found, **(template_variables or {})}

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read `tokenizer.json`, `tokenizer_config.json` and the chat template of a checkpoint folder.

        The template is `chat_template.jinja`, else the key `chat_template` of `tokenizer_config.json` or of
        `chat_template.json`. A folder without one loads: `chat_template` is None then, and `render` refuses.
        Raises ValueError naming the folder or file that is missing or unreadable.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"tokenizer folder {folder} does not exist")
        config = _read_json(folder / "tokenizer_config.json")
        spelled = {name: _spelling(config.get(name)) for name in TEMPLATE_TOKENS}
        return cls(
            _read_backend(folder / "tokenizer.json"),
            chat_template=_read_template(folder, config),
            template_variables={name: text for name, text in spelled.items() if text is not None},
        )

    def to_json(self) -> str:
        """Return the text of the `tokenizer.json` that this tokenizer works by."""
        return str(self._backend.to_str())

    @property
    def bos_token(self) -> str | None:
        """Spelling of the BOS token, None if the tokenizer has none."""
        return None if self.special.bos is None else SPELLINGS["bos"]

    @cached_property
    def longest_token(self) -> int:
        """Characters in the spelling of the longest token: n tokens are no more than n times as many characters."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    def encode(self, text: str) -> list[int]:
        """Turn text into ids, control tokens by their spelling, nothing added. Raises ValueError on lone surrogates."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            bad = text[error.start]
            raise ValueError(f"text is not valid Unicode: lone surrogate {bad!r} at character {error.start}") from None
        with self._encoding:
            # A batch, because that gives up Python's lock: a long text would hold up all threads for seconds.
            [encoded] = self._backend.encode_batch([text], add_special_tokens=False)
            return list(encoded.ids)

    def encode_letters(self, text: str) -> list[int]:
        """Turn text into ids, the spelling of a control token into those of its letters."""
        with self._encoding:
            self._backend.encode_special_tokens = True
            try:
                return self.encode(text)
            finally:
                self._backend.encode_special_tokens = False

    def detokenize(self, ids: Iterable[int]) -> str:
        """Turn ids into text with control tokens as they are spelled; ids outside the vocabulary give nothing."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token stands for: perhaps a part of a character only; none for an unknown id."""
        spelling = self._backend.id_to_token(token_id)
        if spelling is None:
            return b""
        if byte := BYTE_TOKEN.fullmatch(spelling):
            return bytes([int(byte[1], 16)])
        if isinstance(self._backend.decoder, tokenizers.decoders.ByteLevel) and token_id not in self.all_special_ids:
            return bytes(_byte_of_letter()[letter] for letter in spelling)
        return self.detokenize([token_id]).encode()

    def detokenizer(self) -> Detokenizer:
        """Make a fresh incremental detokenizer (mlx-lm's `StreamingDetokenizer` interface)."""
        return Detokenizer(self)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool = False,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> str:
        """Render messages with the chat template as it stands; `prompt.build_prompt` also works round its defects.

        The template sees plain JSON data only. Raises ValueError without a template, on data that is not plain JSON,
        and when the template refuses.
        """
        if self.chat_template is None:
            raise ValueError("this checkpoint has no chat template; give the prompt as raw text instead")
        data = {"messages": list(messages), "tools": None if tools is None else list(tools), **template_kwargs}
        try:
            plain = json.loads(json.dumps(data))  # a copy: the sandbox cannot judge the methods of foreign objects
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"messages, tools and template arguments must be plain JSON data: {error}") from None
        plain |= {"enable_thinking": enable_thinking, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(self._variables | {"documents": None} | plain)
        # A template is a program: on messages that it does not expect it raises whatever Python raises there.
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template cannot render these messages: {error}") from error

    @cached_property
    def _template(self) -> Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        try:
            return environment.from_string(self.chat_template or "")
        except TemplateError as error:
            raise ValueError(f"the chat template is not valid Jinja: {error}") from error


class Detokenizer:
    """Ids in, finished characters out: bytes of an unfinished UTF-8 character wait for the rest of it.

    Attributes: `tokens`, every id added; `text`, what is finished so far; `last_segment`, what is new since last asked.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.tokens: list[int] = []
        self.text = ""
        self.offset = 0
        self._pending: list[int] = []

    def add_token(self, token_id: int) -> None:
        """Take one id."""
        self.tokens.append(token_id)
        self._pending.append(token_id)
        text = self._tokenizer.detokenize(self._pending)
        if not text.endswith(REPLACEMENT):
            self.text += text
            self._pending.clear()
        elif len(self._pending) > 2 * MAX_PARTIAL:  # broken bytes: keep only what may belong to the last character
            self.text += self._tokenizer.detokenize(self._pending[:-MAX_PARTIAL])
            del self._pending[:-MAX_PARTIAL]

    def finalize(self) -> None:
        """Let go of what waits, without the unfinished character at its end."""
        text = self._tokenizer.detokenize(self._pending)
        meant = self._tokenizer.encode(text) == self._pending  # the model wrote U+FFFD itself
        if text.endswith(REPLACEMENT) and not meant:
            text = text.rstrip(REPLACEMENT)
        self.text += text
        self._pending.clear()

    @property
    def has_pending(self) -> bool:
        """Whether ids wait for the rest of their character."""
        return bool(self._pending)

    @property
    def last_segment(self) -> str:
        """Text finished since this property was last read."""
        segment = self.text[self.offset :]
        self.offset = len(self.text)
        return segment


class _GenerationBlock(Extension):
    """`{% generation %} ... {% endgeneration %}`, a training mark in some templates, renders as its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as a set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _byte_of_letter() -> dict[str, int]:
    """Return the byte of each letter of a byte-level vocabulary: printable ones themselves, others in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)  # Jinja's own escapes HTML


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} when the file is missing."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.exists():
        raise ValueError(f"{path.parent} has no {path.name}; a checkpoint folder must contain its tokenizer")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises plain Exception, nothing narrower
        raise ValueError(f"{path} is not a readable tokenizer: {error}") from error


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    source = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(source, list):  # several named ones: [{"name": "default", "template": "..."}, ...]
        source = {item["name"]: item["template"] for item in source}.get("default")
    if source is not None and not isinstance(source, str):
        raise ValueError(f"{folder}: chat_template must be text, got {type(source).__name__}")
    return source


def _spelling(value: Any) -> str | None:
    """Spelling of a token in tokenizer_config.json: plain text, or the `content` of an object."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
