"""Train `tiny` on a CPU and write the checkpoint folder.

One command makes the published weights: `python tools/tiny/train.py --output <folder>`. A run that was interrupted
goes on with `--resume` and ends with the same weights: examples and noise depend on the seed and the step only.

First text alone. Then the vision tower is taught alone, and from there on a part of every batch is about pictures.
"""

import argparse
import copy
import time
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from random import Random

import torch
from architecture import SOFT_TOKENS, build_config, build_generation_config, build_vision_config
from data import (
    LAST_PICTURES,
    LAST_STARTS,
    LATE_PICTURES,
    LATER_PICTURES,
    PICTURE_WEIGHTS,
    SIGHT_TEXTS,
    START_WEIGHTS,
    TUNING_ROUNDS,
    VIDEO_WEIGHTS,
    WEIGHTS,
    Example,
    training_batch,
)
from first_looks import aim_projector, teach_tower
from objective import Canvases, Row, canvas_loss, collate, pick_canvas
from optimizer import WeightAverage, build_optimizers, is_tower, learning_rate_factor
from tokenizer import build_tokenizer
from tower import build_image_processor, give_tower
from transformers import PreTrainedTokenizerBase
from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion

AVERAGE, TUNING_AVERAGE = 0.998, 0.99  # decay of the moving average of the weights; the last rounds are short
MEAN_ROUNDS = 3  # the published weights are the mean of what these last rounds end with


@dataclass(frozen=True)
class Batch:
    """How many rows a step has.

    Text, how many of all without pictures, the shortest, go first, pictures, videos, and canvases that begin with more
    than noise.
    """

    text: int
    short: int
    pictures: int = 0
    videos: int = 0
    starts: int = 0


@dataclass(frozen=True)
class Round:
    """A part of the training after the long one on text: what it trains on, and the learning rate at both ends."""

    mixture: dict[str, float]
    pictures: dict[str, float]
    batch: Batch
    rates: tuple[float, float]  # relative to the peak
    starts: dict[str, float] = field(default_factory=lambda: START_WEIGHTS)


TEXT_BATCH = Batch(text=32, short=24)
SIGHT_BATCH = Batch(text=8, short=6, pictures=20, videos=3)
TUNING_BATCH = Batch(text=28, short=21, pictures=7, videos=1)
LATER_BATCH = Batch(text=26, short=20, pictures=14, videos=1)
LAST_BATCH = Batch(text=32, short=24, pictures=8, videos=1)
CONTROL_BATCH = Batch(text=30, short=30, pictures=6, videos=1, starts=8)
HOLE_BATCH = Batch(text=28, short=28, pictures=5, videos=1, starts=12)
ROUNDS = (
    Round(SIGHT_TEXTS, PICTURE_WEIGHTS, SIGHT_BATCH, (1.0, 0.3)),
    Round(TUNING_ROUNDS[0], LATE_PICTURES, TUNING_BATCH, (0.3, 0.0)),
    Round(TUNING_ROUNDS[1], LATER_PICTURES, LATER_BATCH, (0.3, 0.0)),
    Round(TUNING_ROUNDS[2], LATER_PICTURES, LATER_BATCH, (0.3, 0.0)),
    Round(TUNING_ROUNDS[3], LAST_PICTURES, LAST_BATCH, (0.3, 0.0)),
    Round(TUNING_ROUNDS[4], LAST_PICTURES, CONTROL_BATCH, (0.5, 0.5)),
    Round(TUNING_ROUNDS[4], LAST_PICTURES, CONTROL_BATCH, (0.5, 0.0)),
    Round(TUNING_ROUNDS[5], LAST_PICTURES, CONTROL_BATCH, (0.4, 0.0)),
    Round(TUNING_ROUNDS[6], LAST_PICTURES, HOLE_BATCH, (0.4, 0.0), LAST_STARTS),
    Round(TUNING_ROUNDS[7], LAST_PICTURES, HOLE_BATCH, (0.3, 0.0), LAST_STARTS),
)


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> DiffusionGemmaForBlockDiffusion:
    """Make the reference model with seeded random weights."""
    torch.manual_seed(seed)
    model = DiffusionGemmaForBlockDiffusion(build_config(tokenizer))
    give_tower(model, build_vision_config(), seed)
    model.generation_config = build_generation_config(tokenizer)
    model.set_experts_implementation("eager")
    return model


