"""Measure how sensitive every module is to quantisation, and spend bits where they matter.

Each module in turn is quantised with `PROBE` while all others stay as they are, and the model is shown the canvases of
its own denoising trajectories: the KL divergence of the canvas logits, and the change in denoising steps of whole
answers, are the module's sensitivity. What other settings would cost is scaled from that by the squared weight error,
which is cheap. The budget then goes, step by step, to the module that gains most per bit.

The method is that of mixed-precision post-training quantisation, such as HAWQ (arXiv 1905.03696), with the objective
measured instead of approximated by the Hessian.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from statistics import fmean

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .model import DiffusionGemma
from .pipeline import Pipeline
from .quality import compare, generation_statistics
from .recipes import Quantization, part_of
from .tasks import Task
from .trajectories import Progress, record_trajectories

PROBE = Quantization(64, 4)
# From few bits to many. Two bits are missing: their error is too large to be scaled from a four-bit probe.
CHOICES = (
    Quantization(64, 3),
    Quantization(64, 4),
    Quantization(32, 4),
    Quantization(64, 5),
    Quantization(64, 6),
    Quantization(64, 8),
)
WEIGHTS_AT_ONCE = 1 << 24  # that are quantised at a time


@dataclass(frozen=True)
class Sensitivity:
    """What quantising one module costs."""

    path: str
    weights: int  # how many
    kl: float  # of the canvas logits when only this module is quantised with PROBE; nats per position
    steps_change: float  # denoising steps per canvas, relative: 0.1 is 10 % more
    errors: Mapping[Quantization, float]  # squared error of the weights, relative, for every choice that fits

    def cost(self, settings: Quantization, probe: Quantization) -> float:
        """Estimate what `settings` cost: divergence, weighted by the time that more denoising steps take."""
        scale = self.errors[settings] / self.errors[probe] if self.errors[probe] else 0.0
        return self.kl * (1 + max(0.0, self.steps_change)) * scale


def stored_bits(settings: Quantization, scale_bits: int = 16) -> float:
    """Return the bits per weight of affine settings; scale and bias of a group have `scale_bits` each."""
    return settings.bits + 2 * scale_bits / settings.group_size


def fitting_choices(columns: int) -> dict[Quantization, Quantization]:
    """Return each choice as it would be stored for rows of `columns`: with a smaller group where one is needed."""
    return {choice: fitted for choice in CHOICES if (fitted := choice.fit(columns)) is not None}


def round_trip(weight: mx.array, settings: Quantization) -> mx.array:
    """Return a weight [..., columns] quantised and dequantised."""
    rows = max(1, WEIGHTS_AT_ONCE * weight.shape[0] // weight.size)
    group_size, bits, mode = settings.group_size, settings.bits, settings.mode
    parts = []
    for start in range(0, weight.shape[0], rows):
        packed = mx.quantize(weight[start : start + rows], group_size=group_size, bits=bits, mode=mode)
        parts.append(mx.dequantize(*packed, group_size=group_size, bits=bits, mode=mode))
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def relative_error(weight: mx.array, settings: Quantization) -> float:
    """Return the squared error of a quantised weight over its squared norm."""
    rows = max(1, WEIGHTS_AT_ONCE * weight.shape[0] // weight.size)
    error = norm = 0.0
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows].astype(mx.float32)
        error += _squares(round_trip(part, settings) - part)
        norm += _squares(part)
    return error / norm if norm else 0.0


def _squares(x: mx.array) -> float:
    """Return the sum of squares of float32 numbers, in two levels: one sum over millions loses digits."""
    return float(np.array(mx.square(x).sum(axis=-1).sum()))


def probe_of(errors: Mapping[Quantization, float]) -> Quantization:
    """Return the choice that stands for `PROBE` where its group size does not divide the rows."""
    return min((choice for choice in errors if choice.bits == PROBE.bits), key=lambda c: abs(c.group_size - 64))


def measure(
    pipeline: Pipeline,
    tasks: Sequence[Task],
    seed: int,
    *,
    max_tokens: int | None = None,
    progress: Progress = lambda *_: None,
) -> list[Sensitivity]:
    """Measure every module that a recipe may quantise.

    Args:
        pipeline: the checkpoint in full precision.
        tasks: prompts whose canvases calibrate; real ones, since noise has no trajectories.
        seed: of the first task.
        max_tokens: tokens per answer; None for the checkpoint's default.
        progress: called before and after every module.

    Raises:
        ValueError: no module to quantise, no task, or a prompt that the checkpoint cannot take.
    """
    trajectories = record_trajectories(pipeline, tasks, seed, max_tokens=max_tokens)
    if not trajectories:
        raise ValueError("no canvas to measure on: expected at least one task and max_tokens of at least 1")
    steps = fmean(len(trajectory.steps) for trajectory in trajectories)
    twin = _twin(pipeline.model)
    modules = [(path, module) for path, module in twin.named_modules() if part_of(path) and "weight" in module]
    if not modules:
        raise ValueError("the checkpoint has no module that a recipe would quantise")
    found = []
    for index, (path, module) in enumerate(modules):
        progress(index, len(modules))
        weight = module["weight"]
        errors = {fitted: relative_error(weight, fitted) for fitted in fitting_choices(weight.shape[-1]).values()}
        if not errors:
            continue  # no group size divides its rows: it stays as it is
        module["weight"] = round_trip(weight, probe_of(errors))
        kl = compare(pipeline.model, twin, trajectories).mean_kl
        # A new pipeline each time: a compiled step holds the weights it was traced with.
        other = pipeline.with_model(twin)
        mean_steps = generation_statistics(other, tasks, seed, max_tokens=max_tokens).mean_steps
        module["weight"] = weight
        found.append(Sensitivity(path, prod(weight.shape), kl, mean_steps / steps - 1, errors))
        mx.clear_cache()
    progress(len(modules), len(modules))
    return found


def _twin(model: DiffusionGemma) -> DiffusionGemma:
    """Return a second network over the same arrays: replacing a weight in it leaves the first as it is."""
    twin = DiffusionGemma(model.config)
    twin.load_weights(list(dict(tree_flatten(model.parameters())).items()))
    twin.eval()
    return twin


def allocate(
    sensitivities: Sequence[Sensitivity], fixed_bits: int, parameters: int, target: float, scale_bits: int = 16
) -> dict[str, Quantization]:
    """Choose the settings of every module within a budget.

    Args:
        sensitivities: from `measure`.
        fixed_bits: bits of everything that is not quantised.
        parameters: of the whole checkpoint.
        target: bits per parameter of the whole checkpoint.
        scale_bits: of a group's scale, and of its bias: those of the dtype that is quantised.

    Returns:
        settings by module path.

    Raises:
        ValueError: a target that even the smallest choices exceed, or that is not a number.
    """
    if not isfinite(target):
        raise ValueError(f"target-bpw: got {target}, expected a number of bits per weight")

    def stored(settings: Quantization) -> float:
        return stored_bits(settings, scale_bits)

    ladders = {each.path: _ladder(each) for each in sensitivities}
    chosen = dict.fromkeys(ladders, 0)
    bits = fixed_bits + sum(each.weights * stored(ladders[each.path][0]) for each in sensitivities)
    if bits > target * parameters:
        raise ValueError(f"target-bpw: got {target}, expected at least {bits / parameters:.3f} for this checkpoint")
    weights = {each.path: each.weights for each in sensitivities}
    upgrades = []  # (gain per bit, path, rung, bits)
    for each in sensitivities:
        ladder, probe = ladders[each.path], probe_of(each.errors)
        for rung in range(1, len(ladder)):
            extra = each.weights * (stored(ladder[rung]) - stored(ladder[rung - 1]))
            gain = each.cost(ladder[rung - 1], probe) - each.cost(ladder[rung], probe)
            upgrades.append((gain / extra, each.path, rung))
    for _, path, rung in sorted(upgrades, key=lambda upgrade: (-upgrade[0], upgrade[1], upgrade[2])):
        ladder = ladders[path]
        extra = weights[path] * (stored(ladder[rung]) - stored(ladder[rung - 1]))
        if chosen[path] == rung - 1 and bits + extra <= target * parameters:
            chosen[path], bits = rung, bits + extra
    return {path: ladders[path][rung] for path, rung in chosen.items()}


def _ladder(each: Sensitivity) -> list[Quantization]:
    """Return a module's choices from cheap to good, without those that another one beats: gains per bit then fall."""
    ladder: list[Quantization] = []
    for choice in sorted(each.errors, key=stored_bits):
        if ladder and each.errors[choice] >= each.errors[ladder[-1]]:
            continue
        while len(ladder) > 1 and _slope(each, ladder[-2], ladder[-1]) < _slope(each, ladder[-1], choice):
            ladder.pop()
        ladder.append(choice)
    return ladder


def _slope(each: Sensitivity, lower: Quantization, upper: Quantization) -> float:
    """Return how much squared error one more bit per weight removes between two choices."""
    return (each.errors[lower] - each.errors[upper]) / (stored_bits(upper) - stored_bits(lower))
