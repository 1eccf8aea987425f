"""Time and memory of one denoising step, ours beside mlx-vlm's, in one run on random models of three shapes.

* vocabulary: the real vocabulary (262,144) and a small body, so the step is nearly all vocabulary work: the head, the
  soft cap, entropy, argmax, the draw and the soft embeddings of the next step.
* balanced: 12 layers of width 512 with 32 experts, as much arithmetic in the body as in a vocabulary of 65,536.
* experts: 64 experts of which 8 are active, which do most of the arithmetic.

mlx-vlm is driven through its own generation loop (`stream_diffusion_generate` with the entropy-bound sampler,
temperature 1 and a full canvas); ours through `Denoiser`, with one evaluation per step as in `pipeline.py`. Prefill,
text handling and the first steps (one of ours, two of mlx-vlm's) are not counted.

mlx-vlm is a benchmark-only extra. Without it the script measures ours alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_diffusiongemma import __version__, sampler
from mlx_diffusiongemma.checkpoint import load_model
from mlx_diffusiongemma.chips import describe_machine, matmul_flops
from mlx_diffusiongemma.config import ModelConfig, load_configs
from mlx_diffusiongemma.denoise import Denoiser, StepInput, StepResult, StepRules, first_state
from mlx_diffusiongemma.model import DiffusionGemma
from mlx_diffusiongemma.peer import HOW_TO_INSTALL, PEER, PEER_VERSION, TokenSink, peer_version
from mlx_diffusiongemma.vocabulary import DrawShape

TARGET_PEAK_RATIO = 0.1
SLOW_MATMUL_GFLOPS = 25  # an optimised BLAS gives more than this on one core
PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Shape:
    """What distinguishes one random model from the others, and what its step may take of mlx-vlm's time."""

    target: float
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k_experts: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int

    def config(self) -> dict[str, Any]:
        """Return its config.json: five sliding layers, then a full one, and so on."""
        numbers = asdict(self)
        del numbers["target"]
        return {
            "model_type": "diffusion_gemma",
            "canvas_length": CANVAS,
            "eos_token_id": [1, 106],
            "image_token_id": self.vocab_size - 1,
            "boi_token_id": self.vocab_size - 2,
            "eoi_token_id": self.vocab_size - 3,
            "dtype": "float32",
            "tie_word_embeddings": True,
            "vision_config": None,
            "text_config": TEXT_CONFIG
            | numbers
            | {"layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * (self.num_hidden_layers // 6)},
        }


CANVAS = 256
SHAPES = {
    "vocabulary": Shape(0.5, 262_144, 256, 512, 128, 16, 4, 6, 4, 2),
    "balanced": Shape(0.9, 65_536, 512, 1024, 256, 32, 4, 12, 8, 4),
    "experts": Shape(0.9, 32_768, 512, 512, 512, 64, 8, 6, 8, 4),
}
TEXT_CONFIG: dict[str, Any] = {
    "model_type": "diffusion_gemma_text",
    "num_global_key_value_heads": 1,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 1024,
    "max_position_embeddings": 262_144,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
    },
}
GENERATION_CONFIG: dict[str, Any] = {
    "max_new_tokens": 256,
    "max_denoising_steps": 48,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "eos_token_id": [1, 106, 50],
    "pad_token_id": 0,
}


clock: Callable[[], float] = time.perf_counter


def now() -> float:
    """Read the clock that the command line chose."""
    return clock()


@dataclass
class Turn:
    """What one side measured in one turn."""

    seconds: list[float] = field(default_factory=list)  # one number per denoising step
    peak_bytes: int = 0  # over what was active before the turn: the weights
    first_argmax: list[int] = field(default_factory=list)  # of the first step, which both sides start from one canvas


class Side(Protocol):
    """One implementation with the model loaded."""

    def turn(self, steps: int) -> Turn:
        """Denoise a fresh canvas and measure `steps` of its steps."""


def write_checkpoint(folder: Path, shape: Shape, seed: int) -> None:
    """Write a random float32 checkpoint that both sides load: two JSON files and one safetensors file."""
    config = shape.config()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG))
    mx.random.seed(seed)
    tensors: dict[str, mx.array] = {}
    for name, parameter in tree_flatten(DiffusionGemma(ModelConfig.from_dict(config)).parameters()):
        if ".experts." in name:  # published checkpoints store the experts without the suffix
            name = name.removesuffix(".weight")
        small = 0.02 * mx.random.normal(parameter.shape)
        tensors[name] = small if parameter.ndim > 1 else mx.ones(parameter.shape)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})


