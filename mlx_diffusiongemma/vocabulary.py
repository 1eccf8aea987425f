"""Everything that touches the whole vocabulary, without ever holding canvas x vocabulary numbers.

One pass in row chunks turns the hidden states of a canvas into entropy, argmax, a draw and the soft embeddings of the
next step. A canvas of 256 over 262,144 tokens is 268 MB in float32 and an eager chain holds five such arrays; here a
chunk is read, summed up and dropped before the next one starts.

Reference: `_denoising_step` of transformers' `generation_diffusion_gemma.py` and the soft embeddings of
`DiffusionGemmaDecoderModel.forward`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .elementwise import exp, tanh

DRAW_BLOCK = 512  # tokens per block of the two-level inverse transform
MAX_BLOCK = 64  # tokens per block whose maximum is looked at first
CHUNK_ELEMENTS_CPU = 1 << 19  # 2 MB per float32 temporary, which a cache holds
MIN_CHUNK_ROWS = 16  # of a canvas: fewer would read the head's weights too often
CHUNK_ELEMENTS_GPU = 1 << 25  # 128 rows of the real vocabulary: the head's weights are read twice, not sixteen times
CHUNK_SHARE = 1 << 10  # of the GPU's memory, in bytes per element: five arrays of a chunk take a fiftieth of it
CARRIERS = 64  # tokens that may carry a sparse soft embedding
LEFT_OUT = {  # share of the probability that they may lack
    mx.float32: 2.0**-22,  # as much as two sums of the same numbers differ
    mx.float16: 2.0**-12,  # half of what rounding a probability does
    mx.bfloat16: 2.0**-9,
}
BANNED_LOGIT = -1e9  # finite, because 0 x inf would make the entropy NaN


@dataclass(frozen=True)
class DrawShape:
    """How a draw is narrowed. None switches a rule off. Entropy, argmax and self-conditioning never see this.

    `greedy` proposes the argmax, as temperature 0 asks for.
    """

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    greedy: bool = False

    @property
    def narrows(self) -> bool:
        """Whether any rule is on."""
        return bool(self.min_p or self.top_k or self.top_p is not None)


class TextOnly(NamedTuple):
    """Where on a canvas only text may stand."""

    positions: mx.array  # [C] bool
    control: mx.array  # [V] bool: the tokens that are not text


class CanvasReading(NamedTuple):
    """What one pass over the vocabulary says about a canvas."""

    entropy: mx.array  # [C] float32, nats
    argmax: mx.array  # [C] int32
    draw: mx.array  # [C] int32
    soft_embeddings: mx.array  # [C, D], not yet multiplied by the embedding scale
    confidence: mx.array  # [C] float32, the probability of the argmax
    wide: mx.array  # [C] bool: too many tokens matter for a sparse soft embedding, which is wrong here


def soft_embed(embedding: nn.Module, probabilities: mx.array) -> mx.array:
    """Return probabilities [R, V] @ table [V, D] for a plain or a quantised embedding; [R, D]."""
    if isinstance(embedding, nn.QuantizedEmbedding):
        return mx.quantized_matmul(
            probabilities,
            embedding["weight"],
            embedding["scales"],
            embedding.get("biases"),
            transpose=False,
            group_size=embedding.group_size,
            bits=embedding.bits,
            mode=embedding.mode,
        )
    return probabilities @ embedding["weight"]


def chunk_rows(vocab_size: int, chunk_elements: int | None = None) -> int:
    """Return how many rows [.., V] are read at a time; `chunk_elements` is what they hold, None for the device's."""
    if chunk_elements is None:
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        return max(MIN_CHUNK_ROWS, (CHUNK_ELEMENTS_CPU if on_cpu else _gpu_chunk_elements()) // vocab_size)
    return max(1, chunk_elements // vocab_size)


@functools.cache
def _gpu_chunk_elements() -> int:
    """Size a chunk from the memory that the GPU has, not from what is free: that would let it change results."""
    info = mx.device_info()
    known = (info[key] for key in ("max_recommended_working_set_size", "total_memory") if key in info)
    return min(CHUNK_ELEMENTS_GPU, int(next(known, mx.get_memory_limit())) // CHUNK_SHARE)


def processed_logits(hidden: mx.array, embedding: nn.Module, softcap: float, temperature: mx.array) -> mx.array:
    """Return what the sampler sees for hidden states [R, D]: soft-capped, at the step's temperature; [R, V] float32."""
    logits = embedding.as_linear(hidden).astype(mx.float32)
    return tanh(logits / softcap) * softcap / temperature


def read_canvas(
    hidden: mx.array,
    embedding: nn.Module,
    softcap: float,
    temperature: mx.array,
    uniforms: mx.array,
    shape: DrawShape,
    banned: mx.array | None = None,
    text_only: TextOnly | None = None,
    chunk_elements: int | None = None,
    sparse: bool = False,
) -> CanvasReading:
    """Read one canvas.

    Args:
        hidden: [C, D], after the final norm, in the model's dtype.
        embedding: the tied table.
        softcap: logits become softcap * tanh(logits / softcap).
        temperature: float32 scalar; every output but the argmax depends on it.
        uniforms: [C] float32 in [0, 1), one per draw.
        shape: rules that narrow the draw.
        banned: [n] int32 ids that position 0 may not take, in the self-conditioning signal too; None for no ban.
        text_only: positions that may take no control token, in the self-conditioning signal neither; None for none.
        chunk_elements: rows x vocabulary of one chunk; None for what suits the device.
        sparse: sum up the soft embeddings of the likeliest tokens only, and say where that is not enough.

    Returns:
        `CanvasReading`.
    """

    def read(part: mx.array, rows: slice) -> CanvasReading:
        logits = processed_logits(part, embedding, softcap, temperature)
        if banned is not None and rows.start == 0:
            logits[0, banned] = BANNED_LOGIT
        if text_only is not None:
            logits = text_only_logits(logits, text_only, rows)
        return _read_rows(logits, embedding, uniforms[rows], shape, hidden.dtype, sparse)

    return read_in_chunks(hidden, chunk_rows(embedding["weight"].shape[0], chunk_elements), read)


def read_in_chunks(hidden: mx.array, rows: int, read: Callable[[mx.array, slice], CanvasReading]) -> CanvasReading:
    """Read hidden states [C, D] so many rows at a time, and join what `read` says of each chunk and its rows."""
    readings: list[CanvasReading] = []
    for start in range(0, hidden.shape[0], rows):
        here = slice(start, start + rows)
        part = hidden[here]
        if readings:  # chunk after chunk: without this the graph may run all heads first and hold every chunk's logits
            part = mx.depends(part, list(readings[-1]))
        readings.append(read(part, here))
    if len(readings) == 1:
        return readings[0]
    return CanvasReading(*(mx.concatenate(list(parts)) for parts in zip(*readings, strict=True)))


def read_soft_embeddings(
    hidden: mx.array,
    positions: mx.array,
    embedding: nn.Module,
    softcap: float,
    temperature: mx.array,
    banned: mx.array | None = None,
    text_only: TextOnly | None = None,
) -> mx.array:
    """Return the soft embeddings [n, D] that `read_canvas` gives at some positions [n] of its canvas.

    The arguments are those of `read_canvas`.
    """
    V = embedding["weight"].shape[0]
    rows = chunk_rows(V)
    parts: list[mx.array] = []
    for start in range(0, len(positions), rows):
        here = positions[start : start + rows]
        part = hidden[here]
        logits = processed_logits(mx.depends(part, [parts[-1]]) if parts else part, embedding, softcap, temperature)
        if banned is not None:
            is_banned = mx.zeros((V,), dtype=mx.bool_)
            is_banned[banned] = True
            logits = mx.where((here == 0)[:, None] & is_banned[None], BANNED_LOGIT, logits)
        if text_only is not None:
            logits = text_only_logits(logits, text_only, here)
        weights = exp(logits - logits.max(axis=-1, keepdims=True))
        parts.append(_soft_embeddings(logits, weights, row_sums(weights), embedding, hidden.dtype))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def text_only_logits(logits: mx.array, text_only: TextOnly, rows: slice | mx.array) -> mx.array:
    """Ban control tokens from those of some rows [R] of a canvas, with logits [R, V], that take text only."""
    return mx.where(text_only.positions[rows][:, None] & text_only.control[None], BANNED_LOGIT, logits)


def _read_rows(
    logits: mx.array, embedding: nn.Module, uniforms: mx.array, shape: DrawShape, dtype: mx.Dtype, sparse: bool
) -> CanvasReading:
    """Read processed logits [R, V] float32; `dtype` is the model's."""
    highest, argmax = _maximum(logits)
    centred = logits - highest  # <= 0, so exp never overflows
    weights = exp(centred)
    sums = _block_sums(weights)
    total = sums.sum(axis=-1)  # [R], at least 1
    entropy = mx.log(total) - row_sums(weights * centred) / total
    if shape.greedy:
        draw = argmax
    elif shape.narrows:
        draw = draw_tokens(_narrow(weights, shape), uniforms)
    else:
        draw = _draw(weights, sums, uniforms)
    if sparse:
        soft, wide = _sparse_soft_embeddings(logits, weights, total, embedding, dtype)
    else:
        soft, wide = _soft_embeddings(logits, weights, total, embedding, dtype), mx.zeros(draw.shape, dtype=mx.bool_)
    return CanvasReading(entropy, argmax.astype(mx.int32), draw.astype(mx.int32), soft, 1 / total, wide)


def _soft_embeddings(
    logits: mx.array, weights: mx.array, total: mx.array, embedding: nn.Module, dtype: mx.Dtype
) -> mx.array:
    """Return the mean embeddings [R, D] of logits [R, V], of their exponentials, and of the sums of these [R]."""
    if dtype == mx.float32:
        return soft_embed(embedding, weights) / total[:, None]
    # Oracle: the signal is stored as logits in the model's dtype, then softmaxed in float32 and rounded again.
    stored = logits.astype(dtype).astype(mx.float32)
    return soft_embed(embedding, mx.softmax(stored, axis=-1).astype(dtype))


def _sparse_soft_embeddings(
    logits: mx.array, weights: mx.array, total: mx.array, embedding: nn.Module, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Return soft embeddings [R, D] of the likeliest tokens alone, and where these are too few; [R] bool."""
    ids = likeliest(logits, min(CARRIERS, logits.shape[-1]))  # [R, K]
    carried = mx.take_along_axis(weights, ids, axis=-1)
    wide = total - carried.sum(axis=-1) > LEFT_OUT[dtype] * total
    if dtype == mx.float32:
        probabilities = carried / total[:, None]
    else:
        stored = mx.take_along_axis(logits, ids, axis=-1).astype(dtype).astype(mx.float32)
        probabilities = mx.softmax(stored, axis=-1).astype(dtype)
    return (probabilities[:, None] @ embedding(ids).astype(dtype))[:, 0], wide


def _maximum(rows: mx.array) -> tuple[mx.array, mx.array]:
    """Return the maximum [R, 1] of rows [R, V] and the first index [R] that has it."""
    if rows.shape[-1] % MAX_BLOCK:
        argmax = mx.argmax(rows, axis=-1)
        return mx.take_along_axis(rows, argmax[:, None], axis=-1), argmax
    blocks = _in_blocks(rows)
    maxima = blocks.max(axis=-1)  # a plain maximum is cheap; only the block that has it is searched
    block = mx.argmax(maxima, axis=-1)[:, None]
    inside = mx.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
    return mx.take_along_axis(maxima, block, axis=-1), block[:, 0] * MAX_BLOCK + mx.argmax(inside, axis=-1)


def _in_blocks(rows: mx.array) -> mx.array:
    R, V = rows.shape
    return rows.reshape(R, V // MAX_BLOCK, MAX_BLOCK)


def likeliest(rows: mx.array, count: int) -> mx.array:
    """Return the indices of the largest numbers of rows [R, V]; [R, count], largest first.

    They lie in those blocks whose maxima are largest, so only these are searched.
    """
    R, V = rows.shape
    if not 0 < count < V:
        return mx.broadcast_to(mx.arange(count, dtype=mx.uint32), (R, count))
    if V % MAX_BLOCK or count * MAX_BLOCK >= V:
        return mx.argsort(-rows, axis=-1)[:, :count]
    blocks = _in_blocks(rows)
    best = mx.argsort(-blocks.max(axis=-1), axis=-1)[:, :count]  # [R, count]
    inside = mx.take_along_axis(blocks, best[:, :, None], axis=1).reshape(R, count * MAX_BLOCK)
    ids = (best[:, :, None] * MAX_BLOCK + mx.arange(MAX_BLOCK, dtype=best.dtype)).reshape(R, count * MAX_BLOCK)
    return mx.take_along_axis(ids, mx.argsort(-inside, axis=-1)[:, :count], axis=-1)


def largest(rows: mx.array, count: int) -> mx.array:
    """Return the largest numbers of rows [R, V]; [R, count], largest first."""
    return mx.take_along_axis(rows, likeliest(rows, count), axis=-1)


def row_sums(rows: mx.array) -> mx.array:
    """Sum rows [R, V] in two levels: one float32 sum over 262,144 numbers is off in the fifth digit on the CPU."""
    return _block_sums(rows).sum(axis=-1)


def _block_sums(rows: mx.array) -> mx.array:
    """Return the sums of blocks of `DRAW_BLOCK` [R, V / DRAW_BLOCK], or the rows where V is not made of blocks."""
    R, V = rows.shape
    return rows if V % DRAW_BLOCK else rows.reshape(R, V // DRAW_BLOCK, DRAW_BLOCK).sum(axis=-1)


def _narrow(weights: mx.array, shape: DrawShape) -> mx.array:
    """Zero the weights [R, V] (maximum 1 in each row) that top-k, top-p or min-p leave out; ties at the edge stay."""
    V = weights.shape[-1]
    threshold = mx.zeros((weights.shape[0], 1))
    if shape.min_p:
        threshold = mx.maximum(threshold, shape.min_p)
    if shape.top_k and shape.top_k < V:
        threshold = mx.maximum(threshold, largest(weights, shape.top_k).min(axis=-1, keepdims=True))
    if shape.top_p is not None and shape.top_p < 1:
        descending = -mx.sort(-weights, axis=-1)
        cumulative = mx.cumsum(descending, axis=-1)
        kept = cumulative - descending < shape.top_p * cumulative[:, -1:]
        threshold = mx.maximum(threshold, mx.where(kept, descending, 1.0).min(axis=-1, keepdims=True))
    return mx.where(weights >= threshold, weights, 0.0)


def draw_tokens(weights: mx.array, uniforms: mx.array) -> mx.array:
    """Draw one index per row in proportion to weights [R, V], with uniforms [R] in [0, 1); [R] int."""
    return _draw(weights, _block_sums(weights), uniforms)


def _draw(weights: mx.array, sums: mx.array, uniforms: mx.array) -> mx.array:
    """Draw one index per row in proportion to weights [R, V] with these block sums, by inverse transform; [R] int.

    Two levels, blocks and tokens in the chosen block: a running float32 sum over 262,144 numbers would lose the rare
    tokens, and the block sums cost one pass.

        target u x total   ->  first block whose running sum exceeds it     |....|....|..x.|....|
        what is left of it ->  first token in that block, in the same way              ^^^^
    """
    R, V = weights.shape
    block, rest = _invert(sums, uniforms[:, None] * sums.sum(axis=-1, keepdims=True))
    if V % DRAW_BLOCK:
        return block
    inside, _ = _invert(weights.reshape(R, V // DRAW_BLOCK, DRAW_BLOCK)[mx.arange(R), block], rest)
    return block * DRAW_BLOCK + inside


def _invert(weights: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Return the first index [R] whose cumulative weight exceeds targets [R, 1], and what is left of the target there.

    An index of weight 0 is never returned, whatever rounding does to a target near the total.
    """
    cumulative = mx.cumsum(weights, axis=-1)
    before = (cumulative <= targets) & (cumulative < cumulative[:, -1:])
    index = before.sum(axis=-1)
    rest = targets - mx.where(before, weights, 0.0).sum(axis=-1, keepdims=True)
    return index, mx.maximum(rest, 0)  # scan and sum may round apart
