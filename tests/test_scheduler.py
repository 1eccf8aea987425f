"""The engine: many callers, one model thread. Every request gives what it gives alone, and none holds up another."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest
from small_model import BUNDLED, bundled_checkpoint

from mlx_diffusiongemma.events import CanvasCommitted, DenoisingStep, Finished, PrefillProgress
from mlx_diffusiongemma.handle import MAX_UNREAD, EngineError, Handle
from mlx_diffusiongemma.memory import MemoryLimitError, Wanted
from mlx_diffusiongemma.pipeline import Pipeline
from mlx_diffusiongemma.prepare import request_sizes
from mlx_diffusiongemma.request import Request
from mlx_diffusiongemma.scheduler import Engine, EngineClosedError, EngineOptions, QueueFullError
from mlx_diffusiongemma.tokenizer import Tokenizer

LONG = {"max_tokens": 48, "seed": 3, "confidence_threshold": 1e-9}  # six canvases of six steps
SHORT = {"max_tokens": 4, "seed": 4, "confidence_threshold": 1e-9}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(BUNDLED)


@pytest.fixture
def load(tokenizer: Tokenizer) -> Callable[[], Pipeline]:
    """Return what makes a random model: canvas 8, context 256, 6 steps. No token ends it."""

    def make() -> Pipeline:
        return Pipeline(bundled_checkpoint(tokenizer, end_ids=(tokenizer.vocab_size - 1,)))

    return make


@pytest.fixture
def engine(load: Callable[[], Pipeline]) -> Iterator[Engine]:
    with Engine(load, EngineOptions(max_batch=3)) as made:
        made.start()
        yield made


def held(engine: Engine) -> Callable[[], None]:
    """Stop the engine in front of its next step; return what lets it go on."""
    gate = threading.Event()
    original = engine._pipeline.denoise

    def denoise(requests: Any) -> Any:
        assert gate.wait(60)
        return original(requests)

    engine._pipeline.denoise = denoise
    return gate.set


def two_events(handle: Handle) -> bool:
    return len(handle._unread) >= 2


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited a minute in vain"
        time.sleep(0.002)


def test_every_request_gives_what_it_gives_alone(engine, load):
    alone = load()
    asked = [("x" * (1 + 37 * i % 90), {"max_tokens": 3 + 11 * i % 40, "seed": i}) for i in range(9)]
    handles = [engine.submit(prompt, **options) for prompt, options in asked]
    for (prompt, options), handle in zip(asked, handles, strict=True):
        expected = alone.generate(prompt, **options)
        result = handle.result(60)
        assert result.token_ids == expected.token_ids
        assert result.stats.denoising_steps == expected.stats.denoising_steps
    assert engine.stats().counts.rows > engine.stats().counts.steps  # they did share steps
    assert max(handle.result().stats.batch_size for handle in handles) > 1


def test_events_are_those_of_the_pipeline(engine, load):
    def shape(event: Any) -> Any:
        return event.result.token_ids if isinstance(event, Finished) else event

    assert [shape(e) for e in engine.submit("hello", **LONG)] == [shape(e) for e in load().stream("hello", **LONG)]


def test_callers_in_asyncio_read_side_by_side(engine, load):
    async def ask(seed: int) -> tuple[int, ...]:
        async for event in engine.submit("hello", **{**LONG, "seed": seed}):
            if isinstance(event, Finished):
                return event.result.token_ids
        raise AssertionError("no result")

    async def main() -> list[tuple[int, ...]]:
        return await asyncio.gather(*(ask(seed) for seed in range(5)))

    alone = load()
    assert asyncio.run(main()) == [alone.generate("hello", **{**LONG, "seed": seed}).token_ids for seed in range(5)]


def test_a_short_request_does_not_wait_for_a_long_prompt(engine):
    let_go = held(engine)
    first = engine.submit("x", **SHORT)  # holds the engine, so that the other two begin together
    long = engine.submit("y" * 180, max_tokens=1, seed=1, prefill_step_size=4)
    short = engine.submit("x", **SHORT)
    let_go()
    short.result(60)
    chunks = [event for event in list(long._unread) if isinstance(event, PrefillProgress)]
    assert chunks[-1].processed < chunks[-1].total
    assert first.result(60).token_ids == short.result().token_ids
    assert long.result(60).stats.prompt_tokens > 180


def test_a_short_request_does_not_wait_for_a_long_answer(load):
    with Engine(load, EngineOptions(max_batch=1)) as engine:
        engine.start()
        let_go = held(engine)
        long = engine.submit("hello", **LONG)
        short = engine.submit("hello", **SHORT)
        let_go()
        short.result(60)
        assert sum(isinstance(event, CanvasCommitted) for event in list(long._unread)) <= 2
        assert not any(isinstance(event, Finished) for event in list(long._unread))
        assert len(long.result(60).token_ids) == 48


def one_by_one(engine: Engine, gate: threading.Semaphore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every chunk of a prompt and every denoising step wait for the gate."""
    for owner, name in ((engine._pipeline.model, "prefill"), (engine._pipeline, "denoise")):
        original = getattr(owner, name)

        def gated(*arguments: Any, original: Any = original, **named: Any) -> Any:
            assert gate.acquire(timeout=60)
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, gated)


