"""Several ranks run one model: rank 0 decides, the others do the same.

Rank 0 has the terminal, the HTTP server and the scheduler. Whatever it does with a request that ranks compute together,
or that decides about what they compute, it sends first as a command (`control.py`), and every follower does it with a
request of its own, so that collectives meet in the same order. When something happens, and to whom, is decided on
rank 0 alone: clock, queue and cancellations are there.

    rank 0    prefill 3 │ denoise 1, 2 │ absorb 1 │ absorb 2 │ commit 2 │ ...     numbers of requests
    rank 1    prefill 3 │ denoise 1, 2 │ absorb 1 │ absorb 2 │ commit 2 │ ...
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from . import __version__
from .checkpoint import parameter_bytes
from .control import Leader, Line, RankError
from .denoise import StepResult
from .events import CanvasCommitted, DenoisingStep, PrefillProgress
from .memory import GB, MemoryBudget
from .pipeline import Pipeline, load, wired_limit
from .prepare import Messages, Prepared
from .ranks import Ranks
from .request import Request
from .scoring import Score
from .sharding import largest_part
from .shards import read_header
from .weights import read_index, weight_files

SAMPLES, SAMPLE_BYTES = 64, 4096  # of every weight file


def details() -> dict[str, str]:
    """Return what must be the same on every rank before anything is loaded."""
    device = "CPU" if mx.default_device() == mx.Device(mx.cpu) else "GPU"  # they choose dtypes of their own
    return {"mlx_diffusiongemma": __version__, **{name: version(name) for name in ("mlx", "mlx-lm")}, "device": device}


class Loaded(NamedTuple):
    """What a rank tells of its part of a checkpoint."""

    fingerprint: str  # of the whole checkpoint
    weights: int  # bytes
    limit: int  # bytes of memory


def _told(pipeline: Pipeline, path: Path) -> Loaded:
    return Loaded(checkpoint_fingerprint(path), parameter_bytes(pipeline.model), pipeline.memory.limit)


def checkpoint_fingerprint(folder: Path) -> str:
    """Return what tells checkpoints apart: JSON files, names, types and shapes of tensors, samples of the weights.

    Reading all weights would take as long as loading them; a fine-tune changes nearly every sample.
    """
    digest = blake2b(digest_size=8)
    for path in sorted(folder.glob("*.json")):
        digest.update(path.read_bytes())
    for path in weight_files(folder, read_index(folder)):
        for tensor in read_header(path):
            digest.update(repr((tensor.name, tensor.spec)).encode())
        size = path.stat().st_size
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(size * sample // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


# -- rank 0 -----------------------------------------------------------------------------------------------------------


class Team:
    """Rank 0's: loads a model on all ranks."""

    def __init__(self, ranks: Ranks) -> None:
        """Wait for all other ranks. Raises `RankError` for one that does not come or does not fit."""
        self.ranks = ranks
        self._leader = Leader(ranks, details())
        self._numbers = itertools.count(1)

    def on_fault(self, report: Callable[[RankError], None]) -> None:
        """Let `report` be called, in a thread of its own, when a rank is lost: nothing can be computed any more."""
        self._leader.on_fault(report)

    @property
    def is_lost(self) -> bool:
        """Whether a rank is lost."""
        return self._leader.fault is not None

    def close(self) -> None:
        """Let the other ranks end."""
        self._leader.close()

    def load(self, model: str | Path, **options: Any) -> Pipeline:
        """Load a checkpoint on every rank; the arguments are those of `pipeline.load`, less `ranks`.

        Raises:
            RankError: a rank cannot load it, or has another checkpoint under this name.
            ValueError: those of `pipeline.load` on this rank.
        """
        number = next(self._numbers)
        command = self._leader.send("load", number, str(model), options)
        try:
            pipeline = load(model, ranks=self.ranks, **options)
        except Exception:
            self._leader.forgive(command)
            raise
        own = _told(pipeline, pipeline.folder)
        others: list[Loaded] = self._leader.outcomes(command)
        for rank, other in enumerate(others, 1):
            if other.fingerprint != own.fingerprint:
                got = f"checkpoint {other.fingerprint} under the name {str(model)!r}"
                raise RankError(f"rank {rank} has {got}, expected {own.fingerprint} as rank 0 has")
        led = LeadingPipeline(pipeline, self._leader, self._numbers, number)
        led.reckon_with(max(each.weights for each in (own, *others)), min(each.limit for each in (own, *others)))
        return led


class LedRequest(Request):
    """A request of rank 0 that every other rank has too."""

    def lead(self, leader: Leader, number: int) -> None:
        """Tell the others from now on."""
        self._leader = leader
        self.number = number
        _follow_the_end_of(self, leader, number)

    def prefill(self) -> Iterator[PrefillProgress]:
        """Encode the prompt chunk by chunk, each on every rank when it is asked for here."""
        chunks = super().prefill()
        while True:
            with self._leader.command("prefill", self.number):
                progress = next(chunks, None)
            if progress is None:
                return
            yield progress

    def absorb(self, result: StepResult, batch_size: int = 1) -> DenoisingStep:
        """Take over an evaluated step."""
        with self._leader.command("absorb", self.number, batch_size):
            return super().absorb(result, batch_size)

    def commit(self) -> CanvasCommitted:
        """Append the argmax of the last step to the answer."""
        with self._leader.command("commit", self.number):
            return super().commit()

    def encode_canvas(self) -> None:
        """Write the committed canvas into the prefix, or leave that to a step."""
        with self._leader.command("encode", self.number):
            super().encode_canvas()

    def save(self) -> None:
        """Remember what a step encoded."""
        if not self.is_saved:
            with self._leader.command("save", self.number):
                super().save()

    def encode_tail(self) -> None:
        """Encode the end of the prefix by itself."""
        if self.has_tail:
            with self._leader.command("encode tail", self.number):
                super().encode_tail()


