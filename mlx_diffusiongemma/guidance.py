"""What a constraint does to a canvas between two denoising steps.

    the step's argmax ──▶ walk (`constraint.py`) ──▶ path, valid from the left
                                                       │
      tokens that differ from the argmax are put into the canvas and, as exact embeddings, into the
      self-conditioning; what lies behind a path that was cut short is noise again

A step repairs one token more than the step before: what lies behind a repair was proposed for another text, and is only
looked at again after the network has seen the repair.

The network, the step and its randomness are those of a free canvas. A canvas is done when the path covers it (up to an
end token, or all of it), has not changed for `stability_threshold` steps, and the canvas is confident; or out of steps,
and then the path is committed, however short.
"""

from __future__ import annotations

from collections import deque

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .constraint import Constraint, Walk
from .denoise import CanvasState, StepOutcome, StepResult, pin_state
from .divided import DividedEmbedding, own_logits
from .model import DiffusionGemma


class Guide:
    """Applies the constraint of one request, canvas after canvas."""

    def __init__(
        self, model: DiffusionGemma, constraint: Constraint, stability_threshold: int, confidence_threshold: float
    ) -> None:
        """Bind what one request is held to; the thresholds are those of its stop test."""
        self.constraint = constraint
        self._model = model
        self._confidence_threshold = confidence_threshold
        self._earlier: deque[tuple[int, ...]] = deque(maxlen=stability_threshold)
        self._walk: Walk | None = None
        self._forced = 0  # tokens at the start of this canvas

    def start_canvas(self) -> tuple[int, ...]:
        """Begin a canvas; return the tokens that it is sure to begin with."""
        self._earlier.clear()
        self._walk = None
        forced = self.constraint.forced()
        self._forced = len(forced)
        return forced

    def absorb(self, result: StepResult, noise_ids: mx.array, room: int) -> StepOutcome:
        """Repair the argmax of an evaluated step.

        Args:
            result: of the step.
            noise_ids: [C] int32, its noise.
            room: tokens that the answer may still get.

        Raises:
            ValueError: the automaton grew over its limits.
        """
        proposal = np.array(result.argmax)
        repairs = 1 + (0 if self._walk is None else self._walk.repairs)
        walk = self.constraint.walk(
            proposal.tolist(), lambda *where: self._best(result.hidden, *where), repairs=repairs, room=room
        )
        self._walk = walk
        pins = np.full(proposal.shape, -1, np.int32)
        for position, token_id in walk.pins.items():
            pins[position] = token_id
        covers = walk.ended or len(walk.token_ids) >= min(room, len(proposal))
        is_open = np.arange(len(proposal)) >= (len(proposal) if covers else len(walk.token_ids))
        path = self._committed()
        is_stable = len(self._earlier) == self._earlier.maxlen and all(path == earlier for earlier in self._earlier)
        self._earlier.append(path)
        entropies = np.where(pins >= 0, 0, np.array(result.entropy))
        pinned = (pins >= 0) | (np.arange(len(proposal)) < self._forced)
        return StepOutcome(
            self._next_state(result.state, pins, is_open, noise_ids),
            tuple(np.where(pins >= 0, pins, proposal).tolist()),
            tuple(((np.array(result.accepted) | (pins >= 0)) & ~is_open).tolist()),
            tuple(entropies.tolist()),
            finished=covers and is_stable and float(entropies.mean()) < self._confidence_threshold,
            pinned=tuple(pinned.tolist()) if pinned.any() else (),
        )

    def commit(self) -> tuple[int, ...]:
        """End the canvas; return what it adds to the answer, and the end token behind that if there is one."""
        assert self._walk is not None  # a canvas has a step at least
        self.constraint.commit(self._walk.token_ids)
        return self._committed()

    @property
    def missing(self) -> str | None:
        """Why the committed answer does not satisfy the constraint; None if it does."""
        if self.constraint.can_end:
            return None
        return "the answer ended before it satisfied its constraint: max_tokens or the context left no room"

    def _committed(self) -> tuple[int, ...]:
        assert self._walk is not None
        return self._walk.token_ids + (() if self._walk.end_id is None else (self._walk.end_id,))

    def _best(self, hidden: mx.array, position: int, allowed: np.ndarray) -> int:
        """Return the most likely of the allowed ids [V] at a position of hidden [C, D]."""
        softcap = self._model.config.text.final_logit_softcapping
        table: nn.Module = self._model.model.decoder.embed_tokens
        logits = own_logits(hidden[position : position + 1], table, softcap, mx.array(1.0))
        known = np.zeros(self._model.config.text.vocab_size, np.bool_)  # more tokens than the tokenizer has
        known[: len(allowed)] = allowed
        if isinstance(table, DividedEmbedding):
            own = mx.array(known[table.share.start : table.share.stop])
            return int(np.array(table.best(mx.where(own, logits, -mx.inf))[1])[0])
        return int(np.array(mx.argmax(mx.where(mx.array(known), logits[0], -mx.inf))))

    def _next_state(
        self, state: CanvasState, pins: np.ndarray, is_open: np.ndarray, noise_ids: mx.array
    ) -> CanvasState:
        """Return the state with pins [C] placed, and noise without a signal where it is open [C]."""
        if (pins >= 0).any():
            state = pin_state(self._model, state, mx.array(pins))
        if is_open.any():
            where = mx.array(is_open)
            state = state._replace(
                canvas=mx.where(where, noise_ids, state.canvas),
                soft_embeddings=mx.where(where[:, None], 0, state.soft_embeddings),
            )
        return state