@pytest.mark.parametrize("where", ["queued", "prefilling", "waiting", "denoising"])
def test_a_cancelled_request_ends_and_the_others_go_on(load, where, monkeypatch):
    with Engine(load, EngineOptions(max_batch=1, max_active=1 if where == "queued" else 3)) as engine:
        engine.start()
        gate = threading.Semaphore(0)
        one_by_one(engine, gate, monkeypatch)
        first = engine.submit("hello", **LONG)
        gate.release()  # its only chunk
        wait_until(lambda: engine.stats().denoising == 1)
        chunk = 1 if where == "prefilling" else 2048
        options = {"max_tokens": 40, "seed": 1, "prefill_step_size": chunk}
        victim = first if where == "denoising" else engine.submit("y" * 100, **options)
        if where in ("prefilling", "waiting"):
            until = {"prefilling": lambda: two_events(victim), "waiting": lambda: engine.stats().waiting == 1}[where]
            while not until():
                if gate._value == 0:  # one at a time, so that nobody gets further than is looked for
                    gate.release()
                time.sleep(0.002)
            assert getattr(engine.stats(), where) == 1
        other = engine.submit("hello", **SHORT)
        victim.cancel()
        gate.release(10_000)
        result = victim.result(60)
        assert result.finish_reason == "cancelled" and result.token_ids == ()
        assert sum(result.stats.denoising_steps) <= (where == "denoising")
        events = list(victim)
        progress = [event for event in events if isinstance(event, PrefillProgress)]
        if where == "queued":
            assert [type(event) for event in events] == [Finished]
        elif where == "prefilling":
            assert progress[-1].processed < progress[-1].total
        else:
            assert progress[-1].processed == progress[-1].total
        assert other.result(60).finish_reason == "length"
        if where != "denoising":
            assert len(first.result(60).token_ids) == 48
        assert engine.stats().counts.cancelled == 1


def test_the_seconds_of_a_request_add_up(load, monkeypatch):
    """What it waits for its first chunk counts as time in the queue, though it was admitted before."""
    with Engine(load, EngineOptions(max_batch=1, max_active=2)) as engine:
        engine.start()
        gate = threading.Semaphore(0)
        one_by_one(engine, gate, monkeypatch)
        first = engine.submit("hello", **SHORT)
        gate.release()
        wait_until(lambda: engine.stats().denoising == 1)
        submitted = time.perf_counter()
        second = engine.submit("hello, again", **SHORT)
        time.sleep(0.2)
        gate.release(10_000)
        stats = second.result(60).stats
        whole = time.perf_counter() - submitted
        assert stats.queue_seconds > 0.1
        assert stats.queue_seconds + stats.total_seconds <= whole
        assert first.result(60).stats.queue_seconds < stats.queue_seconds


def test_a_cancelled_request_waits_for_no_model_and_loads_none(load):
    gate, loads = threading.Event(), []

    def slow() -> Pipeline:
        loads.append(1)
        assert gate.wait(60)
        return load()

    with Engine(slow, EngineOptions(ttl=0.05)) as engine:
        gate.set()
        engine.start()
        wait_until(lambda: not engine.stats().loaded)
        gate.clear()
        victim, other = (engine.submit("hello", **LONG) for _ in range(2))
        victim.cancel()
        result = victim.result(0)
        assert result.finish_reason == "cancelled" and result.stats.prompt_tokens > 0
        assert [type(event) for event in victim] == [Finished]
        other.cancel()
        other.cancel()
        gate.set()
        assert engine.stats().counts.cancelled == 2 and engine.stats().queued == 0


