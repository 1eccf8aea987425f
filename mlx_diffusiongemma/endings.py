"""A short way to the end of a grammar, for the place where the room for an answer runs out.

The automaton tells what may come next, not how far the end is, so the end is searched for: closing brackets and quotes
first, then separators and values of one token, then what moves on furthest. The first try follows the best guess all
the way; the tries after it deviate once, then twice (limited discrepancy search), within a number of states.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import Protocol, Self

from .automaton import Mask, Vocabulary

MAX_STATES = 200  # looked at in one search
QUICK_STATES = 40  # and in one that is made in every step
FEW_STATES = 16  # and in one that starts from every new kind of state
MAX_CHARACTERS = 12  # of a search by characters
MAX_WIDTH = 12  # states that it follows at one time
MAX_VISITS = 3  # of states that look alike
MAX_LENGTH = 2048  # tokens of an ending
SLACK = 8  # tokens that an ending may lose when it is cut as the tokenizer would cut it
CHUNK = 4096  # tokens looked through at one time, longest first


class Position(Protocol):
    """What the search needs of a state."""

    @property
    def accepts(self) -> bool:
        """Whether the answer is complete here."""

    def copy(self) -> Self:
        """Return a second one, to be changed on its own."""

    def take(self, token_ids: Sequence[int]) -> int:
        """Go on over the tokens while they are allowed; return how many were."""

    def forced(self) -> list[int]:
        """Return the tokens that must come next."""

    def allowed(self) -> Mask:
        """Return which tokens may come next [V]."""


def quick_ending(vocabulary: Vocabulary, position: Position) -> list[int] | None:
    """Return what `short_ending` does where that is easy to find; None elsewhere."""
    return _guess(vocabulary, position, MAX_LENGTH, QUICK_STATES)


def short_ending(vocabulary: Vocabulary, position: Position, limit: int = MAX_LENGTH) -> list[int] | None:
    """Return few tokens, at most `limit`, behind which the grammar accepts; None if the search found none."""
    return _guess(vocabulary, position, limit, MAX_STATES)


def explored_ending(vocabulary: Vocabulary, position: Position) -> list[int] | None:
    """Search for an ending by characters, breadth first: slower, for patterns that no good guess fits.

    States that allow the same count as the same after some visits; from each new kind of state a short guess is made.
    """
    visits: Counter[tuple[bytes, bool]] = Counter()
    level: list[tuple[Position, list[int]]] = [(position.copy(), [])]
    for _ in range(MAX_CHARACTERS):
        following: list[tuple[Position, list[int]]] = []
        for at, path in level:
            allowed = at.allowed()
            characters = vocabulary.characters[allowed[vocabulary.characters]].tolist()
            for token_id in characters or _guesses(vocabulary, at, {}):  # none of ASCII in the middle of a character
                after = at.copy()
                if not after.take([token_id]):
                    continue
                kind = (after.allowed().tobytes(), token_id in vocabulary.digits)
                visits[kind] += 1
                if visits[kind] == 1 and (rest := _guess(vocabulary, after, MAX_LENGTH, FEW_STATES)) is not None:
                    return _recut(vocabulary, position, [*path, token_id, *rest])
                if visits[kind] <= MAX_VISITS:
                    following.append((after, [*path, token_id]))
        level = following[:MAX_WIDTH]
    return None


def _guess(vocabulary: Vocabulary, position: Position, limit: int, states: int) -> list[int] | None:
    order, closes = count(), dict[int, bool]()
    queue: list[tuple[int, int, int, Position, list[int]]] = [(0, 0, next(order), position.copy(), [])]
    for _ in range(states):
        if not queue:
            return None
        deviations, _, _, at, path = heapq.heappop(queue)
        forced = at.forced()
        if len(path) + len(forced) > limit + SLACK:
            continue
        if at.take(forced) < len(forced):
            continue
        path = path + forced
        if at.accepts:
            path = _recut(vocabulary, position, path)
            if len(path) <= limit:
                return path
            continue
        if len(path) >= limit + SLACK:
            continue
        for rank, token_id in enumerate(_guesses(vocabulary, at, closes)):
            following = at.copy()
            if following.take([token_id]):
                heapq.heappush(queue, (deviations + rank, -len(path), next(order), following, [*path, token_id]))
    return None


def _guesses(vocabulary: Vocabulary, position: Position, closes: dict[int, bool]) -> list[int]:
    """Return a few allowed tokens, the one that most likely leads to the end first.

    `closes` remembers of each quote whether it left the first text where it was allowed.
    """
    allowed = position.allowed()
    brackets, quotes, separators, literals = (
        ids[allowed[ids]].tolist()
        for ids in (vocabulary.brackets, vocabulary.quotes, vocabulary.separators, vocabulary.literals)
    )
    if vocabulary.letter is not None and allowed[vocabulary.letter]:  # in a text, where brackets close nothing
        longest = _longest(vocabulary, allowed)
        for token_id in quotes[:2]:
            if token_id not in closes:
                closes[token_id] = _leaves_text(vocabulary, position, token_id)
        closing = [token_id for token_id in quotes[:2] if closes[token_id]]
        guesses = [closing, longest[:1], literals[:2], longest[1:], quotes[:2], brackets[:1], separators[:1]]
    else:
        guesses = [brackets[:2], quotes[:2], separators[:2], literals[:2]]
        if not any(guesses):  # names and values that the grammar spells out; what opens something comes last
            guesses = [_longest(vocabulary, allowed & ~vocabulary.opens), _longest(vocabulary, allowed)]
    return list(dict.fromkeys(token_id for part in guesses for token_id in part))


def _leaves_text(vocabulary: Vocabulary, position: Position, token_id: int) -> bool:
    """Tell whether a quote ends a text; in some texts one is a letter like others."""
    after = position.copy()
    return after.take([token_id]) == 1 and (after.accepts or not after.allowed()[vocabulary.letter])


def _longest(vocabulary: Vocabulary, allowed: Mask) -> list[int]:
    """Return the two allowed tokens with the most bytes."""
    longest: list[int] = []
    for start in range(0, len(vocabulary.by_length), CHUNK):
        chunk = vocabulary.by_length[start : start + CHUNK]
        longest += chunk[allowed[chunk]].tolist()
        if len(longest) > 1:
            break
    return longest[:2]


def _recut(vocabulary: Vocabulary, position: Position, path: list[int]) -> list[int]:
    """Return the same text as the tokenizer would cut it, if that is shorter and leads to an end too."""
    cut = vocabulary.recut(path)
    at = position.copy()
    return cut if len(cut) < len(path) and at.take(cut) == len(cut) and at.accepts else path
