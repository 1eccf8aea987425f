"""Batches of prompts of different lengths.

The reference pads on the left and freezes rows that have settled; ours gives each row what it gives alone.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from mlx_diffusiongemma.pipeline import Pipeline

from .recorder import record
from .records import SequenceRecord
from .reference import Spec, build, generation_options, save
from .replay import assert_equal, load_without_tokenizer, replay

pytestmark = pytest.mark.oracle

MAX_TOKENS = 32
OPTIONS = {"max_new_tokens": MAX_TOKENS, "max_denoising_steps": 24, "confidence_threshold": 0.5}
END_IDS = tuple(range(1, 12))
BOUND = 1.0
LENGTHS = (5, 17, 1, 12)  # shorter than, longer than and around the window of 8
SPECS = {
    "one": Spec(seed=30),
    "two": Spec({"top_k_experts": 1, "sliding_window": 14}, seed=31),
    "three": Spec({"sliding_window": 64}, seed=32, embedding_std=1.0),
}


@cache
def recorded(name: str) -> list[SequenceRecord]:
    """Run the reference on a padded batch, once per model."""
    prompts = [[3 + (5 * i + 11 * row) % 93 for i in range(length)] for row, length in enumerate(LENGTHS)]
    options = generation_options(BOUND, **OPTIONS)
    return record(build(SPECS[name]), prompts, SPECS[name].seed, BOUND, END_IDS, **options)


def load(name: str, folder: Path) -> Pipeline:
    """Save the model and load it through ours."""
    options = generation_options(BOUND, **OPTIONS, eos_token_id=list(END_IDS), pad_token_id=0)
    return load_without_tokenizer(save(build(SPECS[name]), folder, **options))


@pytest.mark.parametrize("name", SPECS)
def test_batch_equals_the_padded_batch_of_the_reference(name: str, tmp_path: Path) -> None:
    records = recorded(name)
    for row, (request, result) in enumerate(replay(load(name, tmp_path), records)):
        worst = assert_equal(records[row], request, result, MAX_TOKENS)
        print(f"worst, batch {name}, row {row}: mean entropy {worst:.1e} nats; steps {result.stats.denoising_steps}")


@pytest.mark.parametrize("name", SPECS)
def test_row_alone_equals_its_row_of_the_padded_batch(name: str, tmp_path: Path) -> None:
    pipeline = load(name, tmp_path)
    for expected in recorded(name):
        [(request, result)] = replay(pipeline, [expected])
        assert_equal(expected, request, result, MAX_TOKENS)


def test_rows_settle_and_end_at_different_times() -> None:
    """Or the tests above would not show that rows are independent."""
    steps = [[row.canvases[0].steps for row in recorded(name)] for name in SPECS]
    assert any(len(set(row)) == len(LENGTHS) for row in steps)
    assert len({len(row.canvases) for name in SPECS for row in recorded(name)}) > 1