def test_leaving_the_handle_cancels(engine):
    with engine.submit("hello", **LONG) as handle:
        for event in handle:
            if isinstance(event, DenoisingStep):
                break
    assert handle.result(60).finish_reason == "cancelled"
    wait_until(lambda: engine.stats().denoising == 0)


def test_a_full_queue_refuses_and_says_so(load):
    with Engine(load, EngineOptions(max_batch=1, max_active=1, max_queue=2)) as engine:
        engine.start()
        let_go = held(engine)
        handles = [engine.submit("hello", **SHORT)]
        wait_until(lambda: engine.stats().denoising == 1)
        handles += [engine.submit("hello", **SHORT) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests are waiting, expected at most 2"):
            engine.submit("hello", **SHORT)
        let_go()
        assert len({handle.result(60).token_ids for handle in handles}) == 1
        assert engine.stats().counts.refused == 1


def test_what_does_not_fit_together_runs_one_after_the_other(load):
    with Engine(load, EngineOptions(max_batch=4)) as engine:
        engine.start()
        alone = engine._memory.plan([Wanted(20, 48)]).total
        engine._memory.limit = int(1.01 * alone)
        with pytest.raises(MemoryLimitError, match="of memory"):
            engine.submit("y" * 200, max_tokens=48)
        handles = [engine.submit("hello", **LONG) for _ in range(3)]
        assert {handle.result(60).stats.batch_size for handle in handles} == {1.0}


def ends_in_order(engine: Engine, tokens: list[int]) -> list[int]:
    """Submit requests of so many tokens to an engine that is held; return them in the order in which they ended."""
    let_go = held(engine)
    order: list[int] = []

    def note(index: int, handle: Handle) -> None:
        handle.result(60)
        order.append(index)

    readers = []
    for index, max_tokens in enumerate(tokens):
        handle = engine.submit("hello", **{**LONG, "max_tokens": max_tokens})
        readers.append(threading.Thread(target=note, args=(index, handle)))
        readers[-1].start()
        if index == 0:
            wait_until(lambda: engine.stats().denoising == 1)
    let_go()
    for reader in readers:
        reader.join()
    return order


def test_what_fits_goes_before_what_does_not(load):
    with Engine(load, EngineOptions(max_batch=4)) as engine:
        engine.start()
        prompt = len(engine._preparer("hello", {}).prompt.token_ids)
        small, large = Wanted(prompt, 8), Wanted(prompt, 200)
        engine._memory.limit = engine._memory.plan([large, small]).total
        # 0 and 1 do not fit together, 0 and 2 do.
        assert ends_in_order(engine, [200, 200, 8]) == [2, 0, 1]


def test_what_does_not_fit_is_not_overtaken_for_ever(load):
    with Engine(load, EngineOptions(max_batch=1, max_overtaken=1)) as engine:
        engine.start()
        prompt = len(engine._preparer("hello", {}).prompt.token_ids)
        engine._memory.limit = engine._memory.plan([Wanted(prompt, 200), Wanted(prompt, 8), Wanted(prompt, 8)]).total
        order = ends_in_order(engine, [200, 200, 8, 8])
        assert order.index(2) < order.index(0) < order.index(3), "the last one went before as well"


def test_remembered_prefixes_give_way_to_requests(load):
    with Engine(load, EngineOptions(max_batch=4)) as engine:
        engine.start()
        engine.submit("y" * 100, max_tokens=1).result(60)
        remembered = engine._pipeline.prefixes.nbytes
        assert remembered > 0
        prepared = engine.start()("x" * 10, {"max_tokens": 48})
        engine._memory.limit = engine._memory.plan(*request_sizes([prepared])).total + remembered // 2
        engine.submit("x" * 10, max_tokens=48).result(60)
        assert engine._pipeline.prefixes.nbytes < remembered


def test_bad_input_is_an_error_of_submit(engine):
    with pytest.raises(TypeError, match="unknown argument 'sed'"):
        engine.submit("hello", sed=1)
    with pytest.raises(ValueError, match="max_tokens"):
        engine.submit("hello", max_tokens=-1)
    with pytest.raises(ValueError, match="expected at most 248"):
        engine.submit("x" * 400)
    assert engine.stats().counts.submitted == 0


def test_nothing_asked_for_is_nothing_done(engine):
    assert engine.submit("hello", max_tokens=0).result(60).finish_reason == "length"


def fails_for(engine: Engine, seed: int, error: BaseException) -> None:
    """Make every step fail that has a row of this seed."""
    original = engine._pipeline.denoise

    def denoise(requests: Any) -> Any:
        if any(request._seed == seed for request in requests):
            raise error
        return original(requests)

    engine._pipeline.denoise = denoise


def test_an_error_in_a_step_is_that_of_the_row_that_causes_it(engine, load):
    fails_for(engine, 13, RuntimeError("out of memory"))
    handles = {seed: engine.submit("hello", **{**LONG, "seed": seed}) for seed in (12, 13, 14)}
    with pytest.raises(RuntimeError, match="out of memory"):
        handles[13].result(60)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(handles[13])
    for seed in (12, 14):
        assert handles[seed].result(60).token_ids == load().generate("hello", **{**LONG, "seed": seed}).token_ids
    assert engine.stats().counts.failed == 1


def test_a_failed_request_keeps_no_memory(load):
    with Engine(load, EngineOptions(ttl=0.05)) as engine:
        engine.start()
        wait_until(lambda: not engine.stats().loaded)
        before = mx.get_active_memory()
        engine.submit("hello", **SHORT).result(60)  # loads again
        fails_for(engine, 13, RuntimeError("out of memory"))
        handles = [engine.submit("hello", **{**LONG, "seed": seed}) for seed in (12, 13)]
        with pytest.raises(RuntimeError, match="out of memory"):
            handles[1].result(60)
        handles[0].result(60)
        wait_until(lambda: not engine.stats().loaded)
        assert mx.get_active_memory() - before < 1000  # the weights alone have 100 times that


def test_an_error_in_a_prompt_is_its_own(engine, monkeypatch):
    original = engine._pipeline.model.prefill

    def prefill(token_ids: mx.array, *rest: Any, **named: Any) -> mx.array:
        if len(token_ids) == 100:
            raise RuntimeError("no room")
        return original(token_ids, *rest, **named)

    monkeypatch.setattr(engine._pipeline.model, "prefill", prefill)
    bad = engine.submit("y" * 150, max_tokens=4, prefill_step_size=100)
    good = engine.submit("hello", **SHORT)
    with pytest.raises(RuntimeError, match="no room"):
        bad.result(60)
    assert good.result(60).finish_reason == "length"


def about_to_die(engine: Engine) -> tuple[Handle, Handle, Callable[[], None]]:
    """Return a request whose step ends the thread, one that is queued behind it, and what lets the thread go on."""
    let_go = held(engine)
    doomed = engine.submit("hello", **{**LONG, "seed": 13})
    wait_until(lambda: engine.stats().denoising == 1)
    queued = engine.submit("hello", **SHORT)
    fails_for(engine, 13, SystemExit("killed"))
    return doomed, queued, let_go


def test_a_dead_model_thread_is_replaced(load):
    with Engine(load, EngineOptions(max_batch=1, max_active=1)) as engine:
        engine.start()
        doomed, queued, let_go = about_to_die(engine)
        let_go()
        # The step that was held goes on; the next one ends the thread.
        with pytest.raises(EngineError, match="ended and is started again: SystemExit: killed"):
            doomed.result(60)
        assert queued.result(60).token_ids == load().generate("hello", **SHORT).token_ids
        counts = engine.stats().counts
        assert (counts.restarts, counts.loads, counts.failed) == (1, 2, 1)


@pytest.mark.parametrize(("place", "error"), [("make_room", RuntimeError("full")), ("open", SystemExit("killed"))])
def test_a_request_is_not_lost_between_queue_and_prefill(load, place, error):
    def fail(*args: Any) -> None:
        raise error

    with Engine(load) as engine:
        engine.start()
        setattr(engine._pipeline, place, fail)
        with pytest.raises((RuntimeError, EngineError), match=str(error)):
            engine.submit("hello", **SHORT).result(60)
        del engine._pipeline  # whatever thread comes next loads another
        engine._pipeline = None
        assert engine.submit("hello", **SHORT).result(60).finish_reason == "length"


def test_a_device_that_is_gone_ends_every_request(load, monkeypatch):
    engine = Engine(load, EngineOptions(max_batch=3))
    engine.start()
    first = engine.submit("hello", **{**LONG, "max_tokens": 200})
    others = [engine.submit("hello", **{**LONG, "max_tokens": 200, "seed": seed}) for seed in (1, 2)]
    wait_until(lambda: engine.stats().denoising == 3)

    def gone(*args: Any) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine._pipeline, "denoise", gone)
    monkeypatch.setattr(mx, "clear_cache", gone)
    for handle in (first, *others):
        with pytest.raises(RuntimeError, match="device lost"):
            handle.result(60)
    monkeypatch.undo()
    assert engine.submit("hello", **SHORT).result(60).finish_reason == "length"
    assert engine.stats().denoising == 0
    engine.close()


