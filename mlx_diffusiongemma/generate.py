"""Command line: generate text from a prompt, or chat in the terminal. Flag names are those of `mlx_lm.generate`.

    python -m mlx_diffusiongemma.generate --model tiny --prompt "What is 17 + 25?" --show-denoising

Standard output carries the answer, standard error the errors and the progress bar. Exit codes: 0, 2 for bad input (one
line that begins with `error:`), 1 for an answer that failed or could not be written, 130 after Ctrl-C. How an answer
is shown is in `answer.py` and `display.py`, the conversation in `chat.py`. They are imported after the arguments have
been read: `--help` is quick.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli import (
    LOAD_OPTIONS,
    SAMPLER_OPTIONS,
    Parser,
    add_diffusion_options,
    add_loading_options,
    add_sampling_options,
    bad_input,
    json_line,
    on_ranks,
    run_command_line,
    size,
)
from .filling import check_arguments, check_values, fill, wants_holes

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .team import Team

DEFAULT_MODEL = "mlx-community/diffusiongemma-26B-A4B-it-4bit"
DEFAULT_PROMPT = "hello"
RULE = "=" * 10

# Arguments that go to the loop as they are, under the loop's own names.
LOOP_OPTIONS = (*SAMPLER_OPTIONS, "max_tokens", "seed", "prefill_step_size", "logprobs")
SIGHT_OPTIONS = ("image_tokens", "fps", "video_frames")


# -- arguments ----------------------------------------------------------------------------------------------------


def true_or_false(text: str) -> bool:
    """Read the value of --verbose."""
    answer = {"true": True, "t": True, "false": False, "f": False}.get(text.lower())
    if answer is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected True or False")
    return answer


def json_object(text: str) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"got {text[:60]!r}, expected a JSON object ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a JSON object")
    return value


def setup_parser() -> argparse.ArgumentParser:
    """Return the parser. No default is here that the checkpoint or the loop has."""
    parser = Parser(
        prog="mlx_diffusiongemma.generate",
        description="Generate text by block diffusion. Defaults are the checkpoint's own unless said otherwise.",
        allow_abbrev=False,
    )
    toggle = argparse.BooleanOptionalAction

    group = parser.add_argument_group("model")
    group.add_argument("--model", default=DEFAULT_MODEL, help="'tiny', a folder or a Hub id (default: %(default)s)")
    add_loading_options(group)

    group = parser.add_argument_group("prompt")
    group.add_argument("--prompt", "-p", help=f"message to answer; '-' reads stdin (default: {DEFAULT_PROMPT})")
    group.add_argument("--system-prompt", "--system", help="system message")
    group.add_argument("--prefill-response", help="how the answer must begin")
    group.add_argument("--tools", metavar="FILE.json", help="JSON list of tools the model may call, in OpenAI's form")
    group.add_argument("--enable-thinking", action=toggle, help="let the model think first (default: no)")
    group.add_argument("--ignore-chat-template", action="store_true", help="the prompt is the model's input, as it is")
    group.add_argument("--use-default-chat-template", action="store_true", help="accepted; the checkpoint has its own")
    group.add_argument("--trust-remote-code", action="store_true", help="accepted; nothing of a checkpoint is executed")
    group.add_argument("--chat-template-config", type=json_object, metavar="JSON", help="more template variables")
    group.add_argument("--prefill-step-size", type=int, metavar="N", help="prompt tokens encoded at a time")

    group = parser.add_argument_group("what is remembered of earlier prompts")
    group.add_argument("--prompt-cache-dir", metavar="DIR", help="keep it in this folder, for later runs (default: no)")
    group.add_argument(
        "--prompt-cache-bytes", type=size, metavar="SIZE", help="memory for it (default: 2GiB in a chat)"
    )

    group = parser.add_argument_group(
        "images and videos, in front of the prompt (with --ignore-chat-template: where it has <|image|>)"
    )
    group.add_argument("--image", nargs="+", action="extend", metavar="FILE", help="images to look at")
    group.add_argument("--video", nargs="+", action="extend", metavar="FILE", help="videos to look at")
    group.add_argument("--image-tokens", type=int, metavar="N", help="detail of an --image: 70, 140, 280, 560 or 1120")
    group.add_argument("--fps", type=float, metavar="N", help="frames of a video per second (default: 1)")
    group.add_argument("--video-frames", type=int, metavar="N", help="frames of a video at most (default: 32)")

    group = parser.add_argument_group("holes and edits")
    group.add_argument("--prefix", metavar="TEXT", help="write what belongs between this text and --suffix")
    group.add_argument("--suffix", metavar="TEXT", help="what stands behind the hole")
    group.add_argument(
        "--infill-length", type=int, nargs="+", metavar="N", help="tokens of the hole, or several to choose from"
    )
    group.add_argument("--edit", metavar="FILE", help="change this text ('-': stdin) as --prompt says")
    group.add_argument(
        "--select", action="append", metavar="START:STOP", help="characters of --edit that may change (default: any)"
    )
    group.add_argument("--diff", action="store_true", help="print what --edit changes as a unified diff")

    group = parser.add_argument_group("answer")
    group.add_argument("--max-tokens", "-m", type=int, metavar="N", help="tokens to generate at most")
    group.add_argument("--stop", nargs="+", action="extend", metavar="TEXT", help="text that ends the answer")
    group.add_argument("--extra-eos-token", nargs="+", action="extend", metavar="TOKEN", help="tokens that end it")
    group.add_argument("--guard-empty", action=toggle, default=True, help="never answer nothing (default: yes)")

    group = parser.add_argument_group("what the answer must satisfy; a thought before it is free")
    kinds = group.add_mutually_exclusive_group()
    kinds.add_argument("--json-schema", metavar="FILE|JSON", help="JSON of this schema; {} for any object")
    kinds.add_argument("--regex", metavar="PATTERN", help="text that this regular expression matches as a whole")
    kinds.add_argument("--lark", metavar="FILE", help="text that this Lark grammar derives from `start`")
    kinds.add_argument("--choices", nargs="+", metavar="TEXT", help="one of these texts")

    group = parser.add_argument_group("sampling")
    group.add_argument("--seed", type=int, help="same seed, same answer (default: a new one)")
    add_sampling_options(group)

    add_diffusion_options(parser.add_argument_group("diffusion"))

    group = parser.add_argument_group("output")
    group.add_argument("--show-denoising", action=toggle, default=False, help="draw the canvas at every step")
    group.add_argument("--verbose", type=true_or_false, default=True, help="False prints the answer alone")
    group.add_argument("--json", action="store_true", help="print one JSON object with the answer and its statistics")
    group.add_argument(
        "--logprobs", type=int, metavar="N", help="with log-probabilities, of so many likeliest tokens too: 0 to 20"
    )
    group.add_argument("--chat", action="store_true", help="hold a conversation in the terminal")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments; exit with 2 when they do not go together."""
    parser = setup_parser()
    args = parser.parse_args(argv)
    if args.json and args.chat:
        parser.error("--json and --chat exclude each other")
    if args.logprobs is not None and not args.json:
        parser.error("--logprobs needs --json")
    for name, needs in (("image_tokens", "image"), ("fps", "video"), ("video_frames", "video")):
        if getattr(args, name) is not None and not getattr(args, needs):
            parser.error(f"--{name.replace('_', '-')} needs --{needs}")
    if args.ignore_chat_template:
        for name in ("chat", "system_prompt", "tools", "enable_thinking", "prefill_response", "chat_template_config"):
            if getattr(args, name):
                parser.error(f"--ignore-chat-template and --{name.replace('_', '-')} exclude each other")
    check_arguments(parser, args)
    return args


