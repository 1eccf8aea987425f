"""Rounding with compensation: the integers against a naive implementation, moments against recorded inputs."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from small_model import VISION, random_model, save_checkpoint, save_tokenizer

from mlx_diffusiongemma import compensation
from mlx_diffusiongemma.compensation import compensate, input_moments, pack_codes, pack_compensated, round_columns
from mlx_diffusiongemma.pipeline import load
from mlx_diffusiongemma.recipes import BITS, RECIPES, Quantization, sight
from mlx_diffusiongemma.trajectories import RecordedStep, Trajectory

COLUMNS, GROUP, BITS_PER_WEIGHT = 192, 32, 3
HOW = Quantization(GROUP, BITS_PER_WEIGHT)


def noise(count: int) -> list[Trajectory]:
    """Canvases of noise behind short prefixes, two steps each."""
    rng, config = np.random.default_rng(0), random_model().config

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(config.text.vocab_size, size=n).tolist())

    C = config.canvas_length
    return [Trajectory(ids(5), (RecordedStep(1, ids(C), 0.8), RecordedStep(2, ids(C), 0.6)), 0.1) for _ in range(count)]


def correlated(rng: np.random.Generator, rows: int = 400) -> np.ndarray:
    """Inputs [rows, columns] most of whose variance is in a few directions, of different sizes."""
    mixed = rng.normal(size=(rows, 12)) @ rng.normal(size=(12, COLUMNS))
    return (mixed + 0.3 * rng.normal(size=(rows, COLUMNS))) * rng.uniform(0.2, 3, size=COLUMNS)


def dequantized(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
    return codes * np.repeat(scales, GROUP, axis=1) + np.repeat(biases, GROUP, axis=1)


def parts(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases that MLX finds, float64."""
    _, scales, biases = mx.quantize(mx.array(weight.astype(np.float32)), group_size=GROUP, bits=BITS_PER_WEIGHT)
    return np.array(scales, dtype=np.float64), np.array(biases, dtype=np.float64)


def naive(row: np.ndarray, scales: np.ndarray, biases: np.ndarray, moments: np.ndarray) -> list[int]:
    """Round one row number by number; move what is left to where the error of all rounded ones is least."""
    damped = moments + compensation.DAMPING * np.trace(moments) / len(moments) * np.eye(len(moments))
    left, rest = row.copy(), sorted(range(len(row)), key=lambda c: -moments[c, c])
    codes = [0] * len(row)
    while rest:
        column, *rest = rest
        scale, bias = scales[column // GROUP], biases[column // GROUP]
        code = min(max(round((left[column] - bias) / scale), 0), 2**BITS_PER_WEIGHT - 1)
        codes[column] = code
        moved = code * scale + bias - left[column]
        # The least of (moved, d)ᵀ M (moved, d) over d.
        if rest:
            left[rest] -= np.linalg.solve(damped[np.ix_(rest, rest)], damped[rest, column]) * moved
    return codes


def test_integers_are_those_of_the_naive_implementation() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(5, COLUMNS))
    inputs = correlated(rng)
    moments = inputs.T @ inputs
    scales, biases = parts(weight)
    codes = round_columns(weight, scales, biases, moments, BITS_PER_WEIGHT)
    expected = [naive(*each, moments) for each in zip(weight, scales, biases, strict=True)]
    assert codes.tolist() == expected


def test_outputs_are_nearer_than_with_the_nearest_integers() -> None:
    rng = np.random.default_rng(1)
    weight, inputs = rng.normal(size=(16, COLUMNS)), correlated(rng)
    scales, biases = parts(weight)
    errors = []
    for moments in (None, inputs.T @ inputs):
        codes = round_columns(weight, scales, biases, moments, BITS_PER_WEIGHT)
        errors.append(np.square((dequantized(codes, scales, biases) - weight) @ inputs.T).sum())
    assert errors[1] < 0.5 * errors[0]


def test_nearest_integers_where_nothing_was_seen() -> None:
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(4, COLUMNS))
    scales, biases = parts(weight)
    expected = np.rint((weight - np.repeat(biases, GROUP, 1)) / np.repeat(scales, GROUP, 1)).clip(0, 7)
    for moments in (None, np.zeros((COLUMNS, COLUMNS))):
        assert np.array_equal(round_columns(weight, scales, biases, moments, BITS_PER_WEIGHT), expected)


def test_a_group_of_one_number() -> None:
    packed = pack_compensated(mx.zeros((2, 64)), [mx.eye(64)], HOW, mx.bfloat16)
    assert not mx.dequantize(*packed, group_size=GROUP, bits=BITS_PER_WEIGHT).any()


