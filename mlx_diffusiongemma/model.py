"""DiffusionGemma: one stack of layers in two roles.

`prefill` is the encoder role: causal but within images, writes the KV cache. `denoise` is the decoder role:
bidirectional over a read-only prefix and the canvas, with self-conditioning. `embed_images` turns patches into soft
tokens. The vocabulary head is not here: `vocabulary.read_canvas` reads the hidden states that `denoise` returns.

Reference: transformers `DiffusionGemmaForBlockDiffusion` and its two models.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .cache import KeysAndValues, KVQuantization, PrefixCache, View
from .config import ModelConfig, TextConfig
from .fused import Projections
from .layers import CausalPrefix, Layer, ReadOnlyPrefix, SelfConditioning
from .quantization import quantization_predicate
from .vision import Projector, VisionTower
from .weights import Described, WeightsError, check_tensors, module_path

Run = Callable[..., Any]  # (method, *arrays) -> what the method returns


def unfilled_model(config: ModelConfig, stored: Mapping[str, Described]) -> DiffusionGemma:
    """Build the network for a checkpoint's tensors, quantised where they are; its parameters are still to be filled.

    Args:
        config: of the checkpoint.
        stored: every tensor under the name that the network has for it.

    Raises:
        ConfigError: a quantization block that does not fit the tensors.
        WeightsError: tensors that do not fit the network.
    """
    model = DiffusionGemma(config)
    if config.quantization is not None:
        nn.quantize(model, class_predicate=quantization_predicate(config.quantization, set(stored), module_path))
    elif scales := sorted(name for name in stored if name.endswith(".scales")):
        raise WeightsError(f"{scales[0]} is there but config.json has no quantization block")
    check_tensors(dict(tree_flatten(model.parameters())), stored)
    return model


def directly(method: Callable[..., Any], *arrays: mx.array) -> Any:
    """Call a method as it is."""
    return method(*arrays)


class SoftBlock(NamedTuple):
    """The soft tokens of one image [T, D], and the place of the first among the tokens that are encoded with them."""

    start: int
    soft_tokens: mx.array

    @property
    def span(self) -> tuple[int, int]:
        """The places that they take: start, stop."""
        return self.start, self.start + self.soft_tokens.shape[0]


class Tail(NamedTuple):
    """The end of a prefix that is still to be encoded: it shares a pass over the layers with the canvas behind it."""

    token_ids: mx.array  # [L] int32
    cache: PrefixCache  # of the tokens before them; written to


class Decoder(nn.Module):
    """Every weight of the text model; the encoder shares all of them but its layer scalars."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)  # [V, D], also the head
        self.layers = [Layer(config, kind) for kind in config.layer_types]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config)


class EncoderLayer(nn.Module):
    """What an encoder layer has of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_scalar = mx.ones((1,))


class LanguageModel(nn.Module):
    """The encoder's text stack."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layers = [EncoderLayer() for _ in config.layer_types]


class Encoder(nn.Module):
    """The encoder's own parameters; vision tower and projector only where the config has them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.language_model = LanguageModel(config.text)
        if config.vision is not None:
            self.vision_tower = VisionTower(config.vision)
            self.embed_vision = Projector(config.vision, config.text.hidden_size)


class Roles(nn.Module):
    """Decoder and encoder, under the names of the checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.decoder = Decoder(config.text)
        self.encoder = Encoder(config)


