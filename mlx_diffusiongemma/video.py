"""From a video to pictures with their times: one frame per second, at most 60 s and 32 frames.

A video is a path, bytes, a data URL, or a list of frames with times from an app that decodes by itself. Decoding needs
PyAV (`pip install 'mlx_diffusiongemma[video]'`); the list does not. As with images nothing is fetched, and FFmpeg may
open nothing but the one file, of one of the formats in `FORMATS`: no playlists, which name other files.

Reference: transformers `Gemma4VideoProcessor`, for the sampling and the time stamps. Frame i of n is the one shown at
i/n of the time taken, and its time is its own. Where we differ:

* One frame per second and 60 s are the model card's; the reference takes 32 frames from a video of any length.
* The reference counts frames and takes each for as long as the others; we go by their time stamps, which is the same
  for a constant frame rate and right for a variable one. A frame that still stands at the next sample is given again,
  with the time of the sample. So more frames may be asked for than there are, where the reference raises an error.
* Frames are turned upright, and transparent ones laid on white, as images are.
* A list of frames has its times; the reference guesses 24 frames per second.
"""

from __future__ import annotations

import math
import os
import reprlib
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from .images import DAMAGE, MAX_PIXELS, ImageError, ImageSource, read_image
from .sources import first_line, open_source

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from PIL import Image

VIDEO_SOFT_TOKENS = 70  # per frame
DEFAULT_FPS = 1.0
MAX_FRAMES = 32
MAX_SECONDS = 60.0
MAX_TIME = 360_000  # seconds, 100 hours: a time stamp stays short

# FFmpeg's names of what is opened; its hls, dash, concat and others would open what the file names.
FORMATS = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "ogg", "asf", "gif")
EXPECTED = "MP4, MOV, WebM, Matroska, AVI, MPEG, FLV, Ogg, WMV or GIF"
STILL_BRANDS = ("avif", "heic", "heix", "heim", "heis", "mif1")  # images in a file that looks like an MP4
SLACK = Fraction(1, 1000)  # seconds: Matroska rounds times to milliseconds
DEFAULT_RATE = 25  # frames per second, where a file gives neither times nor a rate
MISSING = Fraction(1)  # seconds that may be absent at the end of a file before it counts as truncated
LONG_GAP = 10  # seconds to the next sample from which on a jump is tried in a file without an index
STEPS_BACK = (0, 10, 60, 600)  # seconds before a sample at which a keyframe is looked for
EXPECTED_TIME = f"seconds from 0 on, below {MAX_TIME}"
EXPECTED_LIST = "a path, bytes, a data URL or a list of frames with their times"


