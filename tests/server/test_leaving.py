"""Clients that go away: in every dialect the model stops within a step, and the place is free again."""

from __future__ import annotations

import asyncio
import json
import socket
import threading

import pytest

from mlx_diffusiongemma.api.service import Ask, Service
from mlx_diffusiongemma.api.settings import Settings
from mlx_diffusiongemma.pipeline import load

from .process import ServerProcess, metric, wait_until
from .test_operation import ENDLESS, RUNNING

STORY = "Tell me a story about a fox."
MESSAGES = [{"role": "user", "content": STORY}]
OPTIONS = {name: ENDLESS[name] for name in ("max_denoising_steps", "confidence_threshold", "seed")} | {"model": "tiny"}
DIALECTS = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 64},
    "/v1/completions": {"prompt": STORY, "max_tokens": 64},
    "/v1/responses": {"input": STORY, "max_output_tokens": 64},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 64},
    "/api/v0/chat/completions": {"messages": MESSAGES, "max_tokens": 64},
    "/api/v0/completions": {"prompt": STORY, "max_tokens": 64},
    "/api/v1/chat": {"input": STORY, "max_output_tokens": 64},
}
QUEUED = "mlx_diffusiongemma_requests_queued"
STEPS, CANCELLED = "mlx_diffusiongemma_denoising_steps_total", "mlx_diffusiongemma_requests_cancelled_total"
LATE_STEPS = 4  # those between the closing of a socket and the reading of the count, on a busy machine


class Leaving:
    """A client that sends a request and closes its socket when it is told to."""

    def __init__(self, server: ServerProcess, path: str, body: dict) -> None:
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self._socket = socket.create_connection(("127.0.0.1", server.port))
        self._socket.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content)

    def leave(self) -> None:
        self._socket.close()


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("path", DIALECTS)
def test_a_client_leaves_in_the_middle_of_a_canvas(server, client, path, streamed):
    cancelled, begun = metric(client, CANCELLED), metric(client, STEPS)
    leaving = Leaving(server, path, {**DIALECTS[path], **OPTIONS, "stream": streamed})
    wait_until(lambda: metric(client, STEPS) > begun + 1)
    assert metric(client, RUNNING) == 1
    leaving.leave()
    steps = metric(client, STEPS)
    wait_until(lambda: metric(client, RUNNING) == 0)
    assert metric(client, CANCELLED) == cancelled + 1
    assert metric(client, STEPS) <= steps + LATE_STEPS


def test_a_client_leaves_while_the_prompt_is_encoded(server, client):
    cancelled, begun = metric(client, CANCELLED), metric(client, STEPS)
    body = {"messages": [{"role": "user", "content": "fox " * 900}], **OPTIONS}
    leaving = Leaving(server, "/v1/chat/completions", body)
    wait_until(lambda: metric(client, RUNNING) == 1 or metric(client, STEPS) > begun)
    leaving.leave()
    wait_until(lambda: metric(client, RUNNING) == 0)
    assert metric(client, CANCELLED) == cancelled + 1
    assert metric(client, STEPS) <= begun + LATE_STEPS


def test_a_client_leaves_the_queue(start_server):
    server = start_server("--max-batch", "1", "--max-active", "1")
    with server.client() as client:
        chat = {**DIALECTS["/v1/chat/completions"], **OPTIONS}
        first = Leaving(server, "/v1/chat/completions", chat)
        wait_until(lambda: metric(client, RUNNING) == 1)
        waiting = [Leaving(server, path, {**body, **OPTIONS, "stream": True}) for path, body in DIALECTS.items()]
        wait_until(lambda: metric(client, QUEUED) == len(DIALECTS))
        for each in waiting:
            each.leave()
        wait_until(lambda: metric(client, QUEUED) == 0)
        assert metric(client, RUNNING) == 1 and metric(client, CANCELLED) == len(DIALECTS)
        first.leave()
        wait_until(lambda: metric(client, RUNNING) == 0)


# -- while something is done for a request ---------------------------------------------------------------------------


def test_leaving_while_the_model_is_loaded_does_not_load_it_twice():
    loads, may_load = [], threading.Event()

    def slow_load(*args, **options):
        loads.append(args)
        assert may_load.wait(60)
        return load(*args, **options)

    async def run() -> None:
        service = Service(Settings("tiny", load=slow_load))
        leaving = asyncio.ensure_future(service.load(None))
        while not loads:
            await asyncio.sleep(0.01)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        staying = asyncio.ensure_future(service.load(None))
        await asyncio.sleep(0.1)
        may_load.set()
        entry, _ = await staying
        assert service.is_loaded(entry) and len(loads) == 1
        await service.close(10)

    asyncio.run(run())


def test_leaving_while_the_prompt_is_rendered_leaves_nothing_behind(monkeypatch):
    async def run() -> None:
        service = Service(Settings("tiny"))
        await service.start()
        submitted, may_submit, real = threading.Event(), threading.Event(), Service._submit

        def slow_submit(self, ask, engine):
            submitted.set()
            assert may_submit.wait(60)
            return real(self, ask, engine)

        monkeypatch.setattr(Service, "_submit", slow_submit)
        options = {name: value for name, value in OPTIONS.items() if name != "model"} | {"max_tokens": 64}
        leaving = asyncio.ensure_future(service.open(Ask(MESSAGES, options=options)))
        await asyncio.to_thread(submitted.wait, 60)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        may_submit.set()
        async with asyncio.timeout(60):
            while service.stats().counts.cancelled == 0:
                await asyncio.sleep(0.01)
        await service.close(10)

    asyncio.run(run())
