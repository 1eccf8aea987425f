"""Command line: turn a checkpoint into one that fits a Mac. Flag names are those of `mlx_lm.convert`.

    python -m mlx_diffusiongemma.convert --hf-path google/diffusiongemma-26B-A4B-it --mlx-path my-4bit -q

Standard output carries the plan and what was written, standard error the errors and the progress bar. Exit codes as in
`cli.py`. The work is in `plan.py` and `conversion.py`, which are imported after the arguments have been read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from .cli import DTYPES, Parser, WorkFailed, bad_input, count, json_line, markdown_table, run_command_line

if TYPE_CHECKING:
    from .conversion import Progress as OnProgress
    from .plan import ConversionRequest, Plan
    from .tasks import Task

DEFAULT_RECIPE = "4bit"
AUTO = "auto"
MOST_SENSITIVE = 10  # modules that a model card names
EXAMPLE = "google/diffusiongemma-26B-A4B-it"


# -- arguments ----------------------------------------------------------------------------------------------------


def folder_path(text: str) -> Path:
    """Read a path as a shell would."""
    return Path(text).expanduser()


def recipe_list() -> str:
    """Return the recipes with their reasons, a line each."""
    from .recipes import RECIPES

    lines = [f"  {name:<10} {recipe.why}" for name, recipe in RECIPES.items()]
    why = "bits where measurements say they matter, errors made good, scales tuned"
    return "\n".join(["recipes:", *lines, f"  {AUTO:<10} {why}"])


def setup_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="mlx_diffusiongemma.convert",
        description="Convert and quantise a checkpoint. Without -q, --recipe or -d a float one is copied or cast.",
        epilog=recipe_list(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("folders")
    group.add_argument("--hf-path", "--model", help=f"a folder, a Hub id such as {EXAMPLE}, or 'tiny'")
    group.add_argument("--revision", help="branch, tag or commit of a Hub id")
    group.add_argument(
        "--mlx-path", type=folder_path, default="mlx_model", help="folder to make (default: %(default)s)"
    )
    group.add_argument("--upload-repo", metavar="OWNER/NAME", help="upload the folder to this Hub repository")

    group = parser.add_argument_group("precision")
    group.add_argument("-q", "--quantize", action="store_true", help=f"quantise (the recipe {DEFAULT_RECIPE})")
    group.add_argument("--recipe", metavar="NAME", help="one of those below; implies -q")
    group.add_argument("--target-bpw", type=float, metavar="X", help="bits per weight that the recipe auto may spend")
    group.add_argument(
        "--calibration", type=folder_path, metavar="FILE.jsonl", help="tasks that auto measures on (default: a dozen)"
    )
    group.add_argument("--seed", type=int, help="of the first task that auto measures on (default: 0)")
    group.add_argument(
        "--tuning-updates", type=int, metavar="N", help="of auto's scales, by distillation (default: 60; 0 for none)"
    )
    group.add_argument("--q-bits", type=int, metavar="N", help="bits of what is not sensitive; that keeps 8")
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
    for name in ("calibration", "seed", "tuning_updates"):
        if getattr(args, name) is not None and args.recipe != AUTO:
            parser.error(f"--{name.replace('_', '-')} needs --recipe auto")
    if args.tuning_updates is not None and args.tuning_updates < 0:
        parser.error(f"--tuning-updates: got {args.tuning_updates}, expected 0 or more")
    if args.dry_run and args.recipe == AUTO:
        parser.error("--dry-run and --recipe auto exclude each other: auto has to measure the model")
    args.seed = args.seed or 0
    if args.dry_run and args.upload_repo:
        parser.error("--dry-run and --upload-repo exclude each other")
    return args


@dataclass(frozen=True)
class Wish:
    """What is asked of the conversion, as far as that is known before the source is."""

    request: ConversionRequest  # without a recipe for auto, which has to measure the source first
    recipe: str
    tasks: list[Task] | None = None  # what auto measures on


def read_wish(args: argparse.Namespace) -> Wish:
    """Check recipe, settings and calibration file: a mistake should not show after hours of downloading."""
    import mlx.core as mx

    from .plan import ConversionRequest
    from .recipes import BITS, GROUP_SIZES, Quantization, find_recipe, mixed
    from .tasks import PROMPTS, make_task, read_tasks

    dtype = getattr(mx, args.dtype) if args.dtype else None
    if args.dequantize or not (args.quantize or args.recipe):
        name = "dequantized" if args.dequantize else "copy"
        return Wish(ConversionRequest(dequantize=args.dequantize, dtype=dtype), name)
    if args.recipe == AUTO:
        tasks = [make_task(values) for values in PROMPTS] if args.calibration is None else read_tasks(args.calibration)
        return Wish(ConversionRequest(dtype=dtype), f"{AUTO}, {args.target_bpw} bits per weight", tasks)
    if args.recipe or (args.q_bits, args.q_group_size, args.q_mode) == (None, None, None):
        name = args.recipe or DEFAULT_RECIPE
        known = find_recipe(name)
        return Wish(ConversionRequest(known.recipe, known.default, dtype=dtype), name)
    mode = args.q_mode or "affine"
    usual = (64, 4) if mode == "affine" or mode not in BITS else (GROUP_SIZES[mode][0], BITS[mode][0])
    group_size = usual[0] if args.q_group_size is None else args.q_group_size
    default = Quantization(group_size, usual[1] if args.q_bits is None else args.q_bits, mode)
    return Wish(ConversionRequest(mixed(default), default, dtype=dtype), f"mixed, {default}")


def measured_request(args: argparse.Namespace, wish: Wish, folder: Path) -> ConversionRequest:
    """Measure the checkpoint and spend the budget; see `auto.py`."""
    from .auto import UPDATES, automatic_request
    from .pipeline import load

    tasks = wish.tasks or []
    updates = UPDATES if args.tuning_updates is None else args.tuning_updates
    request = automatic_request(
        load(folder, prefix_bytes=0),
        folder,
        wish.request,
        tasks,
        target=args.target_bpw,
        seed=args.seed,
        updates=updates,
        progress=count,
    )
    calibration = {"tasks": len(tasks), "file": args.calibration and args.calibration.name, "seed": args.seed}
    return replace(request, notes={"calibration": calibration, **(request.notes or {})})


# -- output -------------------------------------------------------------------------------------------------------


def to_dict(plan: Plan) -> dict[str, Any]:
    """Return a plan's numbers, JSON-ready."""
    return {
        "parts": {
            name: {
                "parameters": part.parameters,
                "bytes": part.nbytes,
                "bits_per_weight": part.bits_per_weight,
                "stored_as": sorted(part.stored_as),
            }
            for name, part in plan.parts.items()
        },
        "parameters": plan.parameters,
        "bytes": plan.nbytes,
        "bits_per_weight": plan.bits_per_weight,
        "files": list(plan.shards),
        "estimated_memory_to_run": plan.run_bytes,
        "smaller_groups": plan.smaller_groups,
        "left_unquantized": list(plan.left_unquantized),
        "dropped": [dropped._asdict() for dropped in plan.dropped],
    }


