"""Videos to frames with times: the reference's samples, every kind of file, every bad input with its line.

The videos are made here. Each frame has its number written on it, in bars of black and white.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
import struct
import sys
import zlib
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from mlx_diffusiongemma import video
from mlx_diffusiongemma.video import Frame, VideoError, iter_video, read_video, timestamp

BARS, WIDTH, HEIGHT = 11, 176, 32
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
SECONDS = "expected seconds from 0 on, below 360000"
EXPECTED = "MP4, MOV, WebM, Matroska, AVI, MPEG, FLV, Ogg, WMV or GIF"


def picture(number: int) -> np.ndarray:
    """Return a frame with its number, bit by bit: [HEIGHT, WIDTH, 3] uint8."""
    bits = [255 * (number >> bit & 1) for bit in range(BARS)]
    return np.broadcast_to(np.repeat(bits, WIDTH // BARS)[None, :, None], (HEIGHT, WIDTH, 3)).astype(np.uint8)


def number(image: Image.Image) -> int:
    """Return the number on a frame."""
    assert (image.mode, image.size) == ("RGB", (WIDTH, HEIGHT))
    bars = np.asarray(image)[HEIGHT // 2, WIDTH // BARS // 2 :: WIDTH // BARS, 0] > 128
    return sum(int(bar) << bit for bit, bar in enumerate(bars))


def numbers(frames: Iterable[Frame]) -> list[int]:
    return [number(frame.image) for frame in frames]


def seconds(frames: Iterable[Frame]) -> list[float]:
    return [round(frame.seconds, 6) for frame in frames]


def make(
    path: Path,
    frames: int | Iterable[np.ndarray] = 30,
    *,
    format: str = "mp4",
    codec: str = "libx264",
    rate: Any = 10,
    times: list[int] | None = None,
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    rotation: tuple[float, bool, bool] | None = None,
    options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
    tags: dict[str, str] | None = None,
) -> Path:
    """Write a video; `times` are those of the frames in milliseconds, else they are at a constant rate."""
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w", format=format, options=options or {}) as container:
        stream: Any = None
        for index, pixels in enumerate(map(picture, range(frames)) if isinstance(frames, int) else frames):
            if stream is None:
                stream = container.add_stream(codec, rate=rate, options=codec_options or {})
                stream.height, stream.width = pixels.shape[:2]
                stream.pix_fmt, stream.gop_size = pix_fmt, gop
                stream.bit_rate = 4_000_000
                stream.metadata.update(tags or {})
                if times is not None:
                    stream.codec_context.time_base = Fraction(1, 1000)
                if rotation is not None:
                    stream.set_display_rotation(*rotation)
            form = "rgba" if pixels.shape[2] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=form).reformat(format=pix_fmt)
            frame.pts = index if times is None else times[index]
            frame.time_base = 1 / Fraction(rate) if times is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode())
    return path


def remux(source: Path, path: Path, *, format: str, keep: Any = lambda index: True, shift: int = 0, **options: str):
    """Copy the packets of a video that are to be kept, later by some ticks."""
    with av.open(str(source)) as old, av.open(str(path), "w", format=format, options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for index, packet in enumerate(old.demux(video=0)):
            if packet.dts is not None and keep(index):
                packet.stream, packet.pts, packet.dts = stream, packet.pts + shift, packet.dts + shift
                new.mux(packet)
    return path


def write_sound(container: Any, stream: Any, length: int) -> None:
    """Write some seconds of silence."""
    size = stream.codec_context.frame_size or 1024
    for index in range(length * 48000 // size):
        part = av.AudioFrame.from_ndarray(np.zeros((1, size), np.float32), format="fltp", layout="mono")
        part.sample_rate, part.pts, part.time_base = 48000, index * size, Fraction(1, 48000)
        container.mux(stream.encode(part))
    container.mux(stream.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def short(folder: Path) -> Path:
    """Return three seconds at 10 frames per second."""
    return make(folder / "short.mp4")


@pytest.fixture(scope="module")
def long(folder: Path) -> Path:
    """Return 150 seconds, a keyframe every two."""
    return make(folder / "long.mp4", 1500, gop=20)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the frames that are decoded and those that are converted."""
    counts = {"decoded": 0, "converted": 0}
    time, to_image = video._Reader._time, video._to_image

    def counting_time(*arguments: Any) -> Fraction:
        counts["decoded"] += 1
        return time(*arguments)

    def counting_to_image(*arguments: Any) -> Image.Image:
        counts["converted"] += 1
        return to_image(*arguments)

    monkeypatch.setattr(video._Reader, "_time", counting_time)
    monkeypatch.setattr(video, "_to_image", counting_to_image)
    return counts


def refused(source: Any, **options: Any) -> str:
    with pytest.raises(VideoError) as error:
        read_video(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- which frames ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [0.3, 1, 1.0, 2.5, 7])
