"""One benchmark from the first request to the last number, as one JSON-ready report."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import __version__
from .chips import Chip, describe_machine
from .measure import Progress, TimedRequest, achieved, model_bits, summarise, time_requests
from .peer import Peer, compare
from .pipeline import Pipeline
from .policies import find_policy
from .probe import describe, probe
from .roofline import SCENARIOS, compare_with, predict
from .workload import Run


@dataclass(frozen=True)
class Bench:
    """What is measured, loaded and checked."""

    model: str  # as the user named it
    pipeline: Pipeline
    load_seconds: float
    prompts: str  # what the requests are called
    runs: Sequence[Run]
    chip: Chip | None = None  # to predict for
    peer: Peer | None = None  # to compare with


def make_report(
    bench: Bench, probes: int, progress: Callable[[str], Progress] = lambda what: lambda *_: None
) -> dict[str, Any]:
    """Warm up with the first request, time all of them, look inside the steps of some, compare; return every number.

    Args:
        bench: what is measured.
        probes: how many requests are answered once more, off the clock.
        progress: given what is counted, returns what is called before and after every request.

    Raises:
        ValueError: no canvas was denoised.
    """
    pipeline, runs = bench.pipeline, bench.runs
    [warm_up] = time_requests(pipeline, runs[:1])
    traced = pipeline.retraces
    timed = time_requests(pipeline, runs, progress("answers"))
    retraces = {"warm_up": traced, "measured": pipeline.retraces - traced}
    summary = summarise(timed)
    found = describe(probe(pipeline, runs[:probes], progress("probes"))) if probes else None
    bits = model_bits(pipeline.model)
    distinct = None if found is None else found["experts"]["distinct"]["mean"]
    report = {
        "version": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "model": _describe_model(bench, bits),
        "workload": _describe_workload(bench),
        "warm_up_seconds": warm_up.total_seconds,
        "retraces": retraces,
        "summary": summary,
        "achieved": achieved(timed, pipeline, bits, distinct),
        "probe": found,
        "requests": [request.to_dict() for request in timed],
        "roofline": None,
        "compare": None,
    }
    if bench.chip is not None:
        report["roofline"] = beside_roofline(bench.chip, pipeline, timed, report)
    if bench.peer is not None:
        report["compare"] = compare(pipeline, bench.peer, runs, progress("answers in turns"))
    return report


def _describe_model(bench: Bench, bits: dict[str, float]) -> dict[str, Any]:
    loaded = bench.pipeline.load_report
    return {
        "name": bench.model,
        "load_seconds": bench.load_seconds,
        "weight_bytes": None if loaded is None else loaded.nbytes,
        "dtype": str(bench.pipeline.model.dtype).removeprefix("mlx.core."),
        "bits_per_weight": bits,
        "canvas_length": bench.pipeline.config.canvas_length,
    }


def _describe_workload(bench: Bench) -> dict[str, Any]:
    first = bench.runs[0]
    return {
        "name": bench.prompts,
        "prompts": len({run.number for run in bench.runs}),
        "random": first.task is None,
        "seeds": sorted({run.prepared.seed for run in bench.runs}),
        "policy": find_policy(first.prepared.options.policy).name,
        "options": {name: value for name, value in asdict(first.prepared.options).items() if name != "seed"},
    }


def beside_roofline(
    chip: Chip, pipeline: Pipeline, requests: Sequence[TimedRequest], report: dict[str, Any]
) -> dict[str, Any]:
    """Return the predictions for a chip, at the measured contexts, rows and experts, beside what was measured."""
    summary, found, C = report["summary"], report["probe"], pipeline.config.canvas_length
    weighted = sum(
        context * steps for request in requests for context, steps in zip(request.contexts, request.steps, strict=True)
    )
    context = weighted / summary["denoising_steps"]
    distinct = None if found is None else found["experts"]["distinct"]["mean"]
    scenarios = []
    for scenario in SCENARIOS:
        prediction = predict(
            pipeline.config.text,
            C,
            chip,
            scenario,
            report["model"]["bits_per_weight"],
            context=round(context),
            distinct_experts=distinct,
            row_share=summary["rows_per_step"] / C,
            element_bytes=pipeline.model.dtype.size,
        )
        seconds = None if found is None else found["part_seconds"]
        mean = summary["steps_per_canvas"]["mean"]
        scenarios.append(compare_with(prediction, summary["step_seconds"]["median"], mean, seconds))
    return {"chip": chip.to_dict(), "context": context, "distinct_experts": distinct, "scenarios": scenarios}