def test_packed_by_hand() -> None:
    codes = np.array([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=np.uint8)
    assert pack_codes(codes, 4).tolist() == [[0x87654321]]
    three = np.array([[7] + [0] * 9 + [5] + [0] * 21], dtype=np.uint8)  # the last number lies across two words
    assert pack_codes(three, 3).tolist() == [[7 | (1 << 30), 1, 0]]


@pytest.mark.parametrize("bits", BITS["affine"])
def test_packed_as_mlx_does(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(2**bits, size=(3, 5, 128)).astype(np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == mx.uint32 and packed.shape == (3, 5, 128 * bits // 32)
    unpacked = mx.dequantize(packed, mx.ones((3, 5, 2)), mx.zeros((3, 5, 2)), group_size=64, bits=bits)
    assert np.array_equal(np.array(unpacked), codes)


def test_moments_are_those_of_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of every layer, recorded with its inputs; experts take one row at a time."""
    paths = ["model.decoder.layers.1.self_attn.o_proj", "model.decoder.layers.2.experts.down_proj"]
    model, canvases = random_model(), noise(2)
    moments = input_moments(model, canvases, paths)

    layers = {id(module): path for path, module in model.named_modules() if path in paths}
    seen: dict[tuple[str, int], list[np.ndarray]] = {}
    for kind in (nn.Linear, SwitchLinear):

        def record(self: nn.Module, x: mx.array, *rest: mx.array, call=kind.__call__, **options: object) -> mx.array:
            if id(self) in layers:
                experts = np.array(rest[0]).tolist() if rest else [0] * x.shape[0]
                for expert, rows in zip(experts, np.array(x.reshape(x.shape[0], -1, x.shape[-1])), strict=True):
                    seen.setdefault((layers[id(self)], expert), []).append(rows)
            return call(self, x, *rest, **options)

        monkeypatch.setattr(kind, "__call__", record)
    monkeypatch.setattr("mlx_diffusiongemma.moe.Experts._block_rows", lambda self: 0)  # nothing fills up blocks
    input_moments(model, canvases, [])
    assert {path for path, _ in seen} == set(paths)
    for path in paths:
        for expert, got in enumerate(moments[path]):
            rows = np.concatenate(seen.get((path, expert), [np.zeros((1, got.shape[0]))])).astype(np.float64)
            np.testing.assert_allclose(np.array(got), rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_the_model_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one pass over the canvases or in many: the same."""
    model = random_model()
    settings = {path: HOW for path, module in model.named_modules() if "weight" in module and module.weight.ndim > 1}
    together = compensate(model, noise(2), settings, mx.bfloat16)
    monkeypatch.setattr(compensation, "MOMENTS_AT_ONCE", 1)
    apart = compensate(model, noise(2), settings, mx.bfloat16)
    assert together.keys() == apart.keys() == settings.keys()
    assert all(mx.array_equal(a, b) for path in settings for a, b in zip(together[path], apart[path], strict=True))
    for (name, array), (_, expected) in zip(
        tree_flatten(model.parameters()), tree_flatten(random_model().parameters()), strict=True
    ):
        assert mx.array_equal(array, expected), name
    assert {each.scales.dtype for each in together.values()} == {mx.bfloat16}


def test_bad_input() -> None:
    for path, how in (("model.decoder.embed_tokens", Quantization(32, 4, "mxfp4")), ("model.nothing", HOW)):
        with pytest.raises(ValueError, match=f"{path}: got .*, expected affine settings of a module with a weight"):
            compensate(random_model(), noise(1), {path: how}, mx.bfloat16)


def test_only_linear_layers_that_pictures_pass_through_are_sight() -> None:
    """No named recipe quantises the tower: their layouts are the published ones."""
    paths = [path for path, module in random_model(vision=VISION).named_modules() if sight(path)]
    tower = [path for path in paths if "vision_tower" in path]
    assert len(tower) == 2 * 7 and set(paths) - set(tower) == {"model.encoder.embed_vision.embedding_projection"}
    assert {recipe.recipe(path) for recipe in RECIPES.values() for path in tower} == {None}
    assert sight("model.encoder.vision_tower.patch_embedder.input_proj") is None


@pytest.mark.slow
def test_the_tower_gets_eight_bits_and_the_folder_has_the_compensated_integers(tmp_path: Path) -> None:
    from mlx_diffusiongemma.convert import main

    source = save_checkpoint(tmp_path / "source", vision=VISION)
    save_tokenizer(source)
    (source / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    tasks, target = tmp_path / "tasks.jsonl", tmp_path / "out"
    tasks.write_text('{"messages": [{"role": "user", "content": "abc"}]}\n')
    flags = ["--hf-path", str(source), "--mlx-path", str(target), "--recipe", "auto", "--target-bpw", "8"]
    assert main([*flags, "--calibration", str(tasks), "--tuning-updates", "0"]) == 0
    config = json.loads((target / "config.json").read_text())
    block = config["quantization"]
    measured = config["mlx_diffusiongemma"]["sensitivity"]
    assert len(measured) == 33 and not any(map(sight, measured))  # text says nothing about the vision projection
    modules = dict(load(target).model.named_modules())
    tower = {path: m for path, m in modules.items() if "vision" in path and "scales" in m}
    assert len(tower) == 2 * 7 + 1 and {(m.bits, m.group_size) for m in tower.values()} == {(8, 64)}
    assert "scales" not in modules["model.encoder.vision_tower.patch_embedder.input_proj"]
    floats = dict(load(source).model.named_modules())
    changed = 0
    for path, module in modules.items():
        if "scales" in module and path not in tower:
            how = block.get(path, block)
            nearest, *_ = mx.quantize(floats[path].weight, group_size=how["group_size"], bits=how["bits"])
            changed += not mx.array_equal(nearest, module.weight)
    assert changed > 20
