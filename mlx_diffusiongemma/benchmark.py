"""Command line: measure a checkpoint. Where does the time go, how many steps does it take, what could the chip do?

    python -m mlx_diffusiongemma.benchmark --model tiny
    python -m mlx_diffusiongemma.benchmark --model ./26b-4bit --prompts prompts.txt --roofline --report report.html
    python -m mlx_diffusiongemma.benchmark --roofline all --dry-run

Whole requests are timed one after the other; then some are answered once more, off the clock, to look inside their
steps. What is measured is in `measure.py`, `probe.py` and `peer.py`, what is predicted in `roofline.py`; they are
imported after the arguments have been read.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli import (
    DTYPES,
    LOAD_OPTIONS,
    SAMPLER_OPTIONS,
    Parser,
    add_diffusion_options,
    add_loading_options,
    add_sampling_options,
    bad_input,
    count,
    json_line,
    positive,
    run_command_line,
)

if TYPE_CHECKING:
    from .benchmark_report import Bench
    from .chips import Chip
    from .counting import Bits
    from .peer import Peer
    from .pipeline import Pipeline
    from .tasks import Task
    from .workload import Run

HERE = "this machine"
ALL = "all"
DEFAULT_RECIPE = "4bit"
DEFAULT_PROBES = 3
FLOAT = "bfloat16"
STANDARD_OUTPUT = "-"


# -- arguments ----------------------------------------------------------------------------------------------------


def setup_parser() -> argparse.ArgumentParser:
    """Return the parser. Flags that mlx_lm.benchmark has too have its names."""
    parser = Parser(
        prog="mlx_diffusiongemma.benchmark",
        description="Measure a checkpoint: phases, steps per canvas (K), experts, achieved FLOP/s, memory.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="'tiny', a folder or a Hub id")
    add_loading_options(group)
    group.add_argument("--dtype", choices=DTYPES, help="to compute in (default: the checkpoint's)")

    group = parser.add_argument_group("requests")
    kinds = group.add_mutually_exclusive_group()
    kinds.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt, JSON message list or task per line (default: the checkpoint's, else twelve ordinary ones)",
    )
    kinds.add_argument("--prompt-tokens", "-p", type=positive, metavar="N", help="a prompt of N random tokens")
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N prompts")
    group.add_argument(
        "--max-tokens", "--generation-tokens", "-g", type=positive, metavar="N", help="tokens per answer at most"
    )
    group.add_argument(
        "--num-trials",
        "--seeds",
        "-n",
        type=positive,
        default=1,
        metavar="N",
        help="ask every prompt with N seeds (default: %(default)s)",
    )
    group.add_argument("--seed", type=int, default=0, help="the first seed (default: %(default)s)")
    add_sampling_options(parser.add_argument_group("sampling"))
    add_diffusion_options(parser.add_argument_group("diffusion"))

    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--probe",
        type=int,
        default=DEFAULT_PROBES,
        metavar="N",
        help="requests answered once more to look inside their steps (default: %(default)s)",
    )
    group.add_argument("--compare", choices=["mlx-vlm"], help="run this one too, on the same weights, in turns")
    group.add_argument(
        "--roofline",
        nargs="?",
        const=HERE,
        metavar="CHIP",
        help="what this chip could do at most, or one such as 'M3 Max'; with --dry-run also 'all'",
    )

    group = parser.add_argument_group("predictions alone")
    group.add_argument(
        "--dry-run", action="store_true", help="print what --roofline predicts, for --model or for 26B, and run nothing"
    )
    group.add_argument("--context", type=positive, metavar="N", help="tokens in front of the canvas (default: 1024)")
    group.add_argument(
        "--recipe", metavar="NAME", help=f"recipe of the weights, or {FLOAT} (default: {DEFAULT_RECIPE})"
    )
    group.add_argument(
        "--distinct-experts", type=float, metavar="N", help="used per layer (default: as uniform routing)"
    )
    group.add_argument(
        "--row-share", type=float, metavar="S", help="rows that a step computes, of the canvas's (0 to 1)"
    )

    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", help=f"every number as JSON; {STANDARD_OUTPUT} for standard output")
    group.add_argument("--report", metavar="FILE.html", help="a page with tables and plots (needs matplotlib)")
    return parser


PREDICTION_OPTIONS = ("context", "recipe", "distinct_experts", "row_share")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments; exit with 2 when they do not go together."""
    parser = setup_parser()
    args = parser.parse_args(argv)
    if args.dry_run:
        for name in ("prompts", "prompt_tokens", "compare", "report", "json"):
            if getattr(args, name) is not None:
                parser.error(f"--dry-run runs nothing, so it excludes --{name.replace('_', '-')}")
        return args
    if args.model is None:
        parser.error("--model is missing, expected 'tiny', a folder or a Hub id")
    for name in PREDICTION_OPTIONS:
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} needs --dry-run: what runs is measured")
    if args.probe < 0:
        parser.error(f"--probe: got {args.probe}, expected an integer of at least 0")
    return args


