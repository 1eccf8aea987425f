"""Prefix reuse through the whole pipeline: what is encoded again is counted, and answers are those of a cold run."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from small_model import VISION, bundled_checkpoint

from mlx_diffusiongemma.events import Finished, PrefillProgress
from mlx_diffusiongemma.model import DiffusionGemma, Tail
from mlx_diffusiongemma.pipeline import Pipeline, load
from mlx_diffusiongemma.prefill import encode
from mlx_diffusiongemma.prefixes import Prefixes
from mlx_diffusiongemma.prompt import build_prompt
from mlx_diffusiongemma.soft_tokens import SoftTokens
from mlx_diffusiongemma.tokenizer import Tokenizer

Chat = list[dict[str, Any]]
FEW: dict[str, Any] = {"max_denoising_steps": 3}  # what is encoded is looked at, not what is answered


@pytest.fixture(scope="module")
def shared_tiny() -> Pipeline:
    return load("tiny")


@pytest.fixture
def tiny(shared_tiny: Pipeline) -> Pipeline:
    """The bundled model with nothing remembered."""
    return shared_tiny.with_model(shared_tiny.model)


@pytest.fixture(scope="module")
def shared_random(tiny_folder: Path) -> Pipeline:
    """A random model with a tower behind the bundled tokenizer: canvas 8, window 8."""
    return Pipeline(bundled_checkpoint(Tokenizer.load(tiny_folder), VISION, max_position_embeddings=2048))


@pytest.fixture
def warm(shared_random: Pipeline) -> Pipeline:
    return shared_random.with_model(shared_random.model)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The tokens of every pass of the encoder, by itself or with a canvas."""
    calls: list[int] = []
    prefill, encode_and_denoise = DiffusionGemma.prefill, DiffusionGemma.encode_and_denoise

    def counted(self: DiffusionGemma, token_ids: mx.array, *rest: Any, **named: Any) -> mx.array:
        calls.append(len(token_ids))
        return prefill(self, token_ids, *rest, **named)

    def counted_tail(self: DiffusionGemma, tail: Tail, *rest: Any, **named: Any) -> mx.array:
        calls.append(len(tail.token_ids))
        return encode_and_denoise(self, tail, *rest, **named)

    monkeypatch.setattr(DiffusionGemma, "prefill", counted)
    monkeypatch.setattr(DiffusionGemma, "encode_and_denoise", counted_tail)
    yield calls


def cold(pipeline: Pipeline) -> Pipeline:
    return Pipeline(pipeline._checkpoint, prefixes=Prefixes(0))


def filler(tokens: int, pipeline: Pipeline, seed: int = 0) -> str:
    """Return a text of about that many tokens."""
    chance, words = random.Random(seed), "the fox went to a red house and saw many old trees by the water".split()
    text = " ".join(chance.choice(words) for _ in range(tokens))
    return pipeline.tokenizer.detokenize(pipeline.tokenizer.encode(text)[:tokens])


def assert_same_answer(one: Any, other: Any) -> None:
    assert (one.token_ids, one.text, one.reasoning) == (other.token_ids, other.text, other.reasoning)
    assert one.stats.denoising_steps == other.stats.denoising_steps
    assert one.stats.image_tokens == other.stats.image_tokens


# -- counted ------------------------------------------------------------------------------------------------------


def test_the_second_turn_of_a_long_chat_encodes_the_new_tokens_only(tiny: Pipeline, encoded: list[int]) -> None:
    C = tiny.config.canvas_length
    chat: Chat = [{"role": "user", "content": filler(1900, tiny) + " Tell me a story about a fox."}]
    first = tiny.generate(chat, seed=3, max_tokens=3 * C, **FEW)
    assert first.stats.prompt_tokens > 1900 and first.stats.cached_tokens == 0
    assert sum(encoded) == first.stats.prompt_tokens + C * (first.stats.canvases - 1)
    chat += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "What is 17 + 25?"}]
    encoded.clear()
    events = list(tiny.stream(chat, seed=4, max_tokens=C, **FEW))
    assert isinstance(events[-1], Finished)
    second = events[-1].result
    assert second.stats.cached_tokens >= first.stats.prompt_tokens
    assert sum(encoded) == second.stats.prompt_tokens - second.stats.cached_tokens
    assert second.stats.prompt_tokens - first.stats.prompt_tokens < 4 * C  # the answer and the second question
    assert events[0] == PrefillProgress(second.stats.cached_tokens, second.stats.prompt_tokens)
    assert_same_answer(second, cold(tiny).generate(chat, seed=4, max_tokens=C, **FEW))


