"""The blocks of the stack: MLP, self-conditioning, attention, one layer.

Attribute names are the checkpoint's. What a layer may attend to is an object given to it, so the same layer serves
the encoder role (`CausalPrefix`, which writes the cache) and the decoder role (`ReadOnlyPrefix`).

Reference: transformers `modeling_diffusion_gemma.py`, classes `DiffusionGemma{Encoder,Decoder}Text{Attention,Layer}`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import ProportionalRoPE

from .attention import canvas_attention, causal_attention
from .cache import KeysAndValues, LayerCache, View
from .config import TextConfig
from .elementwise import gelu
from .fused import Projections
from .masks import Spans
from .moe import Experts, Router


class Prefix(Protocol):
    """Where a layer's tokens stand and what they attend to besides themselves."""

    def attend(self, asked: mx.array, values: mx.array, rope: Callable[..., mx.array]) -> mx.array:
        """Rotate queries and keys of the tokens themselves, and attend; [1, N, L, H].

        Args:
            asked: [1, N + K, L, H], the queries and behind them the keys.
            values: [1, K, L, H], not to be rotated.
            rope: takes an array [1, heads, L, H] and the position of its first token.
        """


class CausalPrefix:
    """Encoder role: append to the cache of one sequence and attend causally, within an image both ways."""

    def __init__(self, cache: LayerCache, sliding_window: int | None, spans: Spans = (), *, lazy: bool = True) -> None:
        self._cache = cache
        self._sliding_window = sliding_window
        self._spans = spans
        self._lazy = lazy

    def attend(self, asked: mx.array, values: mx.array, rope: Callable[..., mx.array]) -> mx.array:
        queries, keys = _rotated(asked, values, rope, self._cache.offset)
        # Copies: what is kept of a slice would keep the queries too.
        known = self._cache.append(mx.contiguous(keys), mx.contiguous(values))
        return causal_attention(queries, known, self._sliding_window, self._spans, lazy=self._lazy)


class ReadOnlyPrefix:
    """Decoder role: each canvas sees all of its own prefix view and itself; nothing is written.

    Canvases stand one behind the other, of any lengths, with prefixes of any lengths. They attend one by one instead of
    padded, so that a canvas's numbers do not depend on its neighbours. Rows of a canvas that are frozen are seen too:
    by the keys and values that they had when they were computed last.
    """

    def __init__(
        self,
        views: Sequence[View],
        offsets: Sequence[mx.array],
        lengths: Sequence[int],
        frozen: Sequence[KeysAndValues | None] = (),
        *,
        lazy: bool = True,
    ) -> None:
        """Hold what each canvas attends to.

        Args:
            views: of each canvas, this layer's.
            offsets: of each, the position of its first token (int32 scalar), or of every token [C].
            lengths: of each, its number of tokens C.
            frozen: of each, its rows that are not among these tokens; None for none.
            lazy: compute nothing yet; otherwise large blocks are computed one by one.
        """
        self._views = views
        self._offsets = offsets
        self._lengths = lengths
        self._frozen = frozen or [None] * len(views)
        self._lazy = lazy
        self.canvases: list[KeysAndValues] = []  # of every row that each canvas saw of itself, frozen ones first

    def attend(self, asked: mx.array, values: mx.array, rope: Callable[..., mx.array]) -> mx.array:
        outputs, start = [], 0
        for view, offset, length, frozen in zip(self._views, self._offsets, self._lengths, self._frozen, strict=True):
            own = slice(start, start + length)
            queries, keys = _rotated(asked[:, :, own], values, rope, offset)
            canvas = KeysAndValues(keys, values[:, :, own])
            if frozen is not None:
                canvas = KeysAndValues(*(mx.concatenate([*pair], axis=2) for pair in zip(frozen, canvas, strict=True)))
            self.canvases.append(canvas)
            outputs.append(canvas_attention(queries, view, canvas, lazy=self._lazy))
            start += length
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def _rotated(
    asked: mx.array, values: mx.array, rope: Callable[..., mx.array], offset: int | mx.array
) -> tuple[mx.array, mx.array]:
    """Rotate queries and keys [1, N + K, L, H] in one go, and take them apart; an offset [L] is one of every token."""
    if isinstance(offset, mx.array) and offset.ndim:
        rotated = rope(asked.swapaxes(0, 2), offset=offset).swapaxes(0, 2)  # tokens as sequences of one token each
    else:
        rotated = rope(asked, offset=offset)
    N = asked.shape[1] - values.shape[1]
    return rotated[:, :N], rotated[:, N:]


class MLP(Projections):
    """Gate and up, GeGLU with the tanh approximation, down."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F, bias=False)
        self.up_proj = nn.Linear(D, F, bias=False)
        self.down_proj = nn.Linear(F, D, bias=False)

    @property
    def joinable(self) -> tuple[str, ...]:
        return "gate_proj", "up_proj"

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = self.project(x)
        return self.down_proj(gelu(gate) * up)


class SelfConditioning(MLP):
    """Norm the soft embeddings, gated MLP, add to the canvas embeddings, norm without weight."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.eps = config.rms_norm_eps
        self.pre_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, embeddings: mx.array, soft_embeddings: mx.array) -> mx.array:  # type: ignore[override]
        """Combine embeddings [1, L, D] with soft embeddings [1, L, D], zeros on the first step; [1, L, D]."""
        signal = super().__call__(self.pre_norm(soft_embeddings))
        return mx.fast.rms_norm(embeddings + signal, None, self.eps)


