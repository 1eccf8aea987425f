"""Tuning of scales and biases: the gradient against differences, the outcome, what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from small_model import random_model

from mlx_diffusiongemma import auto, distillation
from mlx_diffusiongemma.auto import packed_twin
from mlx_diffusiongemma.distillation import Distillation, Tuned, distill, read_steps
from mlx_diffusiongemma.model import DiffusionGemma
from mlx_diffusiongemma.pipeline import Pipeline, load
from mlx_diffusiongemma.plan import ConversionRequest, make_plan
from mlx_diffusiongemma.quality import compare
from mlx_diffusiongemma.recipes import Quantization, part_of, uniform
from mlx_diffusiongemma.tasks import make_task
from mlx_diffusiongemma.trajectories import RecordedStep, Trajectory, record_trajectories

THREE_BITS = Quantization(32, 3)


def quantized(mode: str = "affine") -> DiffusionGemma:
    model = random_model()
    nn.quantize(model, group_size=32, bits=3 if mode == "affine" else 4, mode=mode)
    mx.eval(model.parameters())
    return model


def noise(count: int) -> list[Trajectory]:
    """Canvases of noise behind short prefixes, two steps each."""
    rng = np.random.default_rng(0)
    config = random_model().config
    V, C = config.text.vocab_size, config.canvas_length

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(V, size=n).tolist())

    return [
        Trajectory(ids(3 + i % 4), (RecordedStep(1, ids(C), 0.8), RecordedStep(2, ids(C), 0.6)), 0.1)
        for i in range(count)
    ]


def scales(model: DiffusionGemma) -> dict[str, mx.array]:
    return {f"{p}.{k}": mx.array(m[k]) for p, m in model.named_modules() if "scales" in m for k in ("scales", "biases")}


def codes(model: DiffusionGemma) -> dict[str, mx.array]:
    return {path: mx.array(m["weight"]) for path, m in model.named_modules() if "scales" in m}


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return load("tiny", dtype="float32")


@pytest.fixture(scope="module")
def canvases(tiny: Pipeline) -> list[Trajectory]:
    questions = (
        "What is 7 + 5?",
        "Spell stone backwards.",
        "Sort these words: pear, apple, map",
        "Name three colours.",
    )
    tasks = [make_task({"messages": [{"role": "user", "content": question}]}) for question in questions]
    return record_trajectories(tiny, tasks, seed=0, max_tokens=64)


def two_bits() -> DiffusionGemma:
    model = load("tiny", dtype="float32").model
    nn.quantize(model, group_size=64, bits=2, class_predicate=lambda path, _: part_of(path) == "attention")
    mx.eval(model.parameters())
    return model


@pytest.mark.slow
def test_it_helps_on_a_canvas_it_has_not_seen_and_leaves_the_integers(
    tiny: Pipeline, canvases: list[Trajectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "CANVASES_PER_UPDATE", 1)
    model = two_bits()
    before = codes(model)
    start = compare(tiny.model, model, canvases).mean_kl
    outcome = distill(tiny.model, model, canvases, updates=24, seed=3)
    assert outcome.kl_after < 0.9 * outcome.kl_before
    assert compare(tiny.model, model, canvases).mean_kl < 0.7 * start
    assert set(outcome.modules) == set(before)
    for path, module in model.named_modules():
        if path in before:
            assert mx.array_equal(module["weight"], before[path])
            assert mx.array_equal(module["scales"], outcome.modules[path].scales)


def test_the_same_seed_gives_the_same_scales() -> None:
    one, other = (distill(random_model(), quantized(), noise(6), updates=3, seed=5) for _ in range(2))
    assert one.kl_after == other.kl_after
    assert all(mx.array_equal(a, b) for p in one.modules for a, b in zip(one.modules[p], other.modules[p], strict=True))


def test_scales_are_tuned_as_they_will_be_stored() -> None:
    """The divergence that is reported is that of the rounded numbers, which a folder in bfloat16 holds unchanged."""
    model, canvases = quantized(), noise(1) * 4  # what is learned is what is judged: it helps
    outcome = distill(random_model(), model, canvases, updates=8, dtype=mx.bfloat16)
    assert outcome.modules and compare(random_model(), model, canvases).mean_kl == outcome.kl_after
    for tuned in outcome.modules.values():
        assert all(mx.array_equal(x.astype(mx.bfloat16).astype(mx.float32), x) for x in tuned)


def test_a_tuning_that_makes_it_worse_is_undone() -> None:
    model = quantized()
    before = scales(model)
    outcome = distill(random_model(), model, noise(6), updates=3, learning_rate=10.0)
    assert outcome.modules == {} and outcome.kl_after == outcome.kl_before
    assert all(mx.array_equal(before[name], array) for name, array in scales(model).items())


def test_the_gradient_is_that_of_the_divergence_that_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both read the same canvas, and the first step has no signal of its own: the two numbers are one."""
    monkeypatch.setattr(distillation, "STEPS_PER_CANVAS", 1)
    original, model, canvas = random_model(), quantized(), noise(1)[0]
    first = replace(canvas, steps=canvas.steps[:1])
    readings = read_steps(original, first, np.random.default_rng(0))
    loss = distillation._divergence(model, first, readings)
    assert float(loss) == pytest.approx(compare(original, model, [first]).mean_kl, rel=1e-4)

    module = dict(model.named_modules())["model.decoder.layers.1.self_attn.o_proj"]
    start = module["scales"]
    direction = mx.random.normal(start.shape, key=mx.random.key(1))

    def along(distance: mx.array) -> mx.array:
        module["scales"] = start * (1 + distance * direction)
        return distillation._divergence(model, first, readings)

    slope = float(mx.grad(along)(mx.array(0.0)))
    difference = (float(along(mx.array(2e-4))) - float(along(mx.array(-2e-4)))) / 4e-4
    assert slope == pytest.approx(difference, rel=5e-2) and abs(slope) > 0.1


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="trajectories: got 1, expected at least two canvases"):
        distill(random_model(), quantized(), noise(1), updates=1)
    with pytest.raises(ValueError, match="no affine module"):
        distill(random_model(), quantized("mxfp4"), noise(3), updates=1)


