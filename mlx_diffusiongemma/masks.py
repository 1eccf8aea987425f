"""Who may attend to whom, and how a prompt is cut into chunks and query blocks.

The encoder role is causal. A token at position q in a sliding layer sees the `sliding_window` keys q - window + 1 .. q:

    window 3         keys 0 1 2 3 4              The decoder role has no mask at all: every canvas token sees the
    query 2               1 1 1 . .              whole prefix view of its layer (all of it in full layers, the last
    query 3               . 1 1 1 .              `sliding_window - 1` tokens in sliding layers) and the whole canvas:
    query 4               . . 1 1 1
                                                     prefix  canvas
                                                 C   1 1 1   1 1 1 1
                                                 C   1 1 1   1 1 1 1

In every layer of the encoder role the soft tokens of an image also see each other, the later ones too; the window is
applied first, so an image longer than it is still seen whole (window 3, an image at 1 .. 4):

    keys      0 1 2 3 4 5
    query 1   1 1 1 1 1 .
    query 4   . 1 1 1 1 .
    query 5   . . . 1 1 1

Queries are taken in blocks, so no array grows with the square of the prompt. Below, a span (start, stop) is an image.

Reference: `create_masks_for_generate` and `create_diffusion_decoder_attention_mask` in transformers, as its `generate`
uses them. Oracle: called directly, its encoder builds the mask of the images and does not apply it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

MAX_QUERY_BLOCK = 512
MIN_QUERY_BLOCK = 16
LARGE_BLOCK = 1 << 22  # scores: some milliseconds of work, beside which waiting for it costs nothing
MAX_SCORES = 1 << 26  # heads x queries x keys of one block: 128 MiB of bfloat16 scores; 16 heads x 16 x 262,144
CACHED_SCORES = 1 << 17  # of one block on the CPU, which has no kernel that keeps them to itself: half a megabyte


Spans = Sequence[tuple[int, int]]  # images, in order: (start, stop)


def causal_mask(queries: int, keys: int, sliding_window: int | None, ahead: int = 0) -> mx.array:
    """Return a bool mask [queries, keys], True where allowed; `ahead` keys follow that of the last query."""
    key_of_query = mx.arange(keys - ahead - queries, keys - ahead)[:, None]
    key = mx.arange(keys)[None, :]
    allowed = key <= key_of_query
    if sliding_window is not None:
        allowed = allowed & (key > key_of_query - sliding_window)
    return allowed


def same_image(queries: range, keys: range, spans: Spans) -> mx.array:
    """Return a bool mask [queries, keys], True where both positions are in one span."""
    images = [np.full(len(positions), -1 - side) for side, positions in enumerate((queries, keys))]  # -1 is not -2
    for number, (start, stop) in enumerate(spans):
        for image, positions in zip(images, (queries, keys), strict=True):
            image[max(0, start - positions.start) : max(0, stop - positions.start)] = number
    of_query, of_key = (mx.array(image) for image in images)
    return of_query[:, None] == of_key[None, :]


def fits_at_once(heads: int, queries: int, keys: int) -> bool:
    """Tell whether the scores of all queries may exist at one time."""
    return heads * queries * keys <= MAX_SCORES


def query_block(heads: int, keys: int) -> int:
    """Return how many queries to score at once: a power of two for which the scores stay below `MAX_SCORES`."""
    block = MAX_QUERY_BLOCK
    while block > MIN_QUERY_BLOCK and not fits_at_once(heads, block, keys):
        block //= 2
    return block


def cached_queries(heads: int, keys: int) -> int:
    """Return how many queries of a canvas to score at once on the CPU: a power of two, `MIN_QUERY_BLOCK` at least."""
    return max(MIN_QUERY_BLOCK, 1 << (CACHED_SCORES // (heads * keys)).bit_length() >> 1)


def chunks(start: int, stop: int, step: int, spans: Spans = ()) -> Iterator[tuple[int, int]]:
    """Cut positions [start, stop) at absolute multiples of `step`; a cut inside a span moves behind it.

    Borders do not depend on where the uncached part begins, so a cached prefix and a cold one are computed alike.
    """
    while start < stop:
        border = (start // step + 1) * step
        border = min(stop, next((end for first, end in spans if first < border < end), border))
        yield start, border
        start = border


class QueryBlock(NamedTuple):
    """Queries that are scored at once, and what they may see."""

    start: int  # queries start .. stop
    stop: int
    first: int  # keys first .. last, in the order of the cache
    last: int
    mask: mx.array  # [queries, keys] bool, True where allowed


def query_blocks(
    heads: int, queries: int, keys: int, sliding_window: int | None, spans: Spans = ()
) -> Iterator[QueryBlock]:
    """Cut the queries of a chunk into blocks.

    Args:
        heads: query heads.
        queries: in the chunk.
        keys: at least as many; the last ones belong to the queries.
        sliding_window: keys a query sees, itself included; None for all earlier ones.
        spans: images among the queries, 0 being the first query.
    """
    known = keys - queries  # keys of earlier tokens
    longest = max((stop - start for start, stop in spans), default=0)
    reach = keys if sliding_window is None else min(keys, sliding_window + MAX_QUERY_BLOCK + 2 * longest)
    block = query_block(heads, reach)
    for start in range(0, queries, block):
        stop = min(queries, start + block)
        first, last = -known if sliding_window is None else max(-known, start - sliding_window + 1), stop
        seen = [span for span in spans if span[0] < stop and span[1] > start]
        if seen:
            first, last = min(first, seen[0][0]), max(last, seen[-1][1])
        mask = causal_mask(stop - start, last - first, sliding_window, ahead=last - stop)
        if seen:
            mask = mask | same_image(range(start, stop), range(first, last), seen)
        yield QueryBlock(start, stop, known + first, known + last, mask)
