"""Tool calls from noise, read back by the parser that users get them from; schemas and patterns rewritten."""

from __future__ import annotations

import datetime
import json
import re

import jsonschema
import pytest
from canvases import constrain, write
from grammar_cases import UNSATISFIABLE, UNSUPPORTED, VALUES, closed
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizer import KINDS, small_tokenizer
from test_grammar import FORMATS, QUICK, schemas, tiny  # noqa: F401 - a fixture

from mlx_diffusiongemma.automaton import vocabulary
from mlx_diffusiongemma.grammar import Grammar
from mlx_diffusiongemma.output import OutputParser, ToolCall
from mlx_diffusiongemma.patterns import DATE, anchored
from mlx_diffusiongemma.schemas import join
from mlx_diffusiongemma.tool_grammar import tool_call_grammar


def tool(name, parameters):
    return {"type": "function", "function": {"name": name, "description": "D", "parameters": parameters}}


WEATHER = tool("get_weather", closed({"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}}, "days"))
CLOCK = tool("get-time.v2", {"type": "object", "properties": {}})
NOTHING = {"type": "function", "function": {"name": "stop"}}


def wrap(schema) -> dict:
    """Return parameters with the schema as the value of one of them."""
    parameters = closed({"value": schema, "flag": {"type": "boolean"}}, "flag")
    return parameters | ({"$defs": schema["$defs"]} if isinstance(schema, dict) and "$defs" in schema else {})


def read(tokenizer, token_ids) -> tuple[str, tuple[ToolCall, ...]]:
    parser = OutputParser(tokenizer)
    deltas = [parser.feed(token_ids), parser.finish()]
    return "".join(delta.text for delta in deltas), tuple(call for delta in deltas for call in delta.tool_calls)


def call_from_noise(grammar, tokenizer, seed, max_tokens=120):
    written = write(constrain(grammar, tokenizer), seed, max_tokens=max_tokens, steps=1)
    assert written.complete
    text, calls = read(tokenizer, written.token_ids)
    assert text == "" and calls
    return calls


@pytest.mark.parametrize("name", VALUES)
def test_arguments_from_noise_are_valid(name, tiny):  # noqa: F811
    parameters = wrap(VALUES[name])
    grammar = Grammar.from_tools([tool("f", parameters)])
    for seed in range(3):
        for call in call_from_noise(grammar, tiny, seed, 80 + 11 * seed):
            assert call.name == "f"
            jsonschema.validate(call.arguments, parameters, format_checker=FORMATS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["enum of emojis", "odd keys", "pydantic", "string", "recursion"])
def test_other_vocabularies(name, kind):
    tokenizer, parameters = small_tokenizer(kind), wrap(VALUES[name])
    for seed in range(3):
        for call in call_from_noise(Grammar.from_tools([tool("f", parameters)]), tokenizer, seed, 200):
            jsonschema.validate(call.arguments, parameters)


@QUICK
@given(schema=schemas(), seed=st.integers(0, 99))
def test_made_up_schemas(tiny, schema, seed):  # noqa: F811
    parameters = wrap(schema)
    grammar = Grammar.from_tools([tool("f", parameters)], parallel=False)
    written = write(constrain(grammar, tiny), seed, max_tokens=250, steps=1)
    if written.complete:
        (call,) = read(tiny, written.token_ids)[1]
        jsonschema.validate(call.arguments, parameters)


def test_all_tools_or_the_named_one(tiny):  # noqa: F811
    tools = [WEATHER, CLOCK, NOTHING]
    required, single = Grammar.from_tools(tools), Grammar.from_tools(tools, parallel=False)
    names, counts = set(), set()
    for seed in range(30):
        calls = call_from_noise(required, tiny, seed)
        names |= {call.name for call in calls}
        counts.add(len(calls))
        assert len(call_from_noise(single, tiny, seed)) == 1
        assert {call.name for call in call_from_noise(Grammar.from_tools(tools, "stop"), tiny, seed)} == {"stop"}
    assert names == {"get_weather", "get-time.v2", "stop"} and len(counts) > 1


def test_the_spelling_of_the_template(tiny):  # noqa: F811
    """Keys sorted and bare, strings between quote tokens, nothing between: as the chat template writes history."""
    parameters = closed(
        {"z": {"type": "number"}, "Apple": {"type": "array", "items": {"type": "string"}}, "b c": {"const": None}}
    )
    text = '<|tool_call>call:f{Apple:[<|"|>x, "y"<|"|>,<|"|><|"|>],b c:null,z:-1.5}<tool_call|>'
    ids = tiny.encode(text)
    constraint = constrain(Grammar.from_tools([tool("f", parameters)], parallel=False), tiny)
    constraint.commit(ids)
    assert constraint.is_complete
    (call,) = read(tiny, ids)[1]
    assert call.arguments == {"Apple": ['x, "y"', ""], "b c": None, "z": -1.5}


def test_the_quote_token_spelled_in_letters_is_no_part_of_a_string(tiny):  # noqa: F811
    constraint = constrain(Grammar.from_tools([WEATHER]), tiny)
    head = tiny.encode('<|tool_call>call:get_weather{city:<|"|>a')
    with pytest.raises(ValueError, match="does not allow"):
        constraint.commit([*head, *tiny.encode_letters('<|"|>'), *tiny.encode("b")])


def test_an_enum_of_ten_thousand(tiny):  # noqa: F811
    parameters = closed({"value": {"enum": [f"entry {number}" for number in range(10_000)]}})
    (call, *_) = call_from_noise(Grammar.from_tools([tool("f", parameters)], parallel=False), tiny, 0)
    jsonschema.validate(call.arguments, parameters)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_guaranteed_is_refused_by_name(name):
    schema, word = UNSUPPORTED[name]
    with pytest.raises(ValueError, match=rf"^parameters of tool 'f': .*{word}") as caught:
        Grammar.from_tools([tool("f", wrap(schema))])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schema", [*UNSATISFIABLE.values(), {"$ref": "#"}, {"$ref": "#/properties/value"}])
def test_unsatisfiable_parameters_are_refused(schema):
    with pytest.raises(ValueError, match=r"^parameters of tool 'f': (no arguments satisfy|minLength 5)"):
        Grammar.from_tools([tool("f", wrap(schema))])


@pytest.mark.parametrize(
    ("tools", "name", "message"),
    [
        ([], None, "no tool to call: got None, known are none"),
        ([WEATHER, NOTHING], "other", "no tool to call: got 'other', known are 'get_weather', 'stop'"),
        ([tool("a b", {})], None, "a tool's name must be letters, digits, _, - and ., got 'a b'"),
        ([tool("f", [])], None, None),
        ([5], None, "a tool must be an object with a function, got 5"),
        ([{"type": "function", "function": "f"}], None, "a tool must be an object with a function, got 'f'"),
        ([tool("f", {"enum": [float("nan")]})], None, "parameters of tool 'f': a JSON schema must be plain JSON data"),
        ([tool("f", {"default": {1, 2}})], None, "parameters of tool 'f': a JSON schema must be plain JSON data"),
        ([tool("f", ["x"])], None, "parameters of tool 'f': a JSON schema must be an object or a boolean, got list"),
        (
            [tool("f", closed({"a": {"$ref": "#/$defs/b"}}))],
            None,
            "parameters of tool 'f': $ref '#/$defs/b' points at nothing",
        ),
        (
            [tool("f", closed({"a": {"const": '<|"|>'}}))],
            None,
            "parameters of tool 'f': text with <|\"|> in it cannot be",
        ),
        (
            [tool("f", closed({"a": {"pattern": "a^b"}}))],
            None,
            "parameters of tool 'f': pattern 'a^b' is not supported: ^ in",
        ),
        (
            [tool("f", closed({"a": {"multipleOf": 0.1}}))],
            None,
            "parameters of tool 'f': multipleOf must be a positive",
        ),
        (
            [tool("f", closed({"a": 3}))],
            None,
            "parameters of tool 'f': a JSON schema must be an object or a boolean, got 3",
        ),
    ],
)
def test_errors_name_the_tool(tools, name, message):
    if message is None:
        assert Grammar.from_tools(tools, name) == Grammar.from_tools([tool("f", None)])
        return
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        Grammar.from_tools(tools, name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"pattern": 5}, "pattern must be text, got 5"),
        ({"format": []}, "format must be text, got []"),
        ({"minLength": "x", "maxLength": 3}, "minLength must be an integer that is not negative, got 'x'"),
        ({"maxLength": -1}, "maxLength must be an integer that is not negative, got -1"),
        ({"type": "array", "minItems": 1.5}, "minItems must be an integer that is not negative, got 1.5"),
        ({"minProperties": True}, "minProperties must be an integer that is not negative, got True"),
        ({"type": 5}, "type must be text or a list of texts, got 5"),
        ({"type": ["string", 5]}, "type must be text or a list of texts, got ['string', 5]"),
        ({"prefixItems": 5}, "prefixItems must be a list, got 5"),
        ({"enum": "ab"}, "enum must be a list, got 'ab'"),
        ({"enum": [1], "minimum": "a"}, "minimum must be a number, got 'a'"),
        ({"required": "ab"}, "required must be a list of texts, got 'ab'"),
        ({"required": [1]}, "required must be a list of texts, got [1]"),
        ({"properties": 5}, "properties must be an object, got 5"),
        ({"allOf": [{"required": 5}, {"required": ["a"]}]}, "required must be a list of texts, got 5"),
        ({"oneOf": [{"enum": 5}, {"enum": [2]}]}, "enum must be a list, got 5"),
        ({"$ref": "#/$defs/wrong", "type": "string"}, "type must be text or a list of texts, got 5"),
    ],
)
def test_a_keyword_of_a_wrong_type_is_refused(keywords, message):
    parameters = {**closed({"a": keywords}), "$defs": {"wrong": {"type": 5}}}
    with pytest.raises(ValueError, match=f"^parameters of tool 'f': {re.escape(message)}$"):
        Grammar.from_tools([tool("f", parameters)])


