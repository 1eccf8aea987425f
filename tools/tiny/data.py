"""Seeded examples for `tiny`: what is asked, how often, and which prompts are held out for the evaluation.

The families are in `families.py`, `dialogues.py` and `stories.py`. A conversation (messages, declared tools,
thinking mode) belongs to the held-out side when its hash says so, and is never trained on; the same question may be,
with another system text or in other words. Only `small_talk` has too few prompts to be split.
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
UNSPLIT = frozenset({"small_talk"})


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
    "small_sums": (10, families.small_sums, False),
    "worked_sums": (12, families.worked_sums, False),
    "sums_thinking": (8, families.sums_thinking, True),
    "capitals": (6, families.capitals, False),
    "capitals_thinking": (2, families.capitals_thinking, True),
    "sort_words": (6, families.sort_words, False),
    "sort_thinking": (5, families.sort_thinking, True),
    "reverse_words": (5, families.reverse_words, False),
    "spelling": (6, families.spelling, False),
    "letters_thinking": (6, families.letters_thinking, True),
    "json": (6, families.json_records, False),
    "dates": (5, families.dates, False),
    "lists": (6, families.lists, False),
    "counting": (9, families.counting, False),
    "stories": (10, stories.story, False),
    "paragraphs": (5, stories.working_day, False),
    "small_talk": (2, families.small_talk, False),
}
DIALOGUES: dict[str, tuple[float, Callable[[Random], dialogues.Dialogue], bool]] = {
    "tool_calls": (7, dialogues.tool_call, False),
    "tool_calls_thinking": (2, lambda rng: dialogues.tool_call(rng, thinking=True), True),
    "tool_answers": (5, dialogues.tool_answer, False),
    "chats": (6, dialogues.chat, False),
}
WEIGHTS = {name: entry[0] for name, entry in (QUESTIONS | DIALOGUES).items()}
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


def training_batch(seed: int, step: int, size: int) -> list[Example]:
    """Draw the training examples of one step; they depend on nothing but the arguments."""
    rng = Random(f"train/{seed}/{step}")
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    batch: list[Example] = []
    while len(batch) < size:
        example = draw(rng, rng.choices(names, weights)[0])
        if not example.held_out:
            batch.append(example)
    return batch


def held_out_examples(seed: int, count: int) -> Iterator[Example]:
    """Draw `count` different held-out examples, the families in turn."""
    rng = Random(f"held-out/{seed}")
    names = list(WEIGHTS)
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
