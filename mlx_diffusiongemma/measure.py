"""Whole requests on the clock, and what their times and counts say together.

A step is timed from outside, between two events of the loop, so that measuring adds nothing to it. What cannot be seen
from there (experts, parts, memory of a step) is in `probe.py`, apart from the clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .counting import WEIGHT_PARTS, Bits, Pass, encode_work, parameters, step_work, total
from .events import CanvasCommitted, DenoisingStep, Finished, Result
from .model import DiffusionGemma
from .pipeline import Pipeline
from .recipes import part_of
from .workload import Run

Progress = Callable[[int, int], None]  # how many are done, and of how many


@dataclass(frozen=True)
class TimedRequest:
    """One request: its counts, and where its time went."""

    prompt: int  # number of the prompt, from 1
    seed: int
    prompt_tokens: int
    generated_tokens: int
    finish_reason: str
    right: bool | None  # None where no answer is expected
    is_empty: bool  # no text, no thought, no tool call
    repeated_tokens: int  # equal to the token before
    steps: tuple[int, ...]  # per canvas: K
    contexts: tuple[int, ...]  # per canvas: tokens in front of it
    rows: tuple[tuple[int, ...], ...]  # that were computed, per canvas and step
    accepted: tuple[tuple[int, ...], ...]  # positions, per canvas and step
    step_seconds: tuple[tuple[float, ...], ...]  # per canvas
    prefill_seconds: float
    encode_seconds: float  # of committed canvases
    rest_seconds: float  # text, events, and what is left
    total_seconds: float
    first_draft_seconds: float | None
    peak_memory_bytes: int

    @property
    def denoising_seconds(self) -> float:
        """Of all steps."""
        return sum(map(sum, self.step_seconds))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values."""
        return {**asdict(self), "denoising_seconds": self.denoising_seconds}


def time_request(pipeline: Pipeline, run: Run) -> TimedRequest:
    """Answer one prompt and time it."""
    seconds: list[list[float]] = []
    accepted: list[list[int]] = []
    rows: list[list[int]] = []
    contexts = [len(run.prepared.prompt.token_ids)]
    result: Result | None = None
    for event in pipeline.stream_prepared(run.prepared):
        if isinstance(event, DenoisingStep):
            if event.step == 1:
                seconds.append([])
                accepted.append([])
                rows.append([])
            seconds[-1].append(event.seconds)
            accepted[-1].append(sum(event.accepted))
            rows[-1].append(event.rows)
        elif isinstance(event, CanvasCommitted):
            contexts.append(contexts[-1] + len(event.token_ids))
        elif isinstance(event, Finished):
            result = event.result
    assert result is not None
    stats = result.stats
    denoising = sum(stats.canvas_seconds)
    return TimedRequest(
        prompt=run.number,
        seed=result.seed,
        prompt_tokens=stats.prompt_tokens,
        generated_tokens=stats.generated_tokens,
        finish_reason=result.finish_reason,
        right=None if run.task is None else run.task.is_right(result),
        is_empty=not (result.text or result.reasoning or result.tool_calls),
        repeated_tokens=repeated(result.token_ids),
        steps=stats.denoising_steps,
        contexts=tuple(contexts[: len(rows)]),
        rows=tuple(map(tuple, rows)),
        accepted=tuple(map(tuple, accepted)),
        step_seconds=tuple(map(tuple, seconds)),
        prefill_seconds=stats.prefill_seconds,
        encode_seconds=max(0.0, stats.denoising_seconds - denoising),
        rest_seconds=max(0.0, stats.total_seconds - stats.prefill_seconds - stats.denoising_seconds),
        total_seconds=stats.total_seconds,
        first_draft_seconds=stats.first_draft_seconds,
        peak_memory_bytes=round(stats.peak_memory_gb * 1e9),
    )


def time_requests(pipeline: Pipeline, runs: Sequence[Run], progress: Progress = lambda *_: None) -> list[TimedRequest]:
    """Answer prompts one after the other; `progress` is called before and after every one."""
    timed = []
    for index, run in enumerate(runs):
        progress(index, len(runs))
        timed.append(time_request(pipeline, run))
    progress(len(runs), len(runs))
    return timed


def repeated(token_ids: Sequence[int]) -> int:
    """Return how many tokens are equal to the one before them."""
    return sum(a == b for a, b in pairwise(token_ids))


# -- together ---------------------------------------------------------------------------------------------------------


def describe_steps(steps: Sequence[int]) -> dict[str, Any]:
    """Return mean, median, 90th percentile and histogram of K, the steps per canvas."""
    return {
        "mean": float(np.mean(steps)),
        "median": float(np.median(steps)),
        "p90": float(np.percentile(steps, 90)),
        "histogram": {str(count): number for count, number in sorted(Counter(steps).items())},
    }


