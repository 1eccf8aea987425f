"""The vision tower without its reference: what must not change a soft token, what must, and shapes and numbers by hand.

Parity with PyTorch is in `oracle/test_vision.py`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from small_model import VISION, random_model

from mlx_diffusiongemma import vision
from mlx_diffusiongemma.masks import MAX_QUERY_BLOCK
from mlx_diffusiongemma.vision import attend, pool, rotate, rotation

ATOL = 1e-4  # of soft tokens up to 5.6; measured 9.4e-6
GRIDS = [(6, 6), (12, 3), (3, 9)]


def grid(columns: int, rows: int, length: int | None = None) -> np.ndarray:
    """Return position ids [P, 2] in raster order, padded to a length."""
    ids = np.array([(x, y) for y in range(rows) for x in range(columns)], np.int32)
    return np.pad(ids, ((0, (length or len(ids)) - len(ids)), (0, 0)), constant_values=-1)


def picture(columns: int, rows: int, length: int | None = None, padding: float = 0.0) -> np.ndarray:
    """Return random patches [P, 192] in [0, 1]; padding has the given value."""
    patches = np.random.default_rng(columns * 100 + rows).random((columns * rows, 192), np.float32)
    return np.pad(patches, ((0, (length or len(patches)) - len(patches)), (0, 0)), constant_values=padding)


def soft_tokens(model: Any, patches: list[np.ndarray], ids: list[np.ndarray]) -> list[np.ndarray]:
    """Run images as one batch; return the soft tokens [T, D] of each without what stands behind them."""
    rows = np.array(model.embed_images(mx.array(np.stack(patches)), mx.array(np.stack(ids))))
    return [row[: (positions[:, 0] >= 0).sum() // 9] for row, positions in zip(rows, ids, strict=True)]


@pytest.fixture(scope="module", params=[{}, {"standardize": True, "use_clipped_linears": True}], ids=["plain", "both"])
def model(request: pytest.FixtureRequest) -> Any:
    return random_model(vision=VISION | request.param)


@pytest.mark.parametrize("padding", [0.0, 0.7])
def test_padding_changes_nothing(model: Any, padding: float) -> None:
    [expected] = soft_tokens(model, [picture(6, 6)], [grid(6, 6)])
    assert expected.shape == (4, 64)
    for length in (45, 90):
        [got] = soft_tokens(model, [picture(6, 6, length, padding)], [grid(6, 6, length)])
        np.testing.assert_allclose(got, expected, atol=ATOL)


def test_a_batch_equals_its_images_alone(model: Any) -> None:
    batch = soft_tokens(model, [picture(*shape, 36) for shape in GRIDS], [grid(*shape, 36) for shape in GRIDS])
    for together, shape in zip(batch, GRIDS, strict=True):
        [alone] = soft_tokens(model, [picture(*shape)], [grid(*shape)])
        np.testing.assert_allclose(together, alone, atol=ATOL)


def test_frames_of_one_size_need_no_mask(model: Any) -> None:
    """A batch without padding takes the path without a mask."""
    frames = [picture(6, 6), picture(6, 6)[::-1].copy()]
    batch = soft_tokens(model, frames, [grid(6, 6)] * 2)
    for together, frame in zip(batch, frames, strict=True):
        np.testing.assert_allclose(together, soft_tokens(model, [frame], [grid(6, 6)])[0], atol=ATOL)


def test_the_order_of_patches_does_not_matter(model: Any) -> None:
    """Positions say where a patch is, not its place in the list."""
    [expected] = soft_tokens(model, [picture(6, 6)], [grid(6, 6)])
    order = np.random.default_rng(0).permutation(36)
    [got] = soft_tokens(model, [picture(6, 6)[order]], [grid(6, 6)[order]])
    np.testing.assert_allclose(got, expected, atol=ATOL)


def test_where_a_patch_is_matters(model: Any) -> None:
    [expected] = soft_tokens(model, [picture(6, 6)], [grid(6, 6)])
    [turned] = soft_tokens(model, [picture(6, 6)], [grid(6, 6)[:, ::-1].copy()])
    assert np.abs(turned - expected).max() > 0.1


def test_blocks_of_queries_equal_one_pass(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = soft_tokens(model, [picture(6, 6, 45)], [grid(6, 6, 45)])
    monkeypatch.setattr(vision, "query_block", lambda heads, keys: 8)
    np.testing.assert_allclose(soft_tokens(model, [picture(6, 6, 45)], [grid(6, 6, 45)]), expected, atol=ATOL)


def test_a_model_without_a_tower_says_so() -> None:
    blind = random_model()
    assert blind.vision is None
    with pytest.raises(ValueError, match="images: got some, expected none: this model has no vision tower"):
        blind.embed_images(mx.zeros((1, 9, 192)), mx.zeros((1, 9, 2), mx.int32))


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_pooling_is_the_mean_of_each_square() -> None:
    """6 x 4 patches whose value is their place in the list, in squares of 2 x 2."""
    h = mx.arange(24.0).reshape(1, 24, 1)
    means = pool(mx.pad(h, [(0, 0), (0, 4), (0, 0)]), mx.array(grid(6, 4, 28))[None], 2)
    #  0  1 |  2  3 |  4  5
    #  6  7 |  8  9 | 10 11     the mean of the first square is (0 + 1 + 6 + 7) / 4
    assert means[0, :6, 0].tolist() == [3.5, 5.5, 7.5, 15.5, 17.5, 19.5]
    assert means.shape == (1, 7, 1)


def test_rotation_against_complex_numbers() -> None:
    """A pair of numbers turns like a complex number: dims 0 to 3 by the column, dims 4 to 7 by the row."""
    H, theta = 8, 100.0
    x = np.random.default_rng(0).standard_normal((1, 6, 3, H)).astype(np.float32)
    ids = grid(3, 2)
    got = np.array(rotate(mx.array(x), rotation(mx.array(ids)[None], H, theta, mx.float32)))
    for axis in (0, 1):
        part = x[..., 4 * axis : 4 * axis + 4]
        angles = ids[:, axis, None] * theta ** -(np.array([0, 2]) / 4)  # [P, 2]
        turned = (part[..., :2] + 1j * part[..., 2:]) * np.exp(1j * angles)[None, :, None]
        expected = np.concatenate([turned.real, turned.imag], axis=-1)
        np.testing.assert_allclose(got[..., 4 * axis : 4 * axis + 4], expected, atol=1e-6)


@pytest.mark.parametrize("head_dim", [8, 64, 72, 80, 100, 128, 132])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_against_a_softmax_in_numpy(head_dim: int, masked: bool) -> None:
    rng = np.random.default_rng(head_dim)
    queries, keys, values = (rng.standard_normal((2, n, 10, head_dim)).astype(np.float32) for n in (4, 2, 2))
    mask = rng.random((2, 1, 1, 10)) < 0.6
    mask[..., 0] = True
    scores = queries @ np.repeat(keys, 2, axis=1).swapaxes(2, 3)
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * (mask if masked else 1)
    expected = weights / weights.sum(-1, keepdims=True) @ np.repeat(values, 2, axis=1)
    arrays = (mx.array(array) for array in (queries, keys, values))
    got = attend(*arrays, mx.array(mask) if masked else None)
    np.testing.assert_allclose(np.array(got), expected, atol=1e-4)  # measured 1.1e-5


def test_scores_of_many_patches_exist_one_block_at_a_time() -> None:
    N, P = 4, 3072
    arrays = [mx.random.normal((1, N, P, 8)) for _ in range(3)]
    mx.eval(arrays)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(attend(*arrays, None))
    block = 4 * N * MAX_QUERY_BLOCK * P
    assert mx.get_peak_memory() - before < 2.5 * block  # six blocks


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_stays_half_precision_and_finite(dtype: mx.Dtype) -> None:
    model = random_model(vision=VISION | {"standardize": True})
    model.set_dtype(dtype)
    exact = random_model(vision=VISION | {"standardize": True})
    patches, ids = mx.array(picture(6, 6))[None], mx.array(grid(6, 6))[None]
    got, expected = model.embed_images(patches, ids), exact.embed_images(patches, ids)
    assert got.dtype == dtype
    error = mx.abs(got.astype(mx.float32) - expected).max() / mx.abs(expected).max()
    print(f"relative difference {error.item():.1e}")
    assert error < 0.1  # measured 0.0039 (float16) and 0.037 (bfloat16)
