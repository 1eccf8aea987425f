"""A tool's JSON schema -> a Lark grammar of calls to it, in the spelling that Gemma 4 was trained on.

    <|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>

Keys are bare and sorted as the chat template sorts them (Jinja's `dictsort`), strings stand between quote tokens;
`tool_calls.py` reads it back. The grammar may allow less than the schema (a fixed order of keys, only keys that the
schema speaks of, numbers of at most 15 digits) but never more: a keyword that it cannot guarantee is an error that
names it. The regular expressions of strings are made in `patterns.py`, schemas are joined in `schemas.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .patterns import text_terminal
from .schemas import (
    ANNOTATIONS,
    MAX_DEPTH,
    Schema,
    check_keywords,
    check_multiple,
    is_type,
    join,
    nesting,
    resolve,
    same,
    type_of,
)
from .tool_calls import QUOTE

NAME = re.compile(r"[\w.-]{1,128}", re.ASCII)
# What the parser can tell apart without quotes; other keys are written between quote tokens.
BARE_KEY = re.compile(r'[^\s{}\[\],:"<\0](?:[^{}\[\],:"<\n\0]*[^\s{}\[\],:"<\0])?')
OTHER_KEY = "[A-Za-z_][A-Za-z0-9_]{0,63}"
LARGEST = 10**15 - 1  # a float holds 15 decimal digits exactly
NUMBER = r"/-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?/"
INTEGER = "/0|-?[1-9][0-9]{0,14}/"
MAX_RULES = 50_000
MAX_JOINS = 1000  # of schemas, while one alternative is worked out: a reference may go in circles

BOUNDS = frozenset("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split())
KEYWORDS = {
    "object": frozenset("properties required additionalProperties minProperties maxProperties".split()),
    "array": frozenset("items prefixItems minItems maxItems uniqueItems".split()),
    "string": frozenset("minLength maxLength pattern format".split()),
    "number": BOUNDS,
    "integer": BOUNDS,
    "boolean": frozenset[str](),
    "null": frozenset[str](),
}
GENERAL = frozenset("type enum const anyOf oneOf allOf $ref".split())
KNOWN = ANNOTATIONS | GENERAL | frozenset().union(*KEYWORDS.values())

Alternative = list[str]  # symbols: names of rules, and anything else that Lark takes


def tool_call_grammar(tools: Sequence[Mapping[str, Any]], name: str | None = None, parallel: bool = True) -> str:
    """Return a Lark grammar of one call, or of several in a row, to the given tools or to the one that is named.

    Raises:
        ValueError: no tools, an unknown name, or parameters that the grammar cannot guarantee.
    """
    functions = [tool.get("function", tool) if isinstance(tool, Mapping) else tool for tool in tools]
    if wrong := [function for function in functions if not isinstance(function, Mapping)]:
        raise ValueError(f"a tool must be an object with a function, got {wrong[0]!r:.80}")
    chosen = [function for function in functions if name is None or function.get("name") == name]
    if not chosen:
        known = ", ".join(repr(function.get("name")) for function in functions)
        raise ValueError(f"no tool to call: got {name!r}, known are {known or 'none'}")
    rules = _Rules()
    calls = []
    for function in chosen:
        if not isinstance(function.get("name"), str) or not NAME.fullmatch(function["name"]):
            raise ValueError(f"a tool's name must be letters, digits, _, - and ., got {function.get('name')!r:.80}")
        try:
            arguments = _Arguments(rules, function.get("parameters") or {"type": "object"}).root()
        except ValueError as error:
            raise ValueError(f"parameters of tool {function['name']!r}: {error}") from None
        if not rules.is_productive(arguments):
            raise ValueError(f"parameters of tool {function['name']!r}: no arguments satisfy them")
        calls.append(f"{_text(function['name'])} {arguments}")
    several = "+" if parallel else ""
    return f'start: call{several}\ncall: <|tool_call> "call:" ({" | ".join(calls)}) <tool_call|>\n{rules.text()}'


class _Rules:
    """The rules of a grammar. A rule whose every alternative needs itself derives nothing, and is left out."""

    def __init__(self) -> None:
        self._rules: dict[str, list[Alternative]] = {}
        self._terminals: dict[str, str] = {}

    def name(self) -> str:
        """Return a name for a rule that is defined later."""
        if len(self._rules) >= MAX_RULES:
            raise ValueError(f"the schema is too large: more than {MAX_RULES} rules")
        name = f"r{len(self._rules)}"
        self._rules[name] = []
        return name

    def define(self, name: str, alternatives: Iterable[Alternative]) -> str:
        """Say what a rule derives."""
        self._rules[name] = list(alternatives)
        return name

    def add(self, alternatives: Iterable[Alternative]) -> str:
        """Make a rule."""
        return self.define(self.name(), alternatives)

    def terminal(self, body: str) -> str:
        """Make a terminal, or return the one with this body."""
        return self._terminals.setdefault(body, f"T{len(self._terminals)}")

    def is_productive(self, name: str) -> bool:
        """Tell whether a rule derives anything."""
        return name in self._productive()

    def text(self) -> str:
        """Return everything in Lark's form."""
        productive = self._productive()
        lines = []
        for name in sorted(productive, key=lambda name: int(name[1:])):
            kept = [alternative for alternative in self._rules[name] if self._derives(alternative, productive)]
            lines.append(f"{name}: " + " | ".join(" ".join(alternative) or '""' for alternative in kept))
        return "\n".join([*lines, *(f"{name}: {body}" for body, name in self._terminals.items()), ""])

    def _productive(self) -> set[str]:
        productive: set[str] = set()
        grown = True
        while grown:
            new = {
                name
                for name, alternatives in self._rules.items()
                if name not in productive and any(self._derives(one, productive) for one in alternatives)
            }
            productive |= new
            grown = bool(new)
        return productive

    def _derives(self, alternative: Alternative, productive: set[str]) -> bool:
        return all(symbol not in self._rules or symbol in productive for symbol in alternative)


