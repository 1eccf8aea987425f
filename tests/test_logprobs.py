"""Log-probabilities of an answer against the naive computation in float64, step by step, on a random model."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from small_model import bundled_checkpoint

from mlx_diffusiongemma.events import CanvasCommitted, Finished, TokenLogprob
from mlx_diffusiongemma.logprobs import read_logprobs
from mlx_diffusiongemma.pipeline import Pipeline, load
from mlx_diffusiongemma.scheduler import Engine
from mlx_diffusiongemma.tokenizer import Tokenizer

C = 8
ATOL = 2e-5  # nats; float32 against float64, at most 6e-6 seen
OPTIONS = {"max_tokens": 20, "seed": 3, "max_denoising_steps": 5}


@pytest.fixture(scope="module")
def pipeline(tiny_folder) -> Pipeline:
    return Pipeline(bundled_checkpoint(Tokenizer.load(tiny_folder)))


def naive(hidden: mx.array, embedding: nn.Module, softcap: float) -> np.ndarray:
    """Return log-probabilities [R, V] from all logits at once, in float64."""
    logits = np.array(hidden.astype(mx.float32), np.float64) @ np.array(embedding.weight, np.float64).T
    logits = np.tanh(logits / softcap) * softcap
    centred = logits - logits.max(-1, keepdims=True)
    return centred - np.log(np.exp(centred).sum(-1, keepdims=True))


def expected(pipeline: Pipeline, messages: str = "go", **options) -> tuple[list, list[TokenLogprob]]:
    """Return the canvases of a run, each a list of steps (drafts, log-probabilities [C, V]), and what it reported."""
    canvases: list[list[tuple[np.ndarray, np.ndarray]]] = []
    offsets: list[int] = []
    model = pipeline.model

    def watch(rows, _, results) -> None:
        offset = int(rows[0].offset)
        if offset not in offsets:
            offsets.append(offset)
            canvases.append([])
        own = naive(results[0].hidden, model.model.decoder.embed_tokens, model.config.text.final_logit_softcapping)
        canvases[-1].append((np.array(results[0].argmax), own))

    reported = pipeline.watched(watch).generate(messages, **options).logprobs
    assert reported is not None
    return canvases, list(reported)


def check(canvases: list, reported: list[TokenLogprob], top: int, candidates: tuple[int, ...] = ()) -> None:
    """Compare every entry with the naive log-probabilities of its position."""
    length = len(canvases[0][0][0])
    for position, entry in enumerate(reported):
        drafts = [draft[position % length] for draft, _ in canvases[position // length]]
        rows = [own[position % length] for _, own in canvases[position // length]]
        last = rows[-1]
        assert entry.token_id == drafts[-1]
        assert entry.logprob == pytest.approx(last[entry.token_id], abs=ATOL)
        settled = next(step for step in range(len(drafts)) if all(d == drafts[-1] for d in drafts[step:]))
        assert entry.settled_step == settled + 1
        assert entry.settled_logprob == pytest.approx(rows[settled][entry.token_id], abs=ATOL)
        best = np.argsort(-last)[:top]
        assert [token_id for token_id, _ in entry.top] == best.tolist()
        np.testing.assert_allclose([logprob for _, logprob in entry.top], last[best], atol=ATOL)
        np.testing.assert_allclose(entry.candidates, last[list(candidates)], atol=ATOL)


@pytest.mark.parametrize(("V", "top"), [(96, 3), (1024, 1), (1024, 2), (40 * 512, 20), (40 * 512, 0), (96, 96)])
def test_a_reading_equals_the_naive_one_whatever_the_chunks(V: int, top: int) -> None:
    embedding = nn.Embedding(V, 32)
    embedding.weight = mx.random.normal((V, 32), key=mx.random.key(V)) * 3
    hidden = mx.random.normal((11, 32), key=mx.random.key(1))
    token_ids = np.arange(11) * 7
    own = naive(hidden, embedding, 30.0)
    for rows in (1, 4, 11, 100):
        got = read_logprobs(hidden, token_ids, embedding, 30.0, top, (5, 0, 5), chunk_elements=rows * V)
        np.testing.assert_allclose(got.logprob, own[np.arange(11), token_ids], atol=ATOL)
        best = np.argsort(-own, axis=-1)[:, :top]
        np.testing.assert_array_equal(got.top_ids, best)
        np.testing.assert_allclose(got.top_logprobs, np.take_along_axis(own, best, -1), atol=ATOL)
        np.testing.assert_allclose(got.candidates, own[:, [5, 0, 5]], atol=ATOL)


def test_of_equal_tokens_the_lower_id_comes_first() -> None:
    embedding = nn.Embedding(2048, 4)
    embedding.weight = mx.zeros((2048, 4))
    got = read_logprobs(mx.ones((2, 4)), np.array([0, 2047]), embedding, 30.0, 3)
    np.testing.assert_array_equal(got.top_ids, [[0, 1, 2]] * 2)
    np.testing.assert_allclose(got.logprob, [-np.log(2048)] * 2, rtol=1e-6)


def test_no_positions_give_nothing() -> None:
    got = read_logprobs(mx.zeros((0, 4)), np.zeros(0, np.int64), nn.Embedding(96, 4), 30.0, 2, (1,))
    assert [array.shape for array in got] == [(0,), (0, 2), (0, 2), (0, 1)]


@pytest.mark.parametrize("top", [0, 1, 20])
def test_every_token_of_several_canvases(pipeline: Pipeline, top: int) -> None:
    settling = {"temperature": 0, "entropy_bound": 100.0}
    canvases, reported = expected(pipeline, **(OPTIONS | settling), logprobs=top)
    assert len(canvases) == 3
    assert len(reported) == 20
    assert len({entry.settled_step for entry in reported}) > 2
    check(canvases, reported, top)


def test_every_token_of_a_trained_model(tiny_folder) -> None:
    """Most positions settle long before the last step, and are certain then."""
    canvases, reported = expected(load(tiny_folder), "What is 17 + 25?", max_tokens=24, seed=7, logprobs=3)
    check(canvases, reported, 3)
    assert min(entry.settled_step for entry in reported) < len(canvases[0])
    assert max(entry.logprob for entry in reported) > -0.01


def test_candidates(pipeline: Pipeline) -> None:
    ids = (7, 0, 95, 7)
    canvases, reported = expected(pipeline, **OPTIONS, logprobs=2, logprob_candidates=list(ids))
    check(canvases, reported, 2, ids)
    assert all(len(entry.candidates) == 4 for entry in reported)


def test_pins_and_a_narrow_draw_leave_the_distribution_alone(pipeline: Pipeline) -> None:
    pins = {0: 40, 3: 41, 9: 42}
    canvases, reported = expected(pipeline, **OPTIONS, logprobs=3, pins=pins, top_k=2, temperature=0.5)
    check(canvases, reported, 3)
    assert [reported[position].token_id for position in pins] == list(pins.values())
    assert all(reported[position].settled_step == 1 for position in pins)
    assert all(reported[position].logprob < reported[position].top[0][1] for position in pins)


@pytest.mark.parametrize("pattern", ["[a-z]{12}", "(yes|no), [0-9]{3}"])
def test_a_constraint_leaves_the_distribution_alone(pipeline: Pipeline, pattern: str) -> None:
    """Its tokens have the log-probabilities that the model gives them, those that it puts in place at the end too."""
    canvases, reported = expected(pipeline, **OPTIONS, logprobs=1, regex=pattern)
    answer = pipeline.generate("go", **OPTIONS, regex=pattern)
    assert tuple(entry.token_id for entry in reported) == answer.token_ids
    for position, entry in enumerate(reported):
        steps = [own[position % C] for _, own in canvases[position // C]]
        assert entry.logprob == pytest.approx(steps[-1][entry.token_id], abs=ATOL)
        assert entry.settled_logprob == pytest.approx(steps[entry.settled_step - 1][entry.token_id], abs=ATOL)
    assert min(entry.logprob for entry in reported) < -1


def test_the_ban_on_an_early_end_leaves_the_distribution_alone(pipeline: Pipeline) -> None:
    free = pipeline.generate("go", **OPTIONS, logprobs=1)
    assert free.logprobs is not None
    [(likeliest, _)] = free.logprobs[0].top
    options = OPTIONS | {"extra_eos_tokens": [likeliest], "max_denoising_steps": 1}
    canvases, reported = expected(pipeline, **options, logprobs=1, guard_empty=True)
    check(canvases, reported, 1)


def test_results_are_the_same_with_and_without(pipeline: Pipeline) -> None:
    for seed in range(4):
        options = OPTIONS | {"seed": seed}
        plain, asked = pipeline.generate("go", **options), pipeline.generate("go", **options, logprobs=4)
        assert asked.token_ids == plain.token_ids
        assert asked.stats.denoising_steps == plain.stats.denoising_steps
        assert plain.logprobs is None
        assert asked.logprobs is not None
        assert tuple(entry.token_id for entry in asked.logprobs) == asked.token_ids


def test_rows_of_a_batch_may_ask_or_not(pipeline: Pipeline) -> None:
    given = [OPTIONS | {"logprobs": 2}, OPTIONS, OPTIONS | {"logprobs": 0, "logprob_candidates": (5,)}]
    alone = [pipeline.generate(f"go {index}", **options) for index, options in enumerate(given)]
    requests = [pipeline.open(pipeline.prepare(f"go {index}", options)) for index, options in enumerate(given)]
    results = {i: event.result for i, event in pipeline._run(requests, None) if isinstance(event, Finished)}
    with Engine(lambda: pipeline) as engine:
        handles = [engine.submit(f"go {index}", **options) for index, options in enumerate(given)]
        shared = [handle.result(60) for handle in handles]
    for index, one in enumerate(alone):
        for other in (results[index], shared[index]):
            assert other.token_ids == one.token_ids
            for a, b in zip(one.logprobs or (), other.logprobs or (), strict=True):
                assert (a.token_id, a.settled_step, [t for t, _ in a.top]) == (
                    b.token_id,
                    b.settled_step,
                    [t for t, _ in b.top],
                )
                np.testing.assert_allclose(
                    [a.logprob, a.settled_logprob, *a.candidates],
                    [b.logprob, b.settled_logprob, *b.candidates],
                    atol=ATOL,
                )
        assert (one.logprobs is None) == (index == 1)


def committed(pipeline: Pipeline, **options) -> Iterator[CanvasCommitted]:
    return (event for event in pipeline.stream("go", **options) if isinstance(event, CanvasCommitted))


def test_events_carry_those_of_their_tokens(pipeline: Pipeline) -> None:
    whole = pipeline.generate("go", **OPTIONS, logprobs=1).logprobs
    events = list(committed(pipeline, **OPTIONS, logprobs=1))
    assert [len(event.logprobs or ()) for event in events] == [8, 8, 4]
    assert tuple(entry for event in events for entry in event.logprobs or ()) == whole
    assert all(event.logprobs is None for event in committed(pipeline, **OPTIONS))


@pytest.mark.parametrize("max_tokens", [0, 1, C, C + 1])
def test_they_end_with_max_tokens(pipeline: Pipeline, max_tokens: int) -> None:
    answer = pipeline.generate("go", **(OPTIONS | {"max_tokens": max_tokens}), logprobs=1)
    assert answer.logprobs is not None
    assert len(answer.logprobs) == len(answer.token_ids) == max_tokens


def test_they_end_before_an_end_token(pipeline: Pipeline) -> None:
    answer = pipeline.generate("go", **OPTIONS, logprobs=1, pins={10: 1})
    assert answer.logprobs is not None
    assert [entry.token_id for entry in answer.logprobs] == list(answer.token_ids)
    assert len(answer.logprobs) == 10


def test_they_end_before_a_stop_string_that_began_in_an_earlier_canvas(pipeline: Pipeline) -> None:
    letters = {0: "a", 1: "b", 2: "c", 3: "d", 4: "e", 5: "f", 6: "x", 7: "y", 8: "z", 9: "g", 10: "h"}
    pins = {position: pipeline.tokenizer.encode(letter)[0] for position, letter in letters.items()}
    answer = pipeline.generate("go", **OPTIONS, logprobs=1, pins=pins, stop=["yz"])
    assert answer.text == "abcdefx"
    assert answer.logprobs is not None
    assert [entry.token_id for entry in answer.logprobs] == list(answer.token_ids) == [pins[i] for i in range(7)]


def test_a_cancelled_request_has_those_of_its_tokens(pipeline: Pipeline) -> None:
    calls = iter(range(1000))
    result = pipeline.generate("go", **OPTIONS, logprobs=1, cancelled=lambda: next(calls) > 8)
    assert result.finish_reason == "cancelled"
    assert result.logprobs is not None
    assert [entry.token_id for entry in result.logprobs] == list(result.token_ids)


def test_quantised_tables_are_read_too() -> None:
    embedding = nn.Embedding(1024, 64)
    hidden = mx.random.normal((3, 64), key=mx.random.key(1))
    quantized = embedding.to_quantized(group_size=32, bits=8)
    weight = mx.dequantize(quantized.weight, quantized.scales, quantized.biases, group_size=32, bits=8)
    plain = nn.Embedding(1024, 64)
    plain.weight = weight
    got = read_logprobs(hidden, np.array([1, 2, 3]), quantized, 30.0, 2)
    np.testing.assert_allclose(got.logprob, naive(hidden, plain, 30.0)[np.arange(3), [1, 2, 3]], atol=ATOL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs": -1}, "logprobs: got -1, expected an integer >= 0"),
        ({"logprobs": 21}, "logprobs: got 21, expected an integer <= 20"),
        ({"logprobs": True}, "logprobs: got True"),
        ({"logprob_candidates": [1]}, "logprob_candidates: got some without logprobs"),
        ({"logprobs": 0, "logprob_candidates": [1] * 1001}, "got 1001 tokens, expected at most 1000"),
        ({"logprobs": 0, "logprob_candidates": [1 << 20]}, "logprob_candidates: got token id 1048576"),
        ({"logprobs": 0, "logprob_candidates": [-1]}, "logprob_candidates: token id: got -1"),
        ({"logprobs": 0, "logprob_candidates": "ab"}, "logprob_candidates: got 'ab', expected a list"),
    ],
)
def test_impossible_ones_are_refused(pipeline: Pipeline, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.generate("go", max_tokens=8, **options)
