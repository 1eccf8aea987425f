"""Round the weights of a module so that the errors cancel in what it computes.

What one column's rounding does to the outputs is made good by the columns that are not rounded yet, as far as their
inputs go together. That needs the second moments of the inputs, which are taken on recorded canvases. Scales and biases
are those that `mx.quantize` finds, as they will be stored.

The method is GPTQ (arXiv 2210.17323) with columns in the order of their inputs' size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .jobs import Packed
from .model import DiffusionGemma
from .recipes import Quantization
from .trajectories import Progress, Reader, Trajectory
from .vocabulary import CHUNK_ELEMENTS_CPU

DAMPING = 0.01  # of the mean second moment: inputs that were never seen must not make the others' errors good
BLOCK = 128  # columns whose errors are passed on together
MOMENTS_AT_ONCE = 1 << 31  # numbers, 8.6 GB; the experts of one layer of 26B have half of that
Moments = list[mx.array]  # of each expert, or of the one matrix: sums of x xᵀ, [columns, columns] float32


def twin_of(model: DiffusionGemma) -> DiffusionGemma:
    """Return a second network over the same arrays: replacing something in it leaves the first as it is."""
    twin = DiffusionGemma(model.config)
    twin.load_weights(list(dict(tree_flatten(model.parameters())).items()))
    twin.eval()
    return twin


def compensate(
    model: DiffusionGemma,
    trajectories: Sequence[Trajectory],
    settings: Mapping[str, Quantization],
    dtype: mx.Dtype,
    *,
    progress: Progress = lambda *_: None,
) -> dict[str, Packed]:
    """Pack modules, linear layers with compensation.

    Args:
        model: in full precision; left as it is.
        trajectories: canvases on which inputs are seen.
        settings: affine ones, by module path. The embedding's lookups have no inputs: it is rounded to the nearest.
        dtype: of the scales and biases as they will be stored.
        progress: called before and after every module.

    Raises:
        ValueError: settings that are not affine, or a path that the model does not have.
    """
    twin = twin_of(model)
    modules = dict(twin.named_modules())
    for path, how in settings.items():
        if how.mode != "affine" or "weight" not in modules.get(path, {}):
            raise ValueError(f"{path}: got {how}, expected affine settings of a module with a weight")
    packed: dict[str, Packed] = {}
    linear = {path: modules[path] for path in settings if not isinstance(modules[path], nn.Embedding)}
    for batch in _batches(linear):
        moments = input_moments(twin, trajectories, batch)
        for path in batch:
            progress(len(packed), len(settings))
            packed[path] = pack_compensated(modules[path]["weight"], moments.pop(path), settings[path], dtype)
    for path in settings.keys() - linear.keys():
        packed[path] = pack_compensated(modules[path]["weight"], None, settings[path], dtype)
    progress(len(settings), len(settings))
    return packed


def _batches(modules: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Yield paths of modules whose moments are in memory together; every batch takes one pass over the canvases."""
    batch: list[str] = []
    size = 0
    for _, group in itertools.groupby(modules, key=lambda path: path.rpartition(".")[0]):  # the experts' two layers
        paths = list(group)
        shapes = [modules[path]["weight"].shape for path in paths]
        count = sum(math.prod(shape[:-2]) * shape[-1] ** 2 for shape in shapes)
        if batch and size + count > MOMENTS_AT_ONCE:
            yield batch
            batch, size = [], 0
        batch += paths
        size += count
    if batch:
        yield batch


# -- what comes in ------------------------------------------------------------------------------------------------


