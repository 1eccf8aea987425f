"""Safetensors files in pieces: tensors are read and written a few rows at a time, so that no file has to fit in memory.

The safetensors libraries write whole files only, and reading through a memory map counts as resident memory; here a
header is parsed and rows are read and written at their offsets. What the tensors mean is in `weights.py`.

Format: https://huggingface.co/docs/safetensors (8 bytes header length, JSON header, data).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

# safetensors' name, MLX's dtype, the numpy dtype with the same bytes (numpy has no bfloat16)
_DTYPES: tuple[tuple[str, mx.Dtype, Any], ...] = (
    ("BF16", mx.bfloat16, np.uint16),
    ("F16", mx.float16, np.uint16),
    ("F32", mx.float32, np.uint32),
    ("U8", mx.uint8, np.uint8),
    ("U32", mx.uint32, np.uint32),
    ("I32", mx.int32, np.uint32),
    ("I64", mx.int64, np.uint64),
)
_BY_NAME = {name: (dtype, storage) for name, dtype, storage in _DTYPES}
_BY_DTYPE = {dtype: (name, storage) for name, dtype, storage in _DTYPES}
_STORAGE = {np.uint8: mx.uint8, np.uint16: mx.uint16, np.uint32: mx.uint32, np.uint64: mx.uint64}


class ShardError(ValueError):
    """A safetensors file that cannot be read."""


class TensorSpec(NamedTuple):
    """A tensor without its data."""

    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Number of rows when all axes but the last are one; 1 for a vector."""
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return prod(self.shape[-1:]) * self.dtype.size

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.rows * self.row_bytes


