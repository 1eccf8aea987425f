"""Pinned tokens and a seed canvas through the whole loop, on a random model whose canvas has 8 positions."""

from __future__ import annotations

import numpy as np
import pytest
from small_model import bundled_checkpoint

from mlx_diffusiongemma.denoise import StepInput
from mlx_diffusiongemma.events import DenoisingStep
from mlx_diffusiongemma.pipeline import Pipeline
from mlx_diffusiongemma.tokenizer import Tokenizer

C = 8
PINS = {0: 40, 3: 41, 9: 42, 10: 43, 19: 44}  # on three canvases


@pytest.fixture(scope="module")
def pipeline(tiny_folder) -> Pipeline:
    return Pipeline(bundled_checkpoint(Tokenizer.load(tiny_folder)))


def canvases(pipeline: Pipeline, **options) -> list[StepInput]:
    """Return the inputs of every step."""
    seen: list[StepInput] = []
    pipeline.watched(lambda rows, *_: seen.extend(rows)).generate("go", **options)
    return seen


def test_pinned_tokens_stand_in_the_answer_and_in_every_draft(pipeline: Pipeline) -> None:
    options = {"max_tokens": 20, "seed": 3, "max_denoising_steps": 4}
    free = pipeline.generate("go", **options).token_ids
    assert all(free[position] != token for position, token in PINS.items())
    answer = pipeline.generate("go", pins=PINS, **options)
    assert [answer.token_ids[position] for position in PINS] == list(PINS.values())
    for event in pipeline.stream("go", pins=list(PINS.items()), **options):
        if isinstance(event, DenoisingStep):
            for position in range(C):
                token = PINS.get(event.canvas_index * C + position)
                assert token is None or (event.token_ids[position], event.entropies[position]) == (token, 0)
                assert token is None or event.accepted[position]
                assert event.pinned[position] == (token is not None)


def test_pinned_tokens_stand_in_the_first_canvas(pipeline: Pipeline) -> None:
    first = np.array(canvases(pipeline, seed=3, max_tokens=20, pins=PINS)[0].state.canvas)
    noise = np.array(canvases(pipeline, seed=3, max_tokens=20)[0].state.canvas)
    expected = noise.copy()
    expected[[0, 3]] = 40, 41
    np.testing.assert_array_equal(first, expected)


def test_a_pinned_end_token_ends(pipeline: Pipeline) -> None:
    answer = pipeline.generate("go", max_tokens=8, seed=3, pins={0: 40, 1: 41, 2: 42, 3: 1})
    assert (answer.token_ids, answer.finish_reason) == ((40, 41, 42), "stop")


def test_an_answer_that_is_pinned_altogether_takes_two_steps(pipeline: Pipeline) -> None:
    answer = pipeline.generate("go", max_tokens=8, seed=3, pins=dict(enumerate(range(40, 48))), stability_threshold=1)
    assert answer.token_ids == tuple(range(40, 48))
    assert answer.stats.denoising_steps == (2,)


def test_pins_of_one_row_do_not_reach_another(pipeline: Pipeline) -> None:
    options = {"max_tokens": 16, "seed": 3, "max_denoising_steps": 3}
    alone = pipeline.generate("go", **options)
    pinned = pipeline.generate("go on", pins=PINS, **(options | {"max_tokens": 20}))
    requests = [
        pipeline.open(pipeline.prepare("go", options)),
        pipeline.open(pipeline.prepare("go on", options | {"max_tokens": 20, "pins": PINS})),
    ]
    results = {i: event.result for i, event in pipeline._run(requests, None) if hasattr(event, "result")}
    assert results[0].token_ids == alone.token_ids
    assert results[1].token_ids == pinned.token_ids


def test_a_seed_canvas_stands_in_place_of_noise_and_may_change(pipeline: Pipeline) -> None:
    seeds = tuple(range(40, 50))
    steps = canvases(pipeline, seed=3, max_tokens=16, seed_canvas=seeds, max_denoising_steps=1)
    noise = canvases(pipeline, seed=3, max_tokens=16, max_denoising_steps=1)
    np.testing.assert_array_equal(np.array(steps[0].state.canvas), seeds[:C])
    second, plain = np.array(steps[1].state.canvas), np.array(noise[1].state.canvas)
    np.testing.assert_array_equal(second[:2], seeds[C:])
    np.testing.assert_array_equal(second[2:], plain[2:])
    answer = pipeline.generate("go", seed=3, max_tokens=16, seed_canvas=seeds, max_denoising_steps=1)
    assert answer.token_ids[:10] != seeds


def test_only_text_stands_where_nothing_else_may(pipeline: Pipeline) -> None:
    """On three canvases, end tokens of the request among what may not; the other row of the batch is left alone."""
    free = {"max_tokens": 20, "max_denoising_steps": 1, "seed": 3}
    unwanted = pipeline.generate("go", **free).token_ids[3]
    free["extra_eos_tokens"] = [unwanted]
    bound, plain = pipeline.generate_each([("go", free | {"text_only": [(0, 5), (7, 20)]}), ("go", free)])
    assert len(plain.token_ids) <= 3 and len(bound.token_ids) > 5
    control = pipeline.tokenizer.all_special_ids | {unwanted}
    assert not {*bound.token_ids[:5], *bound.token_ids[7:]} & control
    assert plain.token_ids == pipeline.generate("go", **free).token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pins": {8: 1}}, "pins: position: got 8, expected an integer <= 7"),
        ({"pins": {-1: 1}}, "pins: position: got -1"),
        ({"pins": {0: 1 << 20}}, "pins: got token id 1048576, expected less than"),
        ({"pins": {0: -1}}, "pins: token id: got -1"),
        ({"pins": [(0, 1), (0, 2)]}, "pins: got a position twice"),
        ({"pins": [(0, 1, 2)]}, r"pins: got \(0, 1, 2\), expected pairs"),
        ({"pins": "text"}, "pins: got 'text', expected a list"),
        ({"pins": {"0": 1}}, r"pins: got \('0', 1\), expected pairs"),
        ({"seed_canvas": [1] * 9}, "seed_canvas: got 9 tokens, expected at most max_tokens, 8"),
        ({"seed_canvas": [1 << 20]}, "seed_canvas: got token id 1048576, expected less than"),
        ({"seed_canvas": ["a"]}, "seed_canvas: token id: got 'a'"),
        ({"text_only": [(0, 9)]}, "text_only: stop: got 9, expected an integer <= 8"),
        ({"text_only": [(3, 2)]}, "text_only: stop: got 2, expected an integer >= 3"),
        ({"text_only": [(-1, 2)]}, "text_only: start: got -1"),
        ({"text_only": [3]}, "text_only: got 3, expected a list"),
    ],
)
def test_impossible_ones_are_refused(pipeline: Pipeline, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.generate("go", max_tokens=8, **options)
