"""What a request may put on the canvas before the model does: vLLM's `diffusion_seed_canvas` and `diffusion_pinned`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import refuse, short

CANVAS_NAMES = ("seed_canvas", "pinned")
SEED, PINNED = (f"diffusion_{name}" for name in CANVAS_NAMES)


def canvas_options(seed: list[int] | None, pinned: list[int] | None, xargs: dict[str, Any]) -> dict[str, Any]:
    """Return the options `seed_canvas` and `pins`, from the fields or, taken out of it, from `vllm_xargs`.

    Args:
        seed: token ids, one for every position of the canvas.
        pinned: positions whose token stays.
        xargs: what may have the same under the same names, where the fields have none.

    Raises:
        ApiError: positions without a seed canvas, or outside of it.
    """
    inner_seed, inner_pinned = xargs.pop(SEED, None), xargs.pop(PINNED, None)
    seed = _integers(f"vllm_xargs.{SEED}", inner_seed) if seed is None else seed
    pinned = _integers(f"vllm_xargs.{PINNED}", inner_pinned) if pinned is None else pinned
    if seed is None:
        if pinned:
            raise refuse(PINNED, f"got positions without a {SEED}, expected one: their tokens stand there")
        return {}
    if wrong := [place for place in pinned or () if not 0 <= place < len(seed)]:
        raise refuse(PINNED, f"got position {wrong[0]}, expected 0 to {len(seed) - 1}")
    return {"seed_canvas": seed, "pins": {place: seed[place] for place in pinned or ()}}


def _integers(name: str, value: Any) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(each, int) and not isinstance(each, bool) for each in value):
        raise refuse(name, f"got {short(value)}, expected a list of integers")
    return value


def fit_canvas(options: Mapping[str, Any], canvas_length: int, vocab_size: int) -> dict[str, Any]:
    """Cut a seed canvas and pins where the answer is cut. Raise `ApiError` for a seed canvas that is none.

    An answer of fewer tokens still has a whole canvas; nobody reads what stands behind them.
    """
    seed, pins = options.get("seed_canvas"), options.get("pins")
    if not isinstance(pins, Mapping) or seed is None:
        return dict(options)
    if len(seed) != canvas_length:
        raise refuse(SEED, f"got {len(seed)} tokens, expected as many as a canvas has, {canvas_length}")
    if wrong := [token_id for token_id in seed if not 0 <= token_id < vocab_size]:
        raise refuse(SEED, f"got token id {wrong[0]}, expected 0 to {vocab_size - 1}")
    limit = options["max_tokens"]
    kept = {place: token_id for place, token_id in pins.items() if place < limit}
    return {**options, "seed_canvas": seed[:limit], "pins": kept}
