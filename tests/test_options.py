"""Options: defaults from the checkpoint only, and every range."""

from __future__ import annotations

import pytest
from small_model import GENERATION

from mlx_diffusiongemma.config import GenerationConfig
from mlx_diffusiongemma.options import resolve_options

DEFAULTS = GenerationConfig.from_dict(GENERATION)


def test_none_means_the_checkpoints_default() -> None:
    options = resolve_options(DEFAULTS, {"max_denoising_steps": None, "temperature": None, "seed": 3})
    assert (options.max_tokens, options.max_denoising_steps, options.entropy_bound) == (16, 6, 0.1)
    assert (options.temperature, options.seed) == (1.0, 3)


def test_one_stop_string_or_several() -> None:
    assert resolve_options(DEFAULTS, {"stop": "END"}).stop == ("END",)
    assert resolve_options(DEFAULTS, {"stop": ["a", "b"]}).stop == ("a", "b")


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match="unknown argument 'max_new_tokens'; expected one of confidence_threshold"):
        resolve_options(DEFAULTS, {"max_new_tokens": 3})


WRONG = [
    ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", True), ("seed", -1), ("seed", 2**64), ("seed", "7"),
    ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_p", 0), ("top_p", 1.1),
    ("top_k", -1), ("top_k", 2.5), ("min_p", -0.1), ("min_p", 1.1), ("max_denoising_steps", 0), ("entropy_bound", 0),
    ("t_min", -1), ("t_max", 0.3), ("confidence_threshold", 0), ("stability_threshold", -1), ("stop", ""),
    ("stop", [3]), ("prefill_step_size", 0), ("guard_empty", "no"), ("extra_eos_tokens", [True]),
    ("extra_eos_tokens", [1.5]), ("temperature", 1e-40), ("entropy_bound", 10**400), ("stability_threshold", 2**31),
    ("max_tokens", 10**12),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{n}={v}" for n, v in WRONG])
def test_wrong_value_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name}: got .*, expected"):
        resolve_options(DEFAULTS, {name: value})
