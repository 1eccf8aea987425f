"""Many clients at once, a third of which change their minds: `pytest -m slow -s tests/server/test_load.py`."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from mlx_diffusiongemma import load
from mlx_diffusiongemma.scheduler import Engine

from .process import metric, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timed, pytest.mark.timeout(3000)]

REQUESTS, CLIENTS, KINDS, SETTLED = 500, 32, 24, 100
QUESTIONS = ("What is 17 + 25?", "Count to 30.", "Tell me a story about a fox.", "Spell stone.")


def body(number: int) -> dict:
    """Return one of `KINDS` kinds of request."""
    kind = number % KINDS
    messages = [{"role": "user", "content": QUESTIONS[kind % len(QUESTIONS)]}]
    if kind % 3 == 0:
        messages.insert(0, {"role": "system", "content": "You are a patient teacher. " * 10})
    return {"messages": messages, "seed": kind, "max_tokens": (16, 40, 100)[kind % 3]}


def resident(pid: int) -> int:
    return 1024 * int(subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, check=True).stdout)


async def ask(client: httpx.AsyncClient, number: int, chance: random.Random) -> tuple[str, str | None]:
    """Send one request; return how it ended and the text. A third is given up at a random moment."""
    gives_up = chance.random() < 1 / 3
    patience = chance.uniform(0.0, 1.5) if gives_up else None
    streamed = chance.random() < 0.5
    request = {**body(number), "stream": streamed, "diffusing": streamed and chance.random() < 0.3}
    try:
        async with asyncio.timeout(patience):
            while True:
                status, text, retry = await send(client, request)
                if status != 503:
                    return str(status), text
                assert retry, "503 without Retry-After"
                await asyncio.sleep(0.2)
    except TimeoutError:
        return "given up", None


async def send(client: httpx.AsyncClient, request: dict) -> tuple[int, str | None, str | None]:
    if not request["stream"]:
        reply = await client.post("/v1/chat/completions", json=request)
        text = reply.json()["choices"][0]["message"]["content"] if reply.status_code == 200 else None
        return reply.status_code, text, reply.headers.get("retry-after")
    async with client.stream("POST", "/v1/chat/completions", json=request) as reply:
        if reply.status_code != 200:
            return reply.status_code, None, reply.headers.get("retry-after")
        text, ended = "", False
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        assert ended
        return 200, text, None


# In a process of its own: the one with the clients is busier than the server. `late` is how late the machine
# makes a process that works for 5 ms and sleeps for 45. Both in seconds; printed when standard input ends.
WATCH = """
import http.client, json, sys, threading, time
health, late, stop = [], [], threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
client = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
while not stop.is_set():
    began = time.perf_counter()
    client.request("GET", "/health")
    reply = client.getresponse()
    reply.read()
    assert reply.status == 200, reply.status
    health.append(time.perf_counter() - began)
    began, worked = time.perf_counter(), time.thread_time()
    while time.thread_time() < worked + 0.005:
        pass
    time.sleep(0.045)
    late.append(time.perf_counter() - began - 0.05)
print(json.dumps([health, late]))
"""


@contextmanager
def watched_health(port: int, seconds: dict[str, list[float]]) -> Iterator[None]:
    """Ask for /health all the time; put the seconds that took, and how late the machine is, into `seconds`."""
    watch = subprocess.Popen(
        [sys.executable, "-c", WATCH, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield
        output, _ = watch.communicate("", timeout=60)
    finally:
        watch.kill()
        watch.wait()
    assert watch.returncode == 0
    seconds["health"], seconds["late"] = json.loads(output)


def test_load(start_server):
    alone = load("tiny")
    expected = {}
    for kind in range(KINDS):
        options = body(kind)
        messages = options.pop("messages")
        expected[kind] = alone.generate(messages, guard_empty=True, **options).text
    del alone
    server = start_server("--max-queue", "16")
    footprints: list[int] = []
    seconds: dict[str, list[float]] = {}
    ends: list[str] = []

    async def all_clients() -> None:
        numbers = iter(range(REQUESTS))

        async def one_client(index: int) -> None:
            chance = random.Random(index)
            async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
                for number in numbers:
                    end, text = await ask(client, number, chance)
                    ends.append(end)
                    assert end in ("200", "given up"), end
                    assert text is None or text == expected[number % KINDS], f"request {number} got another's answer"
                    if len(ends) in (SETTLED, REQUESTS):
                        footprints.append(resident(server.process.pid))

        await asyncio.gather(*(one_client(index) for index in range(CLIENTS)))

    began = time.monotonic()
    with watched_health(server.port, seconds):
        asyncio.run(all_clients())
    took = time.monotonic() - began
    with server.client() as client:
        wait_until(lambda: metric(client, "mlx_diffusiongemma_requests_running") == 0)
        assert metric(client, "mlx_diffusiongemma_requests_failed_total") == 0
        assert metric(client, "mlx_diffusiongemma_engine_restarts_total") == 0
        text = client.get("/metrics").text
        assert not [line for line in text.splitlines() if 'status="5' in line and 'status="503"' not in line]
    given_up = ends.count("given up")
    print(f"\n{REQUESTS} requests of {CLIENTS} clients in {took:.0f} s, {given_up} given up")
    for name, each in seconds.items():
        numbers = f"median {1000 * statistics.median(each):.1f} ms, worst {1000 * max(each):.0f} ms of {len(each)}"
        print(f"{name}: {numbers}, {sum(one >= 0.1 for one in each)} of 100 ms and more")
    print(f"MB resident after {SETTLED} and {REQUESTS} requests: {[round(each / 1e6) for each in footprints]}")
    assert len(ends) == REQUESTS and given_up > REQUESTS // 6
    assert footprints[-1] < 1.05 * footprints[0]
    assert max(seconds["health"]) < 0.1 + max(seconds["late"])


def test_overhead_of_http(start_server):
    """The same requests one after the other, over the engine itself and over HTTP, in turns."""
    server = start_server()
    requests = [body(number) for number in range(8)]
    pairs: list[tuple[float, float]] = []
    with Engine(lambda: load("tiny")) as engine, server.client() as client:
        for rounds in range(6):
            for request in requests:
                options = {name: value for name, value in request.items() if name != "messages"}
                began = time.perf_counter()
                engine.submit(request["messages"], guard_empty=True, **options).result(600)
                middle = time.perf_counter()
                client.post("/v1/chat/completions", json=request).raise_for_status()
                if rounds:  # the first one warms up
                    pairs.append((middle - began, time.perf_counter() - middle))
    # Of 40 pairs the median: one that the machine interrupts would move a sum by more than what is measured.
    overhead = statistics.median(http / engine for engine, http in pairs) - 1
    print(f"\nHTTP over the engine, median of {len(pairs)} pairs: {overhead:+.1%}")
    assert overhead < 0.05


def test_threads_ask_at_once(server):
    """The model's own thread does all the work, whoever asks."""
    texts = []

    def call() -> None:
        with server.client() as client:
            texts.append(client.post("/v1/chat/completions", json=body(1)).json()["choices"][0]["message"]["content"])

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 6 and len(set(texts)) == 1
