"""Structured output on `tiny` and on random weights: is every answer valid, and what does that cost?

    python benchmarks/structured.py --schemas 200

Random JSON schemas (objects in objects, arrays, enums, numbers with bounds, strings with lengths and patterns, unions,
references) are asked for on prompts that have nothing to do with them: the hardest case, in which the model wants to
write something else at nearly every position. Free answers to the same prompts are the measure of steps and time. On
random weights nothing that is proposed is ever valid.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from statistics import mean, median
from typing import Any

import jsonschema
import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_diffusiongemma import load
from mlx_diffusiongemma.events import Result
from mlx_diffusiongemma.model import DiffusionGemma
from mlx_diffusiongemma.pipeline import Pipeline

PROMPTS = ("What is 17 + 25?", "Hello!", "Count to 20.", "What is the weather in Paris?", "Sort: 9, 4, 7")
KEYS = ("name", "age", "city", "tags", "id", "size", "ok", "items", "note", "kind")
Schema = dict[str, Any]


def random_schema(rng: random.Random, depth: int = 0) -> Schema:
    """Return a schema; objects at the top, and at most three of them in each other."""
    kinds = ["integer", "number", "string", "pattern", "boolean", "enum", "null", "array", "union", "object"]
    kind = "object" if depth == 0 else rng.choice(kinds[:7] if depth > 2 else kinds)
    if kind == "object":
        keys = rng.sample(KEYS, rng.randint(1, 4))
        properties = {key: random_schema(rng, depth + 1) for key in keys}
        required = [key for key in keys if rng.random() < 0.8]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        low = rng.randint(0, 2)
        items = random_schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + rng.randint(0, 3)}
    if kind == "union":
        return {"anyOf": [random_schema(rng, depth + 1), {"type": "null"}]}
    low = rng.randint(-50, 50)
    leaves: dict[str, Schema] = {
        "integer": {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)},
        "number": {"type": "number"},
        "string": {"type": "string", "minLength": rng.randint(0, 3), "maxLength": rng.randint(3, 12)},
        "pattern": {"type": "string", "pattern": rng.choice(["^[a-z]{2,5}$", "^[0-9]{4}-[0-9]{2}$", "^(yes|no)$"])},
        "boolean": {"type": "boolean"},
        "enum": {"enum": rng.sample(["red", "green", "blue", "two words", 7, None, True], rng.randint(1, 4))},
        "null": {"type": "null"},
    }
    return leaves[kind]


def with_tree(schema: Schema, rng: random.Random) -> Schema:
    """Return the schema, one time in eight with a property that refers to a tree."""
    if rng.random() < 0.875:
        return schema
    tree = {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}
    return {**schema, "properties": {**schema["properties"], "tree": {"$ref": "#/$defs/tree"}}, "$defs": {"tree": tree}}


def random_weights(pipeline: Pipeline) -> Pipeline:
    """Return the pipeline around a network of the same shape that has learned nothing."""
    mx.random.seed(0)
    model = DiffusionGemma(pipeline.config)
    arrays = tree_flatten(model.parameters())
    model.load_weights(
        [(name, mx.random.normal(a.shape) * 0.1 if a.ndim > 1 else mx.ones(a.shape)) for name, a in arrays]
    )
    return pipeline.with_model(model)


def answers(
    pipeline: Pipeline, schemas: list[Schema], options: dict[str, Any]
) -> Iterator[tuple[Schema, Result, float]]:
    """Yield (schema, answer, seconds) for every schema."""
    for index, schema in enumerate(schemas):
        named = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        began = time.perf_counter()
        result = pipeline.generate(PROMPTS[index % len(PROMPTS)], seed=index, response_format=named, **options)
        yield schema, result, time.perf_counter() - began


def measure(name: str, pipeline: Pipeline, schemas: list[Schema], options: dict[str, Any]) -> None:
    """Print a line of the table. Raise what jsonschema raises for an answer that is not valid."""
    free_seconds, free_steps = [], []
    for index, prompt in enumerate(PROMPTS):
        began = time.perf_counter()
        stats = pipeline.generate(prompt, seed=index, **options).stats
        free_seconds.append((time.perf_counter() - began) / sum(stats.denoising_steps))
        free_steps.append(sum(stats.denoising_steps) / stats.canvases)
    complete, steps, canvases, seconds = 0, [], [], []
    for schema, result, took in answers(pipeline, schemas, options):
        if result.note is None:
            jsonschema.validate(json.loads(result.text), schema)
            complete += 1
        steps.append(sum(result.stats.denoising_steps))
        canvases.append(result.stats.canvases)
        seconds.append(took / steps[-1])
    print(
        f"| {name} | {complete} of {len(schemas)} | {mean(canvases):.2f} | {median(steps)} | {max(steps)} | "
        f"{mean(free_steps):.1f} | {mean(seconds) / mean(free_seconds):.2f} |",
        flush=True,
    )


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemas", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the schemas (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="per answer (default: %(default)s)")
    parser.add_argument(
        "--random-steps", type=int, default=4, help="per canvas, on random weights (default: %(default)s)"
    )
    args = parser.parse_args()
    rng = random.Random(args.seed)
    schemas = [with_tree(random_schema(rng), rng) for _ in range(args.schemas)]
    pipeline = load("tiny")
    print("| weights | valid | canvases | steps, median | most | steps per free canvas | time per step, to free |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    measure("`tiny`", pipeline, schemas, {"max_tokens": args.max_tokens})
    options = {"max_tokens": args.max_tokens, "max_denoising_steps": args.random_steps}
    measure("random", random_weights(pipeline), schemas, options)


if __name__ == "__main__":
    main()
