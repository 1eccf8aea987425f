"""Seeded examples for `tiny`: what is asked, how often, and which prompts are held out for the evaluation.

The families are in `families.py`, `controls.py`, `dialogues.py`, `stories.py`, `sights.py` and `holes.py`. A
conversation (messages, declared tools, thinking mode, pictures, and the text on the canvas where that is what is asked
about) belongs to the held-out side when its hash says so, and is never trained on; the same question may be, with
another system text or in other words. Only `small_talk` and `casual_talk` have too few prompts to be split.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import controls
import dialogues
import families
import holes
import sights
import stories
from pictures import Picture
from words import SYSTEM_TEXTS

HELD_OUT_SHARE = 16  # one prompt in 16 is held out
UNSPLIT = frozenset({"small_talk", "casual_talk"})
TEXTS = frozenset({"holes_in_texts", "holes_in_completions"})  # the text on the canvas is part of the prompt


@dataclass(frozen=True)
class Example:
    """One conversation and the only right continuation, written as the model writes it."""

    family: str
    messages: list[dict[str, Any]]
    answer: str
    end_token: str = dialogues.TURN_END
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = False
    pictures: tuple[Picture, ...] = ()
    seconds: tuple[int, ...] = ()  # when the pictures are the frames of a video: their times
    lead: str | None = None  # what is before the answer where there is no conversation
    hole: tuple[int, int] | None = None  # where in the answer; the canvas is given all else
    is_open: bool = False  # with a hole: the canvas is not told where the text ends
    draft: str | None = None  # the text that the canvas begins with

    @property
    def key(self) -> str:
        """Return what the prompt consists of, as text."""
        seen = (self.pictures, self.seconds) if self.pictures else ()
        if self.family in TEXTS:  # wherever its hole is
            return repr((self.messages, (self.lead or "") + self.answer))
        return repr((self.messages, self.tools, self.thinking, *seen))

    @property
    def held_out(self) -> bool:
        """Tell whether the prompt is kept from training."""
        return self.family not in UNSPLIT and zlib.crc32(self.key.encode()) % HELD_OUT_SHARE == 0


Draw = Callable[[Random], tuple[str, str]]

# family: (weight, how to draw it, thinking mode)
QUESTIONS: dict[str, tuple[float, Draw, bool]] = {
    "small_sums": (12, families.small_sums, False),
    "worked_sums": (14, families.worked_sums, False),
    "sums_thinking": (9, families.sums_thinking, True),
    "capitals": (4, families.capitals, False),
    "capitals_thinking": (2, families.capitals_thinking, True),
    "sort_words": (9, families.sort_words, False),
    "reverse_words": (4, families.reverse_words, False),
    "spelling": (8, families.spelling, False),
    "json": (4, families.json_records, False),
    "dates": (6, families.dates, False),
    "lists": (8, families.lists, False),
    "counting_between": (13, families.counting_between, False),
    "stories": (6, stories.story, False),
    "paragraphs": (3, stories.working_day, False),
    "small_talk": (2, families.small_talk, False),
    "counting": (0, families.counting, False),
    "casual_talk": (0, families.casual_talk, False),
    "introductions": (0, families.introductions, False),
    "json_schemas": (0, controls.json_schemas, False),
    "gaps": (0, controls.gaps, False),
    "edits": (0, controls.edits, False),
    "yes_no": (0, controls.yes_no, False),
}
DIALOGUES: dict[str, tuple[float, Callable[[Random], dialogues.Dialogue], bool]] = {
    "tool_calls": (6, dialogues.tool_call, False),
    "tool_calls_thinking": (3, lambda rng: dialogues.tool_call(rng, thinking=True), True),
    "tool_answers": (5, dialogues.tool_answer, False),
    "chats": (5, dialogues.chat, False),
}
WEIGHTS = {name: entry[0] for name, entry in (QUESTIONS | DIALOGUES).items()}
SIGHTS: dict[str, tuple[float, Callable[[Random], sights.Sight]]] = {
    "picture_contents": (3, sights.contents),
    "picture_counts_among": (4, sights.counts_among),
    "picture_digits": (2, sights.digits),
    "picture_positions_among": (3, sights.positions_among),
    "picture_counts": (0, sights.counts),
    "picture_positions": (0, sights.positions),
    "video_moves": (3, sights.moves),
}
SIGHT_WEIGHTS = {name: entry[0] for name, entry in SIGHTS.items()}
STARTS: dict[str, tuple[float, Callable[[Random], holes.Start]]] = {
    "holes_in_answers": (3, holes.holes_in_answers),
    "holes_in_texts": (3, holes.holes_in_texts),
    "holes_in_completions": (3, holes.holes_in_completions),
    "warm_edits": (2, holes.warm_edits),
}
START_WEIGHTS = {name: entry[0] for name, entry in STARTS.items()}
PICTURE_WEIGHTS = {name: weight for name, weight in SIGHT_WEIGHTS.items() if name.startswith("picture")}
VIDEO_WEIGHTS = {name: weight for name, weight in SIGHT_WEIGHTS.items() if name.startswith("video")}
# What is learned last has most of the later rounds; the last one asks what a model of this size can answer.
LATE_PICTURES = {
    "picture_contents": 2.0,
    "picture_counts_among": 4.0,
    "picture_digits": 1.0,
    "picture_positions_among": 3.0,
}
LATER_PICTURES = {
    "picture_contents": 1.5,
    "picture_counts_among": 5.0,
    "picture_digits": 1.5,
    "picture_positions_among": 5.0,
}
LAST_PICTURES = {"picture_contents": 2.0, "picture_counts": 5.0, "picture_digits": 1.0, "picture_positions": 2.0}
# Teaches to count, but where to stop is learned too slowly to be relied on; so is which one of several shapes is meant:
# replaced in the last rounds, not evaluated. Introductions are too few to hold enough of them out.
TRAINED_ONLY = frozenset({"counting_between", "introductions", "picture_counts_among", "picture_positions_among"})
LAST_STARTS = {"holes_in_answers": 1.0, "holes_in_texts": 4.0, "holes_in_completions": 4.0, "warm_edits": 1.0}
# While pictures are new, a few of all texts keep what is learned.
LATE = dict.fromkeys(["json_schemas", "gaps", "edits", "yes_no"], 0.0)  # new in the last round
SIGHT_TEXTS = dict.fromkeys(WEIGHTS, 1.0) | {"counting_between": 0.0, "casual_talk": 0.0, "introductions": 0.0} | LATE
# The last rounds of the training repeat what is learned last: where a list of numbers ends, sums, four words to sort.
# The third one brings what a newcomer types first, the last four what the controls of a canvas are measured with.
TUNING_ROUNDS = tuple(
    dict.fromkeys(WEIGHTS, 2.0) | {"counting_between": 0, "casual_talk": 0, "introductions": 0} | LATE | often
    for often in (
        {
            "counting": 24,
            "lists": 16,
            "worked_sums": 12,
            "small_sums": 6,
            "sums_thinking": 12,
            "sort_words": 8,
            "stories": 4,
        },
        {
            "counting": 10,
            "lists": 26,
            "worked_sums": 8,
            "small_sums": 6,
            "sums_thinking": 8,
            "sort_words": 26,
            "spelling": 5,
            "chats": 4,
        },
        {
            "casual_talk": 8,
            "introductions": 6,
            "chats": 6,
            "counting": 14,
            "lists": 14,
            "worked_sums": 12,
            "small_sums": 6,
            "sums_thinking": 12,
            "sort_words": 12,
            "spelling": 4,
        },
        {
            "counting": 14,
            "lists": 18,
            "worked_sums": 16,
            "small_sums": 5,
            "sums_thinking": 16,
            "sort_words": 18,
            "spelling": 5,
            "chats": 5,
            "casual_talk": 3,
            "introductions": 2,
            "tool_calls_thinking": 3,
        },
        {
            "counting": 14,
            "lists": 14,
            "worked_sums": 12,
            "small_sums": 5,
            "sums_thinking": 12,
            "sort_words": 14,
            "spelling": 5,
            "chats": 5,
            "casual_talk": 3,
            "introductions": 2,
            "tool_calls_thinking": 3,
            "json_schemas": 13,
            "gaps": 10,
            "edits": 10,
            "yes_no": 22,
        },
        {
            "counting": 16,
            "lists": 14,
            "worked_sums": 18,
            "small_sums": 6,
            "sums_thinking": 18,
            "sort_words": 18,
            "spelling": 5,
            "chats": 5,
            "casual_talk": 3,
            "introductions": 2,
            "tool_calls_thinking": 3,
            "json_schemas": 18,
            "gaps": 12,
            "edits": 12,
            "yes_no": 18,
        },
        {
            "counting": 16,
            "lists": 18,
            "worked_sums": 12,
            "small_sums": 8,
            "sums_thinking": 12,
            "sort_words": 16,
            "spelling": 5,
            "chats": 5,
            "casual_talk": 3,
            "introductions": 2,
            "tool_calls_thinking": 3,
            "json_schemas": 16,
            "gaps": 26,
            "edits": 4,
            "yes_no": 26,
        },
        {
            "counting": 16,
            "lists": 18,
            "worked_sums": 16,
            "small_sums": 8,
            "sums_thinking": 16,
            "sort_words": 14,
            "spelling": 7,
            "chats": 8,
            "casual_talk": 3,
            "introductions": 2,
            "tool_calls_thinking": 4,
            "tool_answers": 4,
            "json_schemas": 12,
            "gaps": 14,
            "edits": 10,
            "yes_no": 30,
        },
    )
)
SYSTEM_SHARE = 0.1
TEXT_FIRST_SHARE = 0.2  # of the questions about pictures: the text stands before the picture


def draw(rng: Random, family: str) -> Example:
    """Draw one example of a family, held out or not."""
    more: dict[str, Any] = {}
    if family in QUESTIONS:
        _, question, thinking = QUESTIONS[family]
        prompt, answer = question(rng)
        messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
        tools: list[dict[str, Any]] = []
        end_token = dialogues.TURN_END
    elif family in DIALOGUES:
        _, dialogue, thinking = DIALOGUES[family]
        messages, tools, answer, end_token = dialogue(rng)
    elif family in SIGHTS:
        sight = SIGHTS[family][1](rng)
        messages, tools, answer, end_token = [_ask_about(rng, sight)], [], sight.answer, dialogues.TURN_END
        thinking, more = False, {"pictures": sight.pictures, "seconds": sight.seconds}
    elif family in STARTS:
        start = STARTS[family][1](rng)
        thinking, more = False, {"hole": start.hole, "is_open": start.is_open, "draft": start.draft}
        if start.prompt is None:
            return Example(family, [], start.answer, "<eos>", lead=start.lead, **more)
        messages, tools, answer = [{"role": "user", "content": start.prompt}], [], start.answer
        end_token = dialogues.TURN_END
    else:
        raise ValueError(f"family: got {family!r}, expected one of {sorted(WEIGHTS | SIGHT_WEIGHTS | START_WEIGHTS)}")
    if family not in UNSPLIT and rng.random() < SYSTEM_SHARE:
        messages = [{"role": "system", "content": rng.choice(SYSTEM_TEXTS)}, *messages]
    return Example(family, messages, answer, end_token, tools, thinking, **more)


def _ask_about(rng: Random, sight: sights.Sight) -> dict[str, Any]:
    """Write the user's message about a picture or a video."""
    parts = [{"type": "video" if sight.seconds else "image"}, {"type": "text", "text": sight.question}]
    return {"role": "user", "content": parts[::-1] if rng.random() < TEXT_FIRST_SHARE else parts}


