"""Typed decisions: a question with labels becomes slots of a canvas that are read in one to four forwards.

    decide(pipeline, YesNo("Is 17 greater than 25?"))
    decide(engine, {"team": Choice("Which team?", options=["billing", "support"])}, state=message)

All slots of all questions are rows of the same denoising steps, with a `Pipeline` in the thread that made it and with
an `Engine` from any thread. What is asked is in `questions.py`, what is read in `slots.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, overload

from .calibration import normalise
from .config import check_integer, check_number
from .events import Result, Stats
from .options import MAX_SEED
from .pipeline import Pipeline
from .prepare import Messages
from .questions import SLOT, Choice, Extract, Labelled, Question, Score, YesNo, messages_for
from .scheduler import Engine
from .slots import Slot, answer_logprobs, log_sum, make_slots
from .tokenizer import Tokenizer

MAX_FORWARDS = 4
MAX_READS = 16
ROWS = 8  # canvases of one step with a pipeline; an engine has its own bound
Kind = Literal["yes_no", "choice", "score", "text"]
Value = bool | str | int
KINDS: dict[type, Kind] = {YesNo: "yes_no", Choice: "choice", Score: "score", Extract: "text"}


@dataclass(frozen=True)
class Decision:
    """The answer to one question.

    Attributes:
        kind: of the question.
        value: True or False, the label, the level, or the text.
        probability: of this value among the labels; of a text, the product over its tokens.
        probabilities: of every label, as the model spells it, in the question's order; they sum to 1.
        logprobs: of every label before calibration, in the same order.
        values: what the labels mean, in the same order.
        forwards: denoising steps of a row, the most that one took.
        rows: canvases that were read, one per slot.
        stats: of these, in order.
    """

    kind: Kind
    value: Value
    probability: float
    probabilities: Mapping[str, float]
    logprobs: tuple[float, ...]
    values: tuple[Value, ...]
    forwards: int
    rows: int
    stats: tuple[Stats, ...] = field(repr=False)

    @property
    def expected(self) -> float:
        """The mean of the values: of yes and no the probability of yes, of a score a number between its levels.

        Raises:
            ValueError: the values are not numbers.
        """
        if self.kind not in ("yes_no", "score"):
            raise ValueError(f"expected: got a decision of kind {self.kind}, expected yes_no or score")
        return math.fsum(
            float(value) * each for value, each in zip(self.values, self.probabilities.values(), strict=True)
        )


@dataclass(frozen=True)
class DecisionOptions:
    """How questions are read.

    Attributes:
        forwards: denoising steps, 1 to 4; a canvas that has settled earlier takes fewer.
        seed: of the noise that slots are read in.
        reads: noises that every slot is read in, rows of the same steps, with the seeds that follow; the probabilities
            of their readings are averaged. A text is read once.
        calibration_temperature: divides the log-probabilities of labels before they are normalised, see
            `calibration.py`. 1 is what the model says; what suits a checkpoint is to be measured.
        content_free: a state without content, "N/A" for example, is asked the same; labels that it makes likely count
            less. None for not at all.
    """

    forwards: int = 1
    seed: int = 0
    reads: int = 1
    calibration_temperature: float = 1.0
    content_free: str | None = None

    def __post_init__(self) -> None:
        check_integer("forwards", self.forwards, 1, MAX_FORWARDS)
        check_integer("reads", self.reads, 1, MAX_READS)
        check_integer("seed", self.seed, 0, MAX_SEED - MAX_READS)
        check_number("calibration_temperature", self.calibration_temperature, 0, exclusive=True)
        if self.content_free is not None and (not isinstance(self.content_free, str) or not self.content_free.strip()):
            raise ValueError(f"content_free: got {self.content_free!r}, expected text that is not blank")


class Ask(NamedTuple):
    """A `prepare.Asked` by name: a prompt, and the options that place its slot."""

    messages: Messages
    options: Mapping[str, Any]


class LabelPlan:
    """What to ask for a question with labels, and how to read the results."""

    def __init__(self, tokenizer: Tokenizer, question: Labelled, state: Any, options: DecisionOptions) -> None:
        """Lay out the slots. Raises `ValueError` for labels whose tokens are the same, or a question without text."""
        self._question = question
        self._options = options
        self._answers = [_answer_ids(tokenizer, question, label) for label in question.labels]
        self._slots = make_slots(self._answers)
        prompts = [messages_for(state, question)]
        if options.content_free is not None:
            prompts.append(messages_for(options.content_free, question))
        self._rows = len(self._slots) * options.reads  # of a prompt
        self.asks = [
            Ask(prompt, {**slot.options, "max_denoising_steps": options.forwards, "seed": options.seed + read})
            for prompt in prompts
            for read in range(options.reads)
            for slot in self._slots
        ]

    def decision(self, results: Sequence[Result]) -> Decision:
        """Return the decision that the results of `asks` add up to."""
        logprobs = self._logprobs(results[: self._rows])
        if self._options.content_free is not None:
            bias = self._logprobs(results[self._rows :])
            logprobs = [each - its for each, its in zip(logprobs, bias, strict=True)]
        question = self._question
        probabilities = normalise(logprobs, self._options.calibration_temperature)
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        return Decision(
            kind=KINDS[type(question)],
            value=question.values[best],
            probability=probabilities[best],
            probabilities=dict(zip(question.labels, probabilities, strict=True)),
            logprobs=tuple(logprobs),
            values=tuple(question.values),
            **_costs(results),
        )

    def _logprobs(self, results: Sequence[Result]) -> list[float]:
        """Return the logarithms of the labels' probabilities, averaged over the reads."""
        reads = []
        for start in range(0, len(results), len(self._slots)):
            row = results[start : start + len(self._slots)]
            readings = [_reading(slot, result) for slot, result in zip(self._slots, row, strict=True)]
            reads.append(answer_logprobs(self._answers, self._slots, readings))
        return [log_sum(of_label) - math.log(len(reads)) for of_label in zip(*reads, strict=True)]


