"""Which module gets how many bits, and why.

A recipe is a function from a part of the model to its quantisation. The parts are named once, in `PARTS`; of what no
row names (norms, scalars, the vision tower) only `auto` quantises something, the linear layers of the tower. Which
modules a checkpoint has quantised is in `quantization.py`, the packing itself in `conversion.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from .config import ConfigError

# What MLX's kernels take; the floating modes have one group size and one width each.
GROUP_SIZES = {"affine": (128, 64, 32), "mxfp4": (32,), "mxfp8": (32,), "nvfp4": (16,)}
BITS = {"affine": (2, 3, 4, 5, 6, 8), "mxfp4": (4,), "mxfp8": (8,), "nvfp4": (4,)}

# One row per part: (part, pattern of the module's path).
PARTS: tuple[tuple[str, str], ...] = (
    ("embedding", r"model\.decoder\.embed_tokens"),
    ("attention", r"model\.decoder\.layers\.\d+\.self_attn\.[qkvo]_proj"),
    ("dense MLP", r"model\.decoder\.layers\.\d+\.mlp\.(gate|up|down)_proj"),
    ("router", r"model\.decoder\.layers\.\d+\.router\.proj"),
    ("experts", r"model\.decoder\.layers\.\d+\.experts\.(gate_up|down)_proj"),
    ("self-conditioning", r"model\.decoder\.self_conditioning\.(gate|up|down)_proj"),
    ("vision projection", r"model\.encoder\.embed_vision\.embedding_projection"),
)
_COMPILED = tuple((part, re.compile(pattern)) for part, pattern in PARTS)
# Quantisation noise in these costs denoising steps, because the entropy bound then accepts less per step, and they are
# a small share of the bytes: the embedding is also the head and the soft embedding, attention and the dense MLP serve
# every token, and a router that errs sends a token to the wrong experts.
SENSITIVE = frozenset({"embedding", "attention", "dense MLP", "router"})


@dataclass(frozen=True)
class Quantization:
    """How the rows of one module are packed."""

    group_size: int
    bits: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in BITS:
            raise ConfigError(f"q-mode: got {self.mode!r}, expected one of {', '.join(BITS)}")
        if self.bits not in BITS[self.mode]:
            raise ConfigError(f"q-bits: got {self.bits}, expected {_one_of(BITS[self.mode])} for {self.mode}")
        if self.group_size not in GROUP_SIZES[self.mode]:
            expected = _one_of(GROUP_SIZES[self.mode])
            raise ConfigError(f"q-group-size: got {self.group_size}, expected {expected} for {self.mode}")

    def __str__(self) -> str:
        return f"{self.mode} {self.bits}, group {self.group_size}"

    def entry(self) -> dict[str, Any]:
        """Return the module's entry in a `quantization` block; affine is what an entry without `mode` means."""
        entry = asdict(self)
        if self.mode == "affine":
            del entry["mode"]
        return entry

    def fit(self, columns: int) -> Quantization | None:
        """Return this, or the same with the largest smaller group that divides `columns`; None when there is none."""
        for group_size in GROUP_SIZES[self.mode]:
            if group_size <= self.group_size and columns % group_size == 0:
                return Quantization(group_size, self.bits, self.mode)
        return None


Recipe = Callable[[str], Quantization | None]

AFFINE_8 = Quantization(64, 8)

_SIGHT = re.compile(
    r"model\.encoder\.(embed_vision\.embedding_projection"
    r"|vision_tower\.encoder\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.linear)"
)


def sight(path: str) -> Quantization | None:
    """Return what `auto` does to the linear layers that only pictures pass through: 8 bits, close to lossless.

    Its calibration has no pictures, so nothing says what fewer bits would cost there. The layer that embeds patches
    stays as it is: mlx-vlm casts pixels to the dtype of its weight, which packed is that of integers.
    """
    return AFFINE_8 if _SIGHT.fullmatch(path) else None


def part_of(path: str) -> str | None:
    """Return the part that a module belongs to; None for one that is never quantised."""
    return next((part for part, pattern in _COMPILED if pattern.fullmatch(path)), None)


def mixed(experts: Quantization) -> Recipe:
    """Return the recipe of the published conversions: `experts` for the bulk, affine 8-bit for the sensitive parts.

    The experts are 88 % of the weights and each token uses 8 of 128: few bits there make the model fit.
    """

    def recipe(path: str) -> Quantization | None:
        part = part_of(path)
        return None if part is None else AFFINE_8 if part in SENSITIVE else experts

    return recipe


def uniform(settings: Quantization) -> Recipe:
    """Return the recipe that treats all parts alike: the baseline that shows what the mixed recipes gain."""

    def recipe(path: str) -> Quantization | None:
        return None if part_of(path) is None else settings

    return recipe


def fixed(modules: Mapping[str, Quantization]) -> Recipe:
    """Return the recipe that has an answer for every module, such as a measured one."""
    return modules.get


class NamedRecipe(NamedTuple):
    """A recipe with its reasons."""

    recipe: Recipe
    default: Quantization  # what most modules get; it needs no entry in the `quantization` block
    why: str


def _uniform(bits: int) -> NamedRecipe:
    settings = Quantization(64, bits)
    return NamedRecipe(uniform(settings), settings, f"{bits} bits everywhere: the baseline for the mixed recipes")


def _mixed(settings: Quantization, why: str) -> NamedRecipe:
    return NamedRecipe(mixed(settings), settings, why)


RECIPES: dict[str, NamedRecipe] = {
    "4bit": _mixed(Quantization(64, 4), "the published 4-bit layout: fits 24 GB, sensitive parts at 8 bits"),
    "8bit": NamedRecipe(uniform(AFFINE_8), AFFINE_8, "nearly lossless, and often fewer denoising steps than 4 bits"),
    "mxfp4": _mixed(
        Quantization(32, 4, "mxfp4"), "the OCP format: a power-of-two scale per 32, the smallest at 4 bits"
    ),
    "nvfp4": _mixed(Quantization(16, 4, "nvfp4"), "an 8-bit scale per 16: follows outliers better than mxfp4"),
    "mxfp8": _mixed(
        Quantization(32, 8, "mxfp8"),
        "the OCP format with 8 bits: a scale per 32 and no bias, slightly smaller than 8bit",
    ),
} | {f"uniform-{bits}": _uniform(bits) for bits in BITS["affine"]}


def find_recipe(name: str) -> NamedRecipe:
    """Return a recipe. Raise `ConfigError` for an unknown name."""
    if name not in RECIPES:
        raise ConfigError(f"recipe: got {name!r}, expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


def quantization_block(default: Quantization, modules: Mapping[str, Quantization]) -> dict[str, Any]:
    """Return the `quantization` block of `config.json`: the default, and an entry for every module that differs."""
    overrides = {path: settings.entry() for path, settings in modules.items() if settings != default}
    return {**asdict(default), **overrides}


def _one_of(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(values) == 1 else "one of " + ", ".join(map(str, sorted(values)))
