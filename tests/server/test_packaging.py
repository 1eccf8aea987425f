"""The templates in packaging/, as far as they can be judged off a Mac."""

from __future__ import annotations

import json
import plistlib
import re
from pathlib import Path

import mlx_diffusiongemma
from mlx_diffusiongemma.server import parse

FOLDER = Path(mlx_diffusiongemma.__file__).parents[1] / "packaging"


def test_the_launch_agent():
    text = (FOLDER / "launchd" / "mlx-diffusiongemma.server.plist").read_text()
    agent = plistlib.loads(text.replace("@BIN@", "/opt/bin").replace("@HOME@", "/Users/me").encode())
    command, *arguments = agent["ProgramArguments"]
    assert command == "/opt/bin/mlx_diffusiongemma.server"
    args = parse(arguments)
    assert (args.host, args.port, args.ttl) == ("127.0.0.1", 1234, 3600)
    assert agent["KeepAlive"] == {"SuccessfulExit": False} and agent["ExitTimeOut"] > 5
    assert agent["StandardOutPath"].startswith("/Users/me/Library/Logs/")
    assert agent["Label"] == "mlx-diffusiongemma.server"


def test_the_formula_starts_the_server():
    text = (FOLDER / "homebrew" / "mlx-diffusiongemma.rb").read_text()
    [service] = re.findall(r"run \[(.*?)\]", text, re.DOTALL)
    command, *arguments = re.findall(r'"([^"]*)"', service)
    assert command == "mlx_diffusiongemma.server" and parse(arguments).port == 1234
    assert text.count(" do\n") + text.count("  def ") + text.count("class ") == len(re.findall(r"^\s*end$", text, re.M))
    assert "[server]" in text and re.search(r'python@3\.1[1-9]"', text)


def test_the_swift_sample_reads_what_is_sent(client):
    text = (FOLDER / "swift" / "DiffusionClient.swift").read_text()
    declared = dict(re.findall(r"    struct (\w+): Decodable \{\n(.*?)\n    \}", text, re.DOTALL))
    fields = {name: re.findall(r"let (\w+): (\S+)", body) for name, body in declared.items()}
    own = re.findall(r"^    let (\w+): (\S+)$", text.split("private struct Chunk")[1], re.MULTILINE)
    body = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], "stream": True, "diffusion_frames": True}
    lines = client.post("/v1/chat/completions", json={**body, "max_tokens": 64, "seed": 1}).text.split("\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    frame = next(chunk for chunk in chunks if chunk.get("type") == "diffusion_frame")
    assert {name for name, _ in own} - set(frame) == {"error"}
    assert {name for name, _ in fields["Diffusion"]} <= set(frame["diffusion"])
    for chunk in chunks:
        for name, kind in fields["Choice"]:
            assert name in chunk["choices"][0] or kind.endswith("?")
    seen = {name for chunk in chunks for name in chunk["choices"][0]["delta"]}
    assert "content" in seen and "content" in dict(fields["Delta"])
    error = client.post("/v1/chat/completions", json={**body, "messages": []})
    assert [name for name, _ in fields["Failure"]] == ["message"] and error.json()["error"]["message"]
    assert "\n" not in error.text, "the sample reads an error as one line"
