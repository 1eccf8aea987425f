"""The loop: ends, counts, events, batches, seeds. Most tests script the canvases that the model would commit."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from small_model import GENERATION, config_dict, random_model

import mlx_diffusiongemma
from mlx_diffusiongemma.checkpoint import Checkpoint
from mlx_diffusiongemma.config import GenerationConfig, ModelConfig
from mlx_diffusiongemma.denoise import StepResult
from mlx_diffusiongemma.events import CanvasCommitted, DenoisingStep, Finished, PrefillProgress
from mlx_diffusiongemma.model import DiffusionGemma
from mlx_diffusiongemma.pipeline import Pipeline, load
from mlx_diffusiongemma.prefixes import Prefixes
from mlx_diffusiongemma.tokenizer import Tokenizer

TINY = Path(mlx_diffusiongemma.__file__).parent / "tiny"
C = 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TINY)


@pytest.fixture(scope="module")
def shared(tokenizer: Tokenizer) -> Pipeline:
    """A random model behind the bundled tokenizer: canvas 8, context 256, 6 steps, end token <eos>."""
    text = {"vocab_size": tokenizer.vocab_size}
    config = ModelConfig.from_dict(config_dict(**text))
    return Pipeline(Checkpoint(TINY, random_model(**text), tokenizer, config, GenerationConfig.from_dict(GENERATION)))


@pytest.fixture
def pipeline(shared: Pipeline) -> Pipeline:
    """The shared model with nothing remembered."""
    return shared.with_model(shared.model)


class Script:
    """Stands in for the denoiser: commits given canvases, one step each; records what it was asked."""

    def __init__(self, model: DiffusionGemma, canvases: Iterable[list[int]]) -> None:
        self.model = model
        self.canvases = iter(canvases)
        self.rules: list = []

    def __call__(self, rows, rules):
        self.rules.append(rules)
        row = rows[0]
        if row.tail is not None:
            self.model.prefill(row.tail.token_ids, row.tail.cache)
        canvas = mx.array(next(self.canvases), dtype=mx.int32)
        return [
            StepResult(
                row.state,
                canvas,
                accepted=mx.ones((C,), mx.bool_),
                mean_entropy=mx.array(0.0),
                finished=mx.array(True),
                entropy=mx.zeros((C,)),
                hidden=mx.zeros((C, 1)),
                confidence=mx.ones((C,)),
                wide=mx.zeros((C,), mx.bool_),
            )
        ]


@pytest.fixture
def scripted(pipeline: Pipeline, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes the pipeline commit the given text, cut into canvases and padded with <eos>."""

    def script(text: str) -> tuple[Pipeline, list[int]]:
        ids = tokenizer.encode(text)
        padded = ids + [1] * (-len(ids) % C)
        canvases = (padded[i : i + C] for i in range(0, len(padded), C))
        monkeypatch.setattr(pipeline, "_denoiser", Script(pipeline.model, canvases))
        return pipeline, ids

    return script


LETTERS = "a b c d e f g h i j k l m n o p q r s t u v w x y z"


