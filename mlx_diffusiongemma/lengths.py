"""Lengths of a hole, in tokens: those that are tried where none is given, and what a given one means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .config import check_integer

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)  # tokens of a hole that are tried at first
LONGER = 4, 3  # beyond them each length that is tried is four thirds of the one before
MAX_LENGTHS = 64  # that one call may be given

Lengths = int | Sequence[int] | None


@dataclass(frozen=True)
class Tries:
    """Lengths to try, in ascending order; whether those between the best one and its neighbours are tried too."""

    lengths: tuple[int, ...]
    refined: bool = False

    def with_length(self, length: int) -> Tries:
        """Return these and one more."""
        return replace(self, lengths=tuple(sorted({*self.lengths, length})))


def lengths_to_try(length: Lengths, max_tokens: int | None = None) -> Tries:
    """Return what a given length means. Raise `ValueError` for one that no hole can have."""
    if max_tokens is not None:
        check_integer("max_tokens", max_tokens, 1)
    if length is None:
        longest = LENGTHS[-1] if max_tokens is None else max_tokens
        lengths = list(LENGTHS)
        while lengths[-1] < longest:
            lengths.append(lengths[-1] * LONGER[0] // LONGER[1])
        return Tries(tuple(sorted({min(each, longest) for each in lengths})), refined=True)
    given = [length] if isinstance(length, int) else length
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or not 0 < len(given) <= MAX_LENGTHS:
        raise ValueError(f"length: got {length!r}, expected a number of tokens, or a list of 1 to {MAX_LENGTHS}")
    for each in given:
        check_integer("length", each, 1)
        if max_tokens is not None and each > max_tokens:
            raise ValueError(f"length: got {each}, expected at most max_tokens, {max_tokens}")
    return Tries(tuple(sorted(set(given))))


def between(lengths: Sequence[int], best: int) -> list[int]:
    """Return the lengths that lie between one of them and its neighbours."""
    below = max((each for each in lengths if each < best), default=best)
    above = min((each for each in lengths if each > best), default=best)
    return [each for each in range(below + 1, above) if each != best]
