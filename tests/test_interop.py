"""Our folders in mlx-vlm and mlx-vlm's folders here: the same logits. `make interop` runs this with mlx-vlm."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from small_model import GENERATION, TEXT, VISION, save_checkpoint, save_tokenizer

from mlx_diffusiongemma.checkpoint import load_checkpoint
from mlx_diffusiongemma.conversion import write_checkpoint
from mlx_diffusiongemma.plan import ConversionRequest, make_plan
from mlx_diffusiongemma.prefill import encode
from mlx_diffusiongemma.recipes import AFFINE_8, find_recipe, sight

pytestmark = pytest.mark.interop

PROMPT, CANVAS = (2, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19), (20, 21, 22, 23, 24, 25, 26, 27)
TOLERANCE = 1e-3  # relative to the largest logit; measured 0 to 3e-6 in float32
ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}
SEEING = VISION | {
    "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    "rms_norm_eps": 1e-6,
    "use_clipped_linears": False,
    "standardize": True,
    "default_output_length": 4,
}


@pytest.fixture
def source(source: Path) -> Path:
    """A small checkpoint whose config says everything that mlx-vlm would otherwise take from its 26B defaults."""
    config = json.loads((source / "config.json").read_text())
    config["vision_config"] = None
    config["text_config"] |= {"rope_parameters": ROPE, "rms_norm_eps": 1e-6, "final_logit_softcapping": 30.0}
    (source / "config.json").write_text(json.dumps(config))
    return source


def our_logits(folder: Path) -> mx.array:
    model = load_checkpoint(folder, dtype="float32").model
    cache = model.make_cache()
    list(encode(model, cache, PROMPT, 512))
    nothing, offset = mx.zeros((len(CANVAS), TEXT["hidden_size"])), mx.array(cache.offset, dtype=mx.int32)
    [hidden] = model.denoise([mx.array(CANVAS)], [nothing], [cache.views()], [offset])
    logits = model.model.decoder.embed_tokens.as_linear(hidden[None])
    return mx.tanh(logits / 30.0) * 30.0


def load_there(folder: Path) -> Any:
    from mlx_vlm.utils import load_model

    model = load_model(folder)
    model.set_dtype(mx.float32)
    return model


def their_logits(model: Any) -> mx.array:
    cache = model.diffusion_prefill_cache(mx.array([PROMPT]))
    return model.diffusion_decoder_logits(mx.array([CANVAS]), cache=cache)


def assert_close(ours: mx.array, theirs: mx.array) -> None:
    difference = mx.abs(ours - theirs).max().item() / mx.abs(theirs).max().item()
    print(f"relative difference {difference:.1e}")
    assert difference < TOLERANCE


@pytest.mark.parametrize("name", ["4bit", "8bit", "mxfp4", "nvfp4", "mxfp8", "uniform-6"])
def test_our_conversions_load_in_mlx_vlm(source: Path, tmp_path: Path, name: str) -> None:
    recipe, default, _ = find_recipe(name)
    write_checkpoint(make_plan(source, ConversionRequest(recipe, default)), tmp_path / name, "card")
    assert_close(our_logits(tmp_path / name), their_logits(load_there(tmp_path / name)))


def test_a_packed_tower_sees_the_same_in_mlx_vlm(tmp_path: Path) -> None:
    """What only `auto` does: the linear layers of the vision tower in 8 bits."""
    source = save_checkpoint(tmp_path / "source", vision=SEEING, rope_parameters=ROPE, rms_norm_eps=1e-6)
    save_tokenizer(source)
    target = tmp_path / "packed"
    write_checkpoint(make_plan(source, ConversionRequest(sight, AFFINE_8)), target, "card")
    ours, theirs = load_checkpoint(target, dtype="float32").model, load_there(target)
    packed = {path for path, module in ours.named_modules() if "scales" in module}
    assert len(packed) == 2 * 7 + 1 and packed == {p for p, module in theirs.named_modules() if "scales" in module}

    patches = mx.random.uniform(shape=(1, 36, 3 * SEEING["patch_size"] ** 2), key=mx.random.key(0))
    places = mx.array([[[x, y] for y in range(6) for x in range(6)]])
    seen = theirs.model.encoder.vision_tower(patches, places)
    assert_close(ours.embed_images(patches, places), theirs.model.encoder.embed_vision(seen))


@pytest.mark.parametrize(("bits", "group_size", "mode"), [(4, 64, "affine"), (8, 64, "affine"), (4, 32, "mxfp4")])
def test_conversions_of_mlx_vlm_load_here(source: Path, tmp_path: Path, bits: int, group_size: int, mode: str) -> None:
    from mlx_vlm.quant_utils import quantize_model
    from mlx_vlm.utils import save_config, save_weights

    model = load_there(source)
    config = json.loads((source / "config.json").read_text())
    model, config = quantize_model(
        model, copy.deepcopy(config), group_size, bits, mode=mode, quant_predicate=model.quant_predicate
    )
    target = tmp_path / "theirs"
    target.mkdir()
    for path in source.glob("*.json"):
        (target / path.name).write_bytes(path.read_bytes())
    save_weights(target, model, donate_weights=False)
    save_config(config, config_path=target / "config.json")
    (target / "generation_config.json").write_text(json.dumps(GENERATION))
    assert any(isinstance(module, nn.QuantizedEmbedding) for _, module in model.named_modules())
    assert_close(our_logits(target), their_logits(load_there(target)))


def test_same_float_model(source: Path) -> None:
    """Without quantisation the two agree too: what differs above is not the quantisation."""
    assert_close(our_logits(source), their_logits(load_there(source)))
