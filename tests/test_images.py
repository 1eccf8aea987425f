"""Pictures to patches: equal to the reference's image processor, every colour mode, every bad input with its line."""

from __future__ import annotations

import base64
import io
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_model import vision_config
from terminal import environment
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from mlx_diffusiongemma import images, sources
from mlx_diffusiongemma.config import VisionConfig
from mlx_diffusiongemma.images import SOFT_TOKENS, ImageError, cut_image, read_image
from mlx_diffusiongemma.sources import shorten

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def tower(**values: Any) -> VisionConfig:
    """Return a config with patches as large as in the released model."""
    return vision_config(**{"patch_size": 16, "pooling_kernel_size": 3, "position_embedding_size": 10240} | values)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def is_lossless(format: str) -> bool:
    return format not in ("JPEG", "WEBP", "GIF")


# -- patches ----------------------------------------------------------------------------------------------------------

# Width and height; 260 soft tokens of 280 or so for most, fewer for the extreme ones.
SIZES = [
    (384, 188), (640, 480), (480, 640), (768, 768), (1920, 1080), (1, 1), (3, 3), (3, 200), (200, 3), (47, 49),
    (1104, 528), (5000, 1), (1, 5000), (900, 30), (12, 900),
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches_equal_the_reference(size: tuple[int, int]) -> None:
    image = noise(*size)
    ours = cut_image(read_image(encode(image)), tower(), 280)
    expected = Gemma4ImageProcessorPil().preprocess(image, return_tensors="np")
    P = len(ours.patches)
    assert ours.soft_tokens == expected["num_soft_tokens_per_image"][0] == P / 9 <= 280
    assert (ours.patches.dtype, ours.position_ids.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(ours.patches, expected["pixel_values"][0, :P])
    np.testing.assert_array_equal(ours.position_ids, expected["image_position_ids"][0, :P])
    assert not expected["pixel_values"][0, P:].any() and (expected["image_position_ids"][0, P:] == -1).all()


@pytest.mark.parametrize("budget", SOFT_TOKENS)
@pytest.mark.parametrize("patch_size", [8, 16])
def test_budgets_equal_the_reference(budget: int, patch_size: int) -> None:
    image = noise(150, 100)
    ours = cut_image(image, tower(patch_size=patch_size), budget)
    processor = Gemma4ImageProcessorPil(max_soft_tokens=budget, patch_size=patch_size)
    expected = processor.preprocess(image, return_tensors="np")
    np.testing.assert_array_equal(ours.patches, expected["pixel_values"][0, : len(ours.patches)])
    assert 0.8 * budget < ours.soft_tokens == expected["num_soft_tokens_per_image"][0] <= budget


@pytest.mark.parametrize(
    ("size", "grid", "tokens"),
    [
        ((384, 188), (69, 33), 253),
        ((640, 480), (57, 42), 266),
        ((100, 100), (48, 48), 256),
        ((1920, 1080), (66, 36), 264),
        ((5000, 1), (840, 3), 280),
        ((1, 5000), (3, 840), 280),
    ],
)
def test_known_sizes(size: tuple[int, int], grid: tuple[int, int], tokens: int) -> None:
    """Columns, rows and soft tokens by hand: 1104 x 528 pixels are 69 x 33 patches."""
    cut = cut_image(noise(*size), tower(), 280)
    assert tuple(cut.position_ids.max(axis=0) + 1) == grid
    assert cut.soft_tokens == tokens == grid[0] * grid[1] // 9


def test_patches_are_rows_of_pixels() -> None:
    """Without a resize a patch is its 16 x 16 pixels, row by row, red green blue."""
    image = noise(768, 768)
    cut = cut_image(image, tower(), 280)
    column, row = cut.position_ids[100]
    assert (column, row) == (100 % 48, 100 // 48)
    pixels = np.asarray(image)[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
    np.testing.assert_allclose(cut.patches[100], pixels.reshape(-1) / np.float32(255), rtol=1e-6)


@pytest.mark.parametrize("budget", [0, 100, 281, -70, 280.0, None, "280"])
def test_other_budgets_are_refused(budget: Any) -> None:
    with pytest.raises(ImageError) as error:
        cut_image(noise(9, 9), tower(), budget)
    assert str(error.value) == f"image_tokens: got {budget!r}, expected one of 70, 140, 280, 560, 1120"


def test_image_longer_than_the_position_tables() -> None:
    with pytest.raises(ImageError) as error:
        cut_image(noise(900, 3), tower(position_embedding_size=64), 70)
    message = "image: got 210 x 3 patches from 900 x 3 pixels, expected at most 64 patches a side"
    assert str(error.value) == message


def test_neither_torch_nor_torchvision_is_needed() -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['torchvision'] = None\n"
        "import mlx_diffusiongemma.images as images, PIL.Image\n"
        "assert 'transformers' not in sys.modules\n"
        "from test_images import tower\n"
        "print(images.cut_image(PIL.Image.new('RGB', (640, 480)), tower(), 70).patches.shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, env=environment(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.strip() == b"(567, 768)"


def test_nothing_heavy_is_imported() -> None:
    program = "import sys, mlx_diffusiongemma.images; print({'PIL', 'transformers', 'torch', 'mlx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, check=True)
    assert done.stdout.strip() == b"set()"


# -- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_every_source_gives_the_same_picture(tmp_path: Path, monkeypatch: Any, format: str) -> None:
    image = noise(20, 10)
    data = encode(image, format)
    path = tmp_path / f"picture with a space.{format.lower()}"
    path.write_bytes(data)
    url = f"data:image/{format.lower()};base64,{base64.b64encode(data).decode()}"
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = [path, str(path), f"~/{path.name}", data, bytearray(data), url, "DATA:;BASE64," + url.split(",")[1]]
    sources.append(f"{url[:60]}\n{url[60:]}")
    read = [read_image(source) for source in sources]
    assert {(picture.mode, picture.size) for picture in read} == {("RGB", (20, 10))}
    assert len({picture.tobytes() for picture in read}) == 1
    if is_lossless(format):
        assert read[0].tobytes() == image.tobytes()
    opened = Image.open(path)
    assert read_image(opened).tobytes() == read[0].tobytes()


def piped(data: bytes) -> Image.Image:
    """Read an image from a pipe, as `--image <(command)` does."""
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    try:
        return read_image(f"/dev/fd/{reader}")
    finally:
        os.close(reader)


def test_a_pipe_is_read_to_its_end(monkeypatch: Any) -> None:
    image = noise(20, 10)
    assert piped(encode(image)).tobytes() == image.tobytes()
    with pytest.raises(ImageError, match=r"^image '/dev/fd/\d+' is not an image: got something else, expected PNG"):
        piped(b"hello")
    with pytest.raises(ImageError, match=r"^image '/dev/fd/\d+' is not an image: got an empty file"):
        piped(b"")
    monkeypatch.setattr(sources, "MAX_PIPE_BYTES", 9)
    with pytest.raises(ImageError, match=r"^image '/dev/fd/\d+' cannot be read: got more than 9 bytes from a pipe$"):
        piped(encode(image))


def test_a_name_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~backup.png").write_bytes(encode(noise(20, 10)))
    assert read_image("~backup.png").size == (20, 10)


def test_a_pillow_image_is_left_as_it_was() -> None:
    image = noise(4, 4, "RGBA")
    before = image.tobytes()
    assert read_image(image).mode == "RGB"
    assert (image.mode, image.tobytes()) == ("RGBA", before)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:])
        assert Image.open(io.BytesIO(data)).n_frames == 2
        red, green, _ = read_image(data).getpixel((3, 3))
        assert red > 240 and green < 10, format
        second = Image.open(io.BytesIO(data))
        second.seek(1)
        assert read_image(second).getpixel((3, 3))[1] > 240  # the caller chose this one


# -- colours ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBX", "RGBa"])
def test_every_mode_is_what_the_reference_makes_of_it(mode: str) -> None:
    colours = Image.new("RGB", (48, 48), (200, 100, 50))
    colours.paste((10, 200, 250), (0, 0, 20, 48))
    image = colours.convert("RGBA").convert("RGBa") if mode == "RGBa" else colours.convert(mode)
    got = cut_image(read_image(image), tower(), 70)
    expected = Gemma4ImageProcessorPil(max_soft_tokens=70).preprocess(image, return_tensors="np")
    np.testing.assert_array_equal(got.patches, expected["pixel_values"][0, : len(got.patches)])
    red, green, blue = read_image(image).getpixel((40, 40))
    if mode not in ("1", "L", "LA"):
        assert red > green > blue


def test_cmyk_jpeg() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = read_image(encode(image, "JPEG")).getpixel((8, 8))
    assert red > 240 and green < 20 and blue < 20


def test_transparent_is_white() -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 4, 8))
    clear.paste((0, 0, 0, 128), (4, 0, 6, 8))
    for format in ("PNG", "WEBP"):
        read = read_image(encode(clear, format, lossless=True))
        assert [read.getpixel((x, 4)) for x in (0, 5, 7)] == [RED, (127, 127, 127), WHITE]
    for mode in ("LA", "La"):
        assert read_image(Image.new("LA", (2, 2), (0, 0)).convert(mode)).getpixel((0, 0)) == WHITE
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 0])
    for transparency in (1, b"\xff\x00"):
        assert read_image(encode(palette, "PNG", transparency=transparency)).getpixel((0, 0)) == WHITE
    assert read_image(encode(palette, "GIF", transparency=1)).getpixel((0, 0)) == WHITE
    key = Image.new("RGB", (8, 8), (1, 2, 3))
    assert read_image(encode(key, "PNG", transparency=(1, 2, 3))).getpixel((0, 0)) == WHITE
    grey = Image.new("L", (8, 8), 7)
    assert read_image(encode(grey, "PNG", transparency=7)).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(format: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], np.uint16)
    read = read_image(encode(Image.fromarray(values), format))
    assert [read.getpixel((x, 0))[0] for x in range(8)] == [0, 0, 1, 1, 128, 254, 255, 255]
    assert read_image(Image.fromarray(values.astype(np.int32))).tobytes() == read.tobytes()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_16_bit_grey_with_a_transparent_value() -> None:
    data = encode(Image.fromarray(np.array([[0, 128, 257]], np.uint16)))
    clear = chunk(b"tRNS", struct.pack(">H", 128))
    read = read_image(data[:33] + clear + data[33:])  # behind the header
    assert [read.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), WHITE, (1, 1, 1)]


