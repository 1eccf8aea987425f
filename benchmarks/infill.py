"""How often a hole in a right answer is filled rightly: a word or a number, with and without its length given.

    python benchmarks/infill.py --model tiny --cases 60

The questions are held-out ones of `tools/tiny`, one line per family. A hole is right when its text is exactly what
stood there; a given length is that of the tokens that stood there, the space before a word among them.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

from mlx_diffusiongemma import load
from mlx_diffusiongemma.holes import split_spaces
from mlx_diffusiongemma.infill import infill

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "tiny"))
from data import held_out_examples

WORD = re.compile(r"\d+|[A-Za-z]+")


def main(argv: list[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--cases", type=int, default=60, help="questions; those with tools or thoughts are left out")
    parser.add_argument("--seed", type=int, default=1, help="of questions, holes and answers")
    parser.add_argument("--wrong", action="store_true", help="print what was filled wrongly")
    args = parser.parse_args(argv)
    pipeline = load(args.model)
    rng = Random(args.seed)
    asked, given, found = Counter[str](), Counter[str](), Counter[str]()
    began, steps = time.perf_counter(), 0
    for example in held_out_examples(args.seed, args.cases):
        words = list(WORD.finditer(example.answer))
        if example.tools or example.thinking or not words:
            continue
        hole = rng.choice(words)
        before, after = example.answer[: hole.start()], example.answer[hole.end() :]
        tokens = len(pipeline.tokenizer.encode_letters(split_spaces(pipeline.tokenizer, before)[1] + hole[0]))
        options = {"messages": example.messages, "seed": args.seed}
        known = infill(pipeline, before, after, length=tokens, **options)
        free = infill(pipeline, before, after, **options)
        asked[example.family] += 1
        given[example.family] += known.text == hole[0]
        found[example.family] += free.text == hole[0]
        steps += free.canvas_steps
        if args.wrong and (known.text, free.text) != (hole[0], hole[0]):
            print(f"{example.family}: {before!r} [{hole[0]}] {after!r}: {known.text!r} and {free.text!r}", flush=True)
    print("| family | holes | length given | length found |\n|---|---:|---:|---:|")
    for name, count in sorted(asked.items()):
        print(f"| {name} | {count} | {given[name]} | {found[name]} |")
    total = asked.total()
    print(f"| all | {total} | {given.total() / total:.1%} | {found.total() / total:.1%} |")
    print(f"{steps / total:.0f} denoising steps per hole without a length, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