def test_memory_is_given_back_when_a_request_ends(engine):
    kept = engine.submit("y" * 200, max_tokens=8, seed=1).result(60)
    assert kept.finish_reason == "length"
    wait_until(lambda: engine.stats().denoising == 0 and mx.get_cache_memory() == 0)


def test_a_fork_has_no_engine():
    program = (
        "import os, sys, threading\n"
        "from mlx_diffusiongemma import load\n"
        "from mlx_diffusiongemma.scheduler import Engine\n"
        "engine = Engine(lambda: load('tiny'))\n"
        "engine.start()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try:\n"
        "        engine.submit('hello')\n"
        "    except RuntimeError as error:\n"
        "        print(error, flush=True)\n"
        "    engine.close()\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "print(engine.submit('Count to 5.', seed=1, max_tokens=4).result().finish_reason)\n"
        "engine.close()\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [
        "this engine was made in another process; expected one made in this process",
        "length",
    ]


def test_a_task_that_is_cancelled_while_the_model_loads_gives_up_its_request(load):
    gate = threading.Event()

    def slow() -> Pipeline:
        assert gate.wait(60)
        return load()

    async def main(engine: Engine) -> None:
        task = asyncio.create_task(engine.submit_async("hello", **LONG))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()
        handle = await engine.submit_async("hello", **SHORT)
        assert [type(event) async for event in handle][-1] is Finished

    with Engine(slow) as engine:
        asyncio.run(main(engine))
        wait_until(lambda: engine.stats().counts.cancelled == 1)


