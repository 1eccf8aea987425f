"""Fields that several dialects share, and what becomes of them.

A field that would change the answer and is not supported is refused with the reason; one that nobody knows is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..config import DIFFUSION_NUMBERS
from .canvas import CANVAS_NAMES, canvas_options
from .errors import refuse, short

SAMPLING = ("seed", "temperature", "top_p", "top_k", "min_p", "stop", "policy", *DIFFUSION_NUMBERS)
XARGS = "diffusion_"  # vLLM's prefix, in `vllm_xargs`
XARGS_NAMES = {"max_steps": "max_denoising_steps", **{name: name for name in DIFFUSION_NUMBERS}}
WITHOUT_THINKING = ("none", "off", "instant", "minimal")
EFFORT = dict.fromkeys(WITHOUT_THINKING, False) | dict.fromkeys(("on", "low", "medium", "high", "xhigh", "max"), True)
GUIDES = {"json": "response_format", "regex": "regex", "choice": "choices"}  # vLLM's names, with `guided_` or without
CANVASES = ("diffusion_read_only", "diffusion_constrained")
LOGPROBS_ELSEWHERE = "log probabilities are given by /v1/chat/completions, /v1/completions and /v1/responses only"


class Body(BaseModel):
    """The body of a request. Types are strict, unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)


class SamplingBody(Body):
    """What every generating request may have."""

    model: str | None = None
    stream: bool | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: str | list[str] | None = None
    ttl: float | None = None
    n: int | None = None
    max_denoising_steps: int | None = None
    entropy_bound: float | None = None
    t_min: float | None = None
    t_max: float | None = None
    confidence_threshold: float | None = None
    stability_threshold: int | None = None
    policy: str | None = None
    diffusion_frames: bool | None = None
    diffusing: bool | None = None
    vllm_xargs: dict[str, Any] | None = None
    diffusion_seed_canvas: list[int] | None = None
    diffusion_pinned: list[int] | None = None
    diffusion_sampler: str | None = None
    diffusion_full_canvas: bool | None = None
    diffusion_min_canvas_length: int | None = None
    diffusion_max_canvas_length: int | None = None
    canvas_length: int | None = None
    threshold: float | None = None
    min_threshold: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repeat_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None
    xtc_probability: float | None = None
    typical_p: float | None = None
    mirostat: int | None = None
    response_format: dict[str, Any] | None = None
    regex: str | None = None
    lark: str | None = None
    choices: list[str] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    diffusion_read_only: Any = None
    diffusion_constrained: Any = None


def refuse_unsupported(body: SamplingBody) -> None:
    """Raise `ApiError` for fields that this model cannot honour."""
    together = "the tokens of a canvas are drawn together, so none of them comes before another"
    another_way = "this way to draw a token is not supported"
    for name, neutral, reason in (
        ("presence_penalty", 0, together),
        ("frequency_penalty", 0, together),
        ("repeat_penalty", 1, together),
        ("repetition_penalty", 1, together),
        ("xtc_probability", 0, another_way),
        ("typical_p", 1, another_way),
        ("mirostat", 0, another_way),
    ):
        value = getattr(body, name)
        if value is not None and value != neutral:
            raise refuse(name, f"got {value:g}, expected {neutral}: {reason}")
    if body.logit_bias:
        raise refuse("logit_bias", "is not supported, expected none")
    _refuse_other_canvases(body)


def _refuse_other_canvases(body: SamplingBody) -> None:
    for name in CANVASES:
        if getattr(body, name) not in (None, False):
            raise refuse(name, f"got {short(getattr(body, name))}, expected none: it is not supported")
    if body.diffusion_sampler not in (None, "entropy-bound", "entropy_bound"):
        raise refuse("diffusion_sampler", f"got {body.diffusion_sampler!r}, expected 'entropy-bound'")
    for name in ("threshold", "min_threshold"):
        if getattr(body, name) is not None:
            raise refuse(name, "belongs to another sampler; expected entropy_bound and confidence_threshold")
    if body.diffusion_full_canvas is False:
        raise refuse("diffusion_full_canvas", "got false, expected true: a canvas always has its full length")
    for name in ("canvas_length", "diffusion_min_canvas_length", "diffusion_max_canvas_length"):
        if getattr(body, name) is not None:
            raise refuse(name, f"got {getattr(body, name)}, expected none: a canvas always has its full length")


