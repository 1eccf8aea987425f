"""Answers under a grammar without a model: every canvas proposes noise, or a given text with noise in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlx_diffusiongemma.constraint import Constraint, Walk
from mlx_diffusiongemma.grammar import Grammar
from mlx_diffusiongemma.tokenizer import Tokenizer

C = 24  # canvas length


class Written(NamedTuple):
    """What came out: the ids without an end token, and whether it is complete."""

    token_ids: list[int]
    complete: bool


def end_ids(tokenizer: Tokenizer) -> set[int]:
    special = tokenizer.special
    return {i for i in (special.eos, special.turn_close, special.tool_response_open) if i is not None}


def constrain(grammar: Grammar, tokenizer: Tokenizer, thinking: bool = False, **options) -> Constraint:
    return Constraint(grammar, tokenizer, end_ids(tokenizer), thinking=thinking, **options)


def best_of(logits: np.ndarray):
    """Return the function that a walk asks, over logits [C, V]."""
    return lambda position, allowed: int(np.where(allowed, logits[position, : len(allowed)], -np.inf).argmax())


def write(
    constraint: Constraint,
    seed: int,
    max_tokens: int = 100,
    steps: int = 2,
    repairs: int = 10**6,
    text_ids: Sequence[int] = (),
    noise: float = 1.0,
) -> Written:
    """Denoise canvas after canvas as the loop does; each position is noise with the probability `noise`."""
    rng = np.random.default_rng(seed)
    written: list[int] = []
    size = constraint._rules.words.size
    while True:
        room = max_tokens - len(written)
        for step in range(steps):
            meant = [*text_ids[len(written) : len(written) + C]]
            meant += rng.integers(0, size, C - len(meant)).tolist()
            drawn = rng.integers(0, size, C).tolist()
            proposal = [b if rng.random() < noise else a for a, b in zip(meant, drawn, strict=True)]
            logits = rng.random((C, size))
            last = step == steps - 1
            walk = constraint.walk(proposal, best_of(logits), repairs=10**6 if last else repairs, room=room)
            check_walk(walk, proposal, room, constraint)
        constraint.commit(walk.token_ids)
        written += walk.token_ids
        if walk.ended or constraint.is_complete or len(written) >= max_tokens or not walk.token_ids:
            return Written(written, constraint.can_end)


def check_walk(walk: Walk, proposal: Sequence[int], room: int, constraint: Constraint) -> None:
    """What holds for every walk."""
    assert len(walk.token_ids) <= min(len(proposal), room)
    final = [*walk.token_ids] + ([] if walk.end_id is None else [walk.end_id])
    assert len(final) <= len(proposal)
    assert walk.pins == {i: t for i, t in enumerate(final) if proposal[i] != t}
    assert walk.ended or walk.end_id is None
    assert not (walk.ended and walk.end_id is None) or len(walk.token_ids) == room
