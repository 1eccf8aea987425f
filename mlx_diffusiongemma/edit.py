"""Edit a text: what changes is a hole that begins from the old text, and everything else is pinned.

    result = edit(pipeline, "The capital of Peru is Rome.", messages="What is the capital of Peru?", seed=1)
    result.text == "The capital of Peru is Lima."

Without a selection the model looks once at a canvas that begins with the old text, and what it would write otherwise,
or is not sure of, is selected. Like those of `infill.py`, a plan yields requests and is sent their results.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .config import check_integer
from .events import Result
from .holes import clean_borders
from .infill import Answers, Filler, InfillResult, Reading, run_plan
from .lengths import Lengths, Tries, lengths_to_try
from .prepare import Asked, Messages, Preparer
from .tokenizer import Tokenizer

KEPT = 0.9  # probability from which a token of the old text stays as it is
NEAR_LENGTHS = (-1, 0, 1)  # tried around the lengths of the old text and of what the model would write
NO_NEWLINE = "\\ No newline at end of file\n"  # as diff and patch write it

Selection = tuple[int, int] | Sequence[tuple[int, int]] | None


@dataclass(frozen=True)
class Change:
    """Characters `start` to `stop` of the old text, `old`, became `new`."""

    start: int
    stop: int
    old: str
    new: str


@dataclass(frozen=True)
class EditResult:
    """An edited text.

    Attributes:
        text: all of it.
        changes: what became different; the rest is the old text, character for character.
        diff: the unified diff; empty where nothing changed.
        holes: how each selection was filled, in order.
        seed: of the random numbers.
        canvas_steps: denoising steps, counted per canvas, of everything.
    """

    text: str
    changes: tuple[Change, ...]
    diff: str
    holes: tuple[InfillResult, ...]
    seed: int
    canvas_steps: int


EditPlan = Generator[list[Asked], list[Result], EditResult]


def edit(
    model: Answers,
    text: str,
    instruction: str | None = None,
    *,
    selection: Selection = None,
    messages: Messages | None = None,
    length: Lengths = None,
    max_tokens: int | None = None,
    **options: Any,
) -> EditResult:
    """Change a text as an instruction says.

    Args:
        model: a pipeline (call it from its thread), or an engine.
        text: the old text.
        instruction: what to change.
        selection: (start, stop) in characters of what may change, or several in ascending order; an empty one is a
            place to write something. None lets the model choose.
        messages: a conversation that the text is the answer of, in place of an instruction.
        length: tokens of each selection, as for `infill`; None finds out, nothing at all among them.
        max_tokens: of each selection, where no length is given.
        options: `infill.FILL_OPTIONS`.

    Raises:
        TypeError: an unknown argument.
        ValueError: what cannot be edited, with the value and what was expected.
    """
    plan = edit_plan(
        model.preparer,
        text,
        instruction,
        selection=selection,
        messages=messages,
        length=length,
        max_tokens=max_tokens,
        **options,
    )
    return run_plan(plan, model.generate_each)


def edit_plan(
    preparer: Preparer,
    text: str,
    instruction: str | None = None,
    *,
    selection: Selection = None,
    messages: Messages | None = None,
    length: Lengths = None,
    max_tokens: int | None = None,
    **options: Any,
) -> EditPlan:
    """Return the plan of an edit; the arguments and errors are those of `edit`."""
    if not isinstance(text, str) or not text:
        raise ValueError(f"text: got {text!r}, expected some text")
    if (messages is None) == (instruction is None):
        raise ValueError("instruction: expected an instruction or messages, and not both")
    selections = None if selection is None else check_selection(selection, len(text))
    tries = lengths_to_try(length, max_tokens)
    filler = Filler(preparer, edit_prompt(text, instruction) if instruction is not None else messages, options)
    return _edit(filler, preparer.tokenizer, text, selections, tries)


def edit_prompt(text: str, instruction: str) -> str:
    """Return the message that asks for an edit. Raise `ValueError` for an empty instruction."""
    if not isinstance(instruction, str) or not instruction.strip():
        raise ValueError(f"instruction: got {instruction!r}, expected some text")
    return f"{instruction.rstrip()}\n\n{text}" if instruction.rstrip()[-1] in ".:!?" else f"{instruction}:\n{text}"


def check_selection(selection: Any, length: int) -> list[tuple[int, int]]:
    """Return selections in a text of so many characters. Raise `ValueError` for what is none."""
    error = f"selection: got {selection!r}, expected (start, stop) in characters, or several that do not overlap"
    if isinstance(selection, str | bytes) or not isinstance(selection, Sequence) or not selection:
        raise ValueError(error)
    pairs = [selection] if all(isinstance(each, int) for each in selection) else list(selection)
    before = 0
    for pair in pairs:
        if isinstance(pair, str | bytes) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(error)
        check_integer("selection: start", pair[0], before, length)
        check_integer("selection: stop", pair[1], pair[0], length)
        before = pair[1]
    return [(start, stop) for start, stop in pairs]


def unified_diff(old: str, new: str) -> str:
    """Return the unified diff of two texts, as `patch` reads it."""
    lines = difflib.unified_diff(_lines(old), _lines(new), "old", "new")
    return "".join(line if line.endswith("\n") else f"{line}\n{NO_NEWLINE}" for line in lines)


def _lines(text: str) -> list[str]:
    """Cut a text behind its newlines: other separators, which Python cuts at too, are inside of a line for `patch`."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def _edit(
    filler: Filler, tokenizer: Tokenizer, text: str, selections: list[tuple[int, int]] | None, tries: Tries
) -> EditPlan:
    steps = 0
    wanted = [replace(tries, lengths=(0, *tries.lengths)) if tries.refined else tries] * len(selections or ())
    if selections is None:
        readings = yield from filler.read(text)
        steps = len(readings)
        found = list(find_changes(readings))
        selections = to_characters(tokenizer, text, [(start, stop) for start, stop, _ in found])
        wanted = [_near(stop - start, new) if tries.refined else tries for start, stop, new in found]
    holes: list[InfillResult] = []
    changes: list[Change] = []
    done, rest = "", 0  # the new text so far, and where in the old one it goes on
    for (start, stop), lengths in zip(selections, wanted, strict=True):
        prefix, old = done + text[rest:start], text[start:stop]
        hole = yield from filler.infill(prefix, text[stop:], lengths, old)
        holes.append(hole)
        done, rest = prefix + hole.text, stop
        if hole.text != old:
            changes.append(Change(start, stop, old, hole.text))
    done += text[rest:]
    return EditResult(
        text=done,
        changes=tuple(changes),
        diff=unified_diff(text, done),
        holes=tuple(holes),
        seed=filler.seed,
        canvas_steps=steps + sum(hole.canvas_steps for hole in holes),
    )


