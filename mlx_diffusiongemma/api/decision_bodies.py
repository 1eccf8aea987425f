"""Bodies of /v1/decisions and /v1/systemone, and the typed questions that they hold.

Two forms are in use. A *state* with named questions of type noul, choice and score is that of System One, which
mlx-vlm's and other servers' /v1/decisions have too; an *input* with a list of questions of type predicate, choice and
score is OpenAI's. What is ours in both: `images`, the options of a decision (`forwards` and those behind it), `answer`,
`show_options`, and questions of type text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from ..decisions import MAX_FORWARDS, MAX_READS
from ..questions import MAX_EXTRACT_TOKENS, SLOT, Choice, Extract, Question, Score, YesNo
from .errors import refuse
from .fields import Body

MAX_QUESTIONS = 64
Content = str | dict[str, Any] | list[Any]


class _Asked(BaseModel):
    """What questions of both forms have."""

    model_config = ConfigDict(extra="ignore", strict=True)

    instructions: Content | None = Field(None, description="what is asked; JSON is told as it is written")
    answer: str = Field(SLOT, description="how the model words the answer, {} in place of the label")
    show_options: bool = Field(True, description="tell the model in words which labels there are")

    @property
    def _common(self) -> dict[str, Any]:
        return {
            "instructions": _text(self.instructions) or "",
            "answer": self.answer,
            "show_options": self.show_options,
        }


class TextQuestion(_Asked):
    """What a short text answers."""

    type: Literal["text"]
    name: str | None = None
    max_tokens: int = Field(16, ge=1, le=MAX_EXTRACT_TOKENS)

    def question(self) -> Question:
        """Return it typed."""
        return Extract(**self._common, max_tokens=self.max_tokens)


# -- a state and named questions --------------------------------------------------------------------------------------


class NoulCriteria(BaseModel):
    """What counts as yes, and what as no."""

    model_config = ConfigDict(extra="ignore", strict=True)

    true: Content | None = None
    false: Content | None = None


class NoulQuestion(_Asked):
    """What yes or no answers."""

    type: Literal["noul"]
    criteria: NoulCriteria | None = None

    def question(self) -> Question:
        """Return it typed."""
        told = self.criteria or NoulCriteria()
        return YesNo(**self._common, criteria=(_text(told.true), _text(told.false)))


class ChoiceQuestion(_Asked):
    """What one of several labels answers."""

    type: Literal["choice"]
    criteria: dict[str, Content | None] = Field(description="labels and what they mean")

    def question(self) -> Question:
        """Return it typed."""
        return Choice(**self._common, options={label: _text(what) for label, what in self.criteria.items()})


class ScoreQuestion(_Asked):
    """What a level of a scale answers."""

    type: Literal["score"]
    criteria: list[Content] = Field(description="what the levels 0, 1, 2... mean")

    def question(self) -> Question:
        """Return it typed."""
        return Score(**self._common, levels={str(level): _text(what) for level, what in enumerate(self.criteria)})


NamedQuestion = Annotated[NoulQuestion | ChoiceQuestion | ScoreQuestion | TextQuestion, Field(discriminator="type")]


# -- an input and a list of questions ---------------------------------------------------------------------------------


class PredicateQuestion(_Asked):
    """How likely is it that a statement is true?"""

    type: Literal["predicate"]
    name: str | None = None

    def question(self) -> Question:
        """Return it typed."""
        return YesNo(**self._common)


class ListedOption(BaseModel):
    """One label. A truth value is spelled true or false."""

    model_config = ConfigDict(extra="ignore", strict=True)

    value: str | bool
    description: str | None = None


class ListedChoice(_Asked):
    """What one of several labels answers."""

    type: Literal["choice"]
    name: str | None = None
    choices: list[ListedOption]

    @property
    def values(self) -> list[str | bool]:
        """The labels as they were given."""
        return [option.value for option in self.choices]

    def question(self) -> Question:
        """Return it typed. Raises `ValueError` for a label that is there twice."""
        spelled = [value if isinstance(value, str) else str(value).lower() for value in self.values]
        if len(set(spelled)) < len(spelled):
            raise ValueError("choices: got a value twice, expected different ones")
        told = (option.description for option in self.choices)
        return Choice(**self._common, options=dict(zip(spelled, told, strict=True)))


class ListedLevel(BaseModel):
    """One level of a scale."""

    model_config = ConfigDict(extra="ignore", strict=True)

    label: str
    description: str | None = None


class ListedScore(_Asked):
    """What a level of a scale answers, from low to high."""

    type: Literal["score"]
    name: str | None = None
    levels: list[ListedLevel]

    def question(self) -> Question:
        """Return it typed. Raises `ValueError` for a label that is there twice."""
        levels = {level.label: level.description for level in self.levels}
        if len(levels) < len(self.levels):
            raise ValueError("levels: got a label twice, expected different ones")
        return Score(**self._common, levels=levels)


ListedQuestion = Annotated[PredicateQuestion | ListedChoice | ListedScore | TextQuestion, Field(discriminator="type")]


# -- bodies -----------------------------------------------------------------------------------------------------------


class _DecisionBody(Body):
    """What the bodies of both paths have."""

    model: str | None = None
    images: list[str] | None = Field(None, description="data URLs; shown before the state")
    forwards: int = Field(1, ge=1, le=MAX_FORWARDS, description="denoising steps at most")
    seed: int = Field(0, description="of the noise that slots are read in")
    reads: int = Field(1, ge=1, le=MAX_READS, description="noises whose readings are averaged")
    calibration_temperature: float = Field(1.0, gt=0, description="above 1 makes the model less sure")
    content_free: str | None = Field(None, description="a state without content, whose favourites count less")


class SystemOneBody(_DecisionBody):
    """The body of /v1/systemone."""

    state: Content = Field(description="text, a conversation, or JSON data")
    questions: dict[str, NamedQuestion] = Field(min_length=1, max_length=MAX_QUESTIONS)


class DecisionBody(_DecisionBody):
    """The body of /v1/decisions: `state` with named questions, or `input` with a list of them."""

    state: Content | None = Field(None, description="text, a conversation, or JSON data")
    input: str | list[dict[str, Any]] | None = Field(None, description="text, or items of the Responses API")
    questions: Annotated[
        Annotated[dict[str, NamedQuestion], Field(min_length=1, max_length=MAX_QUESTIONS), Tag("named")]
        | Annotated[list[ListedQuestion], Field(min_length=1, max_length=MAX_QUESTIONS), Tag("listed")],
        Discriminator(lambda given: "named" if isinstance(given, Mapping) else "listed"),
    ]


def typed(where: str, asked: Any) -> Question:
    """Return a question of a body typed. Raise `ApiError` naming it."""
    try:
        question: Question = asked.question()
    except ValueError as error:
        raise refuse(where, str(error), "invalid_value") from None
    return question


def _text(content: Content | None) -> str | None:
    return content if content is None or isinstance(content, str) else json.dumps(content, ensure_ascii=False)