def sampling_options(body: SamplingBody) -> dict[str, Any]:
    """Return the options of the engine that a body sets. Raise `ApiError` for those that it may not set."""
    refuse_unsupported(body)
    options = {name: getattr(body, name) for name in SAMPLING}
    options.update(grammar_options(body))
    xargs = dict(body.vllm_xargs or {})
    options.update(canvas_options(body.diffusion_seed_canvas, body.diffusion_pinned, xargs))
    options.update(_from_xargs(xargs))
    if options["seed"] == -1:  # what llama.cpp and LM Studio call a random one
        options["seed"] = None
    if options["top_k"] == -1:  # what they call all of them
        options["top_k"] = None
    if options["stop"] in ("", []):
        options["stop"] = None
    return {name: value for name, value in options.items() if value is not None}


def grammar_options(body: SamplingBody) -> dict[str, Any]:
    """Return the options that hold an answer to a grammar, by the names of OpenAI, vLLM and llama.cpp.

    Raises:
        ApiError: a grammar in another language than Lark, or two of them under one name of the engine.
    """
    given = {name: getattr(body, name) for name in ("response_format", "regex", "lark", "choices")}
    others = {f"guided_{name}": (name, getattr(body, f"guided_{name}")) for name in (*GUIDES, "grammar")}
    for name, value in (body.structured_outputs or {}).items():
        others[f"structured_outputs.{name}"] = (name, value)
    others |= {"json_schema": ("json", body.json_schema), "grammar": ("grammar", body.grammar)}
    for param, (name, value) in others.items():
        if value is None:
            continue
        if name not in GUIDES:
            raise refuse(param, "is not supported; expected response_format, regex, choices or lark (a Lark grammar)")
        if given[GUIDES[name]] is not None:
            raise refuse(param, f"got {GUIDES[name]} too, expected one of them")
        given[GUIDES[name]] = schema_format(param, value) if name == "json" else value
    return {name: value for name, value in given.items() if value is not None}


def schema_format(param: str, schema: Any) -> dict[str, Any]:
    """Return a JSON schema, or its text, as OpenAI's `response_format`."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise refuse(param, f"is not JSON: {error}") from None
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def _from_xargs(given: Mapping[str, Any]) -> dict[str, Any]:
    """Read vLLM's extra arguments; those of other features are ignored."""
    options = {}
    for name, value in given.items():
        if not name.startswith(XARGS):
            continue
        known = XARGS_NAMES.get(name.removeprefix(XARGS))
        if known is None:
            expected = ", ".join(f"{XARGS}{each}" for each in (*XARGS_NAMES, *CANVAS_NAMES))
            raise refuse(f"vllm_xargs.{name}", f"is not supported; expected one of {expected}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise refuse(f"vllm_xargs.{name}", f"got {value!r}, expected a number")
        options[known] = value
    return options


def refuse_more_than_text(body: SamplingBody) -> None:
    """Raise `ApiError` for choices, drafts and log-probabilities, in dialects that have no place for them."""
    refuse_choices_and_drafts(body)
    for name in ("logprobs", "top_logprobs"):
        if getattr(body, name):
            raise refuse(name, f"got {getattr(body, name)!r}, expected none: {LOGPROBS_ELSEWHERE}")


def refuse_choices_and_drafts(body: SamplingBody) -> None:
    """Raise `ApiError` for choices and drafts, in dialects that have no place for them."""
    if body.n not in (None, 1):
        raise refuse("n", f"got {body.n}, expected 1")
    if wants_frames(body):
        raise refuse("diffusion_frames", "drafts are streamed by /v1/chat/completions only, expected false")


def wants_frames(body: SamplingBody) -> bool:
    """Tell whether every denoising step is to be streamed."""
    return bool(body.diffusion_frames or body.diffusing)


def token_limit(*given: int | None) -> int | None:
    """Return the first limit that is given; None for none, which -1 says too."""
    limit = next((value for value in given if value is not None), None)
    return None if limit == -1 else limit


def thinking(param: str, effort: str | None, *switches: bool | None) -> bool | None:
    """Return whether to think: what the first switch says that is set, else the effort; None where nothing does."""
    switch = next((value for value in switches if value is not None), None)
    if switch is not None or effort is None:
        return switch
    if effort not in EFFORT:
        raise refuse(param, f"got {effort!r}, expected one of {', '.join(EFFORT)}")
    return EFFORT[effort]


def check_tool_choice(choice: Any) -> Any:
    """Return OpenAI's `tool_choice`, "auto" where there is none. Raise `ApiError` for what is none of them."""
    if choice is None:
        return "auto"
    if choice in ("auto", "none", "required") or isinstance(choice, Mapping):
        return choice
    raise refuse("tool_choice", f"got {choice!r}, expected 'auto', 'none', 'required' or a function")
