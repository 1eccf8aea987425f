"""Carry a conversion plan out: read, convert and write tensor by tensor, a few megabytes at a time.

The output grows in a folder beside the target that is renamed at the very end: a folder under the target's name is
always finished. What is done to each tensor is in `plan.py`, reading and writing files in `shards.py`.
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
from pathlib import Path
from typing import Any

import mlx.core as mx

from .jobs import source_bytes
from .plan import ConversionError, Plan
from .shards import ShardError, ShardWriter
from .weights import INDEX_FILE

CHUNK_BYTES = 64 << 20  # source bytes that are in memory at a time
INCOMPLETE = ".incomplete"
MARKER = ".mlx_diffusiongemma_conversion"
# What a checkpoint has besides weights and config.json. Other files of the user's folder are not ours to publish.
COPIED_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)

Progress = Callable[[str, int], None]  # what is being done, bytes of the source done since the last call


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
def _claimed(target: Path) -> Iterator[tuple[Path, bool]]:
    """Give the folder to fill, empty, and whether an interrupted conversion had left something in it.

    The marker file is locked as long as a conversion runs: only a folder that has one, unlocked, is ever emptied.
    """
    growing = incomplete_folder(target)
    leftover = growing.exists()
    growing.mkdir(parents=True, exist_ok=True)
    if not (growing / MARKER).is_file() and any(growing.iterdir()):
        raise ConversionError(f"{growing} exists and was not made by a conversion; remove it or name another target")
    with (growing / MARKER).open("w") as marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(f"another conversion to {target} is running") from None
        for path in growing.iterdir():
            if path.name != MARKER:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield growing, leftover


@contextmanager
def _output_folder(target: Path) -> Iterator[Path]:
    """Give the folder to fill; remove it on error, rename it to the target when everything is in it."""
    with _claimed(target) as (growing, _):
        try:
            yield growing
            _sync(growing)
        except BaseException:
            shutil.rmtree(growing, ignore_errors=True)
            raise
        try:
            if target.exists():  # it came while we were writing
                raise FileExistsError(17, "it exists by now")
            growing.rename(target)
        except OSError as error:
            problem = f"the conversion is finished in {growing}, but it cannot be renamed to {target}"
            raise ConversionError(f"{problem}: {error.strerror}") from None
    (target / MARKER).unlink(missing_ok=True)
    _sync(target.parent)


def remove_leftover(target: Path) -> bool:
    """Remove what an interrupted conversion to the target has left; tell whether there was something.

    Raises:
        ConversionError: the folder is not a conversion's, or one is running.
    """
    if not incomplete_folder(target).exists():
        return False
    with _claimed(target) as (growing, leftover):
        shutil.rmtree(growing)
    return leftover


def write_checkpoint(plan: Plan, target: Path, card: str, on_progress: Progress = lambda what, nbytes: None) -> None:
    """Carry a plan out. Nothing appears under the target's name until everything is written.

    Args:
        plan: from `plan.make_plan`.
        target: folder to make.
        card: the text of its README.md.
        on_progress: called with what is being done and the source bytes done.

    Raises:
        ConversionError: a target that may not be written to, too little space, or a damaged source.
    """
    check_target(plan.source, target)
    try:
        with _output_folder(target) as folder:
            free = shutil.disk_usage(folder).free
            if free < plan.nbytes:
                raise ConversionError(f"{target.parent} has {free:,} bytes free, expected at least {plan.nbytes:,}")
            for path in sorted({part.tensor.path for job in plan.jobs for rows in job.sources for part in rows.ranges}):
                on_progress(f"checking {path.name}", 0)
                check_digest(path)
            _write_tensors(plan, folder, on_progress)
            _copy_files(plan.source, folder)
            _write_text(folder / "README.md", card)
            _write_text(folder / INDEX_FILE, _json(_index(plan)))
            _write_text(folder / "config.json", _json(plan.config))  # last: without it nobody takes it for a model
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
                nbytes, count = source_bytes(job), job.rows.count
                step = max(1, CHUNK_BYTES * count // max(1, nbytes))
                for start in range(0, count, step):
                    stop = min(start + step, count)
                    outputs = job.convert(start, stop)
                    mx.eval(list(outputs.values()))
                    for name, rows in outputs.items():
                        writer.write(name, start, rows)
                    on_progress(next(iter(outputs)), nbytes * stop // count - nbytes * start // count)
                mx.clear_cache()


def check_digest(path: Path) -> None:
    """Compare a file of the Hub's cache, which is stored under its SHA-256, with its name; other files pass.

    Raises:
        ConversionError: they differ.
        ShardError: the file cannot be read.
    """
    digest = path.resolve().name
    if not path.is_symlink() or not re.fullmatch(r"[0-9a-f]{64}", digest):
        return
    try:
        with path.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}") from None
    if got != digest:
        raise ConversionError(
            f"{path} is damaged: its SHA-256 is {got}, expected {digest}; delete it and download again"
        )


def _copy_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, templates, generation and processor configs, licence."""
    for pattern in COPIED_FILES:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                copy = folder / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                try:
                    data = path.read_bytes()
                except OSError as error:
                    raise ShardError(f"{path} cannot be read: {error.strerror}") from None
                copy.write_bytes(data)
                _sync(copy)


def _index(plan: Plan) -> dict[str, Any]:
    weight_map = {name: file for file, jobs in plan.shards.items() for job in jobs for name in job.outputs}
    metadata = {"total_size": plan.nbytes, "total_parameters": plan.parameters}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Make a file or a folder last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
