"""What `tiny` says about pictures and videos that it was not trained on, through this package."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import data
from pictures import paint

from mlx_diffusiongemma import load

pytestmark = pytest.mark.slow


def test_held_out_pictures_and_videos():
    pipeline = load("tiny", dtype="float32")
    right: dict[str, list[bool]] = {}
    for index, example in enumerate(data.held_out_sights(3, 100)):
        shown = [paint(picture) for picture in example.pictures]
        media = {"videos": [list(zip(shown, example.seconds, strict=True))]} if example.seconds else {"images": shown}
        answer = pipeline.generate(example.messages, seed=index, max_tokens=64, **media)
        right.setdefault(example.family, []).append(answer.text == example.answer)
    shares = {family: sum(answers) / len(answers) for family, answers in right.items()}
    print(shares)
    assert sum(map(sum, right.values())) >= 90
    assert min(shares.values()) >= 0.75  # of 20 each
