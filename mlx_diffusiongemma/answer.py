"""Showing one answer: the events of `Pipeline.stream` go in, what a person reads comes out on a screen.

Here too: Ctrl-C and Ctrl-Z, looked at between the steps. How a screen draws is in `display.py`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

from .display import LiveScreen, PrefillBar, Screen, draft_spans
from .events import CanvasCommitted, DenoisingStep, Event, Finished, PrefillProgress, Result, Stats
from .output import OutputDelta, ToolCall, preview

if TYPE_CHECKING:
    from .checkpoint import LoadReport
    from .pipeline import Pipeline


class Interrupts:
    """Ctrl-C, Ctrl-Z and SIGTERM as flags, looked at between steps so that no drawing is cut in two.

    A second Ctrl-C does not wait for the step.
    """

    def __init__(self) -> None:
        self.ended_by: int | None = None
        self.stopped = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTSTP):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGTSTP:
            self.stopped = True
        elif self.ended_by is not None:
            raise KeyboardInterrupt
        else:
            self.ended_by = number

    def stop_if_asked(self, screen: Screen) -> None:
        """Leave the terminal to the shell after Ctrl-Z, and come back when the shell says so."""
        if not self.stopped:
            return
        self.stopped = False
        screen.suspend()
        noting = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, noting)


class Answer:
    """Shows one answer on a screen: thought, text and tool calls, each set off from the other."""

    def __init__(self, screen: Screen, *, with_reasoning: bool) -> None:
        self._screen = screen
        self._with_reasoning = with_reasoning
        self._part = ""
        self._last = "\n"

    def show(self, delta: OutputDelta) -> None:
        """Show what a canvas added."""
        if self._with_reasoning:
            self._write("reasoning", delta.reasoning)
        self._write("text", delta.text)
        for call in delta.tool_calls:
            self._write("tool", tool_call_line(call))

    def _write(self, part: str, text: str) -> None:
        if not text:
            return
        if part != self._part:
            self._begin(part)
        self._screen.write("" if part == "text" else part, text)
        self._last = text[-1]

    def _begin(self, part: str) -> None:
        """End the part before, and name the new one where colour cannot."""
        if self._last != "\n":
            self._screen.write("", "\n")
        if self._part == "reasoning":
            self._screen.write("", "\n" if self._screen.color else "[answer]\n" if part == "text" else "")
        if part == "reasoning" and not self._screen.color:
            self._screen.write("", "[thought]\n")
        self._part = part


def tool_call_line(call: ToolCall) -> str:
    """Return a tool call as a line to read."""
    return f"[tool call] {call.name} {json.dumps(call.arguments, ensure_ascii=False)}\n"


def play(
    pipeline: Pipeline, events: Iterator[Event], screen: Screen, interrupts: Interrupts, *, verbose: bool
) -> Result:
    """Show the events of one answer as they come; return its result."""
    answer = Answer(screen, with_reasoning=verbose)
    bar = PrefillBar(sys.stderr)
    try:
        for event in events:
            interrupts.stop_if_asked(screen)
            match event:
                case PrefillProgress():
                    bar.show(event.processed, event.total)
                case DenoisingStep():
                    show_draft(pipeline, event, screen)
                case CanvasCommitted():
                    answer.show(event.delta)
                case Finished():
                    return event.result
        raise RuntimeError("the loop ended without a result")
    finally:
        bar.close()
        screen.finish(keep_draft=interrupts.ended_by is not None)


def show_draft(pipeline: Pipeline, event: DenoisingStep, screen: Screen) -> None:
    """Draw the canvas of one step, without the end tokens that fill up its end."""
    if not isinstance(screen, LiveScreen):
        return
    ends = pipeline.generation_config.eos_token_ids
    length = len(event.token_ids)
    while length and event.token_ids[length - 1] in ends:
        length -= 1
    pieces = preview(pipeline.tokenizer, event.token_ids[:length])
    status = (
        f"canvas {event.canvas_index + 1} · step {event.step} of at most {event.max_steps} · "
        f"{sum(event.accepted)} of {len(event.accepted)} settled · entropy {event.mean_entropy:.3f}"
    )
    screen.draft(draft_spans(pieces, event.accepted, color=screen.color), status)


def footer(stats: Stats) -> str:
    """Return mlx_lm's three lines and one about the diffusion."""
    steps, blocks = sum(stats.denoising_steps), stats.canvases
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    return "\n".join(
        [
            f"Prompt: {stats.prompt_tokens} tokens{cached}, {stats.prompt_tokens_per_second:.3f} tokens-per-sec",
            f"Generation: {stats.generated_tokens} tokens, {stats.tokens_per_second:.3f} tokens-per-sec",
            f"Peak memory: {stats.peak_memory_gb:.3f} GB",
            f"Diffusion: {blocks} blocks, {steps} steps, {steps / max(blocks, 1):.1f} steps/block, "
            f"{stats.tokens_per_forward:.1f} tokens/step, {stats.steps_per_second:.1f} steps-per-sec",
        ]
    )


def load_line(model: str, report: LoadReport) -> str:
    """Return what loading took, and the reasons why tensors were left out."""
    line = f"Loaded {model}: {report.nbytes / 1e9:.3f} GB in {report.seconds:.3f} s"
    if report.dropped:
        reasons = ", ".join(sorted({reason for _, reason in report.dropped}))
        line += f"; {len(report.dropped)} tensors not used: {reasons}"
    return line


def start(pipeline: Pipeline, messages: Any, interrupts: Interrupts, options: Mapping[str, Any]) -> Iterator[Event]:
    """Begin one answer. Raise `ValueError` for bad input."""
    return pipeline.stream(messages, cancelled=lambda: interrupts.ended_by is not None, **options)
