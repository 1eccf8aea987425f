"""Pictures through the whole pipeline: soft tokens computed once, batches, chunks, counts, memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from small_model import BUNDLED, VISION, bundled_checkpoint, save_checkpoint

from mlx_diffusiongemma.config import ConfigError, load_configs
from mlx_diffusiongemma.events import PrefillProgress
from mlx_diffusiongemma.images import cut_image
from mlx_diffusiongemma.media import DEFAULT_SOFT_TOKENS, ImageBlock
from mlx_diffusiongemma.model import DiffusionGemma
from mlx_diffusiongemma.pipeline import Pipeline
from mlx_diffusiongemma.prefill import encode
from mlx_diffusiongemma.prepare import request_sizes
from mlx_diffusiongemma.soft_tokens import SoftTokens
from mlx_diffusiongemma.tokenizer import Tokenizer

SEES = {"max_tokens": 16, "seed": 7, "image_tokens": 70}


def make_pipeline(vision: dict[str, Any] | None = VISION, **text: Any) -> Pipeline:
    """A random model, with a tower, behind the bundled tokenizer."""
    return Pipeline(bundled_checkpoint(Tokenizer.load(BUNDLED), vision, **{"max_position_embeddings": 4096, **text}))


@pytest.fixture(scope="module")
def shared() -> Pipeline:
    return make_pipeline()


@pytest.fixture
def pipeline(shared: Pipeline) -> Pipeline:
    """The shared model with nothing remembered."""
    return shared.with_model(shared.model)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The patches of every call of the tower."""
    calls: list[int] = []
    original = DiffusionGemma.embed_images

    def counted(self: DiffusionGemma, patches: mx.array, position_ids: mx.array) -> mx.array:
        calls.append(patches.shape[0] * patches.shape[1])
        return original(self, patches, position_ids)

    monkeypatch.setattr(DiffusionGemma, "embed_images", counted)
    yield calls


