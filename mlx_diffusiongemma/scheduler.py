"""One model thread that many callers share.

    any thread                       the model thread, round after round

    submit ──▶ queued ─────────────▶ admitted while fewer than `max_active` hold a prefix, and memory lasts
                                       │
                                     prefilling     one chunk of one prompt, in turn
                                       │
                                     waiting  ◀───┐ at the end of a canvas, if others wait
                                       │          │
                                     denoising ───┘ one step of up to `max_batch` canvases
                                       │
    handle ◀── events ────────────── ended

So a short request waits for a chunk and a canvas of a long one, never for its end. The rows of a step do not depend on
each other (`denoise.py`), so every request gives the tokens that it gives alone.

The thread that loads the model is the one that runs it. An error in a step is the error of the row that causes it; an
error that ends the thread is that of the requests under way: those that were queued are served by the next thread,
which loads the model again.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import logging
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx

from .config import check_integer, check_number
from .denoise import StepResult
from .events import Finished, PrefillProgress, Result
from .handle import EngineError, Handle
from .memory import MemoryBudget
from .pipeline import Pipeline, advance, wired_limit
from .prepare import Asked, Messages, Prepared, Preparer, request_sizes
from .request import Request
from .scoring import Score

logger = logging.getLogger(__name__)
logger.addHandler(logging.NullHandler())  # whether errors are shown is up to the application


class QueueFullError(EngineError):
    """As many requests wait as may wait."""


class EngineClosedError(EngineError):
    """The engine does not serve any more."""


@dataclass(frozen=True)
class EngineOptions:
    """How the engine shares the model.

    Attributes:
        max_batch: canvases that are denoised in one step.
        max_active: requests that hold a prefix in memory and take turns, those denoised among them.
        max_queue: requests that wait for that, or for memory; one more is refused.
        max_overtaken: requests that may go before one that memory has no room for yet; then they wait with it.
        ttl: seconds without a request after which the model is unloaded; None keeps it.
    """

    max_batch: int = 4
    max_active: int = 64
    max_queue: int = 64
    max_overtaken: int = 16
    ttl: float | None = None

    def __post_init__(self) -> None:
        check_integer("max_batch", self.max_batch, 1)
        check_integer("max_active", self.max_active, self.max_batch)
        check_integer("max_queue", self.max_queue, 1)
        check_integer("max_overtaken", self.max_overtaken, 0)
        if self.ttl is not None:
            check_number("ttl", self.ttl, 0)


@dataclass
class EngineCounts:
    """What an engine has done since it was made."""

    submitted: int = 0
    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0  # the queue was full
    loads: int = 0
    restarts: int = 0  # of the model thread, after an error that ended it
    steps: int = 0
    rows: int = 0  # canvases denoised in those steps
    generated_tokens: int = 0
    cached_tokens: int = 0  # of prompts, that were not encoded again


@dataclass(frozen=True)
class EngineStats:
    """What the engine does now, and what it has done. GB = 1e9 bytes, of MLX's allocator.

    Attributes:
        loaded: whether the model is in memory.
        queued: requests that hold nothing yet.
        prefilling: requests whose prompt is being encoded, chunk by chunk in turn.
        waiting: prefilled requests without a row: they hold a prefix, and wait for a place in the next steps.
        denoising: requests with a row of the next step.
        active_memory_gb: arrays that exist.
        cache_memory_gb: what the allocator keeps for arrays to come.
        peak_memory_gb: most that was active at one time since the process began.
        counts: since the engine was made.
    """

    loaded: bool
    queued: int
    prefilling: int
    waiting: int
    denoising: int
    active_memory_gb: float
    cache_memory_gb: float
    peak_memory_gb: float
    counts: EngineCounts

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values."""
        return asdict(self)


@dataclass(eq=False)
class _Job:
    """One request on its way through the model thread."""

    handle: Handle
    prepared: Prepared
    submitted: float
    overtaken: int = 0  # by requests that came later
    request: Request | None = None
    prefill: Iterator[PrefillProgress] | None = None

    @property
    def running(self) -> Request:
        assert self.request is not None  # admitted first
        return self.request


