"""Between the dialects and the engine: `Ask` -> `Answer`, and which model is loaded.

    answers = await service.open(Ask(messages, options={"max_tokens": 64}))     one per choice
    async for piece in answers[0]: ...                                          PrefillProgress | Frame | Delta | Done

A dialect turns its request into an `Ask` and pieces into its own form. One model is in memory at a time: asking for
another one lets the requests under way end first.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ..events import CanvasCommitted, DenoisingStep, Finished, FinishReason, PrefillProgress, Result, TokenLogprob
from ..handle import Handle
from ..options import MAX_SEED
from ..output import ToolCall, preview
from ..prepare import Preparer
from ..scheduler import Engine, EngineStats
from ..tokenizer import Tokenizer
from .canvas import fit_canvas
from .catalog import Catalog, ModelEntry
from .errors import ApiError, from_exception, refuse, shutting_down
from .logprobs import Spelled, spell, spell_score
from .settings import Settings

WORKERS = 4  # threads that render prompts and decode images; the event loop takes its turn with all of them


@dataclass(frozen=True)
class Ask:
    """One request, whatever the dialect.

    Attributes:
        messages: OpenAI-style messages; with `raw`, the prompt text as the model gets it.
        model: the name in the request; None or "" for the default.
        tools: in OpenAI's form.
        tool_choice: OpenAI's: "auto", "none" to keep the tools out of the prompt, "required", or a function to call.
        max_tool_calls: the answer ends after so many; None for no limit.
        enable_thinking: None for the server's default.
        options: of `Engine.submit`, more than those above; None means the checkpoint's default.
        n: choices; choice i has the seed + i.
        wants_frames: whether `Frame`s are of interest.
        ttl: seconds without a request after which the model is unloaded, from now on; None leaves it as it is.
    """

    messages: str | Sequence[Mapping[str, Any]]
    model: str | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: Any = "auto"
    max_tool_calls: int | None = None
    enable_thinking: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1
    raw: bool = False
    wants_frames: bool = False
    ttl: float | None = None


@dataclass(frozen=True)
class Call:
    """A complete tool call. `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Frame:
    """The draft after a denoising step; every sequence has one entry per position of the canvas.

    `tokens` is display text, control tokens as one-character markers. `settled` tells what this step accepted: a later
    step may still change it. `entropies` are in nats, `entropy` is their mean. `pinned` tells what pins or a grammar
    chose; it is empty where they chose nothing.
    """

    block: int
    step: int
    total: int
    tokens: tuple[str, ...]
    settled: tuple[bool, ...]
    entropies: tuple[float, ...]
    entropy: float
    finished: bool
    pinned: tuple[bool, ...] = ()

    @property
    def text(self) -> str:
        """The draft as text."""
        return "".join(self.tokens)


@dataclass(frozen=True)
class Delta:
    """What became certain at the end of a canvas. `logprobs` are those of the tokens of `text`, where asked for."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[Call, ...] = ()
    logprobs: tuple[Spelled, ...] | None = None


@dataclass(frozen=True)
class Done:
    """The last piece.

    `calls` are all tool calls of the answer, `stop_sequence` the stop string that ended it, `reasoning_tokens` those of
    the generated tokens that lie in thoughts. `logprobs` are those of the tokens of the text, where asked for.
    """

    result: Result
    finish_reason: FinishReason
    calls: tuple[Call, ...]
    stop_sequence: str | None
    reasoning_tokens: int
    logprobs: tuple[Spelled, ...] | None = None


Piece = PrefillProgress | Frame | Delta | Done


class Answer:
    """One choice on its way. Iterate it once; `cancel` it when nobody wants it any more.

    Attributes:
        index: of the choice; an endpoint that asks several times numbers them anew.
        model: the name that clients are told.
        created: when it was asked for, seconds since 1970.
        ask: what was asked for.
    """

    def __init__(self, service: Service, handle: Handle, ask: Ask, entry: ModelEntry, index: int, tokenizer: Tokenizer):
        self.index = index
        self.model = entry.id
        self.created = int(time.time())
        self.ask = ask
        self._service = service
        self._handle = handle
        self._tokenizer = tokenizer
        self._calls: list[Call] = []
        self._logprobs: list[TokenLogprob] = []  # of all tokens
        self._shown: list[Spelled] | None = None if ask.options.get("logprobs") is None else []  # of those of the text
        self._stop_sequence: str | None = None
        self._has_enough = False  # tool calls
        self._ended = False
        self._aborted: asyncio.Future[ApiError] = asyncio.get_running_loop().create_future()
        seconds = service.settings.request_seconds
        self._deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds

    def cancel(self) -> None:
        """End the request within a denoising step, and forget it."""
        self._ended = True
        self._service.forget(self)
        if not self._handle.is_done:
            self._handle.cancel()

    def abort(self, error: ApiError) -> None:
        """Make whoever reads this answer get an error."""
        if not self._aborted.done():
            self._aborted.set_result(error)

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self._pieces()

    async def _pieces(self) -> AsyncIterator[Piece]:
        """Yield the pieces, `Done` last. Raise `ApiError` for a request that fails, is aborted or takes too long."""
        try:
            while not self._ended:
                piece = self._piece(await self._next())
                if piece is not None:
                    yield piece
                if isinstance(piece, Done):
                    return
        finally:
            self.cancel()

    async def _next(self) -> Any:
        loop = asyncio.get_running_loop()
        coming: asyncio.Future[Any] = asyncio.ensure_future(self._handle.next())
        left = None if self._deadline is None else max(0.0, self._deadline - loop.time())
        waited: list[asyncio.Future[Any]] = [coming, self._aborted]
        try:
            await asyncio.wait(waited, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not coming.done():
                coming.cancel()  # loses no event
        if self._aborted.done():
            raise self._aborted.result()
        if not coming.done():
            seconds = self._service.settings.request_seconds
            raise ApiError(504, f"the request took longer than {seconds:g} s", type="timeout_error", code="timeout")
        try:
            return coming.result()
        except Exception as error:
            raise from_exception(error) from None

    def _piece(self, event: Any) -> Piece | None:
        if isinstance(event, DenoisingStep):
            return self._frame(event) if self.ask.wants_frames else None
        if isinstance(event, CanvasCommitted):
            return self._delta(event)
        return self._done(event.result) if isinstance(event, Finished) else event

    def _frame(self, step: DenoisingStep) -> Frame:
        return Frame(
            block=step.canvas_index,
            step=step.step,
            total=step.max_steps,
            tokens=tuple(preview(self._tokenizer, step.token_ids)),
            settled=step.accepted,
            entropies=step.entropies,
            entropy=step.mean_entropy,
            finished=step.finished,
            pinned=step.pinned,
        )

    def _delta(self, event: CanvasCommitted) -> Delta | None:
        if self._has_enough:
            return None
        self._stop_sequence = event.delta.stopped or self._stop_sequence
        calls = tuple(_call(call) for call in event.delta.tool_calls)
        limit = self.ask.max_tool_calls
        if limit is not None and len(self._calls) + len(calls) >= limit:
            calls = calls[: limit - len(self._calls)]
            self._has_enough = True
            self._handle.cancel()
        self._calls += calls
        logprobs = self._visible(event)
        if not (event.delta.text or event.delta.reasoning or calls):
            return None
        return Delta(event.delta.text, event.delta.reasoning, calls, logprobs)

    def _visible(self, event: CanvasCommitted) -> tuple[Spelled, ...] | None:
        """Return the log-probabilities of the tokens whose text can be shown now, perhaps of earlier canvases too."""
        if self._shown is None:
            return None
        self._logprobs += event.logprobs or ()
        shown = tuple(spell(self._tokenizer, self._logprobs[place]) for place in event.delta.text_tokens)
        self._shown += shown
        return shown

    def _done(self, result: Result) -> Done:
        reason: FinishReason = "tool_calls" if self._has_enough else result.finish_reason
        thought = _reasoning_tokens(result, self._tokenizer)
        logprobs = None if self._shown is None else tuple(self._shown)
        done = Done(result, reason, tuple(self._calls), self._stop_sequence, thought, logprobs)
        for listen in self._service.listeners:
            listen(self, done)
        return done


def _pool_that_runs(workers: int) -> ThreadPoolExecutor:
    """Return a pool whose threads have started. Starting one later holds up the event loop until it runs."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prepare")
    together = threading.Barrier(workers)
    for _ in range(workers):
        pool.submit(together.wait)
    return pool


class Service:
    """The models of one server. All methods belong to the event loop's thread."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.catalog = Catalog(settings)
        self._engine: Engine | None = None
        self._entry: ModelEntry | None = None
        self._preparer: Preparer | None = None
        self._switching = asyncio.Lock()
        self._pool = _pool_that_runs(WORKERS)
        self._answers: set[Answer] = set()
        self._closing = self._draining = False
        self.listeners: list[Callable[[Answer, Done], None]] = []  # told of every answer that ends
        self.is_ready = settings.lazy
        self.started = int(time.time())

    # -- requests --------------------------------------------------------------------------------------------------

    async def open(self, ask: Ask) -> list[Answer]:
        """Submit a request; return an answer for every choice. Raise `ApiError`."""
        if not 1 <= ask.n <= self.settings.max_choices:
            raise refuse("n", f"got {ask.n}, expected 1 to {self.settings.max_choices}")
        if self._draining:
            raise shutting_down()
        entry = await self.find(ask.model)
        submit = partial(self._submit, ask)
        for _ in range(3):  # the model may be replaced between the two steps
            engine, preparer = await self._engine_for(entry)
            try:
                if ask.ttl is not None:
                    engine.options = replace(engine.options, ttl=ask.ttl)
                handles = await self._submitted(submit, engine)
            except ValueError as error:  # of ttl
                raise from_exception(error) from None
            except ApiError as error:
                if error.code == "shutting_down" and not self._closing:
                    continue
                raise
            answers = [Answer(self, h, ask, entry, i, preparer.tokenizer) for i, h in enumerate(handles)]
            self._answers.update(answers)
            if self._closing:
                self.abort_all()
            return answers
        raise ApiError(503, f"model {entry.id!r} is being replaced", code="model_switching", retry_after=5)

    async def _submitted(self, submit: Callable[[Engine], list[Handle]], engine: Engine) -> list[Handle]:
        """Submit in a thread. Where nobody waits for that any more, what was submitted is cancelled."""
        submitting: asyncio.Future[list[Handle]] = asyncio.ensure_future(self._in_thread(submit, engine))
        try:
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(_abandon)
            raise

    async def count_tokens(self, ask: Ask) -> int:
        """Return how many tokens the prompt of a request has. Raise `ApiError`."""
        _, preparer = await self._engine_for(await self.find(ask.model))
        messages, options = self._arguments(ask)
        prepared = await self._in_thread(preparer, messages, options)
        return len(prepared.prompt.token_ids)

    async def score(self, model: str | None, text: str, top: int) -> list[Spelled]:
        """Return the tokens of a text with what the causal encoder role thinks of each. Raise `ApiError`."""
        engine, preparer = await self._engine_for(await self.find(model))
        score = await self._in_thread(partial(engine.score, text, top=top))
        return spell_score(preparer.tokenizer, score, text)

    async def preparer_of(self, name: str | None) -> tuple[ModelEntry, Preparer]:
        """Return a model and what prepares requests of it; it is loaded for that. Raise `ApiError`."""
        entry = await self.find(name)
        _, preparer = await self._engine_for(entry)
        return entry, preparer

    def _submit(self, ask: Ask, engine: Engine) -> list[Handle]:
        """Submit every choice, or none. Runs in a thread of the pool."""
        messages, options = self._arguments(ask)
        config = engine.preparer.config
        options = fit_canvas(options, config.canvas_length, config.text.vocab_size)
        seed = options.get("seed")
        handles: list[Handle] = []
        try:
            for index in range(ask.n):
                if seed is not None and index:
                    options["seed"] = (seed + index) % (MAX_SEED + 1)
                handles.append(engine.submit(messages, **options))
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return handles

    def _arguments(self, ask: Ask) -> tuple[Any, dict[str, Any]]:
        """Return the arguments of `Engine.submit`."""
        thinking = self.settings.enable_thinking if ask.enable_thinking is None else ask.enable_thinking
        options: dict[str, Any] = {"guard_empty": True, "policy": self.settings.policy, **ask.options}
        if options.get("max_tokens") is None:
            options["max_tokens"] = self.settings.max_tokens
        if ask.raw:
            return ask.messages, {**options, "raw_prompt": True}
        options |= {
            "tools": list(ask.tools) if ask.tools else None,
            "tool_choice": ask.tool_choice,
            "parallel_tool_calls": ask.max_tool_calls != 1,
        }
        # Messages come from strangers, in part at least: what they write is text.
        return ask.messages, {**options, "enable_thinking": thinking, "literal": True}

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        """Run a function in the pool; its errors become `ApiError`."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._pool, function, *arguments)
        except Exception as error:
            raise from_exception(error) from error

    def forget(self, answer: Answer) -> None:
        """Drop an answer that has ended."""
        self._answers.discard(answer)

    # -- models ----------------------------------------------------------------------------------------------------

    def models(self) -> list[ModelEntry]:
        """Return what requests may name, the default first."""
        return self.catalog.entries()

    def is_loaded(self, entry: ModelEntry) -> bool:
        """Tell whether a model is in memory."""
        return self._entry == entry and self._engine is not None and self._engine.stats().loaded

    def stats(self) -> EngineStats | None:
        """Return what the engine does; None where there is none."""
        return None if self._engine is None else self._engine.stats()

    async def start(self) -> None:
        """Load the default model. Raise `ApiError` when that fails."""
        await self._engine_for(self.catalog.default)
        self.is_ready = True

    async def load(self, name: str | None) -> tuple[ModelEntry, float]:
        """Load a model; return it and the seconds that took. Raise `ApiError`."""
        entry, began = await self.find(name), time.perf_counter()
        engine, _ = await self._engine_for(entry)
        await self._in_thread(engine.load)  # it may have been unloaded since, for want of requests
        return entry, time.perf_counter() - began

    async def unload(self, name: str | None) -> ModelEntry:
        """Let the requests under way end and free the model. Raise `ApiError`."""
        entry = await self.find(name)
        async with self._switching:
            if self._entry != entry:
                raise ApiError(404, f"model {entry.id!r} is not loaded", code="model_not_loaded")
            await self._close_engine(drain=True)
        return entry

    async def find(self, name: str | None) -> ModelEntry:
        """Return the model of a name. Raise `ApiError` with 404 for one that is not served."""
        if not self.settings.hub_models:
            return self.catalog.find(name)
        entry: ModelEntry = await self._in_thread(self.catalog.find, name)  # may look through the Hub's cache
        return entry

    async def _engine_for(self, entry: ModelEntry) -> tuple[Engine, Preparer]:
        """Return the engine of a model, in the place of the one before, loaded at least once.

        A loading that nobody waits for any more goes on: begun anew, there would be two of the model.
        """
        return await asyncio.shield(self._switch_to(entry))

    async def _switch_to(self, entry: ModelEntry) -> tuple[Engine, Preparer]:
        async with self._switching:
            if self._closing:
                raise shutting_down()
            if self._entry != entry:
                await self._close_engine(drain=True)
            if self._engine is None or self._preparer is None:
                options = dict(self.settings.load_options)
                engine = Engine(partial(self.settings.load, entry.source, **options), self.settings.engine)
                self._engine, self._entry = engine, entry
                try:
                    self._preparer = await self._in_thread(_start, engine)
                except ApiError as error:
                    await self._close_engine(drain=False)
                    status = 503 if error.status == 503 else 500
                    raise ApiError(
                        status, f"model {entry.id!r} cannot be loaded: {error}", code="model_load_failed"
                    ) from None
            return self._engine, self._preparer

    async def _close_engine(self, *, drain: bool) -> None:
        engine, self._engine, self._entry, self._preparer = self._engine, None, None, None
        if engine is not None:
            await asyncio.to_thread(engine.close, drain=drain)

    # -- the end ---------------------------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> None:
        """Refuse new requests from now on, and wait until those under way have ended, so many seconds at most."""
        self._draining, self.is_ready = True, False
        end = time.monotonic() + seconds
        while self._answers and time.monotonic() < end:
            await asyncio.sleep(0.05)

    def abort_all(self, error: ApiError | None = None) -> None:
        """Refuse new requests from now on, and make those under way end with an error."""
        self._closing = True
        for answer in list(self._answers):
            answer.abort(error or shutting_down())

    async def close(self, seconds: float) -> bool:
        """End everything and free the model; return whether that took no longer than so many seconds."""
        self.abort_all()
        engine, self._engine = self._engine, None  # without the lock: a loading may hold it
        self._pool.shutdown(wait=False, cancel_futures=True)
        if engine is None:
            return True
        closing = threading.Thread(target=engine.close, daemon=True)  # Python would wait for a worker of asyncio's
        closing.start()
        end = time.monotonic() + seconds
        while closing.is_alive() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return not closing.is_alive()


def _abandon(submitting: asyncio.Future[list[Handle]]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        for handle in submitting.result():
            handle.cancel()


def _start(engine: Engine) -> Preparer:
    """Load a model, and do what its first requests would have to do while others wait.

    That is to compile the vocabulary for grammars, which holds up every thread, and the chat template.
    """
    preparer = engine.start()
    preparer(".", {"raw_prompt": True, "choices": ["."]})
    if preparer.tokenizer.chat_template is not None:
        preparer([{"role": "user", "content": "."}], {})
    return preparer


def _call(call: ToolCall) -> Call:
    return Call(call.id, call.name, json.dumps(call.arguments, ensure_ascii=False))


def _reasoning_tokens(result: Result, tokenizer: Tokenizer) -> int:
    """Count the generated tokens inside of thoughts, their markers not among them."""
    opening, closing = tokenizer.special.channel_open, tokenizer.special.channel_close
    markers = [token_id for token_id in result.token_ids if token_id in (opening, closing)]
    # The prompt may have opened a thought; then a closing marker comes first, or none and all is thought.
    inside = markers[0] == closing if markers else bool(result.reasoning and not result.text)
    count = 0
    for token_id in result.token_ids:
        if token_id in (opening, closing):
            inside = token_id == opening
        else:
            count += inside
    return count


__all__ = ["Answer", "Ask", "Call", "Delta", "Done", "Frame", "Piece", "PrefillProgress", "Service"]
