"""Mistakes that other ports of this model have made and fixed, one test each, so that ours does not repeat them."""

from __future__ import annotations

import threading
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from small_model import GENERATION, config_dict, random_model

import mlx_diffusiongemma
from mlx_diffusiongemma import masks, sampler
from mlx_diffusiongemma.checkpoint import Checkpoint
from mlx_diffusiongemma.config import GenerationConfig, ModelConfig
from mlx_diffusiongemma.output import OutputParser
from mlx_diffusiongemma.pipeline import Pipeline
from mlx_diffusiongemma.prefixes import Prefixes
from mlx_diffusiongemma.tokenizer import Tokenizer
from mlx_diffusiongemma.vocabulary import DrawShape, read_canvas

C = 8  # canvas of the small model


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.load(tiny_folder)


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Path, tokenizer: Tokenizer) -> Pipeline:
    """A random model without end tokens, so that only `max_tokens` ends an answer."""
    text = {"vocab_size": tokenizer.vocab_size}
    config = ModelConfig.from_dict(config_dict(**text))
    generation = GenerationConfig.from_dict({**GENERATION, "eos_token_id": []})
    return Pipeline(Checkpoint(tiny_folder, random_model(**text), tokenizer, config, generation))


def test_end_tokens_do_not_pile_up_across_requests(pipeline: Pipeline) -> None:
    before = pipeline.generate("go", max_tokens=C, seed=3).token_ids
    cut = pipeline.generate("go", max_tokens=C, seed=3, extra_eos_tokens=[before[4]])
    assert cut.token_ids == before[: before.index(before[4])]
    assert pipeline.generate("go", max_tokens=C, seed=3).token_ids == before
    assert pipeline.generation_config.eos_token_ids == ()


