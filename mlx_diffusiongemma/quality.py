"""How far a checkpoint is from another one, and how good its answers are.

Three measurements, from the inside to the outside:

    weight_errors           what quantisation did to each weight
    compare                 what both models say about the same canvases, along the way that the reference took
    generation_statistics   denoising steps and right answers when a model goes its own way

The second needs `trajectories.record_trajectories` first. The command line is `evaluate.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import sampler
from .config import ModelConfig
from .events import Result
from .model import DiffusionGemma
from .pipeline import Pipeline, wired_limit
from .recipes import PARTS, part_of
from .tasks import Task
from .trajectories import Progress, Reader, Report, Trajectory, answer
from .vocabulary import CHUNK_ELEMENTS_CPU, row_sums

WEIGHTS_AT_ONCE = 1 << 24  # of one module, dequantised: 67 MB in float32
OTHER_PART = "other"  # a module that no recipe names
PART_ORDER = (*(part for part, _ in PARTS), OTHER_PART)

# -- both models on the same canvases -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement(Report):
    """How alike two models read the same canvases; shares are of `positions`, divergences in nats per position."""

    canvases: int
    steps: int
    positions: int  # steps x C
    mean_kl: float  # KL(reference || candidate) of what the sampler sees: soft-capped, at the step's temperature
    max_kl: float
    argmax_agreement: float  # the same likeliest token
    accepted_agreement: float  # both accept the position, or both do not
    mean_entropy_difference: float  # mean of |difference|, nats


def check_comparable(reference: ModelConfig, candidate: ModelConfig) -> None:
    """Raise `ValueError` unless two models read the same canvases: one vocabulary size, one canvas length."""
    for name, wanted, got in (
        ("vocab_size", reference.text.vocab_size, candidate.text.vocab_size),
        ("canvas_length", reference.canvas_length, candidate.canvas_length),
    ):
        if got != wanted:
            raise ValueError(f"the candidate has {name} {got}, expected {wanted} as in the reference")


def compare(
    reference: DiffusionGemma,
    candidate: DiffusionGemma,
    trajectories: Sequence[Trajectory],
    *,
    chunk_elements: int = CHUNK_ELEMENTS_CPU,
    progress: Progress = lambda *_: None,
) -> Agreement:
    """Show both models the same canvases and measure how alike they read them.

    Each model prefills the prefix itself and carries its own self-conditioning signal from step to step.

    Args:
        reference, candidate: with one vocabulary and one canvas length.
        trajectories: of the reference, from `record_trajectories`.
        chunk_elements: rows x vocabulary that are in memory at a time.
        progress: called before and after every canvas.

    Raises:
        ValueError: models that cannot be compared, or nothing to compare them on.
        FloatingPointError: a model that computes NaN.
    """
    check_comparable(reference.config, candidate.config)
    if not trajectories:
        raise ValueError("trajectories: got none, expected at least one canvas")
    measured: list[np.ndarray] = []
    with wired_limit(reference):
        for index, trajectory in enumerate(trajectories):
            progress(index, len(trajectories))
            measured += _compare_along(reference, candidate, trajectory, chunk_elements)
            mx.clear_cache()
    progress(len(trajectories), len(trajectories))
    kl, same_argmax, same_decision, difference = np.stack(measured, axis=1)  # each [steps, C]
    if not np.isfinite(kl).all():
        raise FloatingPointError("a model computed NaN on the reference's canvases: bad weights?")
    return Agreement(
        canvases=len(trajectories),
        steps=len(kl),
        positions=kl.size,
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        argmax_agreement=float(same_argmax.mean()),
        accepted_agreement=float(same_decision.mean()),
        mean_entropy_difference=float(difference.mean()),
    )


def _compare_along(
    reference: DiffusionGemma, candidate: DiffusionGemma, trajectory: Trajectory, chunk_elements: int
) -> Iterator[np.ndarray]:
    """Yield for each step KL, same argmax, same decision and entropy difference, [4, C] float64."""
    first, second = (Reader(model, trajectory.prefix) for model in (reference, candidate))
    V, C = reference.config.text.vocab_size, reference.config.canvas_length
    for step in trajectory.steps:
        canvas, temperature = mx.array(step.canvas, dtype=mx.int32), mx.array(step.temperature, dtype=mx.float32)
        one, other = (reader.read(canvas, temperature, chunk_elements) for reader in (first, second))
        kl = _divergence(first, second, temperature, C, max(1, chunk_elements // V))
        decisions = [sampler.accept(reading.entropy, trajectory.entropy_bound) for reading in (one, other)]
        rows = (kl, one.argmax == other.argmax, decisions[0] == decisions[1], mx.abs(one.entropy - other.entropy))
        yield np.stack([np.array(row, dtype=np.float64) for row in rows])


def _divergence(reference: Reader, candidate: Reader, temperature: mx.array, C: int, chunk_rows: int) -> mx.array:
    """Return KL(reference || candidate) of the canvas both read last, [C] float32."""
    parts = []
    for start in range(0, C, chunk_rows):
        rows = slice(start, start + chunk_rows)
        log_p, log_q = (reader.log_probabilities(rows, temperature) for reader in (reference, candidate))
        parts.append(row_sums(mx.exp(log_p) * (log_p - log_q)))
        mx.eval(parts[-1])  # now, so that no two chunks are in memory together
    return mx.concatenate(parts)


# -- weights ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightError(Report):
    """What quantisation did to one module: Frobenius norms of the difference and of the reference's weight."""

    path: str
    part: str
    bits: int
    group_size: int
    mode: str
    weights: int  # how many
    error_norm: float
    reference_norm: float

    @property
    def relative_error(self) -> float:
        """RMS of the difference over RMS of the reference's weight."""
        return _ratio(self.error_norm, self.reference_norm)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values, the relative error among them."""
        return {**super().to_dict(), "relative_error": self.relative_error}


@dataclass(frozen=True)
class PartError(Report):
    """The modules of one part of the model together."""

    part: str
    modules: int
    weights: int
    settings: tuple[str, ...]  # such as "4-bit affine, group 64"
    relative_error: float  # over all weights
    worst_error: float
    worst_module: str


def weight_errors(reference: DiffusionGemma, candidate: DiffusionGemma) -> Iterator[WeightError]:
    """Measure every quantised module of the candidate against the reference's weight, one at a time.

    The reference may be quantised too; its weight is then what it stands for.

    Raises:
        ValueError: a module that the reference lacks or that has another shape there.
    """
    originals = dict(reference.named_modules())
    for path, module in candidate.named_modules():
        if "scales" not in module:
            continue
        original = originals.get(path)
        if original is None or "weight" not in original:
            raise ValueError(f"{path} is quantised in the candidate and has no weight in the reference")
        if _shape(original) != _shape(module):
            raise ValueError(f"{path} has shape {_shape(module)}, expected {_shape(original)} as in the reference")
        yield _weight_error(path, original, module)


def by_part(errors: Iterable[WeightError]) -> list[PartError]:
    """Sum up the modules of each part, in the order of `recipes.PARTS`."""
    groups: dict[str, list[WeightError]] = {}
    for error in errors:
        groups.setdefault(error.part, []).append(error)
    parts = []
    for part in sorted(groups, key=PART_ORDER.index):
        group = groups[part]
        worst = max(group, key=lambda error: error.relative_error)
        settings = {f"{e.bits}-bit {e.mode}, group {e.group_size}" for e in group}
        total = _ratio(math.hypot(*(e.error_norm for e in group)), math.hypot(*(e.reference_norm for e in group)))
        weights = sum(e.weights for e in group)
        parts.append(
            PartError(part, len(group), weights, tuple(sorted(settings)), total, worst.relative_error, worst.path)
        )
    return parts


def _ratio(error: float, reference: float) -> float:
    return error / reference if reference else 0.0 if error == 0 else math.inf


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a module's weight, unpacked."""
    if "scales" not in module:
        return module["weight"].shape
    return (*module["weight"].shape[:-1], module["scales"].shape[-1] * module.group_size)


