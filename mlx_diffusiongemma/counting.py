"""FLOPs and bytes of a denoising step, and of encoding, part by part, from the configuration alone.

Only matrix products are counted as FLOPs (a multiplication and an addition are two). Bytes are those that must come
from memory or go there: weights that are used once per pass, keys and values, arrays over the vocabulary, and the
stream between layers. Nothing here measures; `roofline.py` makes times of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .config import TextConfig
from .recipes import Quantization, Recipe

# The parts of the weights are those of `recipes.PARTS` without the vision projection.
WEIGHT_PARTS: dict[str, str] = {  # with the path of one of their modules
    "embedding": "model.decoder.embed_tokens",
    "attention": "model.decoder.layers.0.self_attn.q_proj",
    "dense MLP": "model.decoder.layers.0.mlp.up_proj",
    "router": "model.decoder.layers.0.router.proj",
    "experts": "model.decoder.layers.0.experts.down_proj",
    "self-conditioning": "model.decoder.self_conditioning.up_proj",
}
Bits = Mapping[str, float]  # bits per weight of each part, scales and biases included
FLOAT_BITS = 16.0

# How often an eager chain in float32 passes over canvas x vocabulary numbers, once the head has written its logits:
# upcast and soft cap, temperature, log-sum-exp, entropy, draw with its noise, two argmaxes, softmax, cast.
EAGER_FLOAT32_PASSES, EAGER_HALF_PASSES = 19, 4
STREAM_PASSES = 24  # over the residual stream per layer: norms, sums, what projections read and write
Vocabulary = Literal["fused", "stored", "eager"]


class Work(NamedTuple):
    """What a part has to do."""

    flops: float
    nbytes: float


@dataclass(frozen=True)
class Pass:
    """One pass through the layers.

    Attributes:
        rows: tokens that go through.
        context: tokens in the cache that they attend to besides themselves.
        bits: of the weights.
        distinct_experts: that the rows use per layer, on average; None for what uniform routing gives.
        soft_tokens: rows of the table that a soft embedding is made of; None for the whole vocabulary.
        vocabulary: whether canvas x vocabulary numbers never reach memory, are stored once, or in an eager chain.
        element_bytes: of the model's dtype.
    """

    rows: int
    context: int
    bits: Bits
    distinct_experts: float | None = None
    soft_tokens: int | None = None
    vocabulary: Vocabulary = "stored"
    element_bytes: int = 2


def parameters(text: TextConfig) -> dict[str, int]:
    """Return the number of weights of each part; of the experts all are counted."""
    D, N = text.hidden_size, text.num_attention_heads
    attention = 0
    for kind in text.layer_types:
        shape = text.attention_shape(kind)
        projections = 2 if kind == "sliding_attention" else 1  # full layers take the keys as values
        attention += D * shape.head_dim * (2 * N + projections * shape.num_key_value_heads)
    L = text.num_hidden_layers
    return {
        "embedding": text.vocab_size * D,
        "attention": attention,
        "dense MLP": L * 3 * D * text.intermediate_size,
        "router": L * D * text.num_experts,
        "experts": L * text.num_experts * 3 * D * text.moe_intermediate_size,
        "self-conditioning": 3 * D * text.intermediate_size,
    }


def uniform_distinct_experts(text: TextConfig, rows: int) -> float:
    """Return how many experts of a layer rows use on average when every expert is as likely as any other."""
    E = text.num_experts
    return E * (1 - (1 - text.top_k_experts / E) ** rows)


def stored_bits(settings: Quantization | None) -> float:
    """Return bits per weight with scales and biases: affine has 16 of each per group, the others 8 of scale."""
    if settings is None:
        return FLOAT_BITS
    return settings.bits + (32 if settings.mode == "affine" else 8) / settings.group_size


def recipe_bits(recipe: Recipe | None) -> dict[str, float]:
    """Return bits per weight of each part under a recipe; None for 16-bit floats."""
    return {part: stored_bits(None if recipe is None else recipe(path)) for part, path in WEIGHT_PARTS.items()}


def encode_work(text: TextConfig, how: Pass) -> dict[str, Work]:
    """Return the work of the encoder role by part: no head and no self-conditioning, everything else as in a step.

    A layer is charged all pairs of rows and keys that lie in its window as a block, masked ones too.
    """
    counts = parameters(text)
    A, E, rows = text.top_k_experts, text.num_experts, how.rows
    distinct = uniform_distinct_experts(text, rows) if how.distinct_experts is None else how.distinct_experts
    pairs = keys_and_values = 0
    for kind in text.layer_types:
        shape = text.attention_shape(kind)
        known = min(how.context, text.sliding_window - 1) if kind == "sliding_attention" else how.context
        pairs += 4 * rows * text.num_attention_heads * shape.head_dim * (known + rows)
        keys_and_values += 2 * (known + rows) * shape.num_key_value_heads * shape.head_dim * how.element_bytes

    def weights(part: str, share: float = 1.0) -> float:
        return counts[part] * share * how.bits[part] / 8

    return {
        "attention projections": Work(2 * rows * counts["attention"], weights("attention")),
        "attention": Work(pairs, keys_and_values),
        "dense MLP": Work(2 * rows * counts["dense MLP"], weights("dense MLP")),
        "router": Work(2 * rows * counts["router"], weights("router")),
        "experts": Work(2 * rows * counts["experts"] * A / E, weights("experts", distinct / E)),
        "activations": Work(0, _activations(text, rows) * how.element_bytes),
    }


def step_work(text: TextConfig, how: Pass) -> dict[str, Work]:
    """Return the work of one denoising step by part."""
    counts, rows, D, V = parameters(text), how.rows, text.hidden_size, text.vocab_size
    embedding, conditioning = how.bits["embedding"] / 8, how.bits["self-conditioning"] / 8
    work = encode_work(text, how)
    activations = work.pop("activations")
    tokens = V if how.soft_tokens is None else how.soft_tokens
    soft_weights = V if how.soft_tokens is None else min(V, rows * how.soft_tokens)
    return work | {
        "self-conditioning": Work(2 * rows * counts["self-conditioning"], counts["self-conditioning"] * conditioning),
        "head": Work(2 * rows * V * D, V * D * embedding),
        "soft embedding": Work(2 * rows * tokens * D, soft_weights * D * embedding),
        "vocabulary arrays": Work(0, _vocabulary_bytes(text, how)),
        "activations": activations,
    }


def total(work: Mapping[str, Work]) -> Work:
    """Add the parts up."""
    return Work(sum(part.flops for part in work.values()), sum(part.nbytes for part in work.values()))


def _vocabulary_bytes(text: TextConfig, how: Pass) -> int:
    numbers = how.rows * text.vocab_size
    full, half = 4 * numbers, how.element_bytes * numbers
    dense = how.soft_tokens is None
    if how.vocabulary == "eager":
        return EAGER_FLOAT32_PASSES * full + EAGER_HALF_PASSES * half
    if how.vocabulary == "stored":
        return (3 if dense else 2) * half  # written, read; and the probabilities of a dense soft embedding
    return 2 * half if dense else 0


def _activations(text: TextConfig, rows: int) -> int:
    """Return how many numbers pass between the parts of the layers: the stream, and the routed rows."""
    D, F = text.hidden_size, text.moe_intermediate_size
    routed = text.top_k_experts * (3 * D + 3 * F)
    return text.num_hidden_layers * rows * (STREAM_PASSES * D + routed)
