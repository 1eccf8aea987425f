"""Starts the ranks of a group on this machine, with MLX's ring over the loopback interface."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from ctypes.util import find_library
from pathlib import Path

from terminal import environment

HERE = Path(__file__).parent


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def started(size: int, arguments: Sequence[str], **more: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start Python with the same arguments on every rank, as `mlx.launch` does; kill what is left at the end."""
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
        kept = {"MLX_HOSTFILE": str(hosts), "PYTHONPATH": os.pathsep.join(sys.path), **more}
        ranks = [
            subprocess.Popen(
                [sys.executable, *arguments],
                env=environment() | kept | {"MLX_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for rank in range(size)
        ]
        try:
            yield ranks
        finally:
            for each in ranks:
                each.kill()
                each.communicate()


def run_mpi(size: int, arguments: Sequence[str], timeout: float = 280) -> tuple[int, str, str]:
    """Run Python on every rank with `mpirun`; return exit code, stdout and stderr of all together."""
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    more = {"PYTHONPATH": os.pathsep.join(sys.path), "MLX_MPI_LIBNAME": find_library("mpi") or "", **root}
    command = ["mpirun", "--quiet", "--oversubscribe", "-n", str(size), sys.executable, *arguments]
    ended = subprocess.run(
        command, env=environment(PATH=os.environ["PATH"]) | more, capture_output=True, text=True, timeout=timeout
    )
    return ended.returncode, ended.stdout, ended.stderr


def run_ranks(size: int, arguments: Sequence[str], timeout: float = 280, **more: str) -> list[tuple[int, str, str]]:
    """Run Python on every rank to its end; return exit code, stdout and stderr of each."""
    with started(size, arguments, **more) as ranks:
        with ThreadPoolExecutor(size) as pool:  # a rank whose pipe is full would wait
            outputs = list(pool.map(lambda each: each.communicate(timeout=timeout), ranks))
        return [(each.returncode, out.decode(), err.decode()) for each, (out, err) in zip(ranks, outputs, strict=True)]
