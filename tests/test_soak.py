"""Many callers, many requests, random cancellations: `pytest -m slow -s tests/test_soak.py`."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from statistics import median
from typing import Any

import mlx.core as mx
import pytest

from mlx_diffusiongemma.checkpoint import load_checkpoint
from mlx_diffusiongemma.events import CanvasCommitted, DenoisingStep, Result
from mlx_diffusiongemma.pipeline import Pipeline
from mlx_diffusiongemma.prefixes import Prefixes
from mlx_diffusiongemma.scheduler import Engine, EngineOptions

REQUESTS, CALLERS, SETTLED = 300, 8, 30
QUESTIONS = (
    "What is 17 + 25?",
    "Count to 30.",
    "Tell me a story about a fox.",
    "Sort these words: pear, apple, map",
    "Spell stone.",
    "Describe a day of a baker.",
)
PREFIX_BYTES = 4 * 2**20  # small, so that it is full long before request 30


def make() -> Pipeline:
    return Pipeline(load_checkpoint("tiny"), prefixes=Prefixes(PREFIX_BYTES))


def asked(number: int) -> tuple[Any, dict[str, Any]]:
    """Return the messages and options of one of 36 kinds of request."""
    kind = number % 36
    messages = [{"role": "user", "content": QUESTIONS[kind % len(QUESTIONS)]}]
    if kind % 4 == 0:
        messages.insert(0, {"role": "system", "content": "You are a patient teacher. " * 20})
    return messages, {
        "seed": kind,
        "max_tokens": (24, 150, 300)[kind % 3],
        "enable_thinking": kind % 5 == 0,
        "prefill_step_size": (2048, 64)[kind % 2],
        "top_k": (None, 5)[kind % 7 == 0],
    }


def resident() -> int:
    """Return this process's resident memory in bytes."""
    return 1024 * int(
        subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, check=True).stdout
    )


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_soak():
    alone = make()
    expected = {kind: alone.generate(asked(kind)[0], **asked(kind)[1]).token_ids for kind in range(36)}
    del alone
    done: list[tuple[int, Result]] = []
    problems: list[str] = []
    footprints: list[tuple[int, int]] = []  # resident memory, memory of MLX's allocator
    seconds: list[float] = []
    lock = threading.Lock()
    numbers = iter(range(REQUESTS))

    def call(engine: Engine, chance: random.Random) -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            messages, options = asked(number)
            cancel_after = chance.choice([None, None, None, 0, 1, 3, 8])
            started, events = time.monotonic(), 0
            handle = engine.submit(messages, **options)
            for event in handle:
                events += isinstance(event, DenoisingStep | CanvasCommitted)
                if cancel_after is not None and events >= cancel_after:
                    handle.cancel()
            result = handle.result(0)
            with lock:
                done.append((number, result))
                seconds.append(time.monotonic() - started)
                if result.finish_reason != "cancelled" and result.token_ids != expected[number % 36]:
                    problems.append(f"request {number} gave other tokens than alone")
                if len(done) in (SETTLED, REQUESTS):
                    footprints.append((resident(), mx.get_active_memory() + mx.get_cache_memory()))

    with Engine(make, EngineOptions(max_batch=4)) as engine:
        engine.start()
        callers = [threading.Thread(target=call, args=(engine, random.Random(i))) for i in range(CALLERS)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        stats = engine.stats()
    assert not problems
    assert len(done) == REQUESTS == stats.counts.completed + stats.counts.cancelled
    assert stats.counts.cancelled > 30 and stats.counts.failed == 0 and stats.counts.restarts == 0
    early, late = footprints
    quarter = REQUESTS // 4
    counts = stats.counts
    megabytes = [[round(nbytes / 1e6, 1) for nbytes in footprint] for footprint in footprints]
    first, last = median(seconds[:quarter]), median(seconds[-quarter:])
    print(f"\n{REQUESTS} requests, {counts.cancelled} cancelled, {counts.rows / counts.steps:.2f} canvases per step")
    print(f"MB resident and of MLX's allocator: {megabytes[0]} after {SETTLED} requests, {megabytes[1]} at the end")
    print(f"median seconds of a request: {first:.2f} in the first quarter, {last:.2f} in the last")
    assert late[0] < 1.05 * early[0] and late[1] < 1.05 * early[1]
    assert last < 1.5 * first
