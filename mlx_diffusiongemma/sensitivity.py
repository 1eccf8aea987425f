"""Measure how sensitive every module is to quantisation, and spend bits where they matter.

Each module in turn is quantised with `PROBE` while all others stay as they are, and the model is shown the canvases of
its own denoising trajectories: the KL divergence of the canvas logits, and the change in denoising steps of whole
answers, are the module's sensitivity. What other settings would cost is scaled from that by the squared weight error,
which is cheap. The settings whose costs add up to least are those of a knapsack with one choice per module.

The method is that of mixed-precision post-training quantisation, such as HAWQ (arXiv 1905.03696), with the objective
measured instead of approximated by the Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .compensation import twin_of
from .pipeline import Pipeline
from .quality import compare, generation_statistics
from .recipes import Quantization, part_of, sight
from .tasks import Task
from .trajectories import Progress, record_trajectories

PROBE = Quantization(64, 4)
# From few bits to many. Two bits are missing: their error is too large to be scaled from a four-bit probe.
CHOICES = tuple(Quantization(group_size, bits) for bits in (3, 4, 5, 6, 8) for group_size in (128, 64, 32))
STEP_TASKS = 16  # the first ones: answering takes far longer than being shown canvases
MOST_UNITS = 20_000  # of the budget: bits are counted in units where single ones would be too many
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
    """Measure every module that a recipe may quantise and that text passes through.

    Args:
        pipeline: the checkpoint in full precision.
        tasks: prompts whose canvases calibrate; real ones, since noise has no trajectories. The first `STEP_TASKS` are
            answered anew with every module.
        seed: of the first task.
        max_tokens: tokens per answer; None for the checkpoint's default.
        progress: called before and after every module.

    Raises:
        ValueError: no module to quantise, no task, or a prompt that the checkpoint cannot take.
    """
    trajectories = record_trajectories(pipeline, tasks, seed, max_tokens=max_tokens)
    if not trajectories:
        raise ValueError("no canvas to measure on: expected at least one task and max_tokens of at least 1")
    answered = tasks[:STEP_TASKS]
    steps = generation_statistics(pipeline, answered, seed, max_tokens=max_tokens).mean_steps
    twin = twin_of(pipeline.model)
    modules = [(p, module) for p, module in twin.named_modules() if part_of(p) and not sight(p) and "weight" in module]
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
        # A new pipeline each time: a prefix that is remembered was encoded with other weights.
        other = pipeline.with_model(twin)
        mean_steps = generation_statistics(other, answered, seed, max_tokens=max_tokens).mean_steps
        module["weight"] = weight
        found.append(Sensitivity(path, math.prod(weight.shape), kl, mean_steps / steps - 1, errors))
        mx.clear_cache()
    progress(len(modules), len(modules))
    return found


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
    if not math.isfinite(target):
        raise ValueError(f"target-bpw: got {target}, expected a number of bits per weight")

    def stored(settings: Quantization) -> float:
        return stored_bits(settings, scale_bits)

    ladders = [sorted(each.errors, key=stored) for each in sensitivities]
    costs, extra, least = [], [], float(fixed_bits)
    for each, ladder in zip(sensitivities, ladders, strict=True):
        sizes = [each.weights * stored(one) for one in ladder]
        extra.append([round(size - sizes[0]) for size in sizes])
        costs.append([each.cost(one, probe_of(each.errors)) for one in ladder])
        least += sizes[0]
    if least > target * parameters:
        raise ValueError(f"target-bpw: got {target}, expected at least {least / parameters:.3f} for this checkpoint")
    picked = knapsack(costs, extra, int(target * parameters - least))
    return {each.path: ladder[i] for each, ladder, i in zip(sensitivities, ladders, picked, strict=True)}


def knapsack(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], room: int) -> list[int]:
    """Pick one choice per item so that the costs add up to least and the sizes to `room` at most.

    Sizes are counted in units of `room / MOST_UNITS`, rounded up, or exactly where they have a common divisor as large.

    Args:
        costs: of the choices of each item.
        sizes: likewise; 0 for the first choice.
        room: at least 0.

    Returns:
        the index of each item's choice.
    """
    unit = max(math.gcd(*(size for row in sizes for size in row)), room / MOST_UNITS, 1)
    left = int(room / unit)
    lowest = np.zeros(left + 1)  # cost of the items so far with 0, 1, ... units
    tables: list[tuple[list[int], np.ndarray]] = []
    for item_costs, item_sizes in zip(costs, sizes, strict=True):
        units = [min(math.ceil(size / unit), left + 1) for size in item_sizes]
        table = np.full((len(units), left + 1), np.inf)
        for row, cost, used in zip(table, item_costs, units, strict=True):
            row[used:] = lowest[: left + 1 - used] + cost
        tables.append((units, table.argmin(axis=0)))
        lowest = table.min(axis=0)
    picked = []
    for units, best in reversed(tables):
        picked.append(int(best[left]))
        left -= units[picked[-1]]
    return picked[::-1]
