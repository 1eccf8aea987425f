"""FLOPs and bytes against published numbers and by hand; predictions; the table of chips."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from small_model import config_dict

from mlx_diffusiongemma import chips
from mlx_diffusiongemma.chips import CHIPS, Chip, chip_in, find_chip, measure_chip
from mlx_diffusiongemma.config import ModelConfig
from mlx_diffusiongemma.counting import (
    Pass,
    Work,
    encode_work,
    parameters,
    recipe_bits,
    step_work,
    stored_bits,
    total,
    uniform_distinct_experts,
)
from mlx_diffusiongemma.recipes import RECIPES, Quantization, find_recipe, mixed
from mlx_diffusiongemma.roofline import (
    ATTAINABLE,
    EAGER,
    FLOOR,
    SPARSE,
    TEXT_26B,
    compare_with,
    part_seconds,
    predict,
)

BITS_4 = recipe_bits(find_recipe("uniform-4").recipe)
BITS_8 = recipe_bits(find_recipe("8bit").recipe)
STEP = Pass(256, 1024, BITS_4)
REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference" / "config_26b.json"


# -- 26B, against the counts of a published analysis whose parameters were checked against the checkpoint's bytes ----


def test_parameters_of_26b() -> None:
    counts = parameters(TEXT_26B)
    billions = {part: round(count / 1e9, 3) for part, count in counts.items()}
    assert billions == {
        "embedding": 0.738,
        "attention": 1.110,
        "dense MLP": 0.535,
        "router": 0.011,
        "experts": 22.838,
        "self-conditioning": 0.018,
    }
    assert round(counts["experts"] * 2 / 1e9, 2) == 45.68  # measured bytes of the experts in bfloat16
    active = counts["experts"] * TEXT_26B.top_k_experts // TEXT_26B.num_experts
    assert round((sum(counts.values()) - counts["experts"] + active) / 1e9, 2) == 3.84  # that one token uses


def test_flops_of_a_step_of_26b() -> None:
    work = step_work(TEXT_26B, STEP)
    assert {name: round(part.flops / 1e9, 1) for name, part in work.items()} == {
        "attention projections": 568.4,
        "attention": 187.8,
        "dense MLP": 274.1,
        "router": 5.5,
        "experts": 730.8,
        "self-conditioning": 9.1,
        "head": 378.0,
        "soft embedding": 378.0,
        "vocabulary arrays": 0,
        "activations": 0,
    }
    assert round(total(work).flops / 1e9, 1) == 2531.7
    assert round(total(step_work(TEXT_26B, replace(STEP, soft_tokens=64))).flops / 1e9, 1) == 2153.8


@pytest.mark.parametrize(
    ("context", "attention", "whole", "kv"),
    [
        (0, 37.6, 2382, 0.06),
        (1024, 187.8, 2532, 0.29),
        (8192, 488, 2832, 0.44),
        (32768, 1519, 3863, 0.94),
        (131072, 5642, 7986, 2.95),
    ],
)
def test_context_of_26b(context: int, attention: float, whole: float, kv: float) -> None:
    work = step_work(TEXT_26B, replace(STEP, context=context))
    assert work["attention"].flops / 1e9 == pytest.approx(attention, abs=0.5)
    assert total(work).flops / 1e9 == pytest.approx(whole, abs=0.6)  # the source rounded twice
    assert work["attention"].nbytes / 1e9 == pytest.approx(kv, abs=0.006)


REST_8 = recipe_bits(mixed(Quantization(64, 4))) | {"self-conditioning": 8.5}


@pytest.mark.parametrize(
    ("bits", "soft_tokens", "vocabulary", "expected"),
    [
        (BITS_4, None, "eager", (12.85, 0.62, 0.30, 0.42, 0.42, 5.64, 0.29, 2.34, 22.9)),
        (BITS_4, None, "stored", (12.85, 0.62, 0.30, 0.42, 0.42, 0.40, 0.29, 2.34, 17.6)),
        (BITS_4, 64, "stored", (12.85, 0.62, 0.30, 0.42, 0.03, 0.27, 0.29, 2.34, 17.1)),
        (BITS_4, 64, "fused", (12.85, 0.62, 0.30, 0.42, 0.03, 0, 0.29, 2.34, 16.9)),
        (REST_8, 64, "fused", (12.85, 1.18, 0.57, 0.78, 0.05, 0, 0.29, 2.34, 18.1)),
        (BITS_8, 64, "fused", (24.27, 1.18, 0.57, 0.78, 0.05, 0, 0.29, 2.34, 29.5)),
    ],
)
def test_bytes_of_a_step_of_26b(bits, soft_tokens, vocabulary, expected) -> None:
    work = step_work(TEXT_26B, replace(STEP, bits=bits, soft_tokens=soft_tokens, vocabulary=vocabulary))
    parts = "experts", "attention projections", "dense MLP", "head", "soft embedding", "vocabulary arrays", "attention"
    got = [work[part].nbytes / 1e9 for part in (*parts, "activations")]
    assert got == pytest.approx(expected[:-1], abs=0.006)
    assert total(work).nbytes / 1e9 == pytest.approx(expected[-1], abs=0.06)


def test_fewer_distinct_experts_of_26b() -> None:
    fewer = step_work(TEXT_26B, replace(STEP, distinct_experts=62))["experts"]
    assert fewer.nbytes / 1e9 == pytest.approx(6.22, abs=0.005)
    assert fewer.flops == step_work(TEXT_26B, STEP)["experts"].flops
    assert uniform_distinct_experts(TEXT_26B, 256) == pytest.approx(128.0, abs=0.05)
    assert uniform_distinct_experts(TEXT_26B, 64) == pytest.approx(125.9, abs=0.05)


def test_the_text_config_is_the_published_one() -> None:
    if not REFERENCE.exists():
        pytest.skip(f"needs {REFERENCE}: Google's configuration is not part of this repository")
    assert ModelConfig.from_dict(json.loads(REFERENCE.read_text())).text == TEXT_26B


@pytest.mark.parametrize(
    ("chip", "scenario", "milliseconds", "speeds"),
    [
        ("M1 Max", FLOOR, 244, [83, 63, 42, 22]),
        ("M5 Max", FLOOR, 51, [397, 302, 204, 104]),
        ("M3 Max", SPARSE, 151, [133, 101, 68, 35]),
        ("M5", SPARSE, 177, [113, 86, 58, 30]),
        ("M4 Max", ATTAINABLE, 209, [95, 73, 49, 25]),
        ("M3 Ultra", ATTAINABLE, 126, [158, 121, 82, 42]),
        ("M2 Ultra", EAGER, 212, [95, 72, 49, 25]),
        ("M5 Pro", EAGER, 209, [97, 73, 50, 25]),
    ],
)
def test_predictions_for_26b(chip: str, scenario, milliseconds: int, speeds: list[int]) -> None:
    found = predict(TEXT_26B, 256, find_chip(chip), scenario, BITS_4)
    assert 1000 * found.step_seconds == pytest.approx(milliseconds, abs=0.6)
    assert [found.tokens_per_second(k) for k in (12, 16, 24, 48)] == pytest.approx(speeds, abs=0.6)


@pytest.mark.parametrize(("share", "milliseconds"), [(1.0, 44), (0.5, 32), (0.25, 26)])
def test_fewer_rows_on_an_m5_max_pay_less_than_in_proportion(share: float, milliseconds: int) -> None:
    found = predict(TEXT_26B, 256, find_chip("M5 Max"), SPARSE, BITS_4, row_share=share)
    assert 1000 * found.step_seconds == pytest.approx(milliseconds, abs=0.6)


# -- a small model, by hand -----------------------------------------------------------------------------------------


SMALL = ModelConfig.from_dict(config_dict()).text  # width 64, 3 layers, 4 heads, 4 experts of which 2, window 8
BITS_16 = recipe_bits(None)


def test_counts_of_a_small_model_by_hand() -> None:
    sliding, full = 64 * 16 * (4 + 2 + 2 + 4), 64 * 32 * (4 + 1 + 4)  # q, k, v, o; and q, k, o
    assert parameters(SMALL) == {
        "embedding": 96 * 64,
        "attention": 2 * sliding + full,
        "dense MLP": 3 * 3 * 64 * 64,
        "router": 3 * 64 * 4,
        "experts": 3 * 4 * 3 * 64 * 64,
        "self-conditioning": 3 * 64 * 64,
    }
    work = step_work(SMALL, Pass(8, 20, BITS_16, distinct_experts=3))
    assert work["attention projections"] == Work(2 * 8 * (2 * sliding + full), 2 * (2 * sliding + full))
    pairs = 2 * (4 * 16) * (7 + 8) + (4 * 32) * (20 + 8)  # a query sees the last 7 tokens, or all 20, and the canvas
    keys = 2 * (2 * 16) * (7 + 8) + (1 * 32) * (20 + 8)
    assert work["attention"] == Work(4 * 8 * pairs, 2 * keys * 2)
    assert work["experts"] == Work(2 * 8 * 2 * 3 * 3 * 64 * 64, 3 * 3 * 3 * 64 * 64 * 2)
    assert work["head"] == Work(2 * 8 * 96 * 64, 96 * 64 * 2)
    assert work["soft embedding"] == work["head"]
    assert work["vocabulary arrays"] == Work(0, 3 * 8 * 96 * 2)
    sparse = step_work(SMALL, Pass(8, 20, BITS_16, soft_tokens=5))["soft embedding"]
    assert sparse == Work(2 * 8 * 5 * 64, 8 * 5 * 64 * 2)


def test_encoding_has_no_head_and_no_self_conditioning() -> None:
    how = Pass(8, 20, BITS_16)
    left_out = {"self-conditioning", "head", "soft embedding", "vocabulary arrays"}
    step, encode = step_work(SMALL, how), encode_work(SMALL, how)
    assert step.keys() - encode.keys() == left_out
    assert all(step[name] == part for name, part in encode.items())


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        (None, 16),
        (Quantization(64, 4), 4.5),
        (Quantization(32, 8), 9),
        (Quantization(32, 4, "mxfp4"), 4.25),
        (Quantization(16, 4, "nvfp4"), 4.5),
        (Quantization(32, 8, "mxfp8"), 8.25),
    ],
)
def test_bits_per_weight(settings: Quantization | None, bits: float) -> None:
    assert stored_bits(settings) == bits


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_bits_for_every_part(name: str) -> None:
    bits = recipe_bits(find_recipe(name).recipe)
    assert bits.keys() == parameters(SMALL).keys()
    assert all(2 < value < 10 for value in bits.values())


def test_a_part_takes_the_longer_of_arithmetic_and_traffic() -> None:
    chip = Chip("x", gigabytes_per_second=10, teraflops=2, basis="")
    work = {"head": Work(4e12, 10e9), "experts": Work(2e12, 30e9), "activations": Work(0, 5e9)}
    assert part_seconds(work, chip, FLOOR) == {"head": 2.0, "experts": 3.0}
    half = replace(FLOOR, compute=0.5, experts=0.25, bandwidth=0.5, activations=True)
    assert part_seconds(work, chip, half) == {"head": 4.0, "experts": 6.0, "activations": 1.0}


def test_comparison_adds_up() -> None:
    prediction = predict(SMALL, 8, Chip("x", 10, 0.001, ""), EAGER, BITS_16)
    found = compare_with(prediction, 0.5, 2.5, None)
    assert sum(part["predicted"] for part in found["parts"].values()) == pytest.approx(prediction.step_seconds)
    assert all(part["measured"] is None for part in found["parts"].values())
    assert found["measured_over_predicted"] == pytest.approx(0.5 / prediction.step_seconds)
    assert found["at_measured_steps"] == {
        "steps_per_canvas": 2.5,
        "tokens_per_second": pytest.approx(8 / (2.5 * prediction.step_seconds + prediction.encode_seconds)),
    }


# -- chips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("Apple M3 Max", "M3 Max"),
        ("Apple M3", "M3"),
        ("Apple M5 Pro", "M5 Pro"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("Apple M31", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("", None),
    ],
)
def test_chip_of_a_device(device: str, name: str | None) -> None:
    chip = chip_in(device)
    assert (chip and chip.name) == name


def test_chips_by_name() -> None:
    assert find_chip(" m3  max ") is next(chip for chip in CHIPS if chip.name == "M3 Max")
    with pytest.raises(ValueError, match=r"^chip: got 'M9', expected one of M1, M1 Pro, M1 Max, .*, H200$"):
        find_chip("M9")


def test_an_unknown_chip_is_measured(monkeypatch) -> None:
    monkeypatch.setattr(chips, "SECONDS_PER_MEASUREMENT", 0)
    monkeypatch.setattr(chips, "MATMUL_SIZE_CPU", 64)
    monkeypatch.setattr(chips, "MATMUL_SIZE_GPU", 64)
    monkeypatch.setattr(chips, "COPY_BYTES_CPU", 1 << 16)
    monkeypatch.setattr(chips, "COPY_BYTES_GPU", 1 << 16)
    chip = measure_chip("mine", mx.float32)
    assert chip.name == "mine" and chip.basis.startswith("measured here: a 64 x 64 matrix multiplication in float32")
    assert chip.gigabytes_per_second > 0 and chip.teraflops > 0
