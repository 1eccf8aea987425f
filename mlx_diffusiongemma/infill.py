"""Fill holes in a text: what stands around them is pinned, and their lengths are chosen by likelihood.

    result = infill(pipeline, "The capital of Peru is ", ".", messages="What is the capital of Peru?", seed=1)
    result.text == "Lima"

Nothing here runs the model. A plan is a generator: it yields requests that can share their steps, is sent their
results, and returns the filled text. `run_plan` runs one on whatever answers requests, a pipeline or an engine.

The score of a text is the sum of the log-probabilities of the hole's tokens and of the `NEAR` tokens behind it: in a
hole of the wrong length the tokens behind it are unlikely. Where lengths compete, the hole's tokens count as they
settled, and those behind it as the model gives them in one more step, in which they are free and the hole is pinned;
the score of a single length is that of the last step, pinned tokens and all.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar, cast

from .config import check_integer
from .events import Result, Stats
from .holes import ROOM_SHARE, Hole, Placed, clean_borders, place_pieces, split_control, split_spaces
from .lengths import Lengths, Tries, between, lengths_to_try
from .options import OPTION_NAMES, check_names
from .prepare import SIGHT_OPTIONS, Asked, Messages, Preparer
from .tokenizer import SPELLINGS

ROWS = 8  # requests that share their steps
NEAR = 16  # tokens behind a hole that its score depends on
FINALISTS = 3  # lengths that are denoised to the end
SCREENING_STEPS = 2  # of each length before that
OWN_OPTIONS = frozenset({"max_tokens", "pins", "seed_canvas", "text_only", "logprobs", "stop", "guard_empty"})
FILL_OPTIONS = (OPTION_NAMES - OWN_OPTIONS) | SIGHT_OPTIONS | {"template_kwargs", "images", "videos", "tools"}

T = TypeVar("T")


class Answers(Protocol):
    """Whatever answers requests: `Pipeline` and `Engine` do."""

    @property
    def preparer(self) -> Preparer:
        """What prepares requests."""

    def generate_each(self, requests: Sequence[Asked]) -> list[Result]:
        """Answer several requests."""


@dataclass(frozen=True)
class Candidate:
    """A hole that was filled with so many tokens; a higher score (nats, at most 0) is more likely."""

    length: int
    text: str
    score: float


@dataclass(frozen=True)
class InfillResult:
    """A filled hole.

    Attributes:
        text: what stands in the hole.
        full_text: all of the text, the hole filled.
        token_ids: of the hole. They hold the spaces before it too where the tokenizer needs them there.
        length: how many those are.
        candidates: the lengths that were tried to the end, most likely first.
        seed: of the random numbers.
        canvas_steps: denoising steps, counted per canvas, of all candidates.
        stats: of the candidate that was chosen.
    """

    text: str
    full_text: str
    token_ids: tuple[int, ...]
    length: int
    candidates: tuple[Candidate, ...]
    seed: int
    canvas_steps: int
    stats: Stats = field(repr=False)


@dataclass(frozen=True)
class FillResult:
    """A text whose holes are filled.

    Attributes:
        text: all of it.
        holes: what stands in each hole.
        lengths: tokens of each.
        score: of all holes together.
        seed, canvas_steps, stats: as in `InfillResult`.
    """

    text: str
    holes: tuple[str, ...]
    lengths: tuple[int, ...]
    score: float
    seed: int
    canvas_steps: int
    stats: Stats = field(repr=False)


def infill(
    model: Answers,
    prefix: str,
    suffix: str,
    *,
    messages: Messages | None = None,
    length: Lengths = None,
    max_tokens: int | None = None,
    **options: Any,
) -> InfillResult:
    """Write what belongs between two texts. They stay as they are, byte for byte.

    Args:
        model: a pipeline (call it from its thread), or an engine.
        prefix: what is before the hole.
        suffix: what is behind it; "" for the end of the text.
        messages: a conversation whose answer prefix, hole and suffix are, as for `Pipeline.stream`; control tokens
            that are spelled in it are text. None for a text without one; then those in the prefix are what they spell.
        length: tokens of the hole: a number, numbers to choose from, or None for `lengths.LENGTHS`.
        max_tokens: of the hole, where no length is given; None for 32.
        options: `FILL_OPTIONS`, as for `Pipeline.stream`.

    Raises:
        TypeError: an unknown argument.
        ValueError: what cannot be filled, with the value and what was expected.
    """
    filler = Filler(model.preparer, messages, options)
    return run_plan(filler.infill(prefix, suffix, lengths_to_try(length, max_tokens)), model.generate_each)


def fill(
    model: Answers,
    template: str | Sequence[str],
    *,
    marker: str = "___",
    messages: Messages | None = None,
    length: Lengths = None,
    max_tokens: int | None = None,
    **options: Any,
) -> FillResult:
    """Fill all holes of a text.

    With a given length all holes are filled together. Otherwise their lengths are found from left to right, each from
    what is before and directly behind it; then all are filled together, beginning from what was found.

    Args:
        template: the text, or the texts between its holes.
        marker: what a hole looks like in a text.
        model, messages, length, max_tokens, options: those of `infill`; length and max_tokens are of each hole.
    """
    texts = split_template(template, marker) if isinstance(template, str) else template
    filler = Filler(model.preparer, messages, options)
    return run_plan(filler.fill(texts, lengths_to_try(length, max_tokens)), model.generate_each)


def run_plan(plan: Generator[list[Asked], list[Result], T], generate_each: Callable[[list[Asked]], list[Result]]) -> T:
    """Run a plan: let its requests be answered, at most `ROWS` at a time."""
    try:
        requests = next(plan)
        while True:
            results: list[Result] = []
            for start in range(0, len(requests), ROWS):
                results += generate_each(requests[start : start + ROWS])
            requests = plan.send(results)
    except StopIteration as end:
        return cast(T, end.value)


def split_template(template: str, marker: str) -> list[str]:
    """Return the texts between the holes of a template. Raise `ValueError` where it has none."""
    if not marker or not isinstance(marker, str):
        raise ValueError(f"marker: got {marker!r}, expected some text")
    if marker not in template:
        raise ValueError(f"template: got no hole, expected {marker!r} in it")
    return template.split(marker)


@dataclass(frozen=True)
class Filled:
    """A text whose holes one request has filled.

    Attributes:
        holes: text and token ids of each hole.
        score: of all holes, see the module.
        hole_score: the part of it that their own tokens have.
        steps: denoising steps so far.
        result: of the request.
    """

    holes: tuple[tuple[str, tuple[int, ...]], ...]
    score: float
    hole_score: float
    steps: int
    result: Result

    @property
    def length(self) -> int:
        """Tokens of the first hole."""
        return len(self.holes[0][1])


@dataclass(frozen=True)
class Reading:
    """What the model makes of a canvas that begins with some tokens of a text, from token `start` on, in one step."""

    start: int
    token_ids: tuple[int, ...]
    result: Result


@dataclass(frozen=True)
class _Attempt:
    """A request for a text with holes, and how its answer is read."""

    request: Asked
    placed: Placed
    spaces: tuple[str, ...]  # before each hole, left to its tokens


@dataclass(frozen=True)
class _Judgement:
    """A request that reads what is behind filled holes, and the tokens that stand there, by their place."""

    request: Asked
    wanted: Mapping[int, int]


class Filler:
    """Makes plans: what is said to the model, the options, and the checkpoint's tokenizer."""

    def __init__(self, preparer: Preparer, messages: Messages | None, options: Mapping[str, Any]) -> None:
        """Bind what every request of a plan shares; see `infill`."""
        check_names(options, FILL_OPTIONS)
        self._tokenizer = preparer.tokenizer
        self._canvas_length = preparer.config.canvas_length
        self._context = preparer.config.text.max_position_embeddings
        self._end_ids = preparer.generation_config.eos_token_ids
        self._messages = messages
        self._options = {name: value for name, value in options.items() if value is not None}
        self._options.setdefault("seed", secrets.randbits(32))  # one for all, so that only lengths differ
        self._steps = self._options.get("max_denoising_steps", preparer.generation_config.max_denoising_steps)
        check_integer("max_denoising_steps", self._steps, 1)

    @property
    def seed(self) -> int:
        """Of the random numbers of every request."""
        return int(self._options["seed"])

    # -- plans ------------------------------------------------------------------------------------------------------

    def infill(
        self, prefix: str, suffix: str, tries: Tries, old: str | None = None, *, ends: bool = True
    ) -> Generator[list[Asked], list[Result], InfillResult]:
        """Plan to fill one hole.

        Args:
            prefix, suffix: what is around it.
            tries: its lengths.
            old: what stood there; a hole of that length begins from it.
            ends: whether the text ends with the suffix.
        """
        _check_texts("prefix and suffix", (prefix, suffix))
        seed: tuple[int, ...] = ()
        if old:
            seed = tuple(self._tokenizer.encode_letters(split_spaces(self._tokenizer, prefix)[1] + old))
            tries = tries.with_length(len(seed))

        def attempt(length: int, steps: int | None = None) -> _Attempt:
            hole = Hole(length, seed if length == len(seed) else ())
            return self._attempt((prefix, suffix), (hole,), ends=ends, steps=steps)

        lengths, steps = tries.lengths, 0
        if len(lengths) > FINALISTS and self._steps > SCREENING_STEPS:
            screened = yield from self._answers([attempt(each, SCREENING_STEPS) for each in lengths])
            if tries.refined and screened:
                gaps = between(lengths, screened[0].length)
                screened += yield from self._answers([attempt(each, SCREENING_STEPS) for each in gaps])
            steps = _steps(screened)
            screened.sort(key=_by_score)
            lengths = tuple(each.length for each in screened[:FINALISTS])
        filled = yield from self._answers([attempt(each) for each in lengths])
        best = filled[0]
        text, token_ids = best.holes[0]
        return InfillResult(
            text=text,
            full_text=prefix + text + suffix,
            token_ids=token_ids,
            length=best.length,
            candidates=tuple(Candidate(each.length, each.holes[0][0], each.score) for each in filled),
            seed=best.result.seed,
            canvas_steps=steps + _steps(filled),
            stats=best.result.stats,
        )

    def fill(self, texts: Sequence[str], tries: Tries) -> Generator[list[Asked], list[Result], FillResult]:
        """Plan to fill the holes between texts."""
        _check_texts("template", texts)
        if len(texts) < 2:
            raise ValueError(f"template: got {len(texts)} texts, expected two at least, and a hole between them")
        if not all(texts[1:-1]):
            raise ValueError("template: got two holes without text between them, expected one hole there")
        found: list[InfillResult] = []
        wanted = [Hole(tries.lengths[0])] * (len(texts) - 1)
        if len(tries.lengths) > 1:
            done = texts[0]
            for index, after in enumerate(texts[1:], start=1):
                found.append((yield from self.infill(done, after, tries, ends=index == len(texts) - 1)))
                done = found[-1].full_text
            wanted = [Hole(each.length, each.token_ids) for each in found]
        [filled] = yield from self._answers([self._attempt(texts, wanted)])
        holes = [text for text, _ in filled.holes]
        return FillResult(
            text="".join(piece for pair in zip(texts, [*holes, ""], strict=True) for piece in pair),
            holes=tuple(holes),
            lengths=tuple(len(token_ids) for _, token_ids in filled.holes),
            score=filled.score,
            seed=filled.result.seed,
            canvas_steps=_steps([filled]) + sum(each.canvas_steps for each in found),
            stats=filled.result.stats,
        )

    def read(self, text: str) -> Generator[list[Asked], list[Result], list[Reading]]:
        """Plan to look once at a text as the draft of the answer, canvas by canvas.

        Every canvas begins with what the text has there, and has the text before it as its prefix.
        """
        C, tokenizer = self._canvas_length, self._tokenizer
        token_ids = tokenizer.encode_letters(text)
        borders = [*clean_borders(tokenizer, text, token_ids), True]
        starts = [0]
        while starts[-1] + C < len(token_ids):
            starts.append(next(place for place in range(starts[-1] + C, 0, -1) if borders[place]))
        stops = [*starts[1:], len(token_ids)]
        end_id = self._end_id("")
        requests: list[Asked] = []
        for start, stop in zip(starts, stops, strict=True):
            draft = token_ids[start:stop]
            if stop == len(token_ids) and len(draft) < C and end_id is not None:
                draft = [*draft, end_id]
            lead = tokenizer.detokenize(token_ids[:start])
            requests.append(self._request("", lead, {"max_tokens": C, "seed_canvas": draft}, steps=1))
        results = yield requests
        return [
            Reading(start, tuple(token_ids[start:stop]), result)
            for start, stop, result in zip(starts, stops, results, strict=True)
        ]

    # -- requests ---------------------------------------------------------------------------------------------------

    def _answers(self, attempts: Sequence[_Attempt]) -> Generator[list[Asked], list[Result], list[Filled]]:
        """Let requests be answered; return the filled texts, the most likely one first.

        What a model gives to a pinned token that it sees says little. So where several compete, each is shown once more
        with its hole pinned and what is behind it free.
        """
        if not attempts:
            return []
        results = yield [attempt.request for attempt in attempts]
        filled = list(map(self._read, attempts, results))
        if len(filled) > 1:
            judgements = list(map(self._judgement, attempts, filled))
            results = yield [judgement.request for judgement in judgements]
            filled = list(map(_judged, filled, judgements, results))
        return sorted(filled, key=_by_score)

    @property
    def _near(self) -> int:
        """Tokens behind a hole that its score depends on."""
        return min(NEAR, self._canvas_length // ROOM_SHARE)

    def _judgement(self, attempt: _Attempt, filled: Filled) -> _Judgement:
        """Return the request that reads in one step what is behind filled holes."""
        (messages, options), spans = attempt.request, attempt.placed.spans
        pins = dict(options["pins"])
        wanted = {last + i: pins.pop(last + i) for _, last in spans for i in range(self._near) if last + i in pins}
        for (first, _), (_, token_ids) in zip(spans, filled.holes, strict=True):
            pins |= dict(enumerate(token_ids, start=first))
        changed: dict[str, Any] = {
            "pins": sorted(pins.items()),
            "text_only": (),
            "seed_canvas": None,
            "max_denoising_steps": 1,
            "logprob_candidates": tuple(sorted(set(wanted.values()))),
            "ignore_eos": True,
            "guard_empty": False,
        }
        return _Judgement((messages, {**options, **changed}), wanted)

    def _attempt(
        self, texts: Sequence[str], holes: Sequence[Hole], *, ends: bool = True, steps: int | None = None
    ) -> _Attempt:
        """Return the request for texts with a hole between each two of them."""
        tokenizer = self._tokenizer
        check_integer("length", sum(hole.length for hole in holes), 0, self._context)
        head, first = ("", texts[0]) if self._messages is not None else split_control(tokenizer, texts[0])
        split = [split_spaces(tokenizer, text) for text in (first, *texts[1:-1])]
        encoded = [tokenizer.encode_letters(text) for text in (*(kept for kept, _ in split), texts[-1])]
        pieces: list[Sequence[int] | Hole] = [encoded[0]]
        for hole, token_ids in zip(holes, encoded[1:], strict=True):
            pieces += [hole, token_ids]
        borders = clean_borders(tokenizer, split[0][0], encoded[0])
        end_id = self._end_id(head) if ends and self._knows_the_end(head, texts[-1]) else None
        placed = place_pieces(pieces, self._canvas_length, end_id, borders)
        lead = tokenizer.detokenize(encoded[0][: placed.lead])
        return _Attempt(self._request(head, lead, placed.options, steps), placed, tuple(spaces for _, spaces in split))

    def _request(self, head: str, lead: str, given: Mapping[str, Any], steps: int | None) -> Asked:
        """Return a request for an answer that `lead` is the beginning of."""
        messages, for_prompt = self._prompt(head, lead)
        options = {**self._options, **for_prompt, **given, "logprobs": 0}
        return messages, options if steps is None else options | {"max_denoising_steps": steps}

    def _prompt(self, head: str, lead: str) -> Asked:
        """Return messages and options for a prompt that ends with some text of the answer."""
        if self._messages is not None:
            return self._messages, {"prefill_response": lead or None, "literal": True}
        return (head + lead if (head + lead).strip() else (self._tokenizer.bos_token or "") + lead), {
            "raw_prompt": True
        }

    def _knows_the_end(self, head: str, last: str) -> bool:
        """Tell whether the text ends with its last part: an answer does, and one that has nothing behind its hole."""
        return self._messages is not None or SPELLINGS["turn_open"] in head or not last

    def _end_id(self, head: str) -> int | None:
        """Return the token that ends a text."""
        special = self._tokenizer.special
        in_turn = self._messages is not None or SPELLINGS["turn_open"] in head
        wanted = [special.turn_close if in_turn else special.eos, *sorted(self._end_ids)]
        return next((token_id for token_id in wanted if token_id in self._end_ids), None)

    def _read(self, attempt: _Attempt, result: Result) -> Filled:
        """Read an answer. Raise `ValueError` for one that has no room for its holes."""
        spans, stop = attempt.placed.spans, attempt.placed.stop
        logprobs = [each.logprob for each in result.logprobs or ()]
        if result.finish_reason == "cancelled":
            raise RuntimeError("a request was cancelled before its hole was filled")
        if len(logprobs) < stop:
            tokens = sum(last - first for first, last in spans)
            raise ValueError(f"length: got holes of {tokens} tokens, expected a text that fits the context")
        if result.end_logprob is not None:
            logprobs.append(result.end_logprob.logprob)
        scored = {position for first, last in spans for position in range(first, last + self._near)}
        holes = []
        for (first, last), spaces in zip(spans, attempt.spaces, strict=True):
            token_ids = result.token_ids[first:last]
            holes.append((self._tokenizer.detokenize(token_ids).removeprefix(spaces), token_ids))
        score = sum(logprobs[position] for position in scored if position < len(logprobs))
        settled = [each.settled_logprob for each in result.logprobs or ()]
        hole_score = sum(settled[position] for first, last in spans for position in range(first, last))
        return Filled(tuple(holes), score, hole_score, sum(result.stats.denoising_steps), result)


def _check_texts(name: str, texts: Sequence[str]) -> None:
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}: got {texts!r:.80}, expected texts")


def _by_score(filled: Filled) -> float:
    return -filled.score


def _judged(filled: Filled, judgement: _Judgement, result: Result) -> Filled:
    """Add the log-probabilities of what is behind the holes to those of the holes."""
    candidates = judgement.request[1]["logprob_candidates"]
    read = result.logprobs or ()
    wanted = judgement.wanted.items()
    behind = sum(read[at].candidates[candidates.index(token_id)] for at, token_id in wanted if at < len(read))
    return replace(filled, score=filled.hole_score + behind, steps=filled.steps + sum(result.stats.denoising_steps))


def _steps(each: Sequence[Filled]) -> int:
    return sum(filled.steps for filled in each)
