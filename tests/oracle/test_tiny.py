"""`tiny` end to end: prompt, loop and answer of our pipeline against transformers' generate, with its own draws."""

from __future__ import annotations

import pytest

from mlx_diffusiongemma import load
from mlx_diffusiongemma.events import Finished, Result
from mlx_diffusiongemma.pipeline import Pipeline
from mlx_diffusiongemma.prompt import Prompt, build_prompt

from . import tiny
from .replay import assert_answer, recorded_noise

pytestmark = pytest.mark.oracle

TOGETHER = ("small_sums", "capitals", "reverse_words", "counting", "spelling")  # no tools, no thinking


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load(tiny.FOLDER, dtype="float32", prefix_bytes=0)


def answer(pipeline: Pipeline, family: str) -> tuple[list[object], Result]:
    """Answer one example from its messages; return all events and the result."""
    example = tiny.examples()[family]
    with recorded_noise([tiny.recorded(family)]):
        events = list(
            pipeline.stream(
                example.messages,
                tools=example.tools or None,
                enable_thinking=example.thinking,
                seed=0,  # the number of the record
                max_tokens=tiny.MAX_TOKENS,
            )
        )
    assert isinstance(events[-1], Finished)
    return events, events[-1].result


def prompt(pipeline: Pipeline, family: str) -> Prompt:
    """Return the prompt that our template renderer builds."""
    example = tiny.examples()[family]
    return build_prompt(
        pipeline.tokenizer, example.messages, tools=example.tools or None, enable_thinking=example.thinking
    )


@pytest.mark.parametrize("family", sorted(tiny.examples()))
def test_answer_equals_the_reference(pipeline: Pipeline, family: str) -> None:
    expected = tiny.recorded(family)
    events, result = answer(pipeline, family)
    assert prompt(pipeline, family).token_ids == expected.prompt
    worst = assert_answer(expected, events, result, pipeline.generation_config.eos_token_ids, tiny.MAX_TOKENS)
    print(f"worst, tiny, {family}: mean entropy {worst:.1e} nats; steps {result.stats.denoising_steps}")


def test_batch_equals_the_padded_batch_of_the_reference(pipeline: Pipeline) -> None:
    examples = [tiny.examples()[family] for family in TOGETHER]
    records = tiny.record_batch([tiny.prompt_ids(example) for example in examples], seed=5)
    with recorded_noise(records):
        results = pipeline.generate_batch(
            [example.messages for example in examples], seed=list(range(len(records))), max_tokens=tiny.MAX_TOKENS
        )
    for expected, result in zip(records, results, strict=True):
        assert result.stats.denoising_steps == tuple(canvas.steps for canvas in expected.canvases)
        assert result.token_ids == expected.kept(pipeline.generation_config.eos_token_ids, tiny.MAX_TOKENS)
