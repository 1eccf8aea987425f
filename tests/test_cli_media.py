"""Images and videos on the command line: flags, conversations, and real files through the real command."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from small_model import VISION, save_checkpoint
from test_cli import Stdin, run_main

import mlx_diffusiongemma
from mlx_diffusiongemma.tokenizer import Tokenizer
from mlx_diffusiongemma.video import Frame

TINY = Path(mlx_diffusiongemma.__file__).parent / "tiny"


def noise(seed: int, width: int = 30, height: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures, 00.png to 19.png, and film.mp4 of eight seconds."""
    folder = tmp_path_factory.mktemp("media")
    for number in range(20):
        Image.fromarray(noise(number)).save(folder / f"{number:02}.png")
    with av.open(str(folder / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise(number // 5, 64, 48), format="rgb24")))
        container.mux(stream.encode())
    return folder


def make_checkpoint(folder: Path, vision: dict[str, Any] | None) -> Path:
    """Write a random model behind the tokenizer of the bundled one."""
    size = Tokenizer.load(TINY).vocab_size
    save_checkpoint(folder, vision=vision, vocab_size=size, max_position_embeddings=8192)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that can see."""
    return make_checkpoint(tmp_path_factory.mktemp("seeing"), VISION | {"position_embedding_size": 200})


# -- flags ---------------------------------------------------------------------------------------------------


def test_flags_reach_the_pipeline(fake, capsys, files: Path) -> None:
    pipeline = fake(canvases=[["x"]])
    images = [str(files / "00.png"), str(files / "01.png"), str(files / "02.png")]
    film = str(files / "film.mp4")
    flags = ["--image-tokens", "560", "--fps", "0.5", "--video-frames", "3", "--image", images[2]]
    code, _, err = run_main(capsys, "-p", "What?", "--image", *images[:2], "--video", film, *flags)
    assert (code, err) == (0, "")
    messages, options = pipeline.requests[0]
    assert messages == [{"role": "user", "content": "What?"}]
    assert (options["images"], options["videos"]) == (images, [film])
    assert (options["image_tokens"], options["fps"], options["video_frames"]) == (560, 0.5, 3)


def test_a_conversation_shows_them_with_its_first_message(fake, capsys, monkeypatch, files: Path) -> None:
    pipeline = fake(canvases=[["An answer."]])
    monkeypatch.setattr(sys, "stdin", Stdin(b"one\ntwo\nr\nthree\nq\n"))
    image, film = str(files / "00.png"), str(files / "film.mp4")
    code, _, err = run_main(capsys, "--chat", "--system", "s", "--image", image, image, "--video", film, "--fps", "0.5")
    assert (code, err) == (0, "")

    def shown(text: str) -> dict[str, object]:
        media = [{"type": "image"}, {"type": "image"}, {"type": "video"}]
        return {"role": "user", "content": [*media, {"type": "text", "text": text}]}

    system, answer = {"role": "system", "content": "s"}, {"role": "assistant", "content": "An answer."}
    assert [messages for messages, _ in pipeline.requests] == [
        [system, shown("one")],
        [system, shown("one"), answer, {"role": "user", "content": "two"}],
        [system, shown("three")],
    ]
    for _, options in pipeline.requests:
        assert [(picture.mode, picture.size) for picture in options["images"]] == [("RGB", (30, 20))] * 2
        assert [[type(frame) for frame in video] for video in options["videos"]] == [[Frame] * 4]


def test_a_picture_may_come_through_a_pipe(fake, capsys, files: Path) -> None:
    pipeline = fake(canvases=[["x"]])
    paths = []
    for name in ("00.png", "film.mp4"):
        reader, writer = os.pipe()
        os.write(writer, (files / name).read_bytes())
        os.close(writer)
        paths.append(f"/dev/fd/{reader}")
    code, _, err = run_main(capsys, "-p", "What?", "--image", paths[0], "--video", paths[1])
    for path in paths:
        os.close(int(path.removeprefix("/dev/fd/")))
    assert (code, err) == (0, "")
    options = pipeline.requests[0][1]
    assert [np.asarray(image).tolist() for image in options["images"]] == [noise(0).tolist()]
    assert [len(video) for video in options["videos"]] == [8]


def test_text_alone_has_no_parts(fake, capsys, monkeypatch) -> None:
    pipeline = fake(canvases=[["An answer."]])
    monkeypatch.setattr(sys, "stdin", Stdin(b"one\n"))
    run_main(capsys, "--chat")
    assert pipeline.requests[0][0] == [{"role": "user", "content": "one"}]


# -- real files through the real command ---------------------------------------------------------------------


def answer(run_program, checkpoint: Path, *arguments: str) -> dict:
    """Run the command line in a process of its own; return its JSON."""
    common = ["--model", str(checkpoint), "--seed", "1", "--max-tokens", "8", "--json"]
    done = run_program("-m", "mlx_diffusiongemma.generate", *common, *arguments)
    assert (done.returncode, done.stderr) == (0, b"")
    return json.loads(done.stdout)


@pytest.mark.parametrize(("budget", "used"), [(70, 60), pytest.param(280, 260, marks=pytest.mark.slow)])
def test_twenty_images(run_program, checkpoint: Path, files: Path, budget: int, used: int) -> None:
    images = [str(path) for path in sorted(files.glob("*.png"))]
    arguments = ["-p", "What do they show?", "--image", *images, "--image-tokens", str(budget)]
    stats = answer(run_program, checkpoint, *arguments)["stats"]
    assert (stats["images"], stats["video_frames"], stats["image_tokens"]) == (20, 0, 20 * used)
    assert 20 * (used + 2) < stats["prompt_tokens"] < 20 * (used + 2) + 40
    print(f"peak memory of 20 images of {used} tokens: {stats['peak_memory_gb']:.3f} GB")


@pytest.mark.slow
def test_an_image_and_a_video_of_eight_frames(run_program, checkpoint: Path, files: Path) -> None:
    arguments = ["--image", str(files / "00.png"), "--video", str(files / "film.mp4"), "--image-tokens", "70"]
    result = answer(run_program, checkpoint, "-p", "What moves?", *arguments)
    stats = result["stats"]
    assert (stats["images"], stats["video_frames"], stats["image_tokens"]) == (1, 8, 60 + 8 * 63)
    assert len(result["token_ids"]) == stats["generated_tokens"]
    few = answer(run_program, checkpoint, "-p", "What moves?", *arguments, "--video-frames", "3")["stats"]
    assert few["video_frames"] == 3


def test_a_model_that_cannot_see(run_program, tmp_path: Path, files: Path) -> None:
    blind = str(make_checkpoint(tmp_path, None))
    done = run_program("-m", "mlx_diffusiongemma.generate", "--model", blind, "--image", str(files / "00.png"))
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"error: images[0]: got image, expected text alone: this model has no vision tower\n"