@pytest.mark.parametrize(
    ("rate", "count"), [(10, 30), (10, 37), (Fraction(30000, 1001), 100), (Fraction(25, 2), 60), (1, 5), (10, 1)]
)
def test_samples_and_time_stamps_equal_the_reference(folder: Path, rate: Any, count: int, fps: float) -> None:
    path = folder / f"{count}-{float(rate):.2f}.mp4"
    if not path.exists():
        make(path, count, rate=rate)
    metadata = VideoMetadata(total_num_frames=count, fps=float(rate))
    wanted = max(1, int(count / rate * fps))
    if min(wanted, 32) > count:
        with pytest.raises(ValueError, match="exceeds total_num_frames"):
            default_sample_indices_fn(metadata, fps=fps)
        return
    indices = default_sample_indices_fn(metadata, num_frames=min(wanted, 32))
    if wanted <= 32:
        np.testing.assert_array_equal(indices, default_sample_indices_fn(metadata, fps=fps))
    metadata.frames_indices = indices
    frames = read_video(path, fps=fps)
    assert numbers(frames) == list(indices)
    # transformers' Gemma4Processor.replace_video_token
    assert [timestamp(frame.seconds) for frame in frames] == [
        f"{int(time // 60):02d}:{int(time % 60):02d}" for time in metadata.timestamps
    ]
    np.testing.assert_allclose(seconds(frames), metadata.timestamps, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [600 * index // 32 for index in range(32)]),
        ({"max_frames": 4}, [0, 150, 300, 450]),
        ({"max_frames": 1}, [0]),
        ({"max_seconds": 5}, [0, 10, 20, 30, 40]),
        ({"max_seconds": 5, "fps": 2}, list(range(0, 50, 5))),
        ({"max_seconds": 0.5}, [0]),
        ({"max_seconds": 1e9, "max_frames": 3}, [0, 500, 1000]),
        ({"fps": 0.1}, [0, 100, 200, 300, 400, 500]),
        ({"fps": 1e-9}, [0]),
        ({"fps": 1e9, "max_seconds": 1, "max_frames": 5}, [0, 2, 4, 6, 8]),
    ],
)
def test_limits(long: Path, options: dict[str, Any], expected: list[int]) -> None:
    frames = read_video(long, **options)
    assert numbers(frames) == expected
    assert seconds(frames) == [index / 10 for index in expected]


def test_defaults_are_the_model_cards(long: Path) -> None:
    assert (video.DEFAULT_FPS, video.MAX_FRAMES, video.MAX_SECONDS, video.VIDEO_SOFT_TOKENS) == (1.0, 32, 60.0, 70)
    frames = read_video(long)
    assert len(frames) == 32 and 58 < frames[-1].seconds < 60


def test_what_is_not_needed_is_neither_decoded_nor_converted(long: Path, decoded: dict[str, int]) -> None:
    """Of 150 s the first minute, and there from each keyframe on only."""
    read_video(long)
    assert decoded["converted"] == 32 and decoded["decoded"] <= 320
    decoded["decoded"] = 0
    assert numbers(read_video(long, max_seconds=150, max_frames=3)) == [0, 500, 1000]
    assert decoded["decoded"] <= 30


