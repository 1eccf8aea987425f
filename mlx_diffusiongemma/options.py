"""The options of one request, resolved against the checkpoint's defaults and checked.

Every default of the sampler and the loop comes from `generation_config.json`; a user's None means that default.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .config import GenerationConfig, check_integer, check_number, check_sampler
from .policies import EXACT, Policy, find_policy

DEFAULT_PREFILL_STEP_SIZE = 2048
MAX_SEED = 2**64 - 1
MAX_TOP_LOGPROBS = 20  # as many as OpenAI's API allows
MAX_CANDIDATES = 1000
MIN_TEMPERATURE = 1e-6  # logits of 30 divided by less leave float32


@dataclass(frozen=True)
class Options:
    """What one request asks of the loop, with nothing left open.

    Attributes:
        max_tokens: tokens to generate at most; 0 generates nothing.
        seed: of this request's random numbers, 0 to 2^64 - 1; None draws one.
        temperature: 1 is the checkpoint's schedule, other values scale it, 0 proposes the argmax.
        top_p, top_k, min_p: narrow the draw; never entropy, acceptance or self-conditioning.
        max_denoising_steps: cap of steps per canvas.
        entropy_bound: nats of joint uncertainty accepted in one step.
        t_min, t_max: ends of the linear temperature schedule.
        confidence_threshold: mean entropy (nats) below which a stable canvas is done.
        stability_threshold: steps for which the argmax must not have changed.
        stop: strings that end the text; they are not part of it.
        guard_empty: forbid an end token at the very first position.
        extra_eos_tokens: more end tokens, by spelling or id.
        ignore_eos: let no end token end the answer, which then has `max_tokens` tokens.
        prefill_step_size: chunk of the prompt, cut at absolute multiples.
        pins: (position in the answer, token id), ascending: tokens that the answer must have there.
        seed_canvas: token ids that the answer begins from in place of noise; every one of them may change.
        text_only: (start, stop) of positions in the answer that may take no control token.
        logprobs: log-probabilities of the answer's tokens, with so many of the likeliest tokens each; None for none.
        logprob_candidates: token ids whose log-probabilities are wanted too, at every position.
        policy: name of a way to take fewer steps (`policies.POLICIES`). Constraints, pins, a seed canvas, text-only
            positions and log-probabilities need `exact`, and get it whatever the policy.
    """

    max_tokens: int
    max_denoising_steps: int
    entropy_bound: float
    t_min: float
    t_max: float
    confidence_threshold: float
    stability_threshold: int
    seed: int | None = None
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: tuple[str, ...] = ()
    guard_empty: bool = False
    extra_eos_tokens: tuple[str | int, ...] = ()
    ignore_eos: bool = False
    prefill_step_size: int = DEFAULT_PREFILL_STEP_SIZE
    pins: tuple[tuple[int, int], ...] = ()
    seed_canvas: tuple[int, ...] = ()
    text_only: tuple[tuple[int, int], ...] = ()
    logprobs: int | None = None
    logprob_candidates: tuple[int, ...] = ()
    policy: str | Policy = EXACT.name

    def __post_init__(self) -> None:
        check_integer("max_tokens", self.max_tokens, 0)
        check_integer("prefill_step_size", self.prefill_step_size, 1)
        check_sampler(self)
        check_number("temperature", self.temperature, 0)
        self._check_lowest_temperature()
        if self.top_k is not None:
            check_integer("top_k", self.top_k, 0)
        _check_fraction("top_p", self.top_p, zero_allowed=False)
        _check_fraction("min_p", self.min_p, zero_allowed=True)
        if self.seed is not None:
            check_integer("seed", self.seed, 0, MAX_SEED)
        check_boolean("guard_empty", self.guard_empty)
        check_boolean("ignore_eos", self.ignore_eos)
        for token in self.extra_eos_tokens:
            if isinstance(token, bool) or not isinstance(token, str | int):
                raise ValueError(f"extra_eos_tokens: got {token!r}, expected spellings or ids of tokens")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop: got {list(self.stop)!r}, expected strings that are not empty")
        find_policy(self.policy)
        self._check_canvas()
        self._check_logprobs()

    def _check_canvas(self) -> None:
        """Raise `ValueError` for pins or a seed canvas that no answer of this length can have."""
        for position, token_id in self.pins:
            check_integer("pins: position", position, 0, self.max_tokens - 1)
            check_integer("pins: token id", token_id, 0)
        if len({position for position, _ in self.pins}) < len(self.pins):
            raise ValueError("pins: got a position twice, expected one token per position")
        if len(self.seed_canvas) > self.max_tokens:
            raise ValueError(
                f"seed_canvas: got {len(self.seed_canvas)} tokens, expected at most max_tokens, {self.max_tokens}"
            )
        for token_id in self.seed_canvas:
            check_integer("seed_canvas: token id", token_id, 0)
        for start, stop in self.text_only:
            check_integer("text_only: start", start, 0, self.max_tokens)
            check_integer("text_only: stop", stop, start, self.max_tokens)

    def _check_logprobs(self) -> None:
        if self.logprobs is not None:
            check_integer("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        elif self.logprob_candidates:
            raise ValueError("logprob_candidates: got some without logprobs, expected logprobs, 0 at least, with them")
        if len(self.logprob_candidates) > MAX_CANDIDATES:
            raise ValueError(
                f"logprob_candidates: got {len(self.logprob_candidates)} tokens, expected at most {MAX_CANDIDATES}"
            )
        for token_id in self.logprob_candidates:
            check_integer("logprob_candidates: token id", token_id, 0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `ValueError` for a token of pins, seed canvas or candidates that a vocabulary of this size lacks."""
        for name, token_ids in (
            ("pins", [token_id for _, token_id in self.pins]),
            ("seed_canvas", self.seed_canvas),
            ("logprob_candidates", self.logprob_candidates),
        ):
            if wrong := [token_id for token_id in token_ids if token_id >= vocab_size]:
                raise ValueError(f"{name}: got token id {wrong[0]}, expected less than {vocab_size}")

    def _check_lowest_temperature(self) -> None:
        scale = self.temperature or 1.0
        lowest = scale * (self.t_min + (self.t_max - self.t_min) / self.max_denoising_steps)
        if lowest < MIN_TEMPERATURE:
            schedule = f"t_min {self.t_min:g}, t_max {self.t_max:g}"
            raise ValueError(
                f"temperature: got {self.temperature:g} with {schedule}, expected 0, or at least {MIN_TEMPERATURE:g} "
                "at the last step"
            )


