"""Everything that touches the whole vocabulary, without ever holding canvas x vocabulary numbers.

One pass in row chunks turns the hidden states of a canvas into entropy, argmax, a draw and the soft embeddings of the
next step. A canvas of 256 over 262,144 tokens is 268 MB in float32 and an eager chain holds five such arrays; here a
chunk is read, summed up and dropped before the next one starts.

Reference: `_denoising_step` of transformers' `generation_diffusion_gemma.py` and the soft embeddings of
`DiffusionGemmaDecoderModel.forward`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

DRAW_BLOCK = 512  # tokens per block of the two-level inverse transform
CHUNK_ELEMENTS_CPU = 1 << 22  # 16 rows of the real vocabulary: 17 MB per float32 temporary
CHUNK_ELEMENTS_GPU = 1 << 25  # 128 rows: few enough chunks that the head's weights are read twice, not sixteen times
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
        chunk_elements = CHUNK_ELEMENTS_CPU if mx.default_device() == mx.Device(mx.cpu) else CHUNK_ELEMENTS_GPU
    return max(1, chunk_elements // vocab_size)


def processed_logits(hidden: mx.array, embedding: nn.Module, softcap: float, temperature: mx.array) -> mx.array:
    """Return what the sampler sees for hidden states [R, D]: soft-capped, at the step's temperature; [R, V] float32."""
    logits = embedding.as_linear(hidden).astype(mx.float32)
    return mx.tanh(logits / softcap) * softcap / temperature


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

    Returns:
        `CanvasReading`.
    """
    C = hidden.shape[0]
    V = embedding["weight"].shape[0]
    rows = min(C, chunk_rows(V, chunk_elements))
    readings: list[CanvasReading] = []
    for start in range(0, C, rows):
        part = hidden[start : start + rows]
        if readings:  # chunk after chunk: without this the graph may run all heads first and hold every chunk's logits
            part = mx.depends(part, list(readings[-1]))
        logits = processed_logits(part, embedding, softcap, temperature)
        if banned is not None and start == 0:
            logits[0, banned] = BANNED_LOGIT
        if text_only is not None:
            forbidden = text_only.positions[start : start + rows, None] & text_only.control[None]
            logits = mx.where(forbidden, BANNED_LOGIT, logits)
        readings.append(_read_rows(logits, embedding, uniforms[start : start + rows], shape, hidden.dtype))
    if len(readings) == 1:
        return readings[0]
    return CanvasReading(*(mx.concatenate(list(parts)) for parts in zip(*readings, strict=True)))


def _read_rows(
    logits: mx.array, embedding: nn.Module, uniforms: mx.array, shape: DrawShape, dtype: mx.Dtype
) -> CanvasReading:
    """Read processed logits [R, V] float32; `dtype` is the model's."""
    argmax = mx.argmax(logits, axis=-1)
    centred = logits - mx.take_along_axis(logits, argmax[:, None], axis=-1)  # <= 0, so exp never overflows
    weights = mx.exp(centred)
    total = row_sums(weights)  # [R], at least 1
    entropy = mx.log(total) - row_sums(weights * centred) / total
    draw = argmax if shape.greedy else draw_tokens(_narrow(weights, shape), uniforms)
    if dtype == mx.float32:
        soft = soft_embed(embedding, weights) / total[:, None]
    else:
        # Oracle: the signal is stored as logits in the model's dtype, then softmaxed in float32 and rounded again.
        stored = logits.astype(dtype).astype(mx.float32)
        soft = soft_embed(embedding, mx.softmax(stored, axis=-1).astype(dtype))
    return CanvasReading(entropy, argmax.astype(mx.int32), draw.astype(mx.int32), soft, 1 / total)


def row_sums(rows: mx.array) -> mx.array:
    """Sum rows [R, V] in two levels: one float32 sum over 262,144 numbers is off in the fifth digit on the CPU."""
    return _block_sums(rows).sum(axis=-1)


def _block_sums(rows: mx.array) -> mx.array:
    """Return the sums of blocks of `DRAW_BLOCK` [R, V / DRAW_BLOCK], or the rows where V is not made of blocks."""
    R, V = rows.shape
    return rows if V % DRAW_BLOCK else rows.reshape(R, V // DRAW_BLOCK, DRAW_BLOCK).sum(axis=-1)


def _narrow(weights: mx.array, shape: DrawShape) -> mx.array:
    """Zero the weights [R, V] (maximum 1 in each row) that top-k, top-p or min-p leave out; ties at the edge stay."""
    if not (shape.min_p or shape.top_k or shape.top_p is not None):
        return weights
    V = weights.shape[-1]
    threshold = mx.zeros((weights.shape[0], 1))
    if shape.min_p:
        threshold = mx.maximum(threshold, shape.min_p)
    if shape.top_k and shape.top_k < V:
        threshold = mx.maximum(threshold, mx.topk(weights, shape.top_k, axis=-1).min(axis=-1, keepdims=True))
    if shape.top_p is not None and shape.top_p < 1:
        descending = -mx.sort(-weights, axis=-1)
        cumulative = mx.cumsum(descending, axis=-1)
        kept = cumulative - descending < shape.top_p * cumulative[:, -1:]
        threshold = mx.maximum(threshold, mx.where(kept, descending, 1.0).min(axis=-1, keepdims=True))
    return mx.where(weights >= threshold, weights, 0.0)


def draw_tokens(weights: mx.array, uniforms: mx.array) -> mx.array:
    """Draw one index per row in proportion to weights [R, V], by inverse transform; [R] int.

    Two levels, blocks and tokens in the chosen block: a running float32 sum over 262,144 numbers would lose the rare
    tokens, and the block sums cost one pass.

        target u x total   ->  first block whose running sum exceeds it     |....|....|..x.|....|
        what is left of it ->  first token in that block, in the same way              ^^^^
    """
    R, V = weights.shape
    sums = _block_sums(weights)
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