def test_the_grammar_of_a_call():
    """By hand: one optional and one required property, keys in order."""
    lark = tool_call_grammar([WEATHER], parallel=False)
    assert lark.startswith('start: call\ncall: <|tool_call> "call:" ("get_weather" r')
    assert '"city" ":"' in lark and '"minimum": 1' in lark


# -- patterns and schemas ------------------------------------------------------------------------------------------

PATTERNS = {
    "^abc$": (["abc"], ["abcd", "xabc", ""]),
    "abc": (["abc", "xabcx"], ["ab c"]),
    "^a|b$": (["a", "axx", "xb"], ["xa", "bx"]),
    "^(a|b)$": (["a", "b"], ["ab"]),
    r"^\d{2}$": (["12"], ["٣٤", "1"]),
    r"^[\w-]+$": (["a-b_1"], ["a b"]),
    r"^\$[0-9]+\.$": (["$5."], ["5"]),
    r"^[[a]$": (["[", "a"], ["b"]),
    r"^[\\d]$": (["\\", "d"], ["5"]),
    r"^[a&&b]$": (["&", "a", "b"], ["c"]),
    r"^a/b\/c$": (["a/b/c"], ["abc"]),
    r"^[]a]$": (["]", "a"], ["b"]),
    "": (["", "anything\n"], []),
    "^$": ([""], ["a"]),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # Python's, about sets that Rust has and Python may get
def test_patterns_mean_the_same_as_in_python(pattern, tiny):  # noqa: F811
    good, bad = PATTERNS[pattern]
    grammar = Grammar.from_tools([tool("f", closed({"a": {"type": "string", "pattern": pattern}}))], parallel=False)
    for text in [*good, *bad]:
        ids = tiny.encode(f'<|tool_call>call:f{{a:<|"|>{text}<|"|>}}<tool_call|>')
        constraint = constrain(grammar, tiny)
        try:
            constraint.commit(ids)
            taken = constraint.is_complete
        except ValueError:
            taken = False
        assert taken == (text in good), text
        assert text in bad or re.search(pattern, text)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_patterns_of_a_json_schema_mean_the_same(pattern, tiny):  # noqa: F811
    good, bad = PATTERNS[pattern]
    start = vocabulary(tiny).compile(Grammar.from_json_schema({"type": "string", "pattern": pattern}))
    for text in [*good, *bad]:
        automaton, ids = start.copy(), tiny.encode_letters(json.dumps(text, ensure_ascii=False))
        assert (automaton.take(ids) == len(ids) and automaton.accepts) == (text in good), text


def test_dates_are_those_of_the_calendar():
    days = [
        f"{year:04}-{month:02}-{day:02}"
        for year in (0, 1, 1900, 1996, 2000, 2023, 2024, 9999)
        for month in range(14)
        for day in range(33)
    ]
    for text in days:
        try:
            expected = bool(datetime.date.fromisoformat(text))
        except ValueError:
            expected = False
        assert bool(re.fullmatch(DATE, text)) == expected, text


def test_anchored_by_hand():
    assert anchored("^a$") == "(a)"
    assert anchored("a") == "(?s:.*)(a)(?s:.*)"
    assert anchored(r"^[\d_]") == "([0-9_])(?s:.*)"
    for pattern in (r"\bword\b", r"(a)\1", "(?<=a)b", "(?i)a"):
        with pytest.raises(ValueError, match=r"is not supported"):
            anchored(pattern)


def test_joined_schemas_by_hand():
    assert join({"minLength": 2, "maxLength": 9}, {"minLength": 3, "maxLength": 5}) == {"minLength": 3, "maxLength": 5}
    assert join({"type": ["integer", "string"]}, {"type": "number"}) == {"type": ["integer"]}
    assert join({"enum": [1, 2, "a"]}, {"const": 2.0}) == {"enum": [2]}
    assert join({"required": ["a"]}, {"required": ["b", "a"]}) == {"required": ["a", "b"]}
    assert join(True, {"type": "null"}) == {"type": "null"} and join({"type": "null"}, False) is False
    with pytest.raises(ValueError, match="two different values of pattern cannot be joined"):
        join({"pattern": "a"}, {"pattern": "b"})
