"""Goldens replayed without torch: what PyTorch computed, written by `make_golden.py`, against ours.

Integers are equal; floats lie within the tolerances of the oracle tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from oracle.records import SequenceRecord, from_arrays
from oracle.replay import assert_equal, load_without_tokenizer, replay
from oracle.tolerances import HIDDEN, KEYS_VALUES, LOGITS
from safetensors.numpy import load_file

from mlx_diffusiongemma import masks
from mlx_diffusiongemma.pipeline import Pipeline

FOLDERS = sorted(path.parent for path in (Path(__file__).parent / "golden").glob("*/manifest.json"))
AGAIN = "run python tests/make_golden.py"


@cache
def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


@cache
def records(folder: Path, model: str) -> dict[str, SequenceRecord]:
    arrays = load_file(folder / f"{model}_runs.safetensors")
    return {name: from_arrays(arrays, name) for name in manifest(folder)[model]}


@cache
def pipeline(model_folder: Path) -> Pipeline:
    return load_without_tokenizer(model_folder)


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_goldens_are_there() -> None:
    assert FOLDERS, f"no goldens: {AGAIN}"


def test_goldens_belong_to_the_bundled_weights(folder: Path, tiny_folder: Path) -> None:
    found = hashlib.sha256((tiny_folder / "model.safetensors").read_bytes()).hexdigest()
    assert found == manifest(folder)["tiny_sha256"], f"{folder} was made from other weights of tiny: {AGAIN}"


def test_goldens_are_small(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1_500_000


def relative(ours: mx.array, expected: np.ndarray) -> float:
    assert ours.shape == expected.shape
    return float(np.abs(np.array(ours) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("step", [100, 8, 5])
def test_forward_passes(folder: Path, step: int) -> None:
    golden, model = load_file(folder / "small_forward.safetensors"), pipeline(folder / "small")._checkpoint.model
    prompt, decoder, cap = golden["prompt"][0], model.model.decoder, model.config.text.final_logit_softcapping
    cache = model.make_cache()
    chunks = list(masks.chunks(0, len(prompt), step))
    hidden = mx.concatenate([model.prefill(mx.array(prompt[a:b]), cache) for a, b in chunks], axis=1)
    assert relative(hidden, golden["hidden"]) <= HIDDEN
    for index, view in enumerate(cache.views()):
        assert relative(view.keys, golden[f"keys.{index}"]) <= KEYS_VALUES
        assert relative(view.values, golden[f"values.{index}"]) <= KEYS_VALUES
    soft = mx.softmax(mx.array(golden["signal"]), axis=-1) @ decoder.embed_tokens.weight
    for signal, name in ((mx.zeros(soft.shape), "logits"), (soft, "conditioned_logits")):
        [h] = model.denoise(list(mx.array(golden["canvas"])), list(signal), [cache.views()], [mx.array(len(prompt))])
        assert relative(mx.tanh(decoder.embed_tokens.as_linear(h[None]) / cap) * cap, golden[name]) <= LOGITS


@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
def test_small_model_runs(folder: Path, together: bool) -> None:
    """Rows that the reference ran as a padded batch, run as a batch and one by one."""
    limit = manifest(folder)["max_tokens"]["small"]
    for name, count in manifest(folder)["batches"].items():
        rows = [records(folder, "small")[f"{name}.{row}"] for row in range(count)]
        for group in [rows] if together else [[row] for row in rows]:
            replayed = replay(pipeline(folder / "small"), group)
            for expected, (request, result) in zip(group, replayed, strict=True):
                assert_equal(expected, request, result, limit)


TINY_RUNS = [(folder, family) for folder in FOLDERS for family in manifest(folder)["tiny"]]


@pytest.mark.parametrize(("made_on", "family"), TINY_RUNS, ids=[f"{folder.name}-{name}" for folder, name in TINY_RUNS])
def test_tiny_runs(made_on: Path, family: str, tiny_folder: Path) -> None:
    test_goldens_belong_to_the_bundled_weights(made_on, tiny_folder)
    limit, expected = manifest(made_on)["max_tokens"]["tiny"], records(made_on, "tiny")[family]
    [(request, result)] = replay(pipeline(tiny_folder), [expected], max_tokens=limit)
    assert_equal(expected, request, result, limit)


def test_goldens_need_no_torch() -> None:
    """Where torch cannot be imported, everything that this file imports still can."""
    code = "import sys; sys.modules['torch'] = None; import test_golden"
    path = os.pathsep.join(entry for entry in [str(Path(__file__).parent), *sys.path] if entry)
    environment = {**os.environ, "PYTHONPATH": path}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