def test_closing_waits_for_the_thread_that_takes_over(load):
    engine = Engine(load, EngineOptions(max_batch=1, max_active=1))
    engine.start()
    doomed, queued, let_go = about_to_die(engine)
    threading.Timer(0.2, let_go).start()
    engine.close(drain=True)
    assert doomed.is_done and queued.result(0).finish_reason == "length"
    assert engine._thread is None


def test_an_unloading_that_fails_does_not_stop_the_engine(load, monkeypatch):
    with Engine(load, EngineOptions(max_batch=1, max_active=1)) as engine:
        engine.start()
        monkeypatch.setattr(engine, "_unload", lambda: (_ for _ in ()).throw(RuntimeError("device lost")))
        fails_for(engine, 13, SystemExit("killed"))
        with pytest.raises(EngineError):
            engine.submit("hello", **{**LONG, "seed": 13}).result(60)
        monkeypatch.undo()
        assert engine.submit("hello", **SHORT).result(60).finish_reason == "length"


def test_an_error_while_cancelling_is_that_of_one_request(load, monkeypatch):
    with Engine(load, EngineOptions(max_batch=3)) as engine:
        engine.start()
        first, bad, good = (engine.submit("hello", **{**LONG, "max_tokens": 200, "seed": seed}) for seed in range(3))
        wait_until(lambda: engine.stats().denoising == 3)
        let_go = held(engine)
        original = Request.cancel

        def cancel(self: Request) -> None:
            if self._seed == 1:
                raise RuntimeError("bad parser")
            original(self)

        monkeypatch.setattr(Request, "cancel", cancel)
        bad.cancel()
        good.cancel()
        let_go()
        with pytest.raises(RuntimeError, match="bad parser"):
            bad.result(60)
        assert good.result(60).finish_reason == "cancelled" and first.result(60).finish_reason == "length"
        assert engine.stats().counts.restarts == 0


