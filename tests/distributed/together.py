"""Run by every rank: answers requests with a divided model, all ranks alike, and prints what came out.

together.py CHECKPOINT CASES.json    cases are [prompt, options]; a list of prompts is a batch
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_diffusiongemma.pipeline import Pipeline, load
from mlx_diffusiongemma.ranks import Ranks


def answers(pipeline: Pipeline, prompt: Any, options: dict[str, Any]) -> list[Any]:
    """Return tokens, steps and log-probabilities of each answer of a case, as plain values."""
    batch = prompt if isinstance(prompt, list) else [prompt]
    return [
        [list(result.token_ids), list(result.stats.denoising_steps), result.finish_reason, _logprobs(result)]
        for result in pipeline.generate_batch(batch, **options)
    ]


def _logprobs(result: Any) -> list[Any] | None:
    if result.logprobs is None:
        return None
    return [
        [token.logprob, [token_id for token_id, _ in token.top], list(token.candidates)] for token in result.logprobs
    ]


def main() -> None:
    """Answer the cases."""
    ranks = Ranks(mx.distributed.init(strict=True))
    pipeline = load(sys.argv[1], dtype="float32", ranks=ranks)
    assert pipeline.load_report is not None
    mx.clear_cache()
    loaded = mx.get_active_memory()
    mx.reset_peak_memory()
    results = [answers(pipeline, prompt, options) for prompt, options in json.loads(Path(sys.argv[2]).read_text())]
    measured = {"nbytes": pipeline.load_report.nbytes, "loaded": loaded, "peak": mx.get_peak_memory()}
    print(json.dumps({"rank": ranks.rank, "results": results, **measured}))
    mx.clear_streams()


if __name__ == "__main__":
    main()
