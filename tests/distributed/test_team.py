"""Rank 0 decides and the others follow: an engine, the command line and the server on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import environment

from mlx_diffusiongemma.pipeline import load

from .leading import run
from .ranks import HERE, free_ports, run_ranks

LAUNCH = Path(sys.executable).with_name("mlx.launch")


@pytest.mark.distributed
@pytest.mark.parametrize("scenario", ["together", "prefixes", "cancelled"])
def test_an_engine_on_two_ranks_serves_as_on_one(scenario):
    expected = run(scenario, lambda: load("tiny", dtype="float32"))
    ended = run_ranks(2, [str(HERE / "leading.py"), "tiny", scenario])
    assert [(code, err) for code, _, err in ended] == [(0, "")] * 2
    assert json.loads(ended[0][1]) == json.loads(json.dumps(expected))
    assert ended[1][1] == ""
    if scenario == "prefixes":
        assert expected[1][-1] > 64


@pytest.mark.distributed
def test_the_command_line_runs_under_mlx_launch():
    command = ["-m", "mlx_diffusiongemma.generate", "--model", "tiny", "--prompt", "What is 17 + 25?", "--seed", "3"]
    alone = subprocess.run([sys.executable, *command, "--json"], env=environment(), capture_output=True, check=True)
    port = str(free_ports(1)[0])
    launched = subprocess.run(
        [str(LAUNCH), "-n", "2", "-p", port, "--", sys.executable, *command, "--json"],
        env=environment(PATH=os.environ["PATH"]),
        capture_output=True,
        timeout=200,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    one, two = json.loads(alone.stdout), json.loads(launched.stdout)
    assert (two["text"], two["token_ids"]) == (one["text"], one["token_ids"])


@pytest.mark.distributed
@pytest.mark.parametrize("flags", [["--help"], ["--model", "no/such/folder", "--prompt", "hi"], ["--nonsense"]])
def test_what_rank_0_says_is_said_once_and_the_others_end(flags):
    ended = run_ranks(2, ["-m", "mlx_diffusiongemma.generate", *flags])
    code = 0 if flags == ["--help"] else 2
    assert [each[0] for each in ended] == [code, 0]
    assert ended[1][1:] == ("", "")
    assert ended[0][1 if code == 0 else 2].count("usage:" if code == 0 else "error:") == 1
