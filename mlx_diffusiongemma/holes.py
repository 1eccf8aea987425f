"""A text with holes -> where its tokens stand: in the prompt, pinned on the canvas, or free.

    answer     |A A A A A|B B B B . . . B B B B E|B B
    place       prompt     first canvas           not needed

Canvases begin where they would if the model had written the text itself, at multiples of their length, unless that
leaves the end of the last hole without anything behind it: then they begin later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from .tokenizer import SPELLINGS, Tokenizer

PROBES = ("a", "A", "1")  # what may follow a space
ROOM_SHARE = 4  # behind the last hole a canvas keeps room for one in so many of its positions


@dataclass(frozen=True)
class Hole:
    """Free positions.

    Attributes:
        length: tokens.
        seed: token ids that stand there at first, as many as there are positions; empty for noise. They count where
            every hole before has some too.
    """

    length: int
    seed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Placed:
    """Where the tokens of a text with holes stand.

    Attributes:
        lead: tokens of the text that belong to the prompt.
        spans: (start, stop) of each hole in the answer, which begins behind the prompt.
        stop: tokens of the answer, an end token not among them.
        options: of a request: max_tokens, pins, text_only and seed_canvas.
    """

    lead: int
    spans: tuple[tuple[int, int], ...]
    stop: int
    options: dict[str, Any]


def place_pieces(
    pieces: Sequence[Sequence[int] | Hole], canvas_length: int, end_id: int | None, borders: Sequence[bool]
) -> Placed:
    """Lay tokens and holes out on canvases.

    Args:
        pieces: token ids and at least one hole, in the order of the text.
        canvas_length: C.
        end_id: token to pin behind the text where it fits; None for none.
        borders: of the ids before the first hole: whether the prompt may end in front of each.
    """
    tokens: list[int | None] = []
    first_tokens: list[int | None] = []  # what the canvases begin with
    spans: list[tuple[int, int]] = []
    for piece in pieces:
        if isinstance(piece, Hole):
            spans.append((len(tokens), len(tokens) + piece.length))
            tokens += [None] * piece.length
            first_tokens += piece.seed or [None] * piece.length
        else:
            tokens += piece
            first_tokens += piece
    last = spans[-1][1]
    if end_id is not None:
        tokens.append(end_id)
    wanted = last + min(len(tokens) - last, canvas_length // ROOM_SHARE)
    lead = _lead(spans[0][0], last, wanted, canvas_length)
    while lead < len(borders) and not borders[lead]:
        lead -= 1
    canvases = max(1, -(-(wanted - lead) // canvas_length))
    shown = tokens[lead : lead + canvases * canvas_length]
    begun = list(takewhile(lambda token_id: token_id is not None, first_tokens[lead : lead + len(shown)]))
    in_answer = tuple((start - lead, stop - lead) for start, stop in spans)
    options = {
        "max_tokens": len(shown),
        "pins": [(position, token_id) for position, token_id in enumerate(shown) if token_id is not None],
        "text_only": in_answer,
        "seed_canvas": begun if len(begun) > in_answer[0][0] else None,
    }
    ends = end_id is not None and lead + len(shown) == len(tokens)
    return Placed(lead, in_answer, len(shown) - ends, options)


def _lead(first: int, last: int, wanted: int, canvas_length: int) -> int:
    """Return how many tokens go before the first canvas.

    Args:
        first, last: where the first hole begins and the last one ends.
        wanted: up to where the text should be on the canvases.
        canvas_length: C.
    """
    aligned = first // canvas_length * canvas_length
    canvases = max(1, -(-(wanted - first) // canvas_length))
    share = min(last - first, canvas_length // ROOM_SHARE)  # of the holes that should see what is behind them
    for lead in (aligned, *range(max(0, wanted - canvases * canvas_length), first + 1)):
        begin = (wanted - lead - 1) // canvas_length * canvas_length + lead  # of the last canvas
        if begin <= last - share:
            return lead
    return aligned


def split_spaces(tokenizer: Tokenizer, text: str) -> tuple[str, str]:
    """Cut a text where a hole follows: what its tokens are for sure, and spaces that belong to the first word there.

    A tokenizer that writes " 42" as one token or two has no way to write "42" behind a " " that the model would know.
    """
    for count in range(len(text) - len(text.rstrip(" ")) + 1):
        kept = text[: len(text) - count]
        ids = tokenizer.encode_letters(kept)
        if all(tokenizer.encode_letters(text + probe)[: len(ids)] == ids for probe in PROBES):
            return kept, text[len(kept) :]
    return text, ""


def split_control(tokenizer: Tokenizer, text: str) -> tuple[str, str]:
    """Cut a text behind the last control token that is spelled in it."""
    stop = max((text.rfind(spelling) + len(spelling) for spelling in SPELLINGS.values() if spelling in text), default=0)
    return text[:stop], text[stop:]


def clean_borders(tokenizer: Tokenizer, text: str, token_ids: Sequence[int]) -> list[bool]:
    """Tell for each of a text's tokens whether what is before it is a text too: whole characters, and the same ones."""
    borders: list[bool] = []
    before = ""
    detokenizer = tokenizer.detokenizer()
    for token_id in token_ids:
        borders.append(not detokenizer.has_pending and text.startswith(before))
        detokenizer.add_token(token_id)
        before = detokenizer.text
    return borders
