"""Run by every rank: counts what the collectives of one denoising step carry, and prints it.

counting.py CHECKPOINT DTYPE
"""

from __future__ import annotations

import json
import sys
from typing import Any

import mlx.core as mx

from mlx_diffusiongemma.events import DenoisingStep
from mlx_diffusiongemma.pipeline import load
from mlx_diffusiongemma.ranks import Ranks


def main() -> None:
    """Count the calls and bytes of the second step."""
    counts = {"calls": 0, "bytes": 0}

    def counted(collective: Any) -> Any:
        def call(x: mx.array, **options: Any) -> mx.array:
            counts["calls"] += 1
            counts["bytes"] += x.nbytes
            return collective(x, **options)

        return call

    for name in ("all_sum", "all_max", "all_min", "all_gather"):
        setattr(mx.distributed, name, counted(getattr(mx.distributed, name)))
    ranks = Ranks(mx.distributed.init(strict=True))
    pipeline = load(sys.argv[1], dtype=sys.argv[2], ranks=ranks)
    seen = []
    for event in pipeline.stream("Tell me a story.", seed=1, max_tokens=64, max_denoising_steps=3):
        if isinstance(event, DenoisingStep):
            seen.append(dict(counts))
    print(json.dumps({name: seen[1][name] - seen[0][name] for name in counts}))
    mx.clear_streams()


if __name__ == "__main__":
    main()
