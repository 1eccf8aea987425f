"""Generate text by block diffusion: the loop, as a generator of events.

    1. Encode the prompt (encoder role), chunk by chunk, into the prefix.
    2. Canvas by canvas, until every request has ended:
       a. Start a canvas of noise.
       b. One denoising step for all canvases together: decoder, vocabulary pass, acceptance, renoising, stop test.
       c. Commit the argmax of the last step when the canvas is stable and confident, or out of steps.
       d. Encode the committed canvas into the prefix, if another follows.
    3. Return the answer.

Where a step has one canvas, it takes along what is left of 1 or 2.d, if that is short: one pass over the layers.

`request.py` has what the loop does to one request, under the same numbers.

The caller draws, times and stops. Reference: `generate` of transformers' `generation_diffusion_gemma.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .cache import KVQuantization, kv_quantization
from .checkpoint import Checkpoint, LoadReport, load_checkpoint, parameter_bytes
from .config import GenerationConfig, ModelConfig, check_integer
from .denoise import Denoiser, StepInput, StepResult, StepRules
from .events import Event, Finished, Result
from .memory import MemoryBudget, Wanted
from .model import DiffusionGemma
from .output import OutputParser
from .prefix_store import DEFAULT_DISK_BYTES, MAX_BYTES, Disk, fingerprint, open_folder
from .prefixes import DEFAULT_BYTES, Prefixes
from .prepare import Asked, Messages, Prepared, Preparer, request_sizes
from .ranks import Ranks
from .request import Request
from .scoring import Score, check_top, score_prompt
from .soft_tokens import SoftTokens
from .tokenizer import Tokenizer

Watch = Callable[[Sequence[StepInput], Sequence[StepRules], Sequence[StepResult]], None]  # one entry per open request
SPARSE_VOCABULARY = 1 << 14  # tokens from which on sparse self-conditioning pays
PER_PROMPT = ("seed", "images", "videos")  # options that every prompt of a batch has its own of


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    adapter_path: str | Path | None = None,
    dtype: str | None = None,
    prefix_bytes: int = DEFAULT_BYTES,
    prefix_folder: str | Path | None = None,
    prefix_disk_bytes: int = DEFAULT_DISK_BYTES,
    kv_bits: int | None = None,
    kv_group_size: int | None = None,
    memory_limit: float | None = None,
    sparse_self_conditioning: bool = True,
    ranks: Ranks | None = None,
) -> Pipeline:
    """Load a checkpoint.

    Args:
        model, revision, adapter_path, dtype: see `checkpoint.load_checkpoint`.
        prefix_bytes: bytes of memory for stored prefixes; 0 stores none.
        prefix_folder: where they are kept on disk too; None for nowhere.
        prefix_disk_bytes: of the files in it.
        kv_bits, kv_group_size, memory_limit, sparse_self_conditioning: see `Pipeline`; the limit counts for the weights
            too.
        ranks: see `checkpoint.load_checkpoint`. All ranks must use their pipelines alike.

    Raises:
        CheckpointError, MemoryLimitError: see there.
        ValueError: a size below 0, a folder that cannot be used, or numbers that MLX cannot pack with.
    """
    # What is wrong whatever the checkpoint is better known before gigabytes are read.
    agree = None if ranks is None else ranks.same
    prefixes = Prefixes(prefix_bytes, agree=agree)
    kv = kv_quantization(kv_bits, kv_group_size)
    if prefix_folder is not None:
        open_folder(prefix_folder)
        check_integer("prefix_disk_bytes", prefix_disk_bytes, 0, MAX_BYTES)
    checkpoint = load_checkpoint(model, revision, adapter_path, dtype, memory_limit, ranks)
    if prefix_folder is not None:
        folders = [checkpoint.path] if adapter_path is None else [checkpoint.path, Path(adapter_path)]
        part = () if ranks is None else (ranks.size, ranks.rank)
        disk = Disk(prefix_folder, fingerprint(folders, checkpoint.model.dtype, kv, *part), prefix_disk_bytes)
        prefixes = Prefixes(prefix_bytes, disk=disk, agree=agree)
    return Pipeline(
        checkpoint,
        compiled=None if ranks is None else False,  # a divided step waits for numbers on the way
        prefixes=prefixes,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        memory_limit=memory_limit,
        sparse_self_conditioning=sparse_self_conditioning and ranks is None,
    )


class Pipeline:
    """A loaded checkpoint that generates. Use it from the thread that made it."""

    _request: type[Request] = Request  # what `open` makes

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        compiled: bool | None = None,
        prefixes: Prefixes | None = None,
        kv_bits: int | None = None,
        kv_group_size: int | None = None,
        memory_limit: float | None = None,
        sparse_self_conditioning: bool = True,
    ) -> None:
        """Bind a checkpoint.

        Args:
            checkpoint: what to generate with.
            compiled: see `denoise.Denoiser`.
            prefixes: what to remember of prompts and answers, of this checkpoint and no other; None for the default.
            kv_bits: 8 or 4 quantises keys and values in full-attention layers; None keeps them as they are.
            kv_group_size: numbers that share a scale there, 32, 64 or 128; None for 64.
            memory_limit: GB (10^9 bytes) beyond which a request is refused; None for what the machine has.
            sparse_self_conditioning: sum up the embeddings of the likeliest tokens only where these carry all but a
                rounding error of the probability; small vocabularies are summed up whole.

        Raises:
            ValueError: a number that MLX cannot pack with, or a group size that does not divide the heads.
        """
        self._kv = kv_quantization(kv_bits, kv_group_size)
        if self._kv is not None:
            self._kv.check(checkpoint.model.config.text)
        self._memory_limit = memory_limit
        self._checkpoint = checkpoint
        self._memory = _budget(checkpoint.model, self._kv, memory_limit)
        self._preparer = Preparer(checkpoint.tokenizer, checkpoint.config, checkpoint.generation_config)
        self._denoiser = Denoiser(checkpoint.model, compiled)
        self._sparse = sparse_self_conditioning and checkpoint.config.text.vocab_size >= SPARSE_VOCABULARY
        self._soft_tokens = SoftTokens(checkpoint.model)
        self._prefixes = Prefixes() if prefixes is None else prefixes
        self._watch: Watch | None = None

    def watched(self, watch: Watch) -> Pipeline:
        """Return this pipeline with `watch` called after every evaluated step: how a measurement sees the canvases.

        It gets the rows that were computed, behind a prefix that is encoded.
        """
        other = copy.copy(self)
        other._watch = watch
        return other

    def with_model(self, model: DiffusionGemma) -> Pipeline:
        """Return a pipeline like this one around another network: how a measurement changes weights."""
        other = copy.copy(self)
        other._checkpoint = replace(self._checkpoint, model=model)
        other._memory = _budget(model, self._kv, self._memory_limit)
        other._denoiser = Denoiser(model, self._denoiser.compiled)
        other._soft_tokens = SoftTokens(model)
        other._prefixes = Prefixes(self._prefixes.max_bytes)
        return other

    @property
    def model(self) -> DiffusionGemma:
        """The checkpoint's network."""
        return self._checkpoint.model

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return self._checkpoint.path

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        return self._checkpoint.tokenizer

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's `config.json`."""
        return self._checkpoint.config

    @property
    def preparer(self) -> Preparer:
        """What prepares requests; it does not hold the weights."""
        return self._preparer

    @property
    def prefixes(self) -> Prefixes:
        """What is remembered of earlier prompts and answers."""
        return self._prefixes

    @property
    def retraces(self) -> int:
        """How many pieces of denoising steps have been traced for compiling so far; 0 where nothing is compiled."""
        return self._denoiser.retraces

    @property
    def load_report(self) -> LoadReport | None:
        """What loading took, and what it left out; None for a checkpoint that was made in memory."""
        return self._checkpoint.report

    @property
    def memory(self) -> MemoryBudget:
        """What requests may use, and what they need."""
        return self._memory

    @property
    def generation_config(self) -> GenerationConfig:
        """The checkpoint's defaults."""
        return self._checkpoint.generation_config

    def generate(self, messages: Messages, **options: Any) -> Result:
        """Answer one prompt; the arguments are those of `stream`."""
        for event in self.stream(messages, **options):
            if isinstance(event, Finished):
                return event.result
        raise RuntimeError("the loop ended without a result")

    def generate_batch(self, prompts: Sequence[Messages], **options: Any) -> list[Result]:
        """Answer several prompts together; every result equals the one the prompt gives alone.

        Args:
            prompts: one string or message list each.
            options: those of `stream`; `seed` is one for all prompts, or a list with one per prompt. `images` and
                `videos` are lists with one list (or None) per prompt.
        """
        if not isinstance(prompts, list | tuple):
            raise ValueError(f"prompts: got {type(prompts).__name__}, expected a list of prompts")
        own = {name: _per_prompt(name, options.pop(name, None), len(prompts)) for name in PER_PROMPT}
        cancelled = options.pop("cancelled", None)
        prepared = [
            self.prepare(prompt, options | {name: values[index] for name, values in own.items()})
            for index, prompt in enumerate(prompts)
        ]
        return self.run_batch(prepared, cancelled)

    def run_batch(self, prepared: Sequence[Prepared], cancelled: Callable[[], bool] | None = None) -> list[Result]:
        """Answer prepared requests together, each with options of its own; `cancelled` is that of `stream`.

        Raises:
            MemoryLimitError: a `ValueError`: they do not fit into memory together.
        """
        self._claim_memory(prepared)
        results: dict[int, Result] = {}
        for index, event in self._run([self.open(each) for each in prepared], cancelled):
            if isinstance(event, Finished):
                results[index] = event.result
        return [results[index] for index in range(len(prepared))]

    def generate_each(self, requests: Sequence[Asked], *, cancelled: Callable[[], bool] | None = None) -> list[Result]:
        """Answer several prompts together, each with options of its own; every result equals the one it has alone.

        Args:
            requests: prompt and options of each; both are those of `stream`.
            cancelled: of all of them, as for `stream`.
        """
        return self.run_batch([self.prepare(messages, options) for messages, options in requests], cancelled)

    def score(self, messages: Messages, *, continuation: str | None = None, top: int = 0, **options: Any) -> Score:
        """Return how likely the encoder role holds a text, token by token from the left.

        The causal role was made to encode, not to predict: what its head says is only as good as the checkpoint's
        training made it (see `docs/control.md`).

        Args:
            messages: a text as it is, with BOS in front if it lacks one; or a conversation in OpenAI's form.
            continuation: text behind it, which alone is scored then; None scores all of it.
            top: the likeliest tokens to return at each position, 0 to 20.
            options: those of `stream` that shape the prompt, and `prefill_step_size`.

        Raises:
            TypeError, ValueError, MemoryLimitError: those of `stream`.
        """
        check_top(top)
        if continuation is not None and not isinstance(continuation, str):
            raise ValueError(f"continuation: got {continuation!r:.80}, expected text")
        prepared = self.prepare(messages, {"max_tokens": 0, "raw_prompt": isinstance(messages, str), **options})
        prompt = prepared.prompt
        behind = tuple(self.tokenizer.encode_letters(continuation or ""))
        context = self.config.text.max_position_embeddings
        if len(prompt.token_ids) + len(behind) > context:
            raise ValueError(f"got {len(prompt.token_ids) + len(behind)} tokens to score, expected at most {context}")
        [wanted], chunk = request_sizes([prepared])
        wanted = Wanted(wanted.prompt_tokens + len(behind), 0, wanted.patches)
        self._memory.check([wanted], chunk)
        room = self._memory.limit - self._memory.plan([wanted], chunk).total
        self._prefixes.limit_to(room - self._soft_tokens.limit_to(room))
        with wired_limit(self._checkpoint.model):
            return score_prompt(
                self._checkpoint.model,
                replace(prompt, token_ids=prompt.token_ids + behind),
                first=len(prompt.token_ids) if continuation is not None else 0,
                top=top,
                step_size=prepared.options.prefill_step_size,
                embed_image=self._soft_tokens,
                kv=self._kv,
            )

    def stream(
        self, messages: Messages, *, cancelled: Callable[[], bool] | None = None, **options: Any
    ) -> Iterator[Event]:
        """Answer one prompt as a stream of events, `Finished` last.

        Args:
            messages: one user message, or a conversation in OpenAI's form.
            cancelled: asked after every chunk and step; True ends the request with what was committed.
            options: the fields of `options.Options`, and `tools` (OpenAI schemas), `enable_thinking` (default False),
                `prefill_response` (how the answer must begin), `template_kwargs` (for the chat template),
                `raw_prompt` (the string is the prompt, no template), `literal` (no text is a control token), `images`
                and `videos` (see `prompt.build_prompt`), and of `media.Sight`: `image_tokens`, `fps`, `video_frames`.
                None means the checkpoint's default. One of these holds the answer (not the thought before it) to a
                grammar: `response_format` (OpenAI's), `regex`, `lark`, `choices` (texts), `tool_choice` (OpenAI's,
                with `parallel_tool_calls`); see `grammar.Grammar`.

        Raises:
            TypeError: an unknown argument.
            ValueError: a value outside its range, an empty prompt, one longer than the context, or an image that
                cannot be read or that this model cannot see.
            MemoryLimitError: a `ValueError`: the request does not fit into memory.
        """
        if cancelled is not None and not callable(cancelled):
            raise TypeError(f"cancelled: got {cancelled!r}, expected a function")
        return self.stream_prepared(self.prepare(messages, options), cancelled)

    def stream_prepared(self, prepared: Prepared, cancelled: Callable[[], bool] | None = None) -> Iterator[Event]:
        """Answer a prepared request as a stream of events; `cancelled` and `MemoryLimitError` are those of `stream`."""
        self._claim_memory([prepared])
        return (event for _, event in self._run([self.open(prepared)], cancelled))

    def _claim_memory(self, requests: Sequence[Prepared]) -> None:
        """Shrink what is remembered for requests that run together. Raise `MemoryLimitError` when they do not fit."""
        if requests:
            self._memory.check(*request_sizes(requests))
            self.make_room(requests)

    def make_room(self, requests: Sequence[Prepared], rows: int | None = None) -> None:
        """Let what is remembered have what requests that run together, one at least, leave of the memory.

        Soft tokens come first: they are small, and the tower is slow.

        Args:
            requests: that hold a prefix.
            rows: of them that share a step; None for all.
        """
        room = self._memory.limit - self._memory.plan(*request_sizes(requests), rows).total
        self.limit_remembered(room, sees=any(request.prompt.blocks for request in requests))

    def limit_remembered(self, room: int, *, sees: bool) -> None:
        """Let what is remembered have `room` bytes; soft tokens may grow only if one of the requests `sees`."""
        may_hold = self._soft_tokens.limit_to(room)
        self._prefixes.limit_to(room - (may_hold if sees else self._soft_tokens.nbytes))

    def warm_up(self) -> None:
        """Take two steps nobody asked for, so that no request waits for compiling. Without compiling do nothing."""
        if not self._denoiser.compiled:
            return
        apart = copy.copy(self)
        apart._prefixes = Prefixes(0)
        with wired_limit(self._checkpoint.model):
            for guard_empty in (True, False):  # the first canvas of an answer, and the others
                given = {"max_tokens": 1, "seed": 0, "guard_empty": guard_empty, "raw_prompt": True}
                request = apart.open(apart.prepare("hi", given))
                for _ in request.prefill():
                    pass
                request.encode_tail()  # a step that encodes along is not compiled
                apart.denoise([request])
        mx.clear_cache()

    def prepare(self, messages: Messages, given: Mapping[str, Any]) -> Prepared:
        """Check the options and render the prompt; any thread may call this."""
        return self._preparer(messages, given)

    def open(self, prepared: Prepared) -> Request:
        """Return a request that has not begun."""
        prompt, options = prepared.prompt, prepared.options
        return self._request(
            self._checkpoint.model,
            prompt.token_ids,
            options,
            seed=prepared.seed,
            end_ids=prepared.end_ids,
            parser=OutputParser(self.tokenizer, stop=options.stop, thinking_open=prompt.thinking_open),
            blocks=prompt.blocks,
            embed_image=self._soft_tokens,
            system_tokens=prompt.system_tokens,
            prefixes=self._prefixes,
            kv=self._kv,
            constraint=prepared.constraint(self.tokenizer),
            control=self._control(prepared.end_ids) if options.text_only else None,
            sparse=self._sparse,
        )

    def _control(self, end_ids: frozenset[int]) -> mx.array:
        """Return which tokens of the vocabulary are not text, [V] bool: control tokens, and ids that mean nothing."""
        control = np.zeros(self._checkpoint.config.text.vocab_size, np.bool_)
        control[self.tokenizer.largest_id + 1 :] = True
        control[sorted(self.tokenizer.all_special_ids | end_ids)] = True
        return mx.array(control)

    def _run(self, requests: Sequence[Request], cancelled: Callable[[], bool] | None) -> Iterator[tuple[int, Event]]:
        """Run the loop of the module docstring; yield (index of the request, event)."""
        mx.reset_peak_memory()
        is_cancelled = cancelled or (lambda: False)
        with wired_limit(self._checkpoint.model):
            # 1. Encode the prompts.
            for index, request in enumerate(requests):
                for progress in request.prefill() if request.finish_reason is None else ():
                    yield index, progress
                    if is_cancelled():
                        request.cancel()
                        break
                if request.finish_reason is not None:  # cancelled, or nothing was asked for
                    yield index, Finished(request.result())  # 3
            # 2. Canvas by canvas.
            while open_requests := [(i, r) for i, r in enumerate(requests) if r.finish_reason is None]:
                yield from self._step(open_requests, is_cancelled)

    def _step(
        self, open_requests: Sequence[tuple[int, Request]], is_cancelled: Callable[[], bool]
    ) -> Iterator[tuple[int, Event]]:
        """Take every open request one denoising step further."""
        if len(open_requests) > 1:
            for _, request in open_requests:
                request.encode_tail()
        results = self.denoise([request for _, request in open_requests])  # 2.a, 2.b
        for (index, request), result in zip(open_requests, results, strict=True):
            for event in advance(request, result, len(results), is_cancelled):
                yield index, event
            if request.finish_reason is not None:
                yield index, Finished(request.result())  # 3

    def denoise(self, requests: Sequence[Request]) -> list[StepResult]:
        """Run one denoising step, evaluated, which the requests have not taken over yet.

        Args:
            requests: whose prefix is encoded; that of a single one may have a tail, which is encoded too.
        """
        for request in requests:
            if not request.has_canvas:
                request.start_canvas()
        inputs = [request.step_input() for request in requests]
        rules = [request.rules() for request in requests]
        results = self._denoiser(inputs, rules)
        written = [row.tail.cache.arrays() for row in inputs if row.tail is not None]
        mx.eval(results, written)  # the one time that the host waits: what is read afterwards is part of the step
        if self._watch is not None:
            self._watch([_encoded(row) for row in inputs], rules, results)
        return results