def _weight_error(path: str, original: nn.Module, module: nn.Module) -> WeightError:
    shape = _shape(module)
    rows = max(1, WEIGHTS_AT_ONCE * shape[0] // math.prod(shape))  # of the vocabulary, of the outputs, or experts
    totals = np.zeros(2)  # squares of the difference, and of the reference's weight
    for start in range(0, shape[0], rows):
        wanted, got = (_float_weight(m, slice(start, start + rows)) for m in (original, module))
        totals += np.array(mx.stack([mx.square(x).sum(axis=-1).sum() for x in (got - wanted, wanted)]))
    return WeightError(
        path,
        part_of(path) or OTHER_PART,
        module.bits,
        module.group_size,
        module.mode,
        math.prod(shape),
        *np.sqrt(totals).tolist(),
    )


def _float_weight(module: nn.Module, rows: slice) -> mx.array:
    """Return rows of a module's weight, along its first axis, in float32."""
    weight = module["weight"][rows]
    if "scales" not in module:
        return weight.astype(mx.float32)
    scales, biases = module["scales"][rows], module.get("biases")
    if biases is not None:  # affine: in bfloat16 the product would be rounded once more than in the model's kernels
        scales, biases = scales.astype(mx.float32), biases[rows].astype(mx.float32)
    weight = mx.dequantize(weight, scales, biases, group_size=module.group_size, bits=module.bits, mode=module.mode)
    return weight.astype(mx.float32)


# -- each model on its own way ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy(Report):
    """Answers that are exactly the expected ones."""

    right: int
    tasks: int
    exact_match: float


@dataclass(frozen=True)
class Statistics(Report):
    """What a model's own generation took, and how often it was right."""

    tasks: int
    canvases: int
    denoising_steps: int
    generated_tokens: int
    mean_steps: float  # per canvas, as the next two
    median_steps: float
    p90_steps: float  # 90th percentile, interpolated linearly
    tokens_per_forward: float  # generated tokens per denoising step
    accuracy: Accuracy | None  # None where no task has an expected answer
    families: dict[str, Accuracy] = field(default_factory=dict)


def generation_statistics(
    pipeline: Pipeline,
    tasks: Iterable[Task],
    seed: int,
    *,
    max_tokens: int | None = None,
    progress: Progress = lambda *_: None,
) -> Statistics:
    """Generate the answers; count steps, tokens and right answers.

    Args:
        pipeline: what is measured.
        tasks: prompts, with expected answers or without.
        seed: of the first task; the next has the next.
        max_tokens: tokens per answer; None for the checkpoint's default.
        progress: called before and after every task.

    Raises:
        ValueError: no task, a prompt that the checkpoint cannot take, or `max_tokens` of 0.
    """
    tasks = list(tasks)
    results = []
    for index, task in enumerate(tasks):
        progress(index, len(tasks))
        results.append(answer(pipeline, task, seed + index, max_tokens))
    progress(len(tasks), len(tasks))
    return summarize(tasks, results)


def summarize(tasks: Sequence[Task], results: Sequence[Result]) -> Statistics:
    """Return the statistics of answers, one per task. Raise `ValueError` where there is nothing to count."""
    steps = [count for result in results for count in result.stats.denoising_steps]
    if not steps:
        raise ValueError("no canvas was denoised: expected at least one task and max_tokens of at least 1")
    generated = sum(result.stats.generated_tokens for result in results)
    judged: dict[str, list[bool]] = {}
    for task, result in zip(tasks, results, strict=True):
        right = task.is_right(result)
        if right is not None:
            judged.setdefault(task.family, []).append(right)
    everything = [right for family in judged.values() for right in family]
    return Statistics(
        tasks=len(tasks),
        canvases=len(steps),
        denoising_steps=sum(steps),
        generated_tokens=generated,
        mean_steps=float(np.mean(steps)),
        median_steps=float(np.median(steps)),
        p90_steps=float(np.percentile(steps, 90)),
        tokens_per_forward=generated / sum(steps),
        accuracy=_accuracy(everything) if everything else None,
        families={family: _accuracy(judged[family]) for family in sorted(judged)},
    )


def _accuracy(judged: Sequence[bool]) -> Accuracy:
    return Accuracy(sum(judged), len(judged), sum(judged) / len(judged))
