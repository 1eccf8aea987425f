"""JSON schemas as values: keywords checked, references looked up, several schemas joined into one that demands all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

from .patterns import NARROWER, portable

MAX_DEPTH = 100  # of brackets in a schema; llguidance's own limit is 128
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
LARGEST_MULTIPLE = 10_000  # llguidance takes half a minute for a million
LARGER = {"minLength", "minItems", "minProperties", "minimum", "exclusiveMinimum"}
SMALLER = {"maxLength", "maxItems", "maxProperties", "maximum", "exclusiveMaximum"}
# Says nothing about which values are valid.
ANNOTATIONS = frozenset(
    "title description default examples deprecated readOnly writeOnly nullable $schema $id $anchor $comment $defs "
    "definitions contentMediaType contentEncoding discriminator xml externalDocs example".split()
)

Schema = Mapping[str, Any] | bool


def check_keywords(schema: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a keyword whose value has a type that it cannot have; schemas inside are not looked at."""
    for names, is_right, expected in FORMS:
        for name in names:
            if name in schema and not is_right(schema[name]):
                raise ValueError(f"{name} must be {expected}, got {schema[name]!r:.80}")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _are_texts(value: Any) -> bool:
    return _is_list(value) and all(isinstance(each, str) for each in value)


FORMS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
        _is_size,
        "an integer that is not negative",
    ),
    (("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), _is_number, "a number"),
    (("pattern", "format"), _is_text, "text"),
    (("enum", "prefixItems"), _is_list, "a list"),
    (("required",), _are_texts, "a list of texts"),
    (("type",), lambda value: _is_text(value) or _are_texts(value), "text or a list of texts"),
    (("properties",), lambda value: isinstance(value, Mapping), "an object"),
)


# Where schemas lie inside of a schema: in an object by name, in a list or alone.
BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
LISTED = ("allOf", "anyOf", "oneOf", "items", "prefixItems", "additionalItems", "additionalProperties", "contains")


def guaranteed(root: Any) -> Any:
    """Return a JSON schema such that what llguidance makes of it is valid; plain JSON data, which is changed.

    Raises:
        ValueError: a keyword that cannot be guaranteed so.
    """
    for schema in _subschemas(root):
        if _is_number(schema.get("multipleOf")):
            check_multiple(schema["multipleOf"])
        least, required = schema.get("minProperties"), schema.get("required")
        sure = len(set(required)) if isinstance(required, list) and _are_texts(required) else 0
        if isinstance(least, int) and least > sure + 1:
            raise ValueError(f"minProperties {least} beyond the required ones is not supported: names can repeat")
        if _is_text(schema.get("pattern")):
            schema["pattern"] = portable(schema["pattern"])
        if isinstance(patterns := schema.get("patternProperties"), dict):
            schema["patternProperties"] = {portable(pattern): inner for pattern, inner in patterns.items()}
        narrower = NARROWER.get(str(schema.get("format")))
        if narrower is not None and not schema.keys() & {"enum", "const"}:
            if "pattern" in schema:
                others = schema.get("allOf", [])
                schema["allOf"] = [*others, {"pattern": narrower}] if isinstance(others, list) else others
            else:
                schema["pattern"] = narrower
    if _is_endless(root):
        raise ValueError("a JSON schema must allow a value that ends: got references that demand each other for ever")
    return root


def _is_endless(root: Any) -> bool:
    """Tell whether references and what they demand show that no value of a schema ends."""
    schemas = [*_subschemas(root)][::-1]  # inner ones first
    if not any("$ref" in schema for schema in schemas):
        return False
    ending, found = set[int](), -1
    for _ in range(MAX_DEPTH):
        if found == len(ending):
            return id(root) not in ending
        found = len(ending)
        for schema in schemas:
            if id(schema) not in ending and _ends(root, schema, ending):
                ending.add(id(schema))
    return False


def _ends(root: Any, schema: Mapping[str, Any], ending: set[int]) -> bool:
    """Tell whether a schema may have a value that ends, where those in `ending` have one."""

    def may_end(inner: Any) -> bool:
        return not isinstance(inner, dict) or id(inner) in ending

    demanded = [*(schema["allOf"] if _is_list(schema.get("allOf")) else ())]
    if "$ref" in schema:
        with suppress(ValueError):  # llguidance says what is wrong with it
            demanded.append(resolve(root, schema["$ref"]))
    if schema.get("type") == "object" and isinstance(properties := schema.get("properties"), dict):
        required = schema.get("required")
        demanded += [properties[name] for name in properties if _are_texts(required) and name in (required or ())]
    if schema.get("type") == "array" and schema.get("minItems") and "prefixItems" not in schema:
        demanded.append(schema.get("items"))
    branches = [schema[name] for name in ("anyOf", "oneOf") if isinstance(schema.get(name), list)]
    return all(map(may_end, demanded)) and all(any(map(may_end, branch)) for branch in branches if branch)


def check_multiple(value: float) -> None:
    """Raise `ValueError` for a multipleOf whose remainders are too many for an automaton that counts through them."""
    digits = format(Decimal(str(value)).normalize(), "f").replace(".", "").strip("0-")
    if int(digits or 0) > LARGEST_MULTIPLE or abs(value) > LARGEST_MULTIPLE:
        raise ValueError(f"multipleOf: got {value}, expected at most {LARGEST_MULTIPLE}, in all its digits")


def _subschemas(root: Any) -> Iterator[dict[str, Any]]:
    """Yield a schema and the schemas inside of it, those that are only referred to among them."""
    waiting, seen = [root], set[int]()
    while waiting:
        schema = waiting.pop()
        if not isinstance(schema, dict) or id(schema) in seen:
            continue
        seen.add(id(schema))
        yield schema
        for name in BY_NAME:
            waiting += schema[name].values() if isinstance(schema.get(name), dict) else ()
        for name in LISTED:
            waiting += schema[name] if isinstance(schema.get(name), list) else [schema.get(name)]
        if "$ref" in schema:
            with suppress(ValueError):  # llguidance says what is wrong with it
                waiting.append(resolve(root, schema["$ref"]))


def nesting(value: Any) -> int:
    """Return how deep lists and objects are nested in a JSON value, counted to just above `MAX_DEPTH`."""
    depth, level = 0, [value]
    while depth <= MAX_DEPTH:
        level = [item for item in level if isinstance(item, Mapping | list | tuple)]
        if not level:
            break
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, Mapping) else item)]
    return depth


