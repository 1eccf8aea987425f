"""Routed experts: the router that picks A of E experts for each token, and the experts themselves.

Reference: transformers `DiffusionGemmaTextRouter` and `DiffusionGemmaTextExperts`.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from .config import TextConfig
from .elementwise import gelu

LARGE_EXPERT = 1 << 16  # numbers in its gate and up
# Rows of a block on the CPU. Twice as many for large experts: a tenth faster at best with OpenBLAS, 2.6 times slower at
# worst with the reference BLAS. For small ones blocks make a step a sixth faster with the one, a twentieth slower with
# the other, which multiplies the rows that fill up a block too.
LARGE_EXPERT_ROWS, SMALL_EXPERT_ROWS = 8, 4
PIECE_ELEMENTS = 1 << 18  # of gate and up that exist at one time on the CPU: 1 MB, which a cache holds


class Router(nn.Module):
    """Scale, project to E scores, softmax, keep the best A, renormalise, scale per expert."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.top_k = config.top_k_experts
        self.root_scale = config.hidden_size**-0.5
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones((config.hidden_size,))  # [D]
        self.per_expert_scale = mx.ones((config.num_experts,))  # [E]

    def __call__(self, normed: mx.array) -> tuple[mx.array, mx.array]:
        """Route tokens.

        Args:
            normed: [T, D], the residual stream, normed without a weight (routing on another state gives stray tokens).

        Returns:
            expert indices [T, A] (uint32) and weights [T, A] (float32).
        """
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
        if rows := self._block_rows():
            place, tokens, experts = in_blocks(experts, order // A, self.gate_up_proj.num_experts, rows)
            shares = mx.zeros((tokens.size,), weights.dtype)  # none for what fills a block
            shares[place] = weights.flatten()[order]
            return self._sum_in_pieces(x, tokens, shares.reshape(tokens.shape), experts)
        place, tokens = mx.argsort(order), (order // A)[:, None]
        out = run_experts(self.gate_up_proj, self.down_proj, x[tokens], experts)
        out = out[:, 0][place].reshape(T, A, -1)
        return (out * weights[..., None].astype(out.dtype)).sum(axis=1)

    def _sum_in_pieces(self, x: mx.array, tokens: mx.array, shares: mx.array, experts: mx.array) -> mx.array:
        """Add up what the experts make of blocks of rows, so many blocks at a time.

        Args:
            x: [T, D].
            tokens: [blocks, n], those of the rows.
            shares: [blocks, n], by what a row is multiplied in its token's sum.
            experts: [blocks], ascending.

        Returns:
            [T, D].
        """
        total = mx.zeros_like(x)
        at_once = max(1, PIECE_ELEMENTS // (tokens.shape[1] * self.gate_up_proj.weight.shape[1]))
        for start in range(0, len(tokens), at_once):
            here = slice(start, start + at_once)
            known = mx.depends(x, [total]) if start else x  # piece after piece: else the rows of all exist at one time
            out = run_experts(self.gate_up_proj, self.down_proj, known[tokens[here]], experts[here])
            total = total.at[tokens[here]].add(out * shares[here][..., None])
        return total

    def _block_rows(self) -> int:
        """Return how many rows are multiplied at a time, 0 where rows are not laid out in blocks.

        MLX's CPU back end multiplies one block at a time, and reads the weights of its expert for each. A GPU, and
        packed weights, go by sorted rows.
        """
        gate_up = self.gate_up_proj
        if not isinstance(gate_up, SwitchLinear) or mx.default_device() != mx.Device(mx.cpu):
            return 0
        is_large = gate_up.weight.size >= LARGE_EXPERT * gate_up.num_experts
        return LARGE_EXPERT_ROWS if is_large else SMALL_EXPERT_ROWS


def run_experts(gate_up_proj: nn.Module, down_proj: nn.Module, rows: mx.array, experts: mx.array) -> mx.array:
    """Run blocks of rows [blocks, n, D] through the expert of each block [blocks], ascending; [blocks, n, D]."""
    gate, up = mx.split(gate_up_proj(rows, experts, sorted_indices=True), 2, axis=-1)
    return down_proj(gelu(gate) * up, experts, sorted_indices=True)


def in_blocks(experts: mx.array, tokens: mx.array, num_experts: int, rows: int) -> tuple[mx.array, mx.array, mx.array]:
    """Lay sorted rows out in blocks that belong to one expert each; what is left of a block is filled with token 0.

        experts   0 0 0 2 2 2 2 2     ->     0 0 0 . | 2 2 2 2 | 2 . . .     (blocks of 4)

    Args:
        experts: [n], ascending.
        tokens: [n], the token of each row.
        num_experts: of the layer.
        rows: of a block.

    Returns:
        the place of each row among the rows of all blocks [n], the tokens of the blocks [blocks, rows], and their
        experts [blocks], ascending.
    """
    n = experts.shape[0]
    counts = (experts[:, None] == mx.arange(num_experts, dtype=experts.dtype)).sum(axis=0)
    blocks = (counts + rows - 1) // rows
    first_row, first_block = mx.cumsum(counts) - counts, mx.cumsum(blocks) - blocks
    place = first_block[experts] * rows + mx.arange(n) - first_row[experts]
    most = n // rows + min(num_experts, n)  # every expert but for full blocks may have one that is not full
    of_blocks = mx.full((most,), num_experts - 1, dtype=experts.dtype)
    of_blocks[place // rows] = experts
    of_slots = mx.zeros((most * rows,), dtype=tokens.dtype)
    of_slots[place] = tokens
    return place, of_slots.reshape(most, rows), of_blocks
