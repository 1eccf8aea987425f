"""Decisions in the forms of System One and of OpenAI, as models so that the OpenAPI document has them.

`confidence` is the probability of the label that was chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from ..decisions import Decision


class TextAnswer(BaseModel):
    """A short text, and how likely all of its tokens are together."""

    type: Literal["text"] = "text"
    name: str | None = None
    text: str
    probability: float


# -- a state and named questions --------------------------------------------------------------------------------------


class NoulAnswer(BaseModel):
    """How likely yes is."""

    type: Literal["noul"] = "noul"
    noul: float


class ChoiceAnswer(BaseModel):
    """The likeliest label."""

    type: Literal["choice"] = "choice"
    choice: str
    confidence: float
    probabilities: dict[str, float]


class ScoreAnswer(BaseModel):
    """The mean of the levels, which count from 0."""

    type: Literal["score"] = "score"
    score: float
    confidence: float
    legend: dict[str, Any]
    probabilities: dict[str, float]


class StateUsage(BaseModel):
    """Tokens of the prompts, and slots that were read."""

    input_tokens: int
    output_tokens: int


StateAnswer = NoulAnswer | ChoiceAnswer | ScoreAnswer | TextAnswer


class StateReply(BaseModel):
    """The reply of /v1/systemone."""

    model: str
    answers: dict[str, StateAnswer]
    usage: StateUsage
    timings: dict[str, Any]


def state_answer(decision: Decision, asked: Any) -> StateAnswer:
    """Return the answer to a named question."""
    chances = dict(decision.probabilities)
    if decision.kind == "yes_no":
        return NoulAnswer(noul=decision.expected)
    if decision.kind == "choice":
        return ChoiceAnswer(choice=str(decision.value), confidence=decision.probability, probabilities=chances)
    if decision.kind == "score":
        legend = {str(level): what for level, what in enumerate(asked.criteria)}
        mean, confidence = decision.expected, decision.probability
        return ScoreAnswer(score=mean, confidence=confidence, legend=legend, probabilities=chances)
    return TextAnswer(text=str(decision.value), probability=decision.probability)


# -- an input and a list of questions ---------------------------------------------------------------------------------


class PredicateAnswer(BaseModel):
    """How likely it is that the statement is true."""

    type: Literal["predicate"] = "predicate"
    name: str | None = None
    probability: float


class ListedProbability(BaseModel):
    """How likely one label is."""

    value: str | bool
    probability: float


class ListedChoiceAnswer(BaseModel):
    """The likeliest label."""

    type: Literal["choice"] = "choice"
    name: str | None = None
    choice: str | bool
    confidence: float
    probabilities: list[ListedProbability]


class LevelProbability(BaseModel):
    """How likely one level is; levels count from 0."""

    value: int
    label: str
    probability: float


class ListedScoreAnswer(BaseModel):
    """The mean of the levels, which count from 0."""

    type: Literal["score"] = "score"
    name: str | None = None
    score: float
    confidence: float
    probabilities: list[LevelProbability]


class ListedUsage(BaseModel):
    """OpenAI's usage: tokens of the prompts, and slots that were read."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


ListedAnswer = PredicateAnswer | ListedChoiceAnswer | ListedScoreAnswer | TextAnswer


class ListedReply(BaseModel):
    """The reply of /v1/decisions to a list of questions."""

    model: str
    answers: list[ListedAnswer]
    usage: ListedUsage
    timings: dict[str, Any]


def listed_answer(decision: Decision, asked: Any) -> ListedAnswer:
    """Return the answer to a question of a list."""
    name, chances = asked.name, list(decision.probabilities.values())
    if decision.kind == "yes_no":
        return PredicateAnswer(name=name, probability=decision.expected)
    if decision.kind == "choice":
        values = asked.values
        return ListedChoiceAnswer(
            name=name,
            choice=values[chances.index(max(chances))],
            confidence=decision.probability,
            probabilities=[ListedProbability(value=v, probability=p) for v, p in zip(values, chances, strict=True)],
        )
    if decision.kind == "score":
        levels = enumerate(decision.probabilities.items())
        return ListedScoreAnswer(
            name=name,
            score=decision.expected,
            confidence=decision.probability,
            probabilities=[LevelProbability(value=i, label=label, probability=p) for i, (label, p) in levels],
        )
    return TextAnswer(name=name, text=str(decision.value), probability=decision.probability)


# -- counts -----------------------------------------------------------------------------------------------------------


def state_usage(decisions: Iterable[Decision]) -> StateUsage:
    """Return the usage of some questions, each prompt counted once."""
    read = list(decisions)
    tokens = sum(decision.stats[0].prompt_tokens for decision in read)
    return StateUsage(input_tokens=tokens, output_tokens=sum(decision.rows for decision in read))


def listed_usage(decisions: Sequence[Decision]) -> ListedUsage:
    """Return the usage of some questions in OpenAI's form."""
    counts = state_usage(decisions)
    return ListedUsage(
        input_tokens=counts.input_tokens,
        input_tokens_details={
            "cached_tokens": sum(decision.stats[0].cached_tokens for decision in decisions),
            "cache_write_tokens": 0,
        },
        output_tokens=counts.output_tokens,
        output_tokens_details={"reasoning_tokens": 0},
        total_tokens=counts.input_tokens + counts.output_tokens,
    )


def decision_timings(decisions: Sequence[Decision]) -> dict[str, Any]:
    """Return what the decisions took: forwards of a row, rows, and milliseconds summed over rows."""
    stats = [each for decision in decisions for each in decision.stats]
    return {
        "forwards": max(decision.forwards for decision in decisions),
        "rows": len(stats),
        "batch_size": sum(each.batch_size for each in stats) / len(stats),
        "queue_ms": 1000 * sum(each.queue_seconds for each in stats),
        "prompt_ms": 1000 * sum(each.prefill_seconds for each in stats),
        "denoising_ms": 1000 * sum(each.denoising_seconds for each in stats),
    }