# -- input --------------------------------------------------------------------------------------------------------


def unescape(text: str) -> str:
    r"""Expand \n and \t, as mlx_lm does."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def utf8(name: str, data: bytes) -> str:
    """Return bytes as text."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not valid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}") from None


def read_prompt(argument: str | None) -> str:
    """Return the prompt: the argument, or all of stdin for '-'."""
    if argument == "-":
        prompt = utf8("standard input", sys.stdin.buffer.read())
    else:
        prompt = unescape(utf8("--prompt", os.fsencode(DEFAULT_PROMPT if argument is None else argument)))
    if not prompt.strip():
        raise ValueError("the prompt is empty, expected some text")
    return prompt


def read_text(path: str) -> str:
    """Return the text of a file, or of stdin for '-'. Line ends stay as they are."""
    if path == "-":
        return utf8("standard input", sys.stdin.buffer.read())
    try:
        return utf8(f"--edit {path}", Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"--edit {path}: {error.strerror}") from None


def read_tools(path: str) -> list[dict[str, Any]]:
    """Return the tools of a JSON file: a list of objects."""
    try:
        tools = json.loads(utf8(f"--tools {path}", read_file("--tools", path)))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"--tools {path} is not JSON: {error}") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"--tools {path}: got {json.dumps(tools)[:60]}, expected a list of tool objects")
    return tools


