"""How the server starts, runs and ends: ready line, files, signals, limits, models, disconnections."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
from terminal import environment

from mlx_diffusiongemma.api.settings import Settings
from mlx_diffusiongemma.cli import size
from mlx_diffusiongemma.prefixes import DEFAULT_BYTES
from mlx_diffusiongemma.server import setup_parser

from .process import QUESTION, exists, metric, wait_until

# One canvas that is never good enough: it goes on for as long as nobody stops it.
ENDLESS = {
    "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
    "max_tokens": 64,
    "max_denoising_steps": 10_000,
    "confidence_threshold": 1e-12,
    "seed": 1,
}
SHORT = {"messages": QUESTION, "max_tokens": 4, "seed": 1}
RUNNING = "mlx_diffusiongemma_requests_running"


def stream(client, body=ENDLESS, **options):
    return client.stream("POST", "/v1/chat/completions", json={**body, "stream": True, **options})


def first_draft(response):
    """Read until a draft arrives; return the iterator."""
    lines = response.iter_lines()
    next(line for line in lines if "diffusion_frame" in line)
    return lines


def test_ready_line_and_files(start_server, tmp_path):
    server = start_server("--ready-file", str(tmp_path / "ready.json"))
    assert server.ready["event"] == "ready" and server.ready["pid"] == server.process.pid
    assert server.ready["url"].startswith("http://127.0.0.1:") and server.ready["model"] == "tiny"
    for name in ("ready.json", "server.json"):
        path = tmp_path / name
        assert json.loads(path.read_text()) == server.ready
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with server.client() as client:
        assert client.get("/health").status_code == 200
        with stream(client, diffusing=True) as response:
            lines = first_draft(response)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line.startswith("data: ") and "diffusion_frame" not in line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert server.wait() == 0 and time.monotonic() - began < 60
    assert sorted(path.name for path in tmp_path.iterdir()) == []


@pytest.mark.slow
def test_sigterm_is_an_error_for_the_sdk_and_503_without_a_stream(start_server):
    server = start_server()
    with server.openai() as ai, server.client() as client:
        chunks = iter(ai.chat.completions.create(model="tiny", **body_for_sdk(), stream=True))
        next(chunks)
        replies = []
        waiting = threading.Thread(target=lambda: replies.append(client.post("/v1/chat/completions", json=ENDLESS)))
        waiting.start()
        with server.client() as other:
            wait_until(lambda: metric(other, RUNNING) == 2)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(chunks)
        waiting.join(20)
    assert replies[0].status_code == 503 and replies[0].headers["retry-after"]
    assert server.wait() == 0


def body_for_sdk():
    known = {name: ENDLESS[name] for name in ("messages", "max_tokens", "seed")}
    return {**known, "extra_body": {name: value for name, value in ENDLESS.items() if name not in known}}


@pytest.mark.parametrize("how", ["stream", "whole"])
def test_a_client_that_leaves_frees_the_model(server, how):
    with server.client() as watcher:
        before = metric(watcher, "mlx_diffusiongemma_requests_cancelled_total")
        if how == "stream":
            with server.client() as client, stream(client, diffusing=True) as response:
                first_draft(response)
        else:
            with server.client() as client, pytest.raises(httpx.ReadTimeout):
                client.post("/v1/chat/completions", json=ENDLESS, timeout=1.0)
        wait_until(lambda: metric(watcher, "mlx_diffusiongemma_requests_cancelled_total") == before + 1)
        wait_until(lambda: metric(watcher, RUNNING) == 0)


def test_a_full_queue_says_when_to_come_back(start_server):
    server = start_server("--max-batch", "1", "--max-active", "1", "--max-queue", "1")
    with server.client() as client:
        opened = [stream(client), stream(client)]
        responses = [opened[0].__enter__()]
        wait_until(lambda: metric(client, RUNNING) == 1)  # until then it waits itself
        responses.append(opened[1].__enter__())
        wait_until(lambda: metric(client, "mlx_diffusiongemma_requests_queued") == 1)
        reply = client.post("/v1/chat/completions", json=SHORT)
        assert reply.status_code == 503 and int(reply.headers["retry-after"]) > 0
        assert reply.json()["error"]["code"] == "queue_full"
        assert [response.status_code for response in responses] == [200, 200]
        for each in opened:
            each.__exit__(None, None, None)
        wait_until(lambda: client.post("/v1/chat/completions", json=SHORT).status_code == 200)


def test_a_request_has_an_end(start_server):
    server = start_server("--request-timeout", "0.5")
    with server.client() as client:
        reply = client.post("/v1/chat/completions", json=ENDLESS)
        assert reply.status_code == 504 and reply.json()["error"]["code"] == "timeout"
        with stream(client) as response:
            last = [line for line in response.iter_lines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        wait_until(lambda: metric(client, RUNNING) == 0)


def test_a_unix_socket(start_server, tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))  # what a server leaves behind that was killed
    server = start_server("--uds", str(path))
    assert server.ready["url"] == f"unix:{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost", timeout=120) as client:
        assert client.post("/v1/chat/completions", json=SHORT).status_code == 200
        assert client.get("/health", headers={"Host": "evil.example"}).status_code == 403
    done = run_server("--uds", str(path))
    assert done.returncode == 2 and "another server listens there" in done.stderr
    assert server.terminate() == 0 and not path.exists()


def run_server(*arguments, timeout=200, **env):
    return subprocess.run(
        [sys.executable, "-m", "mlx_diffusiongemma.server", "--model", "tiny", "--no-discovery", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=environment(HF_HUB_OFFLINE="1", **env),
    )


@pytest.mark.slow
def test_the_server_ends_with_its_parent(tmp_path):
    """The parent is killed without a chance to say anything."""
    program = (
        "import os, subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-m', 'mlx_diffusiongemma.server', '--model', 'tiny', '--port', '0',\n"
        f" '--ready-file', {str(tmp_path / 'ready')!r}, '--no-discovery', '--watchdog-ppid', str(os.getpid())])\n"
        "time.sleep(1000)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until((tmp_path / "ready").exists, 240)
        pid = json.loads((tmp_path / "ready").read_text())["pid"]
        parent.kill()
        parent.wait()
        began = time.monotonic()
        wait_until(lambda: not exists(pid) or is_zombie(pid))
        print(f"gone after {time.monotonic() - began:.1f} s")
        assert not (tmp_path / "ready").exists()
    finally:
        parent.kill()
        parent.wait()


def is_zombie(pid):
    """Tell whether a process has ended and nobody has asked for its exit code."""
    return "Z" in subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout


@pytest.mark.slow
def test_an_idle_model_is_unloaded_and_comes_back(start_server):
    server = start_server("--ttl", "0.3")
    with server.client() as client:
        first = client.post("/v1/chat/completions", json=SHORT).json()
        wait_until(lambda: metric(client, "mlx_diffusiongemma_model_loaded") == 0)
        assert client.get("/v1/models").json()["data"][0]["state"] == "not-loaded"
        assert client.get("/health").status_code == 200
        assert metric(client, "mlx_diffusiongemma_model_loaded") == 0, "asking how it is does not load it"
        again = client.post("/v1/chat/completions", json={**SHORT, "ttl": 1000.0}).json()
        assert again["choices"] == first["choices"]
        time.sleep(0.6)
        assert metric(client, "mlx_diffusiongemma_model_loaded") == 1, "the request's ttl counts from then on"


def test_models_by_name(start_server, tmp_path, tiny_folder):
    shutil.copytree(tiny_folder, tmp_path / "other")
    server = start_server("--models", str(tmp_path / "other"), "--alias", "gpt-4o", "--lazy")
    with server.client() as client:
        assert client.get("/health").status_code == 200

        def states():
            return {entry["id"]: entry["state"] for entry in client.get("/v1/models").json()["data"]}

        def model_of(name):
            return client.post("/v1/chat/completions", json={**SHORT, "model": name}).json().get("model")

        assert states() == {"tiny": "not-loaded", "other": "not-loaded"}
        assert model_of("gpt-4o") == "tiny" and states() == {"tiny": "loaded", "other": "not-loaded"}
        with stream(client, diffusing=True, max_denoising_steps=40) as response:  # the one under way ends first
            lines = first_draft(response)
            assert model_of("other") == "other"
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert states() == {"tiny": "not-loaded", "other": "loaded"}
        assert model_of("") == "tiny"
        assert model_of(str(tmp_path)) is None, "a request reads no folder that was not listed"


def test_a_model_that_is_not_there(start_server, tmp_path):
    done = run_server("--port", "0", "--model", str(tmp_path / "nothing"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: model ") and "is not a folder" in done.stderr


def test_health_while_loading():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_diffusiongemma.server", "--model", "tiny", "--port", str(port), "--no-discovery"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    seen = []
    try:
        end = time.monotonic() + 240
        while seen[-1:] != [200] and time.monotonic() < end:
            try:
                reply = httpx.get(f"http://127.0.0.1:{port}/health")
            except httpx.TransportError:
                time.sleep(0.002)
                continue
            seen.append(reply.status_code)
            if reply.status_code == 503:
                assert reply.headers["retry-after"] and reply.json()["error"]["message"] == "Loading model"
    finally:
        process.terminate()
        assert process.wait(30) == 0
    assert set(seen) == {200, 503}


def test_a_port_that_is_taken(server):
    done = run_server("--port", str(server.port))
    assert done.returncode == 2 and f"cannot listen on 127.0.0.1 port {server.port}" in done.stderr


def test_estimate_only():
    done = run_server("--estimate-only", "--memory-limit", "1")
    estimate = json.loads(done.stdout)
    assert done.returncode == 0 and estimate["limit"] == 10**9
    assert estimate["weights"] > 1e6 and all(request["fits"] for request in estimate["requests"])
    assert [request["prompt_tokens"] for request in estimate["requests"]] == [1024]
    assert [part["ranks"] for part in estimate["ranks"]] == [1, 2, 4]
    weights = [part["weights"] for part in estimate["ranks"]]
    assert weights[1] < 0.6 * weights[0] and weights[2] < 0.6 * weights[1]


def test_a_drain_that_takes_no_time_is_refused():
    done = run_server("--drain-timeout", "-1")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: --drain-timeout: got -1, expected seconds, 0 or more (see --help)"


@pytest.mark.slow
def test_ctrl_c_ends_as_sigterm_does(start_server, tmp_path):
    server = start_server()
    server.process.send_signal(signal.SIGINT)
    assert server.wait() == 0 and not (tmp_path / "server.json").exists()


@pytest.mark.slow
def test_another_servers_discovery_file_is_left_alone(start_server, tmp_path):
    server = start_server()
    (tmp_path / "server.json").write_text(json.dumps({"pid": 1}))
    assert server.terminate() == 0
    assert json.loads((tmp_path / "server.json").read_text()) == {"pid": 1}


def test_metrics_are_bounded(client):
    client.post("/v1/chat/completions", json=SHORT)
    for path in ("/a", "/b", "/v1/models/x", "/v1/models/y"):
        client.get(path)
    client.request("BREW", "/")
    text = client.get("/metrics").text
    routes = {line.split('route="')[1].split('"')[0] for line in text.splitlines() if 'route="' in line}
    assert "/v1/chat/completions" in routes and "unmatched" in routes
    assert not {"/a", "/b", "/v1/models/x"} & routes and "BREW" not in text
    assert "mlx_diffusiongemma_generated_tokens_total" in text


def test_log_lines(server, client):
    before = len(server.log())
    reply = client.post("/v1/chat/completions", json=SHORT)
    wait_until(lambda: any(line["event"] == "request" for line in server.log()[before:]))
    lines = server.log()[before:]
    request = next(line for line in lines if line["event"] == "request")
    assert request["id"] == reply.headers["x-request-id"] and request["route"] == "/v1/chat/completions"
    assert (request["method"], request["status"]) == ("POST", 200)
    answer = next(line for line in lines if line["event"] == "answer")
    assert answer["generated_tokens"] == 4 and answer["finish_reason"] == "length"


def test_nothing_heavy_is_imported_for_help():
    program = (
        "import sys, mlx_diffusiongemma, mlx_diffusiongemma.server as server\n"
        "try: server.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'fastapi', 'uvicorn', 'pydantic', 'mlx', 'numpy', 'transformers', 'prometheus_client'}\n"
        "sys.exit(f'imported {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (0, "") and "--watchdog-ppid" in done.stdout


def test_the_help_names_the_defaults():
    helps = {action.dest: action.help for action in setup_parser()._actions}
    named = {name: text.rpartition("(")[2].removesuffix(")") for name, text in helps.items() if text}
    settings = Settings()
    for name in ("max_batch", "max_active", "max_queue"):
        assert named[name] == str(getattr(settings.engine, name))
    assert named["max_tokens"] == str(settings.max_tokens)
    assert size(named["max_body"]) == settings.body_bytes and size(named["prompt_cache_bytes"]) == DEFAULT_BYTES


@pytest.mark.parametrize("arguments", [["-m", "mlx_diffusiongemma", "server"], ["server.py"]])
def test_other_ways_to_call_it(arguments):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run(
        [sys.executable, *arguments, "--help"], capture_output=True, text=True, cwd=root, env=environment()
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: mlx_diffusiongemma.server")
