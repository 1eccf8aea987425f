"""Quick tests of the pictures of `tiny` and of the questions about them: `pytest tools/tiny`."""

import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import data
import pictures

FAMILIES = list(data.SIGHTS)


def some(family, count):
    """Draw examples of a family."""
    rng = Random(f"test/{family}")
    return [data.draw(rng, family) for _ in range(count)]


def question(example):
    """Return the text of the last message."""
    return "".join(part.get("text", "") for part in example.messages[-1]["content"])


def test_training_never_sees_held_out_sights():
    weights = dict.fromkeys(FAMILIES, 1.0)
    batch = [e for step in range(50) for e in data.training_batch(0, step, 20, weights)]
    assert not any(example.held_out for example in batch)
    held_out = list(data.held_out_sights(1, 100))
    assert all(example.held_out for example in held_out)
    assert not {e.key for e in batch} & {e.key for e in held_out}
    assert {e.family for e in batch} == set(FAMILIES)
    assert {e.family for e in held_out} == set(FAMILIES) - data.TRAINED_ONLY


def test_sights_depend_on_seed_and_step_only():
    drawn = [data.training_batch(seed, step, 8, data.SIGHT_WEIGHTS) for seed, step in ((3, 7), (3, 7), (3, 8))]
    assert drawn[0] == drawn[1] != drawn[2]


def test_contents_are_named_from_top_to_bottom():
    for example in some("picture_contents", 200):
        names = [mark.name for mark in sorted(example.pictures[0].marks, key=lambda mark: mark.y)]
        answer = example.answer.lower().removesuffix(".").replace(" and ", ", ").split(", ")
        assert answer == [f"a {name}" for name in names]


@pytest.mark.parametrize("family", ["picture_counts", "picture_counts_among"])
def test_counts_are_right(family):
    answers = set()
    for example in some(family, 300):
        asked = [n for n in question(example).replace("crosses", "crosss").split() if n.rstrip("?") in pictures.COLOURS]
        name = question(example).replace("crosses", "crosss").split(asked[0] + " ")[1].split()[0].rstrip("?")[:-1]
        marks = example.pictures[0].marks
        assert example.answer == str(sum(mark.name == f"{asked[0]} {name}" for mark in marks))
        assert marks
        answers.add(example.answer)
    assert answers == set("1234")


def test_digits_are_the_ones_drawn():
    for example in some("picture_digits", 50):
        assert [mark.what for mark in example.pictures[0].marks] == [example.answer]


@pytest.mark.parametrize("family", ["picture_positions", "picture_positions_among"])
def test_positions_are_right_and_unambiguous(family):
    for example in some(family, 200):
        marks = [mark for mark in example.pictures[0].marks if mark.name in question(example)]
        assert len(marks) == 1
        dx, dy = marks[0].x - pictures.SIDE / 2, marks[0].y - pictures.SIDE / 2
        across = {True: "Right.", False: "Left."}[dx > 0]
        down = {True: "Bottom.", False: "Top."}[dy > 0]
        assert example.answer == (across if abs(dx) > abs(dy) else down)
        assert abs(abs(dx) - abs(dy)) > 15


def test_moves_are_right():
    answers = set()
    for example in some("video_moves", 200):
        first, second = example.pictures
        dx, dy = second.marks[0].x - first.marks[0].x, second.marks[0].y - first.marks[0].y
        assert (dx == 0) != (dy == 0)
        expected = ("right" if dx > 0 else "left") if dx else ("down" if dy > 0 else "up")
        assert example.answer == f"It moved {expected}." and expected in question(example)
        assert first.marks[0].what in question(example)
        assert len(first.marks) == 1 or first.marks[1] == second.marks[1]
        assert 0 <= example.seconds[0] < example.seconds[1]
        answers.add(expected)
    assert answers == {"left", "right", "up", "down"}


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_cut_off_or_covered(family):
    for example in some(family, 100):
        for picture in example.pictures:
            image = np.asarray(pictures.paint(picture)).astype(int)
            edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
            assert np.abs(edge - picture.ground).max() < 100  # a triangle may touch the lower edge
            for mark in picture.marks:
                if mark.what in pictures.SHAPES:
                    assert (image[round(mark.y), round(mark.x)] == mark.rgb).all()


def test_all_digits_look_different():
    def look(digit):
        mark = pictures.Mark(digit, "black", (0, 0, 0), 48.0, 48.0, 12.0)
        return np.asarray(pictures.paint(pictures.Picture((mark,), (255, 255, 255)))).tobytes()

    assert len({look(digit) for digit in "0123456789"}) == 10
