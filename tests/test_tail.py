"""The end of a prefix that is encoded with the first step of the canvas behind it, against two passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from small_model import random_model

from mlx_diffusiongemma import load, sampler
from mlx_diffusiongemma.cache import KVQuantization, PrefixCache
from mlx_diffusiongemma.denoise import StepInput, StepRules, denoising_step, first_state
from mlx_diffusiongemma.events import DenoisingStep, PrefillProgress
from mlx_diffusiongemma.model import DiffusionGemma, Tail
from mlx_diffusiongemma.pipeline import Pipeline
from mlx_diffusiongemma.request import Request
from mlx_diffusiongemma.vocabulary import DrawShape

C = 8
STORY = "Tell me a story about a fox."
ROUNDING = 1e-5  # float32 hidden states up to 4; most cases are equal bits


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return load("tiny", dtype="float32")


def cached(model: DiffusionGemma, tokens: int, kv: KVQuantization | None = None) -> PrefixCache:
    cache = model.make_cache(kv)
    if tokens:
        mx.eval(model.prefill(mx.arange(tokens) % 96, cache), cache.arrays())
    return cache


@pytest.mark.parametrize("kv", [None, KVQuantization(8, 32)])
@pytest.mark.parametrize("before", [0, 3, 20])  # the small model's window is 8
@pytest.mark.parametrize("tokens", [1, 5, 8])
def test_one_pass_is_two_passes(tokens: int, before: int, kv: KVQuantization | None) -> None:
    model = random_model()
    token_ids, canvas = mx.arange(30, 30 + tokens), mx.arange(60, 60 + C)
    signal = mx.random.normal((C, 64))
    together, apart = (cached(model, before, kv) for _ in range(2))
    hidden = model.encode_and_denoise(Tail(token_ids, together), canvas, signal)
    model.prefill(token_ids, apart)
    [expected] = model.denoise([canvas], [signal], [apart.views()], [mx.array(apart.offset)])
    np.testing.assert_allclose(np.array(hidden), np.array(expected), atol=ROUNDING)
    assert together.offset == apart.offset == before + tokens
    for one, other in zip(together.arrays(), apart.arrays(), strict=True):
        if one.dtype == mx.uint32:  # packed: a rounding difference may move a code by one
            continue
        np.testing.assert_allclose(np.array(one), np.array(other), atol=ROUNDING)


def test_every_role_has_its_own_scalar() -> None:
    """With the encoder's scalars changed both ways change alike, and are not what they were."""
    model = random_model()
    canvas, signal, token_ids = mx.arange(C), mx.zeros((C, 64)), mx.arange(5)
    before = model.encode_and_denoise(Tail(token_ids, model.make_cache()), canvas, signal)
    mx.eval(before)
    for layer in model.model.encoder.language_model.layers:
        layer.layer_scalar = layer.layer_scalar * 0.5
    after = model.encode_and_denoise(Tail(token_ids, model.make_cache()), canvas, signal)
    cache = cached(model, 5)
    [expected] = model.denoise([canvas], [signal], [cache.views()], [mx.array(5)])
    assert np.abs(np.array(after) - np.array(before)).max() > 1e-3
    np.testing.assert_allclose(np.array(after), np.array(expected), atol=ROUNDING)


def test_a_step_of_several_rows_takes_no_tail() -> None:
    model = random_model()
    noise = sampler.noise(1, 0, 1, C, 96)
    state = first_state(model, noise.token_ids, 1)
    row = StepInput(state, noise, mx.array(0.8), [], mx.array(3), tail=Tail(mx.arange(3), model.make_cache()))
    with pytest.raises(ValueError, match="tail: got 2 in a step of 2 rows, expected one in a step of one row"):
        denoising_step(model, [row, row], [StepRules(4.0, 0.005, DrawShape())] * 2)


# -- in the loop ------------------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """Every pass over the layers, and how many tokens of the prefix it encoded."""
    seen: list[tuple[str, int]] = []

    def counted(name: str, tokens_of: Any) -> None:
        plain = getattr(DiffusionGemma, name)

        def call(self: DiffusionGemma, first: Any, *rest: Any, **named: Any) -> Any:
            seen.append((name, tokens_of(first)))
            return plain(self, first, *rest, **named)

        monkeypatch.setattr(DiffusionGemma, name, call)

    counted("prefill", len)
    counted("encode_and_denoise", lambda tail: len(tail.token_ids))
    counted("denoise", lambda _: 0)
    yield seen


