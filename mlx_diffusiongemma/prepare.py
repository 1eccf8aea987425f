"""What is done with a request before the model sees it: options checked, media read, the prompt rendered.

Nothing here computes with MLX, so it can run in any thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .config import GenerationConfig, ModelConfig
from .constraint import Constraint
from .events import Result, Stats
from .grammar import Grammar
from .media import DEFAULT_SOFT_TOKENS, Sight, count_media
from .memory import Wanted
from .options import OPTION_NAMES, Options, check_boolean, check_names, resolve_options
from .policies import find_policy
from .prompt import Prompt, build_prompt
from .tokenizer import Tokenizer

Messages = str | Sequence[Mapping[str, Any]]
Asked = tuple[Messages, Mapping[str, Any]]  # a prompt and its options, those of `Pipeline.stream`
SIGHT_OPTIONS = frozenset({"image_tokens", "fps", "video_frames"})
PROMPT_OPTIONS = SIGHT_OPTIONS | frozenset(
    {"tools", "enable_thinking", "prefill_response", "template_kwargs", "raw_prompt", "literal", "images", "videos"}
)
GRAMMAR_OPTIONS = frozenset({"response_format", "regex", "lark", "choices", "tool_choice", "parallel_tool_calls"})
OPTION_OF = {"json_object": "response_format", "json_schema": "response_format", "tool_calls": "tool_choice"}
TOOL_CHOICES = ("auto", "none", "required")


@dataclass(frozen=True)
class Prepared:
    """A request that can run: its prompt, its options, its seed, drawn where none was given, and its grammar."""

    prompt: Prompt
    options: Options
    seed: int
    end_ids: frozenset[int]
    grammar: Grammar | None = None
    enable_thinking: bool = False

    def constraint(self, tokenizer: Tokenizer) -> Constraint | None:
        """Return what holds the answer to the grammar, in front of the answer; None without one.

        Raises:
            ValueError: the grammar does not fit the tokenizer, is too complex, or allows nothing.
        """
        if self.grammar is None:
            return None
        is_open = self.prompt.thinking_open
        thinks = self.enable_thinking or is_open
        return Constraint(self.grammar, tokenizer, self.end_ids, thinking=thinks, thinking_open=is_open)

    def without_images(self) -> Prepared:
        """Return this request without the patches, which are large and of no use after prefill."""
        return replace(self, prompt=replace(self.prompt, blocks=()))

    def cancelled_result(self, queue_seconds: float) -> Result:
        """Return the result of this request where it was cancelled before it began."""
        stats = Stats(len(self.prompt.token_ids), *count_media(self.prompt.blocks), queue_seconds=queue_seconds)
        logprobs = None if self.options.logprobs is None else ()
        return Result("", None, (), (), "cancelled", self.seed, stats, logprobs=logprobs)


def request_sizes(requests: Sequence[Prepared]) -> tuple[list[Wanted], int]:
    """Return what the memory of requests that run together depends on: what each asks for, and their longest chunk."""
    each = [
        Wanted(
            len(request.prompt.token_ids),
            request.options.max_tokens,
            max((len(block.image.patches) for block in request.prompt.blocks), default=0),
            find_policy(request.options.policy).freeze_confidence is not None,
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
        check_names(given, OPTION_NAMES | PROMPT_OPTIONS | GRAMMAR_OPTIONS)
        for_prompt = {name: given[name] for name in PROMPT_OPTIONS if given.get(name) is not None}
        grammar = grammar_of(given)
        if given.get("tool_choice") == "none":
            for_prompt.pop("tools", None)
        for name in ("enable_thinking", "raw_prompt", "literal"):
            check_boolean(name, for_prompt.get(name, False))
        rest = {name: value for name, value in given.items() if name in OPTION_NAMES}
        options = resolve_options(self.generation_config, rest)
        options.check_vocabulary(self.config.text.vocab_size)
        raw = for_prompt.pop("raw_prompt", False)
        if not isinstance(for_template := for_prompt.get("template_kwargs", {}), Mapping):
            raise ValueError(f"template_kwargs: got {for_template!r:.80}, expected names and values")
        sight = self._sight({name: for_prompt.pop(name) for name in SIGHT_OPTIONS & for_prompt.keys()})
        context = self.config.text.max_position_embeddings
        prompt = build_prompt(self.tokenizer, messages, raw=raw, sight=sight, max_prompt_tokens=context, **for_prompt)
        self._check_length(len(prompt.token_ids))
        seed = secrets.randbits(32) if options.seed is None else options.seed
        thinks = bool(for_template.get("enable_thinking", for_prompt.get("enable_thinking", False)))
        prepared = Prepared(prompt, options, seed, self._end_ids(options), grammar, thinks)
        if grammar is not None:
            _check_alone(options)
            try:  # whatever is wrong with it is known now, and what it costs is paid now
                prepared.constraint(self.tokenizer)
            except ValueError as error:
                raise ValueError(f"{OPTION_OF.get(grammar.kind, grammar.kind)}: {error}") from None
        return prepared

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
        return frozenset() if options.ignore_eos else frozenset(self.generation_config.eos_token_ids) | extra


def grammar_of(given: Mapping[str, Any]) -> Grammar | None:
    """Return the grammar that options of `Pipeline.stream` ask for; None for a free answer.

    Raises:
        ValueError: more than one, or one that cannot be used.
    """
    asked = {name: given[name] for name in GRAMMAR_OPTIONS if given.get(name) is not None}
    parallel = asked.pop("parallel_tool_calls", True)
    check_boolean("parallel_tool_calls", parallel)
    found: dict[str, Grammar] = {}
    for name, value in asked.items():
        try:
            grammar = (
                _tool_grammar(value, given.get("tools"), parallel) if name == "tool_choice" else MAKERS[name](value)
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if grammar is not None:
            found[name] = grammar
    if len(found) > 1:
        first, *others = sorted(found)
        raise ValueError(f"{first}: got {' and '.join(others)} too, expected one grammar that the answer is held to")
    return next(iter(found.values()), None)


MAKERS: dict[str, Callable[[Any], Grammar | None]] = {
    "response_format": Grammar.from_response_format,
    "regex": Grammar.from_regex,
    "lark": Grammar.from_lark,
    "choices": Grammar.from_choices,
}


def _tool_grammar(choice: Any, tools: Any, parallel: bool) -> Grammar | None:
    """Return the grammar of OpenAI's `tool_choice`; None where the model may answer without a call."""
    if choice in ("auto", "none"):
        return None
    name = None
    if choice != "required":
        function = choice.get("function") if isinstance(choice, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            raise ValueError(f"got {choice!r}, expected {', '.join(TOOL_CHOICES)}, or a function with its name")
    if not isinstance(tools, list | tuple) or not tools:
        raise ValueError("a call is demanded; expected tools, got none")
    return Grammar.from_tools(tools, name, parallel)


def _check_alone(options: Options) -> None:
    """Raise `ValueError` for options that would cut or fill what a grammar describes."""
    for name in ("stop", "pins", "ignore_eos"):
        if getattr(options, name):
            raise ValueError(f"{name}: got a grammar too, which decides where the answer ends and what it holds")
