"""Soft tokens of images, each computed once: a second question about a picture does not run the vision tower again.

They are remembered by content (the patches and where each lies, so also the budget that the image was resized to), in
bounded memory that gives way to requests, the least recently used forgotten first. Images go through the tower one by
one, so that twenty need no more memory than one.
"""

from __future__ import annotations

from collections import OrderedDict

import mlx.core as mx

from .images import ImagePatches
from .model import DiffusionGemma

DEFAULT_BYTES = 256 * 2**20  # 170 images of 280 tokens of 2,816 numbers in bfloat16


class SoftTokens:
    """Turns images into soft tokens."""

    def __init__(self, model: DiffusionGemma, max_bytes: int = DEFAULT_BYTES) -> None:
        """Bind the model; remember at most `max_bytes` of its soft tokens."""
        self._model = model
        self._max_bytes = self._bound = max_bytes
        self._known: OrderedDict[bytes, mx.array] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """What is remembered, in bytes."""
        return sum(soft_tokens.nbytes for soft_tokens in self._known.values())

    def limit_to(self, nbytes: int) -> int:
        """Hold at most `nbytes` until told otherwise, and never more than `max_bytes`; return what that allows."""
        self._bound = min(self._max_bytes, max(0, nbytes))
        self._drop_oldest()
        return self._bound

    def __call__(self, image: ImagePatches) -> mx.array:
        """Return the soft tokens [T, D] of an image, evaluated. Raises ValueError for a model without a tower."""
        key = image.digest
        if key not in self._known:
            [soft_tokens] = self._model.embed_images(mx.array(image.patches)[None], mx.array(image.position_ids)[None])
            mx.eval(soft_tokens)
            mx.clear_cache()  # what the tower needed is of no use to the text layers
            if soft_tokens.nbytes > self._bound:
                return soft_tokens
            self._known[key] = soft_tokens
        self._known.move_to_end(key)
        self._drop_oldest()
        return self._known[key]

    def _drop_oldest(self) -> None:
        while self.nbytes > self._bound:
            self._known.popitem(last=False)