def check_boolean(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, expected True or False")


def _check_fraction(name: str, value: Any, *, zero_allowed: bool) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value > 1 or value < 0 or (value == 0 and not zero_allowed):
        raise ValueError(f"{name}: got {value!r}, expected a number in {'[0, 1]' if zero_allowed else '(0, 1]'}")


OPTION_NAMES = frozenset(field.name for field in fields(Options))


def check_names(given: Mapping[str, Any], allowed: frozenset[str]) -> None:
    """Raise `TypeError` for an argument that nobody reads."""
    unknown = sorted(set(given) - allowed)
    if unknown:
        raise TypeError(f"unknown argument {unknown[0]!r}; expected one of {', '.join(sorted(allowed))}")


def resolve_options(defaults: GenerationConfig, given: Mapping[str, Any]) -> Options:
    """Return checked options.

    Args:
        defaults: of the checkpoint.
        given: the user's, by name; None means the default.

    Raises:
        TypeError: an unknown name.
        ValueError: a value outside its range, with the value and the range.
    """
    check_names(given, OPTION_NAMES)
    values: dict[str, Any] = {
        "max_tokens": defaults.max_new_tokens,
        "max_denoising_steps": defaults.max_denoising_steps,
        "entropy_bound": defaults.entropy_bound,
        "t_min": defaults.t_min,
        "t_max": defaults.t_max,
        "confidence_threshold": defaults.confidence_threshold,
        "stability_threshold": defaults.stability_threshold,
    }
    values.update({name: value for name, value in given.items() if value is not None})
    for name in ("stop", "extra_eos_tokens"):
        if name in values:
            values[name] = _as_tuple(values[name])
    if "pins" in values:
        pins = values["pins"]
        pairs = pins.items() if isinstance(pins, Mapping) else _as_list("pins", pins)
        values["pins"] = _as_pairs("pins", pairs, "a position and a token id")
    if "text_only" in values:
        values["text_only"] = _as_pairs("text_only", _as_list("text_only", values["text_only"]), "a start and a stop")
    for name in ("seed_canvas", "logprob_candidates"):
        if name in values:
            values[name] = tuple(_as_list(name, values[name]))
    return Options(**values)


def _as_pairs(name: str, value: Iterable[Any], what: str) -> tuple[tuple[int, int], ...]:
    """Return pairs of integers in ascending order. Raise `ValueError` for anything else."""
    pairs = [tuple(_as_list(name, pair)) for pair in value]
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(number, int) and not isinstance(number, bool) for number in pair):
            raise ValueError(f"{name}: got {pair!r}, expected pairs of {what}")
    return tuple(sorted(pairs))


def _as_list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ValueError(f"{name}: got {value!r}, expected a list")
    return list(value)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
