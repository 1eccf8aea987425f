"""Command line: turn a checkpoint into one that fits a Mac. Flag names are those of `mlx_lm.convert`.

    python -m mlx_diffusiongemma.convert --hf-path google/diffusiongemma-26B-A4B-it --mlx-path my-4bit -q

Standard output carries the plan and what was written, standard error the errors and the progress bar. Exit codes as in
`cli.py`. The work is in `conversion.py`, which is imported after the arguments have been read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli import Parser, bad_input, count, run_command_line

if TYPE_CHECKING:
    from .conversion import Plan, Progress, Request

DEFAULT_RECIPE = "4bit"
AUTO = "auto"
EXAMPLE = "google/diffusiongemma-26B-A4B-it"
DTYPES = ("float16", "bfloat16", "float32")


# -- arguments ----------------------------------------------------------------------------------------------------


def setup_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="mlx_diffusiongemma.convert",
        description="Convert and quantise a checkpoint. Without -q, --recipe or --dequantize it is copied or cast.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("folders")
    group.add_argument("--hf-path", "--model", help=f"a folder, a Hub id such as {EXAMPLE}, or 'tiny'")
    group.add_argument("--revision", help="branch, tag or commit of a Hub id")
    group.add_argument("--mlx-path", type=Path, default=Path("mlx_model"), help="folder to make (default: %(default)s)")
    group.add_argument("--upload-repo", metavar="OWNER/NAME", help="upload the folder to this Hub repository")

    group = parser.add_argument_group("precision")
    group.add_argument("-q", "--quantize", action="store_true", help=f"quantise (the recipe {DEFAULT_RECIPE})")
    group.add_argument(
        "--recipe", metavar="NAME", help="4bit, 8bit, mxfp4, nvfp4, mxfp8, uniform-N or auto; implies -q"
    )
    group.add_argument("--target-bpw", type=float, metavar="X", help="bits per weight that the recipe auto may spend")
    group.add_argument("--calibration", metavar="FILE.jsonl", help="tasks that auto measures on (default: built in)")
    group.add_argument("--seed", type=int, default=0, help="of auto's first task (default: %(default)s)")
    group.add_argument("--q-bits", type=int, metavar="N", help="bits of the experts; the sensitive parts keep 8")
    group.add_argument("--q-group-size", type=int, metavar="N", help="weights that share a scale")
    group.add_argument("--q-mode", metavar="MODE", help="affine, mxfp4, nvfp4 or mxfp8")
    group.add_argument("--dequantize", "-d", action="store_true", help="undo the quantisation of the source")
    group.add_argument("--dtype", choices=DTYPES, help="of what is not quantised (default: the source's)")

    group = parser.add_argument_group("output")
    group.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    group.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments; exit with 2 when they do not go together."""
    parser = setup_parser()
    args = parser.parse_args(argv)
    flags = [name for name in ("q_bits", "q_group_size", "q_mode") if getattr(args, name) is not None]
    if args.hf_path is None:
        parser.error(f"--hf-path is missing, expected a folder or a Hub id such as {EXAMPLE}")
    if flags and args.recipe:
        parser.error(f"--recipe and --{flags[0].replace('_', '-')} exclude each other")
    if flags and not args.quantize:
        parser.error(f"--{flags[0].replace('_', '-')} needs -q")
    if args.dequantize and (args.quantize or args.recipe):
        parser.error("--dequantize and -q or --recipe exclude each other")
    if (args.recipe == AUTO) != (args.target_bpw is not None):
        parser.error("--recipe auto and --target-bpw go together")
    if args.calibration and args.recipe != AUTO:
        parser.error("--calibration needs --recipe auto")
    if args.dry_run and args.upload_repo:
        parser.error("--dry-run and --upload-repo exclude each other")
    return args


def build_request(args: argparse.Namespace, folder: Path) -> tuple[Request, str]:
    """Return what is asked of the conversion, and the name of the recipe; for auto this measures the model."""
    import mlx.core as mx

    from .conversion import Request
    from .recipes import BITS, GROUP_SIZES, Quantization, find_recipe, mixed

    dtype = getattr(mx, args.dtype) if args.dtype else None
    if args.dequantize or not (args.quantize or args.recipe):
        return Request(dequantize=args.dequantize, dtype=dtype), "dequantized" if args.dequantize else "copy"
    if args.recipe == AUTO:
        return measured_request(args, folder, Request(dtype=dtype)), f"{AUTO}, {args.target_bpw} bits per weight"
    mode = args.q_mode or "affine"
    if args.recipe or (args.q_bits, args.q_group_size, args.q_mode) == (None, None, None):
        name = args.recipe or DEFAULT_RECIPE
        recipe, default = find_recipe(name)
    else:
        usual = (64, 4) if mode == "affine" or mode not in BITS else (GROUP_SIZES[mode][0], BITS[mode][0])
        group_size = usual[0] if args.q_group_size is None else args.q_group_size
        default = Quantization(group_size, usual[1] if args.q_bits is None else args.q_bits, mode)
        recipe, name = mixed(default), f"{mode}, {default.bits} bits, group {group_size}"
    return Request(recipe, default, dtype=dtype), name


