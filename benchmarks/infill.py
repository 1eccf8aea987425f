"""How often a hole is filled with exactly what stood there, with and without its length given.

    python benchmarks/infill.py --model tiny --cases 120

The texts are held-out ones of `tools/tiny`: answers to a question, texts that are asked to be completed, and raw texts.
One to four words, numbers or signs are cut out. A given length is that of the tokens that stood there, the space before
a word among them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from mlx_diffusiongemma import load
from mlx_diffusiongemma.holes import split_spaces
from mlx_diffusiongemma.infill import infill

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "tiny"))
from data import held_out_starts


def main(argv: list[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--cases", type=int, default=120, help="texts; every fourth is an edit and left out")
    parser.add_argument("--seed", type=int, default=1, help="of texts, holes and answers")
    parser.add_argument("--wrong", action="store_true", help="print what was filled wrongly")
    args = parser.parse_args(argv)
    pipeline = load(args.model)
    asked, given, found = Counter[str](), Counter[str](), Counter[str]()
    began, steps = time.perf_counter(), 0
    for example in held_out_starts(args.seed, args.cases):
        if example.hole is None:
            continue
        start, stop = example.hole
        before, hole, after = (
            (example.lead or "") + example.answer[:start],
            example.answer[start:stop],
            example.answer[stop:],
        )
        tokens = len(pipeline.tokenizer.encode_letters(split_spaces(pipeline.tokenizer, before)[1] + hole))
        options = {"messages": example.messages or None, "seed": args.seed}
        known = infill(pipeline, before, after, length=tokens, **options)
        free = infill(pipeline, before, after, **options)
        asked[example.family] += 1
        given[example.family] += known.text == hole
        found[example.family] += free.text == hole
        steps += free.canvas_steps
        if args.wrong and (known.text, free.text) != (hole, hole):
            print(f"{example.family}: {before!r} [{hole}] {after!r}: {known.text!r} and {free.text!r}", flush=True)
    print("| family | holes | length given | length found |\n|---|---:|---:|---:|")
    for name, count in sorted(asked.items()):
        print(f"| {name} | {count} | {given[name]} | {found[name]} |")
    total = asked.total()
    print(f"| all | {total} | {given.total() / total:.1%} | {found.total() / total:.1%} |")
    print(f"{steps / total:.0f} denoising steps per hole without a length, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
