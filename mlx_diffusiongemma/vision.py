"""The vision tower and its projector: from patches to soft tokens, embeddings that stand in a prompt for an image.

Cutting an image into patches is in `images.py`; where soft tokens stand in a prompt is not decided here. Several
images go through as a batch, padded to one length; a padding patch has position (-1, -1) and changes nothing.

Reference: transformers `modeling_gemma4.py`, the classes `Gemma4Vision*`, and `DiffusionGemmaMultimodalEmbedder`.
Attribute names are the checkpoint's. P is the number of patches, T = P / k² that of soft tokens, k the pooling kernel.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .config import VisionConfig
from .elementwise import gelu
from .masks import LARGE_BLOCK, query_block

# Head sizes for which MLX's fused attention has a kernel on Metal.
FUSED_HEAD_DIMS = (64, 80, 128)


class Rotation(NamedTuple):
    """Cosines and sines of every patch: [B, P, 1, 2, H/4], the axes being rows, patches, heads, (x, y), pairs."""

    cos: mx.array
    sin: mx.array


def rotation(position_ids: mx.array, head_dim: int, theta: float, dtype: mx.Dtype) -> Rotation:
    """Return the rotary angles of position ids [B, P, 2], computed in float32 and given in `dtype`."""
    pairs = mx.arange(0, head_dim // 2, 2, dtype=mx.float32)  # [H/4]
    frequencies = theta ** (-pairs / (head_dim // 2))
    angles = position_ids[:, :, None, :, None].astype(mx.float32) * frequencies  # [B, P, 1, 2, H/4]
    return Rotation(mx.cos(angles).astype(dtype), mx.sin(angles).astype(dtype))


def rotate(x: mx.array, angles: Rotation) -> mx.array:
    """Rotate x [B, P, N, H]: the first half of a head by the patch's column x, the second half by its row y.

    H = 8   x0 x1 | x2 x3 | y0 y1 | y2 y3        pairs (x0, x2) (x1, x3) turn by x, (y0, y2) (y1, y3) by y
    """
    halves = x.reshape(*x.shape[:-1], 2, 2, -1)  # [B, P, N, (x, y), (first, second of a pair), H/4]
    first, second = halves[..., 0, :], halves[..., 1, :]
    cos, sin = angles
    turned = mx.stack([first * cos - second * sin, second * cos + first * sin], axis=-2)
    return turned.reshape(x.shape)


class Projection(nn.Module):
    """A linear layer under the checkpoint's name."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.linear = nn.Linear(columns, rows, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x)


class ClippedProjection(Projection):
    """Clip, linear layer, clip; the bounds are the checkpoint's."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows)
        self.input_min, self.input_max = mx.array(-inf), mx.array(inf)  # []
        self.output_min, self.output_max = mx.array(-inf), mx.array(inf)  # []

    def __call__(self, x: mx.array) -> mx.array:
        x = mx.clip(x, self.input_min, self.input_max)
        return mx.clip(self.linear(x), self.output_min, self.output_max)


def _projection_class(config: VisionConfig) -> type[Projection]:
    return ClippedProjection if config.use_clipped_linears else Projection


class VisionAttention(nn.Module):
    """Project, norm q, k and v (v without weight), rotate q and k in two dimensions, attend with scale 1, project."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        linear = _projection_class(config)
        D, N, K, self.head_dim = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.eps = config.rms_norm_eps
        self.q_proj = linear(D, N * self.head_dim)
        self.k_proj = linear(D, K * self.head_dim)
        self.v_proj = linear(D, K * self.head_dim)
        self.o_proj = linear(N * self.head_dim, D)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=self.eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=self.eps)

    def __call__(self, x: mx.array, angles: Rotation, mask: mx.array | None) -> mx.array:
        """Attend among x [B, P, D]; the mask [B, 1, 1, P] is False for padding, None without any; [B, P, D]."""
        B, P, _ = x.shape
        heads = (B, P, -1, self.head_dim)
        queries = rotate(self.q_norm(self.q_proj(x).reshape(heads)), angles).swapaxes(1, 2)  # [B, N, P, H]
        keys = rotate(self.k_norm(self.k_proj(x).reshape(heads)), angles).swapaxes(1, 2)  # [B, K, P, H]
        values = mx.fast.rms_norm(self.v_proj(x).reshape(heads), None, self.eps).swapaxes(1, 2)
        out = attend(queries, keys, values, mask)
        return self.o_proj(out.swapaxes(1, 2).reshape(B, P, -1))


def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None) -> mx.array:
    """Attend with scale 1 from queries [B, N, P, H] to keys and values [B, K, P, H]; [B, N, P, H].

    Without a fused kernel MLX writes all N x P x P scores, 0.4 GB for 16 heads and 2,520 patches in float32:

    - Metal has no kernel for heads of 72. Zeros behind a head change neither scores nor values, so it is padded to 80.
    - Other back ends have none for these shapes; queries are taken in blocks, as in the text layers. Large ones are
      computed one by one, since MLX hands out memory ahead of the computation.
    """
    B, N, P, H = queries.shape
    size = next((size for size in FUSED_HEAD_DIMS if FUSED_HEAD_DIMS[0] < H <= size), H)
    if size > H:
        queries, keys, values = (mx.pad(x, [(0, 0), (0, 0), (0, 0), (0, size - H)]) for x in (queries, keys, values))
    block = query_block(B * N, P)
    writes_scores = not mx.metal.is_available() and B * N * min(block, P) * P >= LARGE_BLOCK
    parts: list[mx.array] = []
    for start in range(0, P, block):
        rows = queries[:, :, start : start + block]
        parts.append(mx.fast.scaled_dot_product_attention(rows, keys, values, scale=1.0, mask=mask))
        if writes_scores:
            mx.eval(parts[-1])
    out = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
    return out[..., :H]


