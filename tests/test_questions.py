"""Questions, slots and calibration: text, trees and arithmetic, with answers worked out by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from mlx_diffusiongemma.calibration import (
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    normalise,
)
from mlx_diffusiongemma.questions import Choice, Extract, Question, Score, YesNo, messages_for
from mlx_diffusiongemma.slots import Slot, answer_logprobs, make_slots


@pytest.mark.parametrize(
    ("question", "text"),
    [
        (YesNo("Is 2 even?"), "Is 2 even? Answer yes or no."),
        (YesNo("Is 2 even?", show_options=False), "Is 2 even?"),
        (YesNo("Wahr?", yes="Ja", no="Nein"), "Wahr? Answer ja or nein."),
        (YesNo("Spam?", criteria=("an advert", None)), "Spam? Answer yes or no.\nYes: an advert"),
        (YesNo(criteria=("an advert", "a letter"), show_options=False), "Yes: an advert\nNo: a letter"),
        (Choice("Team?", options=["a", "b"]), "Team?\nAnswer with exactly one of these:\n- a\n- b"),
        (Choice("Team?", options={"a": "money", "b": None}, show_options=False),
         "Team?\nAnswer with exactly one of these:\n- a: money\n- b"),
        (Choice("Team?", options=["a", "b"], show_options=False), "Team?"),
        (Score("How bad?", levels=range(1, 6)), "How bad? Answer with a number from 1 to 5."),
        (Score("How bad?", levels=["low", "high"]),
         "How bad?\nAnswer with exactly one of these, from low to high:\n- low\n- high"),
        (Extract("Who?"), "Who?"),
    ],
)  # fmt: skip
def test_how_a_question_is_asked(question: Question, text: str) -> None:
    assert question.text == text


def test_labels_and_values() -> None:
    assert YesNo("?").labels == ("Yes", "No") and YesNo("?").values == (True, False)
    assert Score("?", levels=range(3, 6)).values == (3, 4, 5) and Score("?", levels=range(3, 6)).labels[0] == "3"
    assert Score("?", levels={"low": None, "high": None}).values == (0, 1)
    assert Choice("?", options={"a": None, "b": "x"}).values == ("a", "b")
    assert Choice("?", options=["a", "b"], answer="It is {}.").worded("{}") == "It is {}."


def test_where_a_question_stands() -> None:
    question = Extract("Who?")
    assert messages_for("Tom sang.", question) == [{"role": "user", "content": "Tom sang.\n\nWho?"}]
    assert messages_for(None, question) == [{"role": "user", "content": "Who?"}]
    assert messages_for({"a": "ä"}, question)[0]["content"] == '{"a": "ä"}\n\nWho?'
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert messages_for(said, question) == [*said, {"role": "user", "content": "Who?"}]
    assert messages_for(said[:1], question) == [{"role": "user", "content": "Hi\n\nWho?"}]
    assert messages_for(said, Extract()) == said
    image = {"role": "user", "content": [{"type": "image"}]}
    assert messages_for([image], question)[0]["content"] == [{"type": "image"}, {"type": "text", "text": "Who?"}]
    assert messages_for([{"role": "customer", "content": "Hi"}], Extract())[0]["content"].startswith('[{"role"')
    assert image == {"role": "user", "content": [{"type": "image"}]}, "what was given is left as it is"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Choice(options=["a"]), "options: got 1, expected 2 to 255 labels"),
        (lambda: Choice(options=[str(i) for i in range(256)]), "options: got 256, expected 2 to 255 labels"),
        (lambda: Choice(options="ab"), "options: got 'ab', expected a list of labels"),
        (lambda: Choice(options=["a", " "]), "options: got ' ', expected text that is not blank"),
        (lambda: Choice(options=["a", "a"]), "options: got a label twice"),
        (lambda: Choice(options={"a": 1, "b": None}), "options: got the description 1, expected text"),
        (lambda: Score(levels=range(1)), "levels: got 1, expected 2 to 255 labels"),
        (lambda: YesNo(criteria=("a",)), r"criteria: got \('a',\), expected a pair of texts"),
        (lambda: YesNo(yes="No"), "yes and no: got a label twice"),
        (lambda: YesNo(answer="Yes"), "answer: got 'Yes', expected text with one {} in it"),
        (lambda: YesNo(instructions=3), "instructions: got 3, expected text"),
        (lambda: YesNo(show_options=1), "show_options: got 1, expected True or False"),
        (lambda: Extract(max_tokens=0), "max_tokens: got 0, expected an integer >= 1"),
        (lambda: Extract(max_tokens=65), "max_tokens: got 65, expected an integer <= 64"),
    ],
)
def test_questions_that_cannot_be(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_slots_of_a_tree() -> None:
    answers = [[5, 1, 9], [5, 2, 9], [5, 3, 7, 9], [5, 3, 8, 9]]
    slots = make_slots(answers)
    assert slots == (Slot((5,), (1, 2, 3)), Slot((5, 3), (7, 8)))
    readings = [[math.log(0.1), math.log(0.2), math.log(0.5)], [math.log(0.03), math.log(0.01)]]
    chances = np.exp(answer_logprobs(answers, slots, readings))
    np.testing.assert_allclose(chances, [1 / 8, 2 / 8, 5 / 8 * 3 / 4, 5 / 8 * 1 / 4], rtol=1e-12)
    assert slots[1].options["pins"] == ((0, 5), (1, 3)) and slots[1].options["max_tokens"] == 3


def test_probabilities_of_random_trees_sum_to_one() -> None:
    rng = random.Random(0)
    for _ in range(50):
        answers = {tuple(rng.choices(range(1, 4), k=rng.randint(1, 5))) for _ in range(rng.randint(2, 12))}
        ends = [[*answer, 0] for answer in sorted(answers)]
        if len(ends) < 2:
            continue
        slots = make_slots(ends)
        assert len(slots) < len(ends)
        readings = [[-rng.random() * 9 for _ in slot.candidates] for slot in slots]
        assert math.isclose(sum(np.exp(answer_logprobs(ends, slots, readings))), 1)


@pytest.mark.parametrize("answers", [[[1, 2], [1, 2]], [[1, 2], [1]], [[1], [1, 2]]])
def test_answers_that_no_slot_tells_apart(answers: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="twice or at the beginning of another"):
        make_slots(answers)


def test_probabilities_at_a_temperature() -> None:
    logs = [math.log(0.8), math.log(0.2)]
    assert normalise(logs) == pytest.approx([0.8, 0.2])
    assert normalise(logs, 2) == pytest.approx([2 / 3, 1 / 3])  # square roots: 2 to 1
    assert normalise([-1e4, -2e4]) == [1, 0]


def test_calibration_error_by_hand() -> None:
    # Bin 0.9-1: three answers of mean 0.95, two right; bin 0.5-0.6: one of 0.55, right.
    error = expected_calibration_error([0.94, 0.95, 0.96, 0.55], [True, True, False, True])
    assert error == pytest.approx((3 * abs(0.95 - 2 / 3) + abs(0.55 - 1)) / 4)
    assert expected_calibration_error([1.0], [True]) == 0
    with pytest.raises(ValueError, match="got 0 confidences and 0 answers"):
        expected_calibration_error([], [])


def test_the_temperature_that_made_the_answers_is_found() -> None:
    rng = np.random.default_rng(0)
    logs = rng.normal(size=(4000, 3)) * 4
    for temperature in (0.5, 3.0):
        chances = np.array([normalise(row, temperature) for row in logs.tolist()])
        right = [int(rng.choice(3, p=row)) for row in chances]
        found = fit_temperature(logs.tolist(), right)
        assert found == pytest.approx(temperature, rel=0.1)
        grid = np.exp(np.linspace(math.log(0.2), math.log(10), 81))
        best = min(grid, key=lambda each: negative_log_likelihood(logs.tolist(), right, each))
        assert found == pytest.approx(best, rel=0.06)
    with pytest.raises(ValueError, match="got 1 decisions and 2 answers"):
        fit_temperature([[0.0, 1.0]], [0, 1])


@pytest.mark.parametrize("content", [5, None, []])
def test_content_that_is_none_is_left_to_the_prompt_to_refuse(content: object) -> None:
    said = [{"role": "user", "content": content}]
    assert messages_for(said, Extract("Who?")) == [*said, {"role": "user", "content": "Who?"}]
