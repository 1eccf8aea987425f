"""Replicas behind nginx, with the configuration of docs/scaling.md: one is killed under load, one drains."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from server.process import ServerProcess, start, wait_until

from .ranks import free_ports

NGINX = os.environ.get("NGINX") or shutil.which("nginx") or ""
ROOT = Path(__file__).parents[2]
ASK = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 60, "seed": 1}
LONG = ASK | {"max_tokens": 1500, "max_denoising_steps": 48, "stream": True}

pytestmark = pytest.mark.distributed


@pytest.fixture
def replicas(tmp_path) -> Iterator[list[ServerProcess]]:
    """Start two servers that drain."""
    started: list[ServerProcess] = []
    try:
        for name in "ab":
            folder = tmp_path / name
            folder.mkdir()
            started.append(start(folder, "--drain-timeout", "60", "--allowed-host", "models.example"))
        yield started
    finally:
        for each in started:
            each.process.kill()
            each.process.wait()


@pytest.fixture
def proxy(tmp_path, replicas) -> Iterator[str]:
    """Run nginx in front of them; return its address."""
    if not NGINX:
        pytest.skip("needs nginx on PATH, or its path in NGINX")
    [text] = re.findall(r"```nginx\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), flags=re.DOTALL)
    [port] = free_ports(1)
    for address, each in zip(("10.0.0.11:1234", "10.0.0.12:1234"), replicas, strict=True):
        text = text.replace(address, f"127.0.0.1:{each.port}")
    text = text.replace("listen 8080", f"listen 127.0.0.1:{port}")
    places = "".join(
        f"{name}_temp_path {tmp_path}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    head = f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/errors; events {{}}\n"
    (tmp_path / "nginx.conf").write_text(f"{head}http {{ access_log off;\n{places}{text}}}\n")
    process = subprocess.Popen([NGINX, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")], stderr=subprocess.PIPE)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or _answers(url), 20)
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        yield url
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_a_conversation_stays_with_one_server_and_others_spread(proxy, replicas):
    def asked() -> list[int]:
        return [_submitted(each) for each in replicas]

    with httpx.Client(base_url=proxy, timeout=100) as client:
        for session in range(8):
            before = asked()
            for _ in range(2):
                headers = {"X-Session-Id": f"conversation {session}"}
                assert client.post("/v1/chat/completions", json=ASK, headers=headers).status_code == 200
            assert sorted(now - then for now, then in zip(asked(), before, strict=True)) == [0, 2]
    assert min(asked()) > 0


def _submitted(server: ServerProcess) -> int:
    with server.client() as client:
        page = client.get("/metrics").text
    found = re.findall(
        r"^mlx_diffusiongemma_http_requests_total\{.*chat/completions.*\} (\S+)$", page, flags=re.MULTILINE
    )
    return int(sum(float(number) for number in found))


def test_only_running_requests_of_a_killed_server_fail(proxy, replicas):
    stop, killed = threading.Event(), threading.Event()

    def ask_on(session: int) -> list[tuple[bool, bool]]:
        """Return for each request whether it began before the kill, and whether it was answered."""
        outcomes = []
        with httpx.Client(base_url=proxy, timeout=100, headers={"X-Session-Id": str(session)}) as client:
            while not stop.is_set():
                early = not killed.is_set()
                try:
                    outcomes.append((early, client.post("/v1/chat/completions", json=ASK).status_code == 200))
                except httpx.TransportError:
                    outcomes.append((early, False))
        return outcomes

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask_on, session) for session in range(6)]
        time.sleep(3)
        killed.set()
        replicas[0].process.kill()
        time.sleep(6)
        stop.set()
        outcomes = [outcome for each in asking for outcome in each.result(100)]
    assert len(outcomes) > 12
    assert all(answered for early, answered in outcomes if not early)
    assert sum(not answered for _, answered in outcomes) <= 6  # one of each client at most was under way


def test_a_server_that_drains_ends_what_it_has_and_others_get_the_rest(proxy, replicas):
    with httpx.stream("POST", f"{replicas[0].url}/v1/chat/completions", json=LONG, timeout=100) as reply:
        lines = reply.iter_lines()
        next(lines)
        replicas[0].process.terminate()
        wait_until(lambda: httpx.get(f"{replicas[0].url}/health").status_code == 503, 10)
        refused = httpx.post(f"{replicas[0].url}/v1/chat/completions", json=ASK)
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        for session in range(4):
            headers = {"X-Session-Id": str(session)}
            answer = httpx.post(f"{proxy}/v1/chat/completions", json=ASK, headers=headers, timeout=100)
            assert answer.status_code == 200
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert replicas[0].wait(20) == 0