def advance(request: Request, result: StepResult, batch_size: int, is_cancelled: Callable[[], bool]) -> Iterator[Event]:
    """Let a request take over its row of a step, and do what the end of its canvas asks for; yield the events.

    Args:
        request: of this row.
        result: of the step, evaluated.
        batch_size: rows of the step.
        is_cancelled: asked once, after the step has been yielded.
    """
    try:
        yield request.absorb(result, batch_size)
    finally:  # also for a caller that leaves after the first draft
        request.save()
    if is_cancelled():
        request.cancel()
    elif request.canvas_is_done:
        yield request.commit()  # 2.c
        mx.clear_cache()
        if request.finish_reason is None:
            request.encode_canvas()  # 2.d


def _encoded(row: StepInput) -> StepInput:
    """Return the input of a step as it is once the tail of its prefix has been encoded."""
    return row if row.tail is None else row._replace(prefix=row.tail.cache.views(), tail=None)


def _budget(model: DiffusionGemma, kv: KVQuantization | None, memory_limit: float | None) -> MemoryBudget:
    return MemoryBudget(model.config, parameter_bytes(model), model.dtype.size, kv, memory_limit)


def _per_prompt(name: str, value: Any, count: int) -> list[Any]:
    """Return one value of an option per prompt. Raise ValueError for another number of them."""
    if value is None or (name == "seed" and not isinstance(value, list | tuple)):
        return [value] * count
    if not isinstance(value, list | tuple) or len(value) != count:
        got = f"{len(value)} entries" if isinstance(value, list | tuple) else type(value).__name__
        raise ValueError(f"{name}: got {got}, expected one for each of {count} prompts")
    return list(value)


def wired_limit(model: Any) -> AbstractContextManager[Any]:
    """Raise Metal's wired limit while the model runs, through mlx-lm; elsewhere do nothing."""
    if not mx.metal.is_available():
        return nullcontext()
    from mlx_lm.generate import wired_limit as raise_limit

    return raise_limit(model)
