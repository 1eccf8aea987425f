"""Parts of the model that know that other ranks hold the rest: experts, and the vocabulary with its streaming pass.

Rank r of n holds some of the experts, and some rows of the tied table. Hidden states are the same on every rank.

    experts       each rank runs the rows that chose its experts; one sum per layer
    embedding     each rank looks up its own tokens, zeros elsewhere; one sum
    canvas        logits of its own tokens only, which never leave the rank:
                  maximum ─▶ weights exp(logit - maximum) ─▶ masses of all ranks ─▶ entropy, and whose token is drawn
                  argmax: the lowest id among the ranks that have the maximum; soft embeddings: one sum [C, D]

What decides how a canvas goes on (entropy, argmax, draw) is bit for bit the same on every rank: it is the sum, the
minimum or rank 0's own of what the ranks have.

Projections that need no more than one sum behind them are MLX's own layers; see `sharding.py`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .elementwise import exp
from .moe import Experts, run_experts
from .ranks import Ranks, Share
from .vocabulary import (
    BANNED_LOGIT,
    CanvasReading,
    DrawShape,
    TextOnly,
    chunk_rows,
    draw_tokens,
    largest,
    processed_logits,
    read_in_chunks,
    row_sums,
    soft_embed,
    text_only_logits,
)

ONE = 0x3F800000  # the bits of 1.0 in float32; those of floats from 0 on are in the order of the numbers


class DividedExperts(nn.Module):
    """Experts `share` of all: run the rows that chose them, weight, sum back per token, sum over ranks.

    A call waits for the host once, to learn which rows those are.
    """

    def __init__(self, experts: Experts, share: Share, ranks: Ranks) -> None:
        super().__init__()
        self.gate_up_proj = experts.gate_up_proj  # [E / n, 2F, D]
        self.down_proj = experts.down_proj  # [E / n, D, F]
        self._share = share
        self._ranks = ranks

    def __call__(self, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:
        """Run the chosen experts on x [T, D] with indices [T, A] and weights [T, A]; return [T, D]."""
        T, A = indices.shape
        flat = indices.flatten()
        order = mx.argsort(flat)
        borders = mx.array([self._share.start, self._share.stop], dtype=flat.dtype)
        # Waiting for two numbers costs less than running all rows on every rank.
        counts = (flat[None] < borders[:, None]).sum(axis=1)
        mx.eval(counts)
        start, stop = np.array(counts).tolist()
        own = order[start:stop]
        outputs = mx.zeros((T * A, x.shape[-1]), x.dtype)
        if start < stop:
            rows, experts = x[own // A][:, None, :], flat[own] - self._share.start
            outputs[own] = run_experts(self.gate_up_proj, self.down_proj, rows, experts)[:, 0]
        part = (outputs.reshape(T, A, -1) * weights[..., None].astype(outputs.dtype)).sum(axis=1)
        return self._ranks.all_sum(part)


class DividedEmbedding(nn.Module):
    """Rows `share` of the tied table."""

    def __init__(self, part: nn.Module, share: Share, ranks: Ranks) -> None:
        super().__init__()
        self.part = part  # an embedding, plain or quantised, of [V / n, D]
        self.share = share
        self.ranks = ranks

    def __call__(self, token_ids: mx.array) -> mx.array:
        """Return the rows of token ids [...], which every rank has; [..., D]."""
        rows, is_own = self.own_rows(token_ids)
        found = self.part(rows)
        return self.ranks.all_sum(mx.where(is_own[..., None], found, mx.zeros_like(found)))

    def own_rows(self, token_ids: mx.array) -> tuple[mx.array, mx.array]:
        """Return the row of the part for token ids [...], any row for those of other ranks; and which are its own."""
        is_own = (token_ids >= self.share.start) & (token_ids < self.share.stop)
        return mx.where(is_own, token_ids - self.share.start, 0), is_own

    def values_at(self, logits: mx.array, token_ids: mx.array) -> mx.array:
        """Return numbers [R, n] at token ids [R, n] out of [R, V] that are divided: every rank gives its [R, V / n]."""
        rows, is_own = self.own_rows(token_ids)
        found = mx.take_along_axis(logits, rows, axis=-1)
        return self.ranks.all_sum(mx.where(is_own, found, mx.zeros_like(found)))

    def best(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """Return the highest logit of each row and its token id, of equals the lowest, from every rank's [R, V / n]."""
        highest = logits.max(axis=-1)
        of_all = self.ranks.all_max(highest)
        own = mx.argmax(logits, axis=-1).astype(mx.int32) + self.share.start
        return of_all, self.ranks.all_min(mx.where(highest == of_all, own, self.share.of))