def read_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `Pipeline.stream`, checked as far as that goes without a checkpoint."""
    options = {name: getattr(args, name) for name in LOOP_OPTIONS}
    options["stop"] = [unescape(text) for text in args.stop] if args.stop else None
    options["extra_eos_tokens"] = args.extra_eos_token
    options["guard_empty"] = args.guard_empty
    check_options(options)
    options |= read_grammar(args)
    template = dict(args.chat_template_config or {})
    from_template = template.pop("enable_thinking", None)
    options["enable_thinking"] = from_template if args.enable_thinking is None else args.enable_thinking
    options["template_kwargs"] = template or None
    options["tools"] = read_tools(args.tools) if args.tools else None
    options["prefill_response"] = args.prefill_response
    options["raw_prompt"] = args.ignore_chat_template
    return options | read_media_options(args)


def read_grammar(args: argparse.Namespace) -> dict[str, Any]:
    """Return the option that names the grammar of the answer, checked before a large model is loaded; {} for none."""
    if args.json_schema is not None:
        schema = read_json("--json-schema", args.json_schema)
        if schema == {}:
            options: dict[str, Any] = {"response_format": {"type": "json_object"}}
        else:
            named = {"name": "answer", "schema": schema}
            options = {"response_format": {"type": "json_schema", "json_schema": named}}
    elif args.lark is not None:
        options = {"lark": utf8(f"--lark {args.lark}", read_file("--lark", args.lark))}
    else:
        options = {name: getattr(args, name) for name in ("regex", "choices") if getattr(args, name) is not None}
    if options:
        from .prepare import grammar_of

        grammar_of(options)
    return options


def read_json(flag: str, given: str) -> Any:
    """Return a JSON value that is given itself, or as the name of a file that has it."""
    inline = given.lstrip().startswith(("{", "["))
    text = given if inline else utf8(f"{flag} {given}", read_file(flag, given))
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{flag} {given[:60]} is not JSON: {error}") from None


def read_file(flag: str, path: str) -> bytes:
    """Return the bytes of a file that a flag names."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {path}: {getattr(error, 'strerror', error)}") from None


def read_media_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return images, videos and how they are read, checked before a large model is loaded."""
    given = {name: getattr(args, name) for name in SIGHT_OPTIONS}
    options = {**given, "images": args.image, "videos": args.video}
    if args.image or args.video:
        from .images import read_image
        from .media import Sight
        from .sources import is_stream
        from .video import iter_video, read_video

        sight = Sight(**{name: value for name, value in given.items() if value is not None})
        limits: dict[str, Any] = {"fps": sight.fps, "max_frames": sight.video_frames}
        images: list[Any] = []
        videos: list[Any] = []
        # A chat shows them at every turn, so they are read once; one answer keeps only what cannot be read again.
        for path in args.image or ():
            image = read_image(path)
            images.append(image if args.chat or is_stream(path) else path)
        for path in args.video or ():
            if args.chat or is_stream(path):
                videos.append(read_video(path, **limits))
            else:
                next(iter_video(path, **limits))
                videos.append(path)
        options |= {"images": images or None, "videos": videos or None}
    return options


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for impossible values now rather than after a large model has been loaded.

    The loop checks again, with the checkpoint's defaults; here the reference's stand in for them.
    """
    from .config import GenerationConfig
    from .options import resolve_options

    one_end = (options["t_min"] is None) != (options["t_max"] is None)  # only the checkpoint knows the other
    given = {name: value for name, value in options.items() if not (one_end and name in ("t_min", "t_max"))}
    resolve_options(GenerationConfig.from_dict({}), given)


