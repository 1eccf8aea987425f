"""Pictures for `tiny`: coloured shapes and seven-segment digits on a light ground, drawn with Pillow.

A picture is described by numbers and drawn when it is needed, so that an example can be hashed and compared.
"""

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

SIDE = 96  # pixels: with patches of 4 and the budget of 70 soft tokens, a size that the processor leaves as it is
OVERSAMPLING = 3

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "blue": (40, 75, 215),
    "green": (35, 155, 60),
    "yellow": (240, 205, 30),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
COLOUR_NOISE, GROUND_NOISE = 20, 25

# The segments of a digit: ends as (x, y), the digit being 2 wide and 4 high.
SEGMENTS = {
    "top": ((-1, -2), (1, -2)),
    "upper left": ((-1, -2), (-1, 0)),
    "upper right": ((1, -2), (1, 0)),
    "middle": ((-1, 0), (1, 0)),
    "lower left": ((-1, 0), (-1, 2)),
    "lower right": ((1, 0), (1, 2)),
    "bottom": ((-1, 2), (1, 2)),
}
MISSING = {
    "0": ("middle",),
    "1": ("top", "upper left", "middle", "lower left", "bottom"),
    "2": ("upper left", "lower right"),
    "3": ("upper left", "lower left"),
    "4": ("top", "lower left", "bottom"),
    "5": ("upper right", "lower left"),
    "6": ("upper right",),
    "7": ("upper left", "middle", "lower left", "bottom"),
    "8": (),
    "9": ("lower left",),
}
STROKE = 0.22  # half the width of a digit's stroke, relative to half the digit's width


@dataclass(frozen=True)
class Mark:
    """One thing in a picture, in pixels: its centre, and half of its width."""

    what: str  # a shape or a digit
    colour: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    size: float

    @property
    def name(self) -> str:
        """Colour and shape, as questions and answers have them."""
        return f"{self.colour} {self.what}"


@dataclass(frozen=True)
class Picture:
    """What is in a picture, and on what ground."""

    marks: tuple[Mark, ...]
    ground: tuple[int, int, int]


def draw_mark(rng: Random, what: str, colour: str, x: float, y: float, size: float) -> Mark:
    """Make a mark in a shade of `colour`."""
    red, green, blue = (min(255, max(0, value + rng.randint(-COLOUR_NOISE, COLOUR_NOISE))) for value in COLOURS[colour])
    return Mark(what, colour, (red, green, blue), round(x, 1), round(y, 1), round(size, 1))


def draw_ground(rng: Random) -> tuple[int, int, int]:
    """Draw a colour near white."""
    return 255 - rng.randint(0, GROUND_NOISE), 255 - rng.randint(0, GROUND_NOISE), 255 - rng.randint(0, GROUND_NOISE)


def _shape_outline(mark: Mark) -> list[tuple[float, float]]:
    """Return the corners of a square, a triangle or a cross, relative to the centre."""
    s = mark.size
    if mark.what == "square":
        return [(-s, -s), (s, -s), (s, s), (-s, s)]
    if mark.what == "triangle":
        return [(0, -s), (s, s), (-s, s)]
    t = s / 3
    return [(-t, -s), (t, -s), (t, -t), (s, -t), (s, t), (t, t), (t, s), (-t, s), (-t, t), (-s, t), (-s, -t), (-t, -t)]


def paint(picture: Picture) -> Image.Image:
    """Draw a picture: RGB, `SIDE` by `SIDE`."""
    k = OVERSAMPLING
    image = Image.new("RGB", (SIDE * k, SIDE * k), picture.ground)
    pen = ImageDraw.Draw(image)
    for mark in picture.marks:
        x, y, size = mark.x * k, mark.y * k, mark.size * k
        if mark.what == "circle":
            pen.ellipse((x - size, y - size, x + size, y + size), fill=mark.rgb)
        elif mark.what in SHAPES:
            pen.polygon([(x + dx * k, y + dy * k) for dx, dy in _shape_outline(mark)], fill=mark.rgb)
        else:
            width = STROKE * size
            for name, ((x1, y1), (x2, y2)) in SEGMENTS.items():
                if name not in MISSING[mark.what]:
                    box = (x + x1 * size - width, y + y1 * size - width, x + x2 * size + width, y + y2 * size + width)
                    pen.rectangle(box, fill=mark.rgb)
    return image.reduce(k)