def check_outputs(args: argparse.Namespace) -> None:
    """Raise `ValueError` for what could not be written or run at the end of hours of work."""
    from .peer import HOW_TO_INSTALL, PEER, peer_version
    from .plots import HOW_TO_INSTALL as HOW_TO_PLOT
    from .plots import is_available

    if args.compare is not None and peer_version() is None:
        raise ValueError(f"--compare {PEER} needs {PEER}: {HOW_TO_INSTALL}")
    if args.report is not None and not is_available():
        raise ValueError(f"--report needs matplotlib: {HOW_TO_PLOT}")
    for flag, name in (("--json", args.json), ("--report", args.report)):
        if name not in (None, STANDARD_OUTPUT) and not Path(name).absolute().parent.is_dir():
            raise ValueError(f"{flag} {name}: the folder does not exist")


# -- predictions --------------------------------------------------------------------------------------------------


def predict_alone(args: argparse.Namespace) -> int:
    """Print predictions; nothing runs."""
    from .benchmark_tables import chip_line, prediction_table, work_table
    from .chips import CHIPS, find_chip
    from .counting import Pass, step_work
    from .roofline import CONTEXT, SCENARIOS

    with bad_input():
        name = args.roofline or ALL
        chips = CHIPS if name == ALL else [_chip_here() if name == HERE else find_chip(name)]
        bits, recipe = _recipe_bits(args.recipe or DEFAULT_RECIPE)
        text, canvas_length, model = _sizes(args.model, args.revision)
        share = _between("row-share", args.row_share, 1.0, 1.0)
        distinct = args.distinct_experts
        if distinct is not None:
            _between("distinct-experts", distinct, text.num_experts, text.num_experts)
    context = args.context or CONTEXT
    rows = max(1, round(share * canvas_length))
    print(f"{model}, {recipe}, context {context}, {rows} of {canvas_length} rows per step")
    print("predictions, not measurements: every part takes its arithmetic or its memory traffic, whichever is longer")
    print("\n" + "\n".join(work_table(step_work(text, Pass(rows, context, bits, distinct)))))
    for scenario in SCENARIOS:
        table = prediction_table(text, canvas_length, chips, scenario, bits, context, share, distinct)
        print("\n".join(["", f"{scenario.name}: {scenario.meaning}", *table]))
    print("\n" + "\n".join(chip_line(chip.to_dict()) for chip in chips))
    return 0


def _between(name: str, value: float | None, largest: float, default: float) -> float:
    if value is not None and not 0 < value <= largest:
        raise ValueError(f"{name}: got {value:g}, expected a number above 0 and at most {largest:g}")
    return default if value is None else value


def _chip_here() -> Chip:
    import mlx.core as mx

    from .chips import this_chip

    return this_chip(mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16)


