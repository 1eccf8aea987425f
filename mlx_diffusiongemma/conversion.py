"""Turn a checkpoint folder into another one: cast, quantise or dequantise, tensor by tensor, in bounded memory.

First a plan, from names and shapes alone: what every tensor becomes, in which file, and how large. Then the plan is
carried out a few megabytes at a time. The output grows in a folder beside the target that is renamed at the very end:
a folder under the target's name is always finished.

How many bits a module gets is in `recipes.py`, reading and writing files in `shards.py`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from .config import ConfigError, ModelConfig, load_configs, read_json
from .model import DiffusionGemma
from .quantization import read_block
from .recipes import Quantization, Recipe, part_of, quantization_block
from .shards import RowRange, Rows, ShardError, ShardWriter, StoredTensor, TensorSpec, read_header, split_into_shards
from .vocabulary import CHUNK_ELEMENTS_GPU
from .weights import (
    INDEX_FILE,
    Target,
    WeightsError,
    fill_encoder_scalars,
    find_target,
    is_vision,
    module_path,
    order_pieces,
    read_index,
    settle_vision,
    weight_files,
)

SHARD_BYTES = 5 << 30  # what mlx-lm and the Hub use
CHUNK_BYTES = 64 << 20  # source bytes that are in memory at a time
NOTES_KEY = "mlx_diffusiongemma"  # where config.json says how the folder was made
INCOMPLETE = ".incomplete"
MARKER = ".mlx_diffusiongemma_conversion"
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
FLOATS = (mx.bfloat16, mx.float16, mx.float32)

Progress = Callable[[str, int], None]  # what is being done, bytes of the source done since the last call


class ConversionError(ValueError):
    """A conversion that cannot be done; the message is one line."""


# -- what becomes of one tensor -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copy:
    """Write a tensor as it is, or cast."""

    name: str
    rows: Rows
    spec: TensorSpec

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        """The tensors that this writes."""
        return {self.name: self.spec}

    def convert(self, start: int, stop: int) -> dict[str, mx.array]:
        """Return rows start to stop of the outputs."""
        return {self.name: self.rows.read(start, stop).astype(self.spec.dtype)}


@dataclass(frozen=True)
class Pack:
    """Quantise a module's weight."""

    path: str
    rows: Rows
    spec: TensorSpec  # of the weight, in the dtype it is cast to before it is packed
    settings: Quantization

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        """The tensors that this writes: packed weight, scales, and biases in affine mode."""
        *rows, columns = self.spec.shape
        groups = (*rows, columns // self.settings.group_size)
        outputs = {f"{self.path}.weight": TensorSpec(mx.uint32, (*rows, columns * self.settings.bits // 32))}
        if self.settings.mode != "affine":
            return {**outputs, f"{self.path}.scales": TensorSpec(mx.uint8, groups)}
        grouped = TensorSpec(self.spec.dtype, groups)
        return {**outputs, f"{self.path}.scales": grouped, f"{self.path}.biases": grouped}

    def convert(self, start: int, stop: int) -> dict[str, mx.array]:
        """Return rows start to stop of the outputs; a group never reaches into the next row."""
        how = self.settings
        weight = self.rows.read(start, stop).astype(self.spec.dtype)
        packed = mx.quantize(weight, group_size=how.group_size, bits=how.bits, mode=how.mode)
        return dict(zip(self.outputs, packed, strict=True))


@dataclass(frozen=True)
class Unpack:
    """Dequantise a module's weight."""

    path: str
    components: Mapping[str, Rows]  # weight, scales, and biases where the mode has them
    spec: TensorSpec  # of the result
    settings: Quantization

    @property
    def rows(self) -> Rows:
        """The packed weight's rows."""
        return self.components["weight"]

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        """The tensor that this writes."""
        return {f"{self.path}.weight": self.spec}

    def convert(self, start: int, stop: int) -> dict[str, mx.array]:
        """Return rows start to stop of the output."""
        how = self.settings
        parts = {name: rows.read(start, stop) for name, rows in self.components.items()}
        weight = mx.dequantize(
            parts["weight"],
            parts["scales"],
            parts.get("biases"),
            group_size=how.group_size,
            bits=how.bits,
            mode=how.mode,
        )
        return {f"{self.path}.weight": weight.astype(self.spec.dtype)}


Job = Copy | Pack | Unpack


# -- the plan -----------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A tensor of the source under the name of its parameter."""

    rows: Rows
    spec: TensorSpec


class PartSize(NamedTuple):
    """How large one part of the output is."""

    parameters: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits per parameter, scales and biases included."""
        return 8 * self.nbytes / self.parameters


@dataclass(frozen=True)
class Plan:
    """All that a conversion will do, known before anything is written."""

    source: Path
    config: dict[str, Any]  # the output's config.json
    shards: dict[str, tuple[Job, ...]]  # file name: what goes into it
    dropped: tuple[str, ...]  # names of the source's tensors that are dropped on purpose
    left_unquantized: tuple[str, ...]  # modules that the recipe names and no group size fits
    parts: dict[str, PartSize]
    run_bytes: int  # estimate: weights, an 8,192-token prefix and the working memory of a step

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
        return sum(_source_bytes(job) for job in self.jobs)


@dataclass(frozen=True)
class Request:
    """What is asked of a conversion.

    `recipe` quantises, `dequantize` undoes that, neither casts or copies; `dtype` is that of the floating tensors, None
    for the source's. `notes` go into the output's config.json: recipe name, source, revision, measured numbers.
    """

    recipe: Recipe | None = None
    default: Quantization | None = None  # needs no entry in the `quantization` block
    dequantize: bool = False
    dtype: mx.Dtype | None = None
    notes: Mapping[str, Any] | None = None


def make_plan(folder: Path, request: Request, shard_bytes: int = SHARD_BYTES) -> Plan:
    """Plan a conversion from the configs and the headers alone.

    Raises:
        ConversionError: not a checkpoint of this model, a shard missing or damaged, a tensor missing, left over or of
            another shape, or quantised weights where floating ones are needed (or the other way round).
    """
    try:
        config, _ = load_configs(folder)
        raw = read_json(folder / "config.json")
        index = read_index(folder)
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
    request: Request,
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """Plan a conversion; see `make_plan`. `promised` are the names in the source's index."""
    missing = promised - {tensor.name for tensor in stored}
    if missing:
        raise WeightsError(f"{folder / INDEX_FILE} names {sorted(missing)[0]}, which no shard holds")
    sources, dropped, config = _gather(stored, config)
    scales = sorted(name for name in sources if name.endswith(".scales"))
    if scales and not request.dequantize:
        raise ConversionError(f"{folder} is quantised already ({scales[0]}); dequantise it first (--dequantize)")
    if request.dequantize and not scales:
        raise ConversionError(f"{folder} is not quantised: there is nothing to dequantise")
    jobs = _unpacking_jobs(sources, config, request.dtype) if request.dequantize else _jobs(sources, request)
    _check_shapes(jobs, config)
    jobs.sort(key=lambda job: min(job.outputs))
    wanted = [job for job in jobs if isinstance(job, Copy) and _is_wanted(job, request)]
    files = _files(jobs, shard_bytes)
    parts = _part_sizes(jobs)
    nbytes = sum(part.nbytes for part in parts.values())
    return Plan(
        source=folder,
        config=_output_config(raw, jobs, request, nbytes, sum(part.parameters for part in parts.values())),
        shards=files,
        dropped=tuple(dropped),
        left_unquantized=tuple(job.name.removesuffix(".weight") for job in wanted),
        parts=parts,
        run_bytes=estimate_memory(config, nbytes),
    )


def _gather(stored: list[StoredTensor], config: ModelConfig) -> tuple[dict[str, Source], list[str], ModelConfig]:
    """Return the tensors by parameter name, the names that are dropped on purpose, and the config that fits them."""
    pieces: dict[str, dict[Target, StoredTensor]] = {}
    dropped: list[str] = []
    for tensor in stored:
        target = find_target(tensor.name)
        if target.parameter is None:
            dropped.append(tensor.name)
            continue
        found = pieces.setdefault(target.parameter, {})
        if target in found:
            raise WeightsError(f"{tensor.path.name}: {tensor.name} is a second tensor for {target.parameter}")
        found[target] = tensor
    sources = {parameter: _join(parameter, found) for parameter, found in pieces.items()}
    fill_encoder_scalars(sources, config.text.num_hidden_layers)
    config, unused = settle_vision(sources, config)
    return sources, dropped + [name for name, _ in unused], config


def _join(parameter: str, pieces: Mapping[Target, StoredTensor]) -> Source:
    """Return the rows of a parameter: those of its pieces expert by expert, in each expert gate before up."""
    halves = order_pieces(parameter, pieces)
    specs = {piece.spec for piece in pieces.values()}
    if len(specs) > 1:
        raise WeightsError(f"{parameter} is stored in pieces of different shapes or dtypes")
    [spec] = specs
    if next(iter(pieces)).expert is not None:
        spec = TensorSpec(spec.dtype, (len(halves[0]), *spec.shape))
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


def _is_wanted(job: Copy, request: Request) -> bool:
    """Tell whether the recipe wanted to quantise what is copied."""
    path, _, last = job.name.rpartition(".")
    return last == "weight" and request.recipe is not None and request.recipe(path) is not None


def _jobs(sources: Mapping[str, Source], request: Request) -> list[Job]:
    """Cast everything, and quantise what the recipe names."""
    jobs: list[Job] = []
    for name, (rows, spec) in sources.items():
        path, _, last = name.rpartition(".")
        spec = _cast_spec(spec, request.dtype)
        settings = request.recipe(path) if request.recipe is not None and last == "weight" else None
        fitted = settings.fit(spec.shape[-1]) if settings is not None else None
        jobs.append(Copy(name, rows, spec) if fitted is None else Pack(path, rows, spec, fitted))
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
            own = scales.spec.dtype if scales.spec.dtype in FLOATS else mx.bfloat16
            jobs.append(Unpack(path, found, TensorSpec(dtype or own, (*spec.shape[:-1], columns)), how))
    return jobs


def _stored_quantization(config: ModelConfig) -> Callable[[str], Quantization]:
    """Return how the modules of a quantised source are packed, by path."""
    default, overrides = read_block(config.quantization or {}, module_path)

    def settings(path: str) -> Quantization:
        return Quantization(**(overrides.get(path) or default))

    return settings


def _check_shapes(jobs: list[Job], config: ModelConfig) -> None:
    """Raise `WeightsError` unless the floating tensors are exactly the model's parameters."""
    parameters: dict[str, mx.array] = dict(tree_flatten(DiffusionGemma(config).parameters()))  # never evaluated
    expected = {name: array.shape for name, array in parameters.items()}
    got = {job.name if isinstance(job, Copy) else f"{job.path}.weight": job.spec.shape for job in jobs}
    for problem, names in (
        ("missing tensor", set(expected) - set(got)),
        ("unexpected tensor", set(got) - set(expected)),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise WeightsError(f"{problem} {min(names)}{more}")
    for name, shape in expected.items():
        if got[name] != shape:
            raise WeightsError(f"{name} has shape {got[name]}, expected {shape}")


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
        path = job.name.rpartition(".")[0] if isinstance(job, Copy) else job.path
        part = part_of(path) or ("vision tower" if is_vision(f"{path}.") else "norms and scalars")
        old = sizes.get(part, PartSize(0, 0))
        nbytes = sum(spec.nbytes for spec in job.outputs.values())
        sizes[part] = PartSize(old.parameters + prod(job.spec.shape), old.nbytes + nbytes)
    return sizes


def estimate_memory(config: ModelConfig, weight_bytes: int, context: int = 8192) -> int:
    """Estimate the bytes that a run needs: weights, the keys and values of a prefix, and a step's working memory.

    The working memory is that of the vocabulary pass, the largest of a step: some five float32 chunks.
    """
    text = config.text
    cache = 0
    for kind in text.layer_types:
        shape = text.attention_shape(kind)
        kept = min(context, text.sliding_window) if kind == "sliding_attention" else context
        cache += 2 * kept * shape.num_key_value_heads * shape.head_dim * 2  # keys and values, 2 bytes each
    working = 5 * 4 * min(CHUNK_ELEMENTS_GPU, config.canvas_length * text.vocab_size)
    return weight_bytes + cache + working


def _output_config(
    raw: Mapping[str, Any], jobs: list[Job], request: Request, nbytes: int, parameters: int
) -> dict[str, Any]:
    """Return the output's config.json."""
    config = dict(raw)
    if request.dequantize:
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    packed = {job.path: job.settings for job in jobs if isinstance(job, Pack)}
    if packed and request.default is not None:
        config["quantization"] = quantization_block(request.default, packed)
        config["quantization_config"] = config["quantization"]  # the key that transformers knows
    if request.dtype is not None:
        name = str(request.dtype).removeprefix("mlx.core.")
        for block in (config, config.get("text_config") or {}, config.get("vision_config") or {}):
            for key in ("dtype", "torch_dtype"):
                if key in block:
                    block[key] = name
    measured = {"bits_per_weight": round(8 * nbytes / parameters, 4), "size_bytes": nbytes}
    config[NOTES_KEY] = {**(request.notes or {}), **measured}
    return config


# -- carrying it out ----------------------------------------------------------------------------------------------


def check_target(source: Path, target: Path) -> None:
    """Raise `ConversionError` for a target that exists, or that lies inside the source (or the other way round)."""
    inside, around = target.resolve(), source.resolve()
    if inside == around or around in inside.parents or inside in around.parents:
        raise ConversionError(f"target {target}: got a folder inside or around the source {source}, expected another")
    if target.exists() or target.is_symlink():
        raise ConversionError(f"target {target} exists; remove it or name another one (--mlx-path)")


def incomplete_folder(target: Path) -> Path:
    """Return the folder in which the output grows until it is finished."""
    return target.with_name(target.name + INCOMPLETE)


@contextmanager
def _output_folder(target: Path) -> Iterator[tuple[Path, bool]]:
    """Give the folder to fill, and whether an unfinished one was there; rename it at the end, remove it on error.

    The marker file is locked as long as the conversion runs: only a folder that has one, unlocked, is ever removed.
    """
    growing = incomplete_folder(target)
    leftover = growing.exists()
    if leftover and not (growing / MARKER).is_file():
        raise ConversionError(f"{growing} exists and was not made by a conversion; remove it or name another target")
    growing.mkdir(parents=True, exist_ok=True)
    with (growing / MARKER).open("w") as marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(f"another conversion to {target} is running") from None
        try:
            for path in growing.iterdir():
                if path.name != MARKER:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            yield growing, leftover
            growing.rename(target)
        except BaseException:
            shutil.rmtree(growing, ignore_errors=True)
            raise
    (target / MARKER).unlink()


def write_checkpoint(plan: Plan, target: Path, card: str, on_progress: Progress = lambda what, nbytes: None) -> bool:
    """Carry a plan out. Nothing appears under the target's name until everything is written.

    Args:
        plan: from `make_plan`.
        target: folder to make.
        card: the text of its README.md.
        on_progress: called with the name of a tensor and the source bytes done.

    Returns:
        True when the remains of an interrupted conversion to the same target were removed first.

    Raises:
        ConversionError: a target that may not be written to, too little space, or a damaged source.
    """
    check_target(plan.source, target)
    try:
        with _output_folder(target) as (folder, leftover):
            free = shutil.disk_usage(folder).free
            if free < plan.nbytes:
                raise ConversionError(f"{target.parent} has {free:,} bytes free, expected at least {plan.nbytes:,}")
            for path in sorted({part.tensor.path for job in plan.jobs for part in job.rows.ranges}):
                check_digest(path)
            _write_tensors(plan, folder, on_progress)
            _copy_side_files(plan.source, folder)
            (folder / "README.md").write_text(card, encoding="utf-8")
            _write_json(folder / INDEX_FILE, _index(plan))
            _write_json(folder / "config.json", plan.config)  # last: without it nobody takes the folder for a model
            return leftover
    except ShardError as error:
        raise ConversionError(f"cannot convert {plan.source}: {error}") from None
    except OSError as error:
        raise ConversionError(f"cannot write {target}: {error.strerror or error}") from None


def _write_tensors(plan: Plan, folder: Path, on_progress: Progress) -> None:
    """Write file after file, a chunk of rows at a time."""
    for file, jobs in plan.shards.items():
        specs = {name: spec for job in jobs for name, spec in job.outputs.items()}
        with ShardWriter(folder / file, specs) as writer:
            for job in jobs:
                source_bytes, count = _source_bytes(job), job.rows.count
                step = max(1, CHUNK_BYTES * count // max(1, source_bytes))
                for start in range(0, count, step):
                    stop = min(start + step, count)
                    outputs = job.convert(start, stop)
                    mx.eval(list(outputs.values()))
                    for name, rows in outputs.items():
                        writer.write(name, start, rows)
                    on_progress(next(iter(outputs)), source_bytes * stop // count - source_bytes * start // count)
                mx.clear_cache()


def _source_bytes(job: Job) -> int:
    components = job.components.values() if isinstance(job, Unpack) else (job.rows,)
    return sum(part.tensor.spec.row_bytes * (part.stop - part.start) for rows in components for part in rows.ranges)


def check_digest(path: Path) -> None:
    """Compare a file of the Hub's cache, which is stored under its SHA-256, with its name; other files pass.

    Raises:
        ConversionError: they differ.
    """
    digest = path.resolve().name
    if not path.is_symlink() or not re.fullmatch(r"[0-9a-f]{64}", digest):
        return
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != digest:
        raise ConversionError(
            f"{path} is damaged: its SHA-256 is {got}, expected {digest}; delete it and download again"
        )


def _copy_side_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, templates, generation and processor configs."""
    own = {INDEX_FILE, "config.json"}
    for pattern in SIDE_FILES:
        for path in sorted(source.glob(pattern)):
            if path.name not in own and path.is_file():
                shutil.copyfile(path, folder / path.name)


def _index(plan: Plan) -> dict[str, Any]:
    weight_map = {name: file for file, jobs in plan.shards.items() for job in jobs for name in job.outputs}
    metadata = {"total_size": plan.nbytes, "total_parameters": plan.parameters}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