class VisionMLP(nn.Module):
    """Gate and up, GeGLU with the tanh approximation, down."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        linear = _projection_class(config)
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(D, F)
        self.up_proj = linear(D, F)
        self.down_proj = linear(F, D)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(gelu(self.gate_proj(x)) * self.up_proj(x))


class VisionLayer(nn.Module):
    """Attention, then MLP, each between two norms and added to the stream."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.input_layernorm = nn.RMSNorm(D, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(D, eps=eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(D, eps=eps)
        self.post_feedforward_layernorm = nn.RMSNorm(D, eps=eps)

    def __call__(self, h: mx.array, angles: Rotation, mask: mx.array | None) -> mx.array:
        """Transform h [B, P, D]."""
        h = h + self.post_attention_layernorm(self.self_attn(self.input_layernorm(h), angles, mask))
        return h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))


class PatchEmbedder(nn.Module):
    """Stretch pixels to [-1, 1], project, add the embedding of the patch's column and that of its row."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        D, pixels = config.hidden_size, 3 * config.patch_size**2
        self.input_proj = nn.Linear(pixels, D, bias=False)
        self.position_embedding_table = mx.ones((2, config.position_embedding_size, D))  # of columns, of rows

    def __call__(self, patches: mx.array, position_ids: mx.array) -> mx.array:
        """Embed patches [B, P, 3 patch²] of pixels in [0, 1] at positions (x, y) [B, P, 2]; [B, P, D]."""
        table = self.position_embedding_table
        h = self.input_proj((2 * (patches - 0.5)).astype(table.dtype))
        columns, rows = table
        positions = mx.maximum(position_ids, 0)
        return h + (columns[positions[..., 0]] + rows[positions[..., 1]])  # anything for padding: nobody reads it


class VisionEncoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = [VisionLayer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, h: mx.array, angles: Rotation, mask: mx.array | None) -> mx.array:
        """Transform h [B, P, D]."""
        for layer in self.layers:
            h = layer(h, angles, mask)
        return h


def pool(h: mx.array, position_ids: mx.array, kernel: int) -> mx.array:
    """Return the mean of every kernel x kernel square of patches, squares in raster order, padding last.

    Patches are sorted by square and averaged in runs: a scatter would add in another order each time on a GPU, and a
    matmul may round to TF32 there.

    Args:
        h: [B, P, D] with P a multiple of kernel²; the patches of an image fill whole squares.
        position_ids: [B, P, 2], columns and rows; (-1, -1) for padding.
        kernel: side of a square.

    Returns:
        [B, P / kernel², D] float32; what stands behind an image's own squares means nothing.
    """
    B, P, D = h.shape
    squares_per_row = (position_ids[..., 0].max(axis=1, keepdims=True) + 1) // kernel  # [B, 1]
    column, row = position_ids[..., 0] // kernel, position_ids[..., 1] // kernel
    square = mx.where(position_ids[..., 0] < 0, P, row * squares_per_row + column)  # [B, P]
    order = mx.argsort(square, axis=1)[..., None]
    ordered = mx.take_along_axis(h, order, axis=1).astype(mx.float32)
    return ordered.reshape(B, P // kernel**2, kernel**2, D).mean(axis=2)


class VisionTower(nn.Module):
    """Embed patches, run the layers, pool, scale by sqrt(D), standardise where the checkpoint does."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = VisionEncoder(config)
        if config.standardize:
            self.std_bias = mx.zeros((config.hidden_size,))
            self.std_scale = mx.ones((config.hidden_size,))

    def __call__(self, patches: mx.array, position_ids: mx.array) -> mx.array:
        """Return one vector per square of patches.

        Args:
            patches: [B, P, 3 patch²] float32, pixels in [0, 1], zeros for padding; P is a multiple of k².
            position_ids: [B, P, 2] int32, column and row of each patch, (-1, -1) for padding.

        Returns:
            [B, T, D], squares in raster order; what stands behind an image's own T means nothing.
        """
        config = self.config
        is_patch = position_ids[..., 0] >= 0
        mask = None if mx.all(is_patch).item() else is_patch[:, None, None, :]  # most images have no padding
        h = self.patch_embedder(patches, position_ids)
        angles = rotation(position_ids, config.head_dim, config.rope_theta, h.dtype)
        h = self.encoder(h, angles, mask)
        pooled = pool(h, position_ids, config.pooling_kernel_size).astype(h.dtype)
        # In float32: the scale leaves float16's range, and the bias cancels most of what it scaled.
        scaled = pooled.astype(mx.float32) * config.hidden_size**0.5
        if config.standardize:
            scaled = (scaled - self.std_bias.astype(mx.float32)) * self.std_scale.astype(mx.float32)
        return scaled.astype(h.dtype)


class Projector(nn.Module):
    """Norm without weight, then a linear layer to the width of the text model."""

    def __init__(self, config: VisionConfig, text_hidden_size: int) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.embedding_projection = nn.Linear(config.hidden_size, text_hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Project x [B, T, vision D]; [B, T, D]."""
        return self.embedding_projection(mx.fast.rms_norm(x, None, self.eps))
