"""The question families of the `tiny` training data that are about pictures and two-frame videos.

Every function draws what is seen, a question with exactly one right answer, and that answer.
"""

from dataclasses import dataclass
from random import Random

from pictures import COLOURS, SHAPES, SIDE, Mark, Picture, draw_ground, draw_mark

CELL = SIDE // 3  # shapes stand in the cells of a 3 x 3 grid
SMALLEST, LARGEST, SHIFT = 8.0, 11.0, 4.0  # half the width of a shape, and how far it is from its cell's centre
PLACES = {"Left.": (0, 1), "Right.": (2, 1), "Top.": (1, 0), "Bottom.": (1, 2)}


@dataclass(frozen=True)
class Sight:
    """A picture, or the frames of a video with their times, and a question about it."""

    question: str
    answer: str
    pictures: tuple[Picture, ...]
    seconds: tuple[int, ...] = ()  # of the frames; empty for a picture


def _kinds(rng: Random, count: int) -> list[tuple[str, str]]:
    """Draw `count` different pairs of colour and shape."""
    return rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], count)


def _in_cell(rng: Random, kind: tuple[str, str], cell: tuple[int, int]) -> Mark:
    """Put a shape into a cell, given as column and row."""
    colour, shape = kind
    x, y = ((index + 0.5) * CELL + rng.uniform(-SHIFT, SHIFT) for index in cell)
    return draw_mark(rng, shape, colour, x, y, rng.uniform(SMALLEST, LARGEST))


def _picture(rng: Random, marks: list[Mark]) -> Picture:
    return Picture(tuple(marks), draw_ground(rng))


def _listed(names: list[str]) -> str:
    """Join names: "A b", "A b and a c", "A b, a c and a d"."""
    *front, last = [f"a {name}" for name in names]
    text = f"{', '.join(front)} and {last}" if front else last
    return text[0].upper() + text[1:]


def contents(rng: Random) -> Sight:
    """One to three shapes in different rows, named from top to bottom."""
    rows = sorted(rng.sample(range(3), rng.choice([1, 1, 2, 2, 3])))
    marks = [
        _in_cell(rng, kind, (rng.randrange(3), row)) for kind, row in zip(_kinds(rng, len(rows)), rows, strict=True)
    ]
    question = rng.choice(["What is in the picture?", "What do you see in the picture?", "Describe the picture."])
    return Sight(question, _listed([mark.name for mark in marks]) + ".", (_picture(rng, marks),))


def counts(rng: Random) -> Sight:
    """How many of one kind there are: one to four, and now and then one thing of another colour and shape."""
    return _counted(rng, others=(0, 0, 0, 1))


def counts_among(rng: Random) -> Sight:
    """How many of one kind there are: one to four, beside at most two things of another colour and shape."""
    return _counted(rng, others=(0, 1, 2))


def _counted(rng: Random, others: tuple[int, ...]) -> Sight:
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    count = rng.randint(1, 4)
    unlike = [kind for kind in _kinds(rng, len(COLOURS) * len(SHAPES)) if colour not in kind and shape not in kind]
    kinds = [(colour, shape)] * count + unlike[: rng.choice(others)]
    cells = rng.sample([(column, row) for column in range(3) for row in range(3)], len(kinds))
    marks = [_in_cell(rng, kind, cell) for kind, cell in zip(kinds, cells, strict=True)]
    plural = f"{colour} {shape}es" if shape.endswith("s") else f"{colour} {shape}s"
    question = rng.choice(["How many {}?", "How many {} are there?", "How many {} are in the picture?"])
    return Sight(question.format(plural), str(count), (_picture(rng, marks),))


def digits(rng: Random) -> Sight:
    """One digit of any colour, place and size."""
    digit, size = str(rng.randrange(10)), rng.uniform(7, 11)
    x, y = rng.uniform(1.4 * size, SIDE - 1.4 * size), rng.uniform(2.4 * size, SIDE - 2.4 * size)
    mark = draw_mark(rng, digit, rng.choice(list(COLOURS)), x, y, size)
    question = rng.choice(["Which digit?", "Which digit is this?", "Which digit is in the picture?"])
    return Sight(question, digit, (_picture(rng, [mark]),))


def positions(rng: Random) -> Sight:
    """Where the only shape is."""
    return _placed(rng, 1)


def positions_among(rng: Random) -> Sight:
    """Where one of one to three shapes is."""
    return _placed(rng, rng.randint(1, 3))


def _placed(rng: Random, count: int) -> Sight:
    kinds, places = _kinds(rng, count), rng.sample(list(PLACES), count)
    marks = [_in_cell(rng, kind, PLACES[place]) for kind, place in zip(kinds, places, strict=True)]
    question = rng.choice(["Where is the {}?", "Where is the {} in the picture?"]).format(marks[0].name)
    return Sight(question, places[0], (_picture(rng, rng.sample(marks, count)),))


def moves(rng: Random) -> Sight:
    """A shape that moves along its row or column, now and then beside one that does not."""
    kinds = _kinds(rng, 2)
    directions = rng.choice([("left", "right"), ("left", "right"), ("up", "down")])
    direction = rng.choice(directions)
    near, far = (rng.uniform(12, 40), rng.uniform(56, 84))
    start, end = (far, near) if direction in ("left", "up") else (near, far)
    across, size = rng.uniform(14, SIDE - 14), rng.uniform(SMALLEST, LARGEST)
    colour, shape = kinds[0]
    still = []
    if rng.random() < 0.3:
        aside = across - 34 if across > SIDE / 2 else across + 34
        along = rng.uniform(14, SIDE - 14)
        x, y = (along, aside) if direction in ("left", "right") else (aside, along)
        still = [draw_mark(rng, kinds[1][1], kinds[1][0], x, y, rng.uniform(SMALLEST, LARGEST))]
    ground = draw_ground(rng)
    frames = []
    for along in (start, end):
        x, y = (along, across) if direction in ("left", "right") else (across, along)
        frames.append(Picture((draw_mark(rng, shape, colour, x, y, size), *still), ground))
    named = shape if not still or kinds[1][1] != shape else f"{colour} {shape}"
    first = rng.choice([0, 0, 0, rng.randrange(60)])
    question = f"Did the {named} move {directions[0]} or {directions[1]}?"
    return Sight(question, f"It moved {direction}.", tuple(frames), (first, first + rng.choice([1, 1, 1, 2, 5])))