class DiffusionGemma(nn.Module):
    """The model. Nothing here samples, loops or knows text."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Roles(config)

    @property
    def layers(self) -> list[Layer]:
        """The stack, where mlx-lm's adapter loader looks for it."""
        return self.model.decoder.layers

    def join_projections(self) -> None:
        """Compute projections of one input by one matmul where their weights allow it; see `fused.py`."""
        for projections in self._projections():
            projections.join()

    def _projections(self) -> Iterator[Projections]:
        yield self.model.decoder.self_conditioning
        for layer in self.layers:
            yield layer.self_attn
            yield layer.mlp

    def _drop_stale(self) -> None:
        for projections in self._projections():
            projections.drop_stale()

    def make_cache(self, quantization: KVQuantization | None = None) -> PrefixCache:
        """Return an empty cache for one sequence; `quantization` is that of the full-attention layers."""
        return PrefixCache(self.config.text, quantization)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the hidden states: that of the norms, which no layout quantises."""
        return self.model.decoder.norm.weight.dtype

    def embed(self, token_ids: mx.array) -> mx.array:
        """Return scaled embeddings of token ids [...]; [..., D]."""
        table = self.model.decoder.embed_tokens  # gives bfloat16 where its scales are not floats (mxfp4, mxfp8, nvfp4)
        return table(token_ids).astype(self.dtype) * self.embedding_scale

    @property
    def embedding_scale(self) -> mx.array:
        """sqrt(D), rounded to the model's dtype (53.0 for D = 2816 in bfloat16)."""
        return mx.array(self.config.text.hidden_size**0.5, dtype=self.dtype)

    @property
    def vision(self) -> VisionTower | None:
        """The vision tower; None for a model that cannot see."""
        return None if self.config.vision is None else self.model.encoder.vision_tower

    def embed_images(self, patches: mx.array, position_ids: mx.array) -> mx.array:
        """Turn images of one padded length into soft tokens, which stand in a prompt unscaled.

        Args:
            patches: [B, P, 3 patch²] float32, pixels in [0, 1].
            position_ids: [B, P, 2] int32, column and row of each patch, (-1, -1) for padding.

        Returns:
            [B, T, D] with T = P / k²; an image with padding has fewer soft tokens, what stands behind them is not used.

        Raises:
            ValueError: a model without a vision tower.
        """
        if self.vision is None:
            raise ValueError("images: got some, expected none: this model has no vision tower")
        return self.model.encoder.embed_vision(self.vision(patches, position_ids))

    def prefill(
        self,
        token_ids: mx.array,
        cache: PrefixCache,
        images: Sequence[SoftBlock] = (),
        *,
        lazy: bool = True,
        is_read: bool = False,
    ) -> mx.array:
        """Encode one chunk of one sequence into its cache.

        Args:
            token_ids: [L] int32, the tokens after those already in the cache.
            cache: written to.
            images: whole images, in order, in place of the embeddings of the ids there.
            lazy: compute nothing yet, which gradients need; otherwise the scores of long prompts come and go in blocks.
            is_read: whether the hidden states will be, so that those of the last layer have to be computed too.

        Returns:
            hidden states [1, L, D] after the final norm. Generation does not read them, and never computes the norm.
        """
        self._drop_stale()
        decoder, scalars = self.model.decoder, self.model.encoder.language_model.layers
        h = self._embed_prompt(token_ids, images)
        bidirectional = self.config.text.use_bidirectional_attention == "vision"
        spans = [image.span for image in images] if bidirectional else []
        for layer, kind, own, memory in zip(
            decoder.layers, self.config.text.layer_types, scalars, cache.layers, strict=True
        ):
            window = self.config.text.sliding_window if kind == "sliding_attention" else None
            if layer is decoder.layers[-1] and not is_read:
                lazy = True  # nobody asks what its queries see, only its keys are stored
            h = layer(h, CausalPrefix(memory, window, spans, lazy=lazy), own.layer_scalar)
        return decoder.norm(h)

    def _embed_prompt(self, token_ids: mx.array, images: Sequence[SoftBlock]) -> mx.array:
        """Return embeddings [1, L, D] with soft tokens, unscaled, in place of the ids of images."""
        parts, done = [], 0
        for image in images:
            start, stop = image.span
            if not done <= start < stop <= len(token_ids):
                raise ValueError(
                    f"images: got one at {start} to {stop}, expected places from {done} to {len(token_ids)}"
                )
            parts += [self.embed(token_ids[done:start])] if start > done else []
            parts.append(image.soft_tokens.astype(self.dtype))
            done = stop
        if done < len(token_ids):
            parts.append(self.embed(token_ids[done:]))
        return (parts[0] if len(parts) == 1 else mx.concatenate(parts))[None]

    def denoise(
        self,
        canvases: Sequence[mx.array],
        soft_embeddings: Sequence[mx.array],
        prefixes: Sequence[Sequence[View]],
        offsets: Sequence[mx.array],
        frozen: Sequence[Sequence[KeysAndValues] | None] = (),
        *,
        seen: list[list[KeysAndValues]] | None = None,
        lazy: bool = True,
        run: Run = directly,
    ) -> list[mx.array]:
        """Run the decoder on canvases, which may differ in length.

        Args:
            canvases: token ids [C] of each.
            soft_embeddings: [C, D] of each, from `vocabulary.read_canvas` of the step before, zeros on the first step.
            prefixes: of each, the read-only view of every layer; lengths may differ.
            offsets: of each, the position of its first token, an int32 scalar, or those of all of them [C].
            frozen: of each, rows of the canvas that are not computed: what every layer knows of them. None for none.
            seen: gets a list per layer: of each canvas the keys and values of all its rows, frozen ones first.
            lazy: compute nothing yet; otherwise attention over a long prefix is computed block by block.
            run: calls a method of the model or of a layer with arrays: everything but attention over the prefix.

        Returns:
            hidden states [C, D] of each, after the final norm.
        """
        self._drop_stale()
        lengths = [len(canvas) for canvas in canvases]  # canvas behind canvas: [1, sum C, D]
        h = run(self.enter, _joined(canvases), _joined(soft_embeddings))
        for index, layer in enumerate(self.layers):
            views = [views_of_row[index] for views_of_row in prefixes]
            asked, values = run(layer.ask, h)
            of_frozen = [None if known is None else known[index] for known in frozen]
            prefix = ReadOnlyPrefix(views, offsets, lengths, of_frozen, lazy=lazy)
            attended = prefix.attend(asked, values, layer.self_attn.rope)
            if seen is not None:
                seen.append([_copied(canvas) for canvas in prefix.canvases])
            h = run(layer.combine, h, attended, layer.layer_scalar)
        hidden = run(self.leave, h)
        stops = list(itertools.accumulate(lengths))
        return [hidden[stop - length : stop] for stop, length in zip(stops, lengths, strict=True)]

    def encode_and_denoise(
        self,
        tail: Tail,
        canvas: mx.array,
        soft_embeddings: mx.array,
        *,
        seen: list[list[KeysAndValues]] | None = None,
    ) -> mx.array:
        """Encode the end of a prefix and denoise the canvas behind it, in one pass over the layers.

        What comes out is that of `prefill` and then `denoise`; the roles meet in nothing but the keys and values that
        the canvas reads, which every layer has of the prefix by then. The weights are read once in place of twice.

        Args:
            tail: without images, and as short as all scores at one time allow.
            canvas: token ids [C].
            soft_embeddings: [C, D].
            seen: as in `denoise`.

        Returns:
            hidden states [C, D] after the final norm.
        """
        self._drop_stale()
        L, C = len(tail.token_ids), len(canvas)
        decoder, own = self.model.decoder, self.model.encoder.language_model.layers
        offset = mx.array(tail.cache.offset + L, dtype=mx.int32)
        h = mx.concatenate([self.embed(tail.token_ids)[None], self.enter(canvas, soft_embeddings)], axis=1)
        for layer, kind, encoder_layer, memory in zip(
            decoder.layers, self.config.text.layer_types, own, tail.cache.layers, strict=True
        ):
            (asked, values), rope = layer.ask(h), layer.self_attn.rope
            window = self.config.text.sliding_window if kind == "sliding_attention" else None
            of_tail = CausalPrefix(memory, window).attend(asked[:, :, :L], values[:, :, :L], rope)
            prefix = ReadOnlyPrefix([memory.view()], [offset], [C])
            of_canvas = prefix.attend(asked[:, :, L:], values[:, :, L:], rope)
            if seen is not None:
                seen.append([_copied(canvas) for canvas in prefix.canvases])
            if layer is decoder.layers[-1]:  # nobody reads what it makes of the prefix
                h = layer.combine(h[:, L:], of_canvas, layer.layer_scalar)
            else:
                roles = (encoder_layer.layer_scalar, L), (layer.layer_scalar, C)
                scalars = mx.concatenate([mx.broadcast_to(scalar, (count, 1)) for scalar, count in roles])
                h = layer.combine(h, mx.concatenate([of_tail, of_canvas], axis=2), scalars)
        return self.leave(h)

    def enter(self, token_ids: mx.array, soft_embeddings: mx.array) -> mx.array:
        """Return the decoder's stream [1, T, D] for tokens [T] and the self-conditioning signal [T, D]."""
        return self.model.decoder.self_conditioning(
            self.embed(token_ids)[None], soft_embeddings[None] * self.embedding_scale
        )

    def leave(self, h: mx.array) -> mx.array:
        """Return hidden states [T, D] of the stream [1, T, D]."""
        return self.model.decoder.norm(h)[0]


def _copied(view: KeysAndValues) -> KeysAndValues:
    """Return copies, for a slice keeps the queries too. `mx.contiguous` may give the slice itself."""
    rows = mx.arange(view.keys.shape[2])
    return KeysAndValues(*(mx.take(array, rows, axis=2) for array in view))


def _joined(arrays: Sequence[mx.array]) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(list(arrays))
