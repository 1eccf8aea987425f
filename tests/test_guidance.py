"""Grammars through the whole loop: on a random model whose canvas has 8 positions, and on the bundled one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
from grammar_cases import closed
from small_model import bundled_checkpoint

from mlx_diffusiongemma.events import DenoisingStep, Finished
from mlx_diffusiongemma.pipeline import Pipeline, load
from mlx_diffusiongemma.scheduler import Engine
from mlx_diffusiongemma.tokenizer import Tokenizer

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"type": "integer", "maximum": 9}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "travel")
]
QUICK = {"max_denoising_steps": 3, "seed": 5}


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


@pytest.fixture(scope="module")
def pipeline(tiny_folder) -> Pipeline:
    return Pipeline(bundled_checkpoint(Tokenizer.load(tiny_folder), max_position_embeddings=1024))


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return load("tiny")


@pytest.mark.parametrize("seed", range(4))
def test_json_of_a_schema_over_several_canvases(pipeline: Pipeline, seed: int) -> None:
    result = pipeline.generate("go", max_tokens=200, **QUICK | {"seed": seed}, response_format=schema_format(PERSON))
    jsonschema.validate(json.loads(result.text), PERSON)
    assert (result.finish_reason, result.note) == ("stop", None)
    assert result.stats.canvases > 2


def test_every_draft_of_a_settled_beginning_is_valid(pipeline: Pipeline) -> None:
    """What the grammar forces stands in the very first draft, with no doubt about it."""
    forced = pipeline.tokenizer.encode('{"name": "')
    options = QUICK | {"max_tokens": 100, "response_format": schema_format(PERSON)}
    steps = [event for event in pipeline.stream("go", **options) if isinstance(event, DenoisingStep)]
    first = steps[0]
    start = min(len(forced), 8) - 1  # the last one may be cut otherwise
    assert list(first.token_ids[:start]) == forced[:start]
    assert all(first.accepted[:start]) and not any(first.entropies[:start])
    assert all(all(step.pinned[:start]) for step in steps if step.canvas_index == 0)


def test_drafts_tell_what_the_grammar_chose(pipeline: Pipeline) -> None:
    free = [event.pinned for event in pipeline.stream("go", max_tokens=8, **QUICK) if isinstance(event, DenoisingStep)]
    assert free and not any(free)
    held = pipeline.stream("go", max_tokens=16, **QUICK, regex="[a-f]{3}")
    steps = [event for event in held if isinstance(event, DenoisingStep)]
    assert all(len(step.pinned) == len(step.token_ids) and any(step.pinned) for step in steps)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"regex": r"[a-f]{3,9}-[0-9]+"}, r"[a-f]{3,9}-[0-9]+"),
        (
            {"choices": ["yes", "no", "it depends on the weather of tomorrow"]},
            "yes|no|it depends on the weather of tomorrow",
        ),
        ({"lark": 'start: "<" start ">" | "x"'}, r"<*x>*"),
    ],
)
def test_other_grammars(pipeline: Pipeline, options: dict[str, Any], pattern: str) -> None:
    result = pipeline.generate("go", max_tokens=60, **QUICK, **options)
    assert re.fullmatch(pattern, result.text)
    assert result.note is None


def test_an_ending_is_found_wherever_it_fits(pipeline: Pipeline) -> None:
    """Whatever `max_tokens` is, the answer is complete, or it is too short for any, and then it says so."""
    complete = []
    for max_tokens in range(1, 60, 3):
        result = pipeline.generate("go", max_tokens=max_tokens, **QUICK, response_format=schema_format(PERSON))
        assert len(result.token_ids) <= max_tokens
        complete.append(result.note is None)
        if result.note is None:
            jsonschema.validate(json.loads(result.text), PERSON)
            assert result.finish_reason == "stop"
        else:
            assert result.finish_reason == "length"
            assert "before it satisfied its constraint" in result.note
            with pytest.raises(json.JSONDecodeError):
                json.loads(result.text)
    first = complete.index(True)
    assert 0 < first < 12
    assert all(complete[first:])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "travel"}}])
def test_demanded_tool_calls_fit_their_schema(pipeline: Pipeline, choice: Any) -> None:
    result = pipeline.generate("go", max_tokens=120, **QUICK, tools=TOOLS, tool_choice=choice)
    assert result.finish_reason == "tool_calls"
    assert result.text == ""
    for call in result.tool_calls:
        assert call.name in (("weather", "travel") if choice == "required" else ("travel",))
        jsonschema.validate(call.arguments, TOOLS[0]["function"]["parameters"])


def test_one_tool_call_at_a_time(pipeline: Pipeline) -> None:
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    assert len(pipeline.generate("go", max_tokens=120, **QUICK, **options).tool_calls) == 1


def test_tool_choice_none_keeps_the_tools_out(pipeline: Pipeline) -> None:
    with_none = pipeline.prepare("go", {"tools": TOOLS, "tool_choice": "none"})
    assert with_none.prompt == pipeline.prepare("go", {}).prompt
    assert pipeline.prepare("go", {"tools": TOOLS, "tool_choice": "auto"}).grammar is None


REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("go", {"response_format": schema_format(PERSON)}),
    ("go on", {}),
    ("go away", {"regex": "[0-9]{12,20}"}),
]


def finished(events: Iterator[Any]) -> dict[int, Any]:
    return {index: event.result for index, event in events if isinstance(event, Finished)}


def test_rows_of_a_batch_are_what_they_are_alone(pipeline: Pipeline) -> None:
    options = QUICK | {"max_tokens": 60}
    alone = [pipeline.generate(text, **options, **own) for text, own in REQUESTS]
    requests = [pipeline.open(pipeline.prepare(text, options | own)) for text, own in REQUESTS]
    together = finished(pipeline._run(requests, None))
    assert [together[index].token_ids for index in range(3)] == [each.token_ids for each in alone]
    with Engine(lambda: pipeline) as engine:
        handles = [engine.submit(text, **options, **own) for text, own in REQUESTS]
        assert [handle.result().token_ids for handle in handles] == [each.token_ids for each in alone]


@pytest.mark.parametrize("prompt", ["What is 17 + 25?", "Hello!", "Sort: 4, 2, 9", "What is the capital of France?"])
def test_a_grammar_that_allows_everything_changes_nothing(tiny: Pipeline, prompt: str) -> None:
    free = tiny.generate(prompt, seed=2, max_tokens=96)
    held = tiny.generate(prompt, seed=2, max_tokens=96, regex=r"(.|\n)*")
    assert held.token_ids == free.token_ids
    assert held.stats.denoising_steps == free.stats.denoising_steps
    assert held.finish_reason == free.finish_reason


def test_a_thought_is_free_and_the_answer_is_not(tiny: Pipeline) -> None:
    free = tiny.generate("What is 17 + 25?", seed=2, enable_thinking=True)
    assert free.reasoning
    held = tiny.generate("What is 17 + 25?", seed=2, enable_thinking=True, choices=["no", free.text, free.text + "!"])
    assert (held.reasoning, held.text) == (free.reasoning, free.text)
    other = tiny.generate("What is 17 + 25?", seed=2, enable_thinking=True, choices=["no", "maybe"])
    assert other.reasoning == free.reasoning
    assert other.text in ("no", "maybe")


def test_json_on_tiny_fits_one_canvas(tiny: Pipeline) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": [41, 42]}, "sure": {"type": "boolean"}},
        "required": ["answer", "sure"],
        "additionalProperties": False,
    }
    result = tiny.generate("What is 17 + 25?", seed=2, response_format=schema_format(schema))
    jsonschema.validate(json.loads(result.text), schema)
    assert result.stats.canvases == 1


def test_a_canvas_stops_only_when_its_path_is_stable_and_confident(tiny: Pipeline) -> None:
    events = [
        event
        for event in tiny.stream("What is 17 + 25?", seed=2, regex=r"[A-Z][a-z]{3,8}: [0-9]+")
        if isinstance(event, DenoisingStep)
    ]
    config = tiny.generation_config
    assert events[-1].finished or events[-1].step == config.max_denoising_steps
    for event in events:
        assert event.mean_entropy == pytest.approx(np.mean(event.entropies))
        assert not event.finished or event.mean_entropy < config.confidence_threshold


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "a", "choices": ["a"]}, "^choices: got regex too, expected one grammar"),
        ({"lark": "start: <|nope|>"}, "^lark: .*unknown special token"),
        ({"lark": 'start: start "a"'}, "^lark: lark allows no answer at all"),
        (
            {"response_format": schema_format({"$ref": "#"})},
            "^response_format: a JSON schema must allow a value that ends",
        ),
        (
            {
                "response_format": schema_format(
                    {"$ref": "#/$defs/a", "$defs": {"a": closed({"a": {"$ref": "#/$defs/a"}})}}
                )
            },
            "^response_format: a JSON schema must allow a value that ends",
        ),
        ({"regex": "a", "ignore_eos": True}, "^ignore_eos: got a grammar too"),
        ({"regex": "["}, "regex cannot be used"),
        ({"lark": "start: nothing"}, "lark cannot be used"),
        ({"choices": []}, r"choices must be one or more strings, got \[\]"),
        ({"response_format": {"type": "xml"}}, "response_format type must be text, json_object or json_schema"),
        ({"response_format": schema_format({"type": "integer", "minimum": 3, "maximum": 2})}, "json schema"),
        ({"regex": "a", "stop": ["b"]}, "stop: got a grammar too"),
        ({"regex": "a", "pins": {0: 1}}, "pins: got a grammar too"),
        ({"tool_choice": "required"}, "tool_choice: a call is demanded; expected tools, got none"),
        (
            {"tool_choice": "now", "tools": TOOLS},
            "tool_choice: got 'now', expected auto, none, required, or a function",
        ),
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}, "tools": TOOLS}, "fly"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls: got 'no'"),
    ],
)
def test_what_cannot_be_held_is_refused(pipeline: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.generate("go", max_tokens=8, **options)
