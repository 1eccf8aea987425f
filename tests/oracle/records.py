"""What a run of the reference leaves behind, one sequence at a time, as numpy arrays. No torch here.

A record holds every random number of the run and every integer that came of it, so that a replay needs nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class CanvasRecord:
    """One canvas of one sequence: T steps until it settled, C positions."""

    first: np.ndarray  # [C] int32: the noise the canvas starts from
    uniforms: np.ndarray  # [T, C] float32: inverse-transform draws that give the reference's own tokens
    noise: np.ndarray  # [T, C] int32: what refused positions turn into
    draw: np.ndarray  # [T, C] int32: the reference's multinomial draws
    accepted: np.ndarray  # [T, C] bool
    argmax: np.ndarray  # [T, C] int32
    canvas: np.ndarray  # [T, C] int32: after renoising
    mean_entropy: np.ndarray  # [T] float32
    accept_margin: np.ndarray  # [T] float32: how far the closest decision was from the entropy bound, in nats
    argmax_margin: np.ndarray  # [T] float32: smallest lead of a best logit over the second
    finished: bool  # stable and confident at its last step, rather than out of steps

    @property
    def steps(self) -> int:
        """Denoising steps the canvas took."""
        return len(self.argmax)

    @property
    def committed(self) -> np.ndarray:
        """The argmax of the last step [C]."""
        return self.argmax[-1]


@dataclass(frozen=True)
class SequenceRecord:
    """One sequence: prompt ids without padding, canvases up to the one that ended it, and the reference's answer."""

    prompt: tuple[int, ...]
    canvases: tuple[CanvasRecord, ...]
    answer: tuple[int, ...]  # generated ids of the reference: whole canvases, padded after the first end token

    def kept(self, end_ids: Collection[int], max_tokens: int) -> tuple[int, ...]:
        """Return the reference's answer up to its first end token and to `max_tokens`."""
        end = next((i for i, token in enumerate(self.answer) if token in end_ids), len(self.answer))
        return self.answer[: min(end, max_tokens)]


CANVAS_ARRAYS = tuple(field.name for field in fields(CanvasRecord) if field.name != "finished")


def to_arrays(records: Mapping[str, SequenceRecord]) -> dict[str, np.ndarray]:
    """Flatten named records to arrays for a safetensors file. Ids become int16, flags uint8."""
    arrays: dict[str, np.ndarray] = {}
    for name, record in records.items():
        arrays[f"{name}/prompt"] = _small(np.array(record.prompt))
        arrays[f"{name}/answer"] = _small(np.array(record.answer))
        for index, canvas in enumerate(record.canvases):
            for key in CANVAS_ARRAYS:
                arrays[f"{name}/{index}/{key}"] = _small(getattr(canvas, key))
            arrays[f"{name}/{index}/finished"] = np.array([canvas.finished], dtype=np.uint8)
    return arrays


def _small(array: np.ndarray) -> np.ndarray:
    if array.dtype == bool:
        return array.astype(np.uint8)
    return array.astype(np.int16 if np.issubdtype(array.dtype, np.integer) else np.float32)


def from_arrays(arrays: Mapping[str, np.ndarray], name: str) -> SequenceRecord:
    """Read back one record of `to_arrays`."""
    canvases = []
    while f"{name}/{len(canvases)}/first" in arrays:
        prefix = f"{name}/{len(canvases)}"
        values = {key: arrays[f"{prefix}/{key}"] for key in CANVAS_ARRAYS}
        for key, array in values.items():
            if array.dtype != np.float32:
                values[key] = array.astype(bool if key == "accepted" else np.int32)
        canvases.append(CanvasRecord(**values, finished=bool(arrays[f"{prefix}/finished"][0])))
    return SequenceRecord(
        tuple(arrays[f"{name}/prompt"].tolist()), tuple(canvases), tuple(arrays[f"{name}/answer"].tolist())
    )
