"""What becomes of one tensor or module of a checkpoint: copied, packed, or unpacked, some rows at a time.

A job knows its outputs, names and shapes, without touching data; `convert` reads and computes the rows asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from .recipes import Quantization
from .shards import Rows, TensorSpec


@dataclass(frozen=True)
class Copy:
    """Write a tensor as it is, or cast."""

    parameter: str
    rows: Rows
    spec: TensorSpec

    @property
    def sources(self) -> tuple[Rows, ...]:
        """What this reads."""
        return (self.rows,)

    @property
    def settings(self) -> None:
        """Not packed."""
        return None

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        """The tensors that this writes."""
        return {self.parameter: self.spec}

    def convert(self, start: int, stop: int) -> dict[str, mx.array]:
        """Return rows start to stop of the outputs."""
        return {self.parameter: self.rows.read(start, stop).astype(self.spec.dtype)}


class Packed(NamedTuple):
    """An affine module as it is stored."""

    weight: mx.array  # [..., rows, columns * bits / 32] uint32
    scales: mx.array  # [..., rows, groups]
    biases: mx.array  # likewise


@dataclass(frozen=True)
class Pack:
    """Quantise a module's weight."""

    path: str
    rows: Rows
    spec: TensorSpec  # of the weight, in the dtype it is cast to before it is packed
    settings: Quantization
    packed: Packed | None = None  # in place of what `mx.quantize` finds

    @property
    def parameter(self) -> str:
        """The parameter that is packed."""
        return f"{self.path}.weight"

    @property
    def sources(self) -> tuple[Rows, ...]:
        """What this reads."""
        return (self.rows,)

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
        how, outputs = self.settings, self.outputs
        if self.packed is not None:
            rows = (each.reshape(-1, each.shape[-1])[start:stop] for each in self.packed)
            return {
                name: each.astype(spec.dtype) for (name, spec), each in zip(outputs.items(), rows, strict=True)
            }
        weight = self.rows.read(start, stop).astype(self.spec.dtype)
        packed = mx.quantize(weight, group_size=how.group_size, bits=how.bits, mode=how.mode)
        return dict(zip(outputs, packed, strict=True))


@dataclass(frozen=True)
class Unpack:
    """Dequantise a module's weight."""

    path: str
    components: Mapping[str, Rows]  # weight, scales, and biases where the mode has them
    spec: TensorSpec  # of the result
    settings: Quantization

    @property
    def parameter(self) -> str:
        """The parameter that comes out."""
        return f"{self.path}.weight"

    @property
    def rows(self) -> Rows:
        """The packed weight's rows."""
        return self.components["weight"]

    @property
    def sources(self) -> tuple[Rows, ...]:
        """What this reads."""
        return tuple(self.components.values())

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


def source_bytes(job: Job) -> int:
    """Return how many bytes a job reads."""
    return sum(part.tensor.spec.row_bytes * (part.stop - part.start) for rows in job.sources for part in rows.ranges)
