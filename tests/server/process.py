"""The real server: a process of its own on `tiny`, found by its ready line, spoken to over a socket."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
from terminal import environment

START_SECONDS = 240  # a busy machine takes its time to import
# Without the oracle's PyTorch: users have none, and importing it takes longer than everything else together.
PROGRAM = "import sys; sys.modules['torch'] = None; from mlx_diffusiongemma.server import main; sys.exit(main())"
QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass
class ServerProcess:
    """A server that runs."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]
    folder: Path
    errors: list[str] = field(default_factory=list)  # lines of standard error so far

    @property
    def url(self) -> str:
        return self.ready["url"]

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def log(self) -> list[dict[str, Any]]:
        """Return the log's records so far."""
        return [json.loads(line) for line in list(self.errors)]

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **options)

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **options})

    def wait(self, seconds: float = 60) -> int:
        """Wait for the end; return the exit code."""
        return self.process.wait(seconds)

    def terminate(self) -> int:
        """Send SIGTERM; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


StartServer = Callable[..., ServerProcess]


def start(folder: Path, *arguments: str, env: dict[str, str] | None = None, model: str = "tiny") -> ServerProcess:
    """Start a server on a free port and wait for its ready line."""
    given = ["--port", "0", "--model", model, "--discovery-file", str(folder / "server.json"), *arguments]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(HF_HUB_OFFLINE="1", **(env or {})),
    )
    errors: list[str] = []
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(process.stderr, errors.append), daemon=True).start()
    threading.Thread(target=_read, args=(process.stdout, lines.put), daemon=True).start()
    try:
        ready = json.loads(_first_line(process, lines, errors))
    except BaseException:
        process.kill()
        process.wait()
        raise
    return ServerProcess(process, ready, folder, errors)


def _read(stream: Any, take: Callable[[str], object]) -> None:
    for line in stream:
        take(line)


def _first_line(process: subprocess.Popen[str], lines: queue.Queue[str], errors: list[str]) -> str:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        try:
            return lines.get(timeout=0.1)
        except queue.Empty:
            if process.poll() is not None and lines.empty():
                break
    raise AssertionError(f"the server did not become ready (exit code {process.poll()}):\n{''.join(errors)}")


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.01)


def exists(pid: int) -> bool:
    """Tell whether a process runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def metric(client: httpx.Client, name: str, labels: str = "") -> float:
    """Return one number of /metrics; 0 while it is not there."""
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(f"{name}{labels} "):
            return float(line.rsplit(" ", 1)[1])
    return 0.0
