"""Forward passes against the reference: encoder states, KV cache, decoder logits, whatever the chunk size."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_diffusiongemma import masks
from mlx_diffusiongemma.cache import PrefixCache
from mlx_diffusiongemma.model import DiffusionGemma

from .reference import TEXT, F, S, Spec, build, save
from .replay import load_without_tokenizer
from .tolerances import HIDDEN, KEYS_VALUES, LOGITS

pytestmark = pytest.mark.oracle

# name: (model, prompt length, chunk sizes)
CASES = {
    "window shorter than the prompt": (Spec(attention_gain=1), 21, (100, 8, 5, 1)),
    "window longer than the prompt": (Spec({"sliding_window": 64}, attention_gain=1), 21, (100, 4)),
    "window of two": (Spec({"sliding_window": 2}), 9, (100, 3)),
    "window equal to the prompt": (Spec({"sliding_window": 12}), 12, (100, 5)),
    "window one more than the prompt": (Spec({"sliding_window": 13}), 12, (100, 5)),
    "prompt of one token": (Spec(), 1, (100,)),
    "one expert per token": (Spec({"top_k_experts": 1}), 21, (100, 7)),
    "every expert": (Spec({"top_k_experts": 4}), 12, (100, 7)),
    "many experts": (Spec({"num_experts": 16, "top_k_experts": 5}), 21, (100, 7)),
    "one head per kv head": (Spec({"num_key_value_heads": 4, "num_global_key_value_heads": 2}), 12, (100, 7)),
    "one kv head": (Spec({"num_key_value_heads": 1}), 12, (100, 7)),
    "full layers only": (Spec({"layer_types": [F, F], "num_hidden_layers": 2}), 12, (100, 7)),
    "five sliding to one full": (
        Spec({"layer_types": [S] * 5 + [F], "num_hidden_layers": 6, "global_head_dim": 32}),
        21,
        (100, 7),
    ),
    "other rotary settings": (
        Spec(
            {
                "rope_parameters": {
                    S: {"rope_type": "default", "rope_theta": 500.0},
                    F: {"rope_type": "proportional", "rope_theta": 30_000.0, "partial_rotary_factor": 0.7},
                }
            }
        ),
        21,
        (100, 7),
    ),
    "canvas of one": (Spec(canvas_length=1), 12, (100,)),
    "canvas longer than window and prompt": (Spec(canvas_length=32), 12, (100,)),
    "prompt of several query blocks": (Spec({"sliding_window": 100}), 2 * masks.MAX_QUERY_BLOCK + 76, (2048, 300)),
}


def worst(ours: mx.array, reference: torch.Tensor) -> float:
    """Return the largest difference over the reference's largest absolute value."""
    expected = reference.detach().numpy()
    assert ours.shape == expected.shape
    return float(np.abs(np.array(ours) - expected).max() / np.abs(expected).max())


def prefill(model: DiffusionGemma, prompt: np.ndarray, step: int) -> tuple[mx.array, PrefixCache]:
    """Encode in chunks; return hidden states [1, L, D] and the cache."""
    cache = model.make_cache()
    parts = [model.prefill(mx.array(prompt[a:b]), cache) for a, b in masks.chunks(0, len(prompt), step)]
    return mx.concatenate(parts, axis=1), cache


def denoise(model: DiffusionGemma, canvas: torch.Tensor, signal: mx.array, cache: PrefixCache) -> mx.array:
    """Run the decoder on one canvas [1, C] with self-conditioning [C, D]; return hidden states [1, C, D]."""
    [hidden] = model.denoise([mx.array(canvas[0].numpy())], [signal], [cache.views()], [mx.array(cache.offset)])
    return hidden[None]


def logits(model: DiffusionGemma, hidden: mx.array) -> mx.array:
    """Apply the tied head and the soft cap, without the streaming pass that generation uses."""
    cap = model.config.text.final_logit_softcapping
    return mx.tanh(model.model.decoder.embed_tokens.as_linear(hidden) / cap) * cap


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_passes_equal_the_reference(case: str, tmp_path: Path, record_property: object) -> None:
    spec, length, steps = CASES[case]
    reference = build(spec)
    ours = load_without_tokenizer(save(reference, tmp_path))._checkpoint.model
    V, C = TEXT["vocab_size"], spec.canvas_length
    prompt, canvas = torch.randint(0, V, (1, length)), torch.randint(0, V, (1, C))
    signal = 3 * torch.randn(1, C, V)
    with torch.no_grad():
        plain = reference(input_ids=prompt, decoder_input_ids=canvas)
        conditioned = reference(input_ids=prompt, decoder_input_ids=canvas, self_conditioning_logits=signal)
        soft = torch.softmax(signal, -1) @ reference.model.decoder.embed_tokens.weight
    for step in steps:
        hidden, cache = prefill(ours, prompt[0].numpy(), step)
        found = {"hidden": worst(hidden, plain.encoder_last_hidden_state), "keys, values": 0.0, "logits": 0.0}
        views, layers = cache.views(), plain.past_key_values.layers
        for view, layer in zip(views, layers, strict=True):  # all keys of full layers, the last window - 1 of sliding
            found["keys, values"] = max(
                found["keys, values"], worst(view.keys, layer.keys), worst(view.values, layer.values)
            )
        for embeddings, expected in ((np.zeros(soft.shape, np.float32), plain), (soft.numpy(), conditioned)):
            h = denoise(ours, canvas, mx.array(embeddings[0]), cache)
            found["logits"] = max(found["logits"], worst(logits(ours, h), expected.logits))
        print(f"worst, {case}, chunks of {step}:", ", ".join(f"{key} {value:.1e}" for key, value in found.items()))
        assert found["hidden"] <= HIDDEN
        assert found["keys, values"] <= KEYS_VALUES
        assert found["logits"] <= LOGITS


def test_decoder_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    ours = load_without_tokenizer(save(build(Spec()), tmp_path))._checkpoint.model
    _, cache = prefill(ours, np.arange(21), 100)
    before = [np.array(array) for array in cache.arrays()]
    mx.eval(ours.denoise([mx.arange(8)], [mx.zeros((8, 32))], [cache.views()], [mx.array(21)]))
    for old, new in zip(before, cache.arrays(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_second_canvas_continues_the_cache(tmp_path: Path) -> None:
    """A committed canvas encoded after the prompt gives the states of one pass over both."""
    reference = build(Spec(attention_gain=1))
    ours = load_without_tokenizer(save(reference, tmp_path))._checkpoint.model
    tokens, canvas = torch.randint(0, 96, (1, 29)), torch.randint(0, 96, (1, 8))
    with torch.no_grad():
        expected = reference(input_ids=tokens, decoder_input_ids=canvas)
    cache = ours.make_cache()
    for a, b in ((0, 21), (21, 29)):
        ours.prefill(mx.array(tokens[0, a:b].numpy()), cache)
    h = denoise(ours, canvas, mx.zeros((8, 32)), cache)
    assert worst(logits(ours, h), expected.logits) <= LOGITS
