"""What the block-diffusion loop reports: events while it runs, a result at the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .output import OutputDelta, ToolCall

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model holds one token of its answer: natural logarithms, at temperature 1.

    They are those of the model's own distribution at this position, given the prompt, the answer so far and the draft
    of the rest of the canvas: pins, bans and what narrows the draw do not count.

    Attributes:
        token_id: the token of the answer; its log-probability is given also where it was pinned.
        logprob: at the last step of its canvas.
        settled_logprob: at the step that settled it.
        settled_step: that step, from 1 on: from there to the end the draft had this token.
        top: the likeliest tokens at the last step and their log-probabilities, likeliest first.
        candidates: log-probabilities at the last step of the tokens that were asked for, in that order.
    """

    token_id: int
    logprob: float
    settled_logprob: float
    settled_step: int
    top: tuple[tuple[int, float], ...] = ()
    candidates: tuple[float, ...] = ()


@dataclass(frozen=True)
class PrefillProgress:
    """Prompt tokens done so far: first those known from earlier prompts, then after every chunk, up to the end."""

    processed: int
    total: int


@dataclass(frozen=True)
class DenoisingStep:
    """One step of one canvas. `step` counts up from 1; `token_ids` is the draft, the argmax canvas."""

    canvas_index: int
    step: int
    max_steps: int
    token_ids: tuple[int, ...]
    accepted: tuple[bool, ...]  # True where the draw was accepted; the rest is renoised
    mean_entropy: float  # nats
    finished: bool  # stable and confident: this was the canvas's last step
    entropies: tuple[float, ...] = ()  # nats, per position; their mean is `mean_entropy`
    pinned: tuple[bool, ...] = ()  # True where pins or a grammar chose the token; empty where they chose none
    rows: int = 0  # of the canvas that were computed: a policy may leave some out
    seconds: float = field(default=0.0, compare=False)  # of the step, without what it encoded along


@dataclass(frozen=True)
class CanvasCommitted:
    """A canvas became part of the answer. `token_ids` holds the kept ids only: end token and what follows are gone."""

    canvas_index: int
    token_ids: tuple[int, ...]
    steps: int
    delta: OutputDelta  # text, reasoning and tool calls that can be shown now
    logprobs: tuple[TokenLogprob, ...] | None = None  # of `token_ids`, where asked for


@dataclass(frozen=True)
class Stats:
    """Counts and times of one request.

    `total_seconds` is wall time from the start of prefill to the end; `queue_seconds` is the time before that. The
    seconds of the phases leave out what the caller does between events; in a batch every row counts the whole time of
    a shared step. Rates count kept tokens only, and of the prompt those that were not cached.
    """

    prompt_tokens: int
    images: int  # in the prompt
    video_frames: int
    image_tokens: int  # soft tokens of both, among the prompt tokens
    cached_tokens: int = 0  # of the prompt, known from earlier ones: not encoded again
    generated_tokens: int = 0
    canvases: int = 0
    denoising_steps: tuple[int, ...] = ()  # per canvas
    row_steps: int = 0  # rows of the canvas, summed over all steps: what the decoder had to compute
    policy: str = "exact"  # see `policies.POLICIES`
    tokens_per_forward: float = 0.0  # generated tokens per denoising step
    prefill_seconds: float = 0.0
    denoising_seconds: float = 0.0
    canvas_seconds: tuple[float, ...] = ()  # of the steps of each canvas
    queue_seconds: float = 0.0  # before the start of prefill
    first_draft_seconds: float | None = None  # from the start of prefill to the first step's end; None without a step
    total_seconds: float = 0.0
    prompt_tokens_per_second: float = 0.0
    tokens_per_second: float = 0.0
    steps_per_second: float = 0.0
    batch_size: float = 0.0  # mean number of canvases that shared a step, this one among them
    peak_memory_gb: float = 0.0  # GB = 1e9 bytes, of MLX's allocator: of this run; in an engine, of the process so far


@dataclass(frozen=True)
class Result:
    """The whole answer."""

    text: str
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int
    stats: Stats = field(repr=False)
    note: str | None = None  # why the answer is not what was asked for: a constraint that it ended too early for
    logprobs: tuple[TokenLogprob, ...] | None = field(default=None, repr=False)  # of `token_ids`, where asked for
    end_logprob: TokenLogprob | None = field(default=None, repr=False)  # of the end token, where there is one

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class Finished:
    """The last event of a request."""

    result: Result


Event = PrefillProgress | DenoisingStep | CanvasCommitted | Finished
