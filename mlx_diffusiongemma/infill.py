"""Fill holes in a text: what stands around them is pinned, and their lengths are chosen by likelihood.

    result = infill(pipeline, "The capital of ", " is Lima.", seed=1)      result.text == "Peru"

Nothing here runs the model. A plan is a generator: it yields requests that can share their steps, is sent their
results, and returns the filled text. `run_plan` runs one on whatever answers requests, a pipeline or an engine.

The score of a candidate is the sum of the log-probabilities of the hole's tokens and of the `NEAR` tokens behind it, as
the model gives them at the last step, pinned or not: in a hole of the wrong length the tokens behind it are unlikely.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .config import check_integer
from .events import FinishReason, Result, Stats
from .holes import Hole, Placed, clean_borders, place_pieces, split_control, split_spaces
from .options import OPTION_NAMES, check_names
from .prepare import SIGHT_OPTIONS, Messages, Preparer

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)  # tokens of a hole that are tried at first
LONGER = 4 / 3  # beyond them each length that is tried is so many times the one before
MAX_LENGTHS = 64  # that one call may try
ROWS = 8  # requests that share their steps
NEAR = 16  # tokens behind a hole that its score depends on
FINALISTS = 3  # lengths that are denoised to the end
SCREENING_STEPS = 2  # of each length before that
OWN_OPTIONS = frozenset({"max_tokens", "pins", "seed_canvas", "text_only", "logprobs", "stop", "guard_empty"})
FILL_OPTIONS = (OPTION_NAMES - OWN_OPTIONS) | SIGHT_OPTIONS | {"template_kwargs", "images", "videos", "tools"}

Request = tuple[Messages, dict[str, Any]]
Lengths = int | Sequence[int] | None


class Answers(Protocol):
    """Whatever answers requests: `Pipeline` and `Engine` do."""

    @property
    def preparer(self) -> Preparer:
        """What prepares requests."""

    def generate_each(self, requests: Sequence[tuple[Messages, Mapping[str, Any]]]) -> list[Result]:
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
        finish_reason: "stop", or "cancelled".
        seed: of the random numbers.
        canvas_steps: denoising steps, counted per canvas, of all candidates.
        stats: of the candidate that was chosen.
    """

    text: str
    full_text: str
    token_ids: tuple[int, ...]
    length: int
    candidates: tuple[Candidate, ...]
    finish_reason: FinishReason
    seed: int
    canvas_steps: int
    stats: Stats = field(repr=False)


@dataclass(frozen=True)
class FillResult:
    """A text whose holes are filled: `holes`, in order, and the whole `text`."""

    text: str
    holes: tuple[InfillResult, ...]


InfillPlan = Generator[list[Request], list[Result], InfillResult]
FillPlan = Generator[list[Request], list[Result], FillResult]
