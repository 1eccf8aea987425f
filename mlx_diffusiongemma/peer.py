"""mlx-vlm on the same weights, prompts and seeds: its own generation loop, whole requests.

mlx-vlm is an optional extra and is imported when a peer is made. Two ways of it are compared: `exact` is the
reference's sampler (entropy-bound, temperature 1, full canvas), `default` what its command line does without options.
Its random numbers are its own: the same seed does not give the same text as here.
"""

from __future__ import annotations

import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx

from .config import ModelConfig, read_json
from .events import Result, Stats
from .output import OutputDelta, OutputParser
from .pipeline import Pipeline
from .policies import find_policy
from .workload import Run

PEER = "mlx-vlm"
PEER_VERSION = "0.7.10"
HOW_TO_INSTALL = f"pip install '{PEER}=={PEER_VERSION}' (or this project's extra: pip install '.[bench]')"
MODES: dict[str, dict[str, Any]] = {
    "exact": {"diffusion_sampler": "entropy-bound", "temperature": 1.0, "diffusion_full_canvas": True},
    "default": {},
}


def peer_version() -> str | None:
    """Return the version of mlx-vlm, None when it is not installed."""
    try:
        return version(PEER)
    except PackageNotFoundError:
        return None


class TokenSink:
    """Tokenizer, detokenizer and stopping criteria in one, for a loop that is timed without text.

    Keeps the tokens; `end_ids` are those that end the answer.
    """

    last_segment = ""

    def __init__(self, end_ids: frozenset[int]) -> None:
        self.detokenizer = self.stopping_criteria = self
        self.token_ids: list[int] = []
        self._end_ids = end_ids

    def __call__(self, token_id: int) -> bool:
        """Tell whether a token ends the answer."""
        return token_id in self._end_ids

    def add_token(self, token_id: int, **_: Any) -> None:
        """Keep a token of the answer."""
        self.token_ids.append(token_id)

    def add_eos_token_ids(self, token_ids: Any) -> None:
        """Ignore the checkpoint's end tokens: ours are given."""

    def reset(self) -> None:
        """Start an answer."""

    def finalize(self) -> None:
        """End it."""


@dataclass(frozen=True)
class Answer:
    """One whole request, by either side."""

    seconds: float
    steps: int  # of all canvases
    canvases: int
    row_steps: int  # rows of the canvas summed over all steps: the work of the decoder
    generated_tokens: int
    right: bool | None  # None where no answer is expected


class Peer:
    """mlx-vlm with a checkpoint loaded."""

    def __init__(self, folder: Path, pipeline: Pipeline) -> None:
        """Load the weights a second time, in the dtype of ours.

        Args:
            folder: of the checkpoint.
            pipeline: ours on the same checkpoint: prompts, end tokens and options are taken from there.

        Raises:
            ValueError: mlx-vlm cannot load this checkpoint.
        """
        self._loop = importlib.import_module("mlx_vlm.generate.diffusion")
        self._pipeline = pipeline
        load_model = importlib.import_module("mlx_vlm.utils").load_model
        try:
            with readable_folder(folder, pipeline.config) as readable:
                self._model = load_model(readable)
                self._model.set_dtype(pipeline.model.dtype)
                mx.eval(self._model.parameters())
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{PEER} cannot load {folder}: {reason:.200}") from None

    def answer(self, run: Run, mode: str) -> Answer:
        """Answer a prompt in one of `MODES`."""
        prepared = run.prepared
        options, sink = prepared.options, TokenSink(prepared.end_ids)
        settings = dict(self._model.config.generation_config or {})
        settings |= {
            "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": options.entropy_bound},
            "t_min": options.t_min,
            "t_max": options.t_max,
            "stability_threshold": options.stability_threshold,
            "confidence_threshold": options.confidence_threshold,
            "eos_token_id": None,  # the sink knows
        }
        self._model.config.generation_config = settings
        mx.random.seed(prepared.seed)
        mx.clear_cache()
        started = time.perf_counter()
        last: Any = None
        canvases = 0
        for last in self._loop.stream_diffusion_generate(
            self._model,
            sink,
            sink,
            mx.array(prepared.prompt.token_ids)[None],
            None,
            None,
            max_tokens=options.max_tokens,
            max_denoising_steps=options.max_denoising_steps,
            skip_special_token_ids=[],
            **MODES[mode],
        ):
            canvases += last.diffusion_block_complete
        seconds = time.perf_counter() - started
        return Answer(
            seconds,
            last.diffusion_denoising_steps,
            canvases,
            last.diffusion_work_tokens,
            len(sink.token_ids),
            None if run.task is None else run.task.is_right(self._read(run, tuple(sink.token_ids))),
        )

    def _read(self, run: Run, token_ids: tuple[int, ...]) -> Result:
        """Return tokens as text, thoughts and tool calls, read as ours are."""
        prompt = run.prepared.prompt
        parser = OutputParser(self._pipeline.tokenizer, thinking_open=prompt.thinking_open)
        delta: OutputDelta = parser.feed(token_ids) + parser.finish()
        stats = Stats(len(prompt.token_ids), images=0, video_frames=0, image_tokens=0)
        return Result(
            delta.text, delta.reasoning or None, tuple(delta.tool_calls), token_ids, "stop", run.prepared.seed, stats
        )