class _Arguments:
    """The parameters of one tool on their way into rules."""

    def __init__(self, rules: _Rules, parameters: Any) -> None:
        if not isinstance(parameters, Mapping | bool):
            raise ValueError(f"a JSON schema must be an object or a boolean, got {type(parameters).__name__}")
        if nesting(parameters) > MAX_DEPTH:
            raise ValueError(f"a JSON schema may be nested {MAX_DEPTH} deep, got more")
        try:
            self._parameters = json.loads(json.dumps(parameters, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"a JSON schema must be plain JSON data: {error}") from None
        self._rules = rules
        self._made: dict[str, str] = {}  # schema -> rule

    def root(self) -> str:
        """Return the rule of the whole object."""
        return self._rules.add(self._alternatives({"allOf": [self._parameters, {"type": "object"}]}))

    def _value(self, schema: Any) -> str:
        """Return the rule of a value."""
        if not isinstance(schema, Mapping | bool):
            raise ValueError(f"a JSON schema must be an object or a boolean, got {schema!r:.80}")
        key = json.dumps(schema, sort_keys=True)
        if key not in self._made:
            self._made[key] = self._rules.name()  # first: a schema may contain itself
            self._rules.define(self._made[key], self._alternatives(schema))
        return self._made[key]

    def _alternatives(self, schema: Schema) -> list[Alternative]:
        if isinstance(schema, Mapping) and set(schema) - ANNOTATIONS == {"$ref"}:
            target = resolve(self._parameters, schema["$ref"])
            return [[self._value(target)]]
        return [alternative for plain in self._plain(schema) for alternative in self._of_plain(plain)]

    def _plain(self, schema: Schema, joins: int = 0) -> list[Mapping[str, Any]]:
        """Return schemas without $ref, allOf, anyOf and oneOf, one of which a value must satisfy."""
        if joins > MAX_JOINS:
            raise ValueError("$ref goes in circles")
        if isinstance(schema, bool):
            return [{}] if schema else []
        if unknown := sorted(set(schema) - KNOWN):
            raise ValueError(f"keyword {unknown[0]!r} is not supported")
        check_keywords(schema)
        for key in ("$ref", "allOf", "anyOf", "oneOf"):
            if key not in schema:
                continue
            rest: Schema = {name: value for name, value in schema.items() if name != key}
            if key == "$ref":
                target = resolve(self._parameters, schema[key])
                if isinstance(target, Mapping):
                    check_keywords(target)
                return self._plain(join(target, rest), joins + 1)
            inner = schema[key]
            if not isinstance(inner, Sequence) or isinstance(inner, str) or not inner:
                raise ValueError(f"{key} must be a list of schemas, got {inner!r:.80}")
            if key == "allOf":
                parts = [self._plain(part, joins + 1) for part in inner]
                joined: list[Schema] = [rest]
                for part in parts:
                    joined = [join(one, two) for one in joined for two in part]
                return [plain for one in joined for plain in self._plain(one, joins + 1)]
            branches = [self._plain(part, joins + 1) for part in inner]
            if key == "oneOf":
                _require_disjoint(branches)
            return [plain for branch in branches for one in branch for plain in self._plain(join(rest, one), joins + 1)]
        return [schema]

    def _of_plain(self, schema: Mapping[str, Any]) -> list[Alternative]:
        if "enum" in schema or "const" in schema:
            values = schema.get("enum", [schema.get("const")])
            if "const" in schema:
                values = [value for value in values if same(value, schema["const"])]
            fitting = [value for value in values if self._fits(value, schema)]
            texts = [_text(_quotable(value)) for value in fitting if isinstance(value, str)]
            # A terminal, not a rule: the parser keeps every alternative of a rule apart, and has a limit.
            strings = [[QUOTE, self._rules.terminal(" | ".join(texts)), QUOTE]] if texts else []
            return strings + [_literal(value) for value in fitting if not isinstance(value, str)]
        makers = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "number": self._number,
            "integer": self._number,
            "boolean": lambda _: [[_text("true")], [_text("false")]],
            "null": lambda _: [[_text("null")]],
        }
        types = _types(schema)
        return [alternative for name in types for alternative in makers[name]({**schema, "type": name})]

    def _fits(self, value: Any, schema: Mapping[str, Any]) -> bool:
        """Tell whether a literal value satisfies the keywords beside enum."""
        kind = type_of(value)
        if "type" in schema and not is_type(kind, schema["type"]):
            return False
        present = KEYWORDS[kind] & set(schema)
        if kind == "string" and present <= {"minLength", "maxLength", "format"}:
            return schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
        if kind in ("number", "integer") and "multipleOf" not in present:
            low, high = schema.get("minimum", value), schema.get("maximum", value)
            above = "exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"]
            return bool(low <= value <= high and above and value < schema.get("exclusiveMaximum", value + 1))
        if present:
            raise ValueError(f"enum beside {sorted(present)[0]} is not supported")
        return True

    def _string(self, schema: Mapping[str, Any]) -> list[Alternative]:
        return [[QUOTE, self._rules.terminal(text_terminal(schema, without=QUOTE)), QUOTE]]

    def _number(self, schema: Mapping[str, Any]) -> list[Alternative]:
        bounds = {key: schema[key] for key in BOUNDS if key in schema}
        if not bounds:
            return [[self._rules.terminal(INTEGER if schema["type"] == "integer" else NUMBER)]]
        kind = schema["type"]
        if "multipleOf" in bounds:
            if type_of(bounds["multipleOf"]) != "integer" or bounds["multipleOf"] <= 0:
                raise ValueError(f"multipleOf must be a positive integer, got {bounds['multipleOf']!r}")
            check_multiple(bounds["multipleOf"])
            kind, bounds["multipleOf"] = "integer", int(bounds["multipleOf"])
        if not bounds.keys() & {"minimum", "exclusiveMinimum"}:
            bounds["minimum"] = min(-LARGEST, bounds.get("maximum", 0), bounds.get("exclusiveMaximum", 0) - 1)
        if not bounds.keys() & {"maximum", "exclusiveMaximum"}:
            bounds["maximum"] = max(LARGEST, bounds.get("minimum", 0), bounds.get("exclusiveMinimum", 0) + 1)
        return [[f"%json {json.dumps({'type': kind, **bounds}, sort_keys=True)}"]]

    def _array(self, schema: Mapping[str, Any]) -> list[Alternative]:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if schema.get("uniqueItems") and (most is None or most > 1):
            raise ValueError("keyword 'uniqueItems' is not supported")
        first = [self._value(item) for item in schema.get("prefixItems", ())]
        rest = schema.get("items", not first)  # without items, nothing behind the prefix
        fixed = len(first) if most is None else min(len(first), most)
        alternatives = [['"["', *_joined(first[:count]), '"]"'] for count in range(least, fixed + 1)]
        low = max(least - len(first), 1)
        if rest is not False and (most is None or most - len(first) >= low):
            item = self._value(rest)
            more = "" if most is None else most - len(first) - 1  # behind the one that must be there
            repeated = [] if more == 0 else [f'("," {item}){{{low - 1},{more}}}']
            alternatives.append(['"["', *_joined([*first, item]), *repeated, '"]"'])
        return alternatives

    def _object(self, schema: Mapping[str, Any]) -> list[Alternative]:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        other = schema.get("additionalProperties", not properties)
        unnamed = schema.get("additionalProperties", True)
        named = {**dict.fromkeys(required, unnamed), **properties}
        names = sorted(named, key=str.lower)
        least, most = schema.get("minProperties", 0), schema.get("maxProperties")
        if least > max(1, len(required)):
            raise ValueError(f"minProperties {least} beyond the required ones is not supported")
        if most is not None and (most < len(names) or other is not False):
            raise ValueError(f"maxProperties {most} below the number of properties is not supported")
        pairs = [(self._pair(name, named[name]), name in required) for name in names]
        extra = None if other is False else self._other_pair(names, other)
        return [['"{"', self._members(pairs, extra, may_be_empty=least == 0), '"}"']]

    def _pair(self, name: str, schema: Schema) -> str:
        return self._rules.add([[*_key(name), '":"', self._value(schema)]])

    def _other_pair(self, names: Sequence[str], schema: Schema) -> str:
        but = "".join(f" & ~/{re.escape(name)}/" for name in names if re.fullmatch(OTHER_KEY, name))
        return self._rules.add([[self._rules.terminal(f"/{OTHER_KEY}/{but}"), '":"', self._value(schema)]])

    def _members(self, pairs: Sequence[tuple[str, bool]], extra: str | None, may_be_empty: bool) -> str:
        """Return the rule of what is between the braces: `first` before any member, `later` behind one."""
        rules = self._rules
        first = rules.add([[]] if may_be_empty else [])
        later = rules.add([[]])
        if extra is not None:
            rules.define(later, [[], ['","', extra, later]])
            first = rules.add([*([[]] if may_be_empty else []), [extra, later]])
        for pair, is_required in reversed(pairs):
            skipped = [] if is_required else [[first]]
            first = rules.add([[pair, later], *skipped])
            later = rules.add([['","', pair, later], *([] if is_required else [[later]])])
        return first


