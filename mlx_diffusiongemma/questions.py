"""Typed questions: what is asked, the labels that may answer, and the words in which the model is asked.

Here: dataclasses and text. How labels are read from a canvas is in `slots.py`, who runs it in `decisions.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .config import check_integer
from .messages import ROLES

MAX_LABELS = 255
MAX_EXTRACT_TOKENS = 64
SLOT = "{}"  # in an answer: where the label stands
Labels = Sequence[str] | Mapping[str, str | None]  # labels, or labels with descriptions


@dataclass(frozen=True)
class _Asked:
    """What every question has.

    Attributes:
        instructions: the question; may be empty where the state asks it.
        answer: how the model words the answer, with `{}` in place of the label: "The capital of France is {}.".
        show_options: tell the model in words which labels there are.
    """

    instructions: str = ""
    answer: str = SLOT
    show_options: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.instructions, str):
            raise ValueError(f"instructions: got {self.instructions!r}, expected text")
        if not isinstance(self.answer, str) or self.answer.count(SLOT) != 1:
            raise ValueError(f"answer: got {self.answer!r}, expected text with one {SLOT} in it")
        if not isinstance(self.show_options, bool):
            raise ValueError(f"show_options: got {self.show_options!r}, expected True or False")

    def worded(self, label: str) -> str:
        """Return the whole answer with a label in its slot."""
        return self.answer.replace(SLOT, label)


@dataclass(frozen=True)
class YesNo(_Asked):
    """A question whose answer is yes or no. `yes` and `no` are how the model spells them.

    `criteria` describes what counts as yes and as no.
    """

    yes: str = "Yes"
    no: str = "No"
    criteria: tuple[str | None, str | None] = (None, None)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_labels("yes and no", (self.yes, self.no))
        told = self.criteria
        is_pair = isinstance(told, list | tuple) and len(told) == 2
        if not is_pair or not all(isinstance(each, str | None) for each in told):
            raise ValueError(f"criteria: got {told!r:.80}, expected a pair of texts, None for none")

    @property
    def labels(self) -> tuple[str, ...]:
        """What the model may write: yes first."""
        return (self.yes, self.no)

    @property
    def values(self) -> tuple[bool, ...]:
        """What the labels mean."""
        return (True, False)

    @property
    def text(self) -> str:
        """The question in words."""
        described = dict(zip(self.labels, self.criteria, strict=True))
        hint = f"Answer {self.yes.lower()} or {self.no.lower()}." if self.show_options else ""
        asked = " ".join(part for part in (self.instructions, hint) if part)
        return _lines([asked, *(f"{label}: {what}" for label, what in described.items() if what)])


@dataclass(frozen=True)
class Choice(_Asked):
    """A question that one of several labels answers. A mapping describes them."""

    options: Labels = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_labels("options", self.options)

    @property
    def labels(self) -> tuple[str, ...]:
        """What the model may write."""
        return tuple(self.options)

    @property
    def values(self) -> tuple[str, ...]:
        """What the labels mean: themselves."""
        return self.labels

    @property
    def text(self) -> str:
        """The question in words."""
        return _lines(
            [self.instructions, *_shown(self.options, "Answer with exactly one of these:", self.show_options)]
        )


@dataclass(frozen=True)
class Score(_Asked):
    """A rating on a scale: the integers of a range, or levels from low to high, whose values are 0, 1, 2..."""

    levels: range | Labels = range(11)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_labels("levels", self.labels if isinstance(self.levels, range) else self.levels)

    @property
    def labels(self) -> tuple[str, ...]:
        """What the model may write."""
        return tuple(str(level) for level in self.levels)

    @property
    def values(self) -> tuple[int, ...]:
        """What the labels mean."""
        return tuple(self.levels if isinstance(self.levels, range) else range(len(self.levels)))

    @property
    def text(self) -> str:
        """The question in words."""
        if isinstance(self.levels, range):
            hint = f"Answer with a number from {self.levels[0]} to {self.levels[-1]}."
            return _lines([" ".join(part for part in (self.instructions, hint if self.show_options else "") if part)])
        hint = "Answer with exactly one of these, from low to high:"
        return _lines([self.instructions, *_shown(self.levels, hint, self.show_options)])


@dataclass(frozen=True)
class Extract(_Asked):
    """A question whose answer is a short text of at most `max_tokens` tokens."""

    max_tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("max_tokens", self.max_tokens, 1, MAX_EXTRACT_TOKENS)

    @property
    def text(self) -> str:
        """The question in words."""
        return self.instructions


Labelled = YesNo | Choice | Score
Question = Labelled | Extract


def messages_for(state: Any, question: Question) -> list[dict[str, Any]]:
    """Return the conversation that asks a question.

    Args:
        state: what it is about: text, a conversation in OpenAI's form, or other JSON data; None for nothing. The
            question goes into the last message if that is the user's, into a new one otherwise.
        question: asked behind it.

    Raises:
        ValueError: nothing is asked, or a state that is not JSON data.
    """
    if is_conversation(state):
        return _asked_in(list(state), question.text)
    if state is None or isinstance(state, str):
        told = state or ""
    else:
        try:
            told = json.dumps(state, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            raise ValueError(f"state: got {type(state).__name__}, expected text, messages or JSON data") from None
    text = _lines([told, question.text], "\n\n")
    if not text.strip():
        raise ValueError("the question is empty: got neither a state nor instructions, expected some text")
    return [{"role": "user", "content": text}]


def is_conversation(state: Any) -> bool:
    """Tell whether a state is a list of messages."""
    return (
        isinstance(state, list | tuple)
        and bool(state)
        and all(isinstance(item, Mapping) and item.get("role") in ROLES and "content" in item for item in state)
    )


def _asked_in(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Ask in the last message if it is the user's, in a new one otherwise, or where its content is not content."""
    last = messages[-1]
    content = last["content"]
    if not text:
        return messages
    if last["role"] == "user" and isinstance(content, str):
        return [*messages[:-1], {**last, "content": _lines([content, text], "\n\n")}]
    if last["role"] == "user" and isinstance(content, list | tuple) and content:
        *parts, end = content
        if isinstance(end, Mapping) and isinstance(end.get("text"), str):  # templates trim parts and join them
            asked = [{**end, "text": _lines([end["text"], text], "\n\n")}]
        else:
            asked = [end, {"type": "text", "text": text}]
        return [*messages[:-1], {**last, "content": [*parts, *asked]}]
    return [*messages, {"role": "user", "content": text}]


def _shown(labels: Labels, hint: str, show: bool) -> list[str]:
    """Return the lines that tell of the labels; descriptions are told in any case."""
    described = labels if isinstance(labels, Mapping) else dict.fromkeys(labels)
    if not show and not any(described.values()):
        return []
    return [hint, *(f"- {label}: {what}" if what else f"- {label}" for label, what in described.items())]


def _lines(parts: Sequence[str], between: str = "\n") -> str:
    return between.join(part for part in parts if part)


def _check_labels(name: str, labels: Any) -> None:
    if isinstance(labels, str) or not isinstance(labels, Sequence | Mapping):
        raise ValueError(f"{name}: got {labels!r}, expected a list of labels")
    if not 2 <= len(labels) <= MAX_LABELS:
        raise ValueError(f"{name}: got {len(labels)}, expected 2 to {MAX_LABELS} labels")
    for label in labels:
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"{name}: got {label!r}, expected text that is not blank")
    if len(set(labels)) < len(labels):
        raise ValueError(f"{name}: got a label twice, expected different ones")
    for what in labels.values() if isinstance(labels, Mapping) else ():
        if what is not None and not isinstance(what, str):
            raise ValueError(f"{name}: got the description {what!r}, expected text")