def training_batch(seed: int, step: int, size: int, mixture: dict[str, float] = WEIGHTS) -> list[Example]:
    """Draw training examples of one step; they depend on nothing but the arguments."""
    rng = Random(f"train/{seed}/{step}")
    names, weights = list(mixture), list(mixture.values())
    batch: list[Example] = []
    while len(batch) < size:
        example = draw(rng, rng.choices(names, weights)[0])
        if not example.held_out:
            batch.append(example)
    return batch


def held_out_examples(seed: int, count: int) -> Iterator[Example]:
    """Draw `count` different held-out examples of the text families in turn."""
    return _held_out(Random(f"held-out/{seed}"), count, [name for name in WEIGHTS if name not in TRAINED_ONLY])


def held_out_sights(seed: int, count: int) -> Iterator[Example]:
    """Draw `count` different held-out examples of the families about pictures and videos in turn."""
    return _held_out(Random(f"held-out sights/{seed}"), count, [name for name in SIGHTS if name not in TRAINED_ONLY])


def held_out_starts(seed: int, count: int) -> Iterator[Example]:
    """Draw `count` different held-out examples of the families whose canvas begins with more than noise in turn."""
    return _held_out(Random(f"held-out starts/{seed}"), count, list(STARTS))


def _held_out(rng: Random, count: int, names: list[str]) -> Iterator[Example]:
    seen: set[str] = set()
    while count > 0:
        family = names[count % len(names)]
        example = draw(rng, family)
        if family not in UNSPLIT and (example.key in seen or not example.held_out):
            continue
        seen.add(example.key)
        count -= 1
        yield example
