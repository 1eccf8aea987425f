"""From a path, bytes, a data URL or a Pillow image to the patches that the vision tower reads.

First any picture becomes an upright RGB image; everything that cannot is an `ImageError` of one line. Then the
Pillow-backed Gemma 4 image processor of transformers resizes it to the token budget and cuts it into patches. Neither
needs torch. Nothing is fetched from the network: whoever has a URL downloads it under rules of their own.

Reference: transformers `image_processing_pil_gemma4.py`.
"""

from __future__ import annotations

import logging
import os
import struct
import warnings
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from .config import VisionConfig
from .sources import first_line, open_source

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SOFT_TOKENS = (70, 140, 280, 560, 1120)  # budgets per image that the model was trained with
# What is decoded. Some of Pillow's other formats start programs (EPS) or take files of several parts.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO")
EXPECTED = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF, PPM or ICO"
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs: 256 MiB of RGB
ORIENTATION = 0x0112  # the EXIF tag
# Deep grey: what Pillow itself would turn into white from 256 on.
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
# What Pillow's decoders raise for damaged data.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, RuntimeError, TypeError, struct.error)

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else what it logs of damaged files goes to stderr

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image"


class ImageError(ValueError):
    """An image that cannot be used; the message is one line."""


@dataclass(frozen=True, eq=False)
class ImagePatches:
    """One image as the vision tower takes it, without padding."""

    patches: np.ndarray  # [P, 3 patch²] float32, pixels in [0, 1]; row by row, then column by column, then channels
    position_ids: np.ndarray  # [P, 2] int32, column and row of each patch
    soft_tokens: int  # P / k²: how many placeholders stand for the image in a prompt

    @cached_property
    def digest(self) -> bytes:
        """Hash of what the tower sees, 32 bytes: the patches and where each lies, so also the size of the image."""
        digest = blake2b(self.patches.tobytes(), digest_size=32)
        digest.update(self.position_ids.tobytes())
        return digest.digest()


def read_image(source: ImageSource) -> Image.Image:
    """Return a picture as an upright RGB image.

    Of an animation it is the first frame (of a Pillow image, the current one). What is transparent becomes white, as in
    the reference: drawings with a transparent background are made for a page, and what colour lies under it is chance.

    Args:
        source: a path, the bytes of a file, a data URL in base64, or a Pillow image.

    Raises:
        ImageError: no such file, not an image, truncated, damaged, or more than `MAX_PIXELS`.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        _check_size("from Pillow", source)
        return _to_rgb("from Pillow", source)
    name, file = open_source(source, "image", ImageError, "a path, bytes, a data URL or a Pillow image")
    with file:
        return _decode(name, file)


def cut_image(image: Image.Image, config: VisionConfig, soft_tokens: int) -> ImagePatches:
    """Resize an RGB image to a budget and cut it into patches.

    Args:
        image: from `read_image`.
        config: of the vision tower.
        soft_tokens: at most so many, one of `SOFT_TOKENS`. The sides keep their ratio, rounded down to whole squares
            of patches, so an image gets a little less; a small one is enlarged.

    Raises:
        ImageError: another budget, or an image too long for the tower's position tables.
    """
    check_soft_tokens(soft_tokens)
    processor = _processor(config.patch_size, config.pooling_kernel_size, soft_tokens)
    outputs = processor.preprocess([image], return_tensors="np")
    count = int(outputs["num_soft_tokens_per_image"][0])
    used = slice(0, count * config.patches_per_token)  # behind them the processor pads to the budget
    position_ids = outputs["image_position_ids"][0, used].astype("int32")
    columns, rows = position_ids.max(axis=0) + 1
    if max(columns, rows) > config.position_embedding_size:  # an index outside a table is no error in MLX
        size = f"{columns} x {rows} patches from {image.width} x {image.height} pixels"
        raise ImageError(f"image: got {size}, expected at most {config.position_embedding_size} patches a side")
    return ImagePatches(outputs["pixel_values"][0, used], position_ids, count)


def check_soft_tokens(soft_tokens: int) -> None:
    """Raise `ImageError` for a budget that is not one of `SOFT_TOKENS`."""
    if not isinstance(soft_tokens, int) or soft_tokens not in SOFT_TOKENS:
        raise ImageError(f"image_tokens: got {soft_tokens!r}, expected one of {', '.join(map(str, SOFT_TOKENS))}")


@cache
def _processor(patch_size: int, pooling_kernel_size: int, soft_tokens: int) -> Any:
    """Return transformers' image processor. From its module: the package's own name for it may choose the torch one."""
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    return Gemma4ImageProcessorPil(
        patch_size=patch_size, pooling_kernel_size=pooling_kernel_size, max_soft_tokens=soft_tokens
    )


def _decode(name: str, file: BinaryIO) -> Image.Image:
    """Decode the first frame of an open file and make it RGB."""
    from PIL import Image, UnidentifiedImageError

    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # AVIF is missing in some builds
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata is nobody's concern
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=formats) as image:
                _check_size(name, image)
                return _to_rgb(name, image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"image {name} is too large: {error}; expected at most {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        file.seek(0)
        got = "an empty file" if not file.read(1) else "something else"
        raise ImageError(f"image {name} is not an image: got {got}, expected {EXPECTED}") from None
    except DAMAGE as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"image {name} is damaged or truncated: {first_line(error)}") from None


def _check_size(name: str, image: Image.Image) -> None:
    """Raise `ImageError` before a huge image is decoded; Pillow's own limits can be switched off."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        got = f"got {width} x {height} = {width * height:,} pixels"
        raise ImageError(f"image {name} is too large: {got}, expected at most {MAX_PIXELS:,}")
    if width * height == 0:
        raise ImageError(f"image {name} is empty: got {width} x {height} pixels, expected at least 1 x 1")


def _to_rgb(name: str, image: Image.Image) -> Image.Image:
    """Flatten onto white, convert to RGB, turn upright."""
    from PIL import Image

    try:
        image.load()
    except DAMAGE as error:
        raise ImageError(f"image {name} is damaged or truncated: {first_line(error)}") from None
    mode, turn = image.mode, _TURNS.get(_orientation(image))
    if mode == "F":
        raise ImageError(f"image {name} has mode 'F', expected integers: nothing says how bright a pixel of 1.0 is")
    if mode in DEEP_MODES:
        image = _to_8_bits(name, image)
    try:
        if mode in ALPHA_MODES or image.info.get("transparency") is not None:
            image = image.convert("LA") if mode == "La" else image  # the one way out of La
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")
    except DAMAGE as error:
        raise ImageError(
            f"image {name} has mode {mode!r}, expected one that becomes RGB: {first_line(error)}"
        ) from None
    return image if turn is None else image.transpose(Image.Transpose[turn])


# What undoes each orientation; 1 is upright.
_TURNS: dict[int | None, str] = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def _orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation; None without one, also where the EXIF block is damaged, as viewers do."""
    try:
        value = image.getexif().get(ORIENTATION)
    except DAMAGE:
        return None
    return value if isinstance(value, int) else None


def _to_8_bits(name: str, image: Image.Image) -> Image.Image:
    """Scale grey of 16 bits to 8; what Pillow opens as 32-bit integers is nearly always such an image."""
    import numpy as np
    from PIL import Image

    grey = np.asarray(image)
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise ImageError(f"image {name} has grey values from {low} to {high}, expected 0 to 65535")
    scaled = ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):  # of PNG: the grey that is transparent
        scaled[grey == clear] = 255
    return Image.fromarray(scaled)
