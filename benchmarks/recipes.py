"""What every recipe costs on `tiny`: size, canvas-logit KL, agreement, denoising steps, right answers.

    python tools/tiny/tasks.py --prompts 500 --seed 1 --output held_out.jsonl
    python benchmarks/recipes.py --tasks held_out.jsonl

    python tools/tiny/tasks.py --trained --prompts 256 --seed 7 --without held_out.jsonl --output calibration.jsonl
    python benchmarks/recipes.py --tasks held_out.jsonl --calibration calibration.jsonl --recipes 4bit auto:5.87

    python benchmarks/recipes.py --tasks held_out.jsonl --pictures 200 --recipes 4bit

Prints the table of docs/quantization.md. The reference is the checkpoint in float32; its canvases on the first
tasks are recorded once and shown to every conversion, which computes in float32 too.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from mlx_diffusiongemma import convert
from mlx_diffusiongemma.evaluate import exact_match
from mlx_diffusiongemma.pipeline import Pipeline, load
from mlx_diffusiongemma.quality import Accuracy, compare, generation_statistics
from mlx_diffusiongemma.recipes import RECIPES
from mlx_diffusiongemma.tasks import read_tasks
from mlx_diffusiongemma.trajectories import record_trajectories

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "tiny"))

import data
from pictures import paint

COLUMNS = ("recipe", "bits per weight", "mean KL, nats", "same argmax", "same decision", "steps", "exact match")


def row(*cells: str) -> None:
    """Print a line of the table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def make(model: str, name: str, target: Path, calibration: Path | None) -> float:
    """Convert with a recipe, or `auto:BUDGET`. Returns bits per weight."""
    recipe, _, budget = name.partition(":")
    flags = ["--hf-path", model, "--mlx-path", str(target), "--recipe", recipe, "--json"]
    if budget:
        flags += ["--target-bpw", budget, *(["--calibration", str(calibration)] if calibration else [])]
    with redirect_stdout(StringIO()):
        if convert.main(flags):
            raise SystemExit(f"{name}: the conversion failed")
    return float(json.loads((target / "config.json").read_text())["mlx_diffusiongemma"]["bits_per_weight"])


def picture_accuracy(pipeline: Pipeline, count: int) -> Accuracy:
    """Ask so many held-out questions about pictures; an answer is right when it is exactly the expected one."""
    asked = [each for each in data.held_out_sights(1, 2 * count) if each.family.startswith("picture")][:count]
    right = 0
    for seed, example in enumerate(asked):
        images = [paint(picture) for picture in example.pictures]
        right += pipeline.generate(example.messages, seed=seed, images=images).text == example.answer
    return Accuracy(right, len(asked), right / len(asked))


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tasks", type=Path, required=True, help="a file of tasks with expected answers")
    parser.add_argument("--calibration", type=Path, help="tasks that auto measures on (default: the built-in prompts)")
    parser.add_argument("--compared", type=int, default=60, help="tasks on whose canvases the logits are compared")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), help="names; auto:4.6 is auto with that budget")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pictures", type=int, default=0, help="questions about pictures that are asked too")
    parser.add_argument("--json", type=Path, help="write every number here")
    args = parser.parse_args()
    started = time.perf_counter()
    tasks = read_tasks(args.tasks)
    reference = load(args.model, dtype="float32", prefix_bytes=0)
    trajectories = record_trajectories(reference, tasks[: args.compared], args.seed)
    own = generation_statistics(reference, tasks, args.seed)
    found: dict[str, Any] = {"reference": own.to_dict()}

    def about_pictures(pipeline: Pipeline, name: str) -> list[str]:
        if not args.pictures:
            return []
        accuracy = picture_accuracy(pipeline, args.pictures)
        found.setdefault("pictures", {})[name] = asdict(accuracy)
        return [exact_match(accuracy)]

    columns = [*COLUMNS, *(["pictures"] if args.pictures else [])]
    row(*columns)
    row("---", *["---:"] * (len(columns) - 1))
    seen = about_pictures(reference, "reference")
    row("none", "16", "0", "", "", f"{own.mean_steps:.2f}", exact_match(own.accuracy), *seen)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.recipes:
            target = Path(folder) / name.replace(":", "-")
            bits = make(args.model, name, target, args.calibration)
            candidate = load(target, dtype="float32", prefix_bytes=0)
            same = compare(reference.model, candidate.model, trajectories)
            own = generation_statistics(candidate, tasks, args.seed)
            found[name] = {"bits_per_weight": bits, "agreement": same.to_dict(), "generation": own.to_dict()}
            agreement = [f"{same.mean_kl:.1e}", f"{same.argmax_agreement:.2%}", f"{same.accepted_agreement:.2%}"]
            seen = about_pictures(candidate, name)
            row(name, f"{bits:.3f}", *agreement, f"{own.mean_steps:.2f}", exact_match(own.accuracy), *seen)
    size = f"{len(tasks)} tasks, {len(trajectories)} canvases"
    print(f"\n{size}, mlx {version('mlx')}, {platform.machine()}, {time.perf_counter() - started:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
