"""Which rows of a canvas a step computes, and what is kept of the others.

    canvas      The answer is 4? 4? <end>            4? and 4? are open, the rest is certain
    computed                  4? 4?                  they attend to prefix, frozen rows and themselves
    frozen      The answer is       <end>            keys and values of every layer, as they were computed last

A frozen row keeps its token, and does not see what the open ones become. It is open again when all rows are refreshed.

Reference: the DualCache of Fast-dLLM (arXiv 2505.22618), for single rows in place of blocks.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .cache import KeysAndValues
from .denoise import CanvasState, StepInput, StepResult
from .policies import Policy, rows_of
from .sampler import Noise


class OpenRows:
    """The rows of one canvas after another that are computed. Those that are not stand still."""

    def __init__(self, policy: Policy, canvas_length: int) -> None:
        """Bind the policy, which freezes rows, and the length of a whole canvas."""
        self._threshold = policy.freeze_confidence
        self._refresh_steps = policy.refresh_steps
        self._C = canvas_length
        self.start()

    def start(self) -> None:
        """Begin a canvas, all of whose rows are open."""
        self._frozen = np.zeros(0, np.int32)
        self._known: list[KeysAndValues] = []  # of frozen rows, per layer
        self._computed = 0  # steps since the first, or the last refresh
        self._state: CanvasState | None = None  # of the whole canvas, before the step under way
        self._open = np.zeros(0, np.int32)
        self._last: StepResult | None = None  # of the whole canvas

    @property
    def has_first(self) -> bool:
        """Whether the first row of the canvas is computed."""
        return 0 not in self._frozen

    def narrowed(self, row: StepInput) -> StepInput:
        """Return the input of a step without the rows that are frozen."""
        if self._threshold is None:
            return row
        rows = len(row.state.canvas)
        self._state = row.state
        self._open = np.setdiff1d(np.arange(rows, dtype=np.int32), self._frozen)
        if not self._frozen.size:
            return row._replace(is_seen=True)
        own = mx.array(self._open)
        return row._replace(
            state=CanvasState(row.state.canvas[own], row.state.soft_embeddings[own], row.state.history[:, own]),
            noise=Noise(*(array[own] for array in row.noise)),
            offset=row.offset + own,
            pins=None if row.pins is None else row.pins[own],
            frozen=self._known,
            is_seen=True,
        )

    def widened(self, result: StepResult) -> StepResult:
        """Return an evaluated step with what is known of frozen rows: what a draft shows, and the state to go on with.

        Stop test, mean entropy, hidden states and wide rows stay those of the rows that were computed.
        """
        if self._state is None:
            return result
        if self._frozen.size:
            result = result._replace(
                state=self._merged_state(self._state, result.state),
                argmax=self._merged("argmax", result),
                accepted=self._merged("accepted", result),
                confidence=self._merged("confidence", result),
                entropy=self._merged("entropy", result),
            )
        self._last = result
        return result

    def _merged(self, name: str, result: StepResult) -> mx.array:
        """Return a field [C] of the step, with what the last one said of frozen rows."""
        own = np.array(getattr(result, name))
        every = resized(np.array(getattr(self._last, name)), len(self._frozen) + len(own), 0)
        every[self._open] = own
        return mx.array(every)

    def _merged_state(self, whole: CanvasState, own: CanvasState) -> CanvasState:
        """Return the state of the whole canvas with the rows that were computed in place."""
        rows = len(whole.canvas)
        source = np.arange(rows, dtype=np.int32)
        source[self._open] = rows + np.arange(len(self._open))
        taken = mx.array(source)
        return CanvasState(
            mx.concatenate([whole.canvas, own.canvas])[taken],
            mx.concatenate([whole.soft_embeddings, own.soft_embeddings])[taken],
            mx.concatenate([whole.history, own.history], axis=1)[:, taken],
        )

    def choose(self, confidence: np.ndarray, rows: int) -> None:
        """Freeze rows for the step that follows: what is certain, the most certain first, all in full buckets.

        Args:
            confidence: [R] of the step.
            rows: of the canvas from now on: fewer than R, or more, which are open.
        """
        if self._threshold is None:
            return
        self._computed += 1
        seen_rows = np.concatenate([self._frozen, self._open])  # in the order in which every layer has seen them
        certain = np.flatnonzero(confidence[:rows] >= self._threshold)
        most = rows - rows_of(self._C, max(1, rows - certain.size))
        if self._refresh_steps is not None and self._computed >= self._refresh_steps:
            most, self._computed = 0, 0
        by_confidence = certain[np.argsort(-confidence[certain], kind="stable")]
        self._frozen = np.sort(by_confidence[: max(0, most)]).astype(np.int32)
        self._known = self._taken(np.argsort(seen_rows)[self._frozen]) if self._frozen.size else []

    def _taken(self, places: np.ndarray) -> list[KeysAndValues]:
        """Return the keys and values of rows, by their places among those that every layer has seen."""
        assert self._last is not None and self._last.seen is not None
        taken = mx.array(places.astype(np.int32))
        return [KeysAndValues(*(mx.take(array, taken, axis=2) for array in layer)) for layer in self._last.seen]


def resized(numbers: np.ndarray, rows: int, fill: int) -> np.ndarray:
    """Return numbers [R] of an earlier step for `rows` rows: cut, or with `fill` behind them."""
    return np.concatenate([numbers[:rows], np.full(max(0, rows - len(numbers)), fill, numbers.dtype)])
