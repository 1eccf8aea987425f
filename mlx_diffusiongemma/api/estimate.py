"""How much memory a server needs, said before anything is loaded: on one machine, and on each of several ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..cache import kv_quantization
from ..checkpoint import find_folder
from ..config import ModelConfig, load_configs
from ..memory import MemoryPlan, Wanted, limit_bytes, plan_memory, stored_tokens
from ..sharding import Division, largest_part
from .settings import Settings

PROMPTS = (1024, 8192, 32768)  # tokens
RANKS = (1, 2, 4)


def estimate(settings: Settings, sizes: Sequence[int] = RANKS) -> dict[str, Any]:
    """Return bytes for weights, and for one request of several lengths with an answer of `max_tokens`.

    Args:
        settings: of the server.
        sizes: numbers of ranks; `ranks` in the result has the part of the first rank of each, which is the largest.

    Raises:
        ValueError: no such checkpoint, or one that cannot be read.
    """
    options = settings.load_options
    folder = find_folder(settings.model, options.get("revision"))
    config, _ = load_configs(folder)
    kv = kv_quantization(options.get("kv_bits"), options.get("kv_group_size"))
    limit = limit_bytes(options.get("memory_limit"))
    plan = partial(plan_memory, kv=kv, on_cpu=mx.default_device() == mx.Device(mx.cpu))

    def needs(part: ModelConfig, weights: int) -> dict[str, Any]:
        return {
            "weights": weights,
            "requests": list(_requests(settings.max_tokens, part, partial(plan, part, weights), limit)),
        }

    whole = needs(config, sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    ranks = [{"ranks": size, **_part(folder, config, size, needs)} for size in sizes]
    return {"event": "estimate", "model": settings.model, "limit": limit, **whole, "ranks": ranks}


def _requests(
    max_tokens: int, config: ModelConfig, plan: Callable[[list[int]], MemoryPlan], limit: int
) -> Iterator[Any]:
    context = config.text.max_position_embeddings
    for prompt in (length for length in PROMPTS if length + config.canvas_length <= context):
        needed = plan([stored_tokens(config, Wanted(prompt, max_tokens))])
        yield {
            "prompt_tokens": prompt,
            "max_tokens": max_tokens,
            "keys_and_values": needed.keys_and_values,
            "temporaries": needed.temporaries,
            "total": needed.total,
            "fits": needed.total <= limit,
        }


def _part(
    folder: Path, config: ModelConfig, size: int, needs: Callable[[ModelConfig, int], dict[str, Any]]
) -> dict[str, Any]:
    """Return what the first of so many ranks needs, or why so many cannot share the model."""
    try:
        return needs(largest_part(config, size), Division(folder, config, size, 0).nbytes)
    except ValueError as error:
        return {"problem": str(error)}
