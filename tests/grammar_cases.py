"""JSON schemas in the manner of the JSON Schema Test Suite: one keyword at a time, then as applications write them."""

from __future__ import annotations

from typing import Any

ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
}
TREE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
    "required": ["value"],
    "additionalProperties": False,
}


def closed(properties: dict[str, Any], *optional: str, **more: Any) -> dict[str, Any]:
    """Return the schema of an object with these properties and no others."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False} | more


# Values of any type, for response_format.
VALUES: dict[str, Any] = {
    "true": True,
    "empty": {},
    "string": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "types": {"type": ["integer", "null", "string"]},
    "enum": {"enum": ["red", "green", 3, None, True, [1, "a"], {"k": "v"}]},
    "enum of emojis": {"enum": ["😀", "naïve café", "日本語", '"quoted"', "back\\slash", "new\nline"]},
    "const": {"const": {"a": [1, 2.5, "x"]}},
    "const string": {"const": "exactly this"},
    "minLength": {"type": "string", "minLength": 4},
    "maxLength": {"type": "string", "maxLength": 3},
    "length": {"type": "string", "minLength": 2, "maxLength": 6},
    "pattern": {"type": "string", "pattern": "^[a-z]{2,5}-[0-9]{3}$"},
    "pattern anywhere": {"type": "string", "pattern": "[0-9]{2}"},
    "pattern of words": {"type": "string", "pattern": r"^(foo|bar)(,\s?(foo|bar)){0,3}$"},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "date-time": {"type": "string", "format": "date-time"},
    "email": {"type": "string", "format": "email"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "uuid": {"type": "string", "format": "uuid"},
    "minimum": {"type": "integer", "minimum": 7},
    "range": {"type": "integer", "minimum": -12, "maximum": 345},
    "exclusive": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10},
    "number range": {"type": "number", "minimum": 0, "maximum": 1},
    "multipleOf": {"type": "integer", "multipleOf": 5},
    "array": {"type": "array"},
    "items": {"type": "array", "items": {"type": "integer"}},
    "minItems": {"type": "array", "items": {"type": "boolean"}, "minItems": 3},
    "maxItems": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
    "exactly two items": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2},
    "prefixItems": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
    "tuple and more": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "null"}],
        "items": {"type": "boolean"},
        "minItems": 2,
    },
    "nested arrays": {"type": "array", "items": {"type": "array", "items": {"type": "number"}, "maxItems": 3}},
    "object": {"type": "object"},
    "properties": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    "closed": closed({"a": {"type": "integer"}, "b": {"type": "string"}}),
    "optional": closed({"a": {"type": "integer"}, "b": {"type": "string"}, "c": {"type": "null"}}, "a", "c"),
    "additional": {"type": "object", "additionalProperties": {"type": "integer"}},
    "additional beside": {
        "type": "object",
        "properties": {"a": {"type": "string"}},
        "additionalProperties": {"type": "boolean"},
    },
    "unnamed required": {"type": "object", "required": ["x", "y"]},
    "nested": closed({"person": closed({"name": {"type": "string"}, "home": ADDRESS}), "tags": {"type": "array"}}),
    "anyOf": {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}]},
    "anyOf of objects": {
        "anyOf": [closed({"kind": {"const": "a"}, "x": {"type": "integer"}}), closed({"kind": {"const": "b"}})]
    },
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "null"}]},
    "allOf": {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}}, {"required": ["a"]}]},
    "$ref": {
        "$defs": {"id": {"type": "integer", "minimum": 1}},
        **closed({"from": {"$ref": "#/$defs/id"}, "to": {"$ref": "#/$defs/id"}}),
    },
    "recursion": {"$defs": {"tree": TREE}, "$ref": "#/$defs/tree"},
    "recursive list": {
        "$defs": {
            "list": closed(
                {"head": {"type": "integer"}, "tail": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/list"}]}}
            )
        },
        "$ref": "#/$defs/list",
    },
    "odd keys": closed({"with space": {"type": "integer"}, "häßlich": {"type": "null"}, "a-b.c": {"type": "string"}}),
    "annotations": {"title": "T", "description": "D", "default": 1, "examples": [2], "type": "integer"},
    "pydantic": {
        "$defs": {"Colour": {"enum": ["red", "blue"], "title": "Colour", "type": "string"}},
        "properties": {
            "name": {"title": "Name", "type": "string"},
            "age": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None, "title": "Age"},
            "colour": {"$ref": "#/$defs/Colour"},
            "scores": {"additionalProperties": {"type": "number"}, "type": "object"},
        },
        "required": ["name", "colour"],
        "title": "Person",
        "type": "object",
    },
}

# What both the library's converter and a tool's cannot guarantee, with the word that the error must name.
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "not": ({"not": {"type": "string"}}, "not"),
    "if": ({"if": {"type": "string"}, "then": {"minLength": 2}}, "if"),
    "uniqueItems": ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems"),
    "contains": ({"type": "array", "contains": {"type": "integer"}}, "contains"),
    "propertyNames": ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
    "dependentRequired": ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    "overlapping oneOf": ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf"),
    "unknown type": ({"type": "text"}, "text"),
    "look-around": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "foreign $ref": ({"$ref": "https://example.com/schema"}, "example"),
}

UNSATISFIABLE: dict[str, Any] = {
    "false": False,
    "empty enum": {"enum": []},
    "lengths": {"type": "string", "minLength": 5, "maxLength": 2},
    "items": {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 1},
    "required false": closed({"a": False}),
    "types": {"allOf": [{"type": "string"}, {"type": "integer"}]},
}
