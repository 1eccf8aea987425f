"""Routed experts: the router that picks A of E experts for each token, and the experts themselves.

Reference: transformers `DiffusionGemmaTextRouter` and `DiffusionGemmaTextExperts`.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from .config import TextConfig

LARGE_EXPERT = 1 << 16  # numbers in its gate and up, from which on blocks of rows pay on the CPU
ROW_BLOCK = 8  # twice as many: a tenth faster at best with OpenBLAS, 2.6 times slower at worst with the reference BLAS


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
        experts = flat[order]
        if self._pays_in_blocks():
            place, tokens, experts = in_blocks(experts, order // A, self.gate_up_proj.num_experts)
            place = place[mx.argsort(order)]
        else:
            place, tokens = mx.argsort(order), (order // A)[:, None]
        out = run_experts(self.gate_up_proj, self.down_proj, x[tokens], experts)
        out = out.reshape(-1, out.shape[-1])[place].reshape(T, A, -1)
        return (out * weights[..., None].astype(out.dtype)).sum(axis=1)

    def _pays_in_blocks(self) -> bool:
        """Tell whether a plain matmul per block is faster than one per row.

        MLX's CPU back end multiplies one block at a time, and reads the weights of its expert for each; those of a
        small expert stay in the cache. A GPU, and packed weights, go by sorted rows.
        """
        gate_up = self.gate_up_proj
        is_large = isinstance(gate_up, SwitchLinear) and gate_up.weight.size >= LARGE_EXPERT * gate_up.num_experts
        return is_large and mx.default_device() == mx.Device(mx.cpu)


def run_experts(gate_up_proj: nn.Module, down_proj: nn.Module, rows: mx.array, experts: mx.array) -> mx.array:
    """Run blocks of rows [blocks, n, D] through the expert of each block [blocks], ascending; [blocks, n, D]."""
    gate, up = mx.split(gate_up_proj(rows, experts, sorted_indices=True), 2, axis=-1)
    return down_proj(nn.gelu_approx(gate) * up, experts, sorted_indices=True)


def in_blocks(experts: mx.array, tokens: mx.array, num_experts: int) -> tuple[mx.array, mx.array, mx.array]:
    """Lay sorted rows out in blocks that belong to one expert each; what is left of a block is filled with token 0.

        experts   0 0 0 2 2 2 2 2     ->     0 0 0 . | 2 2 2 2 | 2 . . .     (blocks of 4)

    Args:
        experts: [n], ascending.
        tokens: [n], the token of each row.
        num_experts: of the layer.

    Returns:
        the place of each row among the rows of all blocks [n], the tokens of the blocks [blocks, ROW_BLOCK], and their
        experts [blocks], ascending.
    """
    n = experts.shape[0]
    counts = (experts[:, None] == mx.arange(num_experts, dtype=experts.dtype)).sum(axis=0)
    blocks = (counts + ROW_BLOCK - 1) // ROW_BLOCK
    first_row, first_block = mx.cumsum(counts) - counts, mx.cumsum(blocks) - blocks
    place = first_block[experts] * ROW_BLOCK + mx.arange(n) - first_row[experts]
    most = n // ROW_BLOCK + min(num_experts, n)  # every expert but for full blocks may have one that is not full
    of_blocks = mx.full((most,), num_experts - 1, dtype=experts.dtype)
    of_blocks[place // ROW_BLOCK] = experts
    of_slots = mx.zeros((most * ROW_BLOCK,), dtype=tokens.dtype)
    of_slots[place] = tokens
    return place, of_slots.reshape(most, ROW_BLOCK), of_blocks
