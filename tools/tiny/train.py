"""Train `tiny` on a CPU and write the checkpoint folder.

One command makes the published weights: `python tools/tiny/train.py --output <folder>`. A run that was interrupted
goes on with `--resume` and ends with the same weights: examples and noise depend on the seed and the step only.
"""

import argparse
import copy
import time
from pathlib import Path
from random import Random

import torch
from architecture import build_config, build_generation_config
from data import TUNING_ROUNDS, WEIGHTS, training_batch
from objective import canvas_loss, collate, pick_canvas
from optimizer import WeightAverage, build_optimizers, learning_rate_factor
from tokenizer import build_tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion

TUNING_RATE = 0.3  # learning rate at the start of each of the last rounds, relative to the peak
AVERAGE, TUNING_AVERAGE = 0.998, 0.99  # decay of the moving average of the weights; the last rounds are short
BATCH_SIZE, SHORT_ROWS = 32, 24  # a step's rows, and how many of them, the shortest, go first


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> DiffusionGemmaForBlockDiffusion:
    """Make the reference model with seeded random weights."""
    torch.manual_seed(seed)
    model = DiffusionGemmaForBlockDiffusion(build_config(tokenizer))
    model.generation_config = build_generation_config(tokenizer)
    model.set_experts_implementation("eager")
    return model


def export(model: DiffusionGemmaForBlockDiffusion, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the checkpoint in bfloat16, as `save_pretrained` does, with tokenizer and chat template."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_step(
    model: DiffusionGemmaForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    optimizers: list[torch.optim.Optimizer],
    seed: int,
    step: int,
    tuning: int | None,
) -> float:
    """Take one step; `tuning` is the round, of the last ones. Returns the mean loss per weighted token."""
    rng = Random(f"canvas/{seed}/{step}")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    mixture = WEIGHTS if tuning is None else TUNING_ROUNDS[tuning]
    rows = [pick_canvas(tokenizer, example, rng) for example in training_batch(seed, step, BATCH_SIZE, mixture)]
    rows.sort(key=lambda row: len(row[0]))
    parts = rows[:SHORT_ROWS], rows[SHORT_ROWS:]
    batches = [collate(part, tokenizer.pad_token_id, calibrated=tuning is not None) for part in parts]
    total = sum(float(batch.weight.sum()) for batch in batches)
    mean = 0.0
    for index, batch in enumerate(batches):  # every second batch is self-conditioned
        loss = canvas_loss(model, batch, (step + index) % 2 == 0, generator) / total
        loss.backward()
        mean += loss.item()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return mean


def save_state(
    path: Path,
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    average: WeightAverage,
    step: int,
) -> None:
    """Write all that a resumed run needs, in one piece."""
    state = {
        "step": step,
        "model": dict(model.named_parameters()),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "average": average.weights,
    }
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_state(
    path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], average: WeightAverage
) -> int:
    """Restore what `save_state` wrote. Returns the next step."""
    state = torch.load(path)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(state["model"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    average.weights = state["average"]
    return state["step"]


def tuning_round(step: int, lengths: list[int]) -> tuple[int, float]:
    """Return the round of a step of the last rounds, and its learning rate relative to the peak; it falls to zero."""
    for index, length in enumerate(lengths):
        if step < length:
            return index, TUNING_RATE * (length - step) / length
        step -= length
    raise ValueError(f"step: {step} steps after the last one")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; the defaults are those of the published weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--work", type=Path, help="folder of the resumable state (default: OUTPUT.work)")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8500, help="before the last rounds")
    parser.add_argument("--tuning", type=int, nargs=3, default=[2500, 800, 700], help="steps of the last rounds")
    parser.add_argument("--decay", type=int, default=5500, help="steps of the fall of the learning rate before those")
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--lr", type=float, default=3e-3, help="AdamW's learning rate")
    parser.add_argument("--muon-lr", type=float, default=6e-3, help="Muon's learning rate, 0 for AdamW everywhere")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=250)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train from the command line."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    tokenizer = build_tokenizer(args.seed)
    model = build_model(tokenizer, args.seed)
    optimizers = build_optimizers(model, args.lr, args.muon_lr)
    average = WeightAverage(model)
    work = args.work or args.output.with_name(args.output.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    first = load_state(work / "state.pt", model, optimizers, average) if args.resume else 0
    last = args.steps + sum(args.tuning)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, steps {first} to {last}", flush=True)
    started, losses = time.monotonic(), []
    for step in range(first, last):
        tuning, factor = None, learning_rate_factor(step, args.steps, args.warmup, args.decay)
        if step >= args.steps:
            tuning, factor = tuning_round(step - args.steps, args.tuning)
        for optimizer, peak in zip(optimizers, (args.lr, args.muon_lr), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        losses.append(train_step(model, tokenizer, optimizers, args.seed, step, tuning))
        average.decay = AVERAGE if tuning is None else TUNING_AVERAGE
        average.update(model, step)
        if (step + 1) % 25 == 0:
            pace = (time.monotonic() - started) / (step + 1 - first)
            print(f"step {step + 1} loss {sum(losses) / len(losses):.4f} {pace:.3f} s/step", flush=True)
            losses = []
        if (step + 1) % args.save_every == 0:
            save_state(work / "state.pt", model, optimizers, average, step + 1)
    average.copy_to(model)
    export(model, tokenizer, args.output)
    print(f"wrote {args.output} after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
