"""A pipeline without a model, and the command line on top of it, for tests of what the terminal shows.

    python tests/fake_pipeline.py '{"canvases": [["Hel", "lo"]]}' --prompt hi --show-denoising

Token i + 1 of the fake vocabulary is the i-th piece of the script; token 0 ends a sequence.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

END = 0
NOISE = "~"


@dataclass
class FakePipeline:
    """Denoises given pieces of text, from left to right."""

    canvases: Sequence[Sequence[str]] = ()  # pieces; one that begins with <think> is a thought
    steps: int = 3
    delay: float = 0.0  # seconds per step
    prompt_tokens: int = 7
    chunks: int = 1
    tool_calls: Sequence[Mapping[str, Any]] = ()
    error: str = ""
    generation_config: Any = field(default_factory=lambda: SimpleNamespace(eos_token_ids=(END,)))
    tokenizer: Any = None
    load_report: Any = None
    requests: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)

    def stream(self, messages: Any, *, cancelled: Callable[[], bool] | None = None, **options: Any) -> Iterator[Any]:
        """Note the request and return its events."""
        if self.error:
            raise ValueError(self.error)
        self.requests.append((messages, options))
        return self._events(cancelled or (lambda: False), options["seed"])

    def _events(self, cancelled: Callable[[], bool], seed: int | None) -> Iterator[Any]:
        from mlx_diffusiongemma.events import CanvasCommitted, DenoisingStep, Finished, PrefillProgress
        from mlx_diffusiongemma.output import OutputDelta, ToolCall

        calls = tuple(ToolCall(**call) for call in self.tool_calls)
        text, reasoning, done, ids = "", "", [], []
        for chunk in range(self.chunks + 1):
            yield PrefillProgress(self.prompt_tokens * chunk // self.chunks, self.prompt_tokens)
            time.sleep(self.delay)
        for index, pieces in enumerate(self.canvases):
            last = index == len(self.canvases) - 1
            first_id = 1 + sum(len(canvas) for canvas in self.canvases[:index])
            kept = tuple(range(first_id, first_id + len(pieces)))
            canvas = (*kept, END, END)
            for step in range(1, self.steps + 1):
                accepted = tuple(i * self.steps < len(canvas) * step for i in range(len(canvas)))
                yield DenoisingStep(index, step, 48, canvas, accepted, 1 / step, step == self.steps)
                time.sleep(self.delay)
                if cancelled():
                    yield Finished(self._result(text, reasoning, (), ids, "cancelled", seed, done))
                    return
            whole = "".join(pieces)
            thought, new = ("", whole) if not whole.startswith("<think>") else (whole.removeprefix("<think>"), "")
            text, reasoning, ids = text + new, reasoning + thought, [*ids, *kept]
            done.append(self.steps)
            yield CanvasCommitted(index, kept, self.steps, OutputDelta(new, thought, calls if last else ()))
        reason = "tool_calls" if calls else "stop"
        yield Finished(self._result(text, reasoning, calls, ids, reason, seed, done))

    def _result(
        self, text: str, reasoning: str, calls: Any, ids: list[int], reason: Any, seed: int | None, done: list[int]
    ) -> Any:
        from mlx_diffusiongemma.events import Result, Stats

        steps = max(sum(done), 1)
        stats = Stats(
            prompt_tokens=self.prompt_tokens,
            images=0,
            video_frames=0,
            image_tokens=0,
            cached_tokens=0,
            generated_tokens=len(ids),
            canvases=len(done),
            denoising_steps=tuple(done),
            tokens_per_forward=len(ids) / steps,
            prefill_seconds=0.5,
            denoising_seconds=2.0,
            canvas_seconds=tuple(2.0 / len(done) for _ in done),
            queue_seconds=0.0,
            first_draft_seconds=0.75,
            total_seconds=2.5,
            prompt_tokens_per_second=self.prompt_tokens / 0.5,
            tokens_per_second=len(ids) / 2.0,
            steps_per_second=sum(done) / 2.0,
            batch_size=1.0,
            peak_memory_gb=1.25,
        )
        return Result(text, reasoning or None, calls, tuple(ids), reason, 99 if seed is None else seed, stats)


def preview_of(pipeline: FakePipeline) -> Callable[[Any, Sequence[int]], list[str]]:
    """Return what stands in for `output.preview`."""
    pieces = [piece.removeprefix("<think>") for canvas in pipeline.canvases for piece in canvas]
    return lambda _, ids: [pieces[i - 1] if i else "¶" for i in ids]


def install(pipeline: FakePipeline) -> None:
    """Make the command line of this process use a pipeline. The real module is not imported: that takes seconds."""
    import mlx_diffusiongemma.answer

    module: Any = ModuleType("mlx_diffusiongemma.pipeline")
    module.load = lambda model, **_: pipeline
    sys.modules["mlx_diffusiongemma.pipeline"] = module
    mlx_diffusiongemma.answer.preview = preview_of(pipeline)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores Ctrl-C
    script = json.loads(sys.argv[1])
    if before := script.pop("before", ""):
        print(before, end="", flush=True)
    install(FakePipeline(**script))
    from mlx_diffusiongemma.generate import main

    sys.exit(main(sys.argv[2:]))
