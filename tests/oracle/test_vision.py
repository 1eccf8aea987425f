"""Vision tower, pooling and projector against the reference: random small towers in float32."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from mlx_diffusiongemma.checkpoint import load_model
from mlx_diffusiongemma.config import ModelConfig, read_json
from mlx_diffusiongemma.images import cut_image, read_image

from .reference import TOWER, DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, Spec, build, save
from .tolerances import SOFT_TOKENS

pytestmark = pytest.mark.oracle

SQUARE = ((6, 6),)


@dataclass(frozen=True)
class Case:
    """One tower and the images that go through it together."""

    vision: dict[str, Any] = field(default_factory=dict)
    grids: tuple[tuple[int, int], ...] = SQUARE  # columns and rows of patches of each image
    padding: int = 0  # padding patches behind the largest image
    clipped: bool = False


CASES = {
    "one square image": Case(),
    "one square": Case({}, ((3, 3),)),
    "wide": Case({}, ((12, 3),)),
    "tall": Case({}, ((3, 12),)),
    "very wide": Case({}, ((39, 3),)),
    "padding": Case({}, SQUARE, 18),
    "several images": Case({}, ((6, 6), (12, 3), (3, 9), (9, 9))),
    "several images and padding": Case({}, ((15, 3), (3, 15), (6, 6)), 36),
    "standardised": Case({"standardize": True}, ((6, 9), (3, 3))),
    "clipped": Case({"use_clipped_linears": True}, ((6, 9), (3, 3)), clipped=True),
    "clipped, bounds at infinity": Case({"use_clipped_linears": True}),
    "standardised and clipped": Case({"standardize": True, "use_clipped_linears": True}, ((6, 9),), 9, True),
    "heads of 72": Case({"head_dim": 72, "num_attention_heads": 2, "num_key_value_heads": 2}, ((6, 9), (3, 3))),
    "heads of 72, standardised": Case({"head_dim": 72, "standardize": True}, ((12, 9),), 27),
    "heads of 64": Case({"head_dim": 64}),
    "heads of 100": Case({"head_dim": 100}, ((6, 6), (3, 3))),
    "shared keys": Case({"num_key_value_heads": 2}, ((6, 6), (3, 3))),
    "one layer": Case({"num_hidden_layers": 1}),
    "pooling by 2": Case({"pooling_kernel_size": 2}, ((6, 4), (2, 8)), 4),
    "larger patches": Case({"patch_size": 4}),
    "other rotary base": Case({"rope_parameters": {"rope_type": "axial", "rope_theta": 7.0}}, ((15, 6),)),
    "more patches than a query block": Case({"num_hidden_layers": 1}, ((30, 21), (3, 3))),
}


def build_tower(case: Case, seed: int = 0) -> DiffusionGemmaForBlockDiffusion:
    """Return the reference with a random tower: no norm, bias, scale or position is trivial, clip bounds bite."""
    spec = Spec({"num_hidden_layers": 1, "layer_types": ["full_attention"]}, seed=seed, vision=TOWER | case.vision)
    model = build(spec)
    with torch.no_grad():
        for name, buffer in model.model.encoder.vision_tower.named_buffers():
            if "std_" in name:
                buffer.copy_(torch.randn_like(buffer) + ("scale" in name))
            elif case.clipped and name.endswith(("_min", "_max")):
                buffer.copy_((1 + torch.rand_like(buffer)) * (-0.5 if name.endswith("_min") else 0.5))
    return model


def images(case: Case, config: DiffusionGemmaConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random patches [B, P, pixels] in [0, 1] and position ids [B, P, 2] of the case's images."""
    length = max(columns * rows for columns, rows in case.grids) + case.padding
    pixels = 3 * config.vision_config.patch_size**2
    patches, positions = torch.zeros(len(case.grids), length, pixels), torch.full((len(case.grids), length, 2), -1)
    for index, (columns, rows) in enumerate(case.grids):
        patches[index, : columns * rows] = torch.rand(columns * rows, pixels)
        grid = [(x, y) for y in range(rows) for x in range(columns)]
        positions[index, : columns * rows] = torch.tensor(grid)
    return patches, positions