class _Watched(nn.Module):
    """A linear layer, or one per expert, that sums up the second moments of its inputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = layer
        *experts, _, columns = layer["weight"].shape
        self._sums = [mx.zeros((columns, columns)) for _ in range(math.prod(experts))]

    def __call__(self, x: mx.array, experts: mx.array | None = None, **options: Any) -> mx.array:
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        if experts is None:
            self._sums[0] = self._sums[0] + rows.T @ rows
            mx.eval(self._sums)
            return self._layer(x)
        stops = np.searchsorted(np.array(experts), np.arange(len(self._sums) + 1))  # rows are sorted by expert
        for expert, (start, stop) in enumerate(itertools.pairwise(stops.tolist())):
            if start < stop:
                own = rows[start:stop]
                self._sums[expert] = self._sums[expert] + own.T @ own
        mx.eval(self._sums)
        return self._layer(x, experts, **options)


def input_moments(
    model: DiffusionGemma, trajectories: Sequence[Trajectory], paths: Sequence[str]
) -> dict[str, Moments]:
    """Return the second moments of the inputs of linear layers, in both roles of the model, by path."""
    # The first layer of the experts is watched whenever the second is: unwatched, it may fill rows up to whole blocks.
    wanted = {*paths, *(path.replace("experts.down_proj", "experts.gate_up_proj") for path in paths)}
    layers = {path: module for path, module in model.named_modules() if path in wanted}
    watched = {path: _Watched(layer) for path, layer in layers.items()}
    model.update_modules(tree_unflatten(list(watched.items())))
    try:
        for trajectory in trajectories:
            reader = Reader(model, trajectory.prefix)
            for step in trajectory.steps:
                canvas, temperature = mx.array(step.canvas, dtype=mx.int32), mx.array(step.temperature)
                reader.read(canvas, temperature, CHUNK_ELEMENTS_CPU)
            mx.clear_cache()
    finally:
        model.update_modules(tree_unflatten(list(layers.items())))
    return {path: watched[path]._sums for path in paths}


# -- rounding -----------------------------------------------------------------------------------------------------


def pack_compensated(weight: mx.array, moments: Moments | None, settings: Quantization, dtype: mx.Dtype) -> Packed:
    """Pack a weight [..., rows, columns]; without moments every number is rounded to the nearest."""
    group_size, bits = settings.group_size, settings.bits
    matrices = weight.reshape(-1, *weight.shape[-2:])
    parts: list[Packed] = []
    for index, matrix in enumerate(matrices):
        _, scales, biases = mx.quantize(matrix.astype(dtype), group_size=group_size, bits=bits)
        numbers, steps, starts = (np.array(x.astype(mx.float32), np.float64) for x in (matrix, scales, biases))
        seen = None if moments is None else np.array(moments[index], np.float64)
        parts.append(Packed(pack_codes(round_columns(numbers, steps, starts, seen, bits), bits), scales, biases))
        mx.eval(parts[-1])
    together = (mx.stack([part[i] for part in parts]) for i in range(3))
    return Packed(*(each.reshape(*weight.shape[:-1], -1) for each in together))


def round_columns(
    weight: np.ndarray, scales: np.ndarray, biases: np.ndarray, moments: np.ndarray | None, bits: int
) -> np.ndarray:
    """Return the integers of a matrix.

    Args:
        weight: [rows, columns] float64.
        scales, biases: [rows, groups] float64; a group has columns / groups columns.
        moments: [columns, columns] float64, of the inputs; None rounds to the nearest.
        bits: of an integer.

    Returns:
        [rows, columns] uint8.
    """
    columns = weight.shape[1]
    group_size = columns // scales.shape[1]
    scales, biases = (np.repeat(each, group_size, axis=1) for each in (scales, biases))
    steps = np.where(scales == 0, 1, scales)  # a group of one and the same number

    def nearest(values: np.ndarray, at: np.ndarray | slice) -> np.ndarray:
        return np.clip(np.rint((values - biases[:, at]) / steps[:, at]), 0, 2**bits - 1)

    if moments is None or not moments.any():
        return nearest(weight, slice(None)).astype(np.uint8)
    order = np.argsort(-np.diag(moments), kind="stable")
    factor = _inverse_factor(moments[np.ix_(order, order)])
    left = weight[:, order]
    codes = np.zeros(weight.shape, dtype=np.uint8)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = np.zeros((len(weight), stop - start))
        for i in range(start, stop):
            column = order[i]
            code = nearest(left[:, i], column)
            codes[:, column] = code
            error = (left[:, i] - (code * scales[:, column] + biases[:, column])) / factor[i, i]
            left[:, i + 1 : stop] -= np.outer(error, factor[i, i + 1 : stop])
            errors[:, i - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes


def _inverse_factor(moments: np.ndarray) -> np.ndarray:
    """Return the upper triangular U with Uᵀ U = the inverse of the damped moments."""
    damped = moments + DAMPING * np.diag(moments).mean() * np.eye(len(moments))
    return np.linalg.cholesky(np.linalg.inv(damped)).T


def pack_codes(codes: np.ndarray, bits: int) -> mx.array:
    """Return integers [..., columns] uint8 as MLX stores them, bits behind bits: [..., columns * bits / 32] uint32."""
    planes = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1  # lowest bit first
    stream = np.packbits(planes.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
    return mx.array(stream.view("<u4"))