@pytest.fixture
def source(source: Path) -> Path:
    """The small checkpoint with a chat template."""
    (source / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    return source


def test_the_twin_is_what_the_conversion_writes(source: Path, tmp_path: Path) -> None:
    from mlx_diffusiongemma.conversion import write_checkpoint

    pipeline = load(source)
    plan = make_plan(source, ConversionRequest(uniform(THREE_BITS), THREE_BITS))
    twin = packed_twin(pipeline.model, plan)
    write_checkpoint(plan, tmp_path / "out", "card")
    written = load(tmp_path / "out").model
    for (path, one), (_, other) in zip(twin.named_modules(), written.named_modules(), strict=True):
        for name in ("weight", "scales", "biases"):
            assert (name in one) == (name in other), path
            assert name not in one or mx.array_equal(one[name], other[name]), (path, name)


@pytest.mark.slow
def test_auto_writes_the_tuned_scales(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The integers of the plain conversion with the scales that the distillation gives."""
    from mlx_diffusiongemma.convert import main

    def doubled(_: DiffusionGemma, quantized: DiffusionGemma, trajectories: object, **given: object) -> Distillation:
        assert trajectories and given["updates"] == 7
        modules = {p: Tuned(2 * m["scales"], 3 * m["biases"]) for p, m in quantized.named_modules() if "scales" in m}
        return Distillation(modules, 0.5, 0.25)

    monkeypatch.setattr(auto, "distill", doubled)
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"messages": [{"role": "user", "content": "abc"}]}\n')
    flags = ["--hf-path", str(source), "--recipe", "auto", "--target-bpw", "5.5", "--calibration", str(tasks)]
    for updates in ("0", "7"):
        assert main([*flags, "--mlx-path", str(tmp_path / updates), "--tuning-updates", updates]) == 0
    plain, tuned = (load(tmp_path / updates).model for updates in ("0", "7"))
    before, after = codes(plain), codes(tuned)
    assert before.keys() == after.keys() and all(mx.array_equal(before[path], after[path]) for path in before)
    found = scales(tuned)
    for name, array in scales(plain).items():
        assert mx.array_equal(found[name], (2 if name.endswith("scales") else 3) * array), name
    notes = json.loads((tmp_path / "7" / "config.json").read_text())["mlx_diffusiongemma"]
    assert notes["distillation"] == {"updates": 7, "kl_before": 0.5, "kl_after": 0.25}
    card = (tmp_path / "7" / "README.md").read_text()
    assert "Measured on 1 tasks." in card and card.count("| `model.decoder.") == 10
    assert "7 updates of the scales brought the KL on canvases kept back from 5.0e-01 to 2.5e-01 nats" in card
    assert "updates of the scales" not in (tmp_path / "0" / "README.md").read_text()
