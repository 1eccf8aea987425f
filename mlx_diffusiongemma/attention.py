"""Attention over a cache: causal for a chunk of the prompt, without a mask for a canvas.

Queries are taken block by block, one after the other, so that the scores that exist at one time do not grow with the
prompt. A long prefix, or a quantised one, is not joined with the keys of the canvas, which would copy it: its scores
are, and one softmax runs over both.

    scores    [ prefix, 8,192 keys at a time | canvas ]   ->   softmax   ->   weights x values, part by part, added
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from .cache import KeysAndValues, QuantizedKeysAndValues, View
from .masks import LARGE_BLOCK, Spans, cached_queries, fits_at_once, query_block, query_blocks

KEY_BLOCK = 8192  # packed keys in one matmul: MLX's CPU back end copies that much of them


def causal_attention(
    queries: mx.array, known: View, sliding_window: int | None, spans: Spans = (), *, lazy: bool = True
) -> mx.array:
    """Attend causally, and within each span both ways.

    Args:
        queries: [1, N, L, H], unscaled (Gemma 4 attends with scale 1).
        known: S >= L keys and values; the last L belong to the queries.
        sliding_window: keys a query sees, itself included; None for all earlier ones.
        spans: images among the L queries, 0 being the first query.
        lazy: compute nothing yet; otherwise large blocks are computed one by one, and their scores freed.

    Returns:
        [1, N, L, H].
    """
    _, N, L, _ = queries.shape
    outputs: list[mx.array] = []
    for block in query_blocks(N, L, known.keys.shape[2], sliding_window, spans):
        rows = _after(queries[:, :, block.start : block.stop], outputs)
        part = known.span(block.first, block.last)
        if isinstance(part, KeysAndValues):
            out = mx.fast.scaled_dot_product_attention(rows, part.keys, part.values, scale=1.0, mask=block.mask)
        else:
            out = joint_attention(rows, list(key_blocks(part)), block.mask)
        outputs.append(out)
        if not lazy and N * (block.stop - block.start) * (block.last - block.first) >= LARGE_BLOCK:
            mx.eval(out)  # MLX hands out memory ahead of the computation, to every block that it knows of
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def canvas_attention(queries: mx.array, prefix: View, canvas: KeysAndValues, *, lazy: bool = True) -> mx.array:
    """Attend from canvas tokens [1, N, C, H] to the whole prefix and the whole canvas; return [1, N, C, H].

    Without `lazy` blocks are computed one by one, as in `causal_attention`.
    """
    _, N, C, _ = queries.shape
    S = prefix.keys.shape[2] + canvas.keys.shape[2]
    outputs: list[mx.array] = []
    if isinstance(prefix, KeysAndValues) and fits_at_once(N, C, S):
        keys = mx.concatenate([prefix.keys, canvas.keys], axis=2)
        values = mx.concatenate([prefix.values, canvas.values], axis=2)
        block = cached_queries(N, S) if mx.default_device() == mx.Device(mx.cpu) else C
        for start in range(0, C, block):
            rows = _after(queries[:, :, start : start + block], outputs)
            outputs.append(mx.fast.scaled_dot_product_attention(rows, keys, values, scale=1.0))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)
    parts = [*key_blocks(prefix), canvas]
    block = query_block(N, S)
    for start in range(0, C, block):
        outputs.append(joint_attention(_after(queries[:, :, start : start + block], outputs), parts))
        if not lazy:
            mx.eval(outputs[-1])
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def _after(queries: mx.array, outputs: Sequence[mx.array]) -> mx.array:
    """Return the queries of a block once the one before is done: MLX would otherwise hold the scores of all blocks."""
    return mx.depends(queries, [outputs[-1]]) if outputs else queries


def key_blocks(view: View) -> Iterator[View]:
    """Cut packed keys into blocks; plain ones are read where they lie."""
    keys = view.keys.shape[2]
    step = KEY_BLOCK if isinstance(view, QuantizedKeysAndValues) else max(1, keys)
    for start in range(0, keys, step):
        yield view.span(start, min(keys, start + step))


def joint_attention(queries: mx.array, parts: Sequence[View], mask: mx.array | None = None) -> mx.array:
    """Attend to the keys of several parts with one softmax (computed in float32); the parts are summed in float32.

    Args:
        queries: [1, N, L, H], unscaled.
        parts: plain or packed, at least one key in all.
        mask: [L, S] bool over the keys of all parts, True where allowed; None for no mask.

    Returns:
        [1, N, L, H].
    """
    _, N, L, H = queries.shape
    K = parts[0].keys.shape[1]
    rows = queries.reshape(1, K, N // K * L, H)  # heads that share keys are rows of one matmul: it reads the keys once
    scores = mx.concatenate([_scores(rows, part) for part in parts], axis=-1)  # [1, K, N / K * L, S]
    if mask is not None:
        by_head = scores.reshape(1, K, N // K, L, scores.shape[-1])
        scores = mx.where(mask, by_head, mx.array(-mx.inf, scores.dtype)).reshape(scores.shape)
    weights = mx.softmax(scores, axis=-1, precise=True)
    summands, start = [], 0
    for part in parts:
        stop = start + part.keys.shape[2]
        summands.append(_weighted_values(weights[..., start:stop], part, H).astype(mx.float32))
        start = stop
    return sum(summands[1:], summands[0]).astype(queries.dtype).reshape(1, N, L, H)


def _packed_matmul(x: mx.array, packed: Sequence[mx.array], head_dim: int, transpose: bool) -> mx.array:
    """Multiply by packed keys or values (words, scales, biases); their shapes and the head size tell how."""
    words, scales, biases = packed
    bits, group_size = 32 * words.shape[-1] // head_dim, head_dim // scales.shape[-1]
    return mx.quantized_matmul(x, words, scales, biases, transpose=transpose, group_size=group_size, bits=bits)


def _scores(rows: mx.array, part: View) -> mx.array:
    """Return rows [1, K, R, H] times keys; [1, K, R, S]."""
    if isinstance(part, KeysAndValues):
        return rows @ part.keys.swapaxes(-1, -2)
    return _packed_matmul(rows, (part.keys, part.key_scales, part.key_biases), rows.shape[-1], transpose=True)


def _weighted_values(weights: mx.array, part: View, head_dim: int) -> mx.array:
    """Return weights [1, K, R, S] times values; [1, K, R, H]."""
    if isinstance(part, KeysAndValues):
        return weights @ part.values
    return _packed_matmul(weights, (part.values, part.value_scales, part.value_biases), head_dim, transpose=False)
