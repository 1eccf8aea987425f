"""What every rule of a policy gains and costs, alone and together, on a file of tasks.

    python tools/tiny/tasks.py --prompts 200 --seed 1 --output held_out.jsonl
    python benchmarks/policies.py --tasks held_out.jsonl --seeds 3

Row-steps are the rows of the canvas summed over all steps: the work of the decoder. They and the time are given as a
share of those of `exact`. Right are exactly right answers; their difference to `exact`, in points, is paired (the same
tasks and seeds), with a 95 % bootstrap interval over tasks. Repeated tokens equal the one before.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median

from mlx_diffusiongemma import load
from mlx_diffusiongemma.measure import repeated
from mlx_diffusiongemma.pipeline import Pipeline
from mlx_diffusiongemma.policies import EXACT, POLICIES, Policy
from mlx_diffusiongemma.tasks import Task, read_tasks

ALONE = {
    "argmax proposals": replace(EXACT, name="greedy", greedy=True),
    "end 0.9: rows behind the end dropped": replace(EXACT, name="end", end_confidence=0.9),
    "plateau of 3 steps": replace(EXACT, name="plateau", plateau_steps=3),
    "rows 0.95": replace(EXACT, name="rows95", row_confidence=0.95),
    "rows 0.9": replace(EXACT, name="rows90", row_confidence=0.9),
    "rows 0.8": replace(EXACT, name="rows80", row_confidence=0.8),
    "keep 0.9": replace(EXACT, name="keep90", keep_confidence=0.9),
    "keep 0.8": replace(EXACT, name="keep80", keep_confidence=0.8),
    "exit 0.9": replace(EXACT, name="exit", exit_confidence=0.9),
    "frozen 0.9": replace(EXACT, name="freeze90", freeze_confidence=0.9),
    "frozen 0.9, all rows every second step": replace(EXACT, name="refresh", freeze_confidence=0.9, refresh_steps=2),
    "canvases that grow by halves": replace(EXACT, name="grow", first_share=0.25, next_share=0.5, growth=0.5),
    "first canvas a half": replace(EXACT, name="half", first_share=0.5),
    "first canvas a quarter": replace(EXACT, name="quarter", first_share=0.25),
}


@dataclass
class Measured:
    """What one policy did."""

    right: list[float]  # per task, mean over seeds
    answers: int
    canvases: int
    steps: list[int]  # of every canvas
    row_steps: int
    seconds: float
    empty: int  # answers without text, thought or call
    repeated: int  # tokens equal to the one before, of all answers

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return mean(self.right)


def measure(pipeline: Pipeline, tasks: Sequence[Task], policy: Policy, seeds: int) -> Measured:
    """Answer every task once per seed, one at a time."""
    started = time.perf_counter()
    measured = Measured([], 0, 0, [], 0, 0.0, 0, 0)
    for number, task in enumerate(tasks):
        judged = []
        for seed in range(seeds):
            result = pipeline.generate(
                task.messages, seed=1000 * seed + number, policy=policy, guard_empty=True, **task.prompt_options
            )
            judged.append(bool(task.is_right(result)))
            measured.answers += 1
            measured.canvases += result.stats.canvases
            measured.steps += result.stats.denoising_steps
            measured.row_steps += result.stats.row_steps
            measured.empty += not (result.text or result.reasoning or result.tool_calls)
            measured.repeated += repeated(result.token_ids)
        measured.right.append(mean(judged))
    measured.seconds = time.perf_counter() - started
    return measured


def interval(differences: Sequence[float], rounds: int = 2000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a mean over tasks."""
    rng = random.Random(0)
    means = sorted(mean(rng.choices(differences, k=len(differences))) for _ in range(rounds))
    return means[int(0.025 * rounds)], means[int(0.975 * rounds) - 1]


def line(name: str, policy: Measured, exact: Measured) -> str:
    """Return a row of the table."""
    differences = [a - b for a, b in zip(policy.right, exact.right, strict=True)]
    low, high = interval(differences)
    p90 = sorted(policy.steps)[int(0.9 * (len(policy.steps) - 1))]
    cells = (
        name,
        f"{100 * policy.accuracy:.1f} %",
        f"{100 * mean(differences):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
        f"{mean(policy.steps):.2f} / {median(policy.steps):.0f} / {p90}",
        f"{policy.canvases / policy.answers:.2f}",
        f"{policy.row_steps / exact.row_steps:.3f}",
        f"{policy.seconds / exact.seconds:.2f}",
        str(policy.empty),
        str(policy.repeated),
    )
    return f"| {' | '.join(cells)} |"


COLUMNS = ("policy", "right", "points", "K mean / median / p90", "canvases", "row-steps", "time", "empty", "repeated")
HEADER = f"| {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * (len(COLUMNS) - 1)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tasks", type=Path, required=True, help="a file of tasks, see `mlx_diffusiongemma.tasks`")
    parser.add_argument("--limit", type=int, help="only the first N tasks")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--policies", nargs="*", help="names of policies, or of rules alone (default: all)")
    parser.add_argument("--custom", nargs="*", default=[], metavar="JSON", help="fields of further policies")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    args = parser.parse_args(argv)
    pipeline = load(args.model)
    tasks = [task for task in read_tasks(args.tasks) if task.expected is not None][: args.limit]
    chosen = ALONE | {name: policy for name, policy in POLICIES.items() if policy != EXACT}
    if args.policies is not None:
        chosen = {
            name: policy for name, policy in chosen.items() if name in args.policies or policy.name in args.policies
        }
    chosen |= {text: Policy(**json.loads(text)) for text in args.custom}
    exact = measure(pipeline, tasks, EXACT, args.seeds)
    print(f"{len(tasks)} tasks, {args.seeds} seeds, exact: {exact.seconds:.0f} s, {exact.row_steps} row-steps")
    print(HEADER)
    print(line("exact", exact, exact), flush=True)
    numbers = {"exact": asdict(exact)}
    for name, policy in chosen.items():
        measured = measure(pipeline, tasks, policy, args.seeds)
        numbers[name] = asdict(measured)
        print(line(name, measured, exact), flush=True)
    if args.json:
        args.json.write_text(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    sys.exit(main())