def tensor_spec(dtype: str, shape: Iterable[int]) -> TensorSpec:
    """Return the spec of a tensor as a header describes it. Raise `ShardError` for a dtype no checkpoint has."""
    if dtype not in _BY_NAME:
        raise ShardError(f"dtype {dtype}, expected one of {', '.join(_BY_NAME)}")
    return TensorSpec(_BY_NAME[dtype][0], tuple(shape))


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    name: str
    spec: TensorSpec
    path: Path
    offset: int  # of the first byte, from the start of the file

    def read(self, start: int, stop: int) -> mx.array:
        """Read rows start to stop of the tensor seen as a matrix; [stop - start, last axis].

        Raises:
            ShardError: the file cannot be read, or is shorter than its header says.
        """
        spec = self.spec
        _, storage = _BY_DTYPE[spec.dtype]
        columns = prod(spec.shape[-1:])
        data = np.empty((stop - start, columns), storage)
        try:
            if data.size:
                self._fill(data.data.cast("B"), self.offset + start * spec.row_bytes)
        except OSError as error:
            raise ShardError(f"{self.path} cannot be read: {error.strerror}") from None
        return mx.array(data).view(spec.dtype)

    def read_part(self, axis: int, part: slice) -> mx.array:
        """Read a part of one axis, and of the file no more than that; the other axes are whole.

        Raises:
            ShardError: the file cannot be read, or is shorter than its header says.
        """
        _, storage = _BY_DTYPE[self.spec.dtype]
        try:
            whole = np.memmap(self.path, storage, "r", self.offset, self.spec.shape)
        except (OSError, ValueError) as error:
            raise ShardError(f"{self.path} cannot be read: {error}") from None
        own = np.ascontiguousarray(whole[(slice(None),) * axis + (part,)])  # MLX would keep the gaps between the rows
        return mx.array(own).view(self.spec.dtype)

    def _fill(self, view: memoryview, offset: int) -> None:
        """Read into `view`, which may take several calls for gigabytes."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            got = 0
            while got < len(view):
                count = file.readinto(view[got:])
                if not count:
                    raise ShardError(f"{self.path} is truncated: {self.name} ends after {got} of {len(view)} bytes")
                got += count


def read_header(path: Path) -> list[StoredTensor]:
    """List the tensors of a file.

    Raises:
        ShardError: not a safetensors file, header and size disagree, or a dtype that no checkpoint of this model has.
    """
    try:
        with safe_open(path, framework="numpy"):  # checks offsets, overlaps and the file's size
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise ShardError(f"{path} is damaged or truncated: {error}") from None
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            spec = tensor_spec(entry["dtype"], entry["shape"])
        except ShardError as error:
            raise ShardError(f"{path}: {name} has {error}") from None
        tensors.append(StoredTensor(name, spec, path, 8 + length + entry["data_offsets"][0]))
    return tensors


def split_into_shards(
    units: Iterable[Mapping[str, TensorSpec]], limit: int
) -> Iterator[list[Mapping[str, TensorSpec]]]:
    """Cut a checkpoint into files of at most `limit` bytes of data, in order; a unit, such as a module, stays whole."""
    shard: list[Mapping[str, TensorSpec]] = []
    size = 0
    for unit in units:
        nbytes = sum(spec.nbytes for spec in unit.values())
        if shard and size + nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(unit)
        size += nbytes
    if shard:
        yield shard


class ShardWriter:
    """Writes one safetensors file whose tensors are known beforehand; rows may come in any order."""

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str] | None = None,
        mode: int = 0o666,
    ) -> None:
        """Write the header and give the file its full size; `mode` are its permissions, less the umask.

        Raises:
            OSError: the file exists, or cannot be written.
        """
        self._specs = dict(specs)
        self._offsets: dict[str, int] = {}
        self._written = dict.fromkeys(specs, 0)
        header: dict[str, Any] = {"__metadata__": {"format": "mlx", **(metadata or {})}}
        position = 0
        # Widest dtype first keeps every tensor aligned to its item size.
        for name in sorted(specs, key=lambda name: (-specs[name].dtype.size, name)):
            spec = specs[name]
            offsets = [position, position + spec.nbytes]
            header[name] = {"dtype": _BY_DTYPE[spec.dtype][0], "shape": list(spec.shape), "data_offsets": offsets}
            self._offsets[name] = position
            position += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb", buffering=0)
        try:
            self._pwrite(len(text).to_bytes(8, "little") + text, 0)
            self._file.truncate(self._data_start + position)
        except BaseException:
            self._file.close()
            raise

    def write(self, name: str, start: int, rows: mx.array) -> None:
        """Write rows [n, last axis] of a tensor from row `start` on.

        Raises:
            ValueError: rows that do not belong to the tensor.
            OSError: the disk is full, for instance.
        """
        spec = self._specs[name]
        fits = rows.shape[0] + start <= spec.rows and rows.shape[1:] == spec.shape[-1:]
        if rows.dtype != spec.dtype or not (fits or (not spec.shape and rows.size == 1)):
            raise ValueError(f"{name}: got {rows.dtype} {rows.shape} at row {start}, expected rows of {spec}")
        storage = _STORAGE[_BY_DTYPE[spec.dtype][1]]
        data = np.ascontiguousarray(np.asarray(rows.view(storage)))
        if data.size:
            self._pwrite(data.data.cast("B"), self._data_start + self._offsets[name] + start * spec.row_bytes)
        self._written[name] += rows.shape[0]

    def _pwrite(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Flush to disk. Raise `ValueError` when rows are missing."""
        missing = [name for name, spec in self._specs.items() if self._written[name] != spec.rows]
        os.fsync(self._file.fileno())
        self._file.close()
        if missing:
            raise ValueError(
                f"{missing[0]}: {self._written[missing[0]]} of {self._specs[missing[0]].rows} rows written"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


class RowRange(NamedTuple):
    """Rows of a stored tensor."""

    tensor: StoredTensor
    start: int
    stop: int


class Rows:
    """Rows of several stored tensors, one after the other, read as one matrix."""

    def __init__(self, ranges: Iterable[RowRange]) -> None:
        self.ranges = tuple(ranges)
        self.count = sum(part.stop - part.start for part in self.ranges)

    def read(self, start: int, stop: int) -> mx.array:
        """Read rows start to stop; [stop - start, last axis]."""
        parts = []
        position = 0
        for part in self.ranges:
            length = part.stop - part.start
            first, last = max(start - position, 0), min(stop - position, length)
            if first < last:
                parts.append(part.tensor.read(part.start + first, part.start + last))
            position += length
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)