class ExtractPlan:
    """What to ask for a question that a short text answers: what is before the text is pinned, the rest is free."""

    def __init__(self, tokenizer: Tokenizer, question: Extract, state: Any, options: DecisionOptions) -> None:
        """Lay out the canvas. Raises `ValueError` for a question without text."""
        self._tokenizer = tokenizer
        before, self._after = question.answer.split(SLOT)
        # A space belongs to the word behind it: pinned alone it would be a token that the model does not write there.
        self._before = tokenizer.encode_letters(before.rstrip())
        room = question.max_tokens + len(tokenizer.encode_letters(self._after)) + 1  # and the end
        options_of_request = {
            "max_tokens": len(self._before) + room,
            "pins": tuple(enumerate(self._before)),
            "logprobs": 0,
            "guard_empty": False,
            "max_denoising_steps": options.forwards,
            "seed": options.seed,
        }
        self.asks = [Ask(messages_for(state, question), options_of_request)]

    def decision(self, results: Sequence[Result]) -> Decision:
        """Return the decision that the result of `asks` holds."""
        [result] = results
        start = len(self._before)
        ids, logprobs = result.token_ids[start:], (result.logprobs or ())[start:]
        text, count = self._cut(ids)
        logprob = math.fsum(each.logprob for each in logprobs[:count])
        return Decision(
            kind="text",
            value=text,
            probability=math.exp(logprob),
            probabilities={text: math.exp(logprob)},
            logprobs=(logprob,),
            values=(text,),
            **_costs(results),
        )

    def _cut(self, ids: Sequence[int]) -> tuple[str, int]:
        """Return the text before what the answer says behind its slot, and how many tokens it took."""
        if self._after:
            for count in range(1, len(ids) + 1):
                text, found, _ = self._tokenizer.detokenize(ids[:count]).partition(self._after)
                if found:
                    return text.strip(), count
        return self._tokenizer.detokenize(ids).strip(), len(ids)


Plan = LabelPlan | ExtractPlan


def make_plan(tokenizer: Tokenizer, question: Question, state: Any, options: DecisionOptions) -> Plan:
    """Return what to ask. Raises `ValueError` for what cannot be asked."""
    if isinstance(question, Extract):
        return ExtractPlan(tokenizer, question, state, options)
    if isinstance(question, YesNo | Choice | Score):
        return LabelPlan(tokenizer, question, state, options)
    raise ValueError(f"questions: got {type(question).__name__}, expected YesNo, Choice, Score or Extract")


@overload
def decide(runner: Pipeline | Engine, questions: Question, state: Any = None, **options: Any) -> Decision: ...


