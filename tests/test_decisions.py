"""Typed decisions: what they read, against all logits of the model; a batch, an engine and one alone agree."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from small_model import bundled_checkpoint

from mlx_diffusiongemma.decisions import Decision, DecisionOptions, LabelPlan, decide, waves
from mlx_diffusiongemma.pipeline import Pipeline
from mlx_diffusiongemma.questions import Choice, Extract, Question, Score, YesNo
from mlx_diffusiongemma.scheduler import Engine
from mlx_diffusiongemma.tokenizer import Tokenizer

QUESTIONS: dict[str, Question] = {
    "greater": YesNo("Is 17 greater than 25?", answer="{}."),
    "city": Choice("Which city?", options=["Paris", "Rome", "New York", "New Delhi", "New"], answer="It is {}."),
    "much": Score("How much?", levels=range(8, 13), answer="{}"),
    "mood": Score("Mood?", levels={"low": "sad", "high": None}, answer="{}"),
}


@pytest.fixture(scope="module")
def pipeline(tiny_folder) -> Pipeline:
    return Pipeline(bundled_checkpoint(Tokenizer.load(tiny_folder)))


def full_logprobs(pipeline: Pipeline, prompt: list[dict], pins: Sequence[int], steps: int, seed: int) -> np.ndarray:
    """Return log-probabilities [C, V] at the last step of a canvas that begins with these tokens, from all logits."""
    seen = []
    options = {"pins": tuple(enumerate(pins)), "max_tokens": len(pins) + 1, "max_denoising_steps": steps, "seed": seed}
    pipeline.watched(lambda rows, rules, results: seen.append(results)).generate(prompt, ignore_eos=True, **options)
    model = pipeline.model
    logits = np.array(model.model.decoder.embed_tokens.as_linear(seen[-1][0].hidden).astype(mx.float32), np.float64)
    cap = model.config.text.final_logit_softcapping
    logits = cap * np.tanh(logits / cap)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def naive(pipeline: Pipeline, question, prompt: list[dict], steps: int = 1, seed: int = 0) -> np.ndarray:
    """Walk every answer token by token; compare each with what may follow there, one canvas at a time."""
    end = pipeline.tokenizer.special.turn_close
    answers = [[*pipeline.tokenizer.encode(question.worded(label)), end] for label in question.labels]
    scores = []
    for answer in answers:
        score = 0.0
        for place in range(len(answer)):
            rivals = {other[place] for other in answers if other[:place] == answer[:place]}
            if len(rivals) > 1:
                row = full_logprobs(pipeline, prompt, answer[:place], steps, seed)[place]
                score += row[answer[place]] - np.log(np.exp(row[sorted(rivals)]).sum())
        scores.append(score)
    return np.exp(scores)


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("forwards", [1, 3])
def test_probabilities_are_those_of_all_logits(pipeline: Pipeline, name: str, forwards: int) -> None:
    question = QUESTIONS[name]
    decision = decide(pipeline, question, "go", forwards=forwards, seed=5)
    prompt = [{"role": "user", "content": f"go\n\n{question.text}"}]
    expected = naive(pipeline, question, prompt, forwards, 5)
    np.testing.assert_allclose(list(decision.probabilities.values()), expected, rtol=1e-4)
    assert math.isclose(sum(decision.probabilities.values()), 1)
    best = int(np.argmax(expected))
    assert (decision.value, decision.probability) == (question.values[best], max(decision.probabilities.values()))
    assert list(decision.probabilities) == list(question.labels)
    assert decision.forwards <= forwards


def test_rows_are_branches_of_the_labels(pipeline: Pipeline) -> None:
    decisions = decide(pipeline, QUESTIONS, "go")
    # New | Paris | Rome, then York | Delhi | the end behind "New"; 8 | 9 | 1, then 0 | 1 | 2.
    assert [each.rows for each in decisions.values()] == [1, 2, 2, 1]
    assert all(len(each.stats) == each.rows and each.forwards == 1 for each in decisions.values())


def test_questions_together_are_as_alone(pipeline: Pipeline) -> None:
    together = decide(pipeline, QUESTIONS, {"message": "go"})
    alone = {name: decide(pipeline, question, {"message": "go"}) for name, question in QUESTIONS.items()}
    assert [numbers(each) for each in together.values()] == [numbers(each) for each in alone.values()]


def numbers(decision: Decision) -> tuple:
    return decision.value, decision.logprobs, decision.forwards, decision.rows


def test_an_engine_decides_as_a_pipeline_does(pipeline: Pipeline, tiny_folder) -> None:
    expected = decide(pipeline, QUESTIONS, "go", forwards=2)
    with Engine(lambda: Pipeline(bundled_checkpoint(Tokenizer.load(tiny_folder)))) as engine:
        got = decide(engine, QUESTIONS, "go", forwards=2)
        stats = engine.stats()
    assert [numbers(each) for each in got.values()] == [numbers(each) for each in expected.values()]
    assert stats.counts.rows == sum(sum(s.denoising_steps) for each in got.values() for s in each.stats)
    assert stats.counts.steps < stats.counts.rows, "rows share steps"
    first, second = got["city"].stats
    assert second.cached_tokens == second.prompt_tokens == first.prompt_tokens, "a prompt is encoded once"


def test_calibration_divides_logarithms(pipeline: Pipeline) -> None:
    question = QUESTIONS["city"]
    plain = decide(pipeline, question, "go")
    flat = decide(pipeline, question, "go", calibration_temperature=2.5)
    weights = np.array(list(plain.probabilities.values())) ** (1 / 2.5)
    np.testing.assert_allclose(list(flat.probabilities.values()), weights / weights.sum(), rtol=1e-9)
    assert flat.value == plain.value and flat.logprobs == plain.logprobs


def test_a_state_without_content_takes_its_likes_away(pipeline: Pipeline) -> None:
    question = QUESTIONS["much"]
    plain, bias = decide(pipeline, question, "go"), decide(pipeline, question, "N/A")
    fair = decide(pipeline, question, "go", content_free="N/A")
    weights = np.array(list(plain.probabilities.values())) / np.array(list(bias.probabilities.values()))
    np.testing.assert_allclose(list(fair.probabilities.values()), weights / weights.sum(), rtol=1e-9)
    assert fair.rows == plain.rows + bias.rows
    same = decide(pipeline, question, "go", content_free="go")
    np.testing.assert_allclose(list(same.probabilities.values()), 1 / 5, rtol=1e-9)


def test_reads_are_averaged(pipeline: Pipeline) -> None:
    question = QUESTIONS["city"]
    each = [decide(pipeline, question, "go", seed=seed) for seed in (5, 6, 7)]
    mean = np.mean([list(decision.probabilities.values()) for decision in each], axis=0)
    together = decide(pipeline, question, "go", seed=5, reads=3)
    np.testing.assert_allclose(list(together.probabilities.values()), mean, rtol=1e-9)
    assert together.rows == 6 and len({decision.logprobs for decision in each}) == 3


def test_expected_values(pipeline: Pipeline) -> None:
    decisions = decide(pipeline, QUESTIONS, "go")
    assert decisions["greater"].expected == pytest.approx(decisions["greater"].probabilities["Yes"])
    much = decisions["much"]
    assert much.expected == pytest.approx(sum(int(k) * p for k, p in much.probabilities.items()))
    assert decisions["mood"].expected == pytest.approx(decisions["mood"].probabilities["high"])
    with pytest.raises(ValueError, match="got a decision of kind choice, expected yes_no or score"):
        _ = decisions["city"].expected


def test_an_end_token_in_the_slot_does_not_hide_it(pipeline: Pipeline) -> None:
    plan = LabelPlan(pipeline.tokenizer, QUESTIONS["greater"], "go", DecisionOptions())
    assert plan.asks[0].options["ignore_eos"]
    end = pipeline.generation_config.eos_token_ids[0]
    options = {"max_tokens": 4, "pins": {1: end, 3: end}, "seed": 3}
    assert pipeline.generate("go", **options).finish_reason == "stop"
    whole = pipeline.generate("go", ignore_eos=True, **options)
    assert (len(whole.token_ids), whole.token_ids[1], whole.finish_reason) == (4, end, "length")
    with pytest.raises(ValueError, match="ignore_eos: got 1, expected True or False"):
        pipeline.generate("go", ignore_eos=1)


def test_the_first_row_of_every_prompt_goes_first(pipeline: Pipeline) -> None:
    tokenizer, options = pipeline.tokenizer, DecisionOptions(reads=2)
    asks = [ask for q in QUESTIONS.values() for ask in LabelPlan(tokenizer, q, "go", options).asks]
    assert len(asks) == 12  # of 1, 2, 2 and 1 slots
    assert waves(asks, 64, 4) == [[0, 2, 6, 10], [1, 3, 4, 5, 7, 8, 9, 11]]
    state = [{"role": "system", "content": "go"}]
    asks = [ask for q in QUESTIONS.values() for ask in LabelPlan(tokenizer, q, state, DecisionOptions()).asks]
    assert waves(asks, 64, 4) == [[0], [1, 3, 5], [2, 4]]


def test_waves_are_no_longer_than_the_queue(pipeline: Pipeline) -> None:
    tokenizer, options = pipeline.tokenizer, DecisionOptions(reads=2)
    asks = [ask for q in QUESTIONS.values() for ask in LabelPlan(tokenizer, q, "go", options).asks]
    assert waves(asks, 3, 4) == [[0, 2, 6], [10], [1, 3, 4], [5, 7, 8], [9, 11]]


def test_extraction_reads_what_the_canvas_says(pipeline: Pipeline) -> None:
    question = Extract("Who?", answer="It is {}", max_tokens=4)
    decision = decide(pipeline, question, "go", forwards=2, seed=3)
    prompt = [{"role": "user", "content": "go\n\nWho?"}]
    before = pipeline.tokenizer.encode("It is")
    options = {"pins": tuple(enumerate(before)), "max_tokens": len(before) + 5, "max_denoising_steps": 2, "seed": 3}
    result = pipeline.generate(prompt, logprobs=0, **options)
    ids = result.token_ids[len(before) :]
    assert decision.value == pipeline.tokenizer.detokenize(ids).strip()
    product = math.exp(sum(each.logprob for each in result.logprobs[len(before) :]))
    assert decision.probability == pytest.approx(product)
    assert decision.rows == 1 and decision.kind == "text"


def test_a_conversation_is_a_state(pipeline: Pipeline) -> None:
    question = YesNo("Is that right?", show_options=False)
    text = decide(pipeline, question, "go").logprobs
    assert decide(pipeline, question, [{"role": "user", "content": "go"}]).logprobs == text
    parts = [{"role": "user", "content": [{"type": "text", "text": "go"}]}]
    assert decide(pipeline, question, parts).logprobs == text
    assert decide(pipeline, YesNo(show_options=False), "go\n\nIs that right?").logprobs == text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"forwards": 5}, ValueError, "forwards: got 5, expected an integer <= 4"),
        ({"forwards": 0}, ValueError, "forwards: got 0, expected an integer >= 1"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"reads": 0}, ValueError, "reads: got 0, expected an integer >= 1"),
        ({"calibration_temperature": 0}, ValueError, "calibration_temperature: got 0"),
        ({"content_free": " "}, ValueError, "content_free: got ' ', expected text that is not blank"),
        ({"warmth": 1}, TypeError, "unknown argument 'warmth'"),
    ],
)
def test_impossible_options_are_refused(pipeline: Pipeline, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        decide(pipeline, QUESTIONS["greater"], "go", **options)


def test_impossible_questions_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="questions: got none, expected at least one"):
        decide(pipeline, {}, "go")
    with pytest.raises(ValueError, match="questions: got str, expected YesNo, Choice, Score or Extract"):
        decide(pipeline, "Is it?", "go")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the question is empty: got neither a state nor instructions"):
        decide(pipeline, Choice(options=["a", "b"], show_options=False))
    with pytest.raises(ValueError, match="state: got object, expected text, messages or JSON data"):
        decide(pipeline, QUESTIONS["greater"], object())


def test_the_example_of_the_document_prints_what_it_says() -> None:
    text = (Path(__file__).parents[1] / "docs" / "control.md").read_text(encoding="utf-8")
    code, printed = re.search(
        r"## Typed decisions.*?```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", text, re.S
    ).groups()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    assert out.getvalue() == printed


def test_a_system_message_is_encoded_once_for_all_questions(pipeline: Pipeline, tiny_folder) -> None:
    state = [{"role": "system", "content": "one two three four five six seven"}]
    with Engine(lambda: Pipeline(bundled_checkpoint(Tokenizer.load(tiny_folder)))) as engine:
        for runner in (pipeline.with_model(pipeline.model), engine):
            decisions = list(decide(runner, QUESTIONS, state).values())
            assert decisions[0].stats[0].cached_tokens == 0
            assert all(0 < each.stats[0].cached_tokens < each.stats[0].prompt_tokens for each in decisions[1:])
            assert decisions[1].stats[1].cached_tokens == decisions[1].stats[1].prompt_tokens, "rows of one question"
