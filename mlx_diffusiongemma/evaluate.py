"""Command line: measure a checkpoint, alone or against another one.

    python -m mlx_diffusiongemma.evaluate --model ./26b-4bit --reference google/diffusiongemma-26B-A4B-it
    python -m mlx_diffusiongemma.evaluate --model ./tiny-4bit --reference tiny --tasks held_out.jsonl --limit 100

With a reference: the error of every part's weights, how alike both models read the same canvases, and denoising steps
and right answers of both. Without: steps and right answers. Both models are in memory together. What is measured is in
`quality.py`, the format of a task file in `tasks.py`; they are imported after the arguments have been read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli import DTYPES, Parser, bad_input, count, json_line, markdown_table, positive, run_command_line

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .quality import Accuracy, Agreement, PartError, Statistics, WeightError
    from .tasks import Task

DEFAULT_SEED = 0
DEFAULT_TRAJECTORIES = 4


# -- arguments ----------------------------------------------------------------------------------------------------


def setup_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = Parser(
        prog="mlx_diffusiongemma.evaluate",
        description="Measure a checkpoint: weights and canvases against a reference, denoising steps, right answers.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="CANDIDATE", help="'tiny', a folder or a Hub id")
    parser.add_argument("--reference", metavar="OTHER", help="the checkpoint to compare with; both are in memory")
    parser.add_argument("--tasks", metavar="FILE.jsonl", help="one task per line (default: built-in prompts)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N tasks")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of the first task (default: %(default)s)")
    parser.add_argument("--max-tokens", "-m", type=positive, metavar="N", help="tokens per answer at most")
    parser.add_argument(
        "--trajectories",
        type=positive,
        default=DEFAULT_TRAJECTORIES,
        metavar="N",
        help="tasks on whose canvases both models are compared (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="to compute in (default: the checkpoint's; float32 on a CPU, where quantised kernels round more)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with every number")
    return parser


def read_input(args: argparse.Namespace) -> list[Task]:
    """Return the tasks, checked as far as that goes without a checkpoint."""
    from .config import GenerationConfig
    from .options import resolve_options
    from .tasks import PROMPTS, make_task, read_tasks

    resolve_options(GenerationConfig.from_dict({}), {"seed": args.seed, "max_tokens": args.max_tokens})
    tasks = [make_task(values) for values in PROMPTS] if args.tasks is None else read_tasks(Path(args.tasks))
    return tasks[: args.limit]


# -- running ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Everything that needs both models."""

    weights: list[WeightError]
    agreement: Agreement


def load_models(args: argparse.Namespace, tasks: Sequence[Task]) -> dict[str, Pipeline]:
    """Return what is measured by name, the reference first, checked before hours of work.

    Raises:
        ValueError: a checkpoint that cannot be loaded, two that cannot be compared, or a prompt that one cannot take.
    """
    import mlx.core as mx

    from .pipeline import load
    from .quality import check_comparable

    names = {"reference": args.reference, "candidate": args.model}
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    dtype = args.dtype or ("float32" if on_cpu else None)
    pipelines = {  # with nothing remembered: what is measured depends on no earlier prompt
        role: load(name, dtype=dtype, prefix_bytes=0) for role, name in names.items() if name is not None
    }
    if "reference" in pipelines:
        check_comparable(pipelines["reference"].config, pipelines["candidate"].config)
    for role, pipeline in pipelines.items():
        for number, task in enumerate(tasks, 1):
            try:  # this checks and starts nothing
                pipeline.stream(task.messages, max_tokens=args.max_tokens, **task.prompt_options)
            except ValueError as error:
                raise ValueError(f"task {number} does not suit the {role}: {error}") from None
    return pipelines


