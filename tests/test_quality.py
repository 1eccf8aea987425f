"""Quality measurements against naive ones that hold everything at once, on random models; weights unpacked by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from small_model import GENERATION, config_dict, random_model

import mlx_diffusiongemma
from mlx_diffusiongemma import quality, sampler, trajectories
from mlx_diffusiongemma.checkpoint import Checkpoint
from mlx_diffusiongemma.config import GenerationConfig, ModelConfig
from mlx_diffusiongemma.events import DenoisingStep, Finished
from mlx_diffusiongemma.model import DiffusionGemma
from mlx_diffusiongemma.pipeline import Pipeline
from mlx_diffusiongemma.prompt import build_prompt
from mlx_diffusiongemma.quality import (
    Accuracy,
    Agreement,
    by_part,
    compare,
    generation_statistics,
    summarize,
    weight_errors,
)
from mlx_diffusiongemma.tasks import Task, make_task
from mlx_diffusiongemma.tokenizer import Tokenizer
from mlx_diffusiongemma.trajectories import RecordedStep, Trajectory, record_trajectories

TINY = Path(mlx_diffusiongemma.__file__).parent / "tiny"
C, SOFTCAP = 8, 30.0
MODES = {"affine": (32, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}


def quantised(model: DiffusionGemma, mode: str = "affine", bits: int | None = None) -> DiffusionGemma:
    """Quantise every weight of a model in place; return it."""
    group_size, default_bits = MODES[mode]
    nn.quantize(model, group_size=group_size, bits=bits or default_bits, mode=mode)
    mx.eval(model.parameters())
    return model


# -- the same canvases --------------------------------------------------------------------------------------------


def random_trajectories(V: int, count: int = 2) -> list[Trajectory]:
    """Return canvases of noise at falling temperatures, behind prefixes of different lengths."""
    rng = np.random.default_rng(V)
    return [
        Trajectory(
            prefix=tuple(rng.integers(V, size=5 + 9 * index).tolist()),
            steps=tuple(
                RecordedStep(step, tuple(rng.integers(V, size=C).tolist()), 0.8 - 0.1 * step) for step in range(1, 4)
            ),
            entropy_bound=4.0,
        )
        for index in range(count)
    ]


def naive_readings(model: DiffusionGemma, trajectory: Trajectory) -> Iterator[np.ndarray]:
    """Yield the probabilities [C, V] of every step in float64, the whole vocabulary at once."""
    cache = model.make_cache()
    model.prefill(mx.array(trajectory.prefix), cache)
    table = model.model.decoder.embed_tokens
    weight = np.array(table(mx.arange(model.config.text.vocab_size)), np.float64)  # [V, D]
    soft = mx.zeros((C, weight.shape[1]))
    for step in trajectory.steps:
        hidden = model.denoise([mx.array(step.canvas)], [soft], [cache.views()], [mx.array(cache.offset)])[0]
        logits = np.tanh(np.array(hidden, np.float64) @ weight.T / SOFTCAP) * SOFTCAP / step.temperature
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        p = weights / weights.sum(-1, keepdims=True)
        yield p
        soft = mx.array((p @ weight).astype(np.float32))


def naive_accepted(entropy: np.ndarray, bound: float) -> np.ndarray:
    accepted = np.zeros(C, bool)
    spent = 0.0
    for position in np.argsort(entropy, kind="stable"):
        accepted[position] = spent <= bound
        spent += entropy[position]
    return accepted


def naive_comparison(reference: DiffusionGemma, candidate: DiffusionGemma, trajectories: list[Trajectory]) -> Agreement:
    kl, argmax, accepted, difference = [], [], [], []
    for trajectory in trajectories:
        readings = zip(naive_readings(reference, trajectory), naive_readings(candidate, trajectory), strict=True)
        for p, q in readings:
            kl.append((p * (np.log(p) - np.log(q))).sum(-1))
            argmax.append(p.argmax(-1) == q.argmax(-1))
            one, other = (-(x * np.log(x)).sum(-1) for x in (p, q))
            bound = trajectory.entropy_bound
            accepted.append(naive_accepted(one, bound) == naive_accepted(other, bound))
            difference.append(np.abs(one - other))
    steps = sum(len(trajectory.steps) for trajectory in trajectories)
    means = (float(np.mean(x)) for x in (argmax, accepted, difference))
    return Agreement(len(trajectories), steps, steps * C, float(np.mean(kl)), float(np.max(kl)), *means)


def check(got: Agreement, expected: Agreement, mean: float, largest: float) -> None:
    """Demand equal counts and decisions, and floats within absolute tolerances."""
    for name in ("canvases", "steps", "positions", "argmax_agreement", "accepted_agreement"):
        assert getattr(got, name) == getattr(expected, name), name
    assert got.mean_kl == pytest.approx(expected.mean_kl, abs=mean)
    assert got.max_kl == pytest.approx(expected.max_kl, abs=largest)
    assert got.mean_entropy_difference == pytest.approx(expected.mean_entropy_difference, abs=mean)


@pytest.mark.parametrize("V", [96, 1024])  # 1024 is summed in two levels
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_one_step_equals_the_naive_comparison(V: int, rows: int) -> None:
    """Both see the same hidden states here, so the tolerance is that of the vocabulary pass: measured 2.3e-7."""
    reference, candidate = random_model(vocab_size=V), quantised(random_model(vocab_size=V))
    trajectories = [dataclasses.replace(t, steps=t.steps[:1]) for t in random_trajectories(V)]
    expected = naive_comparison(reference, candidate, trajectories)
    assert expected.argmax_agreement < 1 and expected.accepted_agreement < 1  # both decisions occur
    got = compare(reference, candidate, trajectories, chunk_elements=rows * V)
    check(got, expected, mean=2e-6, largest=2e-6)


def calm_model(V: int) -> DiffusionGemma:
    """Return a random model that a rounded bit of its own signal does not send elsewhere."""
    model = random_model(vocab_size=V)
    down = model.model.decoder.self_conditioning.down_proj
    down.weight = down.weight * 0.1
    return model


@pytest.mark.parametrize("V", [96, 1024])
def test_several_steps_equal_the_naive_comparison(V: int) -> None:
    """Hidden states differ in the last bits from the second step on: measured 7e-7 for means, 1.2e-5 for the maximum.

    Measured on models with the full signal: 2.1e-5 and 3.8e-4, the same decisions.
    """
    reference, candidate = calm_model(V), quantised(calm_model(V))
    trajectories = random_trajectories(V)
    expected = naive_comparison(reference, candidate, trajectories)
    check(compare(reference, candidate, trajectories), expected, mean=5e-6, largest=5e-5)
    steps_alone = [dataclasses.replace(t, steps=(step,)) for t in trajectories for step in t.steps]
    assert abs(naive_comparison(reference, candidate, steps_alone).mean_kl - expected.mean_kl) > 1e-2  # it matters


def test_the_direction_of_the_divergence() -> None:
    reference, candidate = random_model(), quantised(random_model())
    [trajectory] = random_trajectories(96, count=1)
    trajectory = dataclasses.replace(trajectory, steps=trajectory.steps[:1])
    one, other = compare(reference, candidate, [trajectory]), compare(candidate, reference, [trajectory])
    assert one.mean_kl == pytest.approx(naive_comparison(reference, candidate, [trajectory]).mean_kl, abs=2e-6)
    assert abs(one.mean_kl - other.mean_kl) > 1e-2
    assert one.mean_entropy_difference == other.mean_entropy_difference


@pytest.mark.parametrize("mode", MODES)
def test_a_model_agrees_with_itself_exactly(mode: str) -> None:
    model = quantised(random_model(), mode)
    got = compare(model, model, random_trajectories(96))
    assert (got.mean_kl, got.max_kl, got.mean_entropy_difference) == (0, 0, 0)
    assert (got.argmax_agreement, got.accepted_agreement) == (1, 1)


def test_peak_memory_is_a_few_chunks() -> None:
    V = 1 << 17
    model = random_model(vocab_size=V)
    [trajectory] = random_trajectories(V, count=1)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    compare(model, model, [trajectory], chunk_elements=V)
    chunk = V * 4
    assert mx.get_peak_memory() - before < 2 * C * chunk  # two arrays of the whole canvas; measured 10.3 of the 16


def test_models_that_cannot_be_compared() -> None:
    model = random_model()
    with pytest.raises(ValueError, match="the candidate has vocab_size 128, expected 96 as in the reference"):
        compare(model, random_model(vocab_size=128), random_trajectories(96))
    other = random_model()
    other.config = dataclasses.replace(other.config, canvas_length=16)
    with pytest.raises(ValueError, match="the candidate has canvas_length 16, expected 8 as in the reference"):
        compare(model, other, random_trajectories(96))
    with pytest.raises(ValueError, match="trajectories: got none, expected at least one canvas"):
        compare(model, model, [])


def test_nan_is_an_error() -> None:
    broken = random_model()
    broken.model.decoder.norm.weight = mx.full((64,), math.nan)
    with pytest.raises(FloatingPointError, match="a model computed NaN"):
        compare(random_model(), broken, random_trajectories(96))


# -- recording ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """A random model behind the bundled tokenizer: canvas 8, 6 steps at most."""
    tokenizer = Tokenizer.load(TINY)
    text = {"vocab_size": tokenizer.vocab_size}
    config = ModelConfig.from_dict(config_dict(**text))
    return Pipeline(Checkpoint(TINY, random_model(**text), tokenizer, config, GenerationConfig.from_dict(GENERATION)))


TASKS = [
    Task([{"role": "user", "content": "One"}]),
    Task([{"role": "user", "content": "Two"}], enable_thinking=True, expected="x"),
]


def test_record_keeps_what_the_decoder_was_shown(pipeline: Pipeline) -> None:
    trajectories = record_trajectories(pipeline, TASKS, seed=5, max_tokens=16)
    for index, task in enumerate(TASKS):
        prompt = build_prompt(pipeline.tokenizer, task.messages, enable_thinking=task.enable_thinking).token_ids
        events = list(pipeline.stream(task.messages, seed=5 + index, max_tokens=16, **task.prompt_options))
        finished = events[-1]
        assert isinstance(finished, Finished)
        prefix = prompt
        for canvas_index, steps in enumerate(finished.result.stats.denoising_steps):
            trajectory = trajectories.pop(0)
            assert trajectory.prefix == prefix
            assert trajectory.entropy_bound == 0.1
            shown = [e for e in events if isinstance(e, DenoisingStep) and e.canvas_index == canvas_index]
            assert [step.step for step in trajectory.steps] == list(range(1, steps + 1)) == [e.step for e in shown]
            for step, after in zip(trajectory.steps, shown, strict=True):
                noise = sampler.noise(5 + index, canvas_index, step.step - 1, C, pipeline.config.text.vocab_size)
                before = (False,) * C if step.step == 1 else shown[step.step - 2].accepted
                kept = [i for i in range(C) if not before[i]]  # the rest were drawn from the model
                assert [step.canvas[i] for i in kept] == np.array(noise.token_ids)[kept].tolist()
                assert step.temperature == pytest.approx(0.4 + 0.4 * (6 - step.step + 1) / 6, abs=1e-6)
                assert len(after.token_ids) == C
            prefix += shown[-1].token_ids
    assert not trajectories


def test_the_reference_reads_the_recorded_canvases_as_it_did(pipeline: Pipeline) -> None:
    """Every argmax and every decision of the run comes out again, so the drawn tokens were recorded too."""
    trajectory = record_trajectories(pipeline, TASKS[:1], seed=5, max_tokens=8)[0]
    events = pipeline.stream(TASKS[0].messages, seed=5, max_tokens=8)
    steps = [event for event in events if isinstance(event, DenoisingStep)]
    reader = trajectories.Reader(pipeline.model, trajectory.prefix)
    assert len(steps) == len(trajectory.steps) > 1
    for shown, event in zip(trajectory.steps, steps, strict=True):
        reading = reader.read(mx.array(shown.canvas), mx.array(shown.temperature), 1 << 20)
        assert tuple(reading.argmax.tolist()) == event.token_ids
        assert tuple(sampler.accept(reading.entropy, trajectory.entropy_bound).tolist()) == event.accepted


def test_watching_changes_nothing(pipeline: Pipeline) -> None:
    seen = []
    watched = pipeline.watched(lambda inputs, rules, results: seen.append((len(inputs), len(rules), len(results))))
    one, other = (p.generate("Hello", seed=3, max_tokens=16) for p in (pipeline, watched))
    assert one.token_ids == other.token_ids
    assert seen == [(1, 1, 1)] * sum(one.stats.denoising_steps)


def test_progress_counts_to_the_end(pipeline: Pipeline) -> None:
    calls: list[tuple[int, int]] = []
    trajectories = record_trajectories(pipeline, TASKS, 5, max_tokens=8, progress=lambda *c: calls.append(c))
    assert calls == [(0, 2), (1, 2), (2, 2)]
    calls.clear()
    compare(pipeline.model, pipeline.model, trajectories, progress=lambda *c: calls.append(c))
    assert calls == [(0, 2), (1, 2), (2, 2)]


# -- weights ------------------------------------------------------------------------------------------------------


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def e4m3(codes: np.ndarray) -> np.ndarray:
    sign, exponent, mantissa = codes >> 7, (codes >> 3) & 15, codes & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent.astype(float) - 7))
    return np.where(sign == 1, -value, value)


def unpacked(module: nn.Module) -> np.ndarray:
    """Return a packed weight in float64, by hand: codes from the lowest bits up, then scale and bias of each group."""
    packed, scales = np.array(module["weight"]), np.array(module["scales"])
    per_word = 32 // module.bits
    codes = (packed[..., None] >> np.arange(per_word, dtype=np.uint32) * module.bits) & (2**module.bits - 1)
    codes = codes.reshape(*scales.shape, module.group_size).astype(np.int64)
    if module.mode == "affine":
        biases = np.array(module["biases"], np.float64)
        values = codes * scales.astype(np.float64)[..., None] + biases[..., None]
    else:
        scale = e4m3(scales.astype(np.int64)) if module.mode == "nvfp4" else 2.0 ** (scales.astype(float) - 127)
        values = (e4m3(codes) if module.mode == "mxfp8" else E2M1[codes]) * scale[..., None]
    return values.reshape(*packed.shape[:-1], -1)


@pytest.mark.parametrize("mode", MODES)
def test_weight_errors_equal_the_hand_computation(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "WEIGHTS_AT_ONCE", 1000)  # several pieces of every module, and one expert at a time
    reference, candidate = random_model(), quantised(random_model(), mode)
    originals, packed = dict(reference.named_modules()), dict(candidate.named_modules())
    errors = list(weight_errors(reference, candidate))
    assert {error.path for error in errors} == {path for path, module in packed.items() if "scales" in module}
    kinds = {type(packed[error.path]).__name__ for error in errors}
    assert kinds == {"QuantizedLinear", "QuantizedEmbedding", "QuantizedSwitchLinear"}
    for error in errors:
        weight = np.array(originals[error.path]["weight"], np.float64)
        difference = unpacked(packed[error.path]) - weight
        assert (error.group_size, error.bits, error.mode) == (*MODES[mode], mode)
        assert error.weights == weight.size
        assert error.error_norm == pytest.approx(np.linalg.norm(difference), rel=1e-5)
        assert error.relative_error == pytest.approx(
            math.sqrt((difference**2).mean()) / math.sqrt((weight**2).mean()), rel=1e-5
        )
        assert 0.005 < error.relative_error < 0.2


def test_parts_are_summed_over_their_weights() -> None:
    reference, candidate = random_model(), quantised(random_model())
    errors = list(weight_errors(reference, candidate))
    parts = {part.part: part for part in by_part(errors)}
    assert list(parts) == ["embedding", "attention", "dense MLP", "router", "experts", "self-conditioning"]
    assert [part.modules for part in parts.values()] == [1, 11, 9, 3, 6, 3]
    assert parts["embedding"].settings == ("4-bit affine, group 32",)
    group = [error for error in errors if ".mlp." in error.path]
    originals, packed = dict(reference.named_modules()), dict(candidate.named_modules())
    differences = np.concatenate([(unpacked(packed[e.path]) - originals[e.path]["weight"]).ravel() for e in group])
    weights = np.concatenate([np.array(originals[e.path]["weight"]).ravel() for e in group])
    expected = math.sqrt((differences**2).mean() / (weights.astype(np.float64) ** 2).mean())
    assert parts["dense MLP"].relative_error == pytest.approx(expected, rel=1e-5)
    worst = max(group, key=lambda error: error.relative_error)
    assert (parts["dense MLP"].worst_error, parts["dense MLP"].worst_module) == (worst.relative_error, worst.path)


def test_a_quantised_reference_stands_for_its_own_weight() -> None:
    reference, candidate = quantised(random_model(), bits=8), quantised(random_model())
    assert all(error.relative_error == 0 for error in weight_errors(candidate, candidate))
    originals, packed = dict(reference.named_modules()), dict(candidate.named_modules())
    error = next(weight_errors(reference, candidate))
    difference = unpacked(packed[error.path]) - unpacked(originals[error.path])
    assert error.error_norm == pytest.approx(np.linalg.norm(difference), rel=1e-5)


def test_only_what_is_quantised_is_measured() -> None:
    assert list(weight_errors(random_model(), random_model())) == []


def test_a_module_that_does_not_fit_is_named() -> None:
    candidate, kinds = quantised(random_model()), ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"layers\.2\..* is quantised in the candidate and has no weight"):
        list(weight_errors(random_model(num_hidden_layers=2, layer_types=kinds), candidate))
    with pytest.raises(ValueError, match=r"down_proj has shape \(64, 64\), expected \(64, 32\) as in the reference"):
        list(weight_errors(random_model(intermediate_size=32), candidate))


# -- generation ---------------------------------------------------------------------------------------------------


def result(text: str, steps: tuple[int, ...], tokens: int) -> SimpleNamespace:
    stats = SimpleNamespace(denoising_steps=steps, generated_tokens=tokens)
    return SimpleNamespace(text=text, reasoning=None, tool_calls=(), stats=stats)


def test_statistics_of_known_results() -> None:
    ask = {"messages": [{"role": "user", "content": "x"}]}
    tasks = [
        make_task({**ask, "expected": "1", "family": "b"}),
        make_task({**ask, "expected": "2", "family": "a"}),
        make_task({**ask, "expected": "3", "family": "b"}),
        make_task({**ask, "family": "free"}),
    ]
    results = [result("1", (2, 4), 100), result("2", (3,), 10), result("4", (11,), 20), result("?", (5,), 30)]
    statistics = summarize(tasks, results)  # type: ignore[arg-type]
    assert (statistics.tasks, statistics.canvases, statistics.denoising_steps) == (4, 5, 25)
    assert (statistics.mean_steps, statistics.median_steps) == (5.0, 4.0)
    assert statistics.p90_steps == pytest.approx(5 + 0.6 * (11 - 5))
    assert (statistics.generated_tokens, statistics.tokens_per_forward) == (160, 6.4)
    assert statistics.accuracy == Accuracy(2, 3, 2 / 3)
    assert statistics.families == {"a": Accuracy(1, 1, 1.0), "b": Accuracy(1, 2, 0.5)}


def test_statistics_of_real_answers(pipeline: Pipeline) -> None:
    one = pipeline.generate("One", seed=5, max_tokens=16)
    other = pipeline.generate(TASKS[1].messages, seed=6, max_tokens=16, enable_thinking=True)
    statistics = generation_statistics(pipeline, TASKS, 5, max_tokens=16)
    steps = one.stats.denoising_steps + other.stats.denoising_steps
    assert (statistics.canvases, statistics.denoising_steps) == (len(steps), sum(steps))
    assert statistics.generated_tokens == len(one.token_ids) + len(other.token_ids)
    assert statistics.accuracy == Accuracy(0, 1, 0.0)
    assert json.loads(json.dumps(statistics.to_dict()))["families"]["other"]["tasks"] == 1


def test_without_expected_answers_there_is_no_accuracy(pipeline: Pipeline) -> None:
    statistics = generation_statistics(pipeline, TASKS[:1], 5, max_tokens=8)
    assert (statistics.accuracy, statistics.families) == (None, {})


@pytest.mark.parametrize(("tasks", "max_tokens"), [([], 8), (TASKS, 0)])
def test_nothing_to_count(pipeline: Pipeline, tasks: list[Task], max_tokens: int) -> None:
    with pytest.raises(ValueError, match="no canvas was denoised"):
        generation_statistics(pipeline, tasks, 5, max_tokens=max_tokens)


def test_the_largest_seed_has_a_successor(pipeline: Pipeline) -> None:
    generation_statistics(pipeline, TASKS, 2**64 - 1, max_tokens=8)


def test_reports_are_json_ready(pipeline: Pipeline) -> None:
    trajectories = record_trajectories(pipeline, TASKS[:1], 5, max_tokens=8)
    agreement = compare(pipeline.model, pipeline.model, trajectories)
    errors = list(weight_errors(random_model(), quantised(random_model())))
    for each in (*trajectories, agreement, *errors, *by_part(errors)):
        json.dumps(each.to_dict(), allow_nan=False)
    assert errors[0].to_dict()["relative_error"] == errors[0].relative_error
