"""Tune the scales and biases of a quantised model so that it reads canvases as the original does.

The packed integers stay, and so does the size. The original reads recorded canvases; the KL divergence of what the
quantised model reads on the same ones is descended by Adam. A group's scale s and bias b become s (1 + u) and b + s v,
so that one learning rate suits groups of every magnitude.

The method is that of `mlx_lm.dwq` (distilled weight quantisation), with denoising steps in place of next tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from .model import DiffusionGemma
from .quality import compare
from .trajectories import Progress, Reader, Trajectory
from .vocabulary import processed_logits, row_sums

KEPT_BACK = 8  # one canvas in so many is not learned from: it tells whether the tuning helped
CANVASES_PER_UPDATE = 4
STEPS_PER_CANVAS = 4  # denoising steps of one canvas that are learned from at a time, those drawn at random
LEARNING_RATE = 2e-3  # relative to a scale; falls to zero
CHUNK_ELEMENTS = 1 << 22  # canvas x vocabulary that the original reads at a time

Shifts = dict[str, dict[str, mx.array]]  # by module path: u and v, shaped as its scales


class Tuned(NamedTuple):
    """What takes the place of a module's scales and biases; float32."""

    scales: mx.array
    biases: mx.array


class Distillation(NamedTuple):
    """The outcome; divergences are mean KL in nats per position, on canvases that were not learned from."""

    modules: dict[str, Tuned]  # by path; empty where the tuning did not help
    kl_before: float
    kl_after: float


def distill(
    original: DiffusionGemma,
    quantized: DiffusionGemma,
    trajectories: Sequence[Trajectory],
    *,
    updates: int,
    seed: int = 0,
    learning_rate: float = LEARNING_RATE,
    dtype: mx.Dtype = mx.float32,
    progress: Progress = lambda *_: None,
) -> Distillation:
    """Tune the affine modules of a quantised model.

    Args:
        original: what it was quantised from.
        quantized: left with its tuned scales and biases, or with its own where tuning does not help.
        trajectories: of the original, at least two canvases; one in `KEPT_BACK` tells whether it helped.
        updates: of the optimiser.
        seed: which canvases and steps are learned from, and when.
        learning_rate: relative to a group's scale, at the start.
        dtype: that scales and biases will be stored in: they are tuned as what they will be rounded to.
        progress: called before and after every update.

    Raises:
        ValueError: fewer than two canvases, or no module to tune.
    """
    if len(trajectories) < 2:
        raise ValueError(f"trajectories: got {len(trajectories)}, expected at least two canvases to tune on")
    modules = {path: m for path, m in quantized.named_modules() if "scales" in m and m.mode == "affine"}
    if not modules:
        raise ValueError("the model has no affine module whose scales could be tuned")
    rng = np.random.default_rng(seed)
    order = [trajectories[i] for i in rng.permutation(len(trajectories))]
    kept_back = max(1, len(order) // KEPT_BACK)
    judged, learned = order[:kept_back], order[kept_back:]
    before = compare(original, quantized, judged).mean_kl
    starts = {
        path: Tuned(m["scales"].astype(mx.float32), m["biases"].astype(mx.float32)) for path, m in modules.items()
    }

    def shifted(shifts: Shifts) -> dict[str, Tuned]:
        return {
            path: Tuned(_rounded(s * (1 + shifts[path]["u"]), dtype), _rounded(b + s * shifts[path]["v"], dtype))
            for path, (s, b) in starts.items()
        }

    def loss(shifts: Shifts, trajectory: Trajectory, readings: Sequence[TeacherReading]) -> mx.array:
        _replace(modules, shifted(shifts))
        return _divergence(quantized, trajectory, readings)

    shifts: Shifts = {path: {name: mx.zeros_like(start.scales) for name in "uv"} for path, start in starts.items()}
    optimizer = optim.Adam(optim.linear_schedule(learning_rate, 0, updates), betas=[0.9, 0.99])
    gradient = mx.value_and_grad(loss)
    for update in range(updates):
        progress(update, updates)
        total: Any = None
        for index in rng.integers(len(learned), size=CANVASES_PER_UPDATE):
            readings = read_steps(original, learned[index], rng)
            _, gradients = gradient(shifts, learned[index], readings)
            total = gradients if total is None else tree_map(mx.add, total, gradients)
            mx.eval(total)
        shifts = optimizer.apply_gradients(total, shifts)
        mx.eval(shifts, optimizer.state)
        mx.clear_cache()
    progress(updates, updates)
    tuned = shifted(shifts)
    _replace(modules, tuned)
    after = compare(original, quantized, judged).mean_kl
    if after >= before:
        _replace(modules, starts)
        return Distillation({}, before, before)
    return Distillation(tuned, before, after)


def _rounded(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """Round float32 numbers to another dtype; the gradient passes as if they were not (straight-through)."""
    return x + mx.stop_gradient(x.astype(dtype).astype(mx.float32) - x)


class TeacherReading(NamedTuple):
    """What the original made of one denoising step."""

    canvas: mx.array  # [C] int32
    soft_embeddings: mx.array  # [C, D] of the step before, as the original's own: what the step began with
    temperature: mx.array  # scalar float32
    log_probabilities: mx.array  # [C, V] float32


def read_steps(original: DiffusionGemma, trajectory: Trajectory, rng: np.random.Generator) -> list[TeacherReading]:
    """Let the original read a canvas at every step; return what it says at some of them."""
    count = len(trajectory.steps)
    wanted = set(rng.permutation(count)[:STEPS_PER_CANVAS].tolist())
    reader = Reader(original, trajectory.prefix)
    readings = []
    for index, step in enumerate(trajectory.steps[: max(wanted) + 1]):
        canvas, temperature = mx.array(step.canvas, dtype=mx.int32), mx.array(step.temperature, dtype=mx.float32)
        signal = reader.soft_embeddings(canvas)
        reader.read(canvas, temperature, CHUNK_ELEMENTS)
        if index in wanted:
            said = reader.log_probabilities(slice(None), temperature)
            mx.eval(said)
            readings.append(TeacherReading(canvas, signal, temperature, said))
    return readings


def _divergence(model: DiffusionGemma, trajectory: Trajectory, readings: Sequence[TeacherReading]) -> mx.array:
    """Return the mean KL(original || model) over the positions of some steps of one canvas; differentiable."""
    cache = model.make_cache()
    model.prefill(mx.array(trajectory.prefix), cache)
    offset, prefix = len(trajectory.prefix), cache.views()
    hidden = model.denoise(
        [reading.canvas for reading in readings],
        [reading.soft_embeddings for reading in readings],
        [prefix] * len(readings),
        [mx.array(offset, dtype=mx.int32)] * len(readings),
    )
    table, softcap = model.model.decoder.embed_tokens, model.config.text.final_logit_softcapping
    total = mx.array(0.0)
    for row, reading in zip(hidden, readings, strict=True):
        logits = processed_logits(row, table, softcap, reading.temperature)
        log_q = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        log_p = reading.log_probabilities
        total = total + row_sums(mx.exp(log_p) * (log_p - log_q)).mean()
    return total / len(readings)


def _replace(modules: Mapping[str, nn.Module], values: Mapping[str, Tuned]) -> None:
    """Put scales and biases into modules, in the dtype that the modules have."""
    for path, (scales, biases) in values.items():
        dtype = modules[path]["scales"].dtype
        modules[path]["scales"], modules[path]["biases"] = scales.astype(dtype), biases.astype(dtype)
