"""Divide a checkpoint among ranks: every rank builds the whole stack with its own part of the weights.

    q, k, v projections    by heads: a rank has query heads, and the key and value heads that they look at; where there
                           are fewer of these than ranks, several ranks have the same one
    o projection           by the same query heads, one sum behind it
    gate and up, down      by the neurons between them, one sum behind down; self-conditioning too
    experts                by index, one sum behind them
    vocabulary             by tokens (`divided.py`)
    the rest               norms, routers, vision: the same on every rank

Layers that need a sum behind them are MLX's own (`mlx.nn.layers.distributed`). Those in front of them need nothing and
stay as they are: `AllToShardedLinear` computes no more than `Linear` does. MLX's `shard_linear` is not used to cut: it
divides evenly only, and 2,112 neurons in groups of 64 are 33 groups; and it wants the whole weight first.

A rank reads its own part of the files and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import QuantizedShardedToAllLinear, ShardedToAllLinear
from mlx.utils import tree_unflatten

from .config import ModelConfig, TextConfig
from .divided import DividedEmbedding, DividedExperts
from .model import DiffusionGemma, unfilled_model
from .ranks import Ranks, Share, divide
from .shards import StoredTensor, TensorSpec, read_header
from .vocabulary import DRAW_BLOCK
from .weights import (
    DroppedTensor,
    Target,
    WeightsError,
    fill_encoder_scalars,
    order_pieces,
    read_index,
    settle_vision,
    sort_tensors,
    weight_files,
)

ROWS, COLUMNS, EXPERTS = -2, -1, 0  # the axes of a weight that may be divided
DECODER = "model.decoder"
MODULE = re.compile(
    r"model\.decoder\.(?:layers\.(?P<layer>\d+)\.)?(?P<block>self_attn|mlp|experts|self_conditioning|embed_tokens)"
    r"(?:\.(?P<name>\w+_proj))?"
)


@dataclass(frozen=True)
class Stored:
    """A parameter as the files hold it, in pieces perhaps."""

    pieces: Mapping[Target, StoredTensor]
    spec: TensorSpec  # of the whole parameter

    @property
    def dtype(self) -> mx.Dtype:
        """Of the whole parameter."""
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        return self.spec.shape


@dataclass(frozen=True)
class Cut:
    """One axis of a parameter, and the share of it that a rank has. None stands for a parameter that it has whole."""

    axis: int
    share: Share

    def of(self, name: str, length: int) -> slice:
        """Return where the share lies on an axis of `length`: packed weights and scales are shorter than plain ones.

        Raises:
            WeightsError: the share begins or ends inside of a packed group.
        """
        if self.share.start * length % self.share.of or self.share.stop * length % self.share.of:
            got = f"{self.share.start} to {self.share.stop} of {self.share.of} in {length} groups"
            raise WeightsError(f"{name} cannot be divided: got {got}, expected whole groups")
        return slice(self.share.start * length // self.share.of, self.share.stop * length // self.share.of)


class Division:
    """What one rank has of a checkpoint, known from configs and headers."""

    def __init__(self, folder: Path, config: ModelConfig, size: int, rank: int) -> None:
        """Read the headers of a folder, and decide.

        Raises:
            ValueError: `WeightsError` among them: files that `checkpoint.load_model` would not load either, or a model
                that so many ranks cannot share.
        """
        self.size, self.rank = size, rank
        index = read_index(folder)
        tensors = (tensor for path in weight_files(folder, index) for tensor in read_header(path))
        pieces, dropped = sort_tensors(folder, set(index), ((each.path, each.name, each) for each in tensors))
        stored = {name: Stored(found, _whole(name, found)) for name, found in pieces.items()}
        fill_encoder_scalars(stored, config.text.num_hidden_layers)
        self.config, unused = settle_vision(stored, config)
        self.dropped: tuple[DroppedTensor, ...] = (*dropped, *unused)
        self.stored: dict[str, Stored] = stored
        self._shares = self._divide(self.config.text)

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's part, as stored."""
        return sum(self.part(name).nbytes for name in self.stored)

    def part(self, name: str) -> TensorSpec:
        """Return dtype and shape of this rank's part of a parameter."""
        spec, cut = self.stored[name].spec, self.cut(name)
        if cut is None:
            return spec
        axis = cut.axis % len(spec.shape)
        here = cut.of(name, spec.shape[axis])
        return TensorSpec(spec.dtype, (*spec.shape[:axis], here.stop - here.start, *spec.shape[axis + 1 :]))

    def read(self, name: str) -> mx.array:
        """Read this rank's part of a parameter. Raise `ShardError` for a file that cannot be read."""
        pieces, cut = self.stored[name].pieces, self.cut(name)
        halves = order_pieces(name, pieces)
        one_by_one = next(iter(pieces)).expert is not None
        if one_by_one and cut is not None:  # only experts come so, and they are divided by index
            halves = [half[cut.share.start : cut.share.stop] for half in halves]
            cut = None
        read = partial(self._read_piece, name, cut)
        arrays = [mx.stack([read(piece) for piece in half]) if one_by_one else read(half[0]) for half in halves]
        return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=1)

    def _read_piece(self, name: str, cut: Cut | None, piece: StoredTensor) -> mx.array:
        if cut is None:
            return piece.read(0, piece.spec.rows).reshape(piece.spec.shape)
        axis = cut.axis % len(piece.spec.shape)
        return piece.read_part(axis, cut.of(name, piece.spec.shape[axis]))

    def cut(self, name: str) -> Cut | None:
        """Return how a parameter is divided; None where every rank has all of it."""
        return self._cut_of(name.rpartition(".")[0])

    def _cut_of(self, path: str) -> Cut | None:
        match = MODULE.fullmatch(path)
        if match is None:
            return None
        block, name = match["block"], match["name"]
        if block == "embed_tokens":
            return Cut(ROWS, self._shares["vocabulary"])
        if block == "experts":
            return Cut(EXPERTS, self._shares["experts"])
        if block == "self_attn":
            kind = self.config.text.layer_types[int(match["layer"])]
            share = self._shares[f"{kind} {'queries' if name in ('q_proj', 'o_proj') else 'keys'}"]
            return Cut(COLUMNS if name == "o_proj" else ROWS, share)
        module = path.rpartition(".")[0]
        return Cut(COLUMNS if name == "down_proj" else ROWS, self._shares[module])

    def _divide(self, text: TextConfig) -> dict[str, Share]:
        """Return this rank's shares, by what is divided."""
        divided = partial(divide, ranks=self.size, rank=self.rank)
        block = DRAW_BLOCK if text.vocab_size % DRAW_BLOCK == 0 and text.vocab_size >= DRAW_BLOCK * self.size else 1
        shares = {
            "experts": divided("experts", text.num_experts),
            "vocabulary": divided("tokens of the vocabulary", text.vocab_size // block).times(block),
        }
        for kind in set(text.layer_types):
            shape = text.attention_shape(kind)
            queries, keys = share_heads(text.num_attention_heads, shape.num_key_value_heads, self.size, self.rank)
            shares |= {f"{kind} queries": queries.times(shape.head_dim), f"{kind} keys": keys.times(shape.head_dim)}
        mlps = [f"{DECODER}.layers.{layer}.mlp" for layer in range(text.num_hidden_layers)]
        for path in (*mlps, f"{DECODER}.self_conditioning"):
            group = text.intermediate_size // self._columns(f"{path}.down_proj", text.intermediate_size)
            shares[path] = divided(f"groups of {group} neurons of {path}", text.intermediate_size // group).times(group)
        return shares

    def _columns(self, path: str, whole: int) -> int:
        """Return into how many pieces the columns of a module can be cut: groups with a scale, or single numbers."""
        scales = self.stored.get(f"{path}.scales")
        return whole if scales is None else scales.shape[-1]


def share_heads(queries: int, keys: int, size: int, rank: int) -> tuple[Share, Share]:
    """Return the query heads of a rank, and the key and value heads that these look at.

    Raises:
        ValueError: heads that so many ranks cannot share.
    """
    if keys >= size:
        own = divide("key and value heads", keys, size, rank)
        return own.times(queries // keys), own
    if size % keys or queries % size:
        expected = f"as many ranks as key and value heads or fewer ({keys}), or a multiple that divides {queries}"
        raise ValueError(f"attention: got {queries} heads over {keys} for {size} ranks, expected {expected}")
    own = divide("heads", queries, size, rank)
    key = own.start * keys // queries
    return own, Share(key, key + 1, keys)


def largest_part(config: ModelConfig, size: int) -> ModelConfig:
    """Return the sizes of what the first of so many ranks computes, as those of a model: what memory is planned with.

    Experts are not among them: all rows of a chunk may choose those of one rank.
    """
    text = config.text

    def first(what: str, count: int) -> int:
        return divide(what, count, size, 0).size

    heads = {
        kind: share_heads(text.num_attention_heads, text.attention_shape(kind).num_key_value_heads, size, 0)
        for kind in set(text.layer_types) | {"full_attention"}
    }
    full = heads["full_attention"]
    sliding = heads.get("sliding_attention", full)
    part = replace(
        text,
        vocab_size=first("tokens of the vocabulary", text.vocab_size),
        intermediate_size=first("neurons", text.intermediate_size),
        num_attention_heads=max(full[0].size, sliding[0].size),
        num_key_value_heads=sliding[1].size,
        num_global_key_value_heads=full[1].size,
    )
    return replace(config, text=part)


def _whole(name: str, pieces: Mapping[Target, StoredTensor]) -> TensorSpec:
    """Return dtype and shape of a parameter that is stored in pieces."""
    halves = order_pieces(name, pieces)
    first = halves[0][0].spec
    for piece in pieces.values():
        if piece.spec != first:
            raise WeightsError(f"{piece.name}: got {piece.spec}, expected {first} as the others of {name}")
    shape = (len(halves[0]), *first.shape) if next(iter(pieces)).expert is not None else first.shape
    return TensorSpec(first.dtype, shape if len(halves) == 1 else (shape[0], 2 * shape[1], *shape[2:]))


def load_part(
    division: Division, ranks: Ranks, cast: Callable[[dict[str, mx.array]], dict[str, mx.array]]
) -> DiffusionGemma:
    """Build the network around this rank's part of the weights.

    Args:
        division: what the rank has.
        ranks: that share the model.
        cast: brings tensors to the dtype that the model runs in.

    Raises:
        ValueError: what does not fit the network, as in `checkpoint.load_model`.
    """
    model = unfilled_model(division.config, division.stored)
    model.update(tree_unflatten(list(cast({name: division.read(name) for name in division.stored}).items())))
    model.join_projections()
    _connect(model, division, ranks)
    model.eval()
    return model


def _connect(model: DiffusionGemma, division: Division, ranks: Ranks) -> None:
    """Put modules that sum over ranks in the place of those that hold a part."""
    decoder = model.model.decoder
    modules: dict[str, nn.Module] = {
        "embed_tokens": DividedEmbedding(decoder.embed_tokens, _share(division, "embed_tokens"), ranks),
        "self_conditioning.down_proj": summed(decoder.self_conditioning.down_proj, ranks),
    }
    for index, layer in enumerate(decoder.layers):
        path = f"layers.{index}"
        experts = DividedExperts(layer.experts, _share(division, f"{path}.experts.down_proj"), ranks)
        modules[f"{path}.experts"] = experts
        modules[f"{path}.self_attn.o_proj"] = summed(layer.self_attn.o_proj, ranks)
        modules[f"{path}.mlp.down_proj"] = summed(layer.mlp.down_proj, ranks)
    decoder.update_modules(tree_unflatten(list(modules.items())))


def _share(division: Division, path: str) -> Share:
    cut = division.cut(f"{DECODER}.{path}.weight")
    assert cut is not None
    return cut.share


def summed(linear: nn.Module, ranks: Ranks) -> nn.Module:
    """Return MLX's layer that sums over ranks what a projection with some of the columns gives."""
    rows, columns = linear["weight"].shape
    if isinstance(linear, nn.QuantizedLinear):
        how = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
        width = columns * 32 // linear.bits * ranks.size
        layer: nn.Module = QuantizedShardedToAllLinear(width, rows, bias=False, group=ranks.group, **how)
    else:
        layer = ShardedToAllLinear(columns * ranks.size, rows, bias=False, group=ranks.group)
    layer.update(linear.parameters())
    return layer
