"""What a benchmark asks: prompts of a file, a checkpoint's own, or random tokens of a length, each with its seeds.

A line of a prompt file is one of

    What is 17 + 25?                                     text
    "two\\nlines"                                         text as a JSON string
    [{"role": "user", "content": "What is 17 + 25?"}]    a conversation
    {"messages": [...], "expected": "42"}                a task, with its right answer: see `tasks.py`
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .pipeline import Pipeline
from .prepare import Prepared
from .prompt import Prompt
from .tasks import PROMPTS, Task, make_task, read_lines

OWN_TASKS = "tasks.jsonl"  # a file of this name in a checkpoint's folder holds prompts that suit it


@dataclass(frozen=True)
class Run:
    """One request of a benchmark."""

    number: int  # of its prompt, from 1
    prepared: Prepared
    task: Task | None  # None for random tokens


def read_prompts(path: Path) -> list[Task]:
    """Read a prompt file; empty lines are skipped. Raise `ValueError` naming the line and what was expected."""
    return read_lines(path, "prompt", _read_line)


def _read_line(line: bytes) -> Task:
    text = line.decode("utf-8")
    value: Any = text
    if text[0] in '[{"':
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON, as a line that begins with {text[0]} must be: {error}") from None
    if isinstance(value, str):
        return make_task({"messages": [{"role": "user", "content": value}]})
    return make_task(value if isinstance(value, Mapping) else {"messages": value})


def own_prompts(folder: Path) -> tuple[list[Task], str]:
    """Return the prompts that a checkpoint brings, or ordinary ones, and what they are called."""
    if (folder / OWN_TASKS).is_file():
        return read_prompts(folder / OWN_TASKS), f"the checkpoint's {OWN_TASKS}"
    return [make_task(values) for values in PROMPTS], "the built-in prompts"


def runs_of_tasks(
    pipeline: Pipeline, tasks: Sequence[Task], seeds: Sequence[int], options: Mapping[str, Any]
) -> list[Run]:
    """Return every task with every seed, seed by seed. Raise `ValueError` for a prompt that the checkpoint refuses."""
    runs = []
    for seed in seeds:
        for number, task in enumerate(tasks, 1):
            try:
                prepared = pipeline.prepare(task.messages, {**task.prompt_options, **options, "seed": seed})
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from None
            runs.append(Run(number, prepared, task))
    return runs


def runs_of_random_tokens(
    pipeline: Pipeline, length: int, seeds: Sequence[int], options: Mapping[str, Any]
) -> list[Run]:
    """Return one prompt of random text tokens per seed, answered up to `max_tokens` whatever its end tokens say.

    Raises:
        ValueError: a length that leaves no room for a canvas.
    """
    config, tokenizer = pipeline.config, pipeline.tokenizer
    room = config.text.max_position_embeddings - config.canvas_length
    if length > room:
        raise ValueError(f"prompt-tokens: got {length}, expected at most {room}, the context less one canvas")
    text_ids = np.array(sorted(set(range(tokenizer.largest_id + 1)) - set(tokenizer.all_special_ids)))
    runs: list[Run] = []
    for seed in seeds:
        prepared = pipeline.prepare("random", {**options, "raw_prompt": True, "ignore_eos": True, "seed": seed})
        ids = np.random.default_rng(seed).choice(text_ids, length)
        prompt = Prompt("", tuple(int(token_id) for token_id in ids), thinking_open=False)
        runs.append(Run(len(runs) + 1, replace(prepared, prompt=prompt), None))
    return runs
