"""Images and videos of a prompt, read and cut into patches.

A video becomes frames with times, each an image of few soft tokens; decoding it is in `video.py`. Where they stand in a
prompt is in `placeholders.py`.

Reference: transformers `processing_gemma4.py`; its DiffusionGemma has no way in for videos, its Gemma 4 has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .config import VisionConfig, check_integer, check_number
from .images import SOFT_TOKENS, ImagePatches, check_soft_tokens, cut_image, read_image
from .parts import Kind, Source
from .video import DEFAULT_FPS, MAX_FRAMES, VIDEO_SOFT_TOKENS, iter_video, timestamp

DEFAULT_SOFT_TOKENS = 280  # of the reference's processor, for a checkpoint that says nothing
assert DEFAULT_SOFT_TOKENS in SOFT_TOKENS


@dataclass(frozen=True)
class Sight:
    """How media are read: the tower they are for, and how much of them it gets to see.

    Attributes:
        vision: the tower; None for a model that cannot see.
        image_tokens: soft tokens of an image at most, one of `images.SOFT_TOKENS`.
        fps: frames of a video per second.
        video_frames: frames of a video at most.
        max_soft_tokens: of all media together; more than the context holds need not be read. None for no limit.
    """

    vision: VisionConfig | None = None
    image_tokens: int = DEFAULT_SOFT_TOKENS
    fps: float = DEFAULT_FPS
    video_frames: int = MAX_FRAMES
    max_soft_tokens: int | None = None

    def __post_init__(self) -> None:
        check_soft_tokens(self.image_tokens)
        check_number("fps", self.fps, 0, exclusive=True)
        check_integer("video_frames", self.video_frames, 1)


@dataclass(frozen=True, eq=False)
class Medium:
    """An image, or the frames of a video, as the tower takes them; `times` has one time stamp (mm:ss) per frame."""

    kind: Kind
    images: tuple[ImagePatches, ...]
    times: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ImageBlock:
    """An image or a frame, and the positions in the prompt that its soft tokens take."""

    kind: Kind  # what it is part of
    start: int
    image: ImagePatches

    @property
    def span(self) -> tuple[int, int]:
        """Its positions: start, stop."""
        return self.start, self.start + self.image.soft_tokens


class MediaCounts(NamedTuple):
    """What a prompt shows; `image_tokens` are the soft tokens of images and frames together."""

    images: int
    video_frames: int
    image_tokens: int


def count_media(blocks: Sequence[ImageBlock]) -> MediaCounts:
    """Count the images and frames of a prompt."""
    images = sum(block.kind == "image" for block in blocks)
    return MediaCounts(images, len(blocks) - images, sum(block.image.soft_tokens for block in blocks))


def read_media(sources: Sequence[Source], sight: Sight) -> list[Medium]:
    """Open, decode and cut every source. Raise ValueError of one line that names it."""
    if sources and sight.vision is None:
        raise ValueError(
            f"{sources[0].where}: got {sources[0].kind}, expected text alone: this model has no vision tower"
        )
    media: list[Medium] = []
    soft_tokens = 0
    for source in sources:
        images: list[ImagePatches] = []
        times: list[str] = []
        for image, time in _read(source, sight):  # counted at every frame: the rest of a long video is not decoded
            images.append(image)
            times += [] if time is None else [time]
            soft_tokens += image.soft_tokens
            if sight.max_soft_tokens is not None and soft_tokens > sight.max_soft_tokens:
                got = f"{soft_tokens} soft tokens up to {source.where}"
                raise ValueError(f"images and videos: got {got}, expected at most {sight.max_soft_tokens}")
        media.append(Medium(source.kind, tuple(images), tuple(times)))
    return media


def _read(source: Source, sight: Sight) -> Iterator[tuple[ImagePatches, str | None]]:
    """Yield an image, or the frames of a video with their time stamps, as each is cut."""
    assert sight.vision is not None
    try:
        if source.kind == "image":
            yield cut_image(read_image(source.content), sight.vision, sight.image_tokens), None
            return
        for frame in iter_video(source.content, fps=sight.fps, max_frames=sight.video_frames):
            yield cut_image(frame.image, sight.vision, VIDEO_SOFT_TOKENS), timestamp(frame.seconds)
    except ValueError as error:
        raise ValueError(f"{source.where}: {error}") from None
