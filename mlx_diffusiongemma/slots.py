"""Which positions of which canvases tell how likely each of several answers is, and what they add up to.

The answers, as token ids, form a tree. Where it branches, the tokens that follow are compared in one slot: a canvas
with everything before the slot pinned and everything behind it free.

    The capital of France is ┬─ Paris              slot 0 behind "is":   Paris | Rome | New
                             ├─ Rome               slot 1 behind "New":  York | Delhi
                             └─ New ┬─ York
                                    └─ Delhi       P(New York) = P(New | slot 0) P(York | slot 1)

All slots are read in the same forward, as rows of one batch; labels that differ in their first token need one.
Nothing here computes with MLX.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Slot:
    """One position to read: behind the pinned tokens, how likely is each of the candidates?"""

    pinned: tuple[int, ...]
    candidates: tuple[int, ...]

    @property
    def position(self) -> int:
        """Where the slot is in the answer."""
        return len(self.pinned)

    @property
    def options(self) -> dict[str, Any]:
        """Options of the request that reads it: its answer ends with the slot, whatever the model would put there."""
        return {
            "max_tokens": self.position + 1,
            "pins": tuple(enumerate(self.pinned)),
            "logprobs": 0,
            "logprob_candidates": self.candidates,
            "ignore_eos": True,
            "guard_empty": False,
        }


def make_slots(answers: Sequence[Sequence[int]]) -> tuple[Slot, ...]:
    """Return the slots that tell answers apart, one where their tree branches.

    Args:
        answers: two at least, as token ids; none is another one's beginning, which an end token at each end prevents.

    Raises:
        ValueError: two of them are the same, or one begins with another.
    """
    following: dict[tuple[int, ...], dict[int, None]] = {}  # in order of first appearance
    for answer in answers:
        for position, token_id in enumerate(answer):
            following.setdefault(tuple(answer[:position]), {})[token_id] = None
    for index, answer in enumerate(answers):
        if tuple(answer) in following or tuple(answer) in (tuple(other) for other in answers[:index]):
            raise ValueError(
                f"answers: got {list(answer)!r} twice or at the beginning of another, expected other tokens"
            )
    return tuple(Slot(pinned, tuple(tokens)) for pinned, tokens in following.items() if len(tokens) > 1)


def answer_logprobs(
    answers: Sequence[Sequence[int]], slots: Sequence[Slot], readings: Sequence[Sequence[float]]
) -> list[float]:
    """Return the log-probability of every answer among them all: they sum to 1.

    Args:
        answers, slots: see `make_slots`.
        readings: of each slot, the log-probabilities of its candidates.
    """
    of_branch: dict[tuple[int, ...], float] = {}
    for slot, reading in zip(slots, readings, strict=True):
        total = log_sum(reading)
        for token_id, logprob in zip(slot.candidates, reading, strict=True):
            of_branch[(*slot.pinned, token_id)] = logprob - total
    return [
        math.fsum(of_branch.get(tuple(answer[:length]), 0.0) for length in range(1, len(answer) + 1))
        for answer in answers
    ]


def log_sum(logprobs: Sequence[float]) -> float:
    """Return the logarithm of the sum of probabilities given as logarithms."""
    highest = max(logprobs)
    return highest + math.log(math.fsum(math.exp(each - highest) for each in logprobs))
