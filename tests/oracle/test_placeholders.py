"""Prompts with images and videos against the reference's processor: text, ids, types, and which tokens form a block.

The processor's own methods run on a stand-in for it: a whole one needs torchvision and a sound processor.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import get_block_sequence_ids_for_mask
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

from mlx_diffusiongemma.config import load_configs
from mlx_diffusiongemma.media import Sight
from mlx_diffusiongemma.prompt import build_prompt
from mlx_diffusiongemma.tokenizer import Tokenizer

pytestmark = pytest.mark.oracle

TINY = Path(__file__).parents[2] / "mlx_diffusiongemma" / "tiny"
SIZES = ((64, 48), (30, 90), (200, 33))
TIMES = (0.0, 1.04, 59.99, 61.5)


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("budget", [70, 140])
def test_prompt_equals_the_processors(budget: int) -> None:
    found = load_configs(TINY)[0].vision
    assert found is not None
    vision = replace(found, position_embedding_size=200)
    pictures = [picture(*size) for size in SIZES]
    film = [(picture(40, 40), second) for second in TIMES]
    image, video = {"type": "image"}, {"type": "video"}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "What is this,"}, image]},
        {"role": "assistant", "content": "Two things."},
        {"role": "user", "content": [video, {"type": "text", "text": "and this?"}, image]},
    ]
    sight = Sight(vision, image_tokens=budget)
    ours = build_prompt(Tokenizer.load(TINY), messages, images=pictures, videos=[film], sight=sight)

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def processor_of(soft_tokens: int) -> Gemma4ImageProcessorPil:
        return Gemma4ImageProcessorPil(max_soft_tokens=soft_tokens, patch_size=vision.patch_size)

    images = processor_of(budget).preprocess(pictures, return_tensors="np")
    frames = processor_of(70).preprocess([frame for frame, _ in film], return_tensors="np")
    metadata = SimpleNamespace(fps=1.0, timestamps=list(TIMES))
    videos = {
        "num_soft_tokens_per_video": [int(frames["num_soft_tokens_per_image"][0])],
        "video_metadata": [metadata],
    }
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image", "video", "audio")}
    stand_in = SimpleNamespace(
        boi_token="<|image>",
        eoi_token="<image|>",
        **{f"{name}_token": f"<|{name}|>" for name in ids},
        **{f"{name}_token_ids": [token] for name, token in ids.items()},
    )
    first, second, third, fourth = text.split("<|image|>")
    shown = [Gemma4Processor.replace_image_token(stand_in, images, index) for index in range(3)]
    expected = first + shown[0] + second + shown[1] + third + shown[2] + fourth
    expected = expected.replace("<|video|>", Gemma4Processor.replace_video_token(stand_in, videos, 0), 1)
    assert ours.text == expected
    expected_ids = tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert list(ours.token_ids) == expected_ids

    types = Gemma4Processor.create_mm_token_type_ids(stand_in, [expected_ids])
    blocks = get_block_sequence_ids_for_mask(torch.tensor(types), device=torch.device("cpu"))[0].numpy()
    mine = np.full(len(expected_ids), -1)
    kinds = np.zeros(len(expected_ids), int)
    for number, block in enumerate(ours.blocks):
        span = slice(*block.span)
        mine[span], kinds[span] = number, 1 if block.kind == "image" else 2
    np.testing.assert_array_equal(mine, blocks)
    np.testing.assert_array_equal(kinds, types[0])
    assert len(ours.blocks) == len(SIZES) + len(TIMES)


@pytest.mark.parametrize("seconds", [0.0, 0.999, 59.999, 60, 3599.5, 3600, 86400.25])
def test_time_stamps_equal_the_processors(seconds: float) -> None:
    from mlx_diffusiongemma.video import timestamp

    stand_in = SimpleNamespace(boi_token="", video_token="", eoi_token="")
    videos = {
        "num_soft_tokens_per_video": [0],
        "video_metadata": [SimpleNamespace(fps=1.0, timestamps=[seconds])],
    }
    assert f"{timestamp(seconds)} " == Gemma4Processor.replace_video_token(stand_in, videos, 0)
