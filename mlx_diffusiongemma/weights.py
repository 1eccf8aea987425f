"""Tensors of a checkpoint folder: which files, which names, and onto which parameters they go.

Files are opened lazily; a tensor is read from disk when the model first uses it. A parameter may be stored whole or in
pieces: experts one by one, gate and up apart. What the packed tensors mean is in `quantization.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from .config import ModelConfig

INDEX_FILE = "model.safetensors.index.json"
SIDE_FILES = ("optiq/optiq_vision.safetensors",)  # weights that an OptiQ conversion keeps beside its index

# One row per pattern, first match wins: (pattern, parameter name or None, why it is dropped on purpose).
# The groups `expert` and `half` say which piece of the parameter the tensor is; see `Target`.
_EXPERTS = r"(model\.decoder\.layers\.\d+\.experts)(?:\.(?P<expert>\d+))?"
# Parameters of the vision tower and its projector, which some conversions leave out.
_VISION = r"model\.encoder\.(?:vision_tower|embed_vision)\..*"
WEIGHT_MAP: tuple[tuple[str, str | None, str], ...] = (
    (r".*\brotary_emb\b.*", None, "rotary frequencies are computed"),
    (r"lm_head\..*", None, "the head is the embedding"),
    (_EXPERTS + r"\.(?P<half>gate|up)_proj(?:\.weight)?", r"\1.gate_up_proj.weight", ""),
    (_EXPERTS + r"\.(?P<half>gate|up)_proj(\.scales|\.biases)", r"\1.gate_up_proj\4", ""),
    (_EXPERTS + r"\.(gate_up|down)_proj(?:\.weight)?", r"\1.\3_proj.weight", ""),
    (_EXPERTS + r"\.(gate_up|down)_proj(\.scales|\.biases)", r"\1.\3_proj\4", ""),
    (r"(model\.decoder\..*)", r"\1", ""),
    (r"(model\.encoder\.language_model\.layers\.\d+\.layer_scalar)", r"\1", ""),
    (r"model\.encoder\.language_model\..*", None, "the encoder shares these with the decoder"),
    (r"(?:model\.encoder\.)?((?:vision_tower|embed_vision)\..*)", r"model.encoder.\1", ""),
)
_COMPILED = tuple((re.compile(pattern), target, why) for pattern, target, why in WEIGHT_MAP)
_VISION_PARAMETER = re.compile(_VISION)
_CLIP_BOUND = re.compile(_VISION + r"\.(?:input|output)_(?:min|max)")
T = TypeVar("T")


class WeightsError(ValueError):
    """A weight file that cannot be used as it is."""


class Described(Protocol):
    """An array, or what is known of it without its data."""

    @property
    def dtype(self) -> mx.Dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Target(NamedTuple):
    """Where a tensor goes.

    A parameter of the experts [E, rows, columns] may come in pieces: `expert` is the index on its first axis, `half`
    ("gate" or "up") the first or second half of its rows. None means all of them.
    """

    parameter: str | None  # None: dropped on purpose
    reason: str  # of dropping it
    half: str | None = None
    expert: int | None = None


class DroppedTensor(NamedTuple):
    """A tensor that is not read, on purpose."""

    name: str
    reason: str


class Tensors(NamedTuple):
    """Every tensor of a checkpoint."""

    parameters: dict[str, mx.array]  # by parameter name, lazy
    dropped: tuple[DroppedTensor, ...]


def find_target(tensor_name: str) -> Target:
    """Return where a tensor goes. Raise `WeightsError` when no row of the weight map takes it."""
    for pattern, target, why in _COMPILED:
        match = pattern.fullmatch(tensor_name)
        if match:
            groups = match.groupdict()
            expert = groups.get("expert")
            parameter = None if target is None else match.expand(target)
            return Target(parameter, why, groups.get("half"), None if expert is None else int(expert))
    raise WeightsError(f"unexpected tensor {tensor_name}: no row of the weight map takes it")


def parameter_name(tensor_name: str) -> str | None:
    """Return the parameter a tensor belongs to, None when it is dropped on purpose. Raise `WeightsError` otherwise."""
    return find_target(tensor_name).parameter


def module_path(path: str) -> str | None:
    """Return the model's module for a module of a checkpoint, None for one whose tensors are not read."""
    try:
        parameter = parameter_name(f"{path}.weight")
    except WeightsError:
        return None
    return None if parameter is None else parameter.removesuffix(".weight")


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
    """Return the safetensors files of a checkpoint, side files too, given its index (`read_index`).

    Raise `WeightsError` when there is none or a shard is missing.
    """
    names = sorted(set(index.values()))
    if names:
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise WeightsError(f"{folder} lacks {missing[0]} ({len(missing)} of {len(names)} shards missing)")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise WeightsError(f"{folder} has no weights: expected model.safetensors or {INDEX_FILE}")
    return files + [folder / name for name in SIDE_FILES if (folder / name).is_file() and folder / name not in files]


