"""Canvases on their way from noise to text, recorded from one model and shown to others.

`record_trajectories` watches a model answer tasks; a `Reader` shows one recorded canvas after the other to any model
of the same vocabulary and canvas length. What is measured with them is in `quality.py`, what is learned from them in
`distillation.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .denoise import StepInput, StepResult, StepRules, first_state
from .events import Result
from .model import DiffusionGemma
from .options import DEFAULT_PREFILL_STEP_SIZE, MAX_SEED
from .pipeline import Pipeline
from .prefill import encode
from .prompt import build_prompt
from .tasks import Task
from .vocabulary import CanvasReading, DrawShape, processed_logits, read_canvas, row_sums

Progress = Callable[[int, int], None]  # how many are done, and of how many


class Report:
    """A frozen dataclass of measurements."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values."""
        return asdict(self)  # type: ignore[call-overload]


@dataclass(frozen=True)
class RecordedStep(Report):
    """What the decoder was shown at one denoising step, besides the prefix and its own self-conditioning signal."""

    step: int  # from 1
    canvas: tuple[int, ...]  # C ids
    temperature: float


@dataclass(frozen=True)
class Trajectory(Report):
    """One canvas on its way from noise to text."""

    prefix: tuple[int, ...]  # prompt and committed canvases
    steps: tuple[RecordedStep, ...]
    entropy_bound: float  # nats


def record_trajectories(
    pipeline: Pipeline,
    tasks: Iterable[Task],
    seed: int,
    *,
    max_tokens: int | None = None,
    progress: Progress = lambda *_: None,
) -> list[Trajectory]:
    """Generate the answers and keep every canvas at every denoising step.

    Args:
        pipeline: the reference.
        tasks: prompts; expected answers are not looked at.
        seed: of the first task; the next has the next.
        max_tokens: tokens per answer; None for the checkpoint's default.
        progress: called before and after every task.

    Raises:
        ValueError: a prompt that the checkpoint cannot take.
    """
    trajectories: list[Trajectory] = []
    tasks = list(tasks)
    for index, task in enumerate(tasks):
        progress(index, len(tasks))
        prompt = build_prompt(pipeline.tokenizer, task.messages, **task.prompt_options)
        recorder = _Recorder(prompt.token_ids)
        answer(pipeline.watched(recorder), task, seed + index, max_tokens)
        trajectories += recorder.trajectories()
    progress(len(tasks), len(tasks))
    return trajectories


class _Recorder:
    """Watches the steps of one request."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._prefixes = [tuple(prompt_ids)]  # of each canvas begun
        self._steps: list[list[RecordedStep]] = [[]]
        self._argmax: tuple[int, ...] = ()
        self._entropy_bound = 0.0

    def __call__(self, inputs: Sequence[StepInput], rules: Sequence[StepRules], results: Sequence[StepResult]) -> None:
        [row], [rule], [result] = inputs, rules, results
        offset = int(np.array(row.offset))
        if offset != len(self._prefixes[-1]):  # another canvas: the one before was committed
            self._prefixes.append(self._prefixes[-1] + self._argmax)
            self._steps.append([])
        if offset != len(self._prefixes[-1]):
            raise RuntimeError(f"a canvas at position {offset}, expected {len(self._prefixes[-1])}")
        canvas = tuple(np.array(row.state.canvas).tolist())
        self._steps[-1].append(RecordedStep(len(self._steps[-1]) + 1, canvas, float(np.array(row.temperature))))
        self._argmax = tuple(np.array(result.argmax).tolist())
        self._entropy_bound = rule.entropy_bound

    def trajectories(self) -> list[Trajectory]:
        return [
            Trajectory(prefix, tuple(steps), self._entropy_bound)
            for prefix, steps in zip(self._prefixes, self._steps, strict=True)
            if steps
        ]


def answer(pipeline: Pipeline, task: Task, seed: int, max_tokens: int | None = None) -> Result:
    """Generate the answer of a task; `seed` is taken modulo 2^64."""
    return pipeline.generate(task.messages, seed=seed % (MAX_SEED + 1), max_tokens=max_tokens, **task.prompt_options)


class Reader:
    """A model that reads the canvases of one trajectory, in order."""

    def __init__(self, model: DiffusionGemma, prefix: tuple[int, ...]) -> None:
        cache = model.make_cache()
        for _ in encode(model, cache, prefix, DEFAULT_PREFILL_STEP_SIZE):
            pass
        self._model = model
        self._table = model.model.decoder.embed_tokens
        self._prefix = cache.views()
        self._offset = mx.array(cache.offset, dtype=mx.int32)
        self._hidden = mx.zeros((0,))  # [C, D] of the canvas read last
        self._soft_embeddings: mx.array | None = None

    def soft_embeddings(self, canvas: mx.array) -> mx.array:
        """Return the self-conditioning signal that reading a canvas [C] begins with; [C, D]."""
        if self._soft_embeddings is None:
            self._soft_embeddings = first_state(self._model, canvas, stability_threshold=0).soft_embeddings
        return self._soft_embeddings

    def read(self, canvas: mx.array, temperature: mx.array, chunk_elements: int) -> CanvasReading:
        """Read one canvas [C] and keep the self-conditioning signal for the next."""
        soft = self.soft_embeddings(canvas)
        [self._hidden] = self._model.denoise([canvas], [soft], [self._prefix], [self._offset])
        reading = read_canvas(
            self._hidden,
            self._table,
            self._model.config.text.final_logit_softcapping,
            temperature,
            mx.zeros(canvas.shape),  # nothing is drawn
            DrawShape(greedy=True),
            chunk_elements=chunk_elements,
        )
        mx.eval(reading, self._hidden)
        self._soft_embeddings = reading.soft_embeddings
        return reading

    def log_probabilities(self, rows: slice, temperature: mx.array) -> mx.array:
        """Return what the sampler sees at some rows of the canvas read last; [R, V] float32."""
        softcap = self._model.config.text.final_logit_softcapping
        logits = processed_logits(self._hidden[rows], self._table, softcap, temperature)
        centred = logits - logits.max(axis=-1, keepdims=True)
        return centred - mx.log(row_sums(mx.exp(centred)))[:, None]
