"""What the clock must not see: experts, times of parts, memory and waits of a step, on answers given once more.

Beside every denoising step of a probed answer the same step runs a second time with a wait around each part of every
layer. The sum of the parts is more than the step takes in one piece: waiting costs, and nothing overlaps. The wrappers
stand in for submodules while a probe runs and are gone afterwards, so that they cost nothing at any other time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .denoise import StepInput, StepResult, StepRules, denoising_step
from .events import DenoisingStep, PrefillProgress
from .model import DiffusionGemma
from .pipeline import Pipeline
from .workload import Run

PARTS = {"mlp": "dense MLP", "router": "router", "experts": "experts"}  # of a layer, besides attention
PROJECTIONS, ATTENTION = "attention projections", "attention"
WAITS = ("eval", "synchronize")  # functions of mlx.core that return when something has been computed
Place = tuple[nn.Module, str, Callable[[nn.Module], Any]]  # parent, name of the submodule, maker of its stand-in
PART_NAMES = (PROJECTIONS, ATTENTION, *PARTS.values(), "self-conditioning", "vocabulary and sampler", "rest")


@dataclass
class Findings:
    """What the probed steps showed."""

    part_seconds: list[dict[str, float]] = field(default_factory=list)  # of each step
    routed: list[np.ndarray] = field(default_factory=list)  # of each step [layers, E]: rows of each expert
    step_numbers: list[int] = field(default_factory=list)  # of each step, from 1 in its canvas
    temporary_bytes: list[int] = field(default_factory=list)  # peak of a step over what was active before it
    waits: list[int] = field(default_factory=list)  # of each step after the first of its canvas


def probe(pipeline: Pipeline, runs: Sequence[Run], progress: Callable[[int, int], None] = lambda *_: None) -> Findings:
    """Answer prompts once more and look at every step."""
    findings = Findings()
    for index, run in enumerate(runs):
        progress(index, len(runs))
        _Probe(pipeline, findings).answer(run)
    progress(len(runs), len(runs))
    return findings


class _Probe:
    """Looks at one request."""

    def __init__(self, pipeline: Pipeline, findings: Findings) -> None:
        self._model = pipeline.model
        self._pipeline = pipeline.watched(self._watch)
        self._findings = findings
        self._before: int | None = None  # bytes that were active before the step under way; None: not only a step
        self._waits: list[str] = []
        self._step = 0

    def answer(self, run: Run) -> None:
        """Answer the prompt."""
        with counted_waits(self._waits):
            for event in self._pipeline.stream_prepared(run.prepared):
                is_step = isinstance(event, DenoisingStep)
                self._step = event.step if isinstance(event, DenoisingStep) else 0
                self._before = mx.get_active_memory() if is_step or isinstance(event, PrefillProgress) else None
                mx.reset_peak_memory()
                self._waits.clear()

    def _watch(self, inputs: Sequence[StepInput], rules: Sequence[StepRules], results: Sequence[StepResult]) -> None:
        """Note what the step has left behind, then run it again in parts."""
        if self._before is not None:
            self._findings.temporary_bytes.append(max(0, mx.get_peak_memory() - self._before))
        if self._step:
            self._findings.waits.append(len(self._waits))
        seconds, routed = run_in_parts(self._model, inputs, rules)
        self._findings.part_seconds.append(seconds)
        self._findings.routed.append(routed)
        self._findings.step_numbers.append(self._step + 1)


@contextmanager
def counted_waits(calls: list[str]) -> Iterator[None]:
    """Append to `calls` the name of every function called that waits for MLX.

    Reading a number that nobody has asked to evaluate waits too and is not seen here.
    """
    originals = {name: getattr(mx, name) for name in WAITS}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in WAITS:
        setattr(mx, name, counting(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(mx, name, original)


# -- a step in parts --------------------------------------------------------------------------------------------------


class _Waiting:
    """Stands in for a module: waits for its inputs, runs it, waits for its outputs, and adds the seconds up."""

    def __init__(
        self, module: nn.Module, name: str, seconds: dict[str, float], after: Callable[[Any], None] | None
    ) -> None:
        self._module = module
        self._name = name
        self._seconds = seconds
        self._after = after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mx.eval([argument for argument in args if isinstance(argument, mx.array)])
        started = time.perf_counter()
        result = self._module(*args, **kwargs)
        mx.eval(result)
        self._seconds[self._name] += time.perf_counter() - started
        if self._after is not None:
            self._after(result)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _WaitingAttention:
    """Stands in for `Attention`: what lies between its two projections is attention over prefix and canvas."""

    def __init__(self, module: nn.Module, seconds: dict[str, float]) -> None:
        self._module = module
        self._seconds = seconds
        self._asked = 0.0  # when the last queries, keys and values were there

    def ask(self, x: mx.array) -> Any:
        """Time the projections in front of attention; see `Attention.ask`."""
        mx.eval(x)
        started = time.perf_counter()
        result = self._module.ask(x)
        mx.eval(result)
        self._asked = time.perf_counter()
        self._seconds[PROJECTIONS] += self._asked - started
        return result

    def read(self, attended: mx.array) -> Any:
        """Take the time since `ask` as that of attention, and time the projection behind it; see `Attention.read`."""
        mx.eval(attended)
        started = time.perf_counter()
        self._seconds[ATTENTION] += started - self._asked
        result = self._module.read(attended)
        mx.eval(result)
        self._seconds[PROJECTIONS] += time.perf_counter() - started
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextmanager
def replaced(modules: Sequence[Place]) -> Iterator[None]:
    """Put something else in the place of submodules."""
    originals = [(parent, name, parent[name]) for parent, name, _ in modules]
    try:
        for parent, name, make in modules:  # items, not attributes: the order of the parameters stays
            parent[name] = make(parent[name])
        yield
    finally:
        for parent, name, original in originals:
            parent[name] = original


def run_in_parts(
    model: DiffusionGemma, inputs: Sequence[StepInput], rules: Sequence[StepRules]
) -> tuple[dict[str, float], np.ndarray]:
    """Run one step with a wait around each part.

    Returns:
        seconds of each part, and how many rows each expert of each layer had; [layers, E].
    """
    decoder, seconds = model.model.decoder, dict.fromkeys(PART_NAMES, 0.0)
    routed: list[Any] = []
    ends: list[float] = []  # of the final norm: behind it comes what touches the vocabulary

    def waiting(name: str, after: Callable[[Any], None] | None = None) -> Callable[[nn.Module], Any]:
        return lambda module: _Waiting(module, name, seconds, after)

    places: list[Place] = [
        (layer, name, waiting(part, routed.append if part == "router" else None))
        for layer in decoder.layers
        for name, part in PARTS.items()
    ]
    places += [(layer, "self_attn", lambda module: _WaitingAttention(module, seconds)) for layer in decoder.layers]
    places.append((decoder, "self_conditioning", waiting("self-conditioning")))
    places.append((decoder, "norm", waiting("rest", lambda _: ends.append(time.perf_counter()))))
    started = time.perf_counter()
    with replaced(places):
        results = denoising_step(model, inputs, rules, lazy=False)
    mx.eval(results)
    stopped = time.perf_counter()
    seconds["vocabulary and sampler"] = stopped - ends[0]
    seconds["rest"] = max(0.0, stopped - started - sum(each for name, each in seconds.items() if name != "rest"))
    E = model.config.text.num_experts
    counts = [np.bincount(np.array(indices).ravel(), minlength=E) for indices, _ in routed]
    return seconds, np.stack(counts)


# -- together ---------------------------------------------------------------------------------------------------------


def describe(findings: Findings) -> dict[str, Any]:
    """Return the findings JSON-ready."""
    return {
        "steps": len(findings.part_seconds),
        "part_seconds": {
            name: float(np.median([seconds[name] for seconds in findings.part_seconds])) for name in PART_NAMES
        },
        "experts": _describe_experts(findings),
        "step_temporary_bytes": max(findings.temporary_bytes, default=None),
        "waits_per_step": float(np.mean(findings.waits)) if findings.waits else None,
    }


def _describe_experts(findings: Findings) -> dict[str, Any]:
    """Return how many experts of a layer the rows of a step use, and how many rows an expert that is used has."""
    routed = np.stack(findings.routed)  # [steps, layers, E]
    distinct = (routed > 0).sum(axis=-1)  # [steps, layers]
    rows = routed[routed > 0]
    numbers = np.array(findings.step_numbers)
    return {
        "of": routed.shape[-1],
        "distinct": {
            "mean": float(distinct.mean()),
            "min": int(distinct.min()),
            "max": int(distinct.max()),
            "by_layer": [float(mean) for mean in distinct.mean(axis=0)],
            "by_step": [float(distinct[numbers == n].mean()) for n in range(1, numbers.max() + 1)],
        },
        "rows_per_expert": {
            "mean": float(rows.mean()),
            "median": float(np.median(rows)),
            "max": int(rows.max()),
            "histogram": _powers_of_two(rows),
        },
    }


def _powers_of_two(values: np.ndarray) -> dict[str, int]:
    """Return how many values lie in 1, 2 to 3, 4 to 7, and so on."""
    exponents = np.floor(np.log2(values)).astype(int)
    found = {}
    for exponent in range(exponents.max() + 1):
        low, high = 2**exponent, 2 ** (exponent + 1) - 1
        found[str(low) if low == high else f"{low}-{high}"] = int((exponents == exponent).sum())
    return found