def test_text_of_several_canvases(scripted) -> None:
    pipeline, ids = scripted(LETTERS + "<eos>")
    result = pipeline.generate("go", max_tokens=200)
    assert result.text == LETTERS
    assert list(result.token_ids) == ids[:-1]
    assert result.finish_reason == "stop"
    assert result.stats.canvases == -(-len(ids) // C) > 2
    assert result.stats.generated_tokens == len(ids) - 1


@pytest.mark.parametrize("max_tokens", [1, C - 1, C, C + 1, 2 * C])
def test_max_tokens_is_exact(scripted, max_tokens: int) -> None:
    pipeline, ids = scripted(LETTERS)
    result = pipeline.generate("go", max_tokens=max_tokens)
    assert list(result.token_ids) == ids[:max_tokens]
    assert result.finish_reason == "length"
    assert result.stats.canvases == -(-max_tokens // C)


def test_max_tokens_zero_runs_nothing(pipeline: Pipeline) -> None:
    events = list(pipeline.stream("go", max_tokens=0))
    assert [type(event) for event in events] == [Finished]
    result = events[0].result
    assert (result.text, result.token_ids, result.finish_reason, result.stats.canvases) == ("", (), "length", 0)


def test_default_max_tokens_is_the_checkpoints(scripted) -> None:
    pipeline, ids = scripted(LETTERS)
    assert list(pipeline.generate("go").token_ids) == ids[:16]


@pytest.mark.parametrize("position", [0, 3, C - 1, C, C + 2])
def test_the_first_end_token_ends(scripted, position: int) -> None:
    pipeline, ids = scripted(LETTERS)
    canvases = [*ids[:position], 1, *ids[position:]][: 2 * C]
    pipeline._denoiser.canvases = iter([canvases[:C], canvases[C:]])
    result = pipeline.generate("go", max_tokens=100)
    assert list(result.token_ids) == ids[:position]
    assert result.finish_reason == "stop"


def test_end_token_right_behind_the_cap_is_length(scripted) -> None:
    pipeline, ids = scripted(LETTERS)
    pipeline._denoiser.canvases = iter([[*ids[:4], 1, 1, 1, 1]])
    assert pipeline.generate("go", max_tokens=4).finish_reason == "length"


def test_extra_end_tokens(scripted) -> None:
    pipeline, ids = scripted(LETTERS)
    result = pipeline.generate("go", max_tokens=50, extra_eos_tokens=[ids[2]])
    assert list(result.token_ids) == ids[: ids.index(ids[2])]
    spelled = pipeline.generate("go", max_tokens=0, extra_eos_tokens="<mask>")  # one token by its spelling is accepted
    assert spelled.finish_reason == "length"
    with pytest.raises(ValueError, match="extra_eos_tokens: got 'two words', expected one token"):
        pipeline.generate("go", extra_eos_tokens="two words")


@pytest.mark.parametrize("stop", ["d e", "h i j", "a b", "q"])
def test_stop_string_across_canvases(scripted, tokenizer: Tokenizer, stop: str) -> None:
    pipeline, ids = scripted(LETTERS + "<eos>")
    result = pipeline.generate("go", max_tokens=100, stop=stop)
    assert result.text == LETTERS[: LETTERS.index(stop)]
    assert result.finish_reason == "stop"
    kept = tokenizer.detokenize(result.token_ids)
    assert kept == tokenizer.detokenize(ids[: len(result.token_ids)])
    assert kept.startswith(result.text) and len(kept) < len(result.text) + len(stop)


def test_stop_string_is_never_shown_in_part(scripted) -> None:
    pipeline, _ = scripted(LETTERS + "<eos>")
    shown = ""
    for event in pipeline.stream("go", max_tokens=100, stop=["k l m n o p"]):
        if isinstance(event, CanvasCommitted):
            shown += event.delta.text
            assert LETTERS[: LETTERS.index("k l")].startswith(shown)
    assert shown == LETTERS[: LETTERS.index("k l")]


def test_thought_and_tool_call(scripted) -> None:
    text = "<|channel>thought\nhmm\n<channel|><|tool_call>call:f{x:1}<tool_call|><|tool_response>"
    pipeline, _ = scripted(text)
    result = pipeline.generate("go", max_tokens=100, extra_eos_tokens=["<|tool_response>"])
    assert result.reasoning == "hmm"
    assert [(call.name, call.arguments) for call in result.tool_calls] == [("f", {"x": 1})]
    assert (result.text, result.finish_reason) == ("", "tool_calls")


def test_events_in_order(pipeline: Pipeline) -> None:
    events = list(pipeline.stream("go", max_tokens=C + 1, seed=3, prefill_step_size=4))
    kinds = [type(event) for event in events]
    prefill = [event for event in events if isinstance(event, PrefillProgress)]
    assert [event.processed for event in prefill] == [*range(0, prefill[-1].total, 4), prefill[-1].total]
    assert kinds[: len(prefill)] == [PrefillProgress] * len(prefill)
    steps = [event for event in events if isinstance(event, DenoisingStep)]
    commits = [event for event in events if isinstance(event, CanvasCommitted)]
    assert [s.step for s in steps if s.canvas_index == 0] == list(range(1, commits[0].steps + 1))
    assert all(s.max_steps == 6 and len(s.token_ids) == len(s.accepted) == C for s in steps)
    assert kinds[-1] is Finished
    result = events[-1].result
    assert result.stats.denoising_steps == tuple(commit.steps for commit in commits)
    assert result.token_ids == sum((commit.token_ids for commit in commits), ())
    assert result.text == "".join(commit.delta.text for commit in commits)
    last = [s for s in steps if s.canvas_index == 0][-1]
    assert commits[0].token_ids == last.token_ids[: len(commits[0].token_ids)]


def test_same_seed_same_tokens(pipeline: Pipeline) -> None:
    first = pipeline.generate("go", max_tokens=20, seed=5)
    assert pipeline.generate("go", max_tokens=20, seed=5).token_ids == first.token_ids
    assert pipeline.generate("go", max_tokens=20, seed=6).token_ids != first.token_ids
    assert first.seed == 5


def test_a_drawn_seed_reproduces(pipeline: Pipeline) -> None:
    first = pipeline.generate("go", max_tokens=10)
    assert pipeline.generate("go", max_tokens=10, seed=first.seed).token_ids == first.token_ids


def test_chunked_prefill_gives_the_same_tokens(pipeline: Pipeline) -> None:
    whole = pipeline.generate("The quick brown fox", max_tokens=20, seed=1)
    cold = pipeline.with_model(pipeline.model)
    pieces = cold.generate("The quick brown fox", max_tokens=20, seed=1, prefill_step_size=3)
    assert pieces.token_ids == whole.token_ids and pieces.stats.cached_tokens == 0


def test_batch_equals_alone(pipeline: Pipeline) -> None:
    prompts = ["go", "The quick brown fox jumps over the lazy dog", "a"]
    seeds = [1, 2, 3]
    batch = pipeline.generate_batch(prompts, max_tokens=20, seed=seeds)
    for prompt, seed, result in zip(prompts, seeds, batch, strict=True):
        alone = pipeline.with_model(pipeline.model).generate(prompt, max_tokens=20, seed=seed)
        assert result.token_ids == alone.token_ids
        assert result.stats.denoising_steps == alone.stats.denoising_steps
        assert (result.text, result.finish_reason) == (alone.text, alone.finish_reason)


def test_batch_arguments(pipeline: Pipeline) -> None:
    assert pipeline.generate_batch([]) == []
    with pytest.raises(ValueError, match="prompts: got str, expected a list of prompts"):
        pipeline.generate_batch("go")
    with pytest.raises(ValueError, match="got 1 entries, expected one for each of 2"):
        pipeline.generate_batch(["a", "b"], seed=[1])


def test_temperature_zero_proposes_the_argmax_and_still_needs_a_seed(pipeline: Pipeline) -> None:
    first = pipeline.generate("go", max_tokens=C, seed=1, temperature=0)
    assert pipeline.generate("go", max_tokens=C, seed=1, temperature=0).token_ids == first.token_ids
    assert pipeline.generate("go", max_tokens=C, seed=2, temperature=0).token_ids != first.token_ids


def test_guard_empty_bans_ends_at_the_first_position_of_the_first_canvas(scripted) -> None:
    pipeline, _ = scripted(LETTERS)
    pipeline.generate("go", max_tokens=2 * C, guard_empty=True)
    first, second = pipeline._denoiser.rules
    assert first[0].banned == (1,)
    assert second[0].banned == ()


def test_cancelling_between_steps_keeps_what_was_committed(pipeline: Pipeline) -> None:
    seen: list[object] = []
    for event in pipeline.stream("go", max_tokens=100, seed=1, cancelled=lambda: len(seen) > 12):
        seen.append(event)
    assert isinstance(seen[-1], Finished)
    result = seen[-1].result
    assert result.finish_reason == "cancelled"
    assert result.token_ids == sum((e.token_ids for e in seen if isinstance(e, CanvasCommitted)), ())
    assert len(seen) <= 12 + 3  # the step in flight, its commit, the end


def test_cancelling_during_prefill(pipeline: Pipeline) -> None:
    events = list(pipeline.stream("go there", prefill_step_size=2, cancelled=lambda: True))
    assert [type(event) for event in events] == [PrefillProgress, Finished]
    assert events[-1].result.finish_reason == "cancelled"


def test_generation_ends_at_the_context(scripted, tokenizer: Tokenizer) -> None:
    pipeline, _ = scripted(LETTERS * 20)
    prompt = "a" * 200
    result = pipeline.generate(prompt, max_tokens=1000, raw_prompt=True)
    assert result.finish_reason == "length"
    used = result.stats.prompt_tokens + result.stats.generated_tokens
    assert 256 - C < used <= 256


def test_prompt_longer_than_the_context(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens; expected at most 248, the context of 256 less"):
        pipeline.generate("b z " * 300)


@pytest.mark.parametrize("prompt", ["", "  \n", []])
def test_empty_prompt(pipeline: Pipeline, prompt: object) -> None:
    with pytest.raises(ValueError, match="empty"):
        pipeline.generate(prompt)


def test_bad_arguments_fail_before_anything_runs(pipeline: Pipeline) -> None:
    with pytest.raises(TypeError, match="unknown argument 'tempersture'"):
        pipeline.stream("go", tempersture=1)
    with pytest.raises(ValueError, match="max_tokens: got -1"):
        pipeline.stream("go", max_tokens=-1)


def test_load_in_one_thread_and_generate_in_another() -> None:
    """MLX binds lazy arrays to the thread that made them, so loading evaluates everything."""
    loaded, results = load("tiny"), []
    thread = threading.Thread(target=lambda: results.append(loaded.generate("Hello", max_tokens=4, seed=1).token_ids))
    thread.start()
    thread.join()
    assert results == [loaded.generate("Hello", max_tokens=4, seed=1).token_ids]


def test_not_a_number_is_an_error_not_an_empty_answer(pipeline: Pipeline) -> None:
    broken = random_model(vocab_size=pipeline.config.text.vocab_size)
    broken.model.decoder.norm.weight = mx.full((64,), float("nan"))
    checkpoint = dataclasses.replace(pipeline._checkpoint, model=broken)
    with pytest.raises(FloatingPointError, match="the model computed nan in step 1"):
        Pipeline(checkpoint).generate("go")


def test_memory_is_flat_across_requests(pipeline: Pipeline) -> None:
    held = []
    pipeline = Pipeline(pipeline._checkpoint, prefixes=Prefixes(20_000))  # full after a few prompts
    for seed in range(12):
        pipeline.generate("The quick brown fox", max_tokens=20, seed=seed)
        held.append(mx.get_active_memory() + mx.get_cache_memory())
    assert held[-1] <= held[3] * 1.05


def test_stats_add_up(pipeline: Pipeline) -> None:
    stats = pipeline.generate("go", max_tokens=20, seed=2).stats
    assert stats.tokens_per_forward == pytest.approx(stats.generated_tokens / sum(stats.denoising_steps))
    assert stats.total_seconds >= stats.prefill_seconds + stats.denoising_seconds > 0
    assert stats.tokens_per_second == pytest.approx(stats.generated_tokens / stats.denoising_seconds)
    assert stats.cached_tokens == 0
    assert np.isfinite(stats.peak_memory_gb)


def test_the_callers_time_is_not_the_models(pipeline: Pipeline) -> None:
    pauses = 0
    for event in pipeline.stream("go", max_tokens=C, seed=2):
        if isinstance(event, Finished):
            stats = event.result.stats
        else:
            time.sleep(0.1)
            pauses += 1
    assert stats.total_seconds - stats.prefill_seconds - stats.denoising_seconds >= 0.1 * pauses
