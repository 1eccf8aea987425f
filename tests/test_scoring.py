"""Scores of texts against the naive computation in float64, on a random model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from small_model import bundled_checkpoint

from mlx_diffusiongemma.pipeline import Pipeline
from mlx_diffusiongemma.scheduler import Engine, EngineClosedError
from mlx_diffusiongemma.scoring import Score
from mlx_diffusiongemma.tokenizer import Tokenizer

ATOL = 2e-5  # nats; float32 against float64
TEXT = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def pipeline(tiny_folder) -> Pipeline:
    return Pipeline(bundled_checkpoint(Tokenizer.load(tiny_folder)))


def naive(pipeline: Pipeline, ids: list[int]) -> np.ndarray:
    """Return the log-probabilities [L - 1, V] of what follows each token but the last."""
    model = pipeline.model
    hidden = np.array(model.prefill(mx.array(ids), model.make_cache())[0, :-1], np.float64)
    cap = model.config.text.final_logit_softcapping
    logits = np.tanh(hidden @ np.array(model.model.decoder.embed_tokens.weight, np.float64).T / cap) * cap
    centred = logits - logits.max(-1, keepdims=True)
    return centred - np.log(np.exp(centred).sum(-1, keepdims=True))


def check(score: Score, ids: list[int], first: int, rows: np.ndarray, top: int) -> None:
    assert list(score.token_ids) == ids[first:]
    tokens = score.tokens
    if first == 0:
        assert (tokens[0].logprob, tokens[0].top) == (None, ())
        tokens, first = tokens[1:], 1
    for index, token in enumerate(tokens, first):
        own = rows[index - 1]
        assert token.logprob == pytest.approx(own[token.token_id], abs=ATOL)
        assert [token_id for token_id, _ in token.top] == np.argsort(-own)[:top].tolist()
        np.testing.assert_allclose([logprob for _, logprob in token.top], np.sort(own)[::-1][:top], atol=ATOL)
    expected = sum(rows[index - 1][token_id] for index, token_id in enumerate(ids) if index >= first)
    assert score.total == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("step_size", [1, 7, 2048])
def test_a_text_whatever_the_chunks(pipeline: Pipeline, step_size: int) -> None:
    ids = [pipeline.tokenizer.special.bos, *pipeline.tokenizer.encode(TEXT)]
    check(pipeline.score(TEXT, top=2, prefill_step_size=step_size), ids, 0, naive(pipeline, ids), 2)


@pytest.mark.parametrize("step_size", [1, 5, 2048])
def test_a_continuation_alone(pipeline: Pipeline, step_size: int) -> None:
    behind = pipeline.tokenizer.encode(" over it")
    messages = [{"role": "user", "content": "Where?"}]
    ids = [*pipeline.prepare(messages, {}).prompt.token_ids, *behind]
    score = pipeline.score(messages, continuation=" over it", prefill_step_size=step_size)
    check(score, ids, len(ids) - len(behind), naive(pipeline, ids), 0)


def test_an_empty_continuation_scores_nothing(pipeline: Pipeline) -> None:
    score = pipeline.score(TEXT, continuation="")
    assert (score.tokens, score.total) == ((), 0)


def test_a_score_leaves_generation_as_it_is(pipeline: Pipeline) -> None:
    options = {"max_tokens": 8, "seed": 1, "max_denoising_steps": 2}
    before = pipeline.generate(TEXT, **options)
    pipeline.score(TEXT)
    assert pipeline.generate(TEXT, **options).token_ids == before.token_ids


def test_an_engine_scores_between_the_steps_of_others(pipeline: Pipeline) -> None:
    expected = pipeline.score(TEXT, top=1)
    alone = pipeline.generate("go", max_tokens=40, seed=1)
    with Engine(lambda: pipeline) as engine, ThreadPoolExecutor(3) as threads:
        handle = engine.submit("go", max_tokens=40, seed=1)
        scores = [threads.submit(engine.score, TEXT, top=1) for _ in range(3)]
        assert all(score.result(60) == expected for score in scores)
        assert handle.result(60).token_ids == alone.token_ids
        with pytest.raises(ValueError, match="top: got 21"):
            engine.score(TEXT, top=21)
        assert engine.score(TEXT, top=1) == expected
    with pytest.raises(EngineClosedError):
        engine.score(TEXT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": -1}, "top: got -1, expected an integer >= 0"),
        ({"top": 21}, "top: got 21, expected an integer <= 20"),
        ({"continuation": 5}, "continuation: got 5, expected text"),
        ({"template_kwargs": 5}, "template_kwargs: got 5, expected names and values"),
        ({"continuation": "a" * 300}, "tokens to score, expected at most 256"),
    ],
)
def test_impossible_ones_are_refused(pipeline: Pipeline, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.score(TEXT, **options)


def test_unknown_options_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(TypeError, match="unknown argument 'colour'"):
        pipeline.score(TEXT, colour=1)
