"""How well probabilities of decisions agree with how often they are right, and one number that makes them agree better.

A temperature T divides the logarithms before they are normalised again: above 1 it makes a model less sure. It is
fitted on questions with known answers and does not change which label is most likely.
Reference: Guo et al. 2017, "On calibration of modern neural networks".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

LOWEST, HIGHEST = 0.05, 20.0  # temperatures that are looked at
GOLDEN = (math.sqrt(5) - 1) / 2


def normalise(logprobs: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Return probabilities that sum to 1 from log-probabilities divided by a temperature above 0."""
    highest = max(logprobs)
    weights = [math.exp((each - highest) / temperature) for each in logprobs]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def expected_calibration_error(confidences: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """Return the mean distance between confidence and share of right answers, over bins of equal width.

    Args:
        confidences: of the label that was chosen, each 0 to 1.
        right: whether it was the right one.
        bins: number of them; an empty one does not count.

    Raises:
        ValueError: no answers, or another number of confidences.
    """
    if not confidences or len(confidences) != len(right):
        raise ValueError(f"got {len(confidences)} confidences and {len(right)} answers, expected as many, 1 at least")
    members: dict[int, list[tuple[float, bool]]] = {}
    for confidence, is_right in zip(confidences, right, strict=True):
        members.setdefault(min(int(confidence * bins), bins - 1), []).append((confidence, is_right))
    gaps = [abs(math.fsum(c - r for c, r in answers)) for answers in members.values()]
    return math.fsum(gaps) / len(confidences)


def negative_log_likelihood(
    logprobs: Sequence[Sequence[float]], right: Sequence[int], temperature: float = 1.0
) -> float:
    """Return the mean surprise in nats at the right labels; arguments are those of `fit_temperature`."""
    surprises = []
    for row, index in zip(logprobs, right, strict=True):
        highest = max(row)
        total = math.log(math.fsum(math.exp((each - highest) / temperature) for each in row))
        surprises.append(total - (row[index] - highest) / temperature)
    return math.fsum(surprises) / len(surprises)


def fit_temperature(logprobs: Sequence[Sequence[float]], right: Sequence[int]) -> float:
    """Return the temperature from 0.05 to 20 at which the right labels surprise least.

    Args:
        logprobs: of every decision, those of its labels at temperature 1.
        right: of every decision, the index of the right label.

    Raises:
        ValueError: no decisions, or another number of right labels.
    """
    if not logprobs or len(logprobs) != len(right):
        raise ValueError(f"got {len(logprobs)} decisions and {len(right)} answers, expected as many, 1 at least")
    # The surprise is convex in 1 / T, so it has one minimum over log T too: golden-section search.
    low, high = math.log(LOWEST), math.log(HIGHEST)
    for _ in range(60):
        left, right_side = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        if negative_log_likelihood(logprobs, right, math.exp(left)) <= negative_log_likelihood(
            logprobs, right, math.exp(right_side)
        ):
            high = right_side
        else:
            low = left
    return math.exp((low + high) / 2)
