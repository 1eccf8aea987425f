"""Prompts with images against the reference's `generate`: what prefill writes, first logits, and whole runs.

Everything goes through `generate`, never through the reference's encoder alone, which drops the mask of the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_diffusiongemma.images import ImagePatches
from mlx_diffusiongemma.media import ImageBlock
from mlx_diffusiongemma.pipeline import Pipeline
from mlx_diffusiongemma.prefill import encode
from mlx_diffusiongemma.soft_tokens import SoftTokens

from .recorder import image_inputs, record
from .records import SequenceRecord
from .reference import TOWER, DiffusionGemmaForBlockDiffusion, F, S, Spec, build, generation_options, save
from .replay import assert_equal, load_without_tokenizer, replay
from .test_model import logits, worst
from .tolerances import IMAGE_KEYS_VALUES, IMAGE_LOGITS

pytestmark = pytest.mark.oracle

IMAGE_TOKEN = 95
BOUND = 1.0
STEP_SIZES = (2048, 16, 7, 3, 1)
Place = tuple[int, int, int]  # columns and rows of soft tokens, and the position of the first

# 18 soft tokens are more than twice the window of 8, 6 are fewer than it.
LONG, SHORT = (6, 3), (3, 2)


@dataclass(frozen=True)
class Run:
    """A model with a tower, a prompt of `length` tokens, and images in it; `frames` of them are of a video."""

    text: dict[str, Any] = field(default_factory=dict)
    places: tuple[Place, ...] = ((*LONG, 5),)
    length: int = 30
    frames: bool = False
    vision: dict[str, Any] = field(default_factory=dict)
    seed: int = 50
    max_new_tokens: int = 24

    @property
    def spec(self) -> Spec:
        """The model."""
        return Spec(self.text, seed=self.seed, vision=TOWER | self.vision)


RUNS = {
    "an image longer than the window": Run(),
    "an image shorter than the window": Run(places=((*SHORT, 9),), seed=51),
    "an image of one soft token": Run(places=((1, 1, 9),), seed=52),
    "an image as long as the window": Run(places=((4, 2, 3),), seed=53),
    "an image one longer than the window": Run({"sliding_window": 7}, ((4, 2, 3),), seed=74),
    "an image at the start": Run(places=((*LONG, 0),), seed=55),
    "an image at the end": Run(places=((*LONG, 12),), seed=56),
    "nothing but an image": Run(places=((*LONG, 0),), length=18, seed=57),
    "three images": Run(places=((*LONG, 3), (*SHORT, 23), (2, 5, 31)), length=50, seed=58),
    "images one token apart": Run(places=((*SHORT, 2), (*SHORT, 9), (*LONG, 16)), length=40, seed=59),
    "a window of two": Run({"sliding_window": 2}, seed=60),
    "a window longer than the prompt": Run({"sliding_window": 64}, seed=61),
    "an image far behind the window": Run(places=((*LONG, 2),), length=60, seed=62),
    "five sliding layers to one full": Run({"layer_types": [S] * 5 + [F], "num_hidden_layers": 6}, seed=63),
    "full layers alone": Run({"layer_types": [F] * 4}, seed=64),
    "causal images": Run({"use_bidirectional_attention": None}, seed=65),
    "frames of a video": Run(places=((*SHORT, 4), (*SHORT, 14), (*SHORT, 24)), length=40, frames=True, seed=66),
    "a standardised tower": Run(vision={"standardize": True}, places=((*LONG, 5), (*SHORT, 25)), length=40, seed=67),
    "five canvases": Run(places=((*SHORT, 3),), max_new_tokens=40, seed=68),
}


def random_block(place: Place, kind: Any, rng: np.random.Generator) -> ImageBlock:
    """Return an image of noise: 9 patches of 2 x 2 pixels per soft token."""
    columns, rows, start = place
    grid = np.array([(x, y) for y in range(3 * rows) for x in range(3 * columns)], np.int32)
    patches = rng.random((len(grid), 12), np.float32)
    return ImageBlock(kind, start, ImagePatches(patches, grid, columns * rows))


def blocks_of(run: Run) -> list[ImageBlock]:
    """Return the images of a run."""
    rng = np.random.default_rng(run.seed)
    return [random_block(place, "video" if run.frames else "image", rng) for place in run.places]


def prompt_of(run: Run) -> list[int]:
    """Return harmless tokens; what ours has where images stand is nobody's business."""
    return [3 + (7 * i + run.seed) % 90 for i in range(run.length)]