def _near(old: int, new: int) -> Tries:
    """Return the lengths to try where so many tokens were, and the model would write so many."""
    return Tries(tuple(sorted({max(0, each + more) for each in (old, new) for more in NEAR_LENGTHS})))


def find_changes(readings: Sequence[Reading]) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, new length), in tokens of the old text, where the model would write something else.

    A token stays where the model writes it too and holds it for likely. Where the model writes more or less than there
    was, what comes after lies elsewhere on its canvas; so the two are aligned first.
    """
    for index, reading in enumerate(readings):
        spans = _compare(reading, is_last=index == len(readings) - 1)
        yield from ((reading.start + start, reading.start + stop, new) for start, stop, new in spans)


def _compare(reading: Reading, *, is_last: bool) -> list[tuple[int, int, int]]:
    """Return the spans of one canvas, those that touch as one."""
    old, new = reading.token_ids, reading.result.token_ids
    unsure = [each.logprob < math.log(KEPT) for each in reading.result.logprobs or ()]
    spans: list[tuple[int, int, int]] = []
    for tag, i, i_stop, j, j_stop in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            here = [(i + k, i + k + 1, 1) for k in range(i_stop - i) if unsure[j + k]]
        elif not is_last and i_stop == len(old) and j_stop == len(new) and tag != "replace" and i != j:
            here = []  # only what was moved out of this canvas or into it
        else:
            here = [(i, i_stop, j_stop - j)]
        for span in here:
            if spans and spans[-1][1] == span[0]:
                start, _, length = spans.pop()
                span = (start, span[1], length + span[2])
            spans.append(span)
    return spans


def to_characters(tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return spans of a text's tokens as spans of its characters. One that cuts a character takes in all of it."""
    token_ids = tokenizer.encode_letters(text)
    borders = [*clean_borders(tokenizer, text, token_ids), True]
    places: list[tuple[int, int]] = []
    for start, stop in spans:
        first = next(place for place in range(start, -1, -1) if borders[place])
        last = next(place for place in range(stop, len(borders)) if borders[place])
        begin, end = len(tokenizer.detokenize(token_ids[:first])), len(tokenizer.detokenize(token_ids[:last]))
        places.append((max(begin, places[-1][1] if places else 0), end))
    return places