def size(nbytes: int) -> str:
    """Return a number of bytes for people: 16.54 GB."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes / 1000:.1f} kB"


def table(plan: Plan) -> list[str]:
    """Return a plan as the lines of a Markdown table."""
    rows = [
        [
            name,
            f"{part.parameters:,}",
            "; ".join(sorted(part.stored_as)),
            f"{part.bits_per_weight:.3f}",
            size(part.nbytes),
        ]
        for name, part in sorted(plan.parts.items(), key=lambda item: -item[1].nbytes)
    ]
    rows.append(["all", f"{plan.parameters:,}", "", f"{plan.bits_per_weight:.3f}", size(plan.nbytes)])
    return markdown_table(["part", "parameters", "stored as", "bits per weight", "size"], rows)


def report(plan: Plan, args: argparse.Namespace) -> None:
    """Print the plan."""
    if args.json:
        print(json_line(to_dict(plan)))
        return
    print("\n".join(table(plan)))
    print(f"Files: {len(plan.shards)}. Memory to run, with a prompt of 8,192 tokens: at least {size(plan.run_bytes)}.")
    for name, reason in plan.dropped:
        print(f"Dropped, {reason}: {name}")
    for path, group_size in plan.smaller_groups.items():
        print(f"Group {group_size}, a larger one does not divide its rows: {path}")
    for path in plan.left_unquantized:
        print(f"Not quantised, no group size divides its rows: {path}")


def measurements(notes: Mapping[str, Any]) -> list[str]:
    """Return what auto measured, as the paragraphs of a model card."""
    if "sensitivity" not in notes:
        return []
    costs = sorted(((each["kl"], path) for path, each in notes["sensitivity"].items()), reverse=True)
    rows = [[f"`{path}`", f"{kl:.1e}"] for kl, path in costs[:MOST_SENSITIVE]]
    lines = [
        f"Measured on {notes['calibration']['tasks']} tasks. The modules that cost most when they alone have 4 bits:",
        "",
    ]
    lines += markdown_table(["module", "KL of the canvas logits, nats per position"], rows)
    if "distillation" in notes:
        tuning = notes["distillation"]
        change = f"from {tuning['kl_before']:.1e} to {tuning['kl_after']:.1e} nats per position"
        lines += ["", f"{tuning['updates']} updates of the scales brought the KL on canvases kept back {change}."]
    return lines


def model_card(plan: Plan, args: argparse.Namespace, source: Origin, recipe: str) -> str:
    """Return the README.md of the output; what the source's says of its licence stays."""
    from huggingface_hub import ModelCard, ModelCardData

    from . import __version__
    from .plan import NOTES_KEY

    readme = plan.source / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    has_metadata = text.startswith("---")  # without them the library warns
    old = ModelCard(text, ignore_metadata_errors=True).data.to_dict() if has_metadata else {}
    kept = ("license", "license_name", "license_link", "language")
    details: dict[str, Any] = {key: old[key] for key in kept if key in old}
    if source.is_hub:
        details["base_model"] = source.name
    data = ModelCardData(library_name="mlx", pipeline_tag="text-generation", tags=["mlx"], **details)
    revision = f" (revision `{source.revision}`)" if source.revision else ""
    text = f"""
# {args.mlx_path.name}

Converted from `{source.name}`{revision} by mlx_diffusiongemma {__version__}, recipe `{recipe}`:
{plan.bits_per_weight:.3f} bits per weight, {size(plan.nbytes)}. A run needs at least {size(plan.run_bytes)} of memory.

"""
    usage = f"""

```
python -m mlx_diffusiongemma.generate --model {args.upload_repo or args.mlx_path.name} --prompt "Hello"
```
"""
    measured = "\n".join(["", "", *measurements(plan.config[NOTES_KEY])])
    return f"---\n{data.to_yaml()}\n---\n" + text + "\n".join(table(plan)) + measured.rstrip() + usage


