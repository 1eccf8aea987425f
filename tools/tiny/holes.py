"""The families of the `tiny` training data whose canvas begins with more than noise.

A hole: the text on both sides of it is known and stays as it is. A warm start: the canvas begins with the text that is
to be edited.
"""

import re
from dataclasses import dataclass
from random import Random

import controls
import families
from words import CITIES, ITEMS, JOBS, NAMES

BARE_SHARE = 0.25  # of the holes begin after the space and not with it
OPEN_SHARE = 0.5  # of the canvases are not told where the text ends
LONGEST_HOLE = 4  # words or signs

# Their answers fit in one canvas.
ASKED = [families.small_sums, families.worked_sums, families.capitals, families.sort_words, families.reverse_words,
         families.spelling, families.json_records, families.dates, controls.json_schemas, controls.edits]  # fmt: skip
PIECE = re.compile(r" ?\w+| ?[^\w\s]+|\s+")
REQUESTS = ["Fill in the gap.", "Fill in.", "Complete the text.", "What is missing?"]


@dataclass(frozen=True)
class Start:
    """A text, and what of it the canvas begins with.

    Without a prompt the canvas stands right after `lead`, as in a raw completion.
    """

    prompt: str | None
    answer: str
    lead: str = ""  # text before the canvas, only without a prompt
    hole: tuple[int, int] | None = None  # where in the answer; all else is known
    is_open: bool = False  # where the text ends is not known
    draft: str | None = None  # the text to begin with


def _around(rng: Random, before: str, piece: str, after: str) -> tuple[str, tuple[int, int]]:
    """Join a text. Returns it and where its hole is, which takes in the space before the piece more often than not."""
    start = len(before)
    if before.endswith(" ") and rng.random() >= BARE_SHARE:
        start -= 1
    return before + piece + after, (start, len(before) + len(piece))


def holes_in_answers(rng: Random) -> Start:
    """A question and its answer with a hole of one to four words or signs."""
    prompt, answer = rng.choice(ASKED)(rng)
    pieces = list(PIECE.finditer(answer))
    first = rng.randrange(len(pieces))
    last = min(first + rng.randint(1, LONGEST_HOLE), len(pieces)) - 1
    return Start(prompt, answer, hole=(pieces[first].start(), pieces[last].end()), is_open=rng.random() < OPEN_SHARE)


def _twice(rng: Random) -> tuple[str, str, str]:
    """Draw a text that says something twice, or what follows from a trade, with a gap at one of these."""
    name, city, item, job = rng.choice(NAMES), rng.choice(CITIES), rng.choice(ITEMS), rng.choice(list(JOBS))
    number = str(rng.randint(2, 99))
    pieces, places = rng.choice(
        [
            (["My name is ", name, ". Nice to meet you, ", name, "!"], (1, 3)),
            (["", name, " lives in ", city, ". The weather in ", city, " is sunny."], (3, 5)),
            (
                ["", name, " bought ", number, " ", item, ". Now ", name, " has ", number, " ", item, "."],
                (1, 3, 5, 7, 9),
            ),
            (["", name, f" is a {job} and makes ", JOBS[job], "."], (3,)),
        ]
    )
    place = rng.choice(places)
    return "".join(pieces[:place]), pieces[place], "".join(pieces[place + 1 :])


def _text(rng: Random) -> tuple[str, str, str]:
    return (_twice if rng.random() < 0.4 else controls.with_gap)(rng)


def holes_in_texts(rng: Random) -> Start:
    """A text with a hole that follows from what is on both sides; the prompt says no more than that."""
    answer, hole = _around(rng, *_text(rng))
    return Start(rng.choice(REQUESTS), answer, hole=hole, is_open=rng.random() < OPEN_SHARE)


def holes_in_completions(rng: Random) -> Start:
    """The same without a conversation: what is before the hole is the prompt, or is on the canvas too."""
    answer, (start, end) = _around(rng, *_text(rng))
    is_open = rng.random() < OPEN_SHARE
    if rng.random() < 0.3:
        return Start(None, answer, hole=(start, end), is_open=is_open)
    return Start(None, answer[start:], lead=answer[:start], hole=(0, end - start), is_open=is_open)


def warm_edits(rng: Random) -> Start:
    """An edit whose canvas begins with the old sentence."""
    prompt, sentence, changed = controls.edit(rng)
    return Start(prompt, changed, draft=sentence)
