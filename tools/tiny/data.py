"""Seeded examples for `tiny`: what is asked, how often, and which prompts are held out for the evaluation.

The families are in `families.py`, `dialogues.py` and `stories.py`. A conversation (messages, declared tools,
thinking mode) belongs to the held-out side when its hash says so, and is never trained on; the same question may be,
with another system text or in other words. Only `small_talk` and `casual_talk` have too few prompts to be split.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import dialogues
import families
import stories
from words import SYSTEM_TEXTS

HELD_OUT_SHARE = 16  # one prompt in 16 is held out
UNSPLIT = frozenset({"small_talk", "casual_talk"})


@dataclass(frozen=True)
class Example:
    """One conversation and the only right continuation, written as the model writes it."""

    family: str
    messages: list[dict[str, Any]]
    answer: str
    end_token: str = dialogues.TURN_END
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = False

    @property
    def held_out(self) -> bool:
        """Tell whether the prompt is kept from training."""
        key = repr((self.messages, self.tools, self.thinking))
        return self.family not in UNSPLIT and zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


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
}
DIALOGUES: dict[str, tuple[float, Callable[[Random], dialogues.Dialogue], bool]] = {
    "tool_calls": (6, dialogues.tool_call, False),
    "tool_calls_thinking": (3, lambda rng: dialogues.tool_call(rng, thinking=True), True),
    "tool_answers": (5, dialogues.tool_answer, False),
    "chats": (5, dialogues.chat, False),
}
WEIGHTS = {name: entry[0] for name, entry in (QUESTIONS | DIALOGUES).items()}
# Teaches to count, but where to stop is learned too slowly to be relied on: replaced in the last phase, not evaluated.
# Introductions are too few to hold enough of them out.
TRAINED_ONLY = frozenset({"counting_between", "introductions"})
# The last rounds of the training repeat what is learned last: where a list of numbers ends, sums, four words to sort.
# The third one brings what a newcomer types first.
TUNING_ROUNDS = tuple(
    dict.fromkeys(WEIGHTS, 2.0) | {"counting_between": 0, "casual_talk": 0, "introductions": 0} | often
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
    )
)
SYSTEM_SHARE = 0.1


def draw(rng: Random, family: str) -> Example:
    """Draw one example of a family, held out or not."""
    if family in QUESTIONS:
        _, question, thinking = QUESTIONS[family]
        prompt, answer = question(rng)
        messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
        tools: list[dict[str, Any]] = []
        end_token = dialogues.TURN_END
    elif family in DIALOGUES:
        _, dialogue, thinking = DIALOGUES[family]
        messages, tools, answer, end_token = dialogue(rng)
    else:
        raise ValueError(f"family: got {family!r}, expected one of {sorted(WEIGHTS)}")
    if family not in UNSPLIT and rng.random() < SYSTEM_SHARE:
        messages = [{"role": "system", "content": rng.choice(SYSTEM_TEXTS)}, *messages]
    return Example(family, messages, answer, end_token, tools, thinking)


def training_batch(seed: int, step: int, size: int, mixture: dict[str, float] = WEIGHTS) -> list[Example]:
    """Draw the training examples of one step; they depend on nothing but the arguments."""
    rng = Random(f"train/{seed}/{step}")
    names, weights = list(mixture), list(mixture.values())
    batch: list[Example] = []
    while len(batch) < size:
        example = draw(rng, rng.choices(names, weights)[0])
        if not example.held_out:
            batch.append(example)
    return batch


def held_out_examples(seed: int, count: int) -> Iterator[Example]:
    """Draw `count` different held-out examples, the families in turn."""
    rng = Random(f"held-out/{seed}")
    names = [name for name in WEIGHTS if name not in TRAINED_ONLY]
    seen: set[str] = set()
    while count > 0:
        family = names[count % len(names)]
        example = draw(rng, family)
        key = repr((example.messages, example.tools, example.thinking))
        if family not in UNSPLIT and (key in seen or not example.held_out):
            continue
        seen.add(key)
        count -= 1
        yield example
