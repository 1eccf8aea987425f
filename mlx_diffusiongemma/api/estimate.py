"""How much memory a server needs, said before anything is loaded."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..cache import kv_quantization
from ..checkpoint import find_folder
from ..config import load_configs
from ..memory import Wanted, limit_bytes, plan_memory, stored_tokens
from .settings import Settings

PROMPTS = (1024, 8192, 32768)  # tokens


def estimate(settings: Settings) -> dict[str, Any]:
    """Return bytes for weights, and for one request of several lengths with an answer of `max_tokens`.

    Raises:
        ValueError: no such checkpoint, or one that cannot be read.
    """
    options = settings.load_options
    folder = find_folder(settings.model, options.get("revision"))
    config, _ = load_configs(folder)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    kv = kv_quantization(options.get("kv_bits"), options.get("kv_group_size"))
    limit = limit_bytes(options.get("memory_limit"))
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    context = config.text.max_position_embeddings
    requests = []
    for prompt in (length for length in PROMPTS if length + config.canvas_length <= context):
        tokens = stored_tokens(config, Wanted(prompt, settings.max_tokens))
        plan = plan_memory(config, weights, [tokens], kv=kv, on_cpu=on_cpu)
        requests.append(
            {
                "prompt_tokens": prompt,
                "max_tokens": settings.max_tokens,
                "keys_and_values": plan.keys_and_values,
                "temporaries": plan.temporaries,
                "total": plan.total,
                "fits": plan.total <= limit,
            }
        )
    return {"event": "estimate", "model": settings.model, "weights": weights, "limit": limit, "requests": requests}