class Engine:
    """Serves requests of many callers with one model. Its methods may be called from any thread."""

    def __init__(self, load: Callable[[], Pipeline], options: EngineOptions | None = None) -> None:
        """Bind how the model is loaded: the model thread does that at the first request and after an unloading."""
        self.options = options or EngineOptions()
        self._load = load
        self._preparer: Preparer | None = None
        self._memory: MemoryBudget | None = None
        self._process = os.getpid()
        self._wake = threading.Condition()
        self._jobs: set[_Job] = set()  # all that have not ended
        self._queue: deque[_Job] = deque()
        self._may_admit = False  # something has come or gone since the queue was looked through
        self._loading: list[Future[Preparer]] = []  # callers that wait for the model itself
        self._calls: deque[tuple[Callable[[Pipeline], Score], Future[Score]]] = deque()  # that run between two rounds
        self._thread: threading.Thread | None = None
        self._closing = self._draining = False
        self._counts = EngineCounts()
        # Only the model thread changes what follows; `stats` reads it.
        self._pipeline: Pipeline | None = None
        self._while_loaded = ExitStack()
        self._prefilling: deque[_Job] = deque()
        self._waiting: deque[_Job] = deque()
        self._denoising: list[_Job] = []
        self._has_freed = False  # since the allocator's cache was emptied

    # -- any thread ---------------------------------------------------------------------------------------------------

    def start(self) -> Preparer:
        """Load the model, unless that was done before; return what prepares requests. Raises what loading raises."""
        self._check_process()
        with self._wake:
            if self._preparer is not None:
                return self._preparer
        return self.load()

    def load(self) -> Preparer:
        """Load the model, unless it is in memory; return what prepares requests. Raises what loading raises."""
        self._check_process()
        with self._wake:
            self._check_open()
            ready: Future[Preparer] = Future()
            self._loading.append(ready)
            self._ensure_thread()
            self._wake.notify()
        return ready.result()

    def submit(self, messages: Messages, **options: Any) -> Handle:
        """Queue a request.

        Args:
            messages, options: those of `Pipeline.stream`.

        Raises:
            TypeError, ValueError: those of `Pipeline.stream`, `MemoryLimitError` among them.
            QueueFullError: `max_queue` requests wait already.
            EngineClosedError: `close` was called.
            EngineError: this process was forked from the one that made the engine.
        """
        prepared = self.start()(messages, options)
        assert self._memory is not None
        self._memory.check(*request_sizes([prepared]))
        job = _Job(Handle(self._withdraw), prepared, time.perf_counter())
        with self._wake:
            self._check_open()
            if len(self._queue) >= self.options.max_queue:
                self._counts.refused += 1
                raise QueueFullError(
                    f"{len(self._queue)} requests are waiting, expected at most {self.options.max_queue}"
                )
            self._ensure_thread()
            self._counts.submitted += 1
            self._jobs.add(job)
            self._queue.append(job)
            self._may_admit = True
            self._wake.notify()
        return job.handle

    def score(self, messages: Messages, **options: Any) -> Score:
        """Score a text in the model thread, between two steps of the requests under way; wait for it.

        Args:
            messages, options: those of `Pipeline.score`.

        Raises:
            TypeError, ValueError: those of `Pipeline.score`.
            EngineError: the model thread ended, or the engine was closed first.
        """
        self.start()
        scored: Future[Score] = Future()
        with self._wake:
            self._check_open()
            self._ensure_thread()
            self._calls.append((lambda pipeline: pipeline.score(messages, **options), scored))
            self._wake.notify()
        return scored.result()

    @property
    def preparer(self) -> Preparer:
        """What prepares requests; the model is loaded for it."""
        return self.start()

    def generate_each(self, requests: Sequence[Asked]) -> list[Result]:
        """Answer several prompts, each with options of its own, and wait for all.

        Args:
            requests: prompt and options of each; both are those of `Pipeline.stream`.

        Raises:
            Exception: that of the first one that fails. The others are cancelled then.
        """
        handles: list[Handle] = []
        try:
            for messages, options in requests:
                handles.append(self.submit(messages, **options))
            return [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    async def submit_async(self, messages: Messages, **options: Any) -> Handle:
        """Do what `submit` does without holding up the event loop; cancelling the task cancels the request."""
        submitting = asyncio.ensure_future(asyncio.to_thread(self.submit, messages, **options))
        try:
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(_abandon)
            raise

    def _withdraw(self, handle: Handle) -> None:
        """End a cancelled request that is still queued. The model thread sees to one that is under way."""
        with self._wake:
            job = next((job for job in self._queue if job.handle is handle), None)
            if job is None:
                return
            self._queue.remove(job)
            self._jobs.discard(job)
            self._may_admit = True  # it may have been one that others waited behind
            result = job.prepared.cancelled_result(time.perf_counter() - job.submitted)
            self._note(result)
        handle.put(Finished(result))

    def close(self, *, drain: bool = False) -> None:
        """Stop serving and wait for the model thread.

        Args:
            drain: let what was submitted end first; otherwise it fails with `EngineClosedError`.
        """
        if os.getpid() != self._process:
            return  # a fork has no model thread
        with self._wake:
            self._closing, self._draining = True, drain
            self._wake.notify_all()
        while True:
            with self._wake:
                thread = self._thread
            if thread is None or thread is threading.current_thread():
                break
            thread.join()  # and the one that takes over from a thread that died
        atexit.unregister(self.close)

    def stats(self) -> EngineStats:
        """Return counts and memory."""
        with self._wake:
            return EngineStats(
                loaded=self._pipeline is not None,
                queued=len(self._queue),
                prefilling=len(self._prefilling),
                waiting=len(self._waiting),
                denoising=len(self._denoising),
                active_memory_gb=mx.get_active_memory() / 1e9,
                cache_memory_gb=mx.get_cache_memory() / 1e9,
                peak_memory_gb=mx.get_peak_memory() / 1e9,
                counts=replace(self._counts),
            )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_process(self) -> None:
        """Raise `EngineError` in a fork, before a lock is touched that some thread may have held."""
        if os.getpid() != self._process:
            raise EngineError("this engine was made in another process; expected one made in this process")

    def _check_open(self) -> None:
        if self._closing:
            raise _closed()

    def _ensure_thread(self) -> None:
        """Start the model thread where there is none. The lock is held."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="mlx_diffusiongemma", daemon=True)
            thread.start()
            self._thread = thread
            atexit.register(self.close)  # a thread that still runs when the interpreter ends makes MLX abort

    # -- the model thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._has_work():
                self._round()
        except BaseException as error:  # whatever ends this thread: nobody may wait for it in vain
            _log("the model thread ended", error)
            self._end_all(EngineError(f"the model thread ended and is started again: {type(error).__name__}: {error}"))
            with self._wake:
                self._counts.restarts += 1
        finally:
            try:
                self._unload()
                mx.clear_streams()  # MLX wants that of every thread; without it the process aborts when it exits
            except Exception as error:  # a device that has failed may fail here too, and the next thread must begin
                _log("unloading failed", error)
            with self._wake:
                self._thread = None
                if self._queue or self._loading or self._calls:
                    self._ensure_thread()

    def _has_work(self) -> bool:
        """Wait for work, and unload the model when there is none for long; False when the engine closes."""
        while True:
            with self._wake:
                ttl = self.options.ttl if self._pipeline is not None else None
                has_come = self._wake.wait_for(
                    lambda: self._closing or self._has_jobs(),
                    None if ttl is None else min(ttl, threading.TIMEOUT_MAX),
                )
                if has_come:
                    return self._has_jobs()
            self._unload()

    def _has_jobs(self) -> bool:
        return bool(self._queue or self._loading or self._calls or any(self._under_way()))

    def _under_way(self) -> Iterator[_Job]:
        yield from self._prefilling
        yield from self._waiting
        yield from self._denoising

    def _round(self) -> None:
        if self._closing and not self._draining:
            self._end_all(_closed(), queued=True)
            return
        if not self._ensure_loaded():
            return
        self._drop_cancelled()
        self._admit()
        self._encode_chunk()
        self._denoise()
        self._run_call()
        if self._has_freed:  # now that nothing here holds what has ended
            self._has_freed = False
            mx.clear_cache()

    def _ensure_loaded(self) -> bool:
        """Load the model; False where that fails, for all who wait."""
        if self._pipeline is None:
            try:
                self._pipeline = self._load()
                self._while_loaded.enter_context(wired_limit(self._pipeline.model))
                self._pipeline.warm_up()
            except BaseException as error:  # whatever it is: nobody may wait for it in vain
                _log("loading failed", error)
                forget(error)
                reason = error if isinstance(error, Exception) else EngineError(f"loading ended: {error!r}")
                self._end_all(reason, queued=True)
                self._unload()
                return False
            self._counts.loads += 1
        with self._wake:
            self._preparer, self._memory = self._pipeline.preparer, self._pipeline.memory
            loading, self._loading = self._loading, []
        for ready in loading:
            ready.set_result(self._preparer)
        return True

    def _unload(self) -> None:
        """Let go of the model and of all memory."""
        self._while_loaded.close()
        self._pipeline = None
        gc.collect()
        mx.clear_cache()

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._under_way() if job.handle.is_cancelled]:
            self._cancel(job)

    def _admit(self) -> None:
        """Begin as many queued requests as may hold a prefix and fit into memory together."""
        while self._may_admit:
            active = list(self._under_way())
            with self._wake:
                job = self._take_from_queue(active)
                self._may_admit = job is not None
            if job is None:
                return
            assert self._pipeline is not None
            with self._blamed_on(job):
                self._pipeline.make_room([each.prepared for each in (*active, job)], self.options.max_batch)
                self._open(job)

    def _take_from_queue(self, active: list[_Job]) -> _Job | None:
        """Remove and return the first that fits; none behind one that was overtaken too often. The lock is held."""
        if len(active) >= self.options.max_active:
            return None
        overtaken: list[_Job] = []
        for job in self._queue:
            if self._fits(active, job):
                self._queue.remove(job)
                for other in overtaken:
                    other.overtaken += 1
                return job
            if job.overtaken >= self.options.max_overtaken:
                return None
            overtaken.append(job)
        return None

    def _fits(self, active: list[_Job], another: _Job) -> bool:
        """Tell whether one more request fits; alone it does, that was checked when it came."""
        assert self._memory is not None
        sizes, chunk = request_sizes([job.prepared for job in (*active, another)])
        return not active or self._memory.fits(sizes, chunk, self.options.max_batch)

    def _open(self, job: _Job) -> None:
        assert self._pipeline is not None
        job.request = self._pipeline.open(job.prepared)
        job.request.submitted = job.submitted
        if job.request.finish_reason is not None:  # nothing was asked for
            self._finish(job)
        else:
            job.prefill = job.request.prefill()
            self._prefilling.append(job)

    def _encode_chunk(self) -> None:
        """Encode one chunk of the prompt whose turn it is."""
        if not self._prefilling:
            return
        job = self._prefilling[0]
        assert job.prefill is not None
        with self._blamed_on(job):
            progress = next(job.prefill)
            job.handle.put(progress)
            if progress.processed < progress.total:
                self._prefilling.rotate(-1)
                return
            for _ in job.prefill:  # no chunk follows the last one: what it leaves behind is put away
                pass
            job.prefill, job.prepared = None, job.prepared.without_images()
            self._prefilling.remove(job)
            self._waiting.append(job)

    def _run_call(self) -> None:
        """Do the next thing that a caller waits for, which is no request."""
        with self._wake:
            if not self._calls:
                return
            call, scored = self._calls.popleft()
        assert self._pipeline is not None
        try:
            scored.set_result(call(self._pipeline))
        except BaseException as error:
            forget(error)
            scored.set_exception(error)
            if not isinstance(error, Exception):
                raise
        self._has_freed = True

    def _denoise(self) -> None:
        """Take one denoising step."""
        while self._waiting and len(self._denoising) < self.options.max_batch:
            self._denoising.append(self._waiting.popleft())
        if len(self._denoising) > 1:  # a step of one canvas encodes the end of its prefix along
            for job in list(self._denoising):
                with self._blamed_on(job):
                    job.running.encode_tail()
        jobs = list(self._denoising)
        if not jobs:
            return
        for job, result, batch_size in self._step(jobs):
            with self._blamed_on(job):
                if isinstance(result, Exception):
                    raise result
                self._absorb(job, result, batch_size)

    def _step(self, jobs: list[_Job]) -> list[tuple[_Job, StepResult | Exception, int]]:
        """Run a step for several jobs; when it fails, for each alone, so that only the one that is to blame fails.

        Returns each job's result, and how many rows its step had.
        """
        assert self._pipeline is not None
        failed: Exception | None = None
        try:
            results = self._pipeline.denoise([job.running for job in jobs])
        except Exception as error:
            failed = error
        if failed is not None:  # outside of the handler, which would keep what the failed step holds
            forget(failed)
            mx.clear_cache()
            if len(jobs) == 1:
                return [(jobs[0], failed, 1)]
            return [entry for job in jobs for entry in self._step([job])]
        self._counts.steps += 1
        self._counts.rows += len(jobs)
        return [(job, result, len(jobs)) for job, result in zip(jobs, results, strict=True)]

    def _absorb(self, job: _Job, result: StepResult, batch_size: int) -> None:
        """Take over a step of one request; at the end of its canvas commit that, and give up its row if others wait."""
        request = job.running
        for event in advance(request, result, batch_size, lambda: job.handle.is_cancelled):
            job.handle.put(event)
        if request.finish_reason is not None:
            self._finish(job)
        elif not request.has_canvas and self._waiting:
            self._denoising.remove(job)
            self._waiting.append(job)

    # -- how a request ends ------------------------------------------------------------------------------------------

    @contextmanager
    def _blamed_on(self, job: _Job) -> Iterator[None]:
        """Make an error the end of this request, and of no other."""
        try:
            yield
        except Exception as error:
            self._fail(job, error)

    def _cancel(self, job: _Job) -> None:
        with self._blamed_on(job):
            job.running.cancel()
            self._finish(job)

    def _finish(self, job: _Job) -> None:
        result = job.running.result()
        with self._wake:
            self._note(result)
        job.handle.put(Finished(result))
        self._let_go(job)

    def _note(self, result: Result) -> None:
        """Count what has ended. The lock is held."""
        if result.finish_reason == "cancelled":
            self._counts.cancelled += 1
        else:
            self._counts.completed += 1
        self._counts.generated_tokens += result.stats.generated_tokens
        self._counts.cached_tokens += result.stats.cached_tokens

    def _fail(self, job: _Job, error: BaseException) -> None:
        self._counts.failed += 1
        if not isinstance(error, EngineError):  # those that end many requests are logged once, or were asked for
            _log("a request failed", error)
        forget(error)
        job.handle.fail(error)
        self._let_go(job)

    def _let_go(self, job: _Job) -> None:
        """Forget a job and free what it holds."""
        with self._wake:
            self._jobs.discard(job)
            self._may_admit = True
            for jobs in (self._queue, self._prefilling, self._waiting, self._denoising):
                if job in jobs:
                    jobs.remove(job)
        job.request = job.prefill = None
        self._has_freed = True

    def _end_all(self, error: BaseException, *, queued: bool = False) -> None:
        """Fail what is under way, and what is queued too if asked."""
        with self._wake:
            jobs = [job for job in self._jobs if queued or job not in self._queue]
            loading: list[Future[Preparer]] = []
            calls: list[Future[Score]] = []
            if queued:
                loading, self._loading = self._loading, []
                calls = [scored for _, scored in self._calls]
                self._calls.clear()
        for job in jobs:
            self._fail(job, error)
        for ready in loading:
            ready.set_exception(error)
        for scored in calls:
            scored.set_exception(error)


def _log(what: str, error: BaseException) -> None:
    """Log an error as text: a kept log record would keep the frames and their arrays alive."""
    logger.error("%s:\n%s", what, "".join(traceback.format_exception(error)))


def _abandon(submitting: asyncio.Future[Handle]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()


def forget(error: BaseException) -> None:
    """Let go of what the frames of an error hold: arrays of a request, perhaps the weights."""
    error.__traceback__ = error.__context__ = error.__cause__ = None


def _closed() -> EngineClosedError:
    return EngineClosedError("the engine is closed")