def test_encoded_canvases_are_reused_too(tiny: Pipeline, encoded: list[int]) -> None:
    """With the answer's own tokens as the history, all but the last canvas is known."""
    C = tiny.config.canvas_length
    prompt = "<bos><|turn>user\nTell me a story about a fox.<turn|>\n<|turn>model\n"
    first = next(
        result
        for seed in range(20)
        if (result := tiny.generate(prompt, raw_prompt=True, seed=seed, max_tokens=4 * C)).stats.canvases >= 2
    )
    longer = prompt + first.text + "<turn|>\n<|turn>user\nMore.<turn|>\n<|turn>model\n"
    encoded.clear()
    second = tiny.generate(longer, raw_prompt=True, seed=1, max_tokens=1)
    assert second.stats.cached_tokens == first.stats.prompt_tokens + C * (first.stats.canvases - 1)
    assert sum(encoded) == second.stats.prompt_tokens - second.stats.cached_tokens


def test_a_branch_of_a_shared_system_prompt_encodes_its_own_tokens_only(tiny: Pipeline, encoded: list[int]) -> None:
    system = {"role": "system", "content": filler(500, tiny)}
    for number, question in enumerate(["What is 17 + 25?", "Tell me a story about a fox.", "Count to 5."]):
        chat: Chat = [system, {"role": "user", "content": question}]
        prompt = build_prompt(tiny.tokenizer, chat)
        assert prompt.system_tokens > 500
        encoded.clear()
        result = tiny.generate(chat, seed=number, max_tokens=20, **FEW)
        assert result.stats.cached_tokens == (prompt.system_tokens if number else 0)
        assert sum(encoded) == len(prompt.token_ids) - result.stats.cached_tokens
        assert_same_answer(result, cold(tiny).generate(chat, seed=number, max_tokens=20, **FEW))


def test_prompts_of_a_batch_share_their_system_turn(tiny: Pipeline) -> None:
    system = {"role": "system", "content": filler(200, tiny)}
    prompts: list[Any] = [[system, {"role": "user", "content": text}] for text in ("Count to 5.", "Count to 6.")]
    one, two = tiny.generate_batch(prompts, seed=[1, 2], max_tokens=20, **FEW)
    assert (one.stats.cached_tokens, two.stats.cached_tokens > 200) == (0, True)
    assert_same_answer(two, cold(tiny).generate(prompts[1], seed=2, max_tokens=20, **FEW))


def test_the_same_prompt_again_encodes_nothing(tiny: Pipeline, encoded: list[int]) -> None:
    first = tiny.generate("Count to 5.", seed=1, max_tokens=20)
    encoded.clear()
    events = list(tiny.stream("Count to 5.", seed=1, max_tokens=20))
    assert isinstance(events[-1], Finished)
    second = events[-1].result
    total = first.stats.prompt_tokens
    assert encoded == [] and second.stats.cached_tokens == total
    assert [event for event in events if isinstance(event, PrefillProgress)] == [PrefillProgress(total, total)]
    assert second.stats.prompt_tokens_per_second == 0  # none was encoded
    assert_same_answer(first, second)


def test_thoughts_that_the_template_strips_cost_no_more_than_themselves(tiny: Pipeline) -> None:
    """The history of a thinking turn diverges where its answer began: a segment ends there."""
    chat: Chat = [{"role": "user", "content": "What is 34 + 51?"}]
    first = tiny.generate(chat, seed=2, max_tokens=200, enable_thinking=True)
    assert first.reasoning
    chat += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "What is 17 + 25?"}]
    second = tiny.generate(chat, seed=3, max_tokens=200, enable_thinking=True)
    assert second.stats.cached_tokens == first.stats.prompt_tokens
    assert_same_answer(second, cold(tiny).generate(chat, seed=3, max_tokens=200, enable_thinking=True))


# -- as cold ------------------------------------------------------------------------------------------------------


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("seed", range(12))
def test_conversations_are_answered_as_cold_ones(warm: Pipeline, seed: int) -> None:
    """Turns, branches, thoughts, pictures, several canvases; far longer than the window."""
    chance = random.Random(seed)
    options: dict[str, Any] = {"max_tokens": chance.choice([8, 20, 40]), "image_tokens": 70}
    options["enable_thinking"] = bool(seed % 2)
    options["prefill_step_size"] = chance.choice([16, 2048])
    chat: Chat = [{"role": "system", "content": filler(chance.randrange(3, 40), warm, seed)}]
    reused = 0
    for turn in range(4):
        question = {"type": "text", "text": filler(chance.randrange(2, 20), warm, 10 * seed + turn)}
        shown = [{"type": "image", "image": picture(turn)}] if chance.random() < 0.4 else []
        chat.append({"role": "user", "content": [*shown, question]})
        got = warm.generate(chat, seed=turn, **options)
        assert_same_answer(got, cold(warm).generate(chat, seed=turn, **options))
        reused += got.stats.cached_tokens
        chat.append({"role": "assistant", "content": got.text or "Yes."})
        if chance.random() < 0.3:
            del chat[-2:]  # ask something else instead
    assert reused > 0