def prompt_and_canvas(vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of the prompt and of the first canvas, the same for both sides and every turn."""
    generator = np.random.default_rng(0)
    prompt = generator.integers(0, vocab, PROMPT_TOKENS, dtype=np.int32)
    return prompt, generator.integers(0, vocab, CANVAS, dtype=np.int32)


class Ours:
    """mlx_diffusiongemma: `Denoiser` and one evaluation per step."""

    def __init__(self, folder: Path) -> None:
        config, self._generation = load_configs(folder)
        self._model = load_model(folder, config)
        mx.eval(self._model.parameters())
        self._denoiser = Denoiser(self._model)

    def turn(self, steps: int) -> Turn:
        """Measure `steps` steps after one that is not counted."""
        prompt, canvas = prompt_and_canvas(self._model.config.text.vocab_size)
        baseline = mx.get_active_memory()
        cache = self._model.make_cache()
        self._model.prefill(mx.array(prompt), cache)
        mx.eval(cache.arrays())
        prefix, offset = cache.views(), mx.array(cache.offset, dtype=mx.int32)
        state = first_state(self._model, mx.array(canvas), self._generation.stability_threshold)
        turn = Turn()
        for step in range(steps + 1):
            mx.reset_peak_memory()
            started = now()
            result = self._step(StepInput(state, self._noise(step), self._temperature(step), prefix, offset))
            state, argmax = result.state, np.array(result.argmax).tolist()
            if step == 0:
                turn.first_argmax = argmax
                continue
            turn.seconds.append(now() - started)
            turn.peak_bytes = max(turn.peak_bytes, mx.get_peak_memory() - baseline)
        return turn

    def _step(self, row: StepInput) -> StepResult:
        rules = StepRules(self._generation.entropy_bound, self._generation.confidence_threshold, DrawShape())
        results = self._denoiser([row], [rules])
        mx.eval(results)
        return results[0]

    def _noise(self, step: int) -> sampler.Noise:
        config = self._model.config
        return sampler.noise(0, 0, step + 1, config.canvas_length, config.text.vocab_size)

    def _temperature(self, step: int) -> mx.array:
        total = self._generation.max_denoising_steps
        proportion = (total - step) / total
        return mx.array(sampler.temperature(proportion, self._generation.t_min, self._generation.t_max), mx.float32)


class Theirs:
    """mlx-vlm: its own generation loop, with a clock at the point where the loop itself waits for a step.

    That point is the stop test, which reads on the host whether the argmax has changed; from the second step on every
    call waits for the decoder and the argmax of the step. What the step leaves lazy (draw, entropy, self-conditioning)
    is computed before the next call returns, so from call to call lies one whole step.
    """

    def __init__(self, folder: Path) -> None:
        self._loop = importlib.import_module("mlx_vlm.generate.diffusion")
        self._model = importlib.import_module("mlx_vlm.utils").load_model(folder)
        self._vocab = load_configs(folder)[0].text.vocab_size

    def turn(self, steps: int) -> Turn:
        """Measure `steps` steps after two that are not counted, then let the loop end its canvas."""
        prompt, canvas = prompt_and_canvas(self._vocab)
        turn, baseline = Turn(), mx.get_active_memory()
        stop_test: Callable[..., bool] = self._loop._diffusion_stable_and_confident
        calls, started = 0, 0.0

        def timed_stop_test(argmax: mx.array, *rest: Any) -> bool:
            nonlocal calls, started
            if calls == 0:
                turn.first_argmax = argmax[0].tolist()
            finished = stop_test(argmax, *rest)
            calls += 1
            if calls > 2:
                turn.seconds.append(now() - started)
                turn.peak_bytes = max(turn.peak_bytes, mx.get_peak_memory() - baseline)
            mx.reset_peak_memory()
            started = now()
            return finished or len(turn.seconds) == steps

        self._loop._diffusion_stable_and_confident = timed_stop_test
        try:
            self._generate(prompt, canvas)
        finally:
            self._loop._diffusion_stable_and_confident = stop_test
        return turn

    def _generate(self, prompt: np.ndarray, canvas: np.ndarray) -> None:
        sink = TokenSink(frozenset(range(self._vocab)))  # the first token ends it
        results = self._loop.stream_diffusion_generate(
            self._model,
            sink,
            sink,
            mx.array(prompt)[None],
            None,
            None,
            max_tokens=CANVAS,
            skip_special_token_ids=[],
            temperature=1.0,
            diffusion_full_canvas=True,
            diffusion_sampler="entropy-bound",
            decoder_input_ids=mx.array(canvas)[None],
        )
        for _ in results:
            pass


def machine() -> dict[str, Any]:
    """Describe what the numbers depend on; the matmul tells a fast BLAS from the reference one."""
    return {**describe_machine(), "matmul_gflops": round(matmul_flops() / 1e9, 1)}


def run(sides: dict[str, Side], rounds: int, steps: int, report: Callable[[str], None]) -> dict[str, list[Turn]]:
    """Let the sides take turns, A B A B, so that what else the machine does falls on both."""
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    for number in range(1, rounds + 1):
        for name, side in sides.items():
            mx.clear_cache()
            turn = side.turn(steps)
            turns[name].append(turn)
            times = " ".join(f"{seconds:.2f}" for seconds in turn.seconds)
            report(f"round {number}/{rounds}  {name:<18}  {times} s  peak {turn.peak_bytes / 1e6:.0f} MB")
    return turns


def summarise(turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Return medians, minima, peaks, and the ratio of the sides pair by pair."""
    summary: dict[str, Any] = {}
    for name, own in turns.items():
        seconds = [value for turn in own for value in turn.seconds]
        summary[name] = {
            "median_seconds": statistics.median(seconds),
            "min_seconds": min(seconds),
            "seconds": [turn.seconds for turn in own],
            "peak_mb_over_weights": max(turn.peak_bytes for turn in own) / 1e6,
        }
    if len(turns) == 2:
        theirs, ours = turns.values()
        pairs = [statistics.median(b.seconds) / statistics.median(a.seconds) for a, b in zip(theirs, ours, strict=True)]
        equal = sum(x == y for x, y in zip(theirs[0].first_argmax, ours[0].first_argmax, strict=True))
        summary["ratio"] = {"pairs": pairs, "median": statistics.median(pairs), "of_minima": _ratio_of_minima(summary)}
        summary["same_argmax"] = [equal, len(ours[0].first_argmax)]
    return summary


def _ratio_of_minima(summary: dict[str, Any]) -> float:
    theirs, ours = (side["min_seconds"] for side in list(summary.values())[:2])
    return float(ours / theirs)


def describe(summary: dict[str, Any], target: float) -> list[str]:
    """Return the summary as lines to read."""
    lines = []
    for name in (PEER, "mlx_diffusiongemma"):
        if name in summary:
            side = summary[name]
            lines.append(
                f"{name:<18}  median {side['median_seconds']:.2f} s  min {side['min_seconds']:.2f} s  "
                f"peak over the weights {side['peak_mb_over_weights']:.0f} MB"
            )
    if "ratio" in summary:
        ratio = summary["ratio"]
        pairs = " ".join(f"{value:.2f}" for value in ratio["pairs"])
        lines.append(
            f"our time / theirs: {ratio['median']:.2f} (pairs {pairs}; minima {ratio['of_minima']:.2f}), "
            f"target at most {target}: {_verdict(ratio['median'] <= target)}"
        )
        peaks = [summary[name]["peak_mb_over_weights"] for name in ("mlx_diffusiongemma", PEER)]
        lines.append(
            f"our temporaries / theirs: {peaks[0] / peaks[1]:.3f}, target at most {TARGET_PEAK_RATIO}: "
            f"{_verdict(peaks[0] <= TARGET_PEAK_RATIO * peaks[1])}"
        )
        lines.append("same argmax after the first step: {} of {} positions".format(*summary["same_argmax"]))
    return lines


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def load_sides(folder: Path, ours_only: bool, report: Callable[[str], None]) -> dict[str, Side]:
    """Load the model once per side. The peer comes first, so that a warm machine is no advantage of ours."""
    sides: dict[str, Side] = {}
    found = None if ours_only else peer_version()
    if found is not None:
        if found != PEER_VERSION:
            report(f"note: {PEER} {found} is installed; the targets were set against {PEER_VERSION}")
        sides[PEER] = Theirs(folder)
    elif not ours_only:
        report(f"{PEER} is not installed, so only ours is measured. To compare: {HOW_TO_INSTALL}")
    sides["mlx_diffusiongemma"] = Ours(folder)
    return sides


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="benchmarks/step.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=4, help="turns per side (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="measured steps per turn (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: %(default)s)")
    parser.add_argument("--ours-only", action="store_true", help=f"leave {PEER} out")
    parser.add_argument("--json", action="store_true", help="print one JSON object; everything else goes to stderr")
    parser.add_argument(
        "--cpu-seconds",
        action="store_true",
        help="measure CPU time: for a busy machine",
    )
    args = parser.parse_args(argv)
    global clock
    clock = time.process_time if args.cpu_seconds else time.perf_counter
    if args.rounds < 1 or args.steps < 1:
        parser.error(f"--rounds and --steps: got {args.rounds} and {args.steps}, expected at least 1")

    def report(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    facts = machine()
    report("  ".join(f"{key} {value}" for key, value in facts.items()))
    if facts["matmul_gflops"] < SLOW_MATMUL_GFLOPS:
        report("note: a slow matmul, by the reference BLAS or a busy machine, hides the rest; see benchmarks/README.md")
    summaries = {}
    for shape in args.shapes:
        report(f"-- {shape}: {json.dumps(asdict(SHAPES[shape]))}")
        with tempfile.TemporaryDirectory() as name:
            write_checkpoint(Path(name), SHAPES[shape], args.seed)
            sides = load_sides(Path(name), args.ours_only, report)
            summaries[shape] = summarise(run(sides, args.rounds, args.steps, report))
            del sides  # the weights of one shape make room for those of the next
        for line in describe(summaries[shape], SHAPES[shape].target):
            report(line)
    if args.json:
        versions = {"mlx_diffusiongemma": __version__, PEER: peer_version()}
        print(json.dumps({"machine": facts, "versions": versions, "shapes": summaries}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
