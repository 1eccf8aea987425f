"""Tensors of a checkpoint folder: which files, which names, and onto which parameters they go.

Files are opened lazily; a tensor is read from disk when the model first uses it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import mlx.core as mx
from safetensors import SafetensorError, safe_open

INDEX_FILE = "model.safetensors.index.json"

# One row per pattern, first match wins: (pattern, parameter name or None, why it is dropped on purpose).
WEIGHT_MAP: tuple[tuple[str, str | None, str], ...] = (
    (r".*\brotary_emb\b.*", None, "rotary frequencies are computed"),
    (r"lm_head\..*", None, "the head is the embedding"),
    (r"(model\.decoder\.layers\.\d+\.experts\.(?:gate_up|down)_proj)", r"\1.weight", ""),
    (r"(model\.decoder\..*)", r"\1", ""),
    (r"(model\.encoder\.language_model\.layers\.\d+\.layer_scalar)", r"\1", ""),
    (r"model\.encoder\.language_model\..*", None, "the encoder shares these with the decoder"),
    (r"model\.encoder\.(?:vision_tower|embed_vision)\..*", None, "images are not read by this version"),
)
_COMPILED = tuple((re.compile(pattern), target, why) for pattern, target, why in WEIGHT_MAP)


class WeightsError(ValueError):
    """A weight file that cannot be used as it is."""


def parameter_name(tensor_name: str) -> str | None:
    """Return the parameter a tensor belongs to, None when it is dropped on purpose. Raise `WeightsError` otherwise."""
    for pattern, target, _ in _COMPILED:
        match = pattern.fullmatch(tensor_name)
        if match:
            return None if target is None else match.expand(target)
    raise WeightsError(f"unexpected tensor {tensor_name}: no row of the weight map takes it")


def read_index(folder: Path) -> dict[str, str]:
    """Return the shard of every tensor name; {} without an index. Raise `WeightsError` for one that cannot be read."""
    index = folder / INDEX_FILE
    if not index.exists():
        return {}
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(f"{index} is not a safetensors index: {error!r}") from None
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise WeightsError(f"{index} is not a safetensors index: a shard's name is not text")
    return weight_map


def weight_files(folder: Path, index: Mapping[str, str]) -> list[Path]:
    """Return the safetensors files of a checkpoint, given its index (`read_index`).

    Raise `WeightsError` when there is none or a shard is missing.
    """
    names = sorted(set(index.values()))
    if names:
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise WeightsError(f"{folder} lacks {missing[0]} ({len(missing)} of {len(names)} shards missing)")
        return [folder / name for name in names]
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise WeightsError(f"{folder} has no weights: expected model.safetensors or {INDEX_FILE}")
    return files


def read_tensors(folder: Path) -> dict[str, mx.array]:
    """Open every tensor of a checkpoint lazily, by parameter name.

    Raises:
        WeightsError: no files, a damaged file, a tensor that no row of the weight map takes, two tensors for one
            parameter, or tensors that the index promises and no shard holds.
    """
    tensors: dict[str, mx.array] = {}
    seen: set[str] = set()
    index = read_index(folder)
    for path in weight_files(folder, index):
        _check_file(path)
        try:
            arrays = mx.load(str(path))
        except RuntimeError as error:
            raise WeightsError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
        for name, array in arrays.items():  # type: ignore[union-attr]
            seen.add(name)
            parameter = parameter_name(name)
            if parameter is None:
                continue
            if parameter in tensors:
                raise WeightsError(f"{path.name}: {name} is a second tensor for {parameter}")
            tensors[parameter] = array
    promised = set(index) - seen
    if promised:
        raise WeightsError(f"{folder / INDEX_FILE} names {sorted(promised)[0]}, which no shard holds")
    return tensors


def _check_file(path: Path) -> None:
    """Raise `WeightsError` unless header and size agree; MLX reads lazily and would fail in the middle of a step."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is damaged or truncated: {error}") from None


def fill_encoder_scalars(tensors: dict[str, mx.array], num_layers: int) -> None:
    """Give the encoder the decoder's layer scalars where the checkpoint stores one set only."""
    for layer in range(num_layers):
        shared = tensors.get(f"model.decoder.layers.{layer}.layer_scalar")
        if shared is not None:
            tensors.setdefault(f"model.encoder.language_model.layers.{layer}.layer_scalar", shared)


def check_tensors(expected: Mapping[str, mx.array], tensors: Mapping[str, mx.array]) -> None:
    """Raise `WeightsError` unless every parameter has a tensor of its shape and kind and no tensor is left over."""
    missing = sorted(set(expected) - set(tensors))
    if missing:
        raise WeightsError(f"missing tensor {missing[0]}{_more(missing)}")
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise WeightsError(f"unexpected tensor {extra[0]}{_more(extra)}")
    for name, parameter in expected.items():
        if tensors[name].shape != parameter.shape:
            raise WeightsError(f"{name} has shape {tensors[name].shape}, expected {parameter.shape}")
        kind = mx.floating if mx.issubdtype(parameter.dtype, mx.floating) else parameter.dtype
        if not mx.issubdtype(tensors[name].dtype, kind):
            raise WeightsError(f"{name} has dtype {tensors[name].dtype}, expected {kind}")


def _more(names: Iterable[str]) -> str:
    count = len(list(names)) - 1
    return f" and {count} more" if count else ""
