"""The encoder role over a prompt or a committed canvas: chunk by chunk into the cache, images as soft tokens.

Chunks lie at fixed absolute positions and never cut an image, whose soft tokens see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from .cache import PrefixCache
from .images import ImagePatches
from .masks import chunks
from .media import ImageBlock
from .model import DiffusionGemma, SoftBlock

EmbedImage = Callable[[ImagePatches], mx.array]  # soft tokens [T, D], evaluated


def encode(
    model: DiffusionGemma,
    cache: PrefixCache,
    token_ids: tuple[int, ...],
    step_size: int,
    blocks: Sequence[ImageBlock] = (),
    embed_image: EmbedImage | None = None,
) -> Iterator[int]:
    """Append tokens to a cache, cut at absolute multiples of `step_size` but not in an image; yield how many are done.

    Images are looked at when their chunk comes, one by one.
    """
    for done, _ in _chunks(model, cache, token_ids, step_size, blocks, embed_image):
        mx.eval(cache.arrays())
        mx.clear_cache()
        yield done


def encode_and_read(
    model: DiffusionGemma,
    cache: PrefixCache,
    token_ids: tuple[int, ...],
    step_size: int,
    blocks: Sequence[ImageBlock] = (),
    embed_image: EmbedImage | None = None,
) -> Iterator[mx.array]:
    """Do what `encode` does, and yield the hidden states [L, D] of each chunk, evaluated."""
    for _, hidden in _chunks(model, cache, token_ids, step_size, blocks, embed_image, is_read=True):
        mx.eval(hidden, cache.arrays())
        mx.clear_cache()
        yield hidden[0]


def _chunks(
    model: DiffusionGemma,
    cache: PrefixCache,
    token_ids: tuple[int, ...],
    step_size: int,
    blocks: Sequence[ImageBlock],
    embed_image: EmbedImage | None,
    *,
    is_read: bool = False,
) -> Iterator[tuple[int, mx.array]]:
    """Encode chunk by chunk; yield how many tokens are done, and hidden states [1, L, D]. Nothing is evaluated."""
    first = cache.offset
    spans = [block.span for block in blocks]
    if split := next((span for span in spans if span[0] < first < span[1]), None):
        raise ValueError(f"the cache ends at {first}, inside an image at {split[0]} to {split[1]}; expected a border")
    for start, stop in chunks(first, first + len(token_ids), step_size, spans):
        images = []
        for block in blocks:
            if start <= block.start < stop:
                assert embed_image is not None
                images.append(SoftBlock(block.start - start, embed_image(block.image)))
        ids = mx.array(token_ids[start - first : stop - first])
        yield stop - first, model.prefill(ids, cache, images, lazy=False, is_read=is_read)