def resolve(root: Schema, reference: Any) -> Schema:
    """Return the part of a schema that a reference names, as "#/$defs/name".

    Raises:
        ValueError: a reference to anything but a schema inside of this one.
    """
    if not isinstance(reference, str) or not re.fullmatch(r"#(/.*)?", reference):
        raise ValueError(f"$ref must point into the schema, as #/$defs/name, got {reference!r:.80}")
    at: Any = root
    for part in reference[2:].split("/") if reference != "#" else ():
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(at, Mapping) and name in at:
            at = at[name]
        elif isinstance(at, Sequence) and not isinstance(at, str) and name.isdecimal() and int(name) < len(at):
            at = at[int(name)]
        else:
            raise ValueError(f"$ref {reference!r:.80} points at nothing")
    if not isinstance(at, Mapping | bool):
        raise ValueError(f"$ref {reference!r:.80} does not point at a schema")
    return at


def join(first: Schema, second: Schema) -> Schema:
    """Return a schema that is valid where both are; references must have been looked up.

    Raises:
        ValueError: two values of a keyword that cannot be joined.
    """
    if first is True or second is False:
        return second
    if second is True or first is False:
        return first
    assert isinstance(first, Mapping) and isinstance(second, Mapping)
    first, second = _enumerated(first), _enumerated(second)
    joined = {**first, **second}
    for key in first.keys() & second.keys() - ANNOTATIONS:
        if first[key] != second[key] or key == "properties":
            joined[key] = _join_keyword(key, first, second)
    if "additionalProperties" in first or "additionalProperties" in second:  # each speaks of the other's properties too
        joined["properties"] = _join_properties(first, second)
    return joined


def _enumerated(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Write const as enum."""
    rest = {key: value for key, value in schema.items() if key != "const"}
    if "const" not in schema:
        return rest
    allowed = schema.get("enum", [schema["const"]])
    return rest | {"enum": [value for value in allowed if same(value, schema["const"])]}


def _join_keyword(key: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Any:
    one, two = first[key], second[key]
    if key in LARGER:
        return max(one, two)
    if key in SMALLER:
        return min(one, two)
    if key == "type":
        return [name for name in TYPES if is_type(name, one) and is_type(name, two)]
    if key == "required":
        return [*one, *(name for name in two if name not in one)]
    if key == "enum":
        return [value for value in one if any(same(value, other) for other in two)]
    if key == "properties":
        return _join_properties(first, second)
    if key in ("items", "additionalProperties"):
        return {"allOf": [one, two]}
    if key == "allOf":
        return [*one, *two]
    if key == "anyOf":
        return [{"allOf": [left, right]} for left in one for right in two]
    raise ValueError(f"two different values of {key} cannot be joined")


def _join_properties(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for name in (*first.get("properties", {}), *second.get("properties", {})):
        parts = [
            side["properties"][name] if name in side.get("properties", {}) else side["additionalProperties"]
            for side in (first, second)
            if name in side.get("properties", {}) or "additionalProperties" in side
        ]
        joined[name] = parts[0] if len(parts) == 1 else {"allOf": parts}
    return joined


def is_type(name: str, types: str | Sequence[str]) -> bool:
    """Tell whether every value of a type is of one of the given types."""
    types = (types,) if isinstance(types, str) else types
    return name in types or (name == "integer" and "number" in types)


def type_of(value: Any) -> str:
    """Return the narrowest type of a JSON value."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "integer" if float(value).is_integer() else "number"
    return "string" if isinstance(value, str) else "object" if isinstance(value, Mapping) else "array"


def same(one: Any, two: Any) -> bool:
    """Compare two JSON values; 1 is 1.0 but not true."""
    return type_of(one) == type_of(two) and (
        one == two
        if not isinstance(one, list | dict)
        else json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True)
    )
