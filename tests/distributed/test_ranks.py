"""Two and four ranks, each a process, answer as one does. MLX's ring runs over the loopback interface."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from small_model import BUNDLED, save_checkpoint

from mlx_diffusiongemma.checkpoint import load_model
from mlx_diffusiongemma.config import load_configs
from mlx_diffusiongemma.convert import main as convert
from mlx_diffusiongemma.memory import plan_memory
from mlx_diffusiongemma.pipeline import load
from mlx_diffusiongemma.sharding import Division, largest_part
from mlx_diffusiongemma.tokenizer import Tokenizer

from .ranks import HERE, run_ranks
from .together import answers

ADD = "What is 17 + 25?"
WEATHER = "What is the weather in Paris?"
SEEDS = [[ADD, {"seed": seed, "max_tokens": 64}] for seed in range(20)]
FEATURES: list[Any] = [
    ["Tell me a story.", {"seed": 1, "max_tokens": 150, "max_denoising_steps": 8}],
    ["Tell me a story.", {"seed": 1, "max_tokens": 40, "top_p": 0.8, "max_denoising_steps": 5}],
    ["Tell me a story.", {"seed": 2, "max_tokens": 40, "top_k": 7, "min_p": 0.05, "max_denoising_steps": 5}],
    ["Tell me a story.", {"seed": 3, "max_tokens": 40, "temperature": 0, "max_denoising_steps": 5}],
    [ADD, {"seed": 4, "max_tokens": 40, "logprobs": 3, "logprob_candidates": [5, 900, 1600]}],
    [ADD, {"seed": 5, "max_tokens": 40, "regex": "[0-9]+ is the answer"}],
    [ADD, {"seed": 6, "max_tokens": 40, "pins": [[3, 40], [9, 41]], "max_denoising_steps": 6}],
    ["Tell me a story.", {"seed": 1, "max_tokens": 100, "policy": "balanced"}],
    [[ADD, "Tell me a story."], {"seed": [7, 8], "max_tokens": 70, "max_denoising_steps": 6}],
]


def save_tiny(folder: Path, *flags: str) -> Path:
    """Convert the bundled checkpoint."""
    assert convert(["--model", "tiny", "--mlx-path", str(folder), *flags]) == 0
    return folder


def compare(folder: str | Path, cases: list[Any], size: int, tmp_path: Path) -> list[dict[str, Any]]:
    """Answer the cases on one rank, in this process, and on several; return what the ranks report."""
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    pipeline = load(folder, dtype="float32")
    expected = [answers(pipeline, prompt, options) for prompt, options in cases]
    ended = run_ranks(size, [str(HERE / "together.py"), str(folder), str(tmp_path / "cases.json")])
    assert [(code, err) for code, _, err in ended] == [(0, "")] * size
    reports = [json.loads(out) for _, out, _ in ended]
    assert all(report["results"] == reports[0]["results"] for report in reports)
    for got, wanted in zip(reports[0]["results"], expected, strict=True):
        for (tokens, steps, reason, logprobs), (*same, own_logprobs) in zip(got, wanted, strict=True):
            assert [tokens, steps, reason] == same
            for (value, top, others), (own_value, own_top, own_others) in zip(
                logprobs or [], own_logprobs or [], strict=True
            ):
                assert (value, others) == (pytest.approx(own_value, abs=1e-4), pytest.approx(own_others, abs=1e-4))
                assert top == own_top
    return reports


def test_two_ranks_answer_as_one(tmp_path):
    reports = compare("tiny", SEEDS[:1], 2, tmp_path)
    whole = load("tiny").load_report.nbytes
    assert all(report["nbytes"] < 0.6 * whole for report in reports)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_every_seed_and_feature_gives_the_tokens_of_one_rank(tmp_path, size):
    compare("tiny", [*SEEDS, *FEATURES], size, tmp_path)


def pack_tiny(folder: Path, bits: int, group_size: int) -> Path:
    """Quantise all of the bundled checkpoint's language part alike."""
    shutil.copytree(BUNDLED, folder)
    config = json.loads((folder / "config.json").read_text())
    model = load_model(folder, load_configs(folder)[0], "float32")
    how = {"bits": bits, "group_size": group_size}
    nn.quantize(
        model, class_predicate=lambda path, module: hasattr(module, "to_quantized") and "decoder" in path and how
    )
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config | {"quantization": how}))
    return folder


@pytest.mark.distributed
def test_quantised_checkpoints_too(tmp_path):
    """Three groups of 64 neurons: two on the first rank, one on the other."""
    folder = save_tiny(tmp_path / "tiny-4bit", "-q", "--q-bits", "4", "--q-group-size", "32")
    compare(folder, [*SEEDS[:3], *FEATURES], 2, tmp_path)


@pytest.mark.distributed
def test_quantised_checkpoints_on_four_ranks(tmp_path):
    """Six groups of 32 neurons: two on each of two ranks, one on the others."""
    compare(pack_tiny(tmp_path / "packed", 8, 32), [*SEEDS[:2], *FEATURES[2:6]], 4, tmp_path)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_memory_of_each_rank_is_what_was_planned(tmp_path, size):
    """Measured against the plan: see `docs/scaling.md`. The weights are most of it, as they are in the large model."""
    tokenizer = Tokenizer.load(BUNDLED)
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 16, "vocab_size": tokenizer.vocab_size}
    sizes |= {"num_key_value_heads": 4, "num_global_key_value_heads": 2, "head_dim": 32, "intermediate_size": 512}
    folder = save_checkpoint(tmp_path / "model", **sizes)
    for path in BUNDLED.glob("*token*"):
        shutil.copy(path, folder)
    (tmp_path / "cases.json").write_text(json.dumps([["a b c", {"seed": 1, "max_tokens": 8, "raw_prompt": True}]]))
    ended = run_ranks(size, [str(HERE / "together.py"), str(folder), str(tmp_path / "cases.json")])
    config, _ = load_configs(folder)
    for rank, (code, out, err) in enumerate(ended):
        assert (code, err) == (0, "")
        report = json.loads(out)
        weights = Division(folder, config, size, rank).nbytes
        plan = plan_memory(largest_part(config, size), weights, [16], element_bytes=4, on_cpu=True)
        print(f"rank {rank}: loaded {report['loaded']:,}, peak {report['peak']:,}; planned {weights:,}, {plan.total:,}")
        assert report["nbytes"] == weights
        assert report["loaded"] == pytest.approx(weights, rel=0.05)
        assert report["peak"] == pytest.approx(plan.total, rel=0.05)


@pytest.mark.distributed
@pytest.mark.parametrize(("dtype", "element_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_of_a_step_are_those_of_the_formula(tmp_path, dtype, element_bytes):
    """Count what every rank gives to the collectives of a step; `docs/scaling.md` has the formula."""
    folder = save_tiny(tmp_path / "tiny-4bit", "-q", "--q-bits", "4", "--q-group-size", "32")
    config, _ = load_configs(folder)
    L, C, D = config.text.num_hidden_layers, config.canvas_length, config.text.hidden_size
    ended = run_ranks(2, [str(HERE / "counting.py"), str(folder), dtype])
    expected = {"calls": 3 * L + 7, "bytes": (3 * L + 3) * C * D * element_bytes + 36 * C}
    assert [json.loads(out) for _, out, _ in ended] == [expected] * 2