class Attention(Projections):
    """Project, norm q, k and v, rotate q and k, attend with scale 1, project out.

    Full layers have no v_proj: their values are the raw key projection, normed without weight and not rotated.
    """

    def __init__(self, config: TextConfig, layer_type: str) -> None:
        super().__init__()
        shape = config.attention_shape(layer_type)
        D, N, self.head_dim = config.hidden_size, config.num_attention_heads, shape.head_dim
        self.eps = config.rms_norm_eps
        self.has_values = layer_type == "sliding_attention"
        self.q_proj = nn.Linear(D, N * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(D, shape.num_key_value_heads * shape.head_dim, bias=False)
        if self.has_values:
            self.v_proj = nn.Linear(D, shape.num_key_value_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(N * shape.head_dim, D, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=config.rms_norm_eps)
        self.rope: Callable[..., mx.array]
        if shape.rotated_dims == shape.head_dim:
            self.rope = nn.RoPE(shape.head_dim, traditional=False, base=shape.rope_theta)
        else:
            self.rope = ProportionalRoPE(shape.head_dim, shape.rotated_dims, base=shape.rope_theta)
            mx.eval(self.rope._freqs)  # not a parameter, and a lazy array would be bound to this thread

    @property
    def joinable(self) -> tuple[str, ...]:
        return ("q_proj", "k_proj", "v_proj") if self.has_values else ("q_proj", "k_proj")

    @property
    def others(self) -> tuple[str, ...]:
        return "q_norm", "k_norm"

    def join_others(self, rows: Sequence[int]) -> None:
        N, K = (count // self.head_dim for count in rows[:2])
        norms = [(self.q_norm, N), (self.k_norm, K)]
        joined = mx.concatenate([mx.broadcast_to(norm.weight, (count, self.head_dim)) for norm, count in norms])
        self._joined["norms"] = joined  # [N + K, H]
        self.q_norm.weight, self.k_norm.weight = joined[0], joined[N]

    def __call__(self, x: mx.array, prefix: Prefix) -> mx.array:
        """Attend with x [1, L, D]; return [1, L, D]."""
        return self.read(prefix.attend(*self.ask(x), self.rope))

    def ask(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Return normed queries and keys [1, N + K, L, H] and values [1, K, L, H] of x [1, L, D], not yet rotated."""
        _, L, _ = x.shape
        if self._joined:
            # One norm without weight for all heads; its product with a weight has the bits of a norm with that weight.
            normed = mx.fast.rms_norm(self.project_joined(x).reshape(1, L, -1, self.head_dim), None, self.eps)
            norms, first_key = self._joined["norms"], self.q_proj["weight"].shape[0] // self.head_dim
            asked = normed[:, :, : len(norms)] * norms
            values = normed[:, :, len(norms) if self.has_values else first_key :]
        else:
            queries, keys, *rest = (part.reshape(1, L, -1, self.head_dim) for part in self.project(x))
            asked = mx.concatenate([self.q_norm(queries), self.k_norm(keys)], axis=2)
            values = mx.fast.rms_norm(rest[0] if rest else keys, None, self.eps)
        return asked.swapaxes(1, 2), values.swapaxes(1, 2)

    def read(self, attended: mx.array) -> mx.array:
        """Project what was attended to [1, N, L, H]; return [1, L, D]."""
        _, _, L, _ = attended.shape
        return self.o_proj(attended.swapaxes(1, 2).reshape(1, L, -1))


class Layer(nn.Module):
    """Attention between norms, then dense MLP and routed experts side by side, then the layer scalar."""

    def __init__(self, config: TextConfig, layer_type: str) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.eps = eps
        self.self_attn = Attention(config, layer_type)
        self.mlp = MLP(config)
        self.router = Router(config)
        self.experts = Experts(config)
        self.input_layernorm = nn.RMSNorm(D, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(D, eps=eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(D, eps=eps)
        self.pre_feedforward_layernorm_2 = nn.RMSNorm(D, eps=eps)
        self.post_feedforward_layernorm = nn.RMSNorm(D, eps=eps)
        self.post_feedforward_layernorm_1 = nn.RMSNorm(D, eps=eps)
        self.post_feedforward_layernorm_2 = nn.RMSNorm(D, eps=eps)
        self.layer_scalar = mx.ones((1,))  # the decoder's; the encoder keeps its own

    def __call__(self, h: mx.array, prefix: Prefix, layer_scalar: mx.array) -> mx.array:
        """Transform h [1, L, D]; layer_scalar [1] is the role's own, or [L, 1] that of each token's role."""
        return self.combine(h, prefix.attend(*self.ask(h), self.self_attn.rope), layer_scalar)

    def ask(self, h: mx.array) -> tuple[mx.array, mx.array]:
        """Return what attention needs of h [1, L, D]; see `Attention.ask`."""
        return self.self_attn.ask(self.input_layernorm(h))

    def combine(self, h: mx.array, attended: mx.array, layer_scalar: mx.array) -> mx.array:
        """Do everything behind attention with the stream h and what was attended to [1, N, L, H]; return [1, L, D]."""
        h = h + self.post_attention_layernorm(self.self_attn.read(attended))

        normed = mx.fast.rms_norm(h, None, self.eps)  # once for the three that read the stream, each with its weight
        dense = self.post_feedforward_layernorm_1(self.mlp(normed * self.pre_feedforward_layernorm.weight))
        indices, weights = self.router(normed[0])
        routed = self.experts((normed * self.pre_feedforward_layernorm_2.weight)[0], indices, weights)[None]
        routed = self.post_feedforward_layernorm_2(routed)

        h = h + self.post_feedforward_layernorm(dense + routed)
        return h * layer_scalar  # the whole stream, residual included