def read_tensors(folder: Path) -> Tensors:
    """Open every tensor of a checkpoint lazily.

    Raises:
        WeightsError: no files, a damaged file, a tensor that no row of the weight map takes, two tensors for one
            parameter, a missing piece of one, or tensors that the index promises and no shard holds.
    """
    index = read_index(folder)
    opened = ((path, name, array) for path in weight_files(folder, index) for name, array in _open(path).items())
    pieces, dropped = sort_tensors(folder, set(index), opened)
    return Tensors({parameter: _join(parameter, found) for parameter, found in pieces.items()}, tuple(dropped))


def sort_tensors(
    folder: Path, promised: set[str], tensors: Iterable[tuple[Path, str, T]]
) -> tuple[dict[str, dict[Target, T]], list[DroppedTensor]]:
    """Bring the tensors of a checkpoint, or what stands for them, to their parameters.

    Args:
        folder: of the checkpoint.
        promised: the names in its index.
        tensors: file, name and value of each.

    Returns:
        the pieces of every parameter, and what is dropped on purpose.

    Raises:
        WeightsError: a tensor that no row of the weight map takes, two for one piece of a parameter, or one that is
            promised and not there.
    """
    pieces: dict[str, dict[Target, T]] = {}
    dropped: list[DroppedTensor] = []
    seen: set[str] = set()
    for path, name, value in tensors:
        seen.add(name)
        target = find_target(name)
        if target.parameter is None:
            dropped.append(DroppedTensor(name, target.reason))
            continue
        found = pieces.setdefault(target.parameter, {})
        if target in found:
            raise WeightsError(f"{path.name}: {name} is a second tensor for {target.parameter}")
        found[target] = value
    if promised - seen:
        raise WeightsError(f"{folder / INDEX_FILE} names {min(promised - seen)}, which no shard holds")
    return pieces, dropped


def _open(path: Path) -> dict[str, mx.array]:
    """Return the tensors of one file, lazy."""
    _check_file(path)
    try:
        return dict(mx.load(str(path)))  # type: ignore[arg-type]
    except RuntimeError as error:
        raise WeightsError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def order_pieces(parameter: str, pieces: Mapping[Target, T]) -> list[list[T]]:
    """Return the pieces of a parameter in order: a list per half, gate first, that holds all experts.

    Raises:
        WeightsError: a piece is missing, or the parameter is there both whole and in pieces.
    """
    if len({(piece.half is None, piece.expert is None) for piece in pieces}) > 1:
        raise WeightsError(f"{parameter} is stored in two layouts: {' and '.join(map(_describe, list(pieces)[:2]))}")
    first = next(iter(pieces))
    halves = (None,) if first.half is None else ("gate", "up")
    experts = (None,) if first.expert is None else range(1 + max(piece.expert or 0 for piece in pieces))
    rows: list[list[T]] = []
    for half in halves:
        rows.append([])
        for expert in experts:
            piece = first._replace(half=half, expert=expert)
            if piece not in pieces:
                raise WeightsError(f"{parameter} lacks its piece: {_describe(piece)}")
            rows[-1].append(pieces[piece])
    return rows


