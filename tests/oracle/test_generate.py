"""Whole runs of the reference's generate, replayed with its own draws: every integer of every step is equal."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from .recorder import record
from .records import SequenceRecord
from .reference import F, S, Spec, build, generation_options, save
from .replay import assert_equal, load_without_tokenizer, replay

pytestmark = pytest.mark.oracle


@dataclass(frozen=True)
class Run:
    """A model, a prompt of `length` tokens, and the numbers of one generate call."""

    spec: Spec = field(default_factory=Spec)
    length: int = 11
    max_new_tokens: int = 24
    end_ids: tuple[int, ...] = (1,)
    entropy_bound: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)  # beside these defaults:

    @property
    def generation(self) -> dict[str, Any]:
        """Everything of generation_config.json but end tokens and sampler."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "max_denoising_steps": 24,
            "confidence_threshold": 0.5,
            **self.options,
        }

    @property
    def prompt(self) -> list[int]:
        """Distinct, harmless tokens."""
        return [3 + (7 * i + self.spec.seed) % 93 for i in range(self.length)]


def settling(stability_threshold: int) -> Run:
    """Return a run whose first canvas settles, however many repeats are asked for."""
    options = {"stability_threshold": stability_threshold, "confidence_threshold": 0.7}
    return Run(Spec(seed=22, embedding_std=1.0), options=options)


RUNS = {
    "three canvases": Run(),
    "window longer than the prompt": Run(Spec({"sliding_window": 64}, seed=1)),
    "window passed in the second canvas": Run(Spec({"sliding_window": 16}, seed=2)),
    "window shorter than a canvas": Run(Spec({"sliding_window": 4}, seed=3)),
    "prompt of one token": Run(Spec(seed=4), length=1),
    "prompt of sixty tokens": Run(Spec(seed=5), length=60),
    "one expert per token": Run(Spec({"top_k_experts": 1}, seed=6)),
    "one head per kv head": Run(Spec({"num_key_value_heads": 4, "num_global_key_value_heads": 2}, seed=7)),
    "five sliding to one full": Run(Spec({"layer_types": [S] * 5 + [F], "num_hidden_layers": 6}, seed=8)),
    "canvas of 32": Run(Spec(canvas_length=32, seed=9, embedding_std=1.0), max_new_tokens=64, entropy_bound=0.1),
    "canvas of one": Run(Spec(canvas_length=1, seed=10), max_new_tokens=5),
    "vocabulary of two blocks": Run(Spec({"vocab_size": 1024}, seed=11, embedding_std=1.0)),
    "many end tokens": Run(Spec(seed=12), max_new_tokens=64, end_ids=(1, 5, 7, 8, 9, 11, 13)),
    "end token in the first canvas": Run(Spec(seed=13), end_ids=tuple(range(10, 60))),
    "length cut inside a canvas": Run(Spec(seed=14), max_new_tokens=19),
    "the checkpoint's bound and threshold": Run(
        Spec(seed=15, embedding_std=1.5), entropy_bound=0.1, options={"confidence_threshold": 0.005}
    ),
    "stops at the first step": Run(Spec(seed=16), options={"stability_threshold": 0, "confidence_threshold": 9.0}),
    "stability threshold 0": settling(stability_threshold=0),
    "stability threshold 1": settling(stability_threshold=1),
    "stability threshold 2": settling(stability_threshold=2),
    "stability threshold 4": settling(stability_threshold=4),
    "one step": Run(Spec(seed=19), options={"max_denoising_steps": 1}),
    "other temperatures": Run(Spec(seed=20), options={"t_min": 0.1, "t_max": 1.5}),
    "forty-eight steps": Run(Spec(seed=21), options={"max_denoising_steps": 48, "confidence_threshold": 0.2}),
}


@cache
def recorded(name: str) -> SequenceRecord:
    """Run the reference once per case."""
    run = RUNS[name]
    options = generation_options(run.entropy_bound, **run.generation)
    bound = run.entropy_bound
    return record(build(run.spec), [run.prompt], run.spec.seed, bound, run.end_ids, **options)[0]


@pytest.mark.parametrize("name", RUNS, ids=str)
def test_replay_equals_the_reference(name: str, tmp_path: Path) -> None:
    """The numbers come from generation_config.json, the draws from the record, the loop is the pipeline's."""
    run = RUNS[name]
    options = generation_options(run.entropy_bound, **run.generation, eos_token_id=list(run.end_ids), pad_token_id=0)
    pipeline = load_without_tokenizer(save(build(run.spec), tmp_path, **options))
    expected = recorded(name)
    [(request, result)] = replay(pipeline, [expected])
    worst = assert_equal(expected, request, result, run.max_new_tokens)
    print(f"worst, {name}: mean entropy {worst:.1e} nats; steps {result.stats.denoising_steps}")


def test_replay_does_not_depend_on_the_prefill_step_size(tmp_path: Path) -> None:
    run = RUNS["prompt of sixty tokens"]
    options = generation_options(run.entropy_bound, **run.generation, eos_token_id=[1], pad_token_id=0)
    pipeline = load_without_tokenizer(save(build(run.spec), tmp_path, **options))
    for step_size in (1, 7, 60):
        [(request, result)] = replay(pipeline, [recorded("prompt of sixty tokens")], prefill_step_size=step_size)
        assert_equal(recorded("prompt of sixty tokens"), request, result, run.max_new_tokens)


def test_runs_are_not_degenerate() -> None:
    """Among them the cases hold what a sampler can get wrong."""
    canvases = [canvas for name in RUNS for canvas in recorded(name).canvases]
    accepted = [share for canvas in canvases for share in canvas.accepted.mean(axis=1).tolist()]
    partly = sum(0 < share < 1 for share in accepted)
    assert partly > len(accepted) / 2, "most steps accept some positions and refuse others"
    assert any(share == 1 for share in accepted)
    settled = sum(canvas.finished and canvas.steps > 2 for canvas in canvases)
    assert settled > 10, "canvases that settle after several steps"
    assert sum(not canvas.finished for canvas in canvases) > 5, "canvases that run out of steps"
    ends = [name for name in RUNS if 0 in recorded(name).answer and len(recorded(name).canvases) > 0]
    assert ends, "an answer that the reference padded after its end token"
    assert any(len(recorded(name).canvases) == 1 and RUNS[name].max_new_tokens > 8 for name in ends)


def test_stability_threshold_counts_repeats() -> None:
    """The same draws settle later the more repeats of the argmax are asked for."""
    first = [recorded(f"stability threshold {count}").canvases[0] for count in (0, 1, 2, 4)]
    assert all(canvas.finished for canvas in first)
    assert [canvas.steps for canvas in first] == sorted({canvas.steps for canvas in first})
    for repeats, canvas in zip((0, 1, 2, 4), first, strict=True):
        last = canvas.argmax[-1 - repeats :]
        assert len(last) == repeats + 1
        assert (last == canvas.committed).all()
