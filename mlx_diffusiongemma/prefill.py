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
        model.prefill(mx.array(token_ids[start - first : stop - first]), cache, images, lazy=False)
        mx.eval(cache.arrays())
        mx.clear_cache()
        yield stop - first
