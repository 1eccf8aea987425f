"""Who may attend to whom, and how a prompt is cut into chunks and query blocks.

The encoder role is causal. A token at position q in a sliding layer sees the `sliding_window` keys q - window + 1 .. q:

    window 3         keys 0 1 2 3 4              The decoder role has no mask at all: every canvas token sees the
    query 2               1 1 1 . .              whole prefix view of its layer (all of it in full layers, the last
    query 3               . 1 1 1 .              `sliding_window - 1` tokens in sliding layers) and the whole canvas:
    query 4               . . 1 1 1
                                                     prefix  canvas
                                                 C   1 1 1   1 1 1 1
                                                 C   1 1 1   1 1 1 1

Queries are taken in blocks, so no array grows with the square of the prompt.

Reference: `create_masks_for_generate` and `create_diffusion_decoder_attention_mask` in transformers.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

MAX_QUERY_BLOCK = 512
MIN_QUERY_BLOCK = 16
MAX_SCORES = 1 << 27  # heads x queries x keys of one block: 256 MiB of bfloat16 scores


def causal_mask(queries: int, keys: int, sliding_window: int | None) -> mx.array:
    """Return a bool mask [queries, keys], True where attention is allowed; the last key belongs to the last query."""
    key_of_query = mx.arange(keys - queries, keys)[:, None]
    key = mx.arange(keys)[None, :]
    allowed = key <= key_of_query
    if sliding_window is not None:
        allowed = allowed & (key > key_of_query - sliding_window)
    return allowed


def query_block(heads: int, keys: int) -> int:
    """Return how many queries to score at once: a power of two for which the scores stay below `MAX_SCORES`."""
    block = MAX_QUERY_BLOCK
    while block > MIN_QUERY_BLOCK and heads * block * keys > MAX_SCORES:
        block //= 2
    return block


def chunks(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut positions [start, stop) at absolute multiples of `step`.

    Borders do not depend on where the uncached part begins, so a cached prefix and a cold one are computed alike.
    """
    while start < stop:
        border = min(stop, (start // step + 1) * step)
        yield start, border
        start = border


def causal_attention(queries: mx.array, keys: mx.array, values: mx.array, sliding_window: int | None) -> mx.array:
    """Attend causally, block of queries by block.

    Args:
        queries: [1, N, L, H], unscaled (Gemma 4 attends with scale 1).
        keys: [1, K, S, H] with S >= L; the last L keys belong to the queries.
        values: [1, K, S, H].
        sliding_window: keys a query sees, itself included; None for all earlier ones.

    Returns:
        [1, N, L, H].
    """
    _, N, L, _ = queries.shape
    S = keys.shape[2]
    reach = S if sliding_window is None else min(S, sliding_window + MAX_QUERY_BLOCK)
    block = query_block(N, reach)
    outputs = []
    for start in range(0, L, block):
        stop = min(L, start + block)
        last = S - L + stop
        first = 0 if sliding_window is None else max(0, S - L + start - sliding_window + 1)
        mask = causal_mask(stop - start, last - first, sliding_window)
        outputs.append(
            mx.fast.scaled_dot_product_attention(
                queries[:, :, start:stop], keys[:, :, first:last], values[:, :, first:last], scale=1.0, mask=mask
            )
        )
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def canvas_attention(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Attend from canvas tokens [1, N, C, H] to every key [1, K, S + C, H]; return [1, N, C, H]."""
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0)
