"""Routed experts: the router that picks A of E experts for each token, and the experts themselves.

Reference: transformers `DiffusionGemmaTextRouter` and `DiffusionGemmaTextExperts`.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from .config import TextConfig


class Router(nn.Module):
    """Norm without weight, scale, project to E scores, softmax, keep the best A, renormalise, scale per expert."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.top_k = config.top_k_experts
        self.eps = config.rms_norm_eps
        self.root_scale = config.hidden_size**-0.5
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones((config.hidden_size,))  # [D]
        self.per_expert_scale = mx.ones((config.num_experts,))  # [E]

    def __call__(self, h: mx.array) -> tuple[mx.array, mx.array]:
        """Route tokens.

        Args:
            h: [T, D], the raw residual stream (routing on a normed state gives stray tokens).

        Returns:
            expert indices [T, A] (uint32) and weights [T, A] (float32).
        """
        normed = mx.fast.rms_norm(h, None, self.eps)
        # Two multiplications in this order: folding them into one weight rounds differently in bfloat16.
        scores = self.proj(normed * self.scale * self.root_scale)
        probabilities = mx.softmax(scores.astype(mx.float32), axis=-1)  # [T, E]
        indices = mx.argpartition(-probabilities, kth=self.top_k - 1, axis=-1)[:, : self.top_k]
        indices = mx.stop_gradient(indices)  # MLX asks for that where weights are tuned
        weights = mx.take_along_axis(probabilities, indices, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        return indices, weights * self.per_expert_scale[indices]


class Experts(nn.Module):
    """Sort rows by expert, gate and up in one grouped matmul, GeGLU, down, weight, sum back per token."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        D, F, E = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.gate_up_proj = SwitchLinear(D, 2 * F, E, bias=False)  # [E, 2F, D], gate rows first
        self.down_proj = SwitchLinear(F, D, E, bias=False)  # [E, D, F]

    def __call__(self, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:
        """Run the chosen experts on x [T, D] with indices [T, A] and weights [T, A]; return [T, D]."""
        T, A = indices.shape
        flat = indices.flatten()
        order = mx.argsort(flat)  # sorted rows let each expert's weights be read once
        rows = x[order // A][:, None, :]  # [T * A, 1, D]
        experts = flat[order]
        gate, up = mx.split(self.gate_up_proj(rows, experts, sorted_indices=True), 2, axis=-1)
        out = self.down_proj(nn.gelu_approx(gate) * up, experts, sorted_indices=True)
        out = out[mx.argsort(order)].reshape(T, A, -1)
        return (out * weights[..., None].astype(out.dtype)).sum(axis=1)