class VideoError(ValueError):
    """A video that cannot be used; the message is one line."""


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture in a video."""

    image: Image.Image  # RGB, upright
    seconds: float  # since the first frame


VideoSource: TypeAlias = "str | os.PathLike[str] | bytes | Sequence[Frame | tuple[ImageSource, float]]"


def read_video(
    source: VideoSource, *, fps: float = DEFAULT_FPS, max_frames: int = MAX_FRAMES, max_seconds: float = MAX_SECONDS
) -> list[Frame]:
    """Return the frames that stand for a video, in the order of their times.

    Of T seconds, at most `max_seconds`, they are n = min(max_frames, max(1, floor(T · fps))) frames, evenly spread.
    Equal frames in a row may be one and the same image.

    Args:
        source: a path, the bytes of a file, a data URL in base64, or a list of frames with their times: `Frame`s or
            pairs of an image (whatever `read_image` takes) and its seconds. A list is taken as it is.
        fps: frames per second of the video's time.
        max_frames: where there would be more, so many are spread over the time; a longer list is an error.
        max_seconds: what comes later is not looked at.

    Raises:
        VideoError: no such file, not a video, no pictures, truncated, damaged, frames of more than `MAX_PIXELS`, no
            PyAV, times that do not increase, a limit that is no positive number.
    """
    return list(iter_video(source, fps=fps, max_frames=max_frames, max_seconds=max_seconds))


def iter_video(
    source: VideoSource, *, fps: float = DEFAULT_FPS, max_frames: int = MAX_FRAMES, max_seconds: float = MAX_SECONDS
) -> Iterator[Frame]:
    """Yield what `read_video` returns, one by one: 32 frames of a 4K film fill 800 MB, one does not."""
    if isinstance(max_frames, bool) or not isinstance(max_frames, int) or max_frames < 1:
        raise VideoError(f"max_frames: got {max_frames!r}, expected a whole number from 1 on")
    exact_fps, exact_seconds = _positive("fps", fps), _positive("max_seconds", max_seconds)
    if isinstance(source, Sequence) and not isinstance(source, str | bytes | bytearray | memoryview):
        return _given(_check_list(source, max_frames))
    name, file = open_source(source, "video", VideoError, EXPECTED_LIST)
    return _decoded(name, file, exact_fps, max_frames, exact_seconds)


def timestamp(seconds: float) -> str:
    """Return a time as the prompt writes it: minutes and whole seconds, "00:07".

    Raises:
        VideoError: not a number from 0 to `MAX_TIME`.
    """
    if not _is_time(seconds):
        raise VideoError(f"time of a frame: got {reprlib.repr(seconds)}, expected {EXPECTED_TIME}")
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_time(value: Any) -> bool:
    return _is_number(value) and 0 <= value < MAX_TIME


def _positive(name: str, value: float) -> Fraction:
    """Return a limit as the fraction that was meant: 0.3 is 3/10, not the nearest float."""
    if not _is_number(value) or not 0 < value < math.inf:
        raise VideoError(f"{name}: got {value!r}, expected a number above 0")
    return Fraction(float(value)).limit_denominator(1_000_000)


# -- a list of frames --------------------------------------------------------------------------------------------------


def _check_list(frames: Sequence[Any], max_frames: int) -> list[tuple[ImageSource, float]]:
    """Return pairs whose times are not negative, below the limit and increasing."""
    if not 1 <= len(frames) <= max_frames:
        raise VideoError(f"video: got a list of {len(frames)} frames, expected 1 to {max_frames}")
    pairs: list[tuple[ImageSource, float]] = []
    for number, item in enumerate(frames, 1):
        where = f"video, frame {number} of {len(frames)}"
        if isinstance(item, Frame):
            item = (item.image, item.seconds)
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise VideoError(f"{where}: got {type(item).__name__}, expected a Frame or a pair of image and seconds")
        image, seconds = item
        if not _is_time(seconds):
            raise VideoError(f"{where}: got the time {reprlib.repr(seconds)}, expected {EXPECTED_TIME}")
        if pairs and seconds <= pairs[-1][1]:
            raise VideoError(f"{where}: got the time {seconds!r}, expected more than {pairs[-1][1]!r}, the one before")
        pairs.append((image, float(seconds)))
    return pairs


def _given(pairs: list[tuple[ImageSource, float]]) -> Iterator[Frame]:
    for number, (source, seconds) in enumerate(pairs, 1):
        try:
            yield Frame(read_image(source), seconds)
        except ImageError as error:
            raise VideoError(f"video, frame {number} of {len(pairs)}: {error}") from None


# -- a file ------------------------------------------------------------------------------------------------------------


def _decoded(name: str, file: BinaryIO, fps: Fraction, max_frames: int, max_seconds: Fraction) -> Iterator[Frame]:
    """Yield the frames of an open file, and close it."""
    with file, _one_line_errors(name):
        container = _open(name, file)
        try:
            length = _declared_length(container, _video_stream(name, container))
            if length is None:
                length = _measured_length(container, _video_stream(name, container), max_seconds)
                container.close()
                container = _open(name, file)
            stream = _video_stream(name, container)
            times = _times(min(length, max_seconds), fps, max_frames)
            converted: VideoFrame | None = None
            for time, frame in _sample(_Reader(name, container, stream), times):
                if frame is not converted:
                    image, converted = _to_image(name, frame, stream), frame
                yield Frame(image, float(time))
        finally:
            container.close()


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """Turn what PyAV raises into `VideoError`."""
    try:
        import av
    except ImportError:
        install = "expected PyAV: pip install 'mlx_diffusiongemma[video]'"
        raise VideoError(f"video {name}: nothing to decode it with, {install} (or a list of frames)") from None
    try:
        yield
    except av.FFmpegError as error:
        raise VideoError(f"video {name} is damaged or truncated: {error.strerror or first_line(error)}") from None
    except OSError as error:  # from the Python file that PyAV reads
        raise VideoError(f"video {name} cannot be read: {error.strerror or first_line(error)}") from None


def _open(name: str, file: BinaryIO) -> InputContainer:
    """Open a file for FFmpeg: one of `FORMATS`, no other file behind it, no frame above `MAX_PIXELS`."""
    import av

    file.seek(0)
    try:
        return av.open(
            file,
            mode="r",
            options=_LIMITS,
            container_options={"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"},
            metadata_errors="replace",
            buffer_size=1 << 18,
            io_open=_refuse,
        )
    except (av.error.InvalidDataError, av.error.ArgumentError):  # the second: not in the list of formats
        raise VideoError(f"video {name} {_what_instead(file)}") from None


# For every decoder; the one that `_video_stream` returns is checked before too.
_LIMITS = {"max_pixels": str(MAX_PIXELS)}


def _refuse(url: str, flags: int, options: dict[str, str]) -> BinaryIO:
    raise PermissionError(f"the file refers to another one: {url}")


def _what_instead(file: BinaryIO) -> str:
    """Return what is wrong with a file that FFmpeg does not open."""
    from PIL import Image

    file.seek(0)
    head = file.read(12)
    if head[4:8] == b"ftyp":
        return "is damaged or truncated: got the beginning of an MP4 or MOV file, expected all of it"
    got = "something else" if head else "an empty file"
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:  # reads the head only
                got = f"an image ({image.format})"
    except Image.DecompressionBombError:
        got = "an image, a huge one"
    except DAMAGE:
        pass
    return f"is not a video: got {got}, expected {EXPECTED}"


def _video_stream(name: str, container: InputContainer) -> VideoStream:
    """Return the video stream, of several the first that is marked as default."""
    from av.stream import Disposition

    pictures = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if container.metadata.get("major_brand") in STILL_BRANDS:
        raise VideoError(f"video {name} is not a video: got an image (AVIF or HEIC), expected {EXPECTED}")
    if not streams:
        kinds = sorted({stream.type for stream in container.streams if stream not in container.streams.video})
        raise VideoError(f"video {name} has no video stream: got {' and '.join(kinds) or 'nothing'}, expected pictures")
    stream = next((stream for stream in streams if stream.disposition & Disposition.default), streams[0])
    if stream.codec_context is None:
        raise VideoError(f"video {name} cannot be decoded: got no codec that is known, expected H.264 or the like")
    _check_size(name, stream.codec_context.width, stream.codec_context.height)
    stream.codec_context.options = _LIMITS
    stream.thread_type = "AUTO"
    return stream


def _check_size(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        got = f"got {width} x {height} = {width * height:,} pixels"
        raise VideoError(f"video {name} is too large: {got}, expected at most {MAX_PIXELS:,}")


# -- which frames ------------------------------------------------------------------------------------------------------


def _times(length: Fraction, fps: Fraction, max_frames: int) -> Iterator[Fraction]:
    """Yield when to look, as `default_sample_indices_fn` of the reference counts it."""
    count = min(max_frames, max(1, math.floor((length + SLACK) * fps)))
    return (length * i / count for i in range(count))


def _declared_length(container: InputContainer, stream: VideoStream) -> Fraction | None:
    """Return the seconds that the file says the video lasts, None where it does not say."""
    import av

    match container.format.name:
        case "mpeg":
            return None  # FFmpeg guesses, and may be wrong by half
        case "avi" if stream.frames and stream.average_rate:
            return stream.frames / stream.average_rate  # of a truncated file FFmpeg gives the part that is left
    if stream.duration and stream.duration > 0 and stream.time_base:
        return stream.duration * stream.time_base
    if not container.duration or container.duration <= 0 or _start(stream) != 0:
        return None  # Matroska and FLV: some writers count from 0 to the end, some from the first frame
    return Fraction(container.duration, av.time_base)


def _measured_length(container: InputContainer, stream: VideoStream, max_seconds: Fraction) -> Fraction:
    """Return the seconds up to the end of the last frame, or a little more than the limit; decodes nothing."""
    start, end = _start(stream), Fraction(0)
    usual = 1 / Fraction(stream.average_rate or DEFAULT_RATE)
    for packet in container.demux(stream):
        if (span := _span(packet)) is None:
            continue
        start = span[0] if start is None else start
        end = max(end, (span[1] if packet.duration else span[0] + usual) - start)
        if end > max_seconds:
            break
    return end


def _start(stream: VideoStream) -> Fraction | None:
    """Return the time stamp at which a video begins, in seconds."""
    if stream.start_time is None or stream.time_base is None:
        return None
    return stream.start_time * stream.time_base


def _span(packet: Packet[Any]) -> tuple[Fraction, Fraction] | None:
    """Return from when until when a packet is shown, in seconds."""
    stamp = packet.pts if packet.pts is not None else packet.dts
    if stamp is None or packet.time_base is None:
        return None
    return stamp * packet.time_base, (stamp + (packet.duration or 0)) * packet.time_base


def _sample(reader: _Reader, times: Iterable[Fraction]) -> Iterator[tuple[Fraction, VideoFrame]]:
    """Yield the frame shown at each time, and since when; where it is the one before, the time itself."""
    last: tuple[Fraction, VideoFrame] | None = None
    for time in times:
        if last is not None and time <= last[0]:  # the video began late, with a frame that has been yielded
            continue
        since, frame = reader.at(time)
        last = time if last is not None and frame is last[1] else since, frame
        yield last


class _Reader:
    """Finds the frame shown at a time; decodes forward, and jumps where a keyframe lies in between."""

    def __init__(self, name: str, container: InputContainer, stream: VideoStream) -> None:
        self.name, self.container, self.stream = name, container, stream
        self.time_base = stream.time_base or Fraction(1)
        self.zero = _start(stream)
        self.end = Fraction(0)  # where what has been read ends, sound too
        self.fed: int | None = None  # dts of the packet that the decoder got last
        self.shown: tuple[Fraction, VideoFrame] | None = None
        self.ahead: tuple[Fraction, VideoFrame] | None = None  # decoded, and later than the time asked for
        self.frames = self._decode()
        entries = stream.index_entries
        self.indexed_to = entries[len(entries) - 1].timestamp if len(entries) else -1
        self.may_guess = True  # until a jump without an index has gained nothing

    def at(self, time: Fraction) -> tuple[Fraction, VideoFrame]:
        """Return the frame shown at a time, and since when; the first one for what is before it. Times only grow."""
        limit = time + SLACK
        if self.ahead is not None and self.ahead[0] <= limit and self._is_jump_worth(limit):
            self._jump(limit)
        while (ahead := self._peek()) is not None and ahead[0] <= limit:
            if self.shown is None or ahead[0] > self.shown[0]:  # after a jump some frames come again
                self.shown = ahead
            self.ahead = None
        if self.ahead is None and time > self.end + MISSING:
            got = f"got {float(self.end):.1f} s of a video that says it is longer"
            raise VideoError(f"video {self.name} is truncated: {got}, expected something at {float(time):.1f} s")
        if self.shown is None:
            self.shown, self.ahead = self.ahead, None
        if self.shown is None:
            raise VideoError(f"video {self.name} is empty: got no frame that can be decoded, expected at least one")
        return self.shown

    def _peek(self) -> tuple[Fraction, VideoFrame] | None:
        if self.ahead is None:
            self.ahead = next(self.frames, None)
        return self.ahead

    def _decode(self) -> Iterator[tuple[Fraction, VideoFrame]]:
        """Yield frames and their times, from the next keyframe on: what comes before it cannot be decoded."""
        key: float | None = None  # its time stamp
        clean = False
        for packet in self.container.demux():
            if (span := _span(packet)) is not None:
                self.zero = span[0] if self.zero is None else self.zero
                self.end = max(self.end, span[1] - self.zero)
            if packet.stream.index != self.stream.index:  # packet.stream_index is 0 for the last ones, without data
                continue
            if key is None:
                if not packet.is_keyframe:
                    continue
                key = packet.pts if packet.pts is not None else -math.inf
            self.fed = self.fed if packet.dts is None else packet.dts
            for frame in self.stream.decode(packet):
                stamp = frame.pts if frame.pts is not None else math.inf
                clean = clean or (stamp >= key and not frame.is_corrupt)  # those shown before it refer to earlier ones
                if clean:
                    _check_size(self.name, frame.width, frame.height)
                    yield self._time(frame), frame

    def _time(self, frame: VideoFrame) -> Fraction:
        """Return since when a frame is shown; one without a time stamp follows the one before at the usual distance."""
        stamp = frame.pts if frame.pts is not None else frame.dts
        if stamp is not None:
            return max(stamp * (frame.time_base or self.time_base) - (self.zero or 0), Fraction(0))
        before = self.ahead or self.shown
        return before[0] + 1 / Fraction(self.stream.average_rate or DEFAULT_RATE) if before else Fraction(0)

    def _is_jump_worth(self, limit: Fraction) -> bool:
        """Return whether a keyframe lies between what is decoded and the goal; beyond the index, whether it may."""
        goal = self._stamp(limit)
        found = self.stream.index_entries.search_timestamp(goal)
        if found >= 0 and self.fed is not None and self.stream.index_entries[found].timestamp > self.fed:
            return True
        if self.ahead is None or not self.may_guess or goal <= self.indexed_to:
            return False
        return limit - self.ahead[0] > LONG_GAP

    def _jump(self, limit: Fraction) -> None:
        """Go on from the last keyframe before a time. In some formats FFmpeg lands too late: then from further back."""
        import av

        before = self.ahead
        for back in (*STEPS_BACK, None):
            goal = Fraction(0) if back is None else max(limit - back, Fraction(0))
            try:
                self.container.seek(self._stamp(goal), stream=self.stream)
            except av.FFmpegError:  # it cannot jump: read on
                self.may_guess = False
                return
            self.ahead, self.frames = None, self._decode()
            if (first := self._peek()) is not None and first[0] <= limit:
                self.may_guess = before is None or first[0] > before[0]
                return

    def _stamp(self, time: Fraction) -> int:
        return math.floor((time + (self.zero or 0)) / self.time_base)


# -- pictures ----------------------------------------------------------------------------------------------------------

# What a display matrix does, by the signs of its upper left corner a, b, c, d: x' = a x + c y, y' = b x + d y.
_TURNS = {
    (0, 1, -1, 0): "ROTATE_270",
    (-1, 0, 0, -1): "ROTATE_180",
    (0, -1, 1, 0): "ROTATE_90",
    (-1, 0, 0, 1): "FLIP_LEFT_RIGHT",
    (1, 0, 0, -1): "FLIP_TOP_BOTTOM",
    (0, 1, 1, 0): "TRANSPOSE",
    (0, -1, -1, 0): "TRANSVERSE",
}
_TAGS = {"90": "ROTATE_270", "180": "ROTATE_180", "270": "ROTATE_90"}  # clockwise, from older files


def _to_image(name: str, frame: VideoFrame, stream: VideoStream) -> Image.Image:
    """Return a frame as an upright RGB image, what is transparent on white."""
    from PIL import Image

    has_alpha = any(component.is_alpha for component in frame.format.components)
    try:
        pixels = frame.to_ndarray(format="rgba" if has_alpha else "rgb24")
    except ValueError as error:
        got = f"got pixels of the format {frame.format.name!r}"
        raise VideoError(f"video {name}: {got}, expected one that becomes RGB: {first_line(error)}") from None
    image = read_image(Image.fromarray(pixels))
    turn = _turn(frame, stream)
    return image if turn is None else image.transpose(Image.Transpose[turn])


def _turn(frame: VideoFrame, stream: VideoStream) -> str | None:
    """Return what makes a frame upright; None for one that is, and for angles that are not right ones."""
    try:
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV stumbles over kinds of side data that it does not know
        return _TAGS.get(str(-frame.rotation % 360))
    if matrix is None:
        return _TAGS.get({key.lower(): value for key, value in stream.metadata.items()}.get("rotate", ""))
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    size = max(abs(a), abs(b), 1)
    return _TURNS.get((round(a / size), round(b / size), round(c / size), round(d / size)))
