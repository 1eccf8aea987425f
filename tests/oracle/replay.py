"""Run our loop on the random numbers of a record, and compare every integer. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from mlx_diffusiongemma import sampler
from mlx_diffusiongemma.checkpoint import Checkpoint, load_model
from mlx_diffusiongemma.config import load_configs
from mlx_diffusiongemma.denoise import StepResult
from mlx_diffusiongemma.events import DenoisingStep, Finished, Result
from mlx_diffusiongemma.media import ImageBlock
from mlx_diffusiongemma.options import resolve_options
from mlx_diffusiongemma.output import OutputDelta
from mlx_diffusiongemma.pipeline import Pipeline
from mlx_diffusiongemma.request import Request
from mlx_diffusiongemma.soft_tokens import SoftTokens

from .records import CanvasRecord, SequenceRecord
from .tolerances import MEAN_ENTROPY


class NoText:
    """Stands where the output parser does, for models without a tokenizer."""

    token_count_at_stop = None

    def feed(self, token_ids: Sequence[int]) -> OutputDelta:
        return OutputDelta()

    def finish(self) -> OutputDelta:
        return OutputDelta()


class TracedRequest(Request):
    """A request of the real loop that keeps each step's canvas, which events do not carry."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trace: list[tuple[DenoisingStep, np.ndarray]] = []

    def absorb(self, result: StepResult, batch_size: int = 1) -> DenoisingStep:
        event = super().absorb(result, batch_size)
        self.trace.append((event, np.array(result.state.canvas)))
        return event


def load_without_tokenizer(folder: Path) -> Pipeline:
    """Load a saved model in float32, through our config reader and weight map."""
    config, generation_config = load_configs(folder)
    if config.unknown_keys or generation_config.unknown_keys:
        raise ValueError(f"unknown keys: {config.unknown_keys + generation_config.unknown_keys}")
    return Pipeline(Checkpoint(folder, load_model(folder, config, "float32"), None, config, generation_config))  # type: ignore[arg-type]


@contextmanager
def recorded_noise(records: Sequence[SequenceRecord]) -> Iterator[None]:
    """Let `sampler.noise` return the draws of `records[seed]` while inside."""

    def noise(seed: int, canvas_index: int, step: int, canvas_length: int, vocab_size: int) -> sampler.Noise:
        canvas = records[seed].canvases[canvas_index]
        if step == 0:
            return sampler.Noise(mx.zeros(canvas_length), mx.array(canvas.first))
        return sampler.Noise(mx.array(canvas.uniforms[step - 1]), mx.array(canvas.noise[step - 1]))

    with patch.object(sampler, "noise", noise):
        yield


def replay(
    pipeline: Pipeline,
    records: Sequence[SequenceRecord],
    blocks: Sequence[Sequence[ImageBlock]] | None = None,
    **options: Any,
) -> list[tuple[TracedRequest, Result]]:
    """Generate for the prompts of the records, with their images, together, through the pipeline's own loop."""
    resolved = resolve_options(pipeline.generation_config, options)
    end_ids = frozenset(pipeline.generation_config.eos_token_ids)
    with recorded_noise(records):
        model = pipeline._checkpoint.model
        look = SoftTokens(model)
        seen = blocks or [()] * len(records)
        requests = [
            TracedRequest(model, record.prompt, resolved, row, end_ids, NoText(), seen[row], look)  # type: ignore[arg-type]
            for row, record in enumerate(records)
        ]
        results = {i: event.result for i, event in pipeline._run(requests, None) if isinstance(event, Finished)}
    return [(request, results[row]) for row, request in enumerate(requests)]


def assert_equal(record: SequenceRecord, request: TracedRequest, result: Result, max_tokens: int) -> float:
    """Compare a traced replay, canvases after each step included; return the worst mean entropy difference."""
    after = [canvas for _, canvas in request.trace]
    expected = [row for canvas in record.canvases for row in canvas.canvas]
    worst = assert_answer(record, [event for event, _ in request.trace], result, request._end_ids, max_tokens)
    np.testing.assert_array_equal(after, expected, err_msg="canvas after a step")
    return worst


def assert_answer(
    record: SequenceRecord, events: Iterable[object], result: Result, end_ids: Collection[int], max_tokens: int
) -> float:
    """Compare a replay with its record, step by step, then the answer; return the worst mean entropy difference."""
    steps = iter(event for event in events if isinstance(event, DenoisingStep))
    worst = 0.0
    for index, canvas in enumerate(record.canvases):
        for step in range(canvas.steps):
            event = next(steps, None)
            where = f"canvas {index}, step {step + 1} of {canvas.steps}"
            assert event is not None, f"ours ended before {where}"
            assert (event.canvas_index, event.step) == (index, step + 1), where
            worst = max(worst, _assert_step(canvas, step, event, where))
    assert next(steps, None) is None, "ours ran more steps than the reference"
    assert result.stats.denoising_steps == tuple(canvas.steps for canvas in record.canvases)
    assert result.token_ids == record.kept(end_ids, max_tokens)
    return worst


def _assert_step(canvas: CanvasRecord, step: int, event: DenoisingStep, where: str) -> float:
    """Compare one step; return the difference of the mean entropies."""
    where += (
        f" (the reference was {canvas.accept_margin[step]:.1e} nats from the entropy bound,"
        f" {canvas.argmax_margin[step]:.1e} from another argmax)"
    )
    np.testing.assert_array_equal(event.token_ids, canvas.argmax[step], err_msg=f"argmax, {where}")
    np.testing.assert_array_equal(event.accepted, canvas.accepted[step], err_msg=f"accepted, {where}")
    difference = float(abs(event.mean_entropy - canvas.mean_entropy[step]))
    assert difference <= MEAN_ENTROPY, where
    last = step == canvas.steps - 1
    assert event.finished == (last and canvas.finished), f"stop flag, {where}"
    return difference
