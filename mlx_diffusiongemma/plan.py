"""Plan a conversion from names and shapes alone: what every tensor becomes, in which file, and how large.

How many bits a module gets is in `recipes.py`, what a job does in `jobs.py`; `conversion.py` carries a plan out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from .config import ConfigError, ModelConfig, load_configs, read_json
from .jobs import Copy, Job, Pack, Packed, Unpack, source_bytes
from .memory import plan_memory
from .model import DiffusionGemma
from .quantization import read_block
from .recipes import Quantization, Recipe, part_of, quantization_block
from .shards import RowRange, Rows, ShardError, StoredTensor, TensorSpec, read_header, split_into_shards
from .weights import (
    DroppedTensor,
    Target,
    WeightsError,
    check_tensors,
    fill_encoder_scalars,
    is_vision,
    module_path,
    order_pieces,
    read_index,
    settle_vision,
    sort_tensors,
    weight_files,
)

SHARD_BYTES = 5 << 30  # what mlx-lm and the Hub use
RUN_TOKENS = 8192  # of the prompt for which the memory to run is reckoned
NOTES_KEY = "mlx_diffusiongemma"  # where config.json says how the folder was made
FLOATS = (mx.bfloat16, mx.float16, mx.float32)


class ConversionError(ValueError):
    """A conversion that cannot be done; the message is one line."""


class Source(NamedTuple):
    """A tensor of the source under the name of its parameter."""

    rows: Rows
    spec: TensorSpec


class PartSize(NamedTuple):
    """How large one part of the output is."""

    parameters: int
    nbytes: int
    stored_as: frozenset[str] = frozenset()  # such as "affine 4, group 64" and "bfloat16"

    @property
    def bits_per_weight(self) -> float:
        """Bits per parameter, scales and biases included."""
        return 8 * self.nbytes / max(self.parameters, 1)


@dataclass(frozen=True)
class Plan:
    """All that a conversion will do, known before anything is written."""

    source: Path
    config: dict[str, Any]  # the output's config.json
    shards: dict[str, tuple[Job, ...]]  # file name: what goes into it
    dropped: tuple[DroppedTensor, ...]  # of the source, on purpose
    smaller_groups: dict[str, int]  # modules whose rows the recipe's group size does not divide, and the one they get
    left_unquantized: tuple[str, ...]  # modules that the recipe names and no group size fits
    parts: dict[str, PartSize]
    run_bytes: int  # estimate: weights, a prefix of RUN_TOKENS, and temporaries

    @property
    def jobs(self) -> list[Job]:
        """What becomes of every tensor, in the order of the files."""
        return [job for jobs in self.shards.values() for job in jobs]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(part.parameters for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits per parameter of the whole output."""
        return 8 * self.nbytes / self.parameters

    @property
    def source_bytes(self) -> int:
        """Bytes that will be read."""
        return sum(source_bytes(job) for job in self.jobs)


@dataclass(frozen=True)
class ConversionRequest:
    """What is asked of a conversion.

    `recipe` quantises, `dequantize` undoes that, neither casts or copies; `dtype` is that of the floating tensors, None
    for the source's. `packed` are modules that are quantised already, by path; `mx.quantize` packs the others. `notes`
    go into the output's config.json: recipe name, source, revision, measured numbers.
    """

    recipe: Recipe | None = None
    default: Quantization | None = None  # needs no entry in the `quantization` block
    dequantize: bool = False
    dtype: mx.Dtype | None = None
    packed: Mapping[str, Packed] | None = None
    notes: Mapping[str, Any] | None = None


def make_plan(
    folder: Path,
    request: ConversionRequest,
    shard_bytes: int = SHARD_BYTES,
    stored: list[StoredTensor] | None = None,
) -> Plan:
    """Plan a conversion from the configs and the headers alone.

    Args:
        folder: the source.
        request: what is asked.
        shard_bytes: data in one output file at most.
        stored: the source's tensors, where its weight files are not in the folder.

    Raises:
        ConversionError: not a checkpoint of this model, a shard missing or damaged, a tensor missing, left over or of
            another shape, or quantised weights where floating ones are needed (or the other way round).
    """
    try:
        config, _ = load_configs(folder)
        raw = read_json(folder / "config.json")
        index = read_index(folder)
        if stored is None:
            stored = [tensor for path in weight_files(folder, index) for tensor in read_header(path)]
        return plan_tensors(folder, config, raw, stored, set(index), request, shard_bytes)
    except (ConfigError, WeightsError, ShardError) as error:
        raise ConversionError(f"cannot convert {folder}: {error}") from None


