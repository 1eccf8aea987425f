"""Write `tiny`'s prompts as a task file: held-out ones to evaluate with, trained ones to calibrate with.

    python tools/tiny/tasks.py --prompts 500 --seed 1 --output held_out.jsonl
    python -m mlx_diffusiongemma.evaluate --model tiny --tasks held_out.jsonl

    python tools/tiny/tasks.py --trained --prompts 256 --seed 7 --without held_out.jsonl --output calibration.jsonl
    python -m mlx_diffusiongemma.convert --model tiny --recipe auto --target-bpw 4.6 --calibration calibration.jsonl

What is expected is what `mlx_diffusiongemma/output.py` reports for the only right answer: text without control tokens,
the thought without its header and outer newlines, and tool calls as names and arguments. Needs Python and Pillow.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from data import TRAINED_ONLY, WEIGHTS, Example, held_out_examples, training_batch

THOUGHT = re.compile(r"<\|channel>thought\n(.*?)<channel\|>", re.DOTALL)
CALL = re.compile(r"<\|tool_call>call:(\w+)\{(.*?)\}<tool_call\|>", re.DOTALL)
ARGUMENT = re.compile(r'(\w+):(?:<\|"\|>(.*?)<\|"\|>|([^,{}\[\]<>]+))(?:,|$)', re.DOTALL)
CONTROL_TOKEN = re.compile(r"<\||\|>")


def read_arguments(text: str) -> dict[str, Any]:
    """Read the inside of a call's braces: bare keys, strings between quote tokens, JSON otherwise."""
    arguments: dict[str, Any] = {}
    end = 0
    for match in ARGUMENT.finditer(text):
        if match.start() != end:
            break
        key, string, value = match.groups()
        arguments[key] = json.loads(value) if string is None else string
        end = match.end()
    if end != len(text):
        raise ValueError(f"arguments: got {text!r}, expected pairs like key:value")
    return arguments


def task(example: Example) -> dict[str, Any]:
    """Turn an example into an object of the task file. Raise `ValueError` on an answer that cannot be read."""
    thoughts = [thought.strip("\n") for thought in THOUGHT.findall(example.answer)]
    rest = THOUGHT.sub("", example.answer)
    calls = [{"name": name, "arguments": read_arguments(inner)} for name, inner in CALL.findall(rest)]
    text = CALL.sub("", rest)
    if CONTROL_TOKEN.search(text):
        raise ValueError(f"answer of {example.family}: {example.answer!r} has markup that this script does not know")
    values: dict[str, Any] = {"messages": example.messages, "family": example.family, "expected": text}
    if example.tools:
        values["tools"] = example.tools
    if example.thinking:
        values["enable_thinking"] = True
    values["expected_reasoning"] = "\n".join(thoughts)
    values["expected_tool_calls"] = calls
    return values


def without(lines: list[str], path: Path) -> list[str]:
    """Leave out the lines whose messages a task file has too: small talk is not split, and some text is in both."""
    known = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if json.loads(line)["messages"] not in known]


def main(argv: list[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Write tiny's prompts as a task file.")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1, help="of the prompts (default: %(default)s)")
    parser.add_argument("--trained", action="store_true", help="prompts of the training side, to calibrate with")
    parser.add_argument("--without", type=Path, metavar="FILE.jsonl", help="leave out prompts that are in this file")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    args = parser.parse_args(argv)
    examples = held_out_examples(args.seed, args.prompts)
    if args.trained:
        examples = iter(
            training_batch(args.seed, 0, args.prompts, dict.fromkeys(sorted(WEIGHTS.keys() - TRAINED_ONLY), 1.0))
        )
    lines = [json.dumps(task(example), ensure_ascii=False) for example in examples]
    if args.without is not None:
        lines = without(lines, args.without)
    args.output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
