"""Rank 0 decides and the others follow: an engine, the command line and the server on two ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from terminal import environment

from mlx_diffusiongemma.pipeline import load

from .leading import SCENARIOS, run
from .ranks import HERE, free_ports, run_mpi, run_ranks

LAUNCH = Path(sys.executable).with_name("mlx.launch")


def leaves(value: Any) -> Iterator[Any]:
    """Yield the lengths of lists and what they hold: token ids, texts, log-probabilities, which `approx` compares."""
    if isinstance(value, list):
        yield len(value)
        for each in value:
            yield from leaves(each)
    else:
        yield value


@pytest.mark.distributed
@pytest.mark.parametrize(("scenario", "size"), [*((name, 2) for name in SCENARIOS), ("written", 4)])
def test_an_engine_on_several_ranks_serves_as_on_one(scenario, size):
    expected = run(scenario, lambda: load("tiny", dtype="float32"))
    ended = run_ranks(size, [str(HERE / "leading.py"), "tiny", scenario])
    assert [(code, err) for code, _, err in ended] == [(0, "")] * size
    assert list(leaves(json.loads(ended[0][1]))) == pytest.approx(list(leaves(expected)), abs=1e-3)
    assert all(out == "" for _, out, _ in ended[1:])
    if scenario == "prefixes":
        assert expected[1][-1] > 64


@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun on this machine: install Open MPI")
def test_mpi_in_place_of_the_ring():
    expected = run("together", lambda: load("tiny", dtype="float32"))
    code, out, err = run_mpi(2, [str(HERE / "leading.py"), "tiny", "together"])
    assert (code, err) == (0, "")
    assert list(leaves(json.loads(out))) == pytest.approx(list(leaves(expected)), abs=1e-3)


@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun on this machine: install Open MPI")
def test_the_command_line_runs_under_mpirun():
    command = ["-m", "mlx_diffusiongemma.generate", "--model", "tiny", "--prompt", "What is 17 + 25?", "--seed", "3"]
    code, out, err = run_mpi(4, [*command, "--verbose", "False"])
    assert (code, out.strip(), err) == (0, load("tiny").generate("What is 17 + 25?", seed=3).text, "")


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
@pytest.mark.parametrize(
    "flags",
    [
        ["--help"],
        ["--model", "no/such/folder", "--prompt", "hi"],
        ["--model", "tiny", "--adapter-path", "adapter", "--prompt", "hi"],
        ["--nonsense"],
    ],
)
def test_what_rank_0_says_is_said_once_and_the_others_end(flags):
    ended = run_ranks(2, ["-m", "mlx_diffusiongemma.generate", *flags])
    code = 0 if flags == ["--help"] else 2
    assert [each[0] for each in ended] == [code, 0]
    assert ended[1][1:] == ("", "")
    assert ended[0][1 if code == 0 else 2].count("usage:" if code == 0 else "error:") == 1