def vocabulary_rows(embedding: Any) -> int:
    """Return how many tokens of the vocabulary a rank reads at most: all of them for a table that is whole."""
    if isinstance(embedding, DividedEmbedding):
        return -(-embedding.share.of // embedding.ranks.size)
    return int(embedding["weight"].shape[0])


def own_logits(hidden: mx.array, embedding: Any, softcap: float, temperature: mx.array) -> mx.array:
    """Return what `processed_logits` gives, for a divided table of its own rows; [R, V / n] float32."""
    part = embedding.part if isinstance(embedding, DividedEmbedding) else embedding
    return processed_logits(hidden, part, softcap, temperature)


def read_divided_canvas(
    hidden: mx.array,
    embedding: DividedEmbedding,
    softcap: float,
    temperature: mx.array,
    uniforms: mx.array,
    shape: DrawShape,
    banned: mx.array | None = None,
    text_only: TextOnly | None = None,
    chunk_elements: int | None = None,
) -> CanvasReading:
    """Read one canvas as `vocabulary.read_canvas` does, which says what the arguments are."""
    own = slice(embedding.share.start, embedding.share.stop)

    def read(part: mx.array, rows: slice) -> CanvasReading:
        logits = own_logits(part, embedding, softcap, temperature)
        if banned is not None and rows.start == 0:
            is_banned = (mx.arange(own.start, own.stop)[None] == banned[:, None]).any(axis=0)
            logits[0] = mx.where(is_banned, BANNED_LOGIT, logits[0])
        if text_only is not None:
            logits = text_only_logits(logits, TextOnly(text_only.positions, text_only.control[own]), rows)
        return _read_rows(logits, embedding, uniforms[rows], shape, hidden.dtype)

    return read_in_chunks(hidden, chunk_rows(vocabulary_rows(embedding), chunk_elements), read)


def _read_rows(
    logits: mx.array, embedding: DividedEmbedding, uniforms: mx.array, shape: DrawShape, dtype: mx.Dtype
) -> CanvasReading:
    """Read processed logits [R, V / n] float32; `dtype` is the model's."""
    ranks = embedding.ranks
    highest, argmax = embedding.best(logits)
    centred = logits - highest[:, None]
    weights = exp(centred)
    drawn_from = weights if shape.greedy else _narrow(weights, shape, ranks)
    signal = weights
    if dtype != mx.float32:  # Oracle: as in `vocabulary.py`; rounding keeps the order, so the maximum stays one
        stored = logits.astype(dtype).astype(mx.float32)
        signal = exp(stored - highest.astype(dtype).astype(mx.float32)[:, None])
    sums = [row_sums(weights), row_sums(weights * centred), row_sums(drawn_from), row_sums(signal)]
    of_ranks = ranks.all_gather(mx.stack(sums))  # [n, 4, R]
    total, weighted, _, signals = of_ranks.sum(axis=0)
    entropy = mx.log(total) - weighted / total
    draw = mx.zeros_like(entropy)
    if not shape.greedy:
        draw = _own_draw(drawn_from, uniforms, of_ranks[:, 2], embedding)
    # Devices may round a logarithm apart, and ranks must never disagree: all take what rank 0 has computed.
    computed = mx.stack([entropy, 1 / total]) * (ranks.rank == 0)
    draw, entropy, confidence = ranks.all_sum(mx.concatenate([draw[None], computed]))
    draw = argmax if shape.greedy else draw.astype(mx.int32)
    if dtype == mx.float32:
        soft = ranks.all_sum(soft_embed(embedding.part, weights)) / total[:, None]
    else:
        soft = ranks.all_sum(soft_embed(embedding.part, (signal / signals[:, None]).astype(dtype)))
    return CanvasReading(entropy, argmax, draw, soft, confidence, mx.zeros(draw.shape, dtype=mx.bool_))


def _own_draw(weights: mx.array, uniforms: mx.array, masses: mx.array, embedding: DividedEmbedding) -> mx.array:
    """Return the ids that are drawn from this rank's weights [R, V / n], 0 where another rank's are; [R] float32.

    A target in the running mass of the ranks [n, R] falls to one rank, and what is left of it to one of its tokens; ids
    are exact in float32, being below 2^24.
    """
    rank = embedding.ranks.rank
    running = mx.cumsum(masses, axis=0)
    target = uniforms * running[-1]
    is_before = (running <= target[None]) & (running < running[-1:])  # never one without mass
    is_own = is_before.sum(axis=0) == rank
    before = mx.where(is_before, masses, 0.0).sum(axis=0)
    rest = mx.maximum(target - before, 0) / mx.maximum(masses[rank], 1e-38)
    own = draw_tokens(weights, rest) + embedding.share.start
    return mx.where(is_own, own, 0).astype(mx.float32)


def _narrow(weights: mx.array, shape: DrawShape, ranks: Ranks) -> mx.array:
    """Zero the weights [R, V / n] (maximum 1 over all ranks) that top-k, top-p or min-p leave out."""
    if not shape.narrows:
        return weights
    threshold = mx.zeros((weights.shape[0], 1))
    if shape.min_p:
        threshold = mx.maximum(threshold, shape.min_p)
    if shape.top_k:
        threshold = mx.maximum(threshold, _kth_largest(weights, shape.top_k, ranks))
    if shape.top_p is not None and shape.top_p < 1:
        threshold = mx.maximum(threshold, _nucleus_edge(weights, shape.top_p, ranks))
    return mx.where(weights >= threshold, weights, 0.0)


def _kth_largest(weights: mx.array, k: int, ranks: Ranks) -> mx.array:
    """Return the k-th largest weight of each row over all ranks, 0 where there are fewer; [R, 1]."""
    own = largest(weights, min(k, weights.shape[-1]))
    own = mx.pad(own, [(0, 0), (0, k - own.shape[-1])])
    candidates = ranks.all_gather(own).swapaxes(0, 1).reshape(weights.shape[0], -1)
    return largest(candidates, k).min(axis=-1, keepdims=True)


def _nucleus_edge(weights: mx.array, top_p: float, ranks: Ranks) -> mx.array:
    """Return the largest threshold of each row from which on weights up make `top_p` of the mass; [R, 1].

    Sorting would need the weights of all ranks in one place. The bits of the threshold are found by halves instead,
    each by one sum over the ranks of one number per row.
    """

    def mass_from(threshold: mx.array) -> mx.array:
        return ranks.all_sum(row_sums(mx.where(weights >= threshold.view(mx.float32), weights, 0.0)))[:, None]

    low = mx.zeros((weights.shape[0], 1), mx.uint32)  # enough mass from here on
    high = mx.full(low.shape, ONE + 1, mx.uint32)  # and not from here
    enough = top_p * mass_from(low)
    for _ in range(ONE.bit_length() + 1):
        middle = low + (high - low) // 2
        has_enough = mass_from(middle) >= enough
        low, high = mx.where(has_enough, middle, low), mx.where(has_enough, high, middle)
    return low.view(mx.float32)