class Training:
    """A model in training: its optimizers, the average of its weights, and which phase it is in."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.last_step = args.steps + sum(args.rounds)
        self.tokenizer = build_tokenizer(args.seed)
        self.model = build_model(self.tokenizer, args.seed)
        self.processor = build_image_processor(self.model.config.vision_config, SOFT_TOKENS)
        for name, param in self.model.named_parameters():
            param.requires_grad_(not is_tower(name))
        self.optimizers = build_optimizers(self.model, args.lr, args.muon_lr, tower=False)
        self.tower_optimizers: list[torch.optim.Optimizer] = []
        self.average = WeightAverage(self.model)
        self.ends: list[dict[str, torch.Tensor]] = []  # the average at the end of each of the last rounds so far

    def teach_to_look(self) -> None:
        """Train the tower alone and point its projector."""
        args, tower = self.args, self.model.model.encoder.vision_tower
        tower.requires_grad_(True)
        teach_tower(tower, self.processor, args.seed, args.looks, args.lr, args.muon_lr)
        aim_projector(self.model, self.tokenizer, self.processor, args.seed)

    def open_eyes(self) -> None:
        """Let the tower's projector train with the text model from now on."""
        encoder = self.model.model.encoder
        encoder.vision_tower.requires_grad_(False)
        encoder.embed_vision.requires_grad_(True)
        self.tower_optimizers = build_optimizers(self.model, self.args.lr, self.args.muon_lr, tower=True)
        self.average.include(self.model)

    def round_of(self, step: int) -> tuple[Round | None, float]:
        """Return which of the rounds a step is in, None before them, and the learning rate relative to the peak."""
        if step < self.args.steps:
            return None, learning_rate_factor(step, self.args.steps, self.args.warmup, self.args.decay)
        step -= self.args.steps
        for found, length in zip(ROUNDS, self.args.rounds, strict=True):
            if step < length:
                start, end = found.rates
                return found, start + (end - start) * step / length
            step -= length
        raise ValueError(f"step: {step} steps after the last one")

    def set_learning_rates(self, step: int) -> None:
        """Set the rates of a step."""
        _, factor = self.round_of(step)
        for optimizers in (self.optimizers, self.tower_optimizers):
            for optimizer, peak in zip(optimizers, (self.args.lr, self.args.muon_lr), strict=False):
                for group in optimizer.param_groups:
                    group["lr"] = peak * factor

    def batches(self, step: int) -> list[Canvases]:
        """Draw the batches of a step, each of rows of about one length."""
        current, _ = self.round_of(step)
        rng = Random(f"canvas/{self.args.seed}/{step}")
        mixture, size = (WEIGHTS, TEXT_BATCH) if current is None else (current.mixture, current.batch)
        pictures = PICTURE_WEIGHTS if current is None else current.pictures
        texts = training_batch(self.args.seed, step, size.text, mixture)
        texts += training_batch(self.args.seed, step, size.starts, START_WEIGHTS if current is None else current.starts)
        parts = self._split(texts, size.short, rng)
        for weights, count in ((pictures, size.pictures), (VIDEO_WEIGHTS, size.videos)):
            parts += self._split(training_batch(self.args.seed, step, count, weights), count, rng)
        pad_id = self.tokenizer.pad_token_id
        return [collate(rows, pad_id, current is not None, self.processor) for rows in parts if rows]

    def _split(self, examples: list[Example], short: int, rng: Random) -> list[list[Row]]:
        """Cut a canvas out of each example, and part the `short` rows with the shortest prefixes from the others."""
        rows = [pick_canvas(self.tokenizer, example, rng) for example in examples]
        rows.sort(key=lambda row: len(row.prefix))
        return [rows[:short], rows[short:]]

    def step(self, step: int) -> list[float]:
        """Take one step. Returns the summed losses of its batches, relative to the weight of all tokens."""
        if step == self.args.steps:
            self.teach_to_look()
            self.open_eyes()
        self.set_learning_rates(step)
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
        batches = self.batches(step)
        total = sum(float(batch.weight.sum()) for batch in batches)
        losses = []
        for index, batch in enumerate(batches):  # every second batch is self-conditioned
            loss = canvas_loss(self.model, batch, (step + index) % 2 == 0, generator) / total
            loss.backward()
            losses.append(loss.item())
        for optimizers in (self.optimizers, self.tower_optimizers):
            params = [p for o in optimizers for group in o.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        self.average.decay = TUNING_AVERAGE if step >= self.args.steps else AVERAGE
        self.average.update(self.model, step)
        if step + 1 in list(accumulate([self.args.steps, *self.args.rounds]))[-MEAN_ROUNDS:]:
            self.ends.append({name: weight.clone() for name, weight in self.average.weights.items()})
        return losses

    def trained(self) -> dict[str, torch.Tensor]:
        """Return what is not as the seed made it."""
        found = {name: param.detach() for name, param in self.model.named_parameters() if param.requires_grad}
        if self.tower_optimizers:
            tower = self.model.model.encoder.vision_tower
            found |= {f"vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
        return found

    def save(self, path: Path, step: int) -> None:
        """Write all that a resumed run needs, in one piece: what trains."""
        state = {
            "step": step,
            "model": self.trained(),
            "optimizers": [o.state_dict() for o in self.optimizers + self.tower_optimizers],
            "average": self.average.weights,
            "ends": self.ends,
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    @torch.no_grad()
    def load(self, path: Path) -> int:
        """Restore what `save` wrote. Returns the next step."""
        state = torch.load(path)
        if state["step"] > self.args.steps:
            self.open_eyes()
        trained = self.trained()
        if trained.keys() != state["model"].keys():
            odd = sorted(trained.keys() ^ state["model"].keys())
            raise ValueError(f"{path}: got a state of other parameters than expected: {odd[0]} and {len(odd) - 1} more")
        for name, param in trained.items():
            param.copy_(state["model"][name])
        for optimizer, saved in zip(self.optimizers + self.tower_optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average.weights, self.ends = state["average"], state["ends"]
        return state["step"]

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Write the averaged weights in bfloat16, as `save_pretrained` does, with all that belongs to them."""
        model = copy.deepcopy(self.model)
        parameters = dict(model.named_parameters())
        for name in self.average.weights:
            parameters[name].copy_(sum(end[name] for end in self.ends) / len(self.ends))
        model.to(torch.bfloat16).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; the defaults are those of the published weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--work", type=Path, help="folder of the resumable state (default: OUTPUT.work)")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8500, help="on text alone, before the rounds")
    parser.add_argument(
        "--rounds",
        type=int,
        nargs=len(ROUNDS),
        default=[900, 2500, 800, 700, 1400, 1500, 700, 2500, 1200, 800],
        help="steps of those with pictures; the last five bring JSON to schemas, holes, edits, yes and no",
    )
    parser.add_argument(
        "--decay", type=int, default=5500, help="steps of the fall of the learning rate before the rounds"
    )
    parser.add_argument("--looks", type=int, default=800, help="steps of the tower alone, before the rounds")
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
    work = args.work or args.output.with_name(args.output.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    training = Training(args)
    first = training.load(work / "state.pt") if args.resume else 0
    count = sum(param.numel() for param in training.model.parameters())
    print(f"{count:,} parameters, steps {first} to {training.last_step}", flush=True)
    started, losses = time.monotonic(), []
    for step in range(first, training.last_step):
        losses.append(sum(training.step(step)))
        if (step + 1) % 25 == 0:
            pace = (time.monotonic() - started) / (step + 1 - first)
            print(f"step {step + 1} loss {sum(losses) / len(losses):.4f} {pace:.3f} s/step", flush=True)
            losses = []
        if (step + 1) % args.save_every == 0:
            training.save(work / "state.pt", step + 1)
    training.export(args.output)
    print(f"wrote {args.output} after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