@overload
def decide(
    runner: Pipeline | Engine, questions: Mapping[str, Question], state: Any = None, **options: Any
) -> dict[str, Decision]: ...


def decide(
    runner: Pipeline | Engine, questions: Question | Mapping[str, Question], state: Any = None, **options: Any
) -> Decision | dict[str, Decision]:
    """Answer typed questions about one state.

    Args:
        runner: a pipeline in the thread that made it, or an engine.
        questions: one question, or several by name.
        state: text, a conversation in OpenAI's form, or JSON data; None where the question says all.
        options: the fields of `DecisionOptions`, and those of a prompt: `images`, `enable_thinking`, `literal`...

    Returns:
        a decision, or one for each name.

    Raises:
        TypeError: an unknown option.
        ValueError: a question or an option that cannot be, with got and expected.
    """
    names = DecisionOptions.__dataclass_fields__
    how = DecisionOptions(**{name: options.pop(name) for name in list(options) if name in names})
    named = questions if isinstance(questions, Mapping) else {"": questions}
    if not named:
        raise ValueError("questions: got none, expected at least one")
    tokenizer = runner.preparer.tokenizer
    plans = [make_plan(tokenizer, question, state, how) for question in named.values()]
    asks = [Ask(ask.messages, {**options, **ask.options}) for plan in plans for ask in plan.asks]
    results = iter(_run_in_engine(runner, asks) if isinstance(runner, Engine) else _run(runner, asks))
    decisions = [plan.decision([next(results) for _ in plan.asks]) for plan in plans]
    return dict(zip(named, decisions, strict=True)) if isinstance(questions, Mapping) else decisions[0]


def _run(pipeline: Pipeline, asks: Sequence[Ask]) -> Iterator[Result]:
    prepared = [pipeline.prepare(*ask) for ask in asks]  # all first: errors cost no steps
    for start in range(0, len(prepared), ROWS):
        yield from pipeline.run_batch(prepared[start : start + ROWS])


def _run_in_engine(engine: Engine, asks: Sequence[Ask]) -> list[Result]:
    results: dict[int, Result] = {}
    for wave in waves(asks, engine.options.max_queue, engine.options.max_batch):
        answered = engine.generate_each([asks[place] for place in wave])
        results.update(zip(wave, answered, strict=True))
    return [results[place] for place in range(len(asks))]


def waves(asks: Sequence[Ask], max_queue: int, max_batch: int) -> list[list[int]]:
    """Return the places of requests to an engine that run together, wave after wave.

    The first request of every system turn comes first and then the first of every prompt: they leave encoded what the
    others begin with. A wave is two batches at most, so that the requests of others find a place in the queue.
    """
    of_system: dict[str, int] = {}
    of_prompt: dict[int, int] = {}
    for place, ask in enumerate(asks):
        if isinstance(ask.messages[0], Mapping) and ask.messages[0]["role"] in ("system", "developer"):
            of_system.setdefault(repr(ask.messages[0]), place)
        of_prompt.setdefault(id(ask.messages), place)
    opening = list(of_system.values())
    firsts = [place for place in of_prompt.values() if place not in opening]
    rest = [place for place in range(len(asks)) if place not in opening and place not in firsts]
    size = min(max_queue, 2 * max_batch)
    return [places[start : start + size] for places in (opening, firsts, rest) for start in range(0, len(places), size)]


def _answer_ids(tokenizer: Tokenizer, question: Labelled, label: str) -> list[int]:
    """Return the tokens of the whole answer with a label, the end of the turn behind them."""
    special = tokenizer.special
    end = special.turn_close if special.turn_close is not None else special.eos
    ids = tokenizer.encode_letters(question.worded(label))
    return ids if end is None else [*ids, end]


def _reading(slot: Slot, result: Result) -> tuple[float, ...]:
    """Return the log-probabilities of a slot's candidates. Raises `RuntimeError` for a request that was cut short."""
    if result.logprobs is None or len(result.logprobs) <= slot.position:
        raise RuntimeError(f"a slot was not read: the request ended as {result.finish_reason!r}")
    return result.logprobs[slot.position].candidates


def _costs(results: Sequence[Result]) -> dict[str, Any]:
    stats = tuple(result.stats for result in results)
    return {"forwards": max(sum(each.denoising_steps) for each in stats), "rows": len(stats), "stats": stats}
