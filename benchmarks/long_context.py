"""Memory and time of a long prompt: chunked prefill and one denoising step on a small random model.

The model has the layer pattern of the 26B model (5 sliding layers with a window of 1,024, then a full one) twice, a
context of 262,144 positions and a small width in float32, so that what grows with the prompt is easy to see. Twice,
because prefill stores the keys of the last layer and never computes what it attends to. Temporaries are
MLX's peak of active memory less the weights and less the keys and values that are kept. Every chunk size must give the
same canvas logits; a prompt that differs at position 10 alone must not. Where two experts are almost equally likely for
a token, rounding decides between them, and one such token in a long prompt moves logits far more than rounding does:
`--top-k-experts 4` uses all experts, so that nothing is decided.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_diffusiongemma.cache import KVQuantization
from mlx_diffusiongemma.config import ModelConfig
from mlx_diffusiongemma.masks import fits_at_once
from mlx_diffusiongemma.model import DiffusionGemma
from mlx_diffusiongemma.prefill import encode

MB = 1e6
CONFIG: dict[str, Any] = {
    "model_type": "diffusion_gemma",
    "canvas_length": 256,
    "eos_token_id": [1],
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "diffusion_gemma_text",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "top_k_experts": 2,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 1024,
        "max_position_embeddings": 262_144,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
        },
    },
}


class Run(NamedTuple):
    """What one prompt took."""

    tokens: int
    chunk: int
    kept_bytes: int  # keys and values in the cache at the end
    prefill_bytes: int  # peak over weights and kept bytes
    prefill_seconds: float
    step_bytes: int  # likewise, of one denoising step
    step_seconds: float
    logits: np.ndarray  # [C, V] of the canvas


def make_model(top_k_experts: int = 2, seed: int = 0) -> DiffusionGemma:
    """Return the random model."""
    mx.random.seed(seed)
    text = CONFIG["text_config"] | {"top_k_experts": top_k_experts}
    model = DiffusionGemma(ModelConfig.from_dict(CONFIG | {"text_config": text}))
    weights = [
        (name, mx.ones(array.shape) if array.ndim == 1 else mx.random.normal(array.shape) * 0.2)
        for name, array in tree_flatten(model.parameters())
    ]
    model.load_weights(weights)
    mx.eval(model.parameters())
    return model


def make_prompt(tokens: int, changed: int | None = None) -> tuple[int, ...]:
    """Return random token ids; `changed` is the position of one that differs."""
    vocab = CONFIG["text_config"]["vocab_size"]
    ids = np.random.default_rng(1).integers(2, vocab - 1, tokens)
    if changed is not None:
        ids[changed] += 1
    return tuple(ids.tolist())


def measure(model: DiffusionGemma, prompt: tuple[int, ...], chunk: int, kv: KVQuantization | None = None) -> Run:
    """Encode a prompt and run one denoising step."""
    mx.clear_cache()
    weights = mx.get_active_memory()
    mx.reset_peak_memory()
    cache = model.make_cache(kv)
    cache.reserve(len(prompt))
    start = time.perf_counter()
    for _ in encode(model, cache, prompt, chunk):
        pass
    prefill_seconds = time.perf_counter() - start
    kept = cache.nbytes
    prefill_bytes = mx.get_peak_memory() - weights - kept

    canvas_length, width = model.config.canvas_length, model.config.text.hidden_size
    canvas, nothing = mx.array(make_prompt(canvas_length)), mx.zeros((canvas_length, width))
    mx.reset_peak_memory()
    start = time.perf_counter()
    offset = mx.array(cache.offset, dtype=mx.int32)
    heads, seen = model.config.text.num_attention_heads, cache.offset + canvas_length
    lazy = fits_at_once(heads, canvas_length, seen)  # as the loop decides
    [hidden] = model.denoise([canvas], [nothing], [cache.views()], [offset], lazy=lazy)
    logits = model.model.decoder.embed_tokens.as_linear(hidden)
    mx.eval(logits)
    step_seconds = time.perf_counter() - start
    step_bytes = mx.get_peak_memory() - weights - kept
    return Run(len(prompt), chunk, kept, prefill_bytes, prefill_seconds, step_bytes, step_seconds, np.array(logits))


def difference(one: Run, other: Run) -> float:
    """Return the largest difference of two runs' logits."""
    return float(np.abs(one.logits - other.logits).max())


def row(run: Run) -> str:
    """Return a run as a line of a Markdown table."""
    return (
        f"| {run.tokens:,} | {run.chunk:,} | {run.kept_bytes / MB:.1f} | {run.prefill_bytes / MB:.1f} "
        f"| {run.prefill_seconds:.1f} | {run.step_bytes / MB:.1f} | {run.step_seconds:.2f} |"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192], help="lengths of the prompts")
    parser.add_argument("--chunks", type=int, nargs="+", default=[512, 1024, 2048], help="sizes of the chunks")
    parser.add_argument("--one-chunk", action="store_true", help="also encode each prompt in a single chunk")
    parser.add_argument("--changed", type=int, default=10, help="position of the token that is changed once")
    parser.add_argument("--kv-bits", type=int, choices=(4, 8), help="pack keys and values, in groups of 32")
    parser.add_argument(
        "--top-k-experts",
        type=int,
        default=2,
        help="of 4; with all of them rounding cannot choose (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per run")
    args = parser.parse_args(argv)

    model = make_model(args.top_k_experts)
    kv = KVQuantization(args.kv_bits, 32) if args.kv_bits else None
    if not args.json:
        print("| prompt | chunk | kept MB | prefill temporaries MB | prefill s | step temporaries MB | step s |")
        print("|---:|---:|---:|---:|---:|---:|---:|")
    for tokens in args.tokens:
        prompt = make_prompt(tokens)
        runs = []
        for chunk in [*args.chunks, *([tokens] if args.one_chunk else [])]:
            run = measure(model, prompt, chunk, kv)
            runs.append(run)
            print(json.dumps({**run._asdict(), "logits": None}) if args.json else row(run), flush=True)
        far = max((difference(runs[0], run) for run in runs[1:]), default=0.0)
        changed = difference(runs[-1], measure(model, make_prompt(tokens, args.changed), runs[-1].chunk, kv))
        if args.json:
            line = json.dumps({"tokens": tokens, "between_chunk_sizes": far, "token_changed": changed})
        else:
            where = f"{far:.1e} between chunk sizes, {changed:.1e} when token {args.changed} is another"
            line = f"{tokens:,} tokens, largest difference of canvas logits: {where}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