def test_another_picture_is_not_the_same_prompt(warm: Pipeline) -> None:
    options: dict[str, Any] = {"seed": 1, "max_tokens": 8, "image_tokens": 70}
    warm.generate("What?", images=[picture(1)], **options)
    other = warm.generate("What?", images=[picture(2)], **options)
    assert other.stats.cached_tokens == 0
    assert_same_answer(other, cold(warm).generate("What?", images=[picture(2)], **options))
    again = warm.generate("What?", images=[picture(1)], **options)
    assert again.stats.cached_tokens == again.stats.prompt_tokens


def test_a_picture_that_is_known_is_not_looked_at(warm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"seed": 1, "max_tokens": 8, "image_tokens": 70}
    chat: Chat = [{"role": "user", "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": "?"}]}]
    warm.generate(chat, **options)
    monkeypatch.setattr(SoftTokens, "__call__", lambda self, image: pytest.fail("the tower was asked"))
    chat += [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    assert warm.generate(chat, **options).stats.image_tokens == 60


def test_a_restored_cache_is_close_to_a_cold_one(shared_tiny: Pipeline) -> None:
    """Pieces of other sizes round differently; in float32 that is all there is."""
    model, ids = shared_tiny.model, tuple(shared_tiny.tokenizer.encode(filler(700, shared_tiny)))[:600]
    prefixes, cache = Prefixes(), model.make_cache()
    for start, stop in ((0, 150), (150, 214), (214, 278), (278, 500)):
        list(encode(model, cache, ids[start:stop], 2048))
        prefixes.save(ids[:stop], cache)
    for known in (150, 278, 500):
        warm, whole = model.make_cache(), model.make_cache()
        assert prefixes.restore((*ids[:known], 0), warm) == known
        list(encode(model, warm, ids[known:], 2048))
        list(encode(model, whole, ids, 2048))
        worst = 0.0
        for one, other in zip(warm.arrays(), whole.arrays(), strict=True):
            worst = max(worst, float((mx.abs(one - other).max() / mx.abs(other).max()).item()))
        print(f"restored at {known}: {worst:.1e}")
        assert worst < 1e-5


def test_cancelled_prefill_leaves_nothing_wrong(warm: Pipeline) -> None:
    prompt = filler(200, warm)
    options: dict[str, Any] = {"seed": 1, "max_tokens": 16, "prefill_step_size": 16}
    seen: list[object] = []
    for event in warm.stream(prompt, cancelled=lambda: len(seen) > 4, **options):
        seen.append(event)
    assert seen[-1].result.finish_reason == "cancelled"  # type: ignore[attr-defined]
    assert_same_answer(warm.generate(prompt, **options), cold(warm).generate(prompt, **options))


# -- whose memory it is -------------------------------------------------------------------------------------------


def test_other_weights_have_their_own_memory(warm: Pipeline) -> None:
    warm.generate("go", max_tokens=8)
    other = warm.with_model(warm.model)
    assert other.prefixes.counts.segments == 0 and other.prefixes.max_bytes == warm.prefixes.max_bytes
    assert warm.watched(lambda *_: None).prefixes is warm.prefixes


def test_nothing_is_remembered_with_a_bound_of_zero(warm: Pipeline) -> None:
    off = cold(warm)
    for _ in range(2):
        assert off.generate("go", max_tokens=20, seed=1).stats.cached_tokens == 0
    assert off.prefixes.nbytes == 0


def test_a_system_turn_no_longer_than_a_canvas_is_not_saved_by_itself(warm: Pipeline) -> None:
    C = warm.config.canvas_length
    for length in (1, 2, 30):
        chat: Chat = [{"role": "system", "content": "a" * length}, {"role": "user", "content": "x"}]
        system = build_prompt(warm.tokenizer, chat).system_tokens
        pipeline = warm.with_model(warm.model)
        pipeline.generate(chat, max_tokens=C)
        assert pipeline.prefixes.counts.segments == 1 + (system > C)


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        ([{"role": "user", "content": "Hi"}], ""),
        ([{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}], "<bos><|turn>system\nS<turn|>\n"),
        ([{"role": "user", "content": "Hi"}, {"role": "system", "content": "S"}], ""),
    ],
)
def test_the_system_turn_is_found(shared_tiny: Pipeline, chat: Chat, expected: str) -> None:
    prompt = build_prompt(shared_tiny.tokenizer, chat)
    assert prompt.text.startswith(expected)
    assert prompt.token_ids[: prompt.system_tokens] == tuple(shared_tiny.tokenizer.encode(expected))


def test_a_later_run_of_the_program_finds_the_prompt_on_disk(run_program: Any, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    arguments = ["-m", "mlx_diffusiongemma.generate", "--model", "tiny", "-p", "Count to 5.", "--seed", "1", "--json"]
    runs = [run_program(*arguments, "--prompt-cache-dir", str(folder)) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    first, second = (json.loads(run.stdout) for run in runs)
    assert (first["stats"]["cached_tokens"], second["stats"]["cached_tokens"]) == (0, first["stats"]["prompt_tokens"])
    assert first["token_ids"] == second["token_ids"] and any(folder.iterdir())
