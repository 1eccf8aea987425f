"""Predicted times: the counted work of every part over what a chip can do.

A part takes as long as its arithmetic or its memory traffic, whichever is longer; parts come one after the other. So
this is a floor for a given share of the chip's ceilings, not a simulation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .chips import Chip
from .config import TextConfig
from .counting import Bits, Pass, Vocabulary, Work, encode_work, step_work

STEPS = (12, 16, 24, 48)  # per canvas, for which predictions are printed
CONTEXT = 1024  # tokens
CANVAS_26B = 256  # tokens
SPARSE_TOKENS = 64  # that carry a sparse soft embedding: `vocabulary.CARRIERS`

# google/diffusiongemma-26B-A4B-it, from its published config.json: what is predicted without a checkpoint.
TEXT_26B = TextConfig(
    vocab_size=262_144,
    hidden_size=2816,
    intermediate_size=2112,
    moe_intermediate_size=704,
    num_experts=128,
    top_k_experts=8,
    num_hidden_layers=30,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=256,
    global_head_dim=512,
    num_global_key_value_heads=2,
    sliding_window=1024,
    max_position_embeddings=262_144,
    layer_types=(*["sliding_attention"] * 5, "full_attention") * 5,
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
    },
    rms_norm_eps=1e-6,
    final_logit_softcapping=30.0,
    hidden_activation="gelu_pytorch_tanh",
    attention_bias=False,
    use_bidirectional_attention="vision",
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Scenario:
    """What a prediction takes for granted.

    Attributes:
        name, meaning: for a reader.
        soft_tokens, vocabulary: see `counting.Pass`.
        compute, bandwidth: shares of the chip's ceilings that are reached.
        experts: share of its arithmetic that the grouped products of the experts reach.
        activations: whether what passes between layers goes to memory; it may stay in the chip's last cache.
    """

    name: str
    meaning: str
    soft_tokens: int | None
    vocabulary: Vocabulary
    compute: float
    bandwidth: float
    experts: float
    activations: bool


FLOOR = Scenario("floor", "dense soft embedding, all of the chip's peak", None, "fused", 1, 1, 1, False)
SPARSE = Scenario("sparse floor", "64-token soft embedding, all of the peak", SPARSE_TOKENS, "fused", 1, 1, 1, False)
ATTAINABLE = Scenario(
    "attainable",
    "64-token soft embedding; 70 % of the arithmetic, 50 % for experts, 85 % of the bandwidth",
    SPARSE_TOKENS,
    "stored",
    0.70,
    0.85,
    0.50,
    True,
)
EAGER = Scenario(
    "eager",
    "dense soft embedding, float32 vocabulary chain; 60 %, 30 % for experts, 80 %",
    None,
    "eager",
    0.60,
    0.80,
    0.30,
    True,
)
SCENARIOS = (FLOOR, SPARSE, ATTAINABLE, EAGER)


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step by part, and of encoding a committed canvas; a prediction, never a measurement."""

    scenario: str
    parts: dict[str, float]
    encode_seconds: float
    canvas_length: int

    @property
    def step_seconds(self) -> float:
        """Of one denoising step."""
        return sum(self.parts.values())

    def tokens_per_second(self, steps: float) -> float:
        """Return tokens per second for so many steps per canvas, every token of a canvas used."""
        return self.canvas_length / (steps * self.step_seconds + self.encode_seconds)


def part_seconds(work: Mapping[str, Work], chip: Chip, scenario: Scenario) -> dict[str, float]:
    """Return the seconds of each part on a chip."""
    seconds: dict[str, float] = {}
    for name, part in work.items():
        if name == "activations" and not scenario.activations:
            continue
        reached = scenario.experts if name == "experts" else scenario.compute
        arithmetic = part.flops / (chip.teraflops * 1e12 * reached)
        traffic = part.nbytes / (chip.gigabytes_per_second * 1e9 * scenario.bandwidth)
        seconds[name] = max(arithmetic, traffic)
    return seconds


def predict(
    text: TextConfig,
    canvas_length: int,
    chip: Chip,
    scenario: Scenario,
    bits: Bits,
    *,
    context: int = CONTEXT,
    distinct_experts: float | None = None,
    row_share: float = 1.0,
    element_bytes: int = 2,
) -> Prediction:
    """Predict a step and the encoding of its canvas.

    Args:
        text, canvas_length: the model.
        chip: that runs it.
        scenario: what is taken for granted.
        bits: per weight, see `counting.Bits`.
        context: tokens in the cache.
        distinct_experts: per layer and step; None for uniform routing.
        row_share: rows that a step computes, as a share of the canvas.
        element_bytes: of the model's dtype.
    """
    rows = max(1, round(row_share * canvas_length))
    how = Pass(
        rows, context, bits, distinct_experts, scenario.soft_tokens, scenario.vocabulary, element_bytes=element_bytes
    )
    encoded = encode_work(text, replace(how, rows=canvas_length))
    return Prediction(
        scenario.name,
        part_seconds(step_work(text, how), chip, scenario),
        sum(part_seconds(encoded, chip, scenario).values()),
        canvas_length,
    )


# -- beside a measurement ---------------------------------------------------------------------------------------------

# What `probe.py` can time, and the counted parts in it.
MEASURED_PARTS = {
    "attention projections": ("attention projections",),
    "attention": ("attention",),
    "dense MLP": ("dense MLP",),
    "router": ("router",),
    "experts": ("experts",),
    "self-conditioning": ("self-conditioning",),
    "vocabulary and sampler": ("head", "soft embedding", "vocabulary arrays"),
    "rest": ("activations",),
}


def by_measured_part(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of counted parts under the names of those that can be timed."""
    return {name: sum(seconds.get(part, 0.0) for part in parts) for name, parts in MEASURED_PARTS.items()}


def compare_with(
    prediction: Prediction, step_seconds: float, steps_per_canvas: float, part_seconds: Mapping[str, float] | None
) -> dict[str, Any]:
    """Return a prediction beside what was measured, JSON-ready.

    Args:
        prediction: for the measured context and experts.
        step_seconds: the median step, in one piece.
        steps_per_canvas: the mean K of the measurement.
        part_seconds: of a step that waits after each part; None where no step was probed.
    """
    predicted = by_measured_part(prediction.parts)
    parts = {
        name: {"predicted": seconds, "measured": None if part_seconds is None else part_seconds[name]}
        for name, seconds in predicted.items()
    }
    return {
        "scenario": prediction.scenario,
        "parts": parts,
        "step": {"predicted": prediction.step_seconds, "measured": step_seconds},
        "measured_over_predicted": step_seconds / prediction.step_seconds,
        "encode_seconds": prediction.encode_seconds,
        "tokens_per_second": {str(steps): prediction.tokens_per_second(steps) for steps in STEPS},
        "at_measured_steps": {
            "steps_per_canvas": steps_per_canvas,
            "tokens_per_second": prediction.tokens_per_second(steps_per_canvas),
        },
    }
