"""Joined projections against the parts they were made of."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from small_model import random_model

from mlx_diffusiongemma.fused import Projections
from mlx_diffusiongemma.model import DiffusionGemma

PACKINGS = {"plain": None, "affine 8": (64, 8, "affine"), "affine 4": (32, 4, "affine"), "mxfp4": (32, 4, "mxfp4")}


def projections(model: DiffusionGemma) -> list[Projections]:
    return [module for _, module in model.named_modules() if isinstance(module, Projections)]


@pytest.fixture(params=PACKINGS)
def pair(request: pytest.FixtureRequest) -> tuple[DiffusionGemma, DiffusionGemma]:
    """One model twice, the second joined."""
    apart, joined = random_model(), random_model()
    for model in (apart, joined):
        if packing := PACKINGS[request.param]:
            group_size, bits, mode = packing
            nn.quantize(model, group_size, bits, mode=mode, class_predicate=lambda path, m: isinstance(m, nn.Linear))
    joined.join_projections()
    return apart, joined


def test_joined_equals_apart(pair: tuple[DiffusionGemma, DiffusionGemma]) -> None:
    x = mx.random.normal((9, 64), key=mx.random.key(0))
    pairs = list(zip(*map(projections, pair), strict=True))
    assert len(pairs) == 2 * len(pair[0].layers) + 1
    for apart, joined in pairs:
        for one, other in zip(apart.project(x), joined.project(x), strict=True):
            if "scales" in apart[apart.joinable[0]]:
                assert mx.array_equal(one, other)
            else:  # the BLAS may add up a row in another order
                np.testing.assert_allclose(np.array(other), np.array(one), atol=2e-6)


def test_joined_norms_equal_those_of_the_parts(pair: tuple[DiffusionGemma, DiffusionGemma]) -> None:
    x = mx.random.normal((1, 9, 64), key=mx.random.key(1))
    for apart, joined in zip(pair[0].layers, pair[1].layers, strict=True):
        assert joined.self_attn._joined and not apart.self_attn._joined
        for one, other in zip(apart.self_attn.ask(x), joined.self_attn.ask(x), strict=True):
            if "scales" in apart.self_attn.q_proj:
                assert mx.array_equal(one, other)
            else:
                np.testing.assert_allclose(np.array(other), np.array(one), atol=2e-5)


def test_a_norm_that_changes_is_seen() -> None:
    model = random_model()
    model.join_projections()
    attention = model.layers[0].self_attn
    attention.k_norm.weight = 2 * attention.k_norm.weight
    attention.drop_stale()
    assert not attention._joined
    x = mx.random.normal((1, 3, 64), key=mx.random.key(0))
    before = random_model().layers[0].self_attn.ask(x)[0]
    N = attention.q_proj.weight.shape[0] // attention.head_dim
    np.testing.assert_allclose(np.array(attention.ask(x)[0][:, N:]), 2 * np.array(before[:, N:]), rtol=1e-5)


def test_names_and_values_of_parameters_stay(pair: tuple[DiffusionGemma, DiffusionGemma]) -> None:
    apart, joined = (dict(tree_flatten(model.parameters())) for model in pair)
    assert apart.keys() == joined.keys()
    assert all(mx.array_equal(array, joined[name]) for name, array in apart.items())


def test_nothing_is_held_twice() -> None:
    module = random_model().model.decoder.self_conditioning
    wide = [nn.Linear(1024, 1024, bias=False) for _ in range(2)]
    module.gate_proj, module.up_proj = wide
    mx.eval(module.parameters())
    del wide
    before = mx.get_active_memory()
    module.join()
    mx.eval(module.parameters())
    assert abs(mx.get_active_memory() - before) < 1 << 20  # of 8 MiB


def test_a_part_that_changes_is_seen() -> None:
    """New values, an adapter, and a tuned weight of which a gradient is asked."""
    x = mx.random.normal((3, 64), key=mx.random.key(0))
    model = random_model()
    model.join_projections()
    attention, other = model.layers[0].self_attn, model.layers[1].self_attn
    attention.k_proj.weight = 2 * attention.k_proj.weight
    other.q_proj = LoRALinear.from_base(other.q_proj, r=2)
    for module in (attention, other, model.layers[0].mlp):
        module.drop_stale()
        expected = [module[name](x) for name in module.joinable]
        assert all(mx.allclose(a, b, atol=1e-6) for a, b in zip(module.project(x), expected, strict=True))
    assert not attention._joined and not other._joined and model.layers[0].mlp._joined


def test_parts_of_different_kinds_stay_apart() -> None:
    model = random_model()
    attention, mlp = model.layers[0].self_attn, model.layers[0].mlp
    attention.k_proj = attention.k_proj.to_quantized(64, 8)
    mlp.up_proj = mlp.up_proj.to_quantized(64, 8)
    mlp.gate_proj = mlp.gate_proj.to_quantized(64, 4)
    model.join_projections()
    assert not attention._joined and not mlp._joined and model.layers[1].mlp._joined
