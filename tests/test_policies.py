"""Policies: what each rule does to a canvas between two steps, and that `exact` stays what it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from small_model import random_model

from mlx_diffusiongemma import load
from mlx_diffusiongemma.denoise import StepResult, StepRules, first_state
from mlx_diffusiongemma.events import DenoisingStep, Finished
from mlx_diffusiongemma.pacing import Pacer
from mlx_diffusiongemma.pipeline import Pipeline
from mlx_diffusiongemma.policies import BALANCED, EXACT, FAST, POLICIES, Policy, find_policy, rows_of
from mlx_diffusiongemma.request import Request

END, C = 1, 8
NOISE = mx.arange(50, 50 + C, dtype=mx.int32)
NAMED = Policy("rule")
MANY = 1000  # tokens of room


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return load("tiny", dtype="float32")


def step(
    pacer: Pacer, tokens: Sequence[int], confidence: Sequence[float], accepted: Sequence[bool] | None = None
) -> StepResult:
    """Return an evaluated step of the small model that is neither stable nor confident by the published test."""
    state = first_state(pacer._model, mx.arange(len(tokens), dtype=mx.int32), 1)
    return StepResult(
        state,
        argmax=mx.array(tokens, dtype=mx.int32),
        accepted=mx.array([True] * len(tokens) if accepted is None else accepted),
        mean_entropy=mx.array(0.5),
        finished=mx.array(False),
        entropy=1 - mx.array(confidence),
        hidden=mx.zeros((len(tokens), 64)),
        confidence=mx.array(confidence),
        wide=mx.zeros((len(tokens),), mx.bool_),
    )


def pacer_of(room: int = MANY, **rules: object) -> Pacer:
    pacer = Pacer(random_model(), replace(NAMED, **rules), frozenset({END}))  # type: ignore[arg-type]
    pacer.start_canvas(room)
    return pacer


def test_certain_rows_end_a_canvas_at_once_and_only_those_of_the_head_count() -> None:
    pacer = pacer_of(row_confidence=0.9)
    tokens = [5, 6, END, 7, 8, 9, 9, 9]
    sure, unsure = [0.95, 0.9, 0.99, 0.1, 0.1, 0.1, 0.1, 0.1], [0.95, 0.89, 0.99, 1, 1, 1, 1, 1]
    assert pacer.absorb(step(pacer, tokens, sure), NOISE, MANY).finished
    assert not pacer.absorb(step(pacer, tokens, unsure), NOISE, MANY).finished
    assert not pacer.absorb(step(pacer, [5] * C, sure), NOISE, MANY).finished  # without an end token all rows count
    assert pacer.absorb(step(pacer, [5] * C, sure), NOISE, 3).finished  # but those only that the answer has room for


def test_rows_behind_a_certain_end_are_dropped() -> None:
    pacer = pacer_of(end_confidence=0.9)
    tokens = [5, END, 7, 7, 7, 7, 7, 7]
    outcome = pacer.absorb(step(pacer, tokens, [0.1, 0.89] + [1] * 6), NOISE, MANY)
    assert len(outcome.state.canvas) == C
    outcome = pacer.absorb(step(pacer, tokens, [0.1, 0.9] + [1] * 6), NOISE, MANY)
    assert not outcome.finished
    assert len(outcome.token_ids) == C  # the draft is the one that was computed
    shapes = [array.shape for array in outcome.state]
    assert shapes == [(2,), (2, 64), (1, 2)]


def test_kept_tokens_are_pinned_one_more_at_least_in_every_step() -> None:
    pacer = pacer_of(keep_confidence=0.9)
    tokens = [5, 6, 7, END, 8, 8, 8, 8]
    outcome = pacer.absorb(step(pacer, tokens, [0.95, 0.2, 0.3, 0.4, 0, 0, 0, 0]), NOISE, MANY)
    pins = pacer.pins(C)
    assert pins is not None and pins.tolist() == [5] + [-1] * 7
    assert pacer.pins(2).tolist() == [5, -1]  # type: ignore[union-attr]
    assert outcome.state.canvas.tolist()[0] == 5
    embedded = pacer._model.model.decoder.embed_tokens(mx.array(5))
    np.testing.assert_array_equal(np.array(outcome.state.soft_embeddings[0]), np.array(embedded))
    assert not outcome.finished
    for kept in ([0, 3], [0, 2, 3]):
        outcome = pacer.absorb(step(pacer, tokens, [1, 0.2, 0.3, 0.4, 0, 0, 0, 0]), NOISE, MANY)
        assert np.flatnonzero(np.array(pacer.pins(C)) >= 0).tolist() == kept
        assert not outcome.finished
    assert pacer.absorb(step(pacer, tokens, [1, 0.2, 0.3, 0.4, 0, 0, 0, 0]), NOISE, MANY).finished  # all of the head


def test_a_settled_beginning_is_committed_by_itself() -> None:
    pacer = pacer_of(exit_confidence=0.9)
    confidence = [0.95, 0.95, 0.95, 0.5, 0.95, 0.5, 0.5, 0.5]
    assert not pacer.absorb(step(pacer, [5, 6, 7, 8, 9, 10, 11, 12], confidence), NOISE, MANY).finished
    outcome = pacer.absorb(step(pacer, [5, 6, 9, 8, 9, 10, 11, 12], confidence), NOISE, MANY)
    assert (outcome.finished, outcome.committed) == (True, 2)  # position 2 changed, position 3 is not certain


def test_a_plateau_ends_a_canvas() -> None:
    pacer = pacer_of(plateau_steps=2)
    accepted = [True] * 7 + [False]
    near, far = [0.99] * C, [0.9] * C
    for confidence, finished in ((near, False), (near, False), (far, False), (near, True)):
        outcome = pacer.absorb(step(pacer, list(range(2, 10)), confidence, accepted), NOISE, MANY)
        assert outcome.finished is finished
    other = pacer_of(plateau_steps=1)
    other.absorb(step(other, list(range(2, 10)), near, accepted), NOISE, MANY)
    assert not other.absorb(step(other, list(range(2, 10)), near, accepted[::-1]), NOISE, MANY).finished


def test_a_short_canvas_grows_when_the_answer_does_not_end_in_it() -> None:
    pacer = Pacer(random_model(), replace(NAMED, first_share=0.25, row_confidence=0.5), frozenset({END}))
    assert pacer.start_canvas(MANY) == 2
    outcome = pacer.absorb(step(pacer, [5, 6], [1, 1]), NOISE, MANY)
    assert not outcome.finished  # certain, but the answer goes on
    assert outcome.state.canvas.tolist() == [0, 1, *NOISE.tolist()[2:]]
    assert outcome.state.history.tolist() == [[-1] * C]
    assert not np.array(outcome.state.soft_embeddings[2:]).any()
    assert pacer.absorb(step(pacer, [5, 6, END, 9, 9, 9, 9, 9], [1] * C), NOISE, MANY).finished
    assert pacer.start_canvas(MANY) == C  # the next canvas is a whole one
    assert pacer.start_canvas(3) == 3  # as far as there is room


def test_what_is_remembered_fits_a_canvas_that_has_grown() -> None:
    rules = {"first_share": 0.25, "exit_confidence": 0.9, "plateau_steps": 1, "keep_confidence": 0.9}
    pacer = Pacer(random_model(), replace(NAMED, **rules), frozenset({END}))  # type: ignore[arg-type]
    pacer.start_canvas(MANY)
    pacer.absorb(step(pacer, [5, 6], [1, 0.5]), NOISE, MANY)
    assert pacer.pins(C) is None  # a short canvas is only looked at
    outcome = pacer.absorb(step(pacer, [5, 6, 7, 8, 9, 9, 9, END], [1] + [0.5] * 7), NOISE, MANY)
    assert (outcome.finished, outcome.committed) == (True, 1)  # an eighth, unchanged and certain


def test_a_short_canvas_ends_when_the_answer_does() -> None:
    pacer = Pacer(random_model(), replace(NAMED, first_share=0.25, row_confidence=0.5), frozenset({END}))
    pacer.start_canvas(MANY)
    assert pacer.absorb(step(pacer, [5, END], [1, 1]), NOISE, MANY).finished


@pytest.mark.parametrize(("wanted", "rows"), [(1, 32), (32, 32), (33, 64), (200, 224), (999, 256)])
def test_rows_are_multiples_of_an_eighth(wanted: int, rows: int) -> None:
    assert rows_of(256, wanted) == rows


def test_names() -> None:
    assert find_policy("balanced") is BALANCED
    assert list(POLICIES) == ["exact", "balanced", "fast"]
    assert replace(EXACT, name="") == Policy("")  # `exact` switches nothing on
    with pytest.raises(ValueError, match="policy: got 'quick', expected one of exact, balanced, fast"):
        find_policy("quick")


# -- in the loop ------------------------------------------------------------------------------------------------------

PROMPT = "What is 17 + 25?"


def test_rows_that_are_certain_are_not_computed_again(tiny: Pipeline) -> None:
    free = tiny.generate("Count to 40.", seed=1, policy=replace(FAST, freeze_confidence=None))
    result = tiny.generate("Count to 40.", seed=1, policy=FAST)
    assert result.text == free.text
    assert result.stats.denoising_steps == free.stats.denoising_steps
    assert result.stats.row_steps < 0.7 * free.stats.row_steps


@pytest.mark.parametrize("policy", ["balanced", "fast"])
def test_a_policy_gives_the_answer_with_less_work(tiny: Pipeline, policy: str) -> None:
    exact = tiny.generate(PROMPT, seed=3)
    result = tiny.generate(PROMPT, seed=3, policy=policy)
    assert result.text == exact.text
    assert (result.stats.policy, exact.stats.policy) == (policy, "exact")
    assert exact.stats.row_steps == tiny.config.canvas_length * sum(exact.stats.denoising_steps)
    assert result.stats.row_steps < 0.7 * exact.stats.row_steps


def test_a_long_answer_of_several_canvases(tiny: Pipeline) -> None:
    exact = tiny.generate("Count to 40.", seed=1)
    result = tiny.generate("Count to 40.", seed=1, policy="balanced")
    assert result.text == exact.text
    assert result.stats.canvases == exact.stats.canvases > 1


def test_policies_of_one_batch_do_not_touch_each_other(tiny: Pipeline) -> None:
    options = [{"seed": 1}, {"seed": 1, "policy": "balanced"}, {"seed": 1, "policy": "fast"}]
    alone = [tiny.generate("Count to 40.", **each) for each in options]
    together = tiny.generate_each([("Count to 40.", each) for each in options])
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]
    assert [result.stats.row_steps for result in together] == [result.stats.row_steps for result in alone]


def test_a_request_that_is_told_what_to_write_gets_the_exact_policy(tiny: Pipeline) -> None:
    for told in ({"choices": ["42", "43"]}, {"pins": {0: 50}}, {"logprobs": 0}, {"seed_canvas": [50]}):
        options = {"seed": 1, "max_tokens": 8, **told}
        result = tiny.generate(PROMPT, policy="fast", **options)
        assert result.stats.policy == "exact"
        assert result.token_ids == tiny.generate(PROMPT, **options).token_ids


@pytest.mark.parametrize(("policy", "second"), [(BALANCED, 1.0), (FAST, FAST.first_share + FAST.growth)])
def test_the_events_show_the_rows_of_the_canvas(tiny: Pipeline, policy: Policy, second: float) -> None:
    steps = [e for e in tiny.stream("Count to 40.", seed=1, policy=policy) if isinstance(e, DenoisingStep)]
    shares = [policy.first_share, second]
    assert [len(event.token_ids) for event in steps[:2]] == [int(s * tiny.config.canvas_length) for s in shares]
    assert all(len(event.token_ids) == len(event.accepted) == len(event.entropies) for event in steps)


def test_a_first_row_that_is_frozen_takes_its_ban_along(tiny: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may not end an answer is its first token, not the first one that is computed."""
    seen: list[tuple[bool, bool]] = []  # of every step: whether it computes the first row, whether it bans an end
    rules = Request.rules

    def looked_at(request: Request) -> StepRules:
        found = rules(request)
        assert request._pacer is not None
        seen.append((request._pacer.computes_first, bool(found.banned)))
        return found

    monkeypatch.setattr(Request, "rules", looked_at)
    tiny.generate("Count to 40.", seed=1, policy="fast", guard_empty=True, max_tokens=64)
    assert (True, True) in seen and (False, False) in seen and (False, True) not in seen