def measured_request(args: argparse.Namespace, folder: Path, plain: Request) -> Request:
    """Measure the sensitivity of every module and spend the budget; see `sensitivity.py`."""
    from .conversion import make_plan
    from .pipeline import load
    from .recipes import fixed
    from .sensitivity import PROBE, allocate, measure
    from .tasks import PROMPTS, make_task, read_tasks

    tasks = read_tasks(Path(args.calibration)) if args.calibration else [make_task(values) for values in PROMPTS]
    plan = make_plan(folder, plain)
    found = measure(load(folder), tasks, args.seed, progress=count("measuring modules"))
    sizes = {name: spec.nbytes for job in plan.jobs for name, spec in job.outputs.items()}
    fixed_bits = 8 * (plan.nbytes - sum(sizes[f"{each.path}.weight"] for each in found))
    modules = allocate(found, fixed_bits, plan.parameters, args.target_bpw)
    notes = {
        "calibration_tasks": len(tasks),
        "sensitivity": {each.path: {"kl": each.kl, "steps_change": each.steps_change} for each in found},
    }
    return replace(plain, recipe=fixed(modules), default=PROBE, notes=notes)


# -- output -------------------------------------------------------------------------------------------------------


def to_dict(plan: Plan) -> dict[str, Any]:
    """Return a plan's numbers, JSON-ready."""
    return {
        "parts": {
            name: {"parameters": part.parameters, "bytes": part.nbytes, "bits_per_weight": part.bits_per_weight}
            for name, part in plan.parts.items()
        },
        "parameters": plan.parameters,
        "bytes": plan.nbytes,
        "bits_per_weight": plan.bits_per_weight,
        "files": list(plan.shards),
        "estimated_memory_to_run": plan.run_bytes,
        "left_unquantized": list(plan.left_unquantized),
        "dropped": list(plan.dropped),
    }


def size(nbytes: int) -> str:
    """Return a number of bytes for people: 16.54 GB."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes / 1000:.1f} kB"


def table(plan: Plan) -> str:
    """Return a plan as a Markdown table."""
    lines = ["| part | parameters | bits per weight | size |", "|---|---:|---:|---:|"]
    for name, part in sorted(plan.parts.items(), key=lambda item: -item[1].nbytes):
        lines.append(f"| {name} | {part.parameters:,} | {part.bits_per_weight:.3f} | {size(part.nbytes)} |")
    lines.append(f"| all | {plan.parameters:,} | {plan.bits_per_weight:.3f} | {size(plan.nbytes)} |")
    return "\n".join(lines)


def report(plan: Plan, args: argparse.Namespace) -> None:
    """Print the plan."""
    if args.json:
        print(json.dumps(to_dict(plan)))
        return
    print(table(plan))
    print(f"Files: {len(plan.shards)}. Memory to run, with a prompt of 8,192 tokens: about {size(plan.run_bytes)}.")
    if plan.dropped:
        print(f"Dropped on purpose: {len(plan.dropped)} tensors, such as {plan.dropped[0]}.")
    for path in plan.left_unquantized:
        print(f"Not quantised, no group size divides its rows: {path}")


def model_card(plan: Plan, args: argparse.Namespace, recipe: str, revision: str | None) -> str:
    """Return the README.md of the output."""
    from . import __version__

    source = f"`{args.hf_path}`" + (f" (revision `{revision}`)" if revision else "")
    base = [f"base_model: {args.hf_path}"] if args.hf_path.count("/") == 1 and not Path(args.hf_path).exists() else []
    front = ["---", "library_name: mlx", "pipeline_tag: text-generation", *base, "tags:", "- mlx", "---"]
    name = args.mlx_path.name
    text = f"""
# {name}

Converted from {source} by mlx_diffusiongemma {__version__}, recipe `{recipe}`: {plan.bits_per_weight:.3f} bits per
weight, {size(plan.nbytes)}. A run needs about {size(plan.run_bytes)} of memory.

{table(plan)}

```
python -m mlx_diffusiongemma.generate --model {args.upload_repo or args.mlx_path} --prompt "Hello"
```
"""
    return "\n".join(front) + "\n" + text


@contextmanager
def progress_bar(plan: Plan) -> Iterator[Progress]:
    """Show bytes and time left on standard error when it is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty())
    with bar:
        task = bar.add_task("", total=plan.source_bytes)
        yield lambda what, nbytes: bar.update(task, advance=nbytes, description=what[-60:])


# -- running ------------------------------------------------------------------------------------------------------


def source_revision(folder: Path) -> str | None:
    """Return the commit of a folder in the Hub's cache (.../snapshots/COMMIT), None elsewhere."""
    return folder.name if folder.parent.name == "snapshots" else None


def upload(folder: Path, repo_id: str) -> None:
    """Upload a folder to the Hub. Raise `ValueError` when that fails."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"{folder} is finished, but the upload to {repo_id} failed: {error}") from None


def run(args: argparse.Namespace) -> int:
    """Do what the arguments ask; return the exit code."""
    with bad_input():
        from . import __version__
        from .checkpoint import find_folder
        from .conversion import check_target, make_plan, write_checkpoint

        folder = find_folder(args.hf_path, args.revision)
        if not args.dry_run:
            check_target(folder, args.mlx_path)
        request, name = build_request(args, folder)
        revision = source_revision(folder)
        notes = {"version": __version__, "recipe": name, "source": args.hf_path, "source_revision": revision}
        plan = make_plan(folder, replace(request, notes={**notes, **(request.notes or {})}))
    report(plan, args)
    if args.dry_run:
        return 0
    with bad_input():
        with progress_bar(plan) as on_progress:
            leftover = write_checkpoint(plan, args.mlx_path, model_card(plan, args, name, revision), on_progress)
        if leftover:
            print("note: the remains of an interrupted conversion were removed", file=sys.stderr)
        if args.upload_repo:
            upload(args.mlx_path, args.upload_repo)
    if not args.json:
        print(f"Wrote {args.mlx_path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run_command_line(lambda: parse(argv), run, "the plan")


if __name__ == "__main__":
    sys.exit(main())