def _types(schema: Mapping[str, Any]) -> list[str]:
    """Return the types to allow: where none is said, those that the keywords speak of."""
    given = schema.get("type")
    if given is None:
        given = [name for name in ("object", "array", "string", "number") if KEYWORDS[name] & set(schema)]
        given = given or ["string", "number", "boolean", "null", "array", "object"]
    types = [given] if isinstance(given, str) else list(given)
    if wrong := [name for name in types if name not in KEYWORDS]:
        raise ValueError(f"type must be one of {', '.join(KEYWORDS)}, got {wrong[0]!r:.80}")
    return [name for name in types if not (name == "integer" and "number" in types)]


def _require_disjoint(branches: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Raise ValueError where a value might satisfy two alternatives of oneOf."""
    for index, branch in enumerate(branches):
        for other in branches[index + 1 :]:
            if not all(_disjoint(one, two) for one in branch for two in other):
                raise ValueError("oneOf is only supported where its alternatives exclude each other; use anyOf")


def _disjoint(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Tell whether no value satisfies both, as far as types and constants show."""
    values = [[schema["const"]] if "const" in schema else schema.get("enum") for schema in (one, two)]
    if values[0] is not None and values[1] is not None:
        return not any(same(left, right) for left in values[0] for right in values[1])
    for literal, schema in ((values[0], two), (values[1], one)):
        if literal is not None and "type" in schema:
            return not any(is_type(type_of(value), schema["type"]) for value in literal)
    types = [schema.get("type", list(KEYWORDS)) for schema in (one, two)]
    left, right = ([name] if isinstance(name, str) else list(name) for name in types)
    if not any(is_type(a, [b]) or is_type(b, [a]) for a in left for b in right):
        return True
    if left != ["object"] or right != ["object"]:
        return False
    shared = set(one.get("required", ())) & set(two.get("required", ()))
    mine, theirs = one.get("properties", {}), two.get("properties", {})
    return any(
        isinstance(mine.get(name), Mapping)
        and isinstance(theirs.get(name), Mapping)
        and _disjoint(mine[name], theirs[name])
        for name in shared
    )


def _literal(value: Any) -> Alternative:
    """Write a JSON value in Gemma's spelling."""
    if isinstance(value, str):
        return [QUOTE, _text(_quotable(value)), QUOTE]
    if isinstance(value, Mapping):
        pairs = [[*_key(name), '":"', *_literal(value[name])] for name in sorted(value, key=str.lower)]
        return ['"{"', *_joined(pairs), '"}"']
    if isinstance(value, list | tuple):
        return ['"["', *_joined([_literal(item) for item in value]), '"]"']
    return [_text(json.dumps(value))]


def _key(name: str) -> Alternative:
    return [_text(name)] if BARE_KEY.fullmatch(name) else [QUOTE, _text(_quotable(name)), QUOTE]


def _quotable(text: str) -> str:
    if QUOTE in text:
        raise ValueError(f"text with {QUOTE} in it cannot be written in a tool call, got {text!r:.80}")
    return text


def _text(text: str) -> str:
    """Write text as a literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def _joined(parts: Sequence[str | Alternative]) -> Alternative:
    """Put commas between."""
    flat: Alternative = []
    for part in parts:
        flat += ['","'] if flat else []
        flat += [part] if isinstance(part, str) else part
    return flat
