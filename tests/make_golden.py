"""Write golden arrays: what the reference (transformers on torch) draws and computes, for tests that run without torch.

    python tests/make_golden.py [--device cpu|cuda] [--out tests/golden]

Writes the folder OUT/DEVICE: a small random model with its runs and forward passes, runs of the bundled `tiny`, and a
manifest. `test_golden.py` replays every folder it finds. Needs torch and transformers; run it again when the weights
of `tiny` change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from oracle import tiny
from oracle.recorder import record
from oracle.records import SequenceRecord, to_arrays
from oracle.reference import TEXT, F, S, Spec, build, generation_options, save
from safetensors.numpy import save_file

SMALL = Spec({"num_hidden_layers": 3, "layer_types": [S, S, F]}, seed=40)
SEED = 7
BOUND = 1.0
END_IDS = (1, 5, 7, 9)
OPTIONS = {"max_new_tokens": 20, "max_denoising_steps": 24, "confidence_threshold": 0.5}
BATCHES = {"one": (11,), "token": (1,), "batch": (5, 17, 9)}  # name: prompt lengths of rows that run together
FAMILIES = ("small_sums", "sums_thinking", "capitals", "json", "counting", "stories", "tool_calls", "tool_answers")


def small_runs(model: Any) -> dict[str, SequenceRecord]:
    """Generate with the small model: alone, from one token, and in a padded batch."""
    records = {}
    for name, lengths in BATCHES.items():
        prompts = [[3 + (5 * i + 11 * row) % 93 for i in range(length)] for row, length in enumerate(lengths)]
        rows = record(model, prompts, SEED, BOUND, END_IDS, **generation_options(BOUND, **OPTIONS))
        records.update({f"{name}.{row}": found for row, found in enumerate(rows)})
    return records


@torch.no_grad()
def forward_passes(model: Any) -> dict[str, np.ndarray]:
    """Encode a prompt longer than the window and denoise one canvas, with and without a self-conditioning signal."""
    V, device = TEXT["vocab_size"], model.device
    generator = torch.Generator().manual_seed(SEED)
    prompt = torch.randint(0, V, (1, 21), generator=generator)
    canvas = torch.randint(0, V, (1, SMALL.canvas_length), generator=generator)
    signal = 3 * torch.randn(1, SMALL.canvas_length, V, generator=generator)
    inputs = {"input_ids": prompt.to(device), "decoder_input_ids": canvas.to(device)}
    plain = model(**inputs)
    conditioned = model(**inputs, self_conditioning_logits=signal.to(device))
    tensors = {
        "prompt": prompt.int(),
        "canvas": canvas.int(),
        "signal": signal,
        "hidden": plain.encoder_last_hidden_state,
        "logits": plain.logits,
        "conditioned_logits": conditioned.logits,
    }
    for index, layer in enumerate(plain.past_key_values.layers):
        tensors[f"keys.{index}"], tensors[f"values.{index}"] = layer.keys, layer.values
    return {name: np.ascontiguousarray(tensor.cpu().numpy()) for name, tensor in tensors.items()}


def manifest(device: str, small: dict[str, SequenceRecord], bundled: dict[str, SequenceRecord]) -> dict[str, Any]:
    """Say what made the goldens, and what is in them."""

    def summary(records: dict[str, SequenceRecord]) -> dict[str, Any]:
        return {
            name: {"prompt_tokens": len(found.prompt), "steps": [canvas.steps for canvas in found.canvases]}
            for name, found in records.items()
        }

    return {
        "command": f"python tests/make_golden.py --device {device}",
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": "float32",
        "seed": SEED,
        "batches": {name: len(lengths) for name, lengths in BATCHES.items()},
        "max_tokens": {"small": OPTIONS["max_new_tokens"], "tiny": tiny.MAX_TOKENS},
        "small": summary(small),
        "tiny_sha256": tiny.sha256(),
        "tiny": summary(bundled),
    }


def write(folder: Path, device: str) -> None:
    """Replace the goldens of one device."""
    shutil.rmtree(folder, ignore_errors=True)
    model = build(SMALL)
    options = generation_options(BOUND, **OPTIONS, eos_token_id=list(END_IDS), pad_token_id=0)
    save(model, folder / "small", **options)
    model.to(device)
    small = small_runs(model)
    bundled = {family: tiny.recorded(family, device) for family in FAMILIES}
    save_file(to_arrays(small), folder / "small_runs.safetensors")
    save_file(forward_passes(model), folder / "small_forward.safetensors")
    save_file(to_arrays(bundled), folder / "tiny_runs.safetensors")
    text = json.dumps(manifest(device, small, bundled), indent=2)
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Write goldens from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "golden")
    arguments = parser.parse_args(argv)
    folder = arguments.out / arguments.device
    write(folder, arguments.device)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    digest = hashlib.sha256((folder / "tiny_runs.safetensors").read_bytes()).hexdigest()[:12]
    print(f"{folder}: {size / 1e6:.2f} MB, tiny_runs {digest}")


if __name__ == "__main__":
    main()