def difference(ours: mx.array, reference: torch.Tensor) -> float:
    """Return the largest difference over the reference's largest absolute value."""
    expected = reference.detach().numpy()
    assert ours.shape == expected.shape
    return float(np.abs(np.array(ours) - expected).max() / np.abs(expected).max())


def own_soft_tokens(rows: mx.array, case: Case, kernel: int) -> mx.array:
    """Cut what stands behind an image's soft tokens off; images one after the other, as the reference has them."""
    counts = [columns * height // kernel**2 for columns, height in case.grids]
    return mx.concatenate([row[:count] for row, count in zip(rows, counts, strict=True)])


@pytest.mark.parametrize("name", CASES)
def test_soft_tokens_equal_the_reference(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    reference = build_tower(case)
    ours = load_model(save(reference, tmp_path), ModelConfig.from_dict(read_json(tmp_path / "config.json")))
    patches, positions = images(case, reference.config)
    with torch.no_grad():
        expected = reference.model.encoder.get_image_features(patches, positions)
    assert ours.vision is not None and ours.config.vision is not None
    inputs = mx.array(patches.numpy()), mx.array(positions.numpy().astype(np.int32))
    kernel = ours.config.vision.pooling_kernel_size
    tower = difference(own_soft_tokens(ours.vision(*inputs), case, kernel), expected.last_hidden_state)
    soft = difference(own_soft_tokens(ours.embed_images(*inputs), case, kernel), expected.pooler_output)
    print(f"worst, vision, {name}: tower {tower:.1e}, soft tokens {soft:.1e}")
    assert tower <= SOFT_TOKENS
    assert soft <= SOFT_TOKENS


PICTURES = ((640, 480), (30, 90), (1000, 20), (7, 300), (100, 100), (3, 3))


@pytest.mark.parametrize("budget", [70, 140])
def test_pictures_end_to_end(budget: int, tmp_path: Path) -> None:
    """Files to soft tokens: one by one and without padding here, as one padded batch in the reference."""
    case = Case({"patch_size": 8, "standardize": True, "position_embedding_size": 420})
    reference = build_tower(case)
    ours = load_model(save(reference, tmp_path), ModelConfig.from_dict(read_json(tmp_path / "config.json")))
    assert ours.config.vision is not None
    rng = np.random.default_rng(budget)
    pictures = [Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for size in PICTURES]
    processor = Gemma4ImageProcessorPil(max_soft_tokens=budget, patch_size=8)
    inputs = processor.preprocess(pictures, return_tensors="pt")
    with torch.no_grad():
        expected = reference.model.encoder.get_image_features(inputs["pixel_values"], inputs["image_position_ids"])
    rows = []
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / "picture.png")
        cut = cut_image(read_image(tmp_path / "picture.png"), ours.config.vision, budget)
        [soft_tokens] = ours.embed_images(mx.array(cut.patches)[None], mx.array(cut.position_ids)[None])
        assert len(soft_tokens) == cut.soft_tokens == inputs["num_soft_tokens_per_image"][index]
        rows.append(soft_tokens)
    worst = difference(mx.concatenate(rows), expected.pooler_output)
    print(f"worst, vision, pictures of at most {budget} soft tokens: {worst:.1e}")
    assert worst <= SOFT_TOKENS


def test_every_case_matters(tmp_path: Path) -> None:
    """Standardising, clipping and positions change the result far beyond the tolerance."""
    plain = build_tower(Case())
    patches, positions = images(Case(), plain.config)
    with torch.no_grad():
        expected = plain.model.encoder.get_image_features(patches, positions).pooler_output
        for changed in (Case({"standardize": True}), Case({"use_clipped_linears": True}, clipped=True)):
            other = build_tower(changed).model.encoder.get_image_features(patches, positions).pooler_output
            assert (other - expected).abs().max() > 100 * SOFT_TOKENS * expected.abs().max()
        turned = plain.model.encoder.get_image_features(patches, positions.flip(-1)).pooler_output
        assert (turned - expected).abs().max() > 100 * SOFT_TOKENS * expected.abs().max()
