"""Router and experts against a loop over tokens."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from small_model import config_dict

from mlx_diffusiongemma import moe
from mlx_diffusiongemma.config import ModelConfig
from mlx_diffusiongemma.moe import Experts, Router, in_blocks


def text_config(**text):
    return ModelConfig.from_dict(config_dict(**text)).text


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_router_equals_softmax_top_k_renormalise(top_k: int) -> None:
    router = Router(text_config(top_k_experts=top_k))
    key = mx.random.split(mx.random.key(0), 4)
    router.scale = mx.random.uniform(0.5, 1.5, (64,), key=key[0])
    router.per_expert_scale = mx.random.uniform(0.5, 1.5, (4,), key=key[1])
    router.proj.weight = mx.random.normal((4, 64), key=key[2])
    h = mx.random.normal((10, 64), key=key[3])
    indices, weights = (np.array(a) for a in router(mx.fast.rms_norm(h, None, 1e-6)))

    x = np.array(h, np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.array(router.scale) * 64**-0.5
    scores = x @ np.array(router.proj.weight, np.float64).T
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    for token in range(10):
        best = np.argsort(-p[token])[:top_k]
        assert set(indices[token].tolist()) == set(best.tolist())
        expected = {e: p[token, e] / p[token, best].sum() * float(router.per_expert_scale[int(e)]) for e in best}
        for expert, weight in zip(indices[token], weights[token], strict=True):
            assert weight == pytest.approx(expected[expert], rel=1e-5)


@pytest.mark.parametrize("piece", [1, moe.PIECE_ELEMENTS])
@pytest.mark.parametrize("rows", [0, 4, 8])  # of a block; none
@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_experts_equal_a_loop(tokens: int, rows: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "PIECE_ELEMENTS", piece)
    monkeypatch.setattr(Experts, "_block_rows", lambda self: rows)
    experts = Experts(text_config())
    key = mx.random.split(mx.random.key(tokens), 3)
    x = mx.random.normal((tokens, 64), key=key[0])
    indices = mx.random.randint(0, 4, (tokens, 2), key=key[1]).astype(mx.uint32)
    weights = mx.random.uniform(shape=(tokens, 2), key=key[2])
    out = np.array(experts(x, indices, weights))
    for token in range(tokens):
        expected = mx.zeros((64,))
        for slot in range(2):
            e = indices[token, slot].item()
            gate, up = mx.split(experts.gate_up_proj.weight[e] @ x[token], 2)
            expected += weights[token, slot] * (experts.down_proj.weight[e] @ (nn.gelu_approx(gate) * up))
        np.testing.assert_allclose(out[token], np.array(expected), atol=1e-5)


def test_blocks_belong_to_one_expert_each() -> None:
    experts = mx.array([0] * 3 + [2] * 9 + [5] * 8, dtype=mx.uint32)
    place, tokens, of_blocks = in_blocks(experts, mx.arange(100, 120), num_experts=6, rows=8)
    assert np.array(place).tolist() == [*range(3), *range(8, 17), *range(24, 32)]
    assert np.array(tokens).flatten()[np.array(place)].tolist() == list(range(100, 120))
    assert np.array(of_blocks).tolist() == [0, 2, 2, 5, *[5] * 4]  # 20 rows may need 8 blocks, these need 4


@pytest.mark.parametrize("rows", [0, 8])
def test_every_token_to_one_expert(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Experts, "_block_rows", lambda self: rows)
    experts = Experts(text_config())
    x = mx.random.normal((20, 64), key=mx.random.key(0))
    indices = mx.full((20, 2), 3, dtype=mx.uint32)
    out = experts(x, indices, mx.full((20, 2), 0.5))
    gate, up = mx.split(x @ experts.gate_up_proj.weight[3].T, 2, axis=-1)
    expected = (nn.gelu_approx(gate) * up) @ experts.down_proj.weight[3].T
    np.testing.assert_allclose(np.array(out), np.array(expected), atol=1e-5)
