"""Mixed precision: the budget against a search through all choices, and the measurement on a real model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import mlx.core as mx
import pytest
from small_model import random_model

from mlx_diffusiongemma.pipeline import load
from mlx_diffusiongemma.recipes import Quantization, part_of
from mlx_diffusiongemma.sensitivity import (
    CHOICES,
    PROBE,
    Sensitivity,
    allocate,
    fitting_choices,
    measure,
    relative_error,
    round_trip,
    stored_bits,
)
from mlx_diffusiongemma.tasks import make_task


def sensitivity(path: str, weights: int, kl: float, steps_change: float = 0.0) -> Sensitivity:
    """Errors fall by four with every bit, as those of uniform quantisation do."""
    return Sensitivity(path, weights, kl, steps_change, {c: 4.0**-c.bits * (c.group_size / 64) ** 0.2 for c in CHOICES})


def bits_of(chosen: dict[str, Quantization], each: list[Sensitivity]) -> float:
    return sum(s.weights * stored_bits(chosen[s.path]) for s in each)


def cost_of(chosen: dict[str, Quantization], each: list[Sensitivity]) -> float:
    return sum(s.cost(chosen[s.path], PROBE) for s in each)


@pytest.mark.parametrize("target", [3.6, 4.0, 4.5, 5.2, 6.0, 7.5])
def test_budget_against_all_choices(target: float) -> None:
    each = [sensitivity("a", 1000, 1e-2), sensitivity("b", 500, 1e-3), sensitivity("c", 2000, 1e-4)]
    each.append(sensitivity("d", 100, 5e-3, steps_change=0.5))
    parameters = sum(s.weights for s in each)
    chosen = allocate(each, 0, parameters, target)
    assert bits_of(chosen, each) <= target * parameters
    everything = [
        dict(zip([s.path for s in each], combination, strict=True))
        for combination in itertools.product(CHOICES, repeat=len(each))
    ]
    best = min(cost_of(one, each) for one in everything if bits_of(one, each) <= target * parameters)
    assert cost_of(chosen, each) == pytest.approx(best)


def test_more_budget_is_never_worse() -> None:
    each = [sensitivity(str(i), 100 * (1 + i % 3), 10.0 ** -(i % 5)) for i in range(12)]
    parameters = sum(s.weights for s in each)
    costs = [cost_of(allocate(each, 0, parameters, target), each) for target in (3.25, 3.5, 4.0, 4.5, 5.0, 6.0, 9.0)]
    assert costs == sorted(costs, reverse=True)
    assert set(allocate(each, 0, parameters, 9.0).values()) == {CHOICES[-1]}
    assert set(allocate(each, 0, parameters, 3.25).values()) == {CHOICES[0]}


def test_what_is_not_quantised_counts() -> None:
    each = [sensitivity("a", 1000, 1e-2)]
    # 1,000 weights at 3.25 bits, and 1,600 bits of 100 others: 4,850 bits for 1,100 parameters.
    with pytest.raises(ValueError, match=r"target-bpw: got 4\.4, expected at least 4\.409 for this checkpoint"):
        allocate(each, 1600, 1100, 4.4)
    assert allocate(each, 1600, 1100, 4.41) == {"a": CHOICES[0]}


def test_sensitive_modules_and_slow_ones_get_more() -> None:
    each = [sensitivity("calm", 1000, 1e-4), sensitivity("sharp", 1000, 1e-2)]
    chosen = allocate(each, 0, 2000, 5.0)
    assert chosen["sharp"].bits > chosen["calm"].bits
    each = [sensitivity("fast", 1000, 1e-3), sensitivity("slow", 1000, 1e-3, steps_change=3.0)]
    chosen = allocate(each, 0, 2000, 4.4)
    assert stored_bits(chosen["slow"]) > stored_bits(chosen["fast"])


def test_relative_error_by_hand() -> None:
    """Sixty-four numbers on a 4-bit grid are kept; one moved off the grid by half a step is the whole error."""
    row = mx.arange(64).astype(mx.float32) % 16
    assert relative_error(row[None], PROBE) < 1e-12
    off = mx.array(row)
    off[1] = 1.5
    expected = 0.25 / float(mx.square(off).sum())
    assert relative_error(off[None], PROBE) == pytest.approx(expected, rel=1e-3)


def test_round_trip_is_that_of_mlx() -> None:
    weight = mx.random.normal((6, 5, 128))
    for settings in CHOICES:
        how = {"group_size": settings.group_size, "bits": settings.bits}
        assert mx.array_equal(round_trip(weight, settings), mx.dequantize(*mx.quantize(weight, **how), **how))


def test_choices_that_fit() -> None:
    assert set(fitting_choices(128).values()) == set(CHOICES)
    assert set(fitting_choices(64).values()) == {choice for choice in CHOICES if choice.group_size < 128}
    assert all(choice.group_size == 32 for choice in fitting_choices(96).values())
    assert [round(stored_bits(choice), 2) for choice in CHOICES[:4]] == [3.25, 3.5, 4.0, 4.25]
    assert fitting_choices(40) == {}


@pytest.fixture
def source(source: Path) -> Path:
    """The small checkpoint with a chat template."""
    (source / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    return source


TASKS = [make_task({"messages": [{"role": "user", "content": "abc"}]})]


def test_measuring_leaves_the_model_as_it_is(source: Path) -> None:
    pipeline = load(source)
    found = measure(pipeline, TASKS, seed=1, max_tokens=16)
    modules = {path for path, module in pipeline.model.named_modules() if part_of(path) and "weight" in module}
    assert {each.path for each in found} == modules and len(modules) == 33
    assert all(each.kl > 0 for each in found)
    expected = dict(random_model().named_modules())
    for path, module in pipeline.model.named_modules():
        if "weight" in module:
            assert mx.array_equal(module["weight"], expected[path]["weight"]), path


@pytest.mark.slow
def test_the_measured_recipe_keeps_its_budget(source: Path, tmp_path: Path) -> None:
    from mlx_diffusiongemma.convert import main

    target = tmp_path / "out"
    flags = ["--hf-path", str(source), "--mlx-path", str(target), "--recipe", "auto", "--target-bpw", "6.5"]
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"messages": [{"role": "user", "content": "abc"}]}\n')
    assert main([*flags, "--calibration", str(tasks), "--dtype", "bfloat16"]) == 0
    notes = json.loads((target / "config.json").read_text())["mlx_diffusiongemma"]
    index = json.loads((target / "model.safetensors.index.json").read_text())["metadata"]
    assert 6.4 < 8 * index["total_size"] / index["total_parameters"] <= 6.5
    assert len(notes["sensitivity"]) == 33 and notes["recipe"] == "auto, 6.5 bits per weight"
    load(target)
