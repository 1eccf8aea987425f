"""What quantised keys and values cost: canvas-logit KL, agreement, and whole answers with the same seeds.

    python benchmarks/kv_bits.py

The reference keeps keys and values as they are; its canvases are recorded once and shown to the same weights behind
packed keys and values. Prints the table of docs/engine.md.
"""

from __future__ import annotations

import argparse
import copy
import platform
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

from mlx_diffusiongemma.cache import KVQuantization, PrefixCache, kv_quantization
from mlx_diffusiongemma.checkpoint import load_checkpoint
from mlx_diffusiongemma.memory import kv_bytes
from mlx_diffusiongemma.pipeline import Pipeline
from mlx_diffusiongemma.quality import compare
from mlx_diffusiongemma.tasks import PROMPTS, make_task, read_tasks
from mlx_diffusiongemma.trajectories import answer, record_trajectories

COLUMNS = ("kv-bits", "bytes per token", "mean KL, nats", "same argmax", "same decision", "same tokens", "same answers")


def row(*cells: str) -> None:
    """Print a line of the table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tasks", type=Path, help="a file of tasks (default: the built-in prompts)")
    parser.add_argument("--limit", type=int, default=60, help="tasks at most")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    started = time.perf_counter()
    tasks = (read_tasks(args.tasks) if args.tasks else [make_task(values) for values in PROMPTS])[: args.limit]
    checkpoint = load_checkpoint(args.model)
    plain = Pipeline(checkpoint)
    text, size = checkpoint.config.text, checkpoint.model.dtype.size
    answers = [answer(plain, task, args.seed + i, args.max_tokens) for i, task in enumerate(tasks)]
    trajectories = record_trajectories(plain, tasks, args.seed, max_tokens=args.max_tokens)
    row(*COLUMNS)
    row("---", *["---:"] * (len(COLUMNS) - 1))

    def bytes_per_token(kv: KVQuantization | None) -> int:
        """Return what one more token takes once the window is full."""
        return kv_bytes(text, text.sliding_window + 1, kv, size) - kv_bytes(text, text.sliding_window, kv, size)

    row("none", f"{bytes_per_token(None):,}", "0", "", "", "", "")
    for bits in args.bits:
        kv = kv_quantization(bits, args.group_size)
        assert kv is not None
        candidate = copy.copy(checkpoint.model)
        candidate.make_cache = partial(PrefixCache, text, kv)
        agreement = compare(checkpoint.model, candidate, trajectories)
        packed = Pipeline(checkpoint, kv_bits=bits, kv_group_size=args.group_size)
        pairs = [
            (one, answer(packed, task, args.seed + i, args.max_tokens))
            for i, (one, task) in enumerate(zip(answers, tasks, strict=True))
        ]
        equal = sum(one.token_ids == other.token_ids for one, other in pairs)
        positions = [(a, b) for one, other in pairs for a, b in zip(one.token_ids, other.token_ids, strict=False)]
        row(
            str(bits),
            f"{bytes_per_token(kv):,}",
            f"{agreement.mean_kl:.1e}",
            f"{agreement.argmax_agreement:.2%}",
            f"{agreement.accepted_agreement:.2%}",
            f"{sum(a == b for a, b in positions) / max(1, len(positions)):.2%}",
            f"{equal} of {len(pairs)}",
        )
    where = f"{platform.machine()}, mlx {version('mlx')}"
    print(f"\n{len(tasks)} tasks, {len(trajectories)} canvases, {where}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
