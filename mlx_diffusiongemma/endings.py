"""A short way to the end of a grammar, for the place where the room for an answer runs out.

The automaton tells what may come next, not how far the end is, so the end is searched for: closing brackets and quotes
first, then values of one token, then whatever moves on furthest. The first try follows the best guess all the way; the
tries after it deviate once, then twice (limited discrepancy search), within a fixed number of states.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import count
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from .automaton import Vocabulary

MAX_STATES = 400  # looked at in one search
MAX_LENGTH = 2048  # tokens of an ending
CLOSERS = b'"}]'
LITERALS = (b"0", b"1", b"{}", b"[]", b'""', b"null", b"true", b"false", b"{", b"[", b"a", b" ")


class Position(Protocol):
    """What the search needs of a state."""

    @property
    def accepts(self) -> bool: ...
    def copy(self) -> Self: ...
    def take(self, token_ids: Sequence[int]) -> int: ...
    def forced(self) -> list[int]: ...
    def allowed(self) -> npt.NDArray[np.bool_]: ...


class Endings:
    """Searches for endings over a vocabulary. `markers` are control tokens that close something."""

    def __init__(self, vocabulary: Vocabulary, markers: Sequence[int]) -> None:
        spellings = vocabulary.spellings
        closing = [i for i, spelling in enumerate(spellings) if spelling and not spelling.strip(CLOSERS)]
        by_spelling = {spelling: i for i, spelling in reversed(list(enumerate(spellings)))}
        self._closers = np.array([*markers, *sorted(closing, key=lambda i: -len(spellings[i]))], dtype=np.int64)
        self._literals = np.array([by_spelling[text] for text in LITERALS if text in by_spelling], dtype=np.int64)
        self._lengths = vocabulary.lengths

    def shortest(self, position: Position, limit: int = MAX_LENGTH, states: int = MAX_STATES) -> list[int] | None:
        """Return a short list of tokens, at most `limit`, behind which the grammar accepts; None if none was found."""
        order = count()
        queue: list[tuple[int, int, int, Position, list[int]]] = [(0, 0, next(order), position.copy(), [])]
        while queue and states:
            states -= 1
            deviations, _, _, at, path = heapq.heappop(queue)
            forced = at.forced()
            if forced and len(path) + len(forced) <= limit:
                at.take(forced)
                path = path + forced
            elif forced:
                continue
            if at.accepts:
                return path
            if len(path) == limit:
                continue
            for rank, token_id in enumerate(self._candidates(at.allowed())):
                following = at.copy()
                if following.take([token_id]):
                    key = (deviations + rank, -len(path), next(order))
                    heapq.heappush(queue, (*key, following, [*path, token_id]))
        return None

    def _candidates(self, allowed: npt.NDArray[np.bool_]) -> list[int]:
        closers = self._closers[allowed[self._closers]][:3]
        literals = self._literals[allowed[self._literals]][:2]
        rest = np.flatnonzero(allowed)
        if len(rest) > 4:
            rest = rest[np.argsort(-self._lengths[rest], kind="stable")[:2]]
        guesses = [closers, literals, rest] if len(closers) else [rest[:1], literals, rest[1:]]
        return list(dict.fromkeys(int(token_id) for part in guesses for token_id in part))