def test_16_bit_colour() -> None:
    """Pillow cannot write it, so the chunks are made by hand; it keeps the upper byte."""
    row = b"\0" + struct.pack(">3H", 65535, 32768, 255)
    header = struct.pack(">2I5B", 1, 1, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    assert read_image(data).getpixel((0, 0)) == (255, 128, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientation_is_undone(format: str, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    data = encode(noise(6, 4), format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    read = read_image(data)
    assert read.size == ((4, 6) if orientation > 4 else (6, 4))
    assert read.tobytes() == expected.tobytes()


def test_upright_by_hand() -> None:
    """Orientation 6: the camera was turned, what is stored on the left belongs on top."""
    stored = Image.new("RGB", (8, 4), GREEN)
    stored.paste(RED, (0, 0, 4, 4))
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    read = read_image(encode(stored, "PNG", exif=exif))
    assert (read.size, read.getpixel((1, 1)), read.getpixel((1, 6))) == ((4, 8), RED, GREEN)


@pytest.mark.parametrize("value", [0, 9, 700])
def test_orientations_that_do_not_exist_are_ignored(value: int) -> None:
    exif = Image.Exif()
    exif[images.ORIENTATION] = value
    assert read_image(encode(noise(6, 4), "PNG", exif=exif)).size == (6, 4)


def test_damaged_exif_is_ignored() -> None:
    assert read_image(encode(noise(6, 4), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x03nothing")).size == (6, 4)
    assert read_image(encode(noise(6, 4), "JPEG", exif=b"Exif\0\0no header")).size == (6, 4)


# -- bad input --------------------------------------------------------------------------------------------------------


def refused(source: Any) -> str:
    with pytest.raises(ImageError) as error:
        read_image(source)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "no.png"
    assert refused(missing) == refused(str(missing))
    assert refused("no.png") == "image 'no.png' cannot be read: No such file or directory"
    assert refused(".") == "image '.' cannot be read: Is a directory"
    assert refused("a\0b.png").startswith(r"image 'a\x00b.png' cannot be read: embedded null")
    assert refused("~nobody-of-this-name/a.png").startswith("image '~nobody-of-this-name/a.png' cannot be read: ")
    assert refused("") == "image: got an empty path, expected a path, bytes, a data URL or a Pillow image"
    assert refused("x" * 5000) == f"image '{'x' * 50}...{'x' * 20}' cannot be read: File name too long"


def test_what_may_have_no_end_is_not_opened(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert refused(fifo) == f"image {shorten(str(fifo))} cannot be read: got a FIFO, expected a file"
    assert refused("/dev/zero") == "image '/dev/zero' cannot be read: got a device, expected a file"
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:  # a short path
        listener.bind(f"{folder}/s")
        assert refused(f"{folder}/s") == f"image '{folder}/s' cannot be read: got a socket, expected a file"


@pytest.mark.parametrize("url", ["http://example.com/a.png", "HTTPS://example.com/a.png"])
def test_web_addresses_are_not_fetched(url: str) -> None:
    assert refused(url) == f"image {url!r}: got a web address, expected a file: images are not fetched"


@pytest.mark.parametrize(("source", "kind"), [(None, "NoneType"), (3, "int"), ([b""], "list"), ({}, "dict")])
def test_other_types(source: Any, kind: str) -> None:
    assert refused(source) == f"image: got {kind}, expected a path, bytes, a data URL or a Pillow image"


def test_data_urls_in_other_spellings() -> None:
    data = next(
        data for seed in range(1, 50) if {*"+/="} <= set(base64.b64encode(data := encode(noise(seed, 3))).decode())
    )
    plain, for_web = base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()
    quoted = plain.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D")
    for url in (
        f"data:image/png;base64,{quoted}",
        f"data:image/png;base64,{for_web}",
        f"data:image/png;base64,{for_web.rstrip('=')}",
        f"data:image/png; base64,{plain}",
        f"data:image/png;name=a.png; Base64 ,{plain}",
    ):
        assert read_image(url).tobytes() == read_image(data).tobytes()


def test_data_urls() -> None:
    for url in ("data:image/png,abc", "data:image/png;base64", "data:"):
        assert refused(url) == f"image {url!r}: got a data URL without base64, expected data:image/...;base64,..."
    assert refused("data:image/png;base64,a$b=").startswith(
        "image 'data:image/png;base64,a$b=': the data URL is not valid base64: "
    )
    assert refused("data:image/png;base64,").startswith(
        "image in a data URL 'data:image/png;base64,' is not an image: got an empty file, expected PNG"
    )


SVG = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    "data", [b"hello", SVG, EPS, b"%PDF-1.7\n", bytes(100)], ids=["text", "svg", "eps", "pdf", "0"]
)
def test_not_an_image(tmp_path: Path, data: bytes) -> None:
    message = f"is not an image: got something else, expected {images.EXPECTED}"
    assert refused(data) == f"image of {len(data)} bytes {message}"
    path = tmp_path / "a.png"
    path.write_bytes(data)
    assert refused(path) == f"image {shorten(str(path))} {message}"


def test_nothing_at_all() -> None:
    assert refused(b"") == f"image of 0 bytes is not an image: got an empty file, expected {images.EXPECTED}"


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_files(format: str) -> None:
    data = encode(noise(64, 64), format)
    for share in (0.5, 0.9):
        message = refused(data[: int(len(data) * share)])
        assert re.match(r"image of [\d,]+ bytes is (damaged or truncated: .|not an image)", message), message


def test_truncated_png_with_exif_behind_the_pixels() -> None:
    """Reading EXIF decodes a PNG; that must not hide the error."""
    data = encode(noise(64, 64))
    assert "is damaged or truncated: " in refused(data[:-200])


@pytest.mark.parametrize("size", [(9500, 9500), (100_000, 1000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize("form", ["bytes", "Pillow"])
def test_decompression_bombs(monkeypatch: Any, size: tuple[int, int], form: str) -> None:
    """A header that promises too much is refused before a pixel is decoded, with and without Pillow's own limit."""
    data = bytearray(encode(Image.new("1", (8, 8))))
    data[16:24] = struct.pack(">2I", *size)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    if form == "Pillow":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        picture = Image.open(io.BytesIO(bytes(data)))
        count = f"{size[0]} x {size[1]} = {size[0] * size[1]:,} pixels, expected at most 89,478,485"
        assert refused(picture) == f"image from Pillow is too large: got {count}"
        assert refused(bytes(data)).endswith(count)
    else:
        message = refused(bytes(data))
        assert message.startswith(f"image of {len(data)} bytes is too large: ")
        assert str(size[0] * size[1]) in message and message.endswith("; expected at most 89,478,485 pixels")


def test_a_compressed_text_bomb() -> None:
    text = zlib.compress(bytes(100_000_000), 9)
    body = b"zTXt" + b"Comment\0\0" + text
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = encode(noise(4, 4))
    assert "is damaged or truncated: " in refused(data[:33] + chunk + data[33:])


def test_no_pixels() -> None:
    message = "image from Pillow is empty: got 0 x 5 pixels, expected at least 1 x 1"
    assert refused(Image.new("RGB", (0, 5))) == message


def test_pixels_without_a_known_range() -> None:
    message = "has mode 'F', expected integers: nothing says how bright a pixel of 1.0 is"
    assert refused(Image.new("F", (2, 2))) == f"image from Pillow {message}"
    wide = Image.fromarray(np.array([[0, 70_000]], np.int32))
    assert refused(wide) == "image from Pillow has grey values from 0 to 70000, expected 0 to 65535"
    negative = Image.fromarray(np.array([[-1, 7]], np.int32))
    assert refused(negative) == "image from Pillow has grey values from -1 to 7, expected 0 to 65535"


def test_pillow_logs_nothing_to_the_terminal(tmp_path: Path) -> None:
    file = bytearray(encode(noise(32, 32), "TIFF"))
    samples = file.index(struct.pack("<2H", 277, 3)) + 8  # SamplesPerPixel
    file[samples] = 51
    (tmp_path / "a.tif").write_bytes(file)
    program = (
        "import sys, mlx_diffusiongemma.images as images\n"
        "try: images.read_image(sys.argv[1])\n"
        "except images.ImageError: print('refused')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.tif")]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment(), capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"refused\n", b"")


def test_warnings_of_pillow_do_not_reach_the_user(recwarn: pytest.WarningsRecorder) -> None:
    read_image(encode(noise(6, 4), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x03nothing"))
    assert not recwarn.list
