"""What a user asks for: checks without a tokenizer, then answers from noise, all of which must be valid."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import time

import jsonschema
import pytest
from canvases import constrain, write
from grammar_cases import UNSATISFIABLE, UNSUPPORTED, VALUES, closed
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_tokenizer import KINDS, small_tokenizer

from mlx_diffusiongemma.automaton import vocabulary
from mlx_diffusiongemma.grammar import MAX_SOURCE, Grammar
from mlx_diffusiongemma.output import OutputParser
from mlx_diffusiongemma.tokenizer import Tokenizer
from mlx_diffusiongemma.tool_grammar import KNOWN

QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    import mlx_diffusiongemma

    return Tokenizer.load(f"{mlx_diffusiongemma.__path__[0]}/tiny")


def answer_text(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    """Return the visible text, by the parser that users see it through."""
    parser = OutputParser(tokenizer)
    return parser.feed(token_ids).text + parser.finish().text


def test_response_formats():
    assert Grammar.from_response_format({"type": "text"}) is None
    assert Grammar.from_response_format({"type": "json_object"}) == Grammar.from_json_object()
    schema = closed({"a": {"type": "integer"}})
    wrapped = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    assert Grammar.from_response_format(wrapped) == Grammar.from_json_schema(schema)


@pytest.mark.parametrize(
    ("response_format", "message"),
    [
        ({"type": "xml"}, "response_format type must be text, json_object or json_schema, got 'xml'"),
        ("json", "response_format type must be text, json_object or json_schema, got 'json'"),
        ({"type": "json_schema"}, "response_format json_schema must be an object with a schema, got None"),
        (
            {"type": "json_schema", "json_schema": {"schema": [1]}},
            "a JSON schema must be an object or a boolean, got list",
        ),
    ],
)
def test_refused_response_formats(response_format, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Grammar.from_response_format(response_format)


def test_equal_grammars_are_equal_values():
    one, two = Grammar.from_regex("[ab]+"), Grammar.from_regex("[ab]+")
    assert one == two and hash(one) == hash(two) and one != Grammar.from_regex("[ab]*")
    assert len({one, two, Grammar.from_choices(["a", "b"]), Grammar.from_choices(["a", "b", "a"])}) == 2


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_guaranteed_is_refused_by_name(name):
    schema, word = UNSUPPORTED[name]
    with pytest.raises(ValueError, match=rf"^json schema cannot be used: .*{word}") as caught:
        Grammar.from_json_schema(schema)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", UNSATISFIABLE)
def test_unsatisfiable_schemas_are_refused(name):
    with pytest.raises(ValueError, match=r"^json schema cannot be used: Unsatisfiable schema"):
        Grammar.from_json_schema(UNSATISFIABLE[name])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.from_regex("a("), "regex cannot be used: .*unclosed group"),
        (lambda: Grammar.from_regex("a(?=b)"), "regex cannot be used: .*look-around"),
        (lambda: Grammar.from_regex(3), "regex must be text, got int"),
        (lambda: Grammar.from_regex("\ud800"), "regex is not valid Unicode: lone surrogate"),
        (
            lambda: Grammar.from_regex("a" * (MAX_SOURCE + 1)),
            f"regex may have {MAX_SOURCE} characters, got {MAX_SOURCE + 1}",
        ),
        (lambda: Grammar.from_lark("start: other"), "lark cannot be used: .*other"),
        (lambda: Grammar.from_lark("garbage!"), "lark cannot be used: "),
        (lambda: Grammar.from_lark("start: " + "(" * 10**5 + '"a"' + ")" * 10**5), "lark cannot be used: .*too deeply"),
        (lambda: Grammar.from_choices([]), r"choices must be one or more strings, got \[\]"),
        (lambda: Grammar.from_choices(5), "choices must be one or more strings, got 5"),
        (lambda: Grammar.from_choices({"a": 1}), "choices must be one or more strings, got {'a': 1}"),
        (lambda: Grammar.from_choices("ab"), "choices must be one or more strings, got 'ab'"),
        (lambda: Grammar.from_choices(["a", 2]), r"choices must be one or more strings, got \['a', 2\]"),
        (
            lambda: Grammar.from_json_schema({"const": "x" * (MAX_SOURCE + 1)}),
            f"a JSON schema may have {MAX_SOURCE} char",
        ),
        (lambda: Grammar.from_json_schema({"const": {1, 2}}), "a JSON schema must be plain JSON data"),
        (lambda: Grammar.from_json_schema({"multipleOf": 1000003}), "multipleOf: got 1000003, expected at most 10000"),
        (
            lambda: Grammar.from_json_schema({"items": {"multipleOf": 0.100003}}),
            "multipleOf: got 0.100003, expected at",
        ),
        (lambda: Grammar.from_json_schema({"pattern": "^(?x)a b$"}), "pattern .* is not supported: .*x in it"),
        (lambda: Grammar.from_json_schema({"patternProperties": {r"a\z": True}}), r"pattern .* is not supported: \\z"),
        (
            lambda: Grammar.from_json_schema({"$ref": "#/else", "else": {"required": ["a"], "minProperties": 3}}),
            "minProperties 3 beyond the required ones is not supported: names can repeat",
        ),
        (lambda: Grammar.from_json_schema(deep(10**4)), "a JSON schema may be nested 100 deep, got more"),
    ],
)
def test_errors_are_one_line(make, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        make()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def deep(depth: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"format": "date"}, ["2024-02-29", "2023-12-31"], ["2023-02-29", "0000-01-01"]),
        ({"format": "date", "pattern": "9$"}, ["2024-02-29"], ["2023-02-29", "2023-12-31"]),
        ({"format": "time"}, ["23:59:59Z", "00:00:00.5+01:00"], ["23:59:60Z"]),
        ({"format": "date-time"}, ["2024-02-29T01:02:03Z"], ["2023-02-29T01:02:03Z", "2024-02-29T23:59:60Z"]),
        ({"format": "date", "enum": ["2024-02-29"]}, ["2024-02-29"], ["2023-02-29"]),
    ],
)
def test_formats_are_what_calendars_have(schema, good, bad, tiny):
    start = vocabulary(tiny).compile(Grammar.from_json_schema({"type": "string", **schema}))
    for text in [*good, *bad]:
        automaton, ids = start.copy(), tiny.encode(f'"{text}"')
        assert (automaton.take(ids) == len(ids) and automaton.accepts) == (text in good), text


def test_a_schema_cannot_switch_its_guarantee_off():
    with pytest.raises(ValueError, match="uniqueItems"):
        Grammar.from_json_schema({"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True})


@pytest.mark.parametrize("name", VALUES)
def test_json_from_noise_is_valid(name, tiny):
    """Four seeds each: over 200 answers, no two with the same room."""
    schema = VALUES[name]
    for seed in range(4):
        written = write(constrain(Grammar.from_json_schema(schema), tiny), seed, max_tokens=60 + 7 * seed)
        assert written.complete
        jsonschema.validate(json.loads(answer_text(tiny, written.token_ids)), schema, format_checker=FORMATS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["enum of emojis", "nested", "pydantic", "odd keys", "email", "recursion"])
def test_other_vocabularies(name, kind):
    tokenizer, schema = small_tokenizer(kind), VALUES[name]
    for seed in range(3):
        written = write(constrain(Grammar.from_json_schema(schema), tokenizer), seed, max_tokens=150)
        assert written.complete
        jsonschema.validate(json.loads(answer_text(tokenizer, written.token_ids)), schema, format_checker=FORMATS)


def json_values() -> st.SearchStrategy:
    return st.recursive(
        st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=3,
    )


def schemas() -> st.SearchStrategy:
    names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=4)
    lengths = st.tuples(st.integers(0, 3), st.integers(0, 3))
    leaves = st.one_of(
        st.sampled_from([{"type": name} for name in ("string", "integer", "number", "boolean", "null")]),
        lengths.map(lambda pair: {"type": "string", "minLength": pair[0], "maxLength": sum(pair)}),
        st.tuples(st.integers(-50, 50), st.integers(0, 9)).map(
            lambda pair: {"type": "integer", "minimum": pair[0], "maximum": sum(pair)}
        ),
        st.lists(json_values(), min_size=1, max_size=3).map(lambda values: {"enum": values}),
        json_values().map(lambda value: {"const": value}),
    )

    def nested(inner: st.SearchStrategy) -> st.SearchStrategy:
        properties = st.dictionaries(names, inner, max_size=3)
        return st.one_of(
            st.tuples(inner, lengths).map(
                lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1][0], "maxItems": sum(pair[1])}
            ),
            properties.map(lambda found: closed(found)),
            properties.map(lambda found: closed(found, *list(found)[:1])),
            st.lists(inner, min_size=1, max_size=2).map(lambda found: {"anyOf": found}),
        )

    return st.recursive(leaves, nested, max_leaves=5)


@QUICK
@given(schema=schemas(), seed=st.integers(0, 99))
def test_made_up_schemas(tiny, schema, seed):
    written = write(constrain(Grammar.from_json_schema(schema), tiny), seed, max_tokens=150, steps=1)
    if written.complete:  # 150 tokens are not always enough
        jsonschema.validate(json.loads(answer_text(tiny, written.token_ids)), schema)


def regexes() -> st.SearchStrategy:
    pieces = st.sampled_from(["a", "b", "[0-9]", "[a-f]", "[^x]", "é", "😀", r"\.", "yes", "(?:no|maybe)", " "])
    counts = st.sampled_from(["", "?", "*", "+", "{2}", "{1,3}"])
    runs = st.lists(st.tuples(pieces, counts).map(lambda pair: f"(?:{pair[0]}){pair[1]}"), min_size=1, max_size=4)
    return st.lists(runs.map("".join), min_size=1, max_size=3).map("|".join)


@QUICK
@example(pattern="(?:[^x])*(?:a)", seed=0, kind="byte_level")  # the room ends in the middle of a character
@given(pattern=regexes(), seed=st.integers(0, 99), kind=st.sampled_from(KINDS))
def test_made_up_regexes(pattern, seed, kind):
    tokenizer = small_tokenizer(kind)
    written = write(constrain(Grammar.from_regex(pattern), tokenizer), seed, max_tokens=60, steps=1)
    if not written.complete:  # what must stand behind any text is not always found in time, and this is said
        assert "[^x]" in pattern
        return
    text = tokenizer.detokenize(written.token_ids)
    # An empty thought in front is no part of the text.
    assert re.fullmatch(pattern, text.removeprefix("<|channel>thought\n<channel|>"), flags=re.DOTALL)


def test_choices(tiny):
    choices = ["yes", "yes, please", "no", 'a "quote"', "back\\slash", "日本", "line\nbreak", "😀😀"]
    constraint = constrain(Grammar.from_choices(choices), tiny)
    seen = set()
    for seed in range(60):
        written = write(constrain(Grammar.from_choices(choices), tiny), seed, max_tokens=40, steps=1)
        assert written.complete
        seen.add(answer_text(tiny, written.token_ids))
    assert seen <= set(choices) and len(seen) > 4
    assert not constraint.can_end


def test_lark(tiny):
    grammar = Grammar.from_lark(
        'start: pair ("; " pair)*\npair: WORD "=" NUMBER\nWORD: /[a-z]{1,8}/\nNUMBER: /[0-9]{1,3}/\n'
    )
    for seed in range(5):
        text = answer_text(tiny, write(constrain(grammar, tiny), seed, max_tokens=50).token_ids)
        assert all(re.fullmatch("[a-z]{1,8}=[0-9]{1,3}", pair) for pair in text.split("; "))


def test_an_enum_of_ten_thousand(tiny):
    values = [f"entry {number * 7919 % 10007} of the list" for number in range(10_000)]
    start = time.perf_counter()
    for grammar in (Grammar.from_json_schema({"enum": values}), Grammar.from_choices(values)):
        text = answer_text(tiny, write(constrain(grammar, tiny), 0, max_tokens=60, steps=1).token_ids)
        assert (json.loads(text) if grammar.kind == "json_schema" else text) in values
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        closed({"again": {"$ref": "#"}}),
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    ],
)
def test_a_schema_that_never_ends_is_refused(schema):
    with pytest.raises(ValueError, match="a JSON schema must allow a value that ends"):
        Grammar.from_json_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"$ref": "#"}},
        {"anyOf": [{"type": "array", "items": {"$ref": "#"}, "minItems": 1}, {"type": "null"}]},
        {"type": "object", "properties": {"again": {"$ref": "#"}}},
        closed({"again": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}),
        {"$defs": {"a": closed({"b": {"$ref": "#/$defs/b"}}), "b": {"type": "null"}}, "$ref": "#/$defs/a"},
    ],
)
def test_a_recursion_that_may_end_is_allowed(schema, tiny):
    written = write(constrain(Grammar.from_json_schema(schema), tiny), 0, max_tokens=60, steps=1)
    assert written.complete
    jsonschema.validate(json.loads(answer_text(tiny, written.token_ids)), schema)


@pytest.mark.parametrize("keyword", sorted({*KNOWN, "patternProperties", "additionalItems", "contains"}))
def test_keywords_of_odd_types(keyword):
    """Whatever a keyword has for a value: a grammar, or an error of one line that is ours."""
    values = [5, -1, 0.5, "x", "date", [], [1], ["a"], {}, {"a": 1}, None, True, {"a": {"$ref": "#/a"}}, [{"$ref": 5}]]
    beside = [{}, {"format": "date", "pattern": "1"}, {"$ref": "#/$defs/a"}, {"type": "object", "minProperties": 1}]
    for value in values:
        for more in beside:
            try:
                Grammar.from_json_schema({**more, keyword: value})
            except ValueError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("length", [40, 300, 1500])
def test_a_long_text_is_ended_with_long_tokens(length, tiny):
    """Quotes that are letters of the text bring its end no nearer: words do."""
    schema = {"type": "string", "minLength": length}
    constraint = constrain(Grammar.from_json_schema(schema), tiny)
    assert constraint.shortest is not None and constraint.shortest < 4 + length / 8
    written = write(constraint, 0, max_tokens=constraint.shortest + 3)
    assert written.complete
    jsonschema.validate(json.loads(answer_text(tiny, written.token_ids)), schema)


def test_garbage_gives_value_errors():
    garbage = ["", "{", "\0", "start:", "%json", "start: %json {", "start: <nothing>", "a: b", "[", "\\", "(?P<a>", "*"]
    for text, make in itertools.product(garbage, (Grammar.from_regex, Grammar.from_lark)):
        try:
            make(text)
        except ValueError as error:
            assert "\n" not in str(error)


def test_importing_costs_no_llguidance():
    code = "import sys, mlx_diffusiongemma, mlx_diffusiongemma.constraint; print('llguidance' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