def _recipe_bits(name: str) -> tuple[Bits, str]:
    from .counting import recipe_bits
    from .recipes import RECIPES, find_recipe

    if name == FLOAT:
        return recipe_bits(None), FLOAT
    if name not in RECIPES:
        raise ValueError(f"recipe: got {name!r}, expected {FLOAT} or one of {', '.join(RECIPES)}")
    return recipe_bits(find_recipe(name).recipe), f"recipe {name}"


def _sizes(model: str | None, revision: str | None) -> tuple[Any, int, str]:
    """Return text config, canvas length and a name: of a checkpoint, whose weights are not read, or of 26B."""
    from .roofline import CANVAS_26B, TEXT_26B

    if model is None:
        return TEXT_26B, CANVAS_26B, "DiffusionGemma 26B-A4B"
    from .checkpoint import find_folder
    from .config import load_configs

    config, _ = load_configs(find_folder(model, revision, weights=False))
    return config.text, config.canvas_length, model


# -- measuring ----------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Do what the arguments ask; return the exit code."""
    if args.dry_run:
        return predict_alone(args)
    with bad_input():
        check_outputs(args)
        bench = open_bench(args)
    from .benchmark_report import make_report
    from .benchmark_tables import report_lines

    report = make_report(bench, args.probe, count)
    lines = report_lines(report)
    if args.report is not None:
        from .plots import html_page

        Path(args.report).write_text(html_page(report, lines), encoding="utf-8")
    if args.json == STANDARD_OUTPUT:
        print(json_line(report))
        return 0
    if args.json is not None:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


def open_bench(args: argparse.Namespace) -> Bench:
    """Load what is measured and check every request, before hours of work.

    Raises:
        ValueError: a chip, prompts or a checkpoint that cannot be used, or a request that does not fit.
    """
    from .benchmark_report import Bench
    from .chips import find_chip, this_chip
    from .pipeline import load
    from .prepare import request_sizes

    chip = find_chip(args.roofline) if args.roofline not in (None, HERE) else None
    tasks = _read_tasks(args)
    started = time.perf_counter()
    pipeline = load(
        args.model,
        dtype=args.dtype,
        **{name: getattr(args, name) for name in LOAD_OPTIONS},
        prefix_bytes=0,  # nothing is remembered: what is measured depends on no earlier prompt
    )
    load_seconds = time.perf_counter() - started
    runs, prompts = _read_runs(args, pipeline, tasks)
    for each in runs:
        pipeline.memory.check(*request_sizes([each.prepared]))
    if args.roofline == HERE:
        chip = this_chip(pipeline.model.dtype)
    return Bench(args.model, pipeline, load_seconds, prompts, runs, chip, _peer(args, pipeline))


def _read_tasks(args: argparse.Namespace) -> list[Task] | None:
    """Return the prompts of a file; None where the checkpoint's are wanted, or random ones."""
    from .workload import read_prompts

    return None if args.prompts is None else read_prompts(Path(args.prompts))


def _read_runs(args: argparse.Namespace, pipeline: Pipeline, tasks: list[Task] | None) -> tuple[list[Run], str]:
    """Return the requests, and what they are called."""
    from .checkpoint import find_folder
    from .workload import own_prompts, runs_of_random_tokens, runs_of_tasks

    options = {name: getattr(args, name) for name in (*SAMPLER_OPTIONS, "max_tokens")}
    seeds = range(args.seed, args.seed + args.num_trials)
    if args.prompt_tokens is not None:
        runs = runs_of_random_tokens(pipeline, args.prompt_tokens, seeds, options)
        return runs, f"{args.prompt_tokens} random tokens"
    name = args.prompts
    if tasks is None:
        tasks, name = own_prompts(find_folder(args.model, args.revision))
    return runs_of_tasks(pipeline, tasks[: args.limit], seeds, options), name


def _peer(args: argparse.Namespace, pipeline: Pipeline) -> Peer | None:
    if args.compare is None:
        return None
    from .checkpoint import find_folder
    from .peer import Peer

    return Peer(find_folder(args.model, args.revision), pipeline)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run_command_line(lambda: parse(argv), run, "the report")


if __name__ == "__main__":
    sys.exit(main())