def reference_of(spec: Spec) -> DiffusionGemmaForBlockDiffusion:
    """Return the reference with an image token that its small vocabulary has."""
    model = build(spec)
    model.config.image_token_id = IMAGE_TOKEN
    return model


def options_of(max_new_tokens: int) -> dict[str, Any]:
    """Return the numbers of a generate call."""
    numbers = {"max_new_tokens": max_new_tokens, "max_denoising_steps": 24, "confidence_threshold": 0.5}
    return generation_options(BOUND, **numbers)


def load(spec: Spec, folder: Path, max_new_tokens: int = 24) -> Pipeline:
    """Save the reference and load it through ours."""
    options = options_of(max_new_tokens) | {"eos_token_id": [1], "pad_token_id": 0}
    return load_without_tokenizer(save(reference_of(spec), folder, **options))


# -- one prefill and one step --------------------------------------------------------------------------------


def first_step(
    model: DiffusionGemmaForBlockDiffusion, prompt: Sequence[int], blocks: Sequence[ImageBlock], **changed: Any
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Run `generate` for one step; return the canvas [1, C], the logits [1, C, V] and the cache of the prompt."""
    seen: dict[str, Any] = {}
    forward = model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        seen.update(canvas=kwargs["decoder_input_ids"], logits=outputs.logits)
        return outputs

    input_ids = torch.tensor([prompt])
    inputs = image_inputs(model, input_ids, [0], [blocks]) | changed
    torch.manual_seed(0)
    with patch.object(model, "forward", watched), torch.no_grad():
        options = options_of(model.config.canvas_length) | {"max_denoising_steps": 1}
        output = model.generate(input_ids, eos_token_id=[1], pad_token_id=0, **inputs, **options)
    return seen["canvas"], seen["logits"], output.past_key_values


@pytest.mark.parametrize("name", RUNS)
def test_prefill_and_logits_equal_the_reference(name: str, tmp_path: Path) -> None:
    run = RUNS[name]
    blocks, prompt = blocks_of(run), tuple(prompt_of(run))
    canvas, expected, past = first_step(reference_of(run.spec), prompt, blocks)
    ours = load(run.spec, tmp_path).model
    look = SoftTokens(ours)
    for step_size in STEP_SIZES:
        cache = ours.make_cache()
        list(encode(ours, cache, prompt, step_size, blocks, look))
        cached = 0.0
        for view, layer in zip(cache.views(), past.layers, strict=True):
            cached = max(cached, worst(view.keys, layer.keys), worst(view.values, layer.values))
        nothing = mx.zeros((canvas.shape[1], 32))
        [h] = ours.denoise([mx.array(canvas[0].numpy())], [nothing], [cache.views()], [mx.array(run.length)])
        found = worst(logits(ours, h[None]), expected)
        print(f"worst, images, {name}, chunks of {step_size}: keys, values {cached:.1e}, logits {found:.1e}")
        assert cached <= IMAGE_KEYS_VALUES
        assert found <= IMAGE_LOGITS


def test_the_mask_of_images_matters() -> None:
    """Without the images' types, or with their tokens causal, the reference gives other logits: the test can fail."""
    run = RUNS["an image longer than the window"]
    blocks, prompt = blocks_of(run), prompt_of(run)
    _, expected, _ = first_step(reference_of(run.spec), prompt, blocks)
    _, causal, _ = first_step(reference_of(run.spec), prompt, blocks, mm_token_type_ids=None)
    assert (causal - expected).abs().max() > 1000 * IMAGE_LOGITS * expected.abs().max()
    other = [ImageBlock("image", blocks[0].start, ImagePatches(1 - blocks[0].image.patches, *_rest(blocks[0])))]
    _, changed, _ = first_step(reference_of(run.spec), prompt, other)
    assert (changed - expected).abs().max() > 1000 * IMAGE_LOGITS * expected.abs().max()


def _rest(block: ImageBlock) -> tuple[np.ndarray, int]:
    return block.image.position_ids, block.image.soft_tokens


def test_the_encoder_called_directly_drops_the_mask() -> None:
    """Why everything here goes through `generate`. When this fails, the reference has been repaired."""
    run = RUNS["an image longer than the window"]
    blocks, prompt = blocks_of(run), prompt_of(run)
    model = reference_of(run.spec)
    input_ids = torch.tensor([prompt])
    inputs = image_inputs(model, input_ids, [0], [blocks])
    causal = inputs | {"mm_token_type_ids": None}
    with torch.no_grad():
        states = [model.model.encoder(input_ids=input_ids, **given).last_hidden_state for given in (inputs, causal)]
    assert torch.equal(*states)


# -- whole runs ----------------------------------------------------------------------------------------------


@cache
def recorded(name: str) -> SequenceRecord:
    """Run the reference once per case."""
    run = RUNS[name]
    options = options_of(run.max_new_tokens)
    model = reference_of(run.spec)
    return record(model, [prompt_of(run)], run.seed, BOUND, [1], [blocks_of(run)], **options)[0]


@pytest.mark.parametrize("name", RUNS)
def test_whole_runs_equal_the_reference(name: str, tmp_path: Path) -> None:
    run, expected = RUNS[name], recorded(name)
    pipeline = load(run.spec, tmp_path, run.max_new_tokens)
    for step_size in (2048, 7):
        [(request, result)] = replay(pipeline, [expected], [blocks_of(run)], prefill_step_size=step_size)
        difference = assert_equal(expected, request, result, run.max_new_tokens)
        steps = result.stats.denoising_steps
        print(f"worst, images, {name}, chunks of {step_size}: mean entropy {difference:.1e} nats; steps {steps}")
        assert (result.stats.images, result.stats.video_frames) == (
            (0, len(run.places)) if run.frames else (len(run.places), 0)
        )


def test_runs_with_images_have_several_canvases_and_steps() -> None:
    """Or they would not show that the committed canvas is encoded as before."""
    canvases = [recorded(name).canvases for name in RUNS]
    assert sum(len(row) > 1 for row in canvases) > len(RUNS) / 2
    assert sum(canvas.steps > 2 for row in canvases for canvas in row) > len(RUNS)


# -- batches of different lengths ----------------------------------------------------------------------------

# Rows: length, images. Padded on the left by the reference; one row has none.
ROWS: tuple[tuple[int, tuple[Place, ...]], ...] = (
    (30, ((*LONG, 5),)),
    (47, ((*SHORT, 1), (*LONG, 20))),
    (9, ()),
    (20, ((*LONG, 0),)),
)
BATCH = Spec(seed=80, vision=TOWER)


def batch() -> tuple[list[list[int]], list[list[ImageBlock]]]:
    """Return the prompts and their images."""
    rng = np.random.default_rng(80)
    prompts = [[3 + (5 * i + 11 * row) % 90 for i in range(length)] for row, (length, _) in enumerate(ROWS)]
    return prompts, [[random_block(place, "image", rng) for place in places] for _, places in ROWS]


def test_batch_equals_the_padded_batch_of_the_reference_and_each_row_alone(tmp_path: Path) -> None:
    prompts, blocks = batch()
    records = record(reference_of(BATCH), prompts, 80, BOUND, [1], blocks, **options_of(24))
    pipeline = load(BATCH, tmp_path)
    for row, (request, result) in enumerate(replay(pipeline, records, blocks)):
        difference = assert_equal(records[row], request, result, 24)
        print(f"worst, images, batch, row {row}: mean entropy {difference:.1e}; steps {result.stats.denoising_steps}")
        [(request, alone)] = replay(pipeline, [records[row]], [blocks[row]])
        assert_equal(records[row], request, alone, 24)
        assert alone.token_ids == result.token_ids
    assert len({canvas.steps for row in records for canvas in row.canvases}) > 1