def plan_tensors(
    folder: Path,
    config: ModelConfig,
    raw: Mapping[str, Any],
    stored: list[StoredTensor],
    promised: set[str],
    request: ConversionRequest,
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """Plan a conversion; see `make_plan`. `promised` are the names in the source's index."""
    pieces, dropped = sort_tensors(folder, promised, ((tensor.path, tensor.name, tensor) for tensor in stored))
    sources = {parameter: _join(parameter, found) for parameter, found in pieces.items()}
    fill_encoder_scalars(sources, config.text.num_hidden_layers)
    config, unused = settle_vision(sources, config)
    scales = sorted(name for name in sources if name.endswith(".scales"))
    if scales and not request.dequantize:
        raise ConversionError(f"{folder} is quantised already ({scales[0]}); dequantise it first (--dequantize)")
    if request.dequantize and not scales:
        raise ConversionError(f"{folder} is not quantised: there is nothing to dequantise")
    jobs = _unpacking_jobs(sources, config, request.dtype) if request.dequantize else _jobs(sources, request)
    parameters: dict[str, mx.array] = dict(tree_flatten(DiffusionGemma(config).parameters()))  # never evaluated
    check_tensors(parameters, {job.parameter: job.spec for job in jobs})
    jobs.sort(key=lambda job: min(job.outputs))
    smaller, left = _what_did_not_fit(jobs, request)
    files = _files(jobs, shard_bytes)
    parts = _part_sizes(jobs)
    nbytes = sum(part.nbytes for part in parts.values())
    return Plan(
        source=folder,
        config=_output_config(raw, jobs, request, nbytes, sum(part.parameters for part in parts.values())),
        shards=files,
        dropped=(*dropped, *unused),
        smaller_groups=smaller,
        left_unquantized=left,
        parts=parts,
        run_bytes=plan_memory(config, nbytes, [RUN_TOKENS]).total,
    )


def _join(parameter: str, pieces: Mapping[Target, StoredTensor]) -> Source:
    """Return the rows of a parameter: those of its pieces expert by expert, in each expert gate before up."""
    halves = order_pieces(parameter, pieces)
    specs = {piece.spec for piece in pieces.values()}
    if len(specs) > 1:
        raise WeightsError(f"{parameter} is stored in pieces of different shapes or dtypes")
    [spec] = specs
    if next(iter(pieces)).expert is not None:
        spec = TensorSpec(spec.dtype, (len(halves[0]), *spec.shape))
    if len(halves) > 1 and len(spec.shape) != 3:
        raise WeightsError(
            f"{parameter} is stored in pieces of shape {halves[0][0].spec.shape}, expected stacked matrices"
        )
    if len(halves) == 1:
        return Source(Rows(RowRange(piece, 0, piece.spec.rows) for piece in halves[0]), spec)
    experts, half_rows, columns = spec.shape
    ranges = []
    for expert in range(experts):
        for half in halves:
            piece, start = (half[0], expert * half_rows) if len(half) == 1 else (half[expert], 0)
            ranges.append(RowRange(piece, start, start + half_rows))
    return Source(Rows(ranges), TensorSpec(spec.dtype, (experts, 2 * half_rows, columns)))


def _cast_spec(spec: TensorSpec, dtype: mx.Dtype | None) -> TensorSpec:
    return TensorSpec(dtype, spec.shape) if dtype is not None and spec.dtype in FLOATS else spec


def _what_did_not_fit(jobs: list[Job], request: ConversionRequest) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the modules with a smaller group than the recipe asks for, and those that no group size fits."""
    smaller: dict[str, int] = {}
    left: list[str] = []
    for job in jobs:
        path, _, last = job.parameter.rpartition(".")
        asked = request.recipe(path) if request.recipe is not None and last == "weight" else None
        if asked is None or job.settings == asked:
            continue
        if job.settings is None:
            left.append(path)
        else:
            smaller[path] = job.settings.group_size
    return smaller, tuple(left)


def _jobs(sources: Mapping[str, Source], request: ConversionRequest) -> list[Job]:
    """Cast everything, and quantise what the recipe names."""
    jobs: list[Job] = []
    for name, (rows, spec) in sources.items():
        path, _, last = name.rpartition(".")
        spec = _cast_spec(spec, request.dtype)
        settings = request.recipe(path) if request.recipe is not None and last == "weight" else None
        fitted = settings.fit(spec.shape[-1]) if settings is not None else None
        packed = (request.packed or {}).get(path)
        jobs.append(Copy(name, rows, spec) if fitted is None else Pack(path, rows, spec, fitted, packed))
    return jobs


def _unpacking_jobs(sources: Mapping[str, Source], config: ModelConfig, dtype: mx.Dtype | None) -> list[Job]:
    """Dequantise every module that has scales."""
    settings = _stored_quantization(config)
    jobs: list[Job] = []
    for name, (rows, spec) in sources.items():
        path, _, last = name.rpartition(".")
        scales = sources.get(f"{path}.scales")
        if scales is None or last not in ("weight", "scales", "biases"):
            jobs.append(Copy(name, rows, _cast_spec(spec, dtype)))
        elif last == "weight":
            how = settings(path)
            columns = spec.shape[-1] * 32 // how.bits
            if scales.spec.shape != (*spec.shape[:-1], columns // how.group_size):
                raise WeightsError(f"{path}.scales has shape {scales.spec.shape}, which is not that of {how}")
            components = {kind: f"{path}.{kind}" for kind in ("weight", "scales", "biases")}
            found = {kind: sources[full].rows for kind, full in components.items() if full in sources}
            if ("biases" in found) != (how.mode == "affine"):
                problem = "lacks biases" if how.mode == "affine" else "has biases"
                raise WeightsError(f"{path} {problem}, which is not {how}")
            own = (scales if scales.spec.dtype in FLOATS else sources["model.decoder.norm.weight"]).spec.dtype
            jobs.append(Unpack(path, found, TensorSpec(dtype or own, (*spec.shape[:-1], columns)), how))
    return jobs


def _stored_quantization(config: ModelConfig) -> Callable[[str], Quantization]:
    """Return how the modules of a quantised source are packed, by path."""
    default, overrides = read_block(config.quantization or {}, module_path)

    def settings(path: str) -> Quantization:
        override = overrides.get(path, default)
        if override is False:
            raise ConfigError(f"quantization {path}: the block says false but the checkpoint has {path}.scales")
        return Quantization(**override)

    return settings


def _files(jobs: list[Job], shard_bytes: int) -> dict[str, tuple[Job, ...]]:
    """Spread the jobs over files; what one job writes stays together."""
    pieces = list(split_into_shards([job.outputs for job in jobs], shard_bytes))
    rest = iter(jobs)
    if len(pieces) == 1:
        return {"model.safetensors": tuple(rest)}
    names = [f"model-{i + 1:05}-of-{len(pieces):05}.safetensors" for i in range(len(pieces))]
    return {name: tuple(islice(rest, len(piece))) for name, piece in zip(names, pieces, strict=True)}


def _part_sizes(jobs: list[Job]) -> dict[str, PartSize]:
    """Add up parameters and bytes by part."""
    sizes: dict[str, PartSize] = {}
    for job in jobs:
        part = part_of(job.parameter.rpartition(".")[0])
        part = part or ("vision tower" if is_vision(job.parameter) else "norms and scalars")
        old = sizes.get(part, PartSize(0, 0))
        nbytes = sum(spec.nbytes for spec in job.outputs.values())
        packed = isinstance(job, Pack)
        stored_as = str(job.settings) if packed else str(job.spec.dtype).removeprefix("mlx.core.")
        sizes[part] = PartSize(old.parameters + prod(job.spec.shape), old.nbytes + nbytes, old.stored_as | {stored_as})
    return sizes


def _output_config(
    raw: Mapping[str, Any], jobs: list[Job], request: ConversionRequest, nbytes: int, parameters: int
) -> dict[str, Any]:
    """Return the output's config.json."""
    config: dict[str, Any] = json.loads(json.dumps(raw))  # nested objects are changed below
    if request.dequantize:
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    packed = {job.path: job.settings for job in jobs if isinstance(job, Pack)}
    if packed and request.default is not None:
        config["quantization"] = quantization_block(request.default, packed)
        config["quantization_config"] = config["quantization"]  # the key that transformers knows
    if request.dtype is not None:
        name = str(request.dtype).removeprefix("mlx.core.")
        for block in (config, config.get("text_config"), config.get("vision_config")):
            for key in ("dtype", "torch_dtype"):
                if isinstance(block, dict) and key in block:
                    block[key] = name
    measured = {"bits_per_weight": round(8 * nbytes / parameters, 4), "size_bytes": nbytes}
    earlier = {"source_notes": config[NOTES_KEY]} if NOTES_KEY in config else {}
    config[NOTES_KEY] = {**(request.notes or {}), **measured, **earlier}
    return config
