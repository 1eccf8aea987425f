"""Typed decisions on `tiny`: right answers, calibration and cost, beside generating the answer.

    python benchmarks/decisions.py
    python benchmarks/decisions.py --questions 200 --forwards 1 2 4 --families yes_no capitals

The questions are held-out prompts of `tiny`'s training families, which a checkout has in `tools/tiny`; a family that
the checkout does not have is left out. `sums` asks for results without the working that `tiny` learned to write: there
it has to guess, so there is something to calibrate. Half of the questions fit the calibration temperature, the other
half is measured, with and without it.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from mlx_diffusiongemma.calibration import expected_calibration_error, fit_temperature, normalise
from mlx_diffusiongemma.decisions import decide
from mlx_diffusiongemma.pipeline import Pipeline, load
from mlx_diffusiongemma.questions import Choice, Labelled, Score, YesNo

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "tiny"))

import data
import words
from pictures import paint
from sights import PLACES

DISTRACTORS = 3


@dataclass(frozen=True)
class Item:
    """A question with its right answer: the index of the label, and the text that a generated answer begins with."""

    messages: list[dict[str, Any]]
    question: Labelled
    right: int
    images: tuple[Any, ...] = ()

    @property
    def expected(self) -> str:
        """What a right answer begins with."""
        return self.question.worded(self.question.labels[self.right])


# -- families ---------------------------------------------------------------------------------------------------------


def _choice(rng: Random, right: str, wrong: Sequence[str], answer: str) -> tuple[Choice, int]:
    labels = [right, *rng.sample([each for each in wrong if each != right], DISTRACTORS)]
    rng.shuffle(labels)
    return Choice(options=labels, answer=answer, show_options=False), labels.index(right)


def _yes_no(rng: Random, example: data.Example) -> tuple[Labelled, int] | None:
    return YesNo(answer="{}.", show_options=False), ("Yes.", "No.").index(example.answer)


def _capital(rng: Random, example: data.Example) -> tuple[Labelled, int] | None:
    found = re.fullmatch(r"The capital of (.*) is (.*)\.", example.answer)
    if found is None:
        return None
    return _choice(rng, found[2], list(words.CAPITALS.values()), f"The capital of {found[1]} is {{}}.")


def _first_word(rng: Random, example: data.Example) -> tuple[Labelled, int] | None:
    given = example.answer.removeprefix("Sorted: ").split(", ")
    labels = rng.sample(given, len(given))
    return Choice(options=labels, answer="Sorted: {}, ", show_options=False), labels.index(given[0])


def _sum(rng: Random, example: data.Example) -> tuple[Labelled, int] | None:
    found = re.search(r"So (.*) = (\d+)\.", example.answer)
    if found is None:
        return None
    result = int(found[2])
    near = [str(each) for each in range(max(0, result - 12), result + 13)]
    return _choice(rng, found[2], near, f"So {found[1]} = {{}}.")


def _small_sum(rng: Random, example: data.Example) -> tuple[Labelled, int] | None:
    result = int(example.answer)
    return _choice(rng, example.answer, [str(each) for each in range(max(0, result - 5), result + 6)], "{}")


def _count(rng: Random, example: data.Example) -> tuple[Labelled, int] | None:
    return Score(levels=range(1, 5), show_options=False), int(example.answer) - 1


def _digit(rng: Random, example: data.Example) -> tuple[Labelled, int] | None:
    return Choice(options=list("0123456789"), show_options=False), int(example.answer)


def _place(rng: Random, example: data.Example) -> tuple[Labelled, int] | None:
    labels = [place.rstrip(".") for place in PLACES]
    return Choice(options=labels, answer="{}.", show_options=False), labels.index(example.answer.rstrip("."))


MAKERS = {
    "yes_no": ("yes_no", _yes_no),
    "capitals": ("capitals", _capital),
    "first_word": ("sort_words", _first_word),
    "small_sums": ("small_sums", _small_sum),
    "sums": ("worked_sums", _sum),
    "picture_counts": ("picture_counts", _count),
    "picture_digits": ("picture_digits", _digit),
    "picture_positions": ("picture_positions", _place),
}


def items(family: str, count: int) -> Iterator[Item]:
    """Yield so many different questions of a family, none of them trained on."""
    drawn, make = MAKERS[family]
    rng, seen = Random(f"decisions/{family}"), set()
    while count:
        example = data.draw(rng, drawn)
        made = make(rng, example) if example.held_out and example.key not in seen else None
        if made is None:
            continue
        seen.add(example.key)
        count -= 1
        yield Item(example.messages, *made, tuple(paint(picture) for picture in example.pictures))


def has_family(family: str) -> bool:
    """Tell whether this checkout can draw a family."""
    return MAKERS[family][0] in data.QUESTIONS.keys() | data.SIGHTS.keys()


# -- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """Decisions on some questions."""

    logprobs: list[tuple[float, ...]]
    right: list[int]
    forwards: float  # mean
    rows: float  # mean
    seconds: float  # mean

    def figures(self, temperature: float) -> tuple[float, float, float]:
        """Return the share of right answers, the mean probability of what was chosen, and the calibration error."""
        chances = [normalise(row, temperature) for row in self.logprobs]
        is_right = [row.index(max(row)) == index for row, index in zip(chances, self.right, strict=True)]
        sure = [max(row) for row in chances]
        error = expected_calibration_error(sure, is_right)
        return sum(is_right) / len(is_right), sum(sure) / len(sure), error


def read(pipeline: Pipeline, asked: Sequence[Item], forwards: int, reads: int) -> Reading:
    """Decide on questions, one after the other; nothing is known of their prompts."""
    pipeline.prefixes.clear()
    decisions, started = [], time.perf_counter()
    for item in asked:
        images = list(item.images) or None
        decisions.append(decide(pipeline, item.question, item.messages, forwards=forwards, reads=reads, images=images))
    seconds = (time.perf_counter() - started) / len(asked)
    count = len(decisions)
    return Reading(
        [decision.logprobs for decision in decisions],
        [item.right for item in asked],
        sum(decision.forwards for decision in decisions) / count,
        sum(decision.rows for decision in decisions) / count,
        seconds,
    )


def generate(pipeline: Pipeline, asked: Sequence[Item]) -> tuple[float, float, float]:
    """Generate the answers; return the share of right ones, mean denoising steps, and mean seconds."""
    pipeline.prefixes.clear()
    right, steps, started = 0, 0, time.perf_counter()
    for item in asked:
        result = pipeline.generate(item.messages, seed=0, max_tokens=64, images=list(item.images) or None)
        right += result.text.startswith(item.expected) or (" " + item.expected) in result.text
        steps += sum(result.stats.denoising_steps)
    return right / len(asked), steps / len(asked), (time.perf_counter() - started) / len(asked)


def report(pipeline: Pipeline, family: str, count: int, forwards: Sequence[int], reads: int) -> Iterator[str]:
    """Yield the rows of the table for a family."""
    asked = list(items(family, 2 * count))
    fitting, measured = asked[:count], asked[count:]
    if measured[0].images:
        read(pipeline, measured, 1, 1)  # the tower remembers pictures, and whoever came first would pay for it
    for each in forwards:
        fit = read(pipeline, fitting, each, reads)
        temperature = fit_temperature(fit.logprobs, fit.right)
        got = read(pipeline, measured, each, reads)
        accuracy, sure, error = got.figures(1.0)
        _, calibrated_sure, calibrated_error = got.figures(temperature)
        yield (
            f"| {family} | {each} | {accuracy:.3f} | {sure:.3f} | {error:.3f} | {temperature:.2f} | "
            f"{calibrated_sure:.3f} | {calibrated_error:.3f} | "
            f"{got.forwards:.1f} | {got.rows:.1f} | {got.seconds:.3f} |"
        )
    accuracy, steps, seconds = generate(pipeline, measured)
    yield f"| {family} | generated | {accuracy:.3f} | | | | | | {steps:.1f} | 1.0 | {seconds:.3f} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--families", nargs="+", choices=list(MAKERS), default=list(MAKERS))
    parser.add_argument("--questions", type=int, default=50, help="of every family, and as many to calibrate with")
    parser.add_argument("--forwards", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--reads", type=int, default=1)
    args = parser.parse_args(argv)
    pipeline = load(args.model, dtype="float32")
    print("| family | forwards | right | mean p | ECE | T | mean p at T | ECE at T | steps | rows | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for family in args.families:
        if not has_family(family):
            print(f"{family}: this checkout cannot draw it", file=sys.stderr)
            continue
        for row in report(pipeline, family, args.questions, args.forwards, args.reads):
            print(row, flush=True)


if __name__ == "__main__":
    main()
