"""Named ways to take fewer steps, and steps of fewer rows, than the published sampler does.

`exact` is the published sampler and the default. Every other policy changes what is generated. docs/performance.md has
what each rule gains and risks, measured on `tiny`, and what is known of the 26B model.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARES = (
    "row_confidence",
    "end_confidence",
    "keep_confidence",
    "exit_confidence",
    "freeze_confidence",
    "first_share",
    "next_share",
    "growth",
)
ROW_SHARE = 8  # a canvas that shrinks keeps a multiple of an eighth of its rows, so that few shapes occur


@dataclass(frozen=True)
class Policy:
    """What a canvas may do besides what the published sampler does. None or False switches a rule off.

    The head of a draft is what stands up to its first end token, or all of it. A probability is that of the draft's
    token at the temperature of the step.

    Attributes:
        row_confidence: end the canvas as soon as every position of the head has at least this probability.
        end_confidence: once the end token has this probability, go on without the rows behind it.
        keep_confidence: keep a token for good once it has this probability (Fast-dLLM, arXiv 2505.22618), at least one
            per step, and end the canvas when all of the head are kept.
        exit_confidence: when the beginning of a canvas, an eighth or more, has this probability in every position and
            did not change in the last step, commit it, and leave the rest to the next canvas.
        plateau_steps: end the canvas when the same positions were accepted for so many steps and their mean entropy is
            below `pacing.PLATEAU_ENTROPY`.
        greedy: accepted positions take the argmax instead of a draw.
        first_share: begin an answer with this share of a canvas, and go on with more of it when a step shows no end.
        next_share: begin every later canvas with this share.
        growth: the share of a canvas that is added then.
        freeze_confidence: do not compute a row again once it has this probability: the others see the keys and values
            that it had (Fast-dLLM's DualCache, arXiv 2505.22618).
        refresh_steps: compute all rows in the first step and in every so many after it; None for the first only.
    """

    name: str
    row_confidence: float | None = None
    end_confidence: float | None = None
    keep_confidence: float | None = None
    exit_confidence: float | None = None
    plateau_steps: int | None = None
    greedy: bool = False
    first_share: float = 1.0
    next_share: float = 1.0
    growth: float = 1.0
    freeze_confidence: float | None = None
    refresh_steps: int | None = None

    def __post_init__(self) -> None:
        for name in SHARES:
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}: got {value!r}, expected a number in (0, 1]")
        for name in ("plateau_steps", "refresh_steps"):
            steps = getattr(self, name)
            if steps is not None and steps < 1:
                raise ValueError(f"{name}: got {steps!r}, expected an integer of at least 1")


EXACT = Policy("exact")
BALANCED = Policy("balanced", row_confidence=0.9, end_confidence=0.9, first_share=0.25)
FAST = Policy(
    "fast",
    row_confidence=0.9,
    end_confidence=0.9,
    freeze_confidence=0.9,
    first_share=0.25,
    next_share=0.5,
    growth=0.5,
)
POLICIES = {policy.name: policy for policy in (EXACT, BALANCED, FAST)}


def find_policy(policy: str | Policy) -> Policy:
    """Return the policy of a name. Raise `ValueError` for a name that there is not."""
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ValueError(f"policy: got {policy!r}, expected one of {', '.join(POLICIES)}")
    return POLICIES[policy]


def rows_of(canvas_length: int, wanted: int) -> int:
    """Return the number of rows, a multiple of an eighth of the canvas, that holds `wanted` of them."""
    share = max(1, canvas_length // ROW_SHARE)
    return min(canvas_length, -(-wanted // share) * share)
