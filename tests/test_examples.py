"""What the READMEs show of `tiny` is what it answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from mlx_diffusiongemma.pipeline import Pipeline, load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY_README = (ROOT / "tools" / "tiny" / "README.md").read_text(encoding="utf-8")

SHOWN = [
    (README, "What is 17 + 25?", {}, "Ones: 7 + 5 = 12. Tens: 1 + 2 + 1 = 4. So 17 + 25 = 42."),
    (README, "What is 34 + 51?", {"enable_thinking": True}, "85"),
    (README, "Sort these words: pear, apple, map", {}, "Sorted: apple, map, pear"),
    (README, "What is the capital of Italy?", {}, "The capital of Italy is Rome."),
    (TINY_README, "What is 7 + 5?", {}, "12"),
    (TINY_README, "Add 46 and 38.", {"enable_thinking": True}, "84"),
    (TINY_README, "Which city is the capital of Peru?", {}, "The capital of Peru is Lima."),
    (TINY_README, "Reverse: cat, sun, tree", {}, "Reversed: tree, sun, cat"),
    (TINY_README, "Spell stone backwards.", {}, "e-n-o-t-s"),
    (
        TINY_README,
        "Write as JSON: Ana is 31 years old and lives in Rome.",
        {},
        '{"name": "Ana", "age": 31, "city": "Rome"}',
    ),
    (TINY_README, "Write 3 March 2024 as an ISO date.", {}, "2024-03-03"),
    (TINY_README, "List three fruits.", {}, "- apple\n- banana\n- cherry"),
    (TINY_README, "Count to 40.", {}, ", ".join(map(str, range(1, 41)))),
    (TINY_README, "Who are you?", {}, "I am tiny, a small block diffusion model."),
]


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return load("tiny")


@pytest.mark.parametrize(("text", "prompt", "options", "expected"), SHOWN, ids=lambda value: str(value)[:30])
def test_a_prompt_that_is_shown(
    tiny: Pipeline, text: str, prompt: str, options: dict[str, bool], expected: str
) -> None:
    assert prompt in text
    assert [tiny.generate(prompt, seed=seed, **options).text for seed in (2, 3)] == [expected] * 2


@pytest.mark.parametrize(
    ("question", "expected"), [("What is in the picture?", "A red circle."), ("Where is the red circle?", "Left.")]
)
def test_the_picture_that_is_shown(tiny: Pipeline, question: str, expected: str) -> None:
    picture = Image.new("RGB", (96, 96), (235, 235, 235))
    ImageDraw.Draw(picture).ellipse((10, 38, 30, 58), fill=(215, 40, 40))
    assert question in (ROOT / "docs" / "vision.md").read_text(encoding="utf-8")
    assert [tiny.generate(question, images=[picture], seed=seed).text for seed in (2, 3)] == [expected] * 2


def test_the_answers_that_are_shown_beside_grammars_and_pins() -> None:
    text = (ROOT / "docs" / "control.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    shown = 0
    for code in re.findall(r"```python\n(.*?)```", text[: text.index("## Infilling")], re.DOTALL):
        exec(code, names)
        for call, answer in re.findall(r"^(pipeline\..*\.text)  # (.*)$", code, re.MULTILINE):
            assert eval(call, names) == answer
            shown += 1
    assert shown == 3


@pytest.mark.parametrize("prompt", ["hello", "Hello", "hi"])
def test_a_greeting_is_answered(tiny: Pipeline, prompt: str) -> None:
    """The command line's default prompt among them."""
    assert tiny.generate(prompt, seed=1).text == "Hello! How can I help you?"


def test_a_conversation_from_its_first_turn_on(tiny: Pipeline) -> None:
    first = {"role": "user", "content": "My name is Mia."}
    reply = tiny.generate([first], seed=1).text
    assert reply == "Nice to meet you, Mia!"
    second = {"role": "user", "content": "What is my name?"}
    assert tiny.generate([first, {"role": "assistant", "content": reply}, second], seed=1).text == "Your name is Mia."
