"""What an answer must look like: a JSON schema, a regular expression, a Lark grammar, a list of choices, a tool call.

A `Grammar` is a value: text that llguidance compiles, checked when it is made, without a tokenizer and without a model.
How it steers a canvas is in `constraint.py`, how a tool call is spelled in `tool_grammar.py`.

JSON is written as `json.dumps` writes it, on one line with ", " and ": " between: where white space is free, nothing
between two values is certain, and every bracket and key that is certain can be fixed before the first step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .schemas import MAX_DEPTH, guaranteed, nesting
from .tool_grammar import tool_call_grammar

Kind = Literal["json_object", "json_schema", "regex", "lark", "choices", "tool_calls"]

MAX_SOURCE = 1 << 20  # characters of a schema, a grammar or a list of choices; more than this compiles for seconds
JSON_STYLE: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,  # what it cannot guarantee is an error, whatever the schema's own "x-guidance" says
    "coerce_one_of": False,
}


@dataclass(frozen=True)
class Grammar:
    """A constraint on an answer. Two are equal when they allow the same for the same reason.

    Attributes:
        kind: what it was made from.
        source: in llguidance's serialised form; names control tokens by spelling, so it fits every tokenizer.
    """

    kind: Kind
    source: str = field(repr=False)

    def __post_init__(self) -> None:
        limit_size(self.kind, self.source)
        if error := _complaint(self.source):
            raise ValueError(f"{self.kind.replace('_', ' ')} cannot be used: {error}")

    @classmethod
    def from_response_format(cls, response_format: Mapping[str, Any]) -> Grammar | None:
        """Read OpenAI's `response_format`; None for plain text.

        Raises:
            ValueError: neither text, json_object nor json_schema, or a schema that `from_json_schema` refuses.
        """
        kind = response_format.get("type") if isinstance(response_format, Mapping) else response_format
        if kind == "text":
            return None
        if kind == "json_object":
            return cls.from_json_object()
        if kind != "json_schema":
            raise ValueError(f"response_format type must be text, json_object or json_schema, got {kind!r}")
        inner = response_format.get("json_schema")
        if not isinstance(inner, Mapping) or "schema" not in inner:
            raise ValueError(f"response_format json_schema must be an object with a schema, got {inner!r:.80}")
        return cls.from_json_schema(inner["schema"])

    @classmethod
    def from_json_object(cls) -> Grammar:
        """Allow any JSON object."""
        return cls("json_object", _json_source({"type": "object"}))

    @classmethod
    def from_json_schema(cls, schema: Mapping[str, Any] | bool) -> Grammar:
        """Allow the JSON values that a JSON schema allows.

        Raises:
            ValueError: not a schema, unsatisfiable, too large, or with a keyword that cannot be guaranteed.
        """
        if not isinstance(schema, Mapping | bool):
            raise ValueError(f"a JSON schema must be an object or a boolean, got {type(schema).__name__}")
        if nesting(schema) > MAX_DEPTH:
            raise ValueError(f"a JSON schema may be nested {MAX_DEPTH} deep, got more")
        return cls("json_schema", _json_source(schema))

    @classmethod
    def from_regex(cls, pattern: str) -> Grammar:
        """Allow the texts that a regular expression matches from end to end (Rust's syntax, no look-around)."""
        from llguidance import LLMatcher

        _require_text("regex", pattern)
        return cls("regex", LLMatcher.grammar_from_regex(pattern))

    @classmethod
    def from_lark(cls, text: str) -> Grammar:
        """Allow what a context-free grammar derives from `start` (llguidance's dialect of Lark)."""
        from llguidance import LLMatcher

        _require_text("lark", text)
        return cls("lark", LLMatcher.grammar_from_lark(text))

    @classmethod
    def from_choices(cls, choices: Sequence[str]) -> Grammar:
        """Allow exactly the given texts."""
        from llguidance import LLMatcher

        if not isinstance(choices, list | tuple) or not choices or not all(isinstance(each, str) for each in choices):
            raise ValueError(f"choices must be one or more strings, got {choices!r:.80}")
        for choice in choices:
            _require_text("a choice", choice)
        # A terminal, not a rule: the parser keeps every alternative of a rule apart, and has a limit.
        texts = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in dict.fromkeys(choices))
        lark = f"start: CHOICE\nCHOICE: {texts}\n"
        return cls("choices", LLMatcher.grammar_from_lark(lark))

    @classmethod
    def from_tools(cls, tools: Sequence[Mapping[str, Any]], name: str | None = None, parallel: bool = True) -> Grammar:
        """Demand calls of the given tools (OpenAI's form), with arguments that fit the tool's schema.

        `name` allows that tool only; `parallel` allows several calls, one behind the other.

        Raises:
            ValueError: no tool, no tool of that name, or parameters with a keyword that cannot be guaranteed.
        """
        from llguidance import LLMatcher

        return cls("tool_calls", LLMatcher.grammar_from_lark(tool_call_grammar(tools, name, parallel)))


def limit_size(what: str, text: str) -> None:
    """Raise ValueError if a source text is too long to compile."""
    if len(text) > MAX_SOURCE:
        raise ValueError(f"{what} may have {MAX_SOURCE} characters, got {len(text)}")


def one_line(error: str) -> str:
    """Return an error of llguidance as one line, without its excerpt of the source."""
    error = error.replace("<non-verbose/>", "").replace("<state>", "\n<state>")
    lines = [line.strip() for line in error.splitlines()]
    kept = [line for line in lines[: lines.index("<state>") if "<state>" in lines else None] if line]
    return " ".join(kept)[:300]


def _require_text(what: str, text: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{what} must be text, got {type(text).__name__}")
    limit_size(what, text)
    if bad := next((letter for letter in text if "\ud800" <= letter <= "\udfff"), None):
        raise ValueError(f"{what} is not valid Unicode: lone surrogate {bad!r}")


def _json_source(schema: Mapping[str, Any] | bool) -> str:
    from llguidance import LLMatcher

    try:
        text = json.dumps({"allOf": [schema]} if isinstance(schema, bool) else schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a JSON schema must be plain JSON data: {error}") from None
    limit_size("a JSON schema", text)
    return LLMatcher.grammar_from_json_schema(json.dumps(guaranteed(json.loads(text))), overrides=JSON_STYLE)


def _complaint(source: str) -> str:
    """Return why llguidance refuses a grammar, or nothing."""
    from llguidance import LLMatcher

    wrong, messages = LLMatcher.validate_grammar_with_warnings(source)
    return one_line(messages[0]) if wrong else ""