def test_every_canvas_begins_with_the_tokens_before_it(tiny: Pipeline, passes: list[tuple[str, int]]) -> None:
    result = tiny.with_model(tiny.model).generate(STORY, seed=1)
    steps = result.stats.denoising_steps
    assert len(steps) > 1
    expected = [("encode_and_denoise", result.stats.prompt_tokens), *[("denoise", 0)] * (steps[0] - 1)]
    for count in steps[1:]:
        expected += [("encode_and_denoise", 64), *[("denoise", 0)] * (count - 1)]
    assert passes == expected


def test_only_the_last_chunk_of_a_long_prompt_waits_for_the_step(
    tiny: Pipeline, passes: list[tuple[str, int]]
) -> None:
    prompt = "the fox " * 100
    given = {"max_tokens": 1, "raw_prompt": True, "prefill_step_size": 64}
    total = tiny.generate(prompt, **given).stats.prompt_tokens
    assert total % 64
    chunks = [("prefill", 64)] * (total // 64)
    passes.clear()
    cold = tiny.with_model(tiny.model)
    events = [e for e in cold.stream(prompt, **given) if isinstance(e, PrefillProgress)]
    assert passes[: len(chunks) + 1] == [*chunks, ("encode_and_denoise", total % 64)]
    assert [e.processed for e in events] == [*range(0, total, 64), total]
    passes.clear()
    cold = tiny.with_model(tiny.model)
    cold.generate(prompt, **(given | {"prefill_step_size": 2048}))
    assert passes[:2] == [("prefill", total), ("denoise", 0)]  # longer than a canvas: a pass of its own


def test_answers_are_those_of_two_passes(tiny: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [STORY, "What is 17 + 25?", "Count to 40.", "Spell the word house."]
    together = [tiny.with_model(tiny.model).generate(prompt, seed=5) for prompt in prompts]
    monkeypatch.setattr(Request, "_may_share_a_pass", lambda *_: False)
    for prompt, one in zip(prompts, together, strict=True):
        other = tiny.with_model(tiny.model).generate(prompt, seed=5)
        assert one.token_ids == other.token_ids
        assert one.stats.denoising_steps == other.stats.denoising_steps


def test_a_batch_encodes_every_tail_by_itself(tiny: Pipeline, passes: list[tuple[str, int]]) -> None:
    alone = [tiny.with_model(tiny.model).generate(prompt, seed=5) for prompt in (STORY, "Count to 40.")]
    passes.clear()
    together = tiny.with_model(tiny.model).generate_batch([STORY, "Count to 40."], seed=[5, 5])
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]
    lengths = [result.stats.prompt_tokens for result in together]
    assert passes[:3] == [("prefill", lengths[0]), ("prefill", lengths[1]), ("denoise", 0)]


def test_the_time_of_a_pass_is_shared_by_its_rows(tiny: Pipeline) -> None:
    stats = tiny.with_model(tiny.model).generate(STORY, seed=1).stats
    assert 0 < stats.prefill_seconds < stats.canvas_seconds[0]
    assert sum(stats.canvas_seconds) < stats.denoising_seconds  # which has the encoding of canvases too


def test_a_request_that_is_cancelled_in_its_first_canvas_is_remembered(tiny: Pipeline) -> None:
    pipeline = tiny.with_model(tiny.model)
    steps: list[int] = []

    def cancelled() -> bool:
        steps.append(1)
        return len(steps) > 2  # asked before and after the prompt, then after the first step

    first = pipeline.generate(STORY, seed=1, cancelled=cancelled)
    assert first.finish_reason == "cancelled" and first.stats.denoising_steps == (1,)
    second = pipeline.generate(STORY, seed=1)
    assert second.stats.cached_tokens == second.stats.prompt_tokens


def test_a_caller_that_leaves_after_the_first_draft_leaves_the_prompt_behind(tiny: Pipeline) -> None:
    pipeline = tiny.with_model(tiny.model)
    events = pipeline.stream(STORY, seed=1)
    next(event for event in events if isinstance(event, DenoisingStep))
    events.close()
    again = pipeline.generate(STORY, seed=1)
    assert again.stats.cached_tokens == again.stats.prompt_tokens


def test_a_prompt_that_was_not_encoded_has_no_speed(tiny: Pipeline) -> None:
    asked: list[int] = []
    pipeline = tiny.with_model(tiny.model)
    result = pipeline.generate(STORY, seed=1, cancelled=lambda: asked.append(1) or len(asked) > 1)
    assert result.stats.denoising_steps == () and result.stats.prompt_tokens_per_second == 0
