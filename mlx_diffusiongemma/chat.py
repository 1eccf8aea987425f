"""A conversation in the terminal: `mlx_diffusiongemma.generate --chat`. The commands are those of `mlx_lm.chat`."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .answer import Interrupts, play, start
from .display import is_terminal, open_screen, wants_color
from .events import Result, Stats

if TYPE_CHECKING:
    from .pipeline import Pipeline

PROMPT = "› "
HELP = "  commands    q exit   r reset   h help"
Message = dict[str, Any]


class Terminated(Exception):
    """SIGTERM came while an answer was being generated."""


def chat(
    pipeline: Pipeline,
    model: str,
    first: Sequence[Message],
    options: Mapping[str, Any],
    prompt: str = "",
    *,
    live: bool,
) -> int:
    """Converse until `q` or the end of the input.

    Args:
        pipeline: answers.
        model: its name, for the header.
        first: messages that every conversation begins with.
        options: of `Pipeline.stream`; images and videos are shown with the first message.
        prompt: first line to answer; empty to ask for it.
        live: draw the canvas at every step.

    Returns:
        the exit code: 0, 2 for input that is not UTF-8, 130 for Ctrl-C at the prompt, 143 for SIGTERM.
    """
    if is_terminal(sys.stdout):
        print_header(model, first, options)
    if sys.stdin.isatty():
        importlib.import_module("readline")  # line editing and history for input()
    messages = list(first)
    try:
        while True:
            line = prompt or read_line(PROMPT)
            prompt = ""
            if line is None or line.strip() == "q":
                return 0
            if line.strip() == "r":
                messages = list(first)
                print("  reset: the conversation begins anew")
            elif line.strip() == "h":
                print(HELP)
            elif line.strip():
                message = as_question(line, options, shows_media=len(messages) == len(first))
                messages = take_turn(pipeline, messages, message, options, live=live)
    except UnicodeDecodeError as error:
        print(f"error: standard input is not valid UTF-8: {error.reason} at offset {error.start}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 128 + signal.SIGINT
    except Terminated:
        return 128 + signal.SIGTERM


def take_turn(
    pipeline: Pipeline, messages: list[Message], message: Message, options: Mapping[str, Any], *, live: bool
) -> list[Message]:
    """Answer a message, asking for the results of tools that are called; return the conversation so far.

    Bad input and an interrupted answer without any text leave the conversation as it was.
    """
    turn = [message]
    while True:
        with Interrupts() as interrupts:
            try:
                events = start(pipeline, [*messages, *turn], interrupts, options)
            except ValueError as error:
                print("error:", " ".join(str(error).split()), file=sys.stderr)
                return messages
            screen = open_screen(sys.stdout, live=live)
            result = play(pipeline, events, screen, interrupts, verbose=True)
        print_note(note(result.stats))
        if interrupts.ended_by == signal.SIGTERM:
            raise Terminated
        if not result.text and not result.tool_calls:
            return messages
        turn.append(as_message(result, options.get("prefill_response") or ""))
        if not result.tool_calls:
            return messages + turn
        for call in result.tool_calls:
            answer = read_line(f"result of {call.name} {PROMPT}")
            if answer is None:
                return messages
            turn.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": answer})


def as_question(line: str, options: Mapping[str, Any], *, shows_media: bool) -> Message:
    """Return a line as a message; `shows_media` puts parts for the images and videos of the options in front."""
    media = [{"type": kind} for kind in ("image", "video") for _ in options.get(f"{kind}s") or ()]
    if not media or not shows_media:
        return {"role": "user", "content": line}
    return {"role": "user", "content": [*media, {"type": "text", "text": line}]}


def as_message(result: Result, beginning: str) -> Message:
    """Return an answer as a message of the conversation, with the beginning that was given to it.

    Thoughts are not kept: the model was trained that way.
    """
    message: Message = {"role": "assistant", "content": beginning + result.text}
    if result.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in result.tool_calls
        ]
    return message


def read_line(prompt: str) -> str | None:
    """Read a line; None at the end of the input."""
    if sys.stdin.isatty():
        try:
            return input(prompt)
        except EOFError:
            print()
            return None
    line = sys.stdin.buffer.readline()
    return line.decode("utf-8").rstrip("\r\n") if line else None


def note(stats: Stats) -> str:
    """Return the line below an answer."""
    cached = f" ({stats.cached_tokens} of {stats.prompt_tokens} cached)" if stats.cached_tokens else ""
    return (
        f"  {stats.generated_tokens} tokens · {stats.tokens_per_second:.1f} tok/s · "
        f"prompt {stats.prompt_tokens_per_second:.1f} tok/s{cached} · peak {stats.peak_memory_gb:.2f} GB · "
        f"{sum(stats.denoising_steps)} steps"
    )


def print_note(text: str) -> None:
    """Print a line that is not part of the conversation."""
    print(f"\x1b[2m{text}\x1b[0m" if wants_color(sys.stdout) else text)


def print_header(model: str, first: Sequence[Message], options: Mapping[str, Any]) -> None:
    """Print what is being talked to."""
    from rich.box import ROUNDED
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    rows = [("model", model)]
    if options.get("max_tokens") is not None:
        rows.append(("max tokens", str(options["max_tokens"])))
    if first:
        rows.append(("system", first[0]["content"]))
    width = max(len(name) for name, _ in rows)
    body = Text("\n".join(f"{name:<{width}}   {value}" for name, value in rows))
    console = Console(highlight=False)
    console.print(Panel(body, title="mlx_diffusiongemma", title_align="left", box=ROUNDED, expand=False))
    print(HELP)