def first_messages(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what a conversation begins with."""
    return [] if args.system_prompt is None else [{"role": "system", "content": args.system_prompt}]


# -- running ----------------------------------------------------------------------------------------------------------


def generate_once(args: argparse.Namespace, pipeline: Pipeline, prompt: str, options: dict[str, Any]) -> int:
    """Answer one prompt; return the exit code."""
    from .answer import Interrupts, footer, load_line, play, start
    from .display import is_terminal, open_screen

    messages = prompt if args.ignore_chat_template else [*first_messages(args), {"role": "user", "content": prompt}]
    framed = args.verbose and not args.json
    if framed and pipeline.load_report is not None and is_terminal(sys.stderr):
        print(load_line(args.model, pipeline.load_report), file=sys.stderr)
    with Interrupts() as interrupts:
        with bad_input():
            events = start(pipeline, messages, interrupts, options)
        if framed:
            print(RULE, flush=True)
        screen = open_screen(None if args.json else sys.stdout, live=args.show_denoising)
        result = play(pipeline, events, screen, interrupts, verbose=args.verbose)
    if args.json:
        load = {} if pipeline.load_report is None else {"load": pipeline.load_report.to_dict()}
        print(json_line({"model": args.model, **load, **result.to_dict()}))
    if framed:
        print(RULE)
        stopped = interrupts.ended_by is not None
        print(footer(result.stats) if result.token_ids or stopped else "No text generated for this prompt")
    return 0 if interrupts.ended_by is None else 128 + interrupts.ended_by


def load_pipeline(args: argparse.Namespace, team: Team | None, *, remembers: bool) -> Pipeline:
    """Load the model. One that remembers nothing by default is for one answer, which has no later prompt."""
    from .pipeline import load

    load = load if team is None else team.load
    memory = {} if args.prompt_cache_bytes is None else {"prefix_bytes": args.prompt_cache_bytes}
    return load(
        args.model,
        prefix_folder=args.prompt_cache_dir,
        **{name: getattr(args, name) for name in LOAD_OPTIONS},
        **({} if remembers else {"prefix_bytes": 0}) | memory,
    )


def fill_or_edit(args: argparse.Namespace, team: Team | None) -> int:
    """Fill a hole or edit a text; return the exit code."""
    with bad_input():
        options = read_options(args)
        prompt = None if args.prompt is None else read_prompt(args.prompt)
        text = None if args.edit is None else read_text(args.edit)
        check_values(args, text)
        pipeline = load_pipeline(args, team, remembers=True)
        messages = None if prompt is None else [*first_messages(args), {"role": "user", "content": prompt}]
        return fill(args, pipeline, options, messages, prompt, text)


def run(args: argparse.Namespace, team: Team | None = None) -> int:
    """Do what the arguments ask, with a model that a team of ranks shares or that is all here; return the exit code."""
    if wants_holes(args):
        return fill_or_edit(args, team)
    with bad_input():
        options = read_options(args)
        prompt = "" if args.chat and args.prompt is None else read_prompt(args.prompt)
        pipeline = load_pipeline(args, team, remembers=args.chat)
    if not args.chat:
        return generate_once(args, pipeline, prompt, options)
    from .chat import chat

    return chat(pipeline, args.model, first_messages(args), options, prompt, live=args.show_denoising)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return on_ranks(lambda team: run_command_line(lambda: parse(argv), partial(run, team=team), "the answer"))


if __name__ == "__main__":
    sys.exit(main())