class LeadingPipeline(Pipeline):
    """A pipeline that tells the other ranks what it does, before it does it."""

    _request = LedRequest

    def __init__(self, pipeline: Pipeline, leader: Leader, numbers: Iterator[int], number: int) -> None:
        """Take over a pipeline that all ranks have loaded under this number."""
        self.__dict__.update(pipeline.__dict__)
        self._leader = leader
        self._numbers = numbers
        self._number = number
        _follow_the_end_of(self, leader, number)

    def reckon_with(self, weights: int, limit: int) -> None:
        """Plan memory with the largest part and the smallest machine, in bytes."""
        part = largest_part(self.model.config, self._leader.size)
        self._memory = MemoryBudget(part, weights, self.model.dtype.size, self._kv, limit / GB)

    def open(self, prepared: Prepared) -> Request:
        """Return a request that has not begun, on every rank."""
        number = next(self._numbers)
        with self._leader.command("open", self._number, number, prepared):
            request = super().open(prepared)
        assert isinstance(request, LedRequest)
        request.lead(self._leader, number)
        return request

    def denoise(self, requests: Sequence[Request]) -> list[StepResult]:
        """Run one denoising step on every rank."""
        numbers = [request.number for request in requests if isinstance(request, LedRequest)]
        with self._leader.command("denoise", self._number, numbers):
            return super().denoise(requests)

    def limit_remembered(self, room: int, *, sees: bool) -> None:
        """Let what is remembered have `room` on every rank."""
        with self._leader.command("limit", self._number, room, sees):
            super().limit_remembered(room, sees=sees)

    def score(self, messages: Messages, *, continuation: str | None = None, top: int = 0, **options: Any) -> Score:
        """Score a text on every rank; see `Pipeline.score`."""
        given = {"continuation": continuation, "top": top, **options}
        with self._leader.command("score", self._number, messages, given):
            return super().score(messages, continuation=continuation, top=top, **options)


def _follow_the_end_of(thing: object, leader: Leader, number: int) -> None:
    """Let the others forget what this rank forgets, with one of the next messages."""
    weakref.finalize(thing, leader.dropped.append, number).atexit = False


# -- the other ranks --------------------------------------------------------------------------------------------------


def follow(ranks: Ranks) -> None:
    """Do what rank 0 says until it ends. Ends the process when rank 0 is lost."""
    line = Line(ranks, details())
    follower = _Follower(ranks)
    for number, name, arguments, dropped in line.commands():
        follower.drop(dropped)
        if name == "drop":
            continue
        error, value = None, None
        try:
            value = follower.run(name, arguments)
        except Exception as problem:  # rank 0 compares it with what it got itself
            error = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
        line.report(number, error, value)


class _Follower:
    """The pipelines and requests of a rank, under the numbers that rank 0 has given them."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pipelines: dict[int, Pipeline] = {}
        self._requests: dict[int, Request] = {}
        self._chunks: dict[int, Iterator[PrefillProgress]] = {}
        self._results: dict[int, StepResult] = {}
        self._while_loaded = ExitStack()

    def drop(self, numbers: Sequence[int]) -> None:
        """Forget what rank 0 has forgotten."""
        for number in numbers:
            for held in (self._pipelines, self._requests, self._chunks, self._results):
                held.pop(number, None)
        if not self._pipelines:
            self._while_loaded.close()
        if numbers:
            mx.clear_cache()

    def run(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Run a command; return what rank 0 wants to know."""
        commands: dict[str, Callable[..., Any]] = {
            "load": self._load,
            "open": self._open,
            "prefill": lambda number: next(self._chunks[number], None),
            "denoise": self._denoise,
            "absorb": lambda number, batch_size: self._requests[number].absorb(self._results.pop(number), batch_size),
            "commit": lambda number: self._requests[number].commit(),
            "encode": lambda number: self._requests[number].encode_canvas(),
            "save": lambda number: self._requests[number].save(),
            "encode tail": lambda number: self._requests[number].encode_tail(),
            "limit": lambda number, room, sees: self._pipelines[number].limit_remembered(room, sees=sees),
            "score": lambda number, messages, given: self._pipelines[number].score(messages, **given),
        }
        value = commands[name](*arguments)
        return value if name == "load" else None

    def _load(self, number: int, model: str, options: dict[str, Any]) -> Loaded:
        for held in (self._pipelines, self._requests, self._chunks, self._results):
            held.clear()
        self._while_loaded.close()
        pipeline = load(model, ranks=self._ranks, **options)
        self._while_loaded.enter_context(wired_limit(pipeline.model))
        self._pipelines[number] = pipeline
        return _told(pipeline, pipeline.folder)

    def _open(self, pipeline: int, number: int, prepared: Prepared) -> None:
        request = self._pipelines[pipeline].open(prepared)
        self._requests[number] = request
        self._chunks[number] = request.prefill()

    def _denoise(self, pipeline: int, numbers: Sequence[int]) -> None:
        results = self._pipelines[pipeline].denoise([self._requests[number] for number in numbers])
        self._results |= dict(zip(numbers, results, strict=True))