def compare_models(pipelines: dict[str, Pipeline], tasks: Sequence[Task], args: argparse.Namespace) -> Comparison:
    """Compare weights, and both readings of the reference's canvases on some tasks."""
    from .quality import compare, weight_errors
    from .trajectories import record_trajectories

    reference, candidate = pipelines["reference"], pipelines["candidate"]
    with bad_input():  # two architectures
        weights = list(weight_errors(reference.model, candidate.model))
    trajectories = record_trajectories(
        reference, tasks, args.seed, max_tokens=args.max_tokens, progress=count("recording canvases")
    )
    agreement = compare(reference.model, candidate.model, trajectories, progress=count("comparing canvases"))
    return Comparison(weights, agreement)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments ask; return the exit code."""
    with bad_input():
        tasks = read_input(args)
        pipelines = load_models(args, tasks)
    from .quality import generation_statistics

    shown = tasks[: args.trajectories]
    comparison = compare_models(pipelines, shown, args) if "reference" in pipelines else None
    statistics = {
        role: generation_statistics(
            pipeline, tasks, args.seed, max_tokens=args.max_tokens, progress=count(f"answers of the {role}")
        )
        for role, pipeline in pipelines.items()
    }
    if args.json:
        print(json_line(report(args, len(tasks), comparison, statistics)))
    else:
        print("\n".join(tables(args, len(tasks), len(shown), comparison, statistics)))
    return 0


# -- output -------------------------------------------------------------------------------------------------------


def report(
    args: argparse.Namespace, tasks: int, comparison: Comparison | None, statistics: dict[str, Statistics]
) -> dict[str, Any]:
    """Return every number as JSON-ready values; what needs a reference is None without one."""
    from .quality import by_part

    weights, agreement = None, None
    if comparison is not None:
        weights = {
            "parts": [part.to_dict() for part in by_part(comparison.weights)],
            "modules": [error.to_dict() for error in comparison.weights],
        }
        agreement = comparison.agreement.to_dict()
    return {
        "model": args.model,
        "reference": args.reference,
        "tasks": tasks,
        "seed": args.seed,
        "weights": weights,
        "agreement": agreement,
        "generation": {role: each.to_dict() for role, each in statistics.items()},
    }


def tables(
    args: argparse.Namespace,
    tasks: int,
    compared: int,
    comparison: Comparison | None,
    statistics: dict[str, Statistics],
) -> list[str]:
    """Return the lines to read."""
    from .quality import by_part

    lines = [f"candidate: {args.model}"]
    if args.reference is not None:
        lines.append(f"reference: {args.reference}")
    lines.append(f"tasks: {tasks} from {args.tasks or 'the built-in prompts'}, seed {args.seed}")
    if comparison is not None:
        lines += ["", *weights_table(by_part(comparison.weights))]
        lines += ["", *agreement_table(comparison.agreement, compared)]
    return [*lines, "", *generation_table(statistics)]


def weights_table(parts: Sequence[PartError]) -> list[str]:
    """Return the errors of the weights, part by part."""
    if not parts:
        return ["weights: the candidate has no quantised module"]
    rows = [
        [p.part, str(p.modules), "; ".join(p.settings), f"{p.relative_error:.2e}", f"{p.worst_error:.2e}"]
        for p in parts
    ]
    return markdown_table(["weights", "modules", "quantised as", "relative RMS error", "of the worst module"], rows)


def agreement_table(agreement: Agreement, tasks: int) -> list[str]:
    """Return how alike both models read the same canvases."""
    rows = [
        ["mean KL(reference, candidate), nats", f"{agreement.mean_kl:.3e}"],
        ["max KL(reference, candidate), nats", f"{agreement.max_kl:.3e}"],
        ["same argmax", f"{agreement.argmax_agreement:.2%}"],
        ["same decision to accept", f"{agreement.accepted_agreement:.2%}"],
        ["mean entropy difference, nats", f"{agreement.mean_entropy_difference:.3e}"],
    ]
    size = f"{tasks} tasks, {agreement.canvases} canvases, {agreement.steps} steps, {agreement.positions} positions"
    return markdown_table([f"the reference's canvases ({size})", "candidate"], rows)


def generation_table(statistics: dict[str, Statistics]) -> list[str]:
    """Return steps and right answers, one column per model."""
    columns = list(statistics.values())
    rows = [
        ["canvases", *(str(s.canvases) for s in columns)],
        ["steps per canvas, mean", *(f"{s.mean_steps:.2f}" for s in columns)],
        ["steps per canvas, median", *(f"{s.median_steps:g}" for s in columns)],
        ["steps per canvas, 90th percentile", *(f"{s.p90_steps:g}" for s in columns)],
        ["tokens per forward", *(f"{s.tokens_per_forward:.2f}" for s in columns)],
        ["exact match, overall", *(exact_match(s.accuracy) for s in columns)],
    ]
    for family in columns[0].families:
        rows.append([f"exact match, {family}", *(exact_match(s.families[family]) for s in columns)])
    return markdown_table(["generation", *statistics], rows)


def exact_match(accuracy: Accuracy | None) -> str:
    """Return a share with its count; a dash where no task has an expected answer."""
    return "-" if accuracy is None else f"{accuracy.exact_match:.1%} ({accuracy.right} of {accuracy.tasks})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run_command_line(lambda: setup_parser().parse_args(argv), run, "the report")


if __name__ == "__main__":
    sys.exit(main())