def mean_by_step(canvases: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean of the first entries, of the second ones, and so on; shorter canvases leave the later ones."""
    longest = max(map(len, canvases))
    return [float(np.mean([c[i] for c in canvases if len(c) > i])) for i in range(longest)]


def summarise(requests: Sequence[TimedRequest]) -> dict[str, Any]:
    """Return the numbers of requests together, JSON-ready; every speed stands beside its K.

    Raises:
        ValueError: no canvas was denoised.
    """
    steps = [count for request in requests for count in request.steps]
    if not steps:
        raise ValueError("no canvas was denoised: expected at least one prompt and max-tokens of at least 1")
    seconds = [each for request in requests for canvas in request.step_seconds for each in canvas]
    generated = sum(request.generated_tokens for request in requests)
    rows = sum(sum(canvas) for request in requests for canvas in request.rows)
    denoising, encode = sum(seconds), sum(request.encode_seconds for request in requests)
    judged = [request.right for request in requests if request.right is not None]
    described = describe_steps(steps)
    return {
        "requests": len(requests),
        "canvases": len(steps),
        "denoising_steps": sum(steps),
        "row_steps": rows,
        "rows_per_step": rows / sum(steps),
        "prompt_tokens": sum(request.prompt_tokens for request in requests),
        "generated_tokens": generated,
        "steps_per_canvas": described,
        "tokens_per_forward": generated / sum(steps),
        "accepted_per_step": mean_by_step([canvas for request in requests for canvas in request.accepted]),
        "phases": _phases(requests),
        "step_seconds": {
            "median": float(np.median(seconds)),
            "p90": float(np.percentile(seconds, 90)),
            "by_step": mean_by_step([canvas for request in requests for canvas in request.step_seconds]),
        },
        "speed": {
            "steps_per_canvas": described["mean"],
            "tokens_per_second": generated / (denoising + encode),
            "tokens_per_second_whole_request": generated / sum(request.total_seconds for request in requests),
            "prompt_tokens_per_second": _rate(requests),
            "median_seconds_per_request": float(np.median([request.total_seconds for request in requests])),
            "median_first_draft_seconds": _median([request.first_draft_seconds for request in requests]),
        },
        "quality": {
            "right": sum(judged),
            "judged": len(judged),
            "accuracy": sum(judged) / len(judged) if judged else None,
            "repeated_tokens": sum(request.repeated_tokens for request in requests),
            "empty_answers": sum(request.is_empty for request in requests),
        },
        "peak_memory_bytes": max(request.peak_memory_bytes for request in requests),
    }


def _phases(requests: Sequence[TimedRequest]) -> dict[str, dict[str, float]]:
    names = {
        "prefill": "prefill_seconds",
        "denoising": "denoising_seconds",
        "encode": "encode_seconds",
        "rest": "rest_seconds",
    }
    whole = sum(request.total_seconds for request in requests)
    phases = {}
    for name, attribute in names.items():
        each = [getattr(request, attribute) for request in requests]
        phases[name] = {
            "seconds": sum(each),
            "share": sum(each) / whole,
            "median": float(np.median(each)),
            "p90": float(np.percentile(each, 90)),
        }
    return phases


def _rate(requests: Sequence[TimedRequest]) -> float:
    seconds = sum(request.prefill_seconds for request in requests)
    return sum(request.prompt_tokens for request in requests) / seconds if seconds else 0.0


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def achieved(
    requests: Sequence[TimedRequest], pipeline: Pipeline, bits: Bits, distinct_experts: float | None
) -> dict[str, float]:
    """Return what the steps computed and moved per second, by the counts of `counting.py`.

    Args:
        requests: timed.
        pipeline: that ran them.
        bits: per weight.
        distinct_experts: measured, per layer and step; None takes what uniform routing gives.
    """
    text, element_bytes = pipeline.config.text, pipeline.model.dtype.size
    flops = nbytes = prefill = 0.0
    for request in requests:
        for context, of_canvas in zip(request.contexts, request.rows, strict=True):
            for rows, count in Counter(of_canvas).items():
                how = Pass(rows, context, bits, distinct_experts, element_bytes=element_bytes)
                step = total(step_work(text, how))
                flops += count * step.flops
                nbytes += count * step.nbytes
        prefill += total(encode_work(text, Pass(request.prompt_tokens, 0, bits))).flops
    seconds = sum(request.denoising_seconds for request in requests)
    steps = sum(sum(request.steps) for request in requests)
    prefill_seconds = sum(request.prefill_seconds for request in requests)
    return {
        "steps_per_canvas": float(np.mean([count for request in requests for count in request.steps])),
        "flops_per_step": flops / steps,
        "bytes_per_step": nbytes / steps,
        "flops_per_second": flops / seconds,
        "bytes_per_second": nbytes / seconds,
        "prefill_flops_per_second": prefill / prefill_seconds if prefill_seconds else 0.0,
    }


def model_bits(model: DiffusionGemma) -> dict[str, float]:
    """Return bits per weight of each part as loaded, scales and biases included."""
    nbytes = dict.fromkeys(WEIGHT_PARTS, 0)
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, array in arrays.items():
        part = part_of(name.rpartition(".")[0])
        if part is not None and part in nbytes:
            nbytes[part] += array.nbytes
    counts = parameters(model.config.text)
    return {part: 8 * each / counts[part] for part, each in nbytes.items()}
