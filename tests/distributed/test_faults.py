"""A rank that dies or stalls: rank 0 says who it was, requests under way get an error, and no process stays behind."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from small_model import save_checkpoint, save_tokenizer

from .ranks import run_ranks, started

SECONDS = 10  # for a fault to be reported, and for the others to end after that
ENDLESS = {"max_denoising_steps": 10_000, "stability_threshold": 10_000}  # the first canvas is never done
LONG = {"seed": 1, "stream": True, "messages": [{"role": "user", "content": "Tell me a story."}], **ENDLESS}
SERVER = ["-m", "mlx_diffusiongemma.server", "--model", "tiny", "--port", "0", "--no-discovery"]

pytestmark = pytest.mark.distributed


@contextmanager
def serving(size: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """Serve `tiny` on several ranks; yield the server's address and the processes."""
    with started(size, SERVER) as ranks:
        assert ranks[0].stdout is not None
        yield json.loads(ranks[0].stdout.readline())["url"], ranks


def ask(url: str, **more: Any) -> Iterator[str]:
    """Ask for a stream; yield its data as it comes."""
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG | more, timeout=60) as reply:
        for line in reply.iter_lines():
            if line:
                yield line.removeprefix("data: ")


def assert_ended(ranks: list[subprocess.Popen[bytes]], since: float, who: str) -> None:
    """Rank 0 reports who is lost and ends with 1; nobody stays behind."""
    _, errors = ranks[0].communicate(timeout=30)
    assert time.monotonic() - since < 2 * SECONDS
    assert ranks[0].returncode == 1
    assert f"error: {who} (" in errors.decode()
    for each in ranks[1:]:
        each.wait(SECONDS)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_goes_in_the_middle_of_a_step(how):
    with serving(2) as (url, ranks):
        pieces = ask(url)
        next(pieces)
        time.sleep(1)
        ranks[1].send_signal(how)
        since = time.monotonic()
        *_, last = pieces
        assert time.monotonic() - since < SECONDS
        assert "rank 1 (" in json.loads(last)["error"]["message"]
        if how == signal.SIGSTOP:
            ranks[1].kill()  # it would end by itself once it goes on
        assert_ended(ranks, since, "rank 1")


def test_a_rank_that_goes_while_a_prompt_is_encoded():
    with serving(2) as (url, ranks):
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(list, ask(url, messages=[{"role": "user", "content": "a story of a fox and " * 600}]))
            time.sleep(0.7)
            ranks[1].kill()
            since = time.monotonic()
            *first, last = asked.result(SECONDS)
        assert all(json.loads(piece)["choices"][0]["delta"]["content"] == "" for piece in first)  # who speaks, no more
        assert "rank 1 (" in last
        assert_ended(ranks, since, "rank 1")


def test_a_rank_that_goes_while_nothing_is_asked():
    with serving(4) as (_, ranks):
        ranks[2].kill()
        assert_ended(ranks, time.monotonic(), "rank 2")


def test_the_others_end_with_rank_0():
    with serving(2) as (url, ranks):
        next(ask(url))
        ranks[0].kill()
        assert ranks[1].wait(SECONDS) == 1


def test_the_end_of_a_server_is_the_end_of_all():
    with serving(2) as (_, ranks):
        ranks[0].terminate()
        assert [each.wait(2 * SECONDS) for each in ranks] == [0, 0]


DIFFERENT = "import mlx_diffusiongemma as m, os, sys; m.__version__ += '.' + os.environ['MLX_RANK']; {}"


def test_ranks_of_different_versions_are_refused():
    run = "from mlx_diffusiongemma.generate import main; sys.exit(main(['--model', 'tiny']))"
    ended = run_ranks(2, ["-c", DIFFERENT.format(run)])
    assert [code for code, _, _ in ended] == [2, 0]
    assert "rank 1 (" in ended[0][2]
    assert ended[0][2].count(".0 as rank 0 has") == 1
    assert ".1, expected" in ended[0][2]


def test_ranks_with_different_checkpoints_are_refused(tmp_path):
    for rank in range(2):
        folder = save_checkpoint(tmp_path / str(rank) / "model", num_experts=4 + 4 * rank)
        save_tokenizer(folder)
    there = f"import os, sys; os.chdir({str(tmp_path)!r} + '/' + os.environ['MLX_RANK'])"
    run = "from mlx_diffusiongemma.generate import main; sys.exit(main(['--model', './model']))"
    ended = run_ranks(2, ["-c", f"{there}; {run}"])
    assert ended[0][0] == 1
    assert "error: rank 1 has checkpoint" in ended[0][2]
    assert "as rank 0 has" in ended[0][2]


def test_a_rank_that_cannot_load_is_named(tmp_path):
    (tmp_path / "1").mkdir()
    save_tokenizer(save_checkpoint(tmp_path / "0" / "model"))
    there = f"import os, sys; os.chdir({str(tmp_path)!r} + '/' + os.environ['MLX_RANK'])"
    run = "from mlx_diffusiongemma.generate import main; sys.exit(main(['--model', './model']))"
    ended = run_ranks(2, ["-c", f"{there}; {run}"])
    assert ended[0][0] == 1
    assert "error: rank 1 (" in ended[0][2]
    assert "CheckpointError: model './model' is not a folder" in ended[0][2]


def test_a_model_that_no_rank_can_load_is_bad_input_and_the_next_may_be_right():
    """A server that loads when it is asked goes on: nothing was lost."""
    flags = ["--model", "no/such/folder", "--lazy", "--port", "0", "--no-discovery"]
    with started(2, ["-m", "mlx_diffusiongemma.server", *flags]) as ranks:
        assert ranks[0].stdout is not None
        url = json.loads(ranks[0].stdout.readline())["url"]
        for _ in range(2):
            reply = httpx.post(f"{url}/v1/chat/completions", json=LONG | {"stream": False}, timeout=60)
            assert reply.status_code == 500
            time.sleep(4)
        assert [each.poll() for each in ranks] == [None, None]


def test_what_ranks_cannot_do_together_is_refused():
    ended = run_ranks(2, [*SERVER, "--models", "other"])
    assert [code for code, _, _ in ended] == [2, 0]
    assert ended[0][2].startswith("error: --models: got it on 2 ranks, expected one model without an adapter")