def picture(seed: int = 0, size: tuple[int, int] = (30, 20)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def film(*seeds: int) -> list[tuple[Image.Image, float]]:
    return [(picture(seed, (40, 40)), float(second)) for second, seed in enumerate(seeds)]


def test_soft_tokens_give_way_to_requests(shared: Pipeline) -> None:
    tokens = SoftTokens(shared.model)
    images = [cut_image(picture(seed), shared.config.vision, 70) for seed in range(3)]
    each = tokens(images[0]).nbytes
    for image in images:
        tokens(image)
    assert tokens.limit_to(2 * each) == 2 * each == tokens.nbytes
    assert tokens.limit_to(-5) == 0 == tokens.nbytes
    assert tokens(images[0]).nbytes == each and tokens.nbytes == 0
    assert tokens.limit_to(10**18) == 256 * 2**20


def test_a_request_takes_the_room_of_what_is_remembered(pipeline: Pipeline) -> None:
    pipeline.generate("What is it?", images=[picture()], **SEES)
    assert pipeline._soft_tokens.nbytes > 0 and pipeline.prefixes.nbytes > 0
    request = pipeline.prepare("What is it?", {"max_tokens": 500})
    pipeline.memory.limit = pipeline.memory.plan(*request_sizes([request])).total
    pipeline.make_room([request])
    assert (pipeline._soft_tokens.nbytes, pipeline.prefixes.nbytes) == (0, 0)


# -- computed once -------------------------------------------------------------------------------------------


def test_a_second_turn_about_a_picture_does_not_run_the_tower(pipeline: Pipeline, looks: list[int]) -> None:
    image = {"type": "image", "image": picture()}
    chat: list[dict[str, Any]] = [{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}]
    first = pipeline.generate(chat, **SEES)
    assert looks == [540]
    chat += [{"role": "assistant", "content": "a thing"}, {"role": "user", "content": "What colour?"}]
    second = pipeline.generate(chat, **SEES)
    assert looks == [540]
    assert second.stats.image_tokens == first.stats.image_tokens == 60
    assert second == _without_times(second, pipeline.with_model(pipeline.model).generate(chat, **SEES))
    assert len(looks) == 2  # another pipeline has its own memory


def _without_times(one: Any, other: Any) -> Any:
    """Return the other result with the first one's stats: answers are compared, not seconds."""
    return replace(other, stats=one.stats)


def test_other_pictures_and_other_budgets_are_computed(pipeline: Pipeline, looks: list[int]) -> None:
    pipeline.generate("x", images=[picture(0), picture(1), picture(0)], **SEES)
    assert len(looks) == 2
    pipeline.generate("x", images=[picture(1)], **SEES | {"image_tokens": 140})
    assert len(looks) == 3
    pipeline.generate("x", images=[picture(0)], videos=[film(0, 1, 0)], **SEES)
    assert len(looks) == 5  # the frames have another size


def test_the_oldest_are_forgotten_first(shared: Pipeline, looks: list[int]) -> None:
    vision = shared.config.vision
    assert vision is not None
    images = [cut_image(picture(seed), vision, 70) for seed in range(4)]
    one = 60 * 64 * 4
    remember = SoftTokens(shared.model, max_bytes=2 * one)
    for index in (0, 1, 0, 2, 0):  # 1 is the least recently used when 2 comes
        remember(images[index])
    assert len(looks) == 3 and remember.nbytes == 2 * one
    remember(images[1])
    assert len(looks) == 4 and remember.nbytes == 2 * one
    nothing = SoftTokens(shared.model, max_bytes=one - 1)
    np.testing.assert_array_equal(np.array(nothing(images[3])), np.array(remember(images[3])))
    assert nothing.nbytes == 0


def test_pictures_of_other_shapes_with_the_same_bytes_differ(shared: Pipeline, looks: list[int]) -> None:
    vision = shared.config.vision
    assert vision is not None
    wide = cut_image(Image.new("RGB", (60, 20), "red"), vision, 70)
    tall = cut_image(Image.new("RGB", (20, 60), "red"), vision, 70)
    assert wide.patches.tobytes() == tall.patches.tobytes()
    remember = SoftTokens(shared.model)
    remember(wide), remember(tall)
    assert len(looks) == 2


def test_images_go_through_the_tower_one_by_one(pipeline: Pipeline, looks: list[int]) -> None:
    pipeline.generate("x", images=[picture(seed) for seed in range(20)], **SEES | {"max_tokens": 1})
    assert looks == [540] * 20


# -- the loop ------------------------------------------------------------------------------------------------


def test_a_batch_equals_each_prompt_alone(pipeline: Pipeline) -> None:
    prompts = ["What?", "And this one here?", "Nothing to see", "Two"]
    images = [[picture(0)], [picture(1, (60, 20))], None, [picture(2), picture(3)]]
    videos = [None, [film(4, 5)], None, None]
    together = pipeline.generate_batch(prompts, images=images, videos=videos, **SEES | {"seed": [1, 2, 3, 4]})
    for row, prompt in enumerate(prompts):
        options = {**SEES, "seed": row + 1, "images": images[row], "videos": videos[row]}
        alone = pipeline.with_model(pipeline.model).generate(prompt, **options)
        assert together[row].token_ids == alone.token_ids
        assert together[row].text == alone.text
    counts = [(r.stats.images, r.stats.video_frames, r.stats.image_tokens) for r in together]
    assert counts == [(1, 0, 60), (1, 2, 56 + 2 * 64), (0, 0, 0), (2, 0, 120)]


@pytest.mark.parametrize("images", [[[picture()]], picture(), "a.png"])
def test_a_batch_wants_a_list_of_images_per_prompt(pipeline: Pipeline, images: Any) -> None:
    with pytest.raises(ValueError, match=r"images: got .*, expected one for each of 2 prompts"):
        pipeline.generate_batch(["a", "b"], images=images, **SEES)


def test_the_answer_depends_on_the_picture(pipeline: Pipeline) -> None:
    answers = {pipeline.generate("What?", images=[picture(seed)], **SEES).token_ids for seed in range(3)}
    assert len(answers) == 3


@pytest.mark.parametrize("step_size", [1, 16, 50, 2048])
def test_chunks_do_not_cut_pictures(pipeline: Pipeline, step_size: int) -> None:
    """Chunks end at multiples of the step or behind a picture, and the answer is that of one chunk."""
    options = {**SEES, "images": [picture(0), picture(1)], "prefill_step_size": step_size}
    events = list(pipeline.stream("What is in them?", **options))
    done = [event.processed for event in events if isinstance(event, PrefillProgress)]
    spans = [block.span for block in pipeline.prepare("What is in them?", options).prompt.blocks]
    assert [stop - start for start, stop in spans] == [60, 60]
    assert not any(start < place < stop for start, stop in spans for place in done)
    assert done[-1] == events[0].total  # type: ignore[union-attr]
    if step_size <= 16:
        assert {stop for _, stop in spans} <= set(done)
    assert (
        events[-1].result.token_ids
        == pipeline.with_model(pipeline.model)
        .generate(  # type: ignore[union-attr]
            "What is in them?", images=[picture(0), picture(1)], **SEES
        )
        .token_ids
    )


def test_a_cached_prefix_continues_at_the_border_of_a_picture(shared: Pipeline) -> None:
    vision = shared.config.vision
    assert vision is not None
    image = cut_image(picture(), vision, 70)
    blocks = [ImageBlock("image", 5, image), ImageBlock("image", 70, image)]
    ids, look = tuple(range(30, 170)), SoftTokens(shared.model)
    cold = shared.model.make_cache()
    borders = [0, *encode(shared.model, cold, ids, 16, blocks, look)]
    for length in (3, 5, 65, 67, 70, 130, 133):
        cache = shared.model.make_cache()
        for _ in encode(shared.model, cache, ids[:length], 16, blocks[: (length > 5) + (length > 70)], look):
            pass
        rest = [length + done for done in encode(shared.model, cache, ids[length:], 16, blocks, look)]
        assert rest == [border for border in borders if border > length]
        for one, other in zip(cold.views(), cache.views(), strict=True):
            np.testing.assert_allclose(np.array(one.keys), np.array(other.keys), atol=1e-4)
    cache = shared.model.make_cache()
    list(encode(shared.model, cache, ids[:20], 16))
    with pytest.raises(ValueError, match="the cache ends at 20, inside an image at 5 to 65; expected a border"):
        list(encode(shared.model, cache, ids[20:], 16, blocks, look))


def test_patches_are_let_go_after_prefill(pipeline: Pipeline) -> None:
    request = pipeline.open(pipeline.prepare("x", {**SEES, "images": [picture()]}))
    assert len(request._blocks) == 1
    list(request.prefill())
    assert request._blocks == ()


def test_cancelling_between_pictures_leaves_the_rest_unseen(pipeline: Pipeline, looks: list[int]) -> None:
    images = [picture(seed) for seed in range(9)]
    options = {**SEES, "images": images, "prefill_step_size": 1}
    result = list(pipeline.stream("x", cancelled=lambda: len(looks) == 2, **options))[-1].result  # type: ignore[union-attr]
    assert result.finish_reason == "cancelled" and len(looks) == 2


# -- what a checkpoint says ----------------------------------------------------------------------------------


def test_a_model_without_a_tower_says_so() -> None:
    blind = make_pipeline(None)
    with pytest.raises(
        ValueError, match=r"images\[0\]: got image, expected text alone: this model has no vision tower"
    ):
        blind.generate("x", images=[picture()])


def test_more_pictures_than_the_context_holds_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"4352 soft tokens up to images\[16\], expected at most 4096"):
        pipeline.generate("x", images=[picture(size=(20, 20))] * 17, **SEES | {"image_tokens": 280})
    with pytest.raises(ValueError, match=r"the prompt has 41\d\d tokens; expected at most 4088"):
        pipeline.generate("x", images=[picture(size=(20, 20))] * 62, **SEES)


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        ({}, {}, None),
        ({"vision_soft_tokens_per_image": 140}, {}, 140),
        ({"vision_soft_tokens_per_image": 140}, {"processor_config.json": {"image_processor": {}}}, 140),
        (
            {"vision_soft_tokens_per_image": 280},
            {"processor_config.json": {"image_processor": {"max_soft_tokens": 560}}},
            560,
        ),
        ({}, {"preprocessor_config.json": {"max_soft_tokens": 70}}, 70),
    ],
)
def test_the_default_budget_is_the_processors(
    tmp_path: Path, config: dict[str, Any], files: dict[str, Any], expected: int | None
) -> None:
    folder = save_checkpoint(tmp_path, vision=VISION)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | config))
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    assert load_configs(folder)[0].vision_soft_tokens_per_image == expected


def test_the_default_budget_is_used(shared: Pipeline) -> None:
    assert DEFAULT_SOFT_TOKENS == 280
    assert shared.preparer._sight({}).image_tokens == 280
    assert shared.preparer._sight({"image_tokens": 70}).image_tokens == 70


def test_a_budget_that_is_no_number_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, vision=VISION)
    (folder / "processor_config.json").write_text('{"image_processor": {"max_soft_tokens": "many"}}')
    with pytest.raises(ConfigError, match="vision_soft_tokens_per_image: got 'many', expected an integer"):
        load_configs(folder)
