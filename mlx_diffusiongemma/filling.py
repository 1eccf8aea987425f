"""The part of `generate.py` that fills holes and edits texts: --prefix, --suffix and --edit.

Standard output carries what stands in the hole, or the edited text or its diff, byte for byte.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .cli import json_line

if TYPE_CHECKING:
    from .pipeline import Pipeline

SELECTION = re.compile(r"(\d+):(\d+)")
OTHERS = ("chat", "show_denoising", "stop", "prefill_response", "enable_thinking", "ignore_chat_template", "logprobs")
GRAMMARS = ("json_schema", "regex", "lark", "choices")
OF_A_PROMPT = ("system_prompt", "tools", "chat_template_config", "image", "video")


def wants_holes(args: argparse.Namespace) -> bool:
    """Tell whether a hole is to be filled or a text to be edited."""
    return any(value is not None for value in (args.prefix, args.suffix, args.edit))


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with 2 where arguments do not go together."""
    if (args.prefix is None) != (args.suffix is None):
        parser.error("--prefix and --suffix need each other")
    if args.edit is not None and args.prefix is not None:
        parser.error("--edit and --prefix exclude each other")
    if args.edit is not None and args.prompt is None:
        parser.error("--edit needs --prompt, which says what to change")
    if args.edit == args.prompt == "-":
        parser.error("--edit and --prompt cannot both read stdin")
    if args.edit is None and (args.select or args.diff):
        parser.error("--select and --diff need --edit")
    if args.diff and args.json:
        parser.error("--diff and --json exclude each other: JSON has the diff")
    if args.infill_length and not wants_holes(args):
        parser.error("--infill-length needs --prefix and --suffix, or --edit")
    if wants_holes(args):
        for name in (*OTHERS, *GRAMMARS):
            given = getattr(args, name)
            if given is not None and given is not False:
                parser.error(f"--{name.replace('_', '-')} goes with neither --prefix nor --edit")
        if not args.guard_empty:
            parser.error("--no-guard-empty goes with neither --prefix nor --edit: a hole has no end token")
        if (args.chat_template_config or {}).get("enable_thinking"):
            parser.error("enable_thinking of --chat-template-config goes with neither --prefix nor --edit")
    if args.prefix is not None and args.prompt is None:
        for name in OF_A_PROMPT:
            if getattr(args, name):
                parser.error(f"--{name.replace('_', '-')} with --prefix needs --prompt")
    for selection in args.select or ():
        if not SELECTION.fullmatch(selection):
            parser.error(f"--select: got {selection!r}, expected START:STOP in characters, such as 4:10")


def check_values(args: argparse.Namespace, text: str | None) -> None:
    """Raise `ValueError` for lengths and selections that no text to edit, or hole, can have."""
    from .edit import check_selection
    from .lengths import lengths_to_try

    lengths_to_try(args.infill_length, args.max_tokens)
    if text is not None and (selection := selections(args)) is not None:
        check_selection(selection, len(text))


def selections(args: argparse.Namespace) -> list[tuple[int, int]] | None:
    """Return what --select names; None for nothing."""
    pairs = [SELECTION.fullmatch(selection) for selection in args.select or ()]
    return [(int(pair[1]), int(pair[2])) for pair in pairs if pair] or None


def fill(
    args: argparse.Namespace,
    pipeline: Pipeline,
    options: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]] | None,
    instruction: str | None,
    text: str | None,
) -> int:
    """Do it and print it; return the exit code.

    Args:
        args: of the command line.
        pipeline: to fill with.
        options: of `Pipeline.stream`, more than holes have.
        messages: the conversation that a filled text is the answer of; None for a text without one.
        instruction: of an edit.
        text: to edit; None where a hole is filled.
    """
    from .edit import edit, edit_prompt
    from .infill import FILL_OPTIONS, infill

    given: dict[str, Any] = {name: value for name, value in options.items() if name in FILL_OPTIONS}
    given |= {"length": args.infill_length, "max_tokens": args.max_tokens}
    if text is None:
        filled = infill(pipeline, args.prefix, args.suffix, messages=messages, **given)
        return show(args, filled.text, asdict(filled))
    asked: dict[str, Any] = {"instruction": instruction}
    if args.system_prompt is not None and messages and instruction is not None:
        asked = {"messages": [*messages[:-1], {"role": "user", "content": edit_prompt(text, instruction)}]}
    edited = edit(pipeline, text, selection=selections(args), **asked, **given)
    return show(args, edited.diff if args.diff else edited.text, asdict(edited))


def show(args: argparse.Namespace, text: str, result: Mapping[str, Any]) -> int:
    """Print a text as it is, or all of a result as JSON. A terminal gets a new line behind it."""
    if args.json:
        print(json_line({"model": args.model, **result}))
        return 0
    sys.stdout.write(text)
    if sys.stdout.isatty() and not text.endswith("\n"):
        print()
    return 0
