"""What every command line shares: the parser, errors of one line, exit codes, and streams that may be missing.

Exit codes: 0, 2 for bad input (one line that begins with `error:`), 1 for work that failed or could not be written,
130 after Ctrl-C. Nothing here knows the model.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from .config import DIFFUSION_NUMBERS
from .policies import POLICIES

if TYPE_CHECKING:
    from .team import Team

DTYPES = ("float32", "bfloat16", "float16")  # the names that `checkpoint.DTYPES` knows; that module is slow to import
FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # set by what starts ranks; `mlx.launch` sets the first
MPI_SIZE = "OMPI_COMM_WORLD_SIZE"  # of processes, set by `mpirun`
# Options of the sampler that go to the loop as they are, under the loop's own names.
SAMPLER_OPTIONS = ("temperature", "top_p", "top_k", "min_p", *DIFFUSION_NUMBERS, "policy")
# Options that go to `pipeline.load` as they are.
LOAD_OPTIONS = ("revision", "adapter_path", "kv_bits", "kv_group_size", "memory_limit", "sparse_self_conditioning")
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with 2."""
        self.exit(BAD_INPUT, f"error: {message} (see --help)\n")


class BadInput(Exception):
    """What the user gave cannot be used; the message is one line."""


class WorkFailed(Exception):
    """What was asked for is right but could not be done; the message is one line."""


@contextmanager
def bad_input() -> Iterator[None]:
    """Turn the errors of reading input, of loading and of starting into `BadInput`. Later ones are our own mistakes."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise BadInput(" ".join(str(error).split())) from error


def size(text: str) -> int:
    """Read a number of bytes: 500MB is 500,000,000, 2GiB is 2 x 1,073,741,824."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a size such as 2GB, 500MB or 0")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def positive(text: str) -> int:
    """Read an integer of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least 1")
    return number


def add_loading_options(group: argparse._ArgumentGroup) -> None:
    """Add the flags of `LOAD_OPTIONS`."""
    group.add_argument("--revision", help="branch, tag or commit of a Hub id")
    group.add_argument("--adapter-path", help="folder of a LoRA adapter")
    group.add_argument("--kv-bits", type=int, metavar="N", help="quantise keys and values of full attention: 8 or 4")
    group.add_argument("--kv-group-size", type=int, metavar="N", help="numbers that share a scale (default: 64)")
    group.add_argument(
        "--sparse-self-conditioning",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="sum up likely tokens only where they carry the signal (default: yes)",
    )
    group.add_argument(
        "--memory-limit", type=float, metavar="GB", help="refuse what needs more (default: the machine's)"
    )


def add_sampling_options(group: argparse._ArgumentGroup) -> None:
    """Add the flags that narrow the draw. No default is here that the checkpoint has."""
    group.add_argument(
        "--temp",
        "--temperature",
        dest="temperature",
        type=float,
        help="1 is the checkpoint's schedule, other values scale it, 0 takes the likeliest tokens",
    )
    group.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that make up P")
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    group.add_argument("--min-p", type=float, metavar="P", help="draw from tokens at least P times as likely")


def add_diffusion_options(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the denoising loop. No default is here that the checkpoint has."""
    group.add_argument("--max-denoising-steps", type=int, metavar="N", help="steps per canvas at most")
    group.add_argument("--entropy-bound", type=float, metavar="NATS", help="uncertainty that one step may settle")
    group.add_argument("--t-min", type=float, metavar="T", help="temperature at the last step")
    group.add_argument("--t-max", type=float, metavar="T", help="temperature at the first step")
    group.add_argument("--confidence-threshold", type=float, metavar="NATS", help="mean entropy of a finished canvas")
    group.add_argument("--stability-threshold", type=int, metavar="N", help="steps a finished canvas stayed the same")
    group.add_argument("--policy", choices=list(POLICIES), help="fewer steps than the published ones (default: exact)")


def json_line(value: Any) -> str:
    """Return JSON-ready values as one line that standard output can show."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return json.dumps(value, ensure_ascii=not unicode)


def count(what: str) -> Callable[[int, int], None]:
    """Return a function that shows how far something is, where standard error is a terminal."""
    from .display import is_terminal

    def show(done: int, total: int) -> None:
        if is_terminal(sys.stderr):
            text = f"{what}: {done} of {total}" if done < total else ""
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    return show


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, the first column to the left, numbers to the right."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(header)} |", f"|{'|'.join(ruler)}|", *(f"| {' | '.join(row)} |" for row in rows)]


def print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning as one line, in place of Python's three."""
    print(f"warning: {message}", file=sys.stderr)


def open_standard_streams() -> None:
    """Give Python the standard streams that the caller has closed; it has None there otherwise."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def discard_output() -> None:
    """Let nothing more be written to standard output, also when Python closes it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def on_ranks(run: Callable[[Team | None], int]) -> int:
    """Run a command line whose model several processes share, if they were started so; return the exit code.

    Args:
        run: the command line, given what loads a model on all of them; None where this process is alone.
    """
    if not any(name in os.environ for name in LAUNCHED):
        return run(None)
    from ctypes.util import find_library

    import mlx.core as mx

    from .control import RankError
    from .ranks import Ranks
    from .team import Team, follow

    open_standard_streams()
    if MPI_SIZE in os.environ and (library := find_library("mpi")):  # MLX looks for the name that developers have
        os.environ.setdefault("MLX_MPI_LIBNAME", library)
    ranks = Ranks(mx.distributed.init())
    if ranks.size == 1:
        if os.environ.get(MPI_SIZE, "1") != "1":
            problem = f"mpirun has started {os.environ[MPI_SIZE]} processes but MLX cannot use its library"
            print(f"error: {problem}, expected Open MPI, or its file in MLX_MPI_LIBNAME", file=sys.stderr)
            return BAD_INPUT
        return run(None)
    if ranks.rank:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal reaches all; rank 0 says what it means
        try:
            follow(ranks)
        except OSError as error:
            print(f"error: rank {ranks.rank} cannot reach rank 0: {error}", file=sys.stderr)
            return FAILED
        return 0
    try:
        team = Team(ranks)
    except RankError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    team.on_fault(end_with)
    try:
        code = run(team)
    except RankError as error:
        end_with(error)
    finally:
        team.close()
    if team.is_lost:
        sys.stdout.flush()
        os._exit(code)
    return code


def end_with(error: Exception) -> NoReturn:
    """End the process at once: what waits for a lost rank cannot be interrupted."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(FAILED)


def run_command_line(
    parse: Callable[[], argparse.Namespace], run: Callable[[argparse.Namespace], int], output: str
) -> int:
    """Parse, run, and turn errors into one line; return the exit code.

    Args:
        parse: reads the arguments; exits by itself when they are wrong.
        run: does the work and returns the exit code.
        output: what is written to standard output, for the error when that fails: "the answer".
    """
    open_standard_streams()
    args = parse()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal in another encoding shows ? instead of failing
    with warnings.catch_warnings():
        warnings.showwarning = print_warning
        try:
            code = run(args)
            sys.stdout.flush()
            return code
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr)
            return BAD_INPUT
        except (FloatingPointError, WorkFailed) as error:
            print(f"error: {error}", file=sys.stderr)
            return FAILED
        except BrokenPipeError:
            discard_output()  # the reader has left: say nothing
            return BROKEN_PIPE
        except OSError as error:
            discard_output()
            print(f"error: cannot write {output}: {error.strerror}", file=sys.stderr)
            return FAILED
        except KeyboardInterrupt:
            return INTERRUPTED