def test_an_event_says_how_many_rows_were_computed(tiny: Pipeline) -> None:
    *events, finished = tiny.stream("Count to 40.", seed=1, policy="fast")
    steps = [event for event in events if isinstance(event, DenoisingStep)]
    assert isinstance(finished, Finished)
    assert sum(step.rows for step in steps) == finished.result.stats.row_steps
    assert any(step.rows < len(step.token_ids) for step in steps)
    assert all(step.mean_entropy == pytest.approx(sum(step.entropies) / len(step.entropies)) for step in steps)


def test_wrong_names_are_refused(tiny: Pipeline) -> None:
    with pytest.raises(ValueError, match="policy: got 'quick'"):
        tiny.generate(PROMPT, policy="quick")
    for wrong in (7, ["fast"]):
        with pytest.raises(ValueError, match="policy: got"):
            tiny.generate(PROMPT, policy=wrong)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"row_confidence": 0}, "row_confidence: got 0, expected a number in"),
        ({"first_share": 1.5}, "first_share: got 1.5"),
        ({"next_share": 0}, "next_share: got 0"),
        ({"growth": -1}, "growth: got -1"),
        ({"freeze_confidence": 2}, "freeze_confidence: got 2"),
        ({"refresh_steps": 0}, "refresh_steps: got 0, expected an integer of at least 1"),
        ({"plateau_steps": 0}, "plateau_steps: got 0, expected an integer of at least 1"),
    ],
)
def test_rules_out_of_range_are_refused(rule: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(NAMED, **rule)  # type: ignore[arg-type]