def _describe(piece: Target) -> str:
    experts = "all experts" if piece.expert is None else f"expert {piece.expert}"
    return experts if piece.half is None else f"{piece.half} of {experts}"


def _join(parameter: str, pieces: Mapping[Target, mx.array]) -> mx.array:
    """Stack experts, then put gate rows before up rows; lazy."""
    rows = order_pieces(parameter, pieces)
    first = rows[0][0]
    for piece, array in pieces.items():
        if (array.shape, array.dtype) != (first.shape, first.dtype):
            got, expected = f"{array.dtype} {array.shape}", f"{first.dtype} {first.shape} as the others"
            raise WeightsError(f"{parameter}, {_describe(piece)}: got {got}, expected {expected}")
    one_by_one = next(iter(pieces)).expert is not None
    halves = [mx.stack(row) if one_by_one else row[0] for row in rows]
    return halves[0] if len(halves) == 1 else mx.concatenate(halves, axis=1)


def _check_file(path: Path) -> None:
    """Raise `WeightsError` unless header and size agree; MLX reads lazily and would fail in the middle of a step."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is damaged or truncated: {error}") from None


def fill_encoder_scalars(tensors: dict[str, T], num_layers: int) -> None:
    """Give the encoder the decoder's layer scalars where the checkpoint stores one set only."""
    for layer in range(num_layers):
        shared = tensors.get(f"model.decoder.layers.{layer}.layer_scalar")
        if shared is not None:
            tensors.setdefault(f"model.encoder.language_model.layers.{layer}.layer_scalar", shared)


def is_vision(parameter: str) -> bool:
    """Tell whether a parameter belongs to the vision tower or its projector."""
    return _VISION_PARAMETER.fullmatch(parameter) is not None


def settle_vision(tensors: dict[str, T], config: ModelConfig) -> tuple[ModelConfig, list[DroppedTensor]]:
    """Make the config and the tensors of a checkpoint agree on whether the model sees.

    Args:
        tensors: by parameter name; those that the config has no use for are removed.
        config: as read.

    Returns:
        the config, its `vision` None where the checkpoint has no vision tensor at all; and what was removed.
    """
    vision = {name for name in tensors if is_vision(name)}
    if config.vision is not None and not vision:
        return replace(config, vision=None), []
    if config.vision is None:
        unused, reason = vision, "config.json has no vision_config"
    elif not config.vision.use_clipped_linears:
        unused, reason = {name for name in vision if _CLIP_BOUND.fullmatch(name)}, "no linear layer of this model clips"
    else:
        return config, []
    for name in unused:
        del tensors[name]
    return config, [DroppedTensor(name, reason) for name in sorted(unused)]


def check_tensors(expected: Mapping[str, mx.array], tensors: Mapping[str, Described]) -> None:
    """Raise `WeightsError` unless every parameter has a tensor of its shape and kind and no tensor is left over."""
    missing = sorted(set(expected) - set(tensors))
    if missing:
        raise WeightsError(f"missing tensor {missing[0]}{_more(missing)}{_hint(missing[0], expected)}")
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise WeightsError(f"unexpected tensor {extra[0]}{_more(extra)}{_hint(extra[0], expected)}")
    for name, parameter in expected.items():
        array, hint = tensors[name], _hint(name, expected)
        if array.shape != parameter.shape:
            raise WeightsError(f"{name} has shape {array.shape}, expected {parameter.shape}{hint}")
        kind = mx.floating if mx.issubdtype(parameter.dtype, mx.floating) else parameter.dtype
        if not mx.issubdtype(array.dtype, kind):
            wanted = "a floating one" if kind == mx.floating else kind
            raise WeightsError(f"{name} has dtype {array.dtype}, expected {wanted}{hint}")


def _hint(name: str, expected: Mapping[str, mx.array]) -> str:
    """Say where to look when a tensor of a quantised module is not what was expected."""
    quantised = f"{name.rpartition('.')[0]}.scales" in expected
    return "; config.json's quantization block does not fit this module" if quantised else ""


def _more(names: Iterable[str]) -> str:
    count = len(list(names)) - 1
    return f" and {count} more" if count else ""
