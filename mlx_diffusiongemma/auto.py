"""The recipe `auto`: measure what every module costs, spend the bits where they matter, round with care, tune.

1. Measure: each module in turn is quantised alone (`sensitivity.py`).
2. Allocate: of all ways to spend the budget, the one that costs least.
3. Round: each weight makes good what the rounding of others does to the outputs (`compensation.py`).
4. Distil: scales and biases are tuned until the canvases read as before (`distillation.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .compensation import compensate
from .distillation import Distillation, distill
from .jobs import Pack, Packed
from .model import DiffusionGemma
from .pipeline import Pipeline
from .plan import ConversionRequest, Plan, make_plan
from .quantization import quantization_predicate
from .recipes import fixed, sight
from .sensitivity import PROBE, Sensitivity, allocate, measure
from .tasks import Task
from .trajectories import Progress, record_trajectories

UPDATES = 60  # of the distillation
MEASURED_TASKS = 40  # the first ones: measuring takes two passes over their canvases for every module


def automatic_request(
    pipeline: Pipeline,
    folder: Path,
    request: ConversionRequest,
    tasks: Sequence[Task],
    *,
    target: float,
    seed: int,
    updates: int = UPDATES,
    progress: Callable[[str], Progress] = lambda what: lambda *_: None,
) -> ConversionRequest:
    """Find the settings of every module within a budget.

    Args:
        pipeline: the checkpoint in full precision.
        folder: that it was loaded from.
        request: what else is asked of the conversion; has no recipe.
        tasks: prompts whose canvases calibrate; the first `MEASURED_TASKS` are measured on, all round and tune.
        target: bits per parameter of the whole checkpoint.
        seed: of the first task, and of the distillation.
        updates: of the distillation; 0 for none.
        progress: from what is being done to what counts it.

    Returns:
        the request with a recipe, packed modules, and what was measured as notes.

    Raises:
        ValueError: a target too small, a checkpoint without anything to quantise, or prompts it cannot take.
    """
    plan = make_plan(folder, replace(request, recipe=sight, default=PROBE))
    found = measure(pipeline, tasks[:MEASURED_TASKS], seed, progress=progress("measuring modules"))
    spent = spend(plan, found, target)
    recipe = fixed(spent)
    request = replace(request, recipe=lambda path: sight(path) or recipe(path), default=PROBE)
    notes: dict[str, Any] = {
        "sensitivity": {each.path: {"kl": each.kl, "steps_change": each.steps_change} for each in found}
    }
    dtype = {job.parameter: job.spec.dtype for job in plan.jobs}[f"{found[0].path}.weight"]
    trajectories = record_trajectories(pipeline, tasks, seed, progress=progress("recording canvases"))
    packed = compensate(pipeline.model, trajectories, spent, dtype, progress=progress("rounding weights"))
    request = replace(request, packed=packed, notes=notes)
    if not updates:
        return request
    student = packed_twin(pipeline.model, make_plan(folder, request))
    outcome = distill(
        pipeline.model,
        student,
        trajectories,
        updates=updates,
        seed=seed,
        dtype=dtype,
        progress=progress("tuning scales"),
    )
    notes["distillation"] = {"updates": updates, **divergences(outcome)}
    return replace(request, packed=packed | tuned_modules(packed, outcome))


def tuned_modules(packed: Mapping[str, Packed], outcome: Distillation) -> dict[str, Packed]:
    """Return packed modules with the scales and biases of a distillation."""
    return {path: Packed(packed[path].weight, *tuned) for path, tuned in outcome.modules.items() if path in packed}


def spend(plan: Plan, found: Sequence[Sensitivity], target: float) -> dict[str, Any]:
    """Return the settings of every measured module; `plan` is that of the conversion without them."""
    specs = {name: spec for job in plan.jobs for name, spec in job.outputs.items()}
    measured = [specs[f"{each.path}.weight"] for each in found]
    fixed_bits = 8 * (plan.nbytes - sum(spec.nbytes for spec in measured))
    scale_bits = 8 * max(spec.dtype.size for spec in measured)
    return allocate(found, fixed_bits, plan.parameters, target, scale_bits)


def divergences(outcome: Distillation) -> dict[str, float]:
    """Return the numbers of a distillation, JSON-ready."""
    return {"kl_before": outcome.kl_before, "kl_after": outcome.kl_after}


def packed_twin(model: DiffusionGemma, plan: Plan) -> DiffusionGemma:
    """Return the model that a plan makes, in memory; what is not quantised is shared with `model`."""
    packs = [job for job in plan.jobs if isinstance(job, Pack)]
    arrays = {}
    for job in packs:
        for name, rows in job.convert(0, job.rows.count).items():
            arrays[name] = rows.reshape(job.outputs[name].shape)
    twin = DiffusionGemma(model.config)
    nn.quantize(twin, class_predicate=quantization_predicate(plan.config["quantization"], set(arrays)))
    kept: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    arrays = kept | arrays
    dtype = model.dtype  # the CPU computes in float32 whatever is stored
    twin.load_weights([(n, a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a) for n, a in arrays.items()])
    twin.eval()
    return twin