@contextmanager
def progress_bar(plan: Plan) -> Iterator[OnProgress]:
    """Show bytes and time left on standard error when it is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty())
    with bar:
        task = bar.add_task("", total=plan.source_bytes)
        yield lambda what, nbytes: bar.update(task, advance=nbytes, description=what[-60:])


# -- running ------------------------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """Where the weights come from, as it may be published: no path of this machine."""

    name: str  # the Hub id, or the folder's own name
    is_hub: bool
    revision: str | None  # the commit, of a Hub id


def find_origin(model: str, folder: Path) -> Origin:
    """Return the origin of the folder that `checkpoint.find_folder` gave for `model`."""
    is_hub = model != "tiny" and not folder_path(model).is_dir()
    return Origin(model if is_hub else folder.name, is_hub, folder.name if is_hub else None)


def plan_without_weights(model: str, revision: str | None, folder: Path, request: ConversionRequest) -> Plan:
    """Plan from the headers on the Hub."""
    from .checkpoint import hub_tensors
    from .plan import make_plan
    from .shards import StoredTensor, tensor_spec

    found = hub_tensors(model, revision)
    stored = [
        StoredTensor(name, tensor_spec(dtype, shape), folder / file, 0) for name, (file, dtype, shape) in found.items()
    ]
    return make_plan(folder, request, stored=stored)


def upload(folder: Path, repo_id: str) -> None:
    """Upload a folder to the Hub. Raise `WorkFailed` when that fails."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    no_connection = cast(type[Exception], HfHubHTTPError.__bases__[0])  # the base class of its HTTP library's errors
    api = HfApi()
    try:
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder)
    except (no_connection, OSError, ValueError) as error:
        raise WorkFailed(f"{folder} is finished, but the upload to {repo_id} failed: {error}") from None


def make(plan: Plan, args: argparse.Namespace, card: str) -> None:
    """Write the folder."""
    from .conversion import remove_leftover, write_checkpoint
    from .plan import ConversionError

    try:
        if remove_leftover(args.mlx_path):
            print("note: the remains of an interrupted conversion were removed", file=sys.stderr)
        with progress_bar(plan) as on_progress:
            write_checkpoint(plan, args.mlx_path, card, on_progress)
    except ConversionError as error:
        raise WorkFailed(str(error)) from None


def run(args: argparse.Namespace) -> int:
    """Do what the arguments ask; return the exit code."""
    with bad_input():
        wish = read_wish(args)
        from . import __version__
        from .checkpoint import find_folder
        from .conversion import check_target
        from .plan import make_plan

        if not args.dry_run:
            check_target(folder_path(args.hf_path), args.mlx_path)
        folder = find_folder(args.hf_path, args.revision, weights=not args.dry_run)
        origin = find_origin(args.hf_path, folder)
        request = wish.request if wish.tasks is None else measured_request(args, wish, folder)
        source = {"source": origin.name, "source_revision": origin.revision}
        notes = {"version": __version__, "recipe": wish.recipe, **source, **(request.notes or {})}
        request = replace(request, notes=notes)
        if args.dry_run and origin.is_hub:
            plan = plan_without_weights(args.hf_path, args.revision, folder, request)
        else:
            plan = make_plan(folder, request)
    report(plan, args)
    if args.dry_run:
        return 0
    make(plan, args, model_card(plan, args, origin, wish.recipe))
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
