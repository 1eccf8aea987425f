"""What is done with a request before the model sees it: options checked, media read, the prompt rendered.

Nothing here computes with MLX, so it can run in any thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .config import GenerationConfig, ModelConfig
from .events import Result, Stats
from .media import DEFAULT_SOFT_TOKENS, Sight, count_media
from .memory import Wanted
from .options import OPTION_NAMES, Options, check_boolean, check_names, resolve_options
from .prompt import Prompt, build_prompt
from .tokenizer import Tokenizer

Messages = str | Sequence[Mapping[str, Any]]
SIGHT_OPTIONS = frozenset({"image_tokens", "fps", "video_frames"})
PROMPT_OPTIONS = SIGHT_OPTIONS | frozenset(
    {"tools", "enable_thinking", "prefill_response", "template_kwargs", "raw_prompt", "literal", "images", "videos"}
)


@dataclass(frozen=True)
class Prepared:
    """A request that can run: its prompt, its options, and its seed, drawn where none was given."""

    prompt: Prompt
    options: Options
    seed: int
    end_ids: frozenset[int]

    def without_images(self) -> Prepared:
        """Return this request without the patches, which are large and of no use after prefill."""
        return replace(self, prompt=replace(self.prompt, blocks=()))

    def cancelled_result(self, queue_seconds: float) -> Result:
        """Return the result of this request where it was cancelled before it began."""
        stats = Stats(len(self.prompt.token_ids), *count_media(self.prompt.blocks), queue_seconds=queue_seconds)
        logprobs = None if self.options.logprobs is None else ()
        return Result("", None, (), (), "cancelled", self.seed, stats, logprobs)


def request_sizes(requests: Sequence[Prepared]) -> tuple[list[Wanted], int]:
    """Return what the memory of requests that run together depends on: what each asks for, and their longest chunk."""
    each = [
        Wanted(
            len(request.prompt.token_ids),
            request.options.max_tokens,
            max((len(block.image.patches) for block in request.prompt.blocks), default=0),
        )
        for request in requests
    ]
    return each, max(request.options.prefill_step_size for request in requests)


@dataclass(frozen=True)
class Preparer:
    """What a checkpoint has besides weights."""

    tokenizer: Tokenizer
    config: ModelConfig
    generation_config: GenerationConfig

    def __call__(self, messages: Messages, given: Mapping[str, Any]) -> Prepared:
        """Check the options and render the prompt; the arguments and errors are those of `Pipeline.stream`."""
        check_names(given, OPTION_NAMES | PROMPT_OPTIONS)
        for_prompt = {name: given[name] for name in PROMPT_OPTIONS if given.get(name) is not None}
        for name in ("enable_thinking", "raw_prompt", "literal"):
            check_boolean(name, for_prompt.get(name, False))
        rest = {name: value for name, value in given.items() if name not in PROMPT_OPTIONS}
        options = resolve_options(self.generation_config, rest)
        options.check_vocabulary(self.config.text.vocab_size)
        raw = for_prompt.pop("raw_prompt", False)
        sight = self._sight({name: for_prompt.pop(name) for name in SIGHT_OPTIONS & for_prompt.keys()})
        prompt = build_prompt(self.tokenizer, messages, raw=raw, sight=sight, **for_prompt)
        self._check_length(len(prompt.token_ids))
        seed = secrets.randbits(32) if options.seed is None else options.seed
        return Prepared(prompt, options, seed, self._end_ids(options))

    def _sight(self, given: Mapping[str, Any]) -> Sight:
        """Return how media are read: the checkpoint's way, with what the user wants otherwise."""
        config = self.config
        defaults = {
            "vision": config.vision,
            "image_tokens": config.vision_soft_tokens_per_image or DEFAULT_SOFT_TOKENS,
            "max_soft_tokens": config.text.max_position_embeddings,
        }
        return Sight(**(defaults | dict(given)))

    def _check_length(self, prompt_tokens: int) -> None:
        """Raise `ValueError` when prompt and one canvas do not fit the context."""
        context, C = self.config.text.max_position_embeddings, self.config.canvas_length
        if prompt_tokens == 0:
            raise ValueError("the prompt is empty: got 0 tokens, expected at least 1")
        if prompt_tokens + C > context:
            raise ValueError(
                f"the prompt has {prompt_tokens} tokens; expected at most {context - C}, "
                f"the context of {context} less one canvas of {C}"
            )

    def _end_ids(self, options: Options) -> frozenset[int]:
        extra: set[int] = set()
        for token in options.extra_eos_tokens:
            ids = [token] if isinstance(token, int) else self.tokenizer.encode(token)
            if len(ids) != 1 or not 0 <= ids[0] < self.config.text.vocab_size:
                raise ValueError(f"extra_eos_tokens: got {token!r}, expected one token of the vocabulary")
            extra.update(ids)
        return frozenset(self.generation_config.eos_token_ids) | extra
