"""Generate text by block diffusion: the loop, as a generator of events.

    1. Encode the prompt (encoder role), chunk by chunk, into the prefix.
    2. Canvas by canvas, until every sequence has ended:
       a. Start a canvas of noise.
       b. One denoising step for all canvases together: decoder, vocabulary pass, acceptance, renoising, stop test.
       c. Commit the argmax of the last step when the canvas is stable and confident, or out of steps.
       d. Encode the committed canvas into the prefix, if another follows.

The caller draws, times and stops. Reference: `generate` of transformers' `generation_diffusion_gemma.py`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx

from .checkpoint import Checkpoint, load_checkpoint
from .config import GenerationConfig, ModelConfig
from .denoise import Denoiser
from .events import Event, Finished, Result
from .options import Options, resolve_options
from .output import OutputParser
from .prompt import build_prompt
from .sequence import Sequence
from .tokenizer import Tokenizer

Messages = str | Items[Mapping[str, Any]]
PROMPT_OPTIONS = ("tools", "enable_thinking", "prefill_response", "template_kwargs", "raw_prompt")


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

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        return self._checkpoint.tokenizer

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's `config.json`."""
        return self._checkpoint.config

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

    def generate_batch(self, prompts: Items[Messages], **options: Any) -> list[Result]:
        """Answer several prompts together; every result equals the one the prompt gives alone.

        Args:
            prompts: one string or message list each.
            options: those of `stream`; `seed` may be a list with one seed per prompt.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts: got one string, expected a list of prompts")
        seeds = options.pop("seed", None)
        if not isinstance(seeds, list | tuple):
            seeds = [seeds] * len(prompts)
        if len(seeds) != len(prompts):
            raise ValueError(f"seed: got {len(seeds)} seeds, expected one for each of {len(prompts)} prompts")
        cancelled = options.pop("cancelled", None)
        sequences = [self._sequence(p, {**options, "seed": s}) for p, s in zip(prompts, seeds, strict=True)]
        results: dict[int, Result] = {}
        for index, event in self._run(sequences, cancelled):
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
                `prefill_response` (how the answer must begin), `template_kwargs` (for the chat template) and
                `raw_prompt` (the string is the prompt, no template). None means the checkpoint's default.

        Raises:
            TypeError: an unknown argument.
            ValueError: a value outside its range, an empty prompt, or one longer than the context.
        """
        sequence = self._sequence(messages, options)
        return (event for _, event in self._run([sequence], cancelled))

    def _sequence(self, messages: Messages, given: Mapping[str, Any]) -> Sequence:
        """Check the options, render the prompt, and return a request that has not begun."""
        for_prompt = {name: given[name] for name in PROMPT_OPTIONS if given.get(name) is not None}
        rest = {name: value for name, value in given.items() if name not in PROMPT_OPTIONS}
        options = resolve_options(self.generation_config, rest)
        raw = for_prompt.pop("raw_prompt", False)
        prompt = build_prompt(self.tokenizer, messages, raw=raw, **for_prompt)
        return Sequence(
            self._checkpoint.model,
            prompt.token_ids,
            options,
            seed=secrets.randbits(32) if options.seed is None else options.seed,
            end_ids=self._end_ids(options),
            parser=OutputParser(self.tokenizer, stop=options.stop, thinking_open=prompt.thinking_open),
        )

    def _end_ids(self, options: Options) -> frozenset[int]:
        extra: set[int] = set()
        for token in options.extra_eos_tokens:
            ids = [token] if isinstance(token, int) else self.tokenizer.encode(token)
            if len(ids) != 1 or not 0 <= ids[0] < self.config.text.vocab_size:
                raise ValueError(f"extra_eos_tokens: got {token!r}, expected one token of the vocabulary")
            extra.update(ids)
        return frozenset(self.generation_config.eos_token_ids) | extra

    def _run(self, sequences: Items[Sequence], cancelled: Callable[[], bool] | None) -> Iterator[tuple[int, Event]]:
        """Run the loop of the module docstring; yield (index of the sequence, event)."""
        mx.reset_peak_memory()
        is_cancelled = cancelled or (lambda: False)
        with _wired_limit(self._checkpoint.model):
            # 1. Encode the prompts.
            for index, sequence in enumerate(sequences):
                for progress in sequence.prefill() if sequence.finish_reason is None else ():
                    yield index, progress
                    if is_cancelled():
                        break
            # 2. Canvas by canvas.
            for index, sequence in enumerate(sequences):
                if is_cancelled():
                    sequence.cancel()
                if sequence.finish_reason is not None:
                    yield index, Finished(sequence.result())
            while open_sequences := [(i, s) for i, s in enumerate(sequences) if s.finish_reason is None]:
                yield from self._step(open_sequences, is_cancelled)

    def _step(
        self, open_sequences: Items[tuple[int, Sequence]], is_cancelled: Callable[[], bool]
    ) -> Iterator[tuple[int, Event]]:
        """Take every open sequence one denoising step further."""
        for _, sequence in open_sequences:  # 2.a
            if not sequence.has_canvas:
                sequence.start_canvas()
        rows = [sequence.row() for _, sequence in open_sequences]
        results = self._denoiser(rows, [sequence.rules() for _, sequence in open_sequences])  # 2.b
        mx.eval(results)  # the one evaluation of the step: everything read below is part of it
        for (index, sequence), result in zip(open_sequences, results, strict=True):
            step = sequence.absorb(result)
            yield index, step
            if is_cancelled():
                sequence.cancel()
            elif step.finished or step.step == step.max_steps:
                yield index, sequence.commit()  # 2.c
                mx.clear_cache()
                if sequence.finish_reason is None:
                    sequence.encode_canvas()  # 2.d
            if sequence.finish_reason is not None:
                yield index, Finished(sequence.result())


def _wired_limit(model: Any) -> AbstractContextManager[Any]:
    """Raise Metal's wired limit while the model runs, through mlx-lm; elsewhere do nothing."""
    if not mx.metal.is_available():
        return nullcontext()
    from mlx_lm.generate import wired_limit

    return wired_limit(model)