def our_answer(pipeline: Pipeline, run: Run) -> Answer:
    """Answer a prompt here."""
    mx.clear_cache()
    started = time.perf_counter()
    [result] = pipeline.run_batch([run.prepared])
    seconds = time.perf_counter() - started
    stats = result.stats
    return Answer(
        seconds,
        sum(stats.denoising_steps),
        stats.canvases,
        stats.row_steps,
        stats.generated_tokens,
        None if run.task is None else run.task.is_right(result),
    )


@contextmanager
def readable_folder(folder: Path, config: ModelConfig) -> Iterator[Path]:
    """Yield a folder with the same weights whose config leaves nothing to mlx-vlm's own defaults, those of 26B.

    transformers writes head sizes of full layers layer by layer, which mlx-vlm does not read. The vision tower is left
    out: prompts here are text.
    """
    raw = read_json(folder / "config.json")
    with tempfile.TemporaryDirectory() as name:
        target = Path(name)
        for path in folder.iterdir():
            if path.is_file() and path.name != "config.json":
                (target / path.name).symlink_to(path.resolve())
        (target / "config.json").write_text(json.dumps(_complete(raw, config)))
        yield target


def _complete(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    text = config.text
    explicit = {
        "global_head_dim": text.global_head_dim,
        "num_global_key_value_heads": text.num_global_key_value_heads,
        "layer_types": list(text.layer_types),
        "rope_parameters": {kind: dict(values) for kind, values in text.rope_parameters.items()},
        "rms_norm_eps": text.rms_norm_eps,
        "final_logit_softcapping": text.final_logit_softcapping,
        "use_bidirectional_attention": text.use_bidirectional_attention,
    }
    return {**raw, "text_config": {**raw["text_config"], **explicit}, "vision_config": None}


# -- in turns ---------------------------------------------------------------------------------------------------------


def compare(
    pipeline: Pipeline, peer: Peer, runs: Sequence[Run], progress: Callable[[int, int], None] = lambda *_: None
) -> dict[str, Any]:
    """Answer every prompt here and there in turns, so that what else the machine does falls on both; JSON-ready.

    The first prompt is answered once by both beforehand, off the clock.
    """
    modes: dict[str, Any] = {}
    done, total = 0, len(MODES) * len(runs)
    for mode in MODES:
        our_answer(pipeline, runs[0])
        peer.answer(runs[0], mode)
        pairs = []
        for run in runs:
            progress(done, total)
            pairs.append((our_answer(pipeline, run), peer.answer(run, mode)))
            done += 1
        progress(done, total)
        modes[mode] = describe_pairs(pairs)
    policy = find_policy(runs[0].prepared.options.policy).name
    return {"peer": PEER, "version": peer_version(), "policy": policy, "modes": modes}


def describe_pairs(pairs: Sequence[tuple[Answer, Answer]]) -> dict[str, Any]:
    """Return both sides of (ours, theirs), and how they compare: all, answers of one canvas, those of several."""
    groups = {
        "all": pairs,
        "one canvas": [pair for pair in pairs if pair[1].canvases == 1],
        "several canvases": [pair for pair in pairs if pair[1].canvases > 1],
    }
    return {
        "ours": _describe([ours for ours, _ in pairs]),
        PEER: _describe([theirs for _, theirs in pairs]),
        "ratio": {name: _compare(group) for name, group in groups.items() if group},
    }


def _compare(pairs: Sequence[tuple[Answer, Answer]]) -> dict[str, Any]:
    """Return ours over theirs: seconds pair by pair and summed up, and row-steps summed up."""
    ratios = [ours.seconds / theirs.seconds for ours, theirs in pairs]
    totals = [(sum(a.seconds for a in side), sum(a.row_steps for a in side)) for side in zip(*pairs, strict=True)]
    (our_seconds, our_rows), (their_seconds, their_rows) = totals
    return {
        "median": statistics.median(ratios),
        "of_totals": our_seconds / their_seconds,
        "row_steps": our_rows / their_rows,
        "pairs": ratios,
    }


def _describe(answers: Sequence[Answer]) -> dict[str, Any]:
    judged = [answer.right for answer in answers if answer.right is not None]
    seconds = [answer.seconds for answer in answers]
    return {
        "median_seconds": statistics.median(seconds),
        "total_seconds": sum(seconds),
        "seconds": seconds,
        "steps_per_canvas": sum(answer.steps for answer in answers) / sum(answer.canvases for answer in answers),
        "canvases": sum(answer.canvases for answer in answers),
        "row_steps": sum(answer.row_steps for answer in answers),
        "generated_tokens": sum(answer.generated_tokens for answer in answers),
        "right": sum(judged),
        "judged": len(judged),
        "accuracy": sum(judged) / len(judged) if judged else None,
    }
