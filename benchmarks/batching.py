"""Throughput of the engine with at most 1, 2, 4 and 8 canvases per denoising step.

    python benchmarks/batching.py
    python benchmarks/batching.py --model mlx-community/diffusiongemma-26B-A4B-it-4bit --requests 16

The same requests each time, all submitted at once; the rounds alternate, and every number is the median of its rounds.
"""

from __future__ import annotations

import argparse
import platform
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from statistics import median

import mlx.core as mx

from mlx_diffusiongemma.handle import Handle
from mlx_diffusiongemma.pipeline import load
from mlx_diffusiongemma.scheduler import Engine, EngineOptions

PROMPTS = ("Tell me a story about a fox.", "Count to 40.", "Describe a day of a baker.", "What is 17 + 25?")


def measure(model: str, batch: int, requests: int, max_tokens: int) -> tuple[float, ...]:
    """Return canvases per step, tokens per second, seconds per step, and the median seconds of a request."""
    options = EngineOptions(max_batch=batch, max_active=max(batch, requests), max_queue=requests)
    ended: dict[int, float] = {}

    def note(index: int, handle: Handle) -> None:
        handle.result()
        ended[index] = time.perf_counter()

    with Engine(lambda: load(model, prefix_bytes=0), options) as engine:
        engine.start()
        started = time.perf_counter()
        handles = [engine.submit(PROMPTS[i % len(PROMPTS)], seed=i, max_tokens=max_tokens) for i in range(requests)]
        readers = [threading.Thread(target=note, args=each) for each in enumerate(handles)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        elapsed = time.perf_counter() - started
        counts = engine.stats().counts
    each = median(end - started for end in ended.values())
    return counts.rows / counts.steps, counts.generated_tokens / elapsed, elapsed / counts.steps, each


def main(argv: Sequence[str] | None = None) -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    device = mx.default_device()
    print(f"{args.model}, mlx {version('mlx')}, {device}, {platform.machine()}, {args.requests} requests")
    found: dict[int, list[tuple[float, ...]]] = {batch: [] for batch in args.batches}
    for _ in range(args.rounds):
        for batch, rows in found.items():
            rows.append(measure(args.model, batch, args.requests, args.max_tokens))
    columns = ("canvases per step", "tokens per second", "relative", "ms per step, prefill included")
    print(f"| max_batch | {' | '.join(columns)} | median s per request |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    first = median(row[1] for row in next(iter(found.values())))
    for batch, rows in found.items():
        shared, speed, step, each = (median(row[i] for row in rows) for i in range(4))
        print(f"| {batch} | {shared:.2f} | {speed:.1f} | {speed / first:.2f} | {1000 * step:.1f} | {each:.2f} |")


if __name__ == "__main__":
    main()
