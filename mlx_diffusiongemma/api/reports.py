"""Token counts and times of an answer, in the forms that clients of OpenAI and llama.cpp know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..events import Stats
from .service import Done


def usage(dones: Sequence[Done], n: int) -> dict[str, Any]:
    """Return OpenAI's `usage` of prompts with `n` choices each, which follow each other. A prompt counts once."""
    prompts = [done.result.stats for done in dones[::n]]
    prompt = sum(stats.prompt_tokens for stats in prompts)
    completion = sum(done.result.stats.generated_tokens for done in dones)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(stats.cached_tokens for stats in prompts)},
        "completion_tokens_details": {"reasoning_tokens": sum(done.reasoning_tokens for done in dones)},
    }


def timings(done: Done) -> dict[str, Any]:
    """Return llama.cpp's `timings` with what diffusion adds; milliseconds, and tokens per second.

    `note` says why an answer does not satisfy the constraint that it was given; it is there in that case only.
    """
    stats = done.result.stats
    encoded, predicted = stats.prompt_tokens - stats.cached_tokens, stats.generated_tokens
    prompt_ms, predicted_ms = 1000 * stats.prefill_seconds, 1000 * stats.denoising_seconds
    first = stats.first_draft_seconds
    return {
        "cache_n": stats.cached_tokens,
        "prompt_n": encoded,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / encoded if encoded else 0.0,
        "prompt_per_second": stats.prompt_tokens_per_second,
        "predicted_n": predicted,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / predicted if predicted else 0.0,
        "predicted_per_second": stats.tokens_per_second,
        "queue_ms": 1000 * stats.queue_seconds,
        "total_ms": 1000 * stats.total_seconds,
        "peak_memory": stats.peak_memory_gb,
        "seed": done.result.seed,
        "diffusion": True,
        "diffusion_blocks": stats.canvases,
        "diffusion_steps": sum(stats.denoising_steps),
        "diffusion_steps_per_block": list(stats.denoising_steps),
        "diffusion_row_steps": stats.row_steps,
        "diffusion_policy": stats.policy,
        "diffusion_steps_per_second": stats.steps_per_second,
        "diffusion_tokens_per_forward": stats.tokens_per_forward,
        "diffusion_first_draft_ms": None if first is None else 1000 * first,
        "diffusion_batch_size": stats.batch_size,
        **({} if done.result.note is None else {"note": done.result.note}),
    }


def seconds_to_text(stats: Stats) -> float:
    """Return the seconds from the request to its first canvas: before that nothing is certain."""
    return stats.queue_seconds + stats.prefill_seconds + sum(stats.canvas_seconds[:1])


def has_filled_context(done: Done, max_tokens: int) -> bool:
    """Tell whether an answer ended because the context was full, not because it had the tokens that it was allowed."""
    return done.finish_reason == "length" and done.result.stats.generated_tokens < max_tokens
