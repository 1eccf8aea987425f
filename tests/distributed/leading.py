"""Run by every rank: rank 0 serves requests with an engine, the others follow.

leading.py CHECKPOINT SCENARIO
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from PIL import Image

from mlx_diffusiongemma.decisions import decide
from mlx_diffusiongemma.edit import edit
from mlx_diffusiongemma.events import DenoisingStep, Result
from mlx_diffusiongemma.infill import fill, infill
from mlx_diffusiongemma.questions import Extract, YesNo
from mlx_diffusiongemma.ranks import Ranks
from mlx_diffusiongemma.scheduler import Engine, EngineOptions
from mlx_diffusiongemma.team import Team, follow

STORY: dict[str, Any] = {"max_tokens": 130, "max_denoising_steps": 6}
SYSTEM = {"role": "system", "content": "Be brief, be kind, and answer in one sentence. " * 8}
PICTURE = Image.new("RGB", (24, 24), (200, 30, 30))
REQUESTS: list[tuple[Any, dict[str, Any]]] = [
    ("What is 17 + 25?", {"seed": 1, "max_tokens": 64}),
    ("Tell me a story.", {"seed": 2, **STORY}),
    ("Tell me a story.", {"seed": 3, "pins": [(2, 40), (70, 41)], **STORY}),
    ("What is 3 + 4?", {"seed": 4, "regex": "[0-9]{1,9}", "max_tokens": 20}),
    ("What is 3 + 4?", {"seed": 5, "logprobs": 2, "max_tokens": 20}),
    ("What is this?", {"seed": 6, "images": [PICTURE], "max_tokens": 20, "max_denoising_steps": 4}),
]


def summary(result: Result) -> list[Any]:
    """Return what must not depend on how many ranks there are, or on what else runs."""
    logprobs = None if result.logprobs is None else [token.logprob for token in result.logprobs]
    return [list(result.token_ids), result.finish_reason, list(result.stats.denoising_steps), logprobs]


def together(engine: Engine) -> Iterator[Any]:
    """Serve requests at one time, and a score between their steps."""
    handles = [engine.submit(prompt, **options) for prompt, options in REQUESTS]
    score = engine.score("The capital of France is Paris.", top=2)
    for handle in handles:
        yield summary(handle.result(200))
    yield [token.logprob or 0.0 for token in score.tokens]


def prefixes(engine: Engine) -> Iterator[Any]:
    """Ask twice behind one system turn: the second prompt is encoded from where the first one differs."""
    for question in ("What is 17 + 25?", "What is 3 + 4?"):
        messages = [SYSTEM, {"role": "user", "content": question}]
        result = engine.submit(messages, seed=1, max_tokens=70, max_denoising_steps=6).result(200)
        yield [*summary(result), result.stats.cached_tokens]


def cancelled(engine: Engine) -> Iterator[Any]:
    """Cancel a request in the middle of a canvas, beside one that goes on; then serve another."""
    going_on = engine.submit("Tell me a story.", seed=2, **STORY)
    leaving = engine.submit("Tell me a story.", seed=9, **STORY)
    for event in leaving:
        if isinstance(event, DenoisingStep):
            leaving.cancel()
    yield leaving.result(1).finish_reason
    yield summary(going_on.result(200))
    yield summary(engine.submit("What is 17 + 25?", seed=1, max_tokens=64).result(200))


def written(engine: Engine) -> Iterator[Any]:
    """Fill a hole of several lengths, fill two holes, edit a text, and decide."""
    quick = {"seed": 1, "max_denoising_steps": 3}
    hole = infill(engine, "The capital of ", " is Paris.", length=[1, 2], **quick)
    yield [hole.text, hole.length, [each.score for each in hole.candidates]]
    yield fill(engine, "one ___ three ___ five", length=2, **quick).text
    yield edit(engine, "We meet at 5 in Rome.", "Change Rome to Oslo.", selection=(16, 20), length=2, **quick).text
    questions = {"warm": YesNo("Is it warm?"), "town": Extract("Which town?", max_tokens=2)}
    for name, decision in decide(engine, questions, "It is 30 degrees in Rome.", forwards=2, seed=4).items():
        yield [name, decision.value, decision.probability]


SCENARIOS = {each.__name__: each for each in (together, prefixes, cancelled, written)}


def run(scenario: str, loading: Any) -> list[Any]:
    """Return what a scenario yields on an engine around what `loading` loads."""
    with Engine(loading, EngineOptions(max_batch=3)) as engine:
        return list(SCENARIOS[scenario](engine))


def main() -> None:
    """Run a scenario on rank 0 of several."""
    ranks = Ranks(mx.distributed.init(strict=True))
    if ranks.rank:
        follow(ranks)
        return
    team = Team(ranks)
    try:
        print(json.dumps(run(sys.argv[2], lambda: team.load(sys.argv[1], dtype="float32"))))
    finally:
        team.close()


if __name__ == "__main__":
    main()
