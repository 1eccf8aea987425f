"""What a policy does to a canvas between two denoising steps: end it early, cut it shorter, keep what is certain.

    draft   The answer is 42 . <end> <end> <end> <end> ...        rows behind the end token need no further step
            └──────── head ─────────┘└──── dropped ────┘
            .99 .98  .99  .97  ...                                 all of the head is certain: done, without waiting

Only numbers that the host reads anyway are looked at: [C] of the draft, its probabilities and what was accepted.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .compaction import OpenRows, resized
from .denoise import CanvasState, StepInput, StepOutcome, StepResult, pin_state, plain_outcome
from .model import DiffusionGemma
from .policies import Policy, rows_of
from .sampler import empty_history

PLATEAU_ENTROPY = 0.05  # nats, mean over the head


class Pacer:
    """Applies the policy of one request, canvas after canvas."""

    def __init__(self, model: DiffusionGemma, policy: Policy, end_ids: frozenset[int]) -> None:
        """Bind the policy and the tokens that end an answer."""
        self.policy = policy
        self._model = model
        self._C = model.config.canvas_length
        self._open_rows = OpenRows(policy, self._C)
        self._end_ids = np.array(sorted(end_ids), np.int64)
        self._rows = rows_of(self._C, int(policy.first_share * self._C))  # of the next canvas
        self._argmax: np.ndarray | None = None  # of the step before
        self._accepted: np.ndarray | None = None
        self._unchanged = 0  # steps for which the accepted positions have been the same
        self._kept: np.ndarray | None = None  # [rows] the tokens kept for good, -1 elsewhere

    def start_canvas(self, room: int) -> int:
        """Begin a canvas for an answer that may get `room` more tokens; return its number of rows."""
        rows, self._rows = self._rows, rows_of(self._C, int(self.policy.next_share * self._C))
        self._argmax = self._accepted = self._kept = None
        self._unchanged = 0
        self._open_rows.start()
        return min(rows, rows_of(self._C, room))

    @property
    def computes_first(self) -> bool:
        """Whether the next step computes the first row of the canvas."""
        return self._open_rows.has_first

    def narrowed(self, row: StepInput) -> StepInput:
        """Return the input of a step with the rows that are to be computed."""
        return self._open_rows.narrowed(row)

    def pins(self, rows: int) -> mx.array | None:
        """Return the tokens kept for good, as pins of the next step, which has so many rows."""
        return None if self._kept is None else mx.array(resized(self._kept, rows, -1))

    def absorb(self, result: StepResult, noise_ids: mx.array, room: int) -> StepOutcome:
        """Look at an evaluated step; return the state to go on with, or that the canvas is done.

        Args:
            result: of the step.
            noise_ids: [C] int32, its noise for a whole canvas.
            room: tokens that the answer may still get.
        """
        result = self._open_rows.widened(result)
        argmax, accepted = np.array(result.argmax), np.array(result.accepted)
        confidence, entropy = np.array(result.confidence), np.array(result.entropy)
        ends = np.flatnonzero(np.isin(argmax, self._end_ids))
        head = min(room, int(ends[0]) + 1 if ends.size else len(argmax))
        is_short = not ends.size and len(argmax) < min(self._C, room)  # the answer does not end here: look further
        finished = not is_short and (
            bool(result.finished.item())
            or self._is_confident(confidence[:head])
            or self._keep(argmax, confidence, head)
            or self._is_on_plateau(accepted, entropy[:head])
        )
        committed = len(argmax)
        if not (finished or is_short) and (settled := self._settled_beginning(argmax, confidence, head)):
            finished, committed = True, settled
        state = result.state
        if not finished:
            state = self._next_state(state, argmax, confidence, head if ends.size else None)
        self._argmax, self._accepted = argmax, accepted
        if is_short:
            state = self._grown(state, noise_ids)
        if not finished:
            self._open_rows.choose(confidence, len(state.canvas))
        return plain_outcome(result)._replace(state=state, finished=finished, committed=committed)

    def _is_confident(self, head: np.ndarray) -> bool:
        threshold = self.policy.row_confidence
        return threshold is not None and bool((head >= threshold).all())

    def _keep(self, argmax: np.ndarray, confidence: np.ndarray, head: int) -> bool:
        """Keep what is certain, one token more at least; tell whether all of the head is kept."""
        threshold = self.policy.keep_confidence
        if threshold is None:
            return False
        kept = resized(np.zeros(0, np.int32) if self._kept is None else self._kept, len(argmax), -1)
        free = kept < 0
        chosen = free & (confidence >= threshold)
        if not chosen.any() and free.any():
            chosen[np.flatnonzero(free)[confidence[free].argmax()]] = True
        self._kept = np.where(chosen, argmax, kept).astype(np.int32)
        return bool((self._kept[:head] >= 0).all())

    def _is_on_plateau(self, accepted: np.ndarray, head: np.ndarray) -> bool:
        steps = self.policy.plateau_steps
        if steps is None:
            return False
        same = self._accepted is not None and np.array_equal(accepted, resized(self._accepted, len(accepted), False))
        self._unchanged = self._unchanged + 1 if same else 0
        return self._unchanged >= steps and float(head.mean()) < PLATEAU_ENTROPY

    def _settled_beginning(self, argmax: np.ndarray, confidence: np.ndarray, head: int) -> int:
        """Return how many rows at the start are settled and worth to be committed by themselves, 0 for none."""
        threshold = self.policy.exit_confidence
        if threshold is None or self._argmax is None:
            return 0
        certain = (confidence >= threshold) & (argmax == resized(self._argmax, len(argmax), -1))
        open_rows = np.flatnonzero(~certain[:head])
        length = int(open_rows[0]) if open_rows.size else head
        return length if length >= rows_of(self._C, 1) else 0

    def _next_state(
        self, state: CanvasState, argmax: np.ndarray, confidence: np.ndarray, head: int | None
    ) -> CanvasState:
        """Return the state with kept tokens in place, and without rows behind a settled end token (`head` rows)."""
        if self._kept is not None:
            state = pin_state(self._model, state, mx.array(self._kept))
        threshold = self.policy.end_confidence
        if head is None or threshold is None or confidence[head - 1] < threshold:
            return state
        rows = rows_of(self._C, head)
        if rows >= len(argmax):
            return state
        return CanvasState(state.canvas[:rows], state.soft_embeddings[:rows], state.history[:, :rows])

    def _grown(self, state: CanvasState, noise_ids: mx.array) -> CanvasState:
        """Return the state with rows of noise behind it: as many as the policy adds."""
        rows = len(state.canvas)
        more = min(self._C - rows, rows_of(self._C, int(self.policy.growth * self._C)))
        no_signal = mx.zeros((more, state.soft_embeddings.shape[1]), state.soft_embeddings.dtype)
        return CanvasState(
            mx.concatenate([state.canvas, noise_ids[rows : rows + more]]),
            mx.concatenate([state.soft_embeddings, no_signal]),
            mx.concatenate([state.history, empty_history(len(state.history), more)], axis=1),
        )
