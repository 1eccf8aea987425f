"""Generate text by block diffusion: the loop, as a generator of events.

    1. Encode the prompt (encoder role), chunk by chunk, into the prefix.
    2. Canvas by canvas, until every request has ended:
       a. Start a canvas of noise.
       b. One denoising step for all canvases together: decoder, vocabulary pass, acceptance, renoising, stop test.
       c. Commit the argmax of the last step when the canvas is stable and confident, or out of steps.
       d. Encode the committed canvas into the prefix, if another follows.
    3. Return the answer.

`request.py` has what the loop does to one request, under the same numbers.

The caller draws, times and stops. Reference: `generate` of transformers' `generation_diffusion_gemma.py`.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from .checkpoint import Checkpoint, LoadReport, load_checkpoint
from .config import GenerationConfig, ModelConfig
from .denoise import Denoiser, StepInput, StepResult, StepRules
from .events import Event, Finished, Result
from .media import DEFAULT_SOFT_TOKENS, Sight
from .model import DiffusionGemma
from .options import OPTION_NAMES, Options, check_boolean, check_names, resolve_options
from .output import OutputParser
from .prompt import build_prompt
from .request import Request
from .soft_tokens import SoftTokens
from .tokenizer import Tokenizer

Messages = str | Sequence[Mapping[str, Any]]
Watch = Callable[[Sequence[StepInput], Sequence[StepRules], Sequence[StepResult]], None]  # one entry per open request
SIGHT_OPTIONS = frozenset({"image_tokens", "fps", "video_frames"})
PROMPT_OPTIONS = SIGHT_OPTIONS | frozenset(
    {"tools", "enable_thinking", "prefill_response", "template_kwargs", "raw_prompt", "images", "videos"}
)
PER_PROMPT = ("seed", "images", "videos")  # options that every prompt of a batch has its own of


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    adapter_path: str | Path | None = None,
    dtype: str | None = None,
) -> Pipeline:
    """Load a checkpoint; the arguments and errors are those of `checkpoint.load_checkpoint`."""
    return Pipeline(load_checkpoint(model, revision, adapter_path, dtype))


class Pipeline:
    """A loaded checkpoint that generates. Use it from the thread that made it."""

    def __init__(self, checkpoint: Checkpoint, *, compiled: bool | None = None) -> None:
        """Bind a checkpoint; `compiled` is passed to `denoise.Denoiser`."""
        self._checkpoint = checkpoint
        self._denoiser = Denoiser(checkpoint.model, compiled)
        self._soft_tokens = SoftTokens(checkpoint.model)
        self._watch: Watch | None = None

    def watched(self, watch: Watch) -> Pipeline:
        """Return this pipeline with `watch` called after every evaluated step: how a measurement sees the canvases."""
        other = copy.copy(self)
        other._watch = watch
        return other

    def with_model(self, model: DiffusionGemma) -> Pipeline:
        """Return a pipeline like this one around another network: how a measurement changes weights."""
        other = copy.copy(self)
        other._checkpoint = replace(self._checkpoint, model=model)
        other._denoiser = Denoiser(model, self._denoiser.compiled)
        other._soft_tokens = SoftTokens(model)
        return other

    @property
    def model(self) -> DiffusionGemma:
        """The checkpoint's network."""
        return self._checkpoint.model

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        return self._checkpoint.tokenizer

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's `config.json`."""
        return self._checkpoint.config

    @property
    def load_report(self) -> LoadReport | None:
        """What loading took, and what it left out; None for a checkpoint that was made in memory."""
        return self._checkpoint.report

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
        requests = [
            self._request(prompt, options | {name: values[index] for name, values in own.items()})
            for index, prompt in enumerate(prompts)
        ]
        results: dict[int, Result] = {}
        for index, event in self._run(requests, cancelled):
            if isinstance(event, Finished):
                results[index] = event.result
        return [results[index] for index in range(len(prompts))]

    def stream(
        self, messages: Messages, *, cancelled: Callable[[], bool] | None = None, **options: Any
    ) -> Iterator[Event]:
        """Answer one prompt as a stream of events, `Finished` last.

        Args:
            messages: one user message, or a conversation in OpenAI's form.
            cancelled: asked after every chunk and step; True ends the request with what was committed.
            options: the fields of `options.Options`, and `tools` (OpenAI schemas), `enable_thinking` (default False),
                `prefill_response` (how the answer must begin), `template_kwargs` (for the chat template),
                `raw_prompt` (the string is the prompt, no template), `images` and `videos` (see
                `prompt.build_prompt`), and of `media.Sight`: `image_tokens`, `fps`, `video_frames`. None means the
                checkpoint's default.

        Raises:
            TypeError: an unknown argument.
            ValueError: a value outside its range, an empty prompt, one longer than the context, or an image that
                cannot be read or that this model cannot see.
        """
        if cancelled is not None and not callable(cancelled):
            raise TypeError(f"cancelled: got {cancelled!r}, expected a function")
        request = self._request(messages, options)
        return (event for _, event in self._run([request], cancelled))

    def _request(self, messages: Messages, given: Mapping[str, Any]) -> Request:
        """Check the options, render the prompt, and return a request that has not begun."""
        check_names(given, OPTION_NAMES | PROMPT_OPTIONS)
        for_prompt = {name: given[name] for name in PROMPT_OPTIONS if given.get(name) is not None}
        for name in ("enable_thinking", "raw_prompt"):
            check_boolean(name, for_prompt.get(name, False))
        rest = {name: value for name, value in given.items() if name not in PROMPT_OPTIONS}
        options = resolve_options(self.generation_config, rest)
        raw = for_prompt.pop("raw_prompt", False)
        sight = self._sight({name: for_prompt.pop(name) for name in SIGHT_OPTIONS & for_prompt.keys()})
        prompt = build_prompt(self.tokenizer, messages, raw=raw, sight=sight, **for_prompt)
        return Request(
            self._checkpoint.model,
            prompt.token_ids,
            options,
            seed=secrets.randbits(32) if options.seed is None else options.seed,
            end_ids=self._end_ids(options),
            parser=OutputParser(self.tokenizer, stop=options.stop, thinking_open=prompt.thinking_open),
            blocks=prompt.blocks,
            embed_image=self._soft_tokens,
        )

    def _sight(self, given: Mapping[str, Any]) -> Sight:
        """Return how media are read: the checkpoint's way, with what the user wants otherwise."""
        config = self.config
        defaults = {
            "vision": config.vision,
            "image_tokens": config.vision_soft_tokens_per_image or DEFAULT_SOFT_TOKENS,
            "max_soft_tokens": config.text.max_position_embeddings,
        }
        return Sight(**(defaults | dict(given)))

    def _end_ids(self, options: Options) -> frozenset[int]:
        extra: set[int] = set()
        for token in options.extra_eos_tokens:
            ids = [token] if isinstance(token, int) else self.tokenizer.encode(token)
            if len(ids) != 1 or not 0 <= ids[0] < self.config.text.vocab_size:
                raise ValueError(f"extra_eos_tokens: got {token!r}, expected one token of the vocabulary")
            extra.update(ids)
        return frozenset(self.generation_config.eos_token_ids) | extra

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
        for _, request in open_requests:  # 2.a
            if not request.has_canvas:
                request.start_canvas()
        inputs = [request.step_input() for _, request in open_requests]
        rules = [request.rules() for _, request in open_requests]
        results = self._denoiser(inputs, rules)  # 2.b
        mx.eval(results)  # the one evaluation of the step: everything read below is part of it
        if self._watch is not None:
            self._watch(inputs, rules, results)
        for (index, request), result in zip(open_requests, results, strict=True):
            step = request.absorb(result)
            yield index, step
            if is_cancelled():
                request.cancel()
            elif step.finished or step.step == step.max_steps:
                yield index, request.commit()  # 2.c
                mx.clear_cache()
                if request.finish_reason is None:
                    request.encode_canvas()  # 2.d
            if request.finish_reason is not None:
                yield index, Finished(request.result())  # 3


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