def test_a_very_long_ttl_keeps_the_model(load):
    with Engine(load, EngineOptions(ttl=1e12)) as engine:
        for _ in range(2):
            engine.submit("hello", **SHORT).result(60)
            time.sleep(0.05)
        assert (engine.stats().counts.loads, engine.stats().counts.restarts) == (1, 0)


def test_a_model_that_cannot_be_loaded_is_the_error_of_who_asks(load):
    problems = [OSError("no such folder")]

    def sometimes() -> Pipeline:
        if problems:
            raise problems.pop()
        return load()

    with Engine(sometimes) as engine:
        with pytest.raises(OSError, match="no such folder"):
            engine.submit("hello", **SHORT)
        assert engine.submit("hello", **SHORT).result(60).finish_reason == "length"


def test_an_idle_model_is_unloaded_and_comes_back(load):
    with Engine(load, EngineOptions(ttl=0.05)) as engine:
        before = engine.submit("hello", **SHORT).result(60)
        wait_until(lambda: not engine.stats().loaded)
        assert engine.submit("hello", **SHORT).result(60).token_ids == before.token_ids
        assert engine.stats().counts.loads == 2


def test_a_reader_that_never_reads_holds_no_more_than_the_last_drafts():
    handle = Handle()
    for step in range(3 * MAX_UNREAD):
        handle.put(DenoisingStep(0, step + 1, 3 * MAX_UNREAD, (1,), (True,), 0.0, finished=False))
    handle.put(PrefillProgress(1, 1))
    events = list(handle._unread)
    assert len(events) == MAX_UNREAD + 1
    assert events[-2].step == 3 * MAX_UNREAD


def test_a_wait_that_is_given_up_loses_nothing(engine):
    async def read() -> list[Any]:
        let_go = held(engine)
        handle = engine.submit("hello", **LONG)
        events, reader = [], aiter(handle)
        for _ in range(20):
            try:
                events.append(await asyncio.wait_for(anext(reader), 0.01))
            except TimeoutError:
                continue
        assert handle._wakers == []
        let_go()
        return events + [event async for event in reader]

    events = asyncio.run(read())
    assert [type(event) for event in events].count(DenoisingStep) == 36
    assert isinstance(events[-1], Finished)


def test_a_closed_engine_says_so(load):
    engine = Engine(load)
    engine.start()
    let_go = held(engine)
    handle = engine.submit("hello", **LONG)
    threading.Timer(0.2, let_go).start()
    engine.close()
    with pytest.raises(EngineClosedError):
        handle.result(60)
    with pytest.raises(EngineClosedError):
        engine.submit("hello")
    assert not engine.stats().loaded


def test_a_draining_engine_ends_what_it_began(load):
    engine = Engine(load)
    handles = [engine.submit("hello", **LONG) for _ in range(3)]
    engine.close(drain=True)
    assert {len(handle.result(0).token_ids) for handle in handles} == {48}


def test_waiting_for_a_result_has_an_end(engine):
    let_go = held(engine)
    handle = engine.submit("hello", **SHORT)
    with pytest.raises(TimeoutError, match=r"0\.05 s"):
        handle.result(0.05)
    let_go()
    assert handle.result(60)


@pytest.mark.parametrize("how", ["engine.close()", "engine.close(drain=True)", "pass", "handle.result()"])
def test_a_process_with_an_engine_ends_well(how):
    """MLX aborts a process whose threads have not put their streams away."""
    program = (
        "from mlx_diffusiongemma import load\n"
        "from mlx_diffusiongemma.scheduler import Engine\n"
        "engine = Engine(lambda: load('tiny'))\n"
        "handle = engine.submit('Count to 30.', seed=1)\n"
        f"{how}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "options",
    [{"max_batch": 0}, {"max_batch": 4, "max_active": 3}, {"max_queue": 0}, {"max_overtaken": -1}, {"ttl": -1}],
)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=r"got .*expected"):
        EngineOptions(**options)
