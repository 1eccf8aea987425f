"""The entropy-bound sampler as arithmetic on arrays.

Nothing here knows the network, the tokenizer or the clock: time is `noise_proportion`, which falls from 1 to
1 / max_denoising_steps, and every random number comes in as an array.

Reference: transformers `EntropyBoundSampler`, `LinearTemperatureScheduleLogitsProcessor`,
`StableAndConfidentStoppingCriteria`; the acceptance rule is from arXiv 2505.24857.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

MASK_32 = 0xFFFFFFFF


class Noise(NamedTuple):
    """The random numbers of one denoising step of one sequence."""

    uniforms: mx.array  # [C] float32 in [0, 1): which token each position draws
    token_ids: mx.array  # [C] int32: what a position that is not accepted turns into


def noise(seed: int, canvas_index: int, step: int, canvas_length: int, vocab_size: int) -> Noise:
    """Return the random numbers of one step.

    Counter-based (Philox, keyed by the seed, counted by canvas and step): any step can be drawn on its own, and the
    numbers are the same on every back end and whatever else runs. Step 0 gives the first canvas, steps count from 1.
    """
    bits = np.random.Philox(key=seed & (2**64 - 1), counter=[0, 0, step, canvas_index]).random_raw(2 * canvas_length)
    # 24 bits fill a float32 mantissa exactly; a multiply-shift maps 32 bits to [0, V) with bias below V / 2^32.
    uniforms = (bits[:canvas_length] >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    token_ids = ((bits[canvas_length:] & np.uint64(MASK_32)) * np.uint64(vocab_size)) >> np.uint64(32)
    return Noise(mx.array(uniforms), mx.array(token_ids.astype(np.int32)))


def noise_proportion(step: int, max_denoising_steps: int) -> float:
    """Return how much of the schedule lies ahead when `step` runs: 1 at step 1, 1 / max_denoising_steps at the last."""
    return (max_denoising_steps - step + 1) / max_denoising_steps


def temperature(noise_proportion: float, t_min: float, t_max: float) -> float:
    """Return the temperature of the linear schedule, rounded to float32 at each operation as the reference does."""
    span = np.float32(t_max - t_min) * np.float32(noise_proportion)
    return float(np.float32(t_min) + span)


def accept(entropy: mx.array, entropy_bound: float) -> mx.array:
    """Accept the most certain positions whose joint uncertainty stays within the bound.

    In ascending order of entropy, a position is accepted while the sum of the entropies before it is at most
    `entropy_bound`; so at least one position always is.

    Args:
        entropy: [C] float32, nats.
        entropy_bound: nats.

    Returns:
        [C] bool.
    """
    order = mx.argsort(entropy)
    ascending = entropy[order]
    accepted = mx.cumsum(ascending) - ascending <= entropy_bound
    return accepted[mx.argsort(order)]


def renoise(accepted: mx.array, draw: mx.array, token_ids: mx.array) -> mx.array:
    """Return the next canvas [C]: the draw where accepted, fresh noise elsewhere. Nothing is kept from before."""
    return mx.where(accepted, draw, token_ids)


def is_stable(history: mx.array, argmax: mx.array) -> mx.array:
    """Return a scalar bool: argmax [C] equals every row of history [stability_threshold, C]."""
    return mx.all(history == argmax[None, :])


def is_confident(entropy: mx.array, confidence_threshold: float) -> mx.array:
    """Return a scalar bool: the mean entropy of the canvas [C] is strictly below the threshold (nats)."""
    return mx.mean(entropy) < confidence_threshold


def remember(history: mx.array, argmax: mx.array) -> mx.array:
    """Drop the oldest row of history [stability_threshold, C] and add argmax [C]; no rows remember nothing."""
    return mx.concatenate([history, argmax[None, :]], axis=0)[1:]


def empty_history(stability_threshold: int, canvas_length: int) -> mx.array:
    """Return a history [stability_threshold, C] that equals no canvas, so that the first steps cannot be stable."""
    return mx.full((stability_threshold, canvas_length), -1, dtype=mx.int32)