def test_only_the_part_of_a_file_that_is_needed_is_read(long: Path, folder: Path) -> None:
    reads = 0

    class Counting(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal reads
            data = super().read(size)
            reads += len(data)
            return data

    stills = [np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for seed in range(8)]
    frames = itertools.islice(itertools.cycle(stills), 600)
    data = make(folder / "noise.mkv", frames, format="matroska", codec="mjpeg", pix_fmt="yuvj420p").read_bytes()
    assert len(list(video._decoded("noise", Counting(data), Fraction(1), 32, Fraction(3)))) == 3
    assert reads < len(data) / 4


@pytest.mark.parametrize("format", ["matroska", "webm", "mpegts", "avi", "flv", "asf"])
def test_jumps_in_every_format(folder: Path, format: str, decoded: dict[str, int]) -> None:
    codec = {"webm": "libvpx", "avi": "mpeg4", "asf": "wmv2"}.get(format, "libx264")
    path = make(folder / f"jump.{format}", 900, format=format, codec=codec, gop=20)
    frames = read_video(path, max_seconds=90, max_frames=3)
    assert numbers(frames) == [0, 300, 600] and seconds(frames) == [0, 30, 60]
    assert decoded["decoded"] < 450


def test_jumps_of_a_file_without_an_index_that_land_too_late(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search goes back step by step, in the end to the beginning."""
    path = make(folder / "steps.ts", 900, format="mpegts", gop=20)
    stamp, goals = video._Reader._stamp, []

    def late(self: Any, time: Fraction) -> int:
        goals.append(time)
        return stamp(self, time + 45 if time > 0 else time)

    monkeypatch.setattr(video._Reader, "_stamp", late)
    monkeypatch.setattr(video._Reader, "_is_jump_worth", lambda self, limit: True)
    assert numbers(read_video(path, max_seconds=90, max_frames=3)) == [0, 300, 600]
    assert 0 in goals


def test_file_that_cannot_jump_is_read_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(folder / "no-jump.ts", 400, format="mpegts", gop=20)
    tried = []

    class Rigid:
        def __init__(self, container: Any) -> None:
            self.demux = container.demux

        def seek(self, *arguments: Any, **options: Any) -> None:
            tried.append(arguments)
            raise av.error.OSError(1, "Operation not permitted")

    prepare = video._Reader.__init__

    def rigid(self: Any, name: str, container: Any, stream: Any) -> None:
        prepare(self, name, Rigid(container), stream)  # type: ignore[arg-type]

    monkeypatch.setattr(video._Reader, "__init__", rigid)
    assert numbers(read_video(path, max_frames=3)) == [0, 133, 266]
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("format", "codec", "pix_fmt"),
    [
        ("mp4", "libx264", "yuv420p"),
        ("mp4", "mpeg4", "yuv420p"),
        ("mov", "mpeg4", "yuv420p"),
        ("webm", "libvpx", "yuv420p"),
        ("webm", "libvpx-vp9", "yuv420p"),
        ("matroska", "libx264", "yuv420p"),
        ("matroska", "ffv1", "yuv420p10le"),
        ("avi", "mpeg4", "yuv420p"),
        ("mpegts", "libx264", "yuv420p"),
        ("flv", "libx264", "yuv420p"),
        ("asf", "wmv2", "yuv420p"),
        ("gif", "gif", "rgb8"),
        ("mov", "qtrle", "rgb24"),
    ],
)
def test_formats(folder: Path, format: str, codec: str, pix_fmt: str) -> None:
    path = make(folder / f"{codec}.{format}", format=format, codec=codec, pix_fmt=pix_fmt)
    assert numbers(read_video(path)) == [0, 10, 20]
    assert seconds(read_video(path)) == [0, 1, 2]
    assert numbers(read_video(path, fps=10)) == list(range(30))


def test_mpeg_program_stream(folder: Path) -> None:
    """Its length is a guess of FFmpeg's, a few frames short; its frames are right."""
    path = make(folder / "program.mpg", 75, format="mpeg", codec="mpeg2video", rate=25)
    frames = read_video(path, fps=5)
    assert len(frames) >= 13
    np.testing.assert_allclose(seconds(frames), np.array(numbers(frames)) / 25, atol=1e-3)


# -- variable frame rate, odd times ------------------------------------------------------------------------------------

UNEVEN = [0, 100, 200, 3000, 3100, 5900, 6500, 6600, 6700, 7900]


@pytest.mark.parametrize(("format", "codec"), [("mp4", "libx264"), ("webm", "libvpx"), ("matroska", "libx264")])
def test_variable_frame_rate(folder: Path, format: str, codec: str) -> None:
    """The frame shown at each second, whatever its place in the file; one that still stands gets the second itself."""
    path = make(
        folder / f"uneven.{format}",
        len(UNEVEN),
        format=format,
        codec=codec,
        times=UNEVEN,
        codec_options={"bf": "0"} if codec == "libx264" else {},
    )
    frames = read_video(path, max_seconds=7)
    assert numbers(frames) == [0, 2, 2, 3, 4, 4, 5]
    assert seconds(frames) == [0, 0.2, 2, 3, 3.1, 5, 5.9]
    assert frames[1].image is frames[2].image


def test_more_frames_than_there_are(folder: Path) -> None:
    """The reference raises an error."""
    frames = read_video(make(folder / "two.mp4", 2, rate=1), fps=2)
    assert numbers(frames) == [0, 0, 1, 1] and seconds(frames) == [0, 0.5, 1, 1.5]


@pytest.mark.parametrize(
    ("format", "codec"), [("mp4", "libx264"), ("webm", "libvpx"), ("mpegts", "libx264"), ("avi", "mpeg4")]
)
def test_one_frame(folder: Path, format: str, codec: str) -> None:
    frames = read_video(make(folder / f"one.{format}", [picture(7)], format=format, codec=codec))
    assert numbers(frames) == [7] and seconds(frames) == [0]


@pytest.mark.parametrize("format", ["mp4", "matroska", "mpegts", "flv"])
def test_time_counts_from_the_first_frame(folder: Path, format: str) -> None:
    times = list(range(7000, 10000, 100))
    path = make(folder / f"later.{format}", format=format, times=times, options={"avoid_negative_ts": "disabled"})
    with av.open(str(path)) as container:
        assert container.start_time and container.start_time >= 1.4e6
    frames = read_video(path)
    assert numbers(frames) == [0, 10, 20] and seconds(frames) == [0, 1, 2]


@pytest.mark.parametrize(
    ("format", "options"),
    [("webm", {"live": "1"}), ("matroska", {"live": "1"}), ("mp4", {"movflags": "frag_keyframe+empty_moov"})],
)
def test_file_that_does_not_say_how_long_it_is(folder: Path, format: str, options: dict[str, str]) -> None:
    codec = "libvpx" if format == "webm" else "libx264"
    path = make(folder / f"live.{format}", 50, format=format, codec=codec, options=options)
    if format != "mp4":
        with av.open(str(path)) as container:
            assert container.duration is None and container.streams.video[0].duration is None
    assert numbers(read_video(path)) == [0, 10, 20, 30, 40]
    assert numbers(read_video(path, max_seconds=2)) == [0, 10]


@pytest.mark.parametrize("format", ["matroska", "mp4"])
def test_first_keyframe_is_late(folder: Path, format: str) -> None:
    """What comes before it cannot be decoded: not grey guesses, but the times from it on."""
    options = {"bf": "0", "x264-params": "keyint=15:min-keyint=15:scenecut=0"}
    source = make(folder / "keys.mp4", 45, codec_options=options)
    path = remux(source, folder / f"late.{format}", format=format, keep=lambda index: index >= 4)
    frames = read_video(path)
    start = frames[0].seconds
    assert start == pytest.approx(1.1) and numbers(frames)[0] == 15
    assert all(number(frame.image) == round(frame.seconds * 10) + 4 for frame in frames)
    assert all(later.seconds > earlier.seconds for earlier, later in itertools.pairwise(frames))


def test_broadcast_that_begins_in_the_middle(folder: Path) -> None:
    data = make(folder / "cast.ts", 100, format="mpegts", gop=30).read_bytes()
    frames = read_video(data[188 * 30 :])
    assert frames and numbers(frames)[-1] > 80


def test_edit_list(folder: Path) -> None:
    """A trimmed file keeps the frames from the keyframe on, and says that they are not shown."""
    options = {"bf": "0", "x264-params": "keyint=40:min-keyint=40:scenecut=0"}
    source = make(folder / "whole.mp4", 40, codec_options=options)
    with av.open(str(source)) as container:
        tick = container.streams.video[0].time_base
        assert tick is not None
    path = remux(
        source, folder / "cut.mp4", format="mp4", shift=-round(1.5 / float(tick)), avoid_negative_ts="disabled"
    )
    assert b"elst" in path.read_bytes()
    frames = read_video(path)
    assert numbers(frames) == [15 + 25 * index // 2 for index in range(2)] and frames[0].seconds == 0


def test_sound_longer_than_the_picture(folder: Path) -> None:
    """As a player shows it, the last frame stands."""
    path = folder / "sound.mkv"
    with av.open(str(path), "w", format="matroska") as container:
        stream, sound = container.add_stream("libx264", rate=10), container.add_stream("aac", rate=48000, layout="mono")
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(20):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        write_sound(container, sound, 6)
    frames = read_video(path, max_seconds=5)
    assert numbers(frames) == [0, 10, 19, 19, 19] and seconds(frames) == [0, 1, 1.9, 3, 4]


# -- pictures ----------------------------------------------------------------------------------------------------------


def corners() -> np.ndarray:
    """Return red, green, blue and white: top left, top right, bottom left, bottom right."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :32], pixels[:16, 32:], pixels[16:, :32], pixels[16:, 32:] = RED, GREEN, BLUE, WHITE
    return pixels


def corner_colours(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return np.array([pixels[y, x] for y in (5, -6) for x in (5, -6)]) > 128


def apply_matrix(pixels: np.ndarray, matrix: bytes) -> np.ndarray:
    """Move each pixel as a display matrix says, without knowing what the result should be."""
    a, b, _, c, d = (value / 65536 for value in struct.unpack("=5i", matrix[:20]))
    height, width = pixels.shape[:2]
    points = {}
    for y, x in np.ndindex(height, width):
        right, down = 2 * x - width + 1, 2 * y - height + 1  # from the middle, in half pixels
        points[round(a * right + c * down), round(b * right + d * down)] = pixels[y, x]
    columns, rows = sorted({x for x, _ in points}), sorted({y for _, y in points})
    return np.array([[points[x, y] for x in columns] for y in rows])


@pytest.mark.parametrize("flips", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("angle", [0, 90, 180, 270])
@pytest.mark.parametrize("format", ["mov", "matroska"])
def test_turned_and_mirrored(folder: Path, format: str, angle: int, flips: tuple[bool, bool]) -> None:
    path = make(
        folder / f"turned.{format}", [corners()] * 2, format=format, codec="mpeg4", rotation=(angle, *flips), rate=1
    )
    with av.open(str(path)) as container:
        matrix = bytes(
            next(container.decode(video=0)).side_data.get("DISPLAYMATRIX", struct.pack("=5i", 65536, 0, 0, 0, 65536))
        )
    expected = Image.fromarray(apply_matrix(corners(), matrix))
    image = read_video(path)[0].image
    assert image.size == expected.size == ((32, 64) if angle % 180 else (64, 32))
    np.testing.assert_array_equal(corner_colours(image), corner_colours(expected))
    if flips == (False, False):  # counterclockwise
        np.testing.assert_array_equal(
            corner_colours(image), corner_colours(Image.fromarray(np.rot90(corners(), angle // 90)))
        )


def test_other_angles_are_left_alone(folder: Path) -> None:
    path = make(folder / "tilted.mov", [corners()] * 2, format="mov", codec="mpeg4", rotation=(45, False, False))
    np.testing.assert_array_equal(corner_colours(read_video(path)[0].image), corner_colours(Image.fromarray(corners())))


@pytest.mark.parametrize(("tag", "turns"), [("0", 0), ("90", 3), ("180", 2), ("270", 1), ("x", 0)])
def test_turned_by_a_tag(folder: Path, tag: str, turns: int) -> None:
    """Clockwise."""
    path = make(folder / "tag.mkv", [corners()] * 2, format="matroska", codec="mpeg4", tags={"rotate": tag})
    expected = corner_colours(Image.fromarray(np.rot90(corners(), turns)))
    np.testing.assert_array_equal(corner_colours(read_video(path)[0].image), expected)


def test_side_data_that_pyav_does_not_know() -> None:
    class Strange:
        rotation = -90

        @property
        def side_data(self) -> None:
            raise ValueError("37 is not a valid Type")

    assert video._turn(Strange(), None) == "ROTATE_270"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("format", "codec", "pix_fmt", "is_clear"),
    [
        ("matroska", "ffv1", "bgra", True),
        ("matroska", "ffv1", "yuva420p", True),
        ("mov", "png", "rgba64be", True),
        ("mov", "qtrle", "argb", True),
        ("mov", "prores_ks", "yuva444p10le", True),
        ("matroska", "ffv1", "gbrp12le", False),
        ("matroska", "ffv1", "yuv410p", False),
        ("matroska", "mjpeg", "yuvj420p", False),
        ("avi", "rawvideo", "rgb555le", False),
    ],
)
def test_pixel_formats(folder: Path, format: str, codec: str, pix_fmt: str, is_clear: bool) -> None:
    """Red; on the right transparent, which becomes white where the format has alpha."""
    pixels = np.full((32, 64, 4), (255, 0, 0, 255), np.uint8)
    pixels[:, 32:, 3] = 0
    path = make(folder / f"{pix_fmt}.{format}", [pixels] * 2, format=format, codec=codec, pix_fmt=pix_fmt)
    image = np.asarray(read_video(path)[0].image).astype(int)
    assert image.shape == (32, 64, 3)
    assert abs(image[9, 9] - RED).max() < 12
    assert abs(image[9, 50] - (WHITE if is_clear else RED)).max() < 12


@pytest.mark.parametrize("pix_fmt", ["gray", "gray16le"])
def test_grey(folder: Path, pix_fmt: str) -> None:
    path = make(folder / f"{pix_fmt}.mkv", format="matroska", codec="ffv1", pix_fmt=pix_fmt)
    assert numbers(read_video(path)) == [0, 10, 20]


@pytest.mark.parametrize(("colorspace", "red"), [(1, (254, 0, 0)), (5, (232, 0, 1))])
def test_colour_matrix_of_the_file_is_heeded(folder: Path, colorspace: int, red: tuple[int, int, int]) -> None:
    """Y 63, Cb 102, Cr 240 are pure red by BT.709; by BT.601 they are another."""
    path = folder / "matrix.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = colorspace, 1
        frame = av.VideoFrame(64, 32, "yuv420p")
        for plane, value in zip(frame.planes, (63, 102, 240), strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        frame.pts, frame.colorspace = 0, colorspace
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert abs(np.asarray(read_video(path)[0].image)[9, 9].astype(int) - red).max() <= 3


def test_odd_sizes(folder: Path) -> None:
    path = make(folder / "odd.mkv", [np.full((31, 63, 3), RED, np.uint8)] * 2, format="matroska", codec="ffv1")
    assert read_video(path)[0].image.size == (63, 31)


# -- sources -----------------------------------------------------------------------------------------------------------


def test_every_source_gives_the_same_frames(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = short.read_bytes()
    url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    monkeypatch.setenv("HOME", str(short.parent))
    for source in (short, str(short), "~/short.mp4", data, bytearray(data), memoryview(data), url):
        assert numbers(read_video(source)) == [0, 10, 20]  # type: ignore[arg-type]


def test_frames_come_one_by_one(long: Path, decoded: dict[str, int]) -> None:
    frames = iter_video(long)
    assert decoded == {"decoded": 0, "converted": 0}
    next(frames)
    assert decoded["converted"] == 1 and decoded["decoded"] <= 3
    frames.close()  # type: ignore[attr-defined]
    assert next(frames, None) is None


def test_the_file_is_closed(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[io.BytesIO] = []

    def opened(source: Any, *arguments: Any) -> tuple[str, io.BytesIO]:
        files.append(io.BytesIO(source))
        return "x", files[-1]

    monkeypatch.setattr(video, "open_source", opened)
    read_video(short.read_bytes())
    next(iter_video(short.read_bytes()))
    refused(b"no")
    frames = iter_video(short.read_bytes())
    next(frames)
    del frames
    assert [file.closed for file in files] == [True] * 4


def test_a_list_of_frames_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    image = Image.fromarray(picture(3))
    image.save(tmp_path / "a.png")
    pairs = [(image, 0), (str(tmp_path / "a.png"), 0.5), [(tmp_path / "a.png").read_bytes(), np.float32(90)]]
    frames = read_video([*pairs, Frame(image, 7200)])  # type: ignore[list-item]
    assert numbers(frames) == [3, 3, 3, 3] and seconds(frames) == [0, 0.5, 90, 7200]
    assert numbers(read_video(tuple(frames))) == [3, 3, 3, 3]
    clear = Image.new("RGBA", (9, 9), (0, 0, 0, 0))
    assert read_video([(clear, 0)])[0].image.getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "video: got a list of 0 frames, expected 1 to 32"),
        ([("a.png", 0)] * 33, "video: got a list of 33 frames, expected 1 to 32"),
        ([5], "video, frame 1 of 1: got int, expected a Frame or a pair of image and seconds"),
        (["a.png"], "video, frame 1 of 1: got str, expected a Frame or a pair of image and seconds"),
        ([("a.png",)], "video, frame 1 of 1: got tuple, expected a Frame or a pair of image and seconds"),
        ([("a.png", "0")], f"video, frame 1 of 1: got the time '0', {SECONDS}"),
        ([("a.png", True)], f"video, frame 1 of 1: got the time True, {SECONDS}"),
        ([("a.png", -1)], f"video, frame 1 of 1: got the time -1, {SECONDS}"),
        ([("a.png", 0), ("a.png", math.nan)], f"video, frame 2 of 2: got the time nan, {SECONDS}"),
        ([("a.png", math.inf)], f"video, frame 1 of 1: got the time inf, {SECONDS}"),
        ([("a.png", 360_000)], f"video, frame 1 of 1: got the time 360000, {SECONDS}"),
        ([("a.png", 1e300)], f"video, frame 1 of 1: got the time 1e+300, {SECONDS}"),
        ([("a.png", 10**400)], f"video, frame 1 of 1: got the time 1{'0' * 17}...{'0' * 19}, {SECONDS}"),
        ([("a", 1), ("a", 1)], "video, frame 2 of 2: got the time 1, expected more than 1.0, the one before"),
        ([("a", 2), ("a", 1)], "video, frame 2 of 2: got the time 1, expected more than 2.0, the one before"),
        ([("/no/a.png", 0)], "video, frame 1 of 1: image '/no/a.png' cannot be read: No such file or directory"),
    ],
)
def test_lists_that_cannot_be_used(frames: Any, message: str) -> None:
    assert refused(frames) == message


# -- what cannot be used -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, -0.5, math.nan, math.inf, -math.inf, None, "1", True])
@pytest.mark.parametrize("name", ["fps", "max_seconds"])
def test_bad_limits(short: Path, name: str, value: Any) -> None:
    assert refused(short, **{name: value}) == f"{name}: got {value!r}, expected a number above 0"


@pytest.mark.parametrize("value", [0, -1, 1.5, math.nan, None, "8", True])
def test_bad_numbers_of_frames(short: Path, value: Any) -> None:
    message = f"max_frames: got {value!r}, expected a whole number from 1 on"
    assert refused(short, max_frames=value) == message
    with pytest.raises(VideoError):  # at once, not with the first frame
        iter_video(short, max_frames=value)


@pytest.mark.parametrize("value", [-1, -0.001, math.nan, math.inf, 360_000, 1e300, None, "7", True])
def test_times_without_a_stamp(value: Any) -> None:
    with pytest.raises(VideoError) as error:
        timestamp(value)
    assert str(error.value) == f"time of a frame: got {value!r}, {SECONDS}"


@pytest.mark.parametrize(
    ("time", "stamp"),
    [
        (0, "00:00"),
        (7, "00:07"),
        (7.999, "00:07"),
        (60, "01:00"),
        (61.5, "01:01"),
        (3599.9, "59:59"),
        (6000, "100:00"),
        (359_999, "5999:59"),
    ],
)
def test_time_stamps(time: float, stamp: str) -> None:
    assert timestamp(time) == stamp


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (5, "video: got int, expected a path, bytes, a data URL or a list of frames with their times"),
        (None, "video: got NoneType, expected a path, bytes, a data URL or a list of frames with their times"),
        ("/no/a.mp4", "video '/no/a.mp4' cannot be read: No such file or directory"),
        ("/tmp", "video '/tmp' cannot be read: Is a directory"),
        ("concat:/tmp/a|/tmp/b", "video 'concat:/tmp/a|/tmp/b' cannot be read: No such file or directory"),
        ("file:/tmp/a.mp4", "video 'file:/tmp/a.mp4' cannot be read: No such file or directory"),
        ("http://a/b.mp4", "video 'http://a/b.mp4': got a web address, expected a file: videos are not fetched"),
        ("HTTPS://a/b", "video 'HTTPS://a/b': got a web address, expected a file: videos are not fetched"),
        (
            "data:video/mp4,ab",
            "video 'data:video/mp4,ab': got a data URL without base64, expected data:video/...;base64,...",
        ),
        (b"", f"video of 0 bytes is not a video: got an empty file, expected {EXPECTED}"),
        (b"words", f"video of 5 bytes is not a video: got something else, expected {EXPECTED}"),
        (
            b"\0\0\0\x18ftypisom",
            "video of 12 bytes is damaged or truncated: got the beginning of an MP4 or MOV file, expected all of it",
        ),
    ],
)
def test_sources_that_cannot_be_used(source: Any, message: str) -> None:
    assert refused(source) == message


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_image_in_place_of_a_video(format: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, format)
    message = f"is not a video: got an image ({format}), expected {EXPECTED}"
    assert refused(buffer.getvalue()) == f"video of {len(buffer.getvalue()):,} bytes {message}"


def test_huge_image_in_place_of_a_video() -> None:
    """Pillow raises an error of its own for it."""
    header = struct.pack(">4sIIBBBBB", b"IHDR", 20_000, 20_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data += struct.pack(">I4s", 50, b"IDAT") + bytes(54)
    message = f"is not a video: got an image, a huge one, expected {EXPECTED}"
    assert refused(data) == f"video of {len(data)} bytes {message}"


def test_image_that_looks_like_an_mp4(short: Path) -> None:
    data = short.read_bytes()
    assert data[4:12] == b"ftypisom"
    assert refused(data[:8] + b"heic" + data[12:]).endswith(
        f"is not a video: got an image (AVIF or HEIC), expected {EXPECTED}"
    )


def test_animation_is_a_video() -> None:
    buffer = io.BytesIO()
    images = [Image.fromarray(picture(index)) for index in range(4)]
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=500)
    frames = read_video(buffer.getvalue())
    assert numbers(frames) == [0, 2] and seconds(frames) == [0, 1]


@pytest.mark.parametrize(
    ("format", "codec", "cover"),
    [("mp4", "aac", False), ("mp4", "aac", True), ("matroska", "aac", False), ("mp3", "libmp3lame", True)],
)
def test_sound_without_pictures(folder: Path, format: str, codec: str, cover: bool) -> None:
    """The picture on a cover, which FFmpeg shows as a video stream, is none."""
    path = folder / f"music-{cover}.{format}"
    with av.open(str(path), "w", format=format) as container:
        sound = container.add_stream(codec, rate=48000, layout="mono")
        if cover:
            art = container.add_stream("mjpeg", rate=1)
            art.width, art.height, art.pix_fmt, art.disposition = WIDTH, HEIGHT, "yuvj420p", Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(picture(1), format="rgb24").reformat(format="yuvj420p")
            container.mux([*art.encode(frame), *art.encode()])
        write_sound(container, sound, 3)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == cover
    ending = "has no video stream: got audio, expected pictures"
    if format == "mp3":
        ending = f"is not a video: got something else, expected {EXPECTED}"
    assert refused(path) == f"video {str(path)!r} {ending}"


@pytest.mark.parametrize(
    ("format", "ending"),
    [
        ("mp4", "has no video stream: got nothing, expected pictures"),
        ("matroska", "is damaged or truncated: End of file"),
    ],
)
def test_no_frames(folder: Path, format: str, ending: str) -> None:
    source = make(folder / "for-none.mp4", 3)
    path = folder / f"none.{format}"
    with av.open(str(source)) as old, av.open(str(path), "w", format=format) as new:
        new.add_stream_from_template(old.streams.video[0])
        new.start_encoding()
    assert refused(path) == f"video {str(path)!r} {ending}"


def test_no_keyframe(folder: Path) -> None:
    source = make(folder / "one-key.mp4", 20, gop=100, codec_options={"x264-params": "scenecut=0"})
    path = remux(source, folder / "no-key.mkv", format="matroska", keep=lambda index: index > 0)
    ending = "is empty: got no frame that can be decoded, expected at least one"
    assert refused(path) == f"video {str(path)!r} {ending}"


@pytest.mark.parametrize("part", [0.3, 0.6, 0.85])
@pytest.mark.parametrize("format", ["mp4", "faststart", "matroska", "webm", "avi"])
def test_truncated(folder: Path, format: str, part: float) -> None:
    options = {"movflags": "faststart"} if format == "faststart" else {}
    container = "mp4" if format == "faststart" else format
    codec = {"webm": "libvpx", "avi": "mpeg4"}.get(format, "libx264")
    path = folder / f"truncated.{format}"
    if not path.exists():
        make(path, 200, format=container, codec=codec, options=options)
    data = path.read_bytes()
    begin = data.index(b"movi") if format == "avi" else 0
    end = data.index(b"idx1") if format == "avi" else len(data)
    message = refused(data[: begin + int((end - begin) * part)])
    assert re.match(r"video of [\d,]+ bytes (is (damaged or )?truncated|cannot be decoded): ", message)


@pytest.mark.parametrize(("format", "codec"), [("mp4", "libx264"), ("mov", "mpeg4")])
def test_damaged(folder: Path, format: str, codec: str) -> None:
    data = bytearray(make(folder / f"damaged.{format}", 100, format=format, codec=codec).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 300] = np.random.default_rng(1).bytes(300)
    assert refused(bytes(data)).endswith("is damaged or truncated: Invalid data found when processing input")


def test_noise_never_crashes(folder: Path) -> None:
    """Damage anywhere: frames or one line, nothing else."""
    generator = np.random.default_rng(0)
    for format, codec in (("mp4", "libx264"), ("webm", "libvpx"), ("mpegts", "libx264"), ("avi", "mpeg4")):
        whole = make(folder / f"noise.{format}", 20, format=format, codec=codec).read_bytes()
        for _ in range(40):
            data = bytearray(whole)
            for place in generator.integers(0, len(data), 5):
                data[place] = generator.integers(256)
            try:
                frames = read_video(bytes(data))
            except VideoError as error:
                assert "\n" not in str(error)
            else:
                assert frames and all(a.seconds < b.seconds for a, b in itertools.pairwise(frames))


def test_ffmpeg_writes_nothing(short: Path, run_program: Any) -> None:
    program = (
        "import sys; from mlx_diffusiongemma.video import *\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "for part in (data[:-200], b'x' * 9999, data[:2000] + bytes(300) + data[2300:]):\n"
        "    try: read_video(part)\n"
        "    except VideoError: pass\n"
    )
    done = run_program("-c", program, str(short))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(
    "playlist",
    [
        "ffconcat version 1.0\nfile '{path}'\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\n{path}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\nhttp://localhost:1/a.ts\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><BaseURL>{path}</BaseURL></Period>',
    ],
)
@pytest.mark.parametrize("is_file", [False, True])
def test_playlists_are_refused(tmp_path: Path, short: Path, playlist: str, is_file: bool) -> None:
    """Neither is what they name opened."""
    text = playlist.format(path=short)
    (tmp_path / "a.m3u8").write_text(text)
    message = refused(tmp_path / "a.m3u8" if is_file else text.encode())
    assert message.endswith(f"is not a video: got something else, expected {EXPECTED}")


def test_a_file_inside_a_video_is_not_opened() -> None:
    with pytest.raises(PermissionError):
        video._refuse("/etc/passwd", 1, {})


def test_decompression_bombs(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_PIXELS", 5631)
    message = "is too large: got 176 x 32 = 5,632 pixels, expected at most 5,631"
    assert refused(short) == f"video {str(short)!r} {message}"


def test_decompression_bomb_behind_small_frames(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of a broadcast may change on the way."""
    small = make(folder / "small.ts", 20, format="mpegts")
    large = make(folder / "large.ts", [np.zeros((64, 352, 3), np.uint8)] * 40, format="mpegts")
    shifted = remux(large, folder / "shifted.ts", format="mpegts", shift=180_000)
    monkeypatch.setattr(video, "MAX_PIXELS", 6000)
    message = refused(small.read_bytes() + shifted.read_bytes(), fps=5)
    assert message.endswith("is too large: got 352 x 64 = 22,528 pixels, expected at most 6,000")


def test_every_decoder_has_the_limit(short: Path) -> None:
    with av.open(str(short)) as container:
        assert video._video_stream("x", container).codec_context.options == {"max_pixels": "89478485"}


def test_without_pyav(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    message = "nothing to decode it with, expected PyAV: pip install 'mlx_diffusiongemma[video]' (or a list of frames)"
    assert refused(short) == f"video {str(short)!r}: {message}"


def test_nothing_heavy_is_imported(run_program: Any) -> None:
    program = "import sys, mlx_diffusiongemma.video; print({'av', 'PIL', 'transformers', 'mlx'} & set(sys.modules))"
    assert run_program("-c", program).stdout.strip() == b"set()"


def test_first_video_stream_that_is_default(folder: Path) -> None:
    """Not one before it that is marked as something else."""
    path = folder / "several.mkv"
    marks = (Disposition.dub, Disposition.default, Disposition.default)
    with av.open(str(path), "w", format="matroska") as container:
        streams = [container.add_stream("mpeg4", rate=1) for _ in marks]
        for stream, mark in zip(streams, marks, strict=True):
            stream.width, stream.height, stream.pix_fmt, stream.disposition = WIDTH, HEIGHT, "yuv420p", mark
        for index, stream in enumerate(streams):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = 0, Fraction(1)
            container.mux([*stream.encode(frame), *stream.encode()])
    with av.open(str(path)) as container:
        dispositions = [bool(stream.disposition & Disposition.default) for stream in container.streams.video]
    assert dispositions == [False, True, True]
    assert numbers(read_video(path)) == [1]