@pytest.mark.parametrize("step", [1, 3, 8, 11, 100])
def test_sliding_mask_survives_chunked_prefill(step: int) -> None:
    """What a sliding layer passes on is the same for the token `window` places later, whatever the first token is."""
    window = 8
    model = random_model(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    keys = []
    for first in (5, 6):
        tokens, cache = np.array([first, *range(10, 40)]), model.make_cache()
        for start, stop in masks.chunks(0, len(tokens), step):
            model.prefill(mx.array(tokens[start:stop]), cache)
        keys.append(np.array(cache.layers[1].view().keys))  # the full layer keeps every position
    assert (keys[0][:, :, :window] != keys[1][:, :, :window]).any(axis=(0, 1, 3)).all()
    np.testing.assert_array_equal(keys[0][:, :, window:], keys[1][:, :, window:])


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_experts_take_sliced_views(bits: int | None) -> None:
    """Weights cut out of a larger tensor, and rows cut out of a larger batch, give what contiguous copies give."""
    experts = random_model().model.decoder.layers[0].experts
    for name in ("gate_up_proj", "down_proj"):
        wide = mx.random.normal((7, *experts[name].weight.shape[1:])) * 0.2
        experts[name].weight = wide[2:6]
    if bits is not None:
        nn.quantize(experts, group_size=32, bits=bits)
    rows = mx.random.normal((20, 2, 64))[4:16:2, 1]
    indices, weights = mx.random.randint(0, 4, (6, 2)), mx.random.uniform(shape=(6, 2))
    viewed = experts(rows, indices, weights)
    experts.update({name: {key: mx.array(np.array(a)) for key, a in experts[name].items()} for name in experts})
    copied = experts(mx.array(np.array(rows)), indices, weights)
    np.testing.assert_array_equal(np.array(viewed), np.array(copied))
    assert np.abs(np.array(copied)).max() > 0.01


def test_end_token_at_position_0_gives_no_empty_answer(pipeline: Pipeline) -> None:
    options = {"max_tokens": 3 * C, "seed": 5}
    first = pipeline.generate("go", **options).token_ids[0]
    assert pipeline.generate("go", extra_eos_tokens=[first], **options).token_ids == ()
    guarded = pipeline.generate("go", extra_eos_tokens=[first], guard_empty=True, **options)
    assert len(guarded.token_ids) > 0
    assert first not in guarded.token_ids


@pytest.mark.parametrize(("threshold", "stops_at"), [(0, 1), (1, 3), (2, 4), (3, 5)])
def test_stability_is_not_off_by_one(threshold: int, stops_at: int) -> None:
    """Threshold n asks for n repeats of the argmax canvas: n + 1 equal ones in a row, and never at step 1 unless 0."""
    drafts = [mx.array([1, 2]), *[mx.array([3, 4])] * 6]
    history = sampler.empty_history(threshold, 2)
    stable = []
    for draft in drafts:
        stable.append(bool(sampler.is_stable(history, draft).item()))
        history = sampler.remember(history, draft)
    assert stable.index(True) + 1 == stops_at


def test_tool_markers_are_special_and_still_reach_the_parser(tokenizer: Tokenizer) -> None:
    special = tokenizer.special
    ids = tokenizer.encode('<|channel>thought\nhm<channel|>ok<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>')
    channel, call = (special.channel_open, special.channel_close), (special.tool_call_open, special.tool_call_close)
    markers = {*channel, *call, special.quote}
    assert markers <= set(ids)
    assert markers <= tokenizer.all_special_ids
    parser = OutputParser(tokenizer)
    deltas = [parser.feed(ids[i : i + 5]) for i in range(0, len(ids), 5)] + [parser.finish()]
    assert "".join(delta.reasoning for delta in deltas).strip() == "hm"
    assert "".join(delta.text for delta in deltas) == "ok"
    assert [(call.name, call.arguments) for delta in deltas for call in delta.tool_calls] == [("f", {"a": "x"})]


@pytest.mark.parametrize("max_tokens", [1, C - 1, C, C + 1, 3 * C - 1])
def test_max_tokens_is_not_rounded_to_the_canvas(pipeline: Pipeline, max_tokens: int) -> None:
    result = pipeline.generate("go", max_tokens=max_tokens, seed=1, max_denoising_steps=2)
    assert (len(result.token_ids), result.finish_reason) == (max_tokens, "length")
    longer = pipeline.generate("go", max_tokens=4 * C, seed=1, max_denoising_steps=2)
    assert result.token_ids == longer.token_ids[:max_tokens]


def test_steps_come_from_the_checkpoint_and_not_from_a_small_constant(pipeline: Pipeline) -> None:
    """A canvas that never settles runs every step; one that settles stops by itself."""
    unsettled = pipeline.generate("go", max_tokens=2 * C, seed=1, confidence_threshold=1e-9)
    assert unsettled.stats.denoising_steps == (GENERATION["max_denoising_steps"],) * 2
    easy = {"confidence_threshold": 1e9, "stability_threshold": 0}
    assert pipeline.generate("go", max_tokens=C, seed=1, **easy).stats.denoising_steps == (1,)


def test_random_tokens_say_nothing_about_speed(pipeline: Pipeline) -> None:
    """Noise never settles, and real text settles early: tokens per second are counted on a trained model only."""
    from mlx_diffusiongemma.pipeline import load

    noise = pipeline.generate("go", max_tokens=2 * C, seed=1).stats
    assert noise.denoising_steps == (GENERATION["max_denoising_steps"],) * 2
    trained = load("tiny").generate("Write 3 March 2024 as an ISO date.", seed=1).stats
    assert max(trained.denoising_steps) < 10 < load("tiny").generation_config.max_denoising_steps
    step_benchmark = Path(__file__).parents[1] / "benchmarks" / "step.py"  # on random weights: seconds per step only
    assert "tokens_per_second" not in step_benchmark.read_text()


def test_memory_is_the_same_after_40_requests_as_after_5(pipeline: Pipeline) -> None:
    held = []
    pipeline = Pipeline(pipeline._checkpoint, prefixes=Prefixes(30_000))  # full within the first five
    for request in range(40):
        pipeline.generate("go " * (1 + request * 7 % 40), max_tokens=C + 1, seed=request, max_denoising_steps=2)
        held.append((mx.get_active_memory(), mx.get_cache_memory()))
    (active_5, cache_5), (active_40, cache_40) = held[4], held[-1]
    assert active_40 <= active_5 + 50_000
    assert max(cache for _, cache in held[5:]) <= cache_5 + 2_000_000
    assert cache_40 <= cache_5 + 1_000_000


def test_pipeline_made_and_used_in_one_worker_thread() -> None:
    """MLX binds streams to threads, and weights are read from disk when first used."""
    results: list[object] = []

    def work() -> None:
        options = {"max_tokens": 3, "seed": 1, "max_denoising_steps": 2}
        results.append(mlx_diffusiongemma.load("tiny").generate("Hi", **options).token_ids)

    for _ in range(2):  # a second thread after the first has ended
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(results) == 2
    assert results[0] == results[1]


def reading_peak(embedding: nn.Embedding, batch: int, chunk_elements: int) -> int:
    """Return the bytes that the vocabulary pass of `batch` canvases, evaluated together, needs."""
    hidden = mx.random.normal((batch, 256, 64))
    mx.eval(hidden, embedding.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    rows = [
        read_canvas(h, embedding, 30.0, mx.array(0.8), mx.zeros(256), DrawShape(), chunk_elements=chunk_elements)
        for h in hidden
    ]
    mx.eval(rows)
    return mx.get_peak_memory() - before


def test_logits_of_a_batch_are_never_held_together() -> None:
    """The float32 logits of one canvas are 8 chunks here, those of 16 are 128; an eager step holds five such."""
    V, chunk_rows = 1 << 13, 32
    embedding = nn.Embedding(V, 64)
    chunk = 4 * chunk_rows * V
    one, many = (reading_peak(embedding, batch, chunk_rows * V) / chunk for batch in (1, 16))
    print(f"peak of the vocabulary pass: {one:.1f} chunks for one canvas, {many:.1f} for sixteen")
    assert one < 10  # measured 6.3
    assert many < 20  # measured 13.2
