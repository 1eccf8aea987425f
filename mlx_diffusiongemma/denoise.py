"""One denoising step: decoder, vocabulary pass, sampler, stop test, as one lazy graph.

On a GPU the step is compiled piece by piece. Rows of a batch are separate arrays that meet only inside the decoder, so
a row's result does not depend on its neighbours. The loop calls `mx.eval` once per step; before that only attention
over a long prefix waits, for one block after the other, and experts that are divided among ranks.

Reference: `_denoising_step` of transformers' `generation_diffusion_gemma.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from . import sampler
from .cache import KeysAndValues, View
from .divided import DividedEmbedding, read_divided_canvas
from .masks import fits_at_once
from .model import DiffusionGemma, Tail, directly
from .pieces import Pieces
from .vocabulary import CanvasReading, DrawShape, TextOnly, read_canvas, read_soft_embeddings


class CanvasState(NamedTuple):
    """What one sequence carries from step to step."""

    canvas: mx.array  # [C] int32
    soft_embeddings: mx.array  # [C, D], zeros before the first step
    history: mx.array  # [stability_threshold, C] int32, earlier argmax canvases, oldest first


class StepResult(NamedTuple):
    """What one step gives for one sequence."""

    state: CanvasState
    argmax: mx.array  # [C] int32: the draft, and after the last step the committed canvas
    accepted: mx.array  # [C] bool
    mean_entropy: mx.array  # scalar float32, nats
    finished: mx.array  # scalar bool: stable and confident
    entropy: mx.array  # [C] float32, nats
    hidden: mx.array  # [C, D] after the final norm: what the logits of a position can be read from again
    confidence: mx.array  # [C] float32, the probability of the argmax
    wide: mx.array  # [C] bool: where the state lacks its soft embedding until `complete` adds it; none without `sparse`
    seen: list[KeysAndValues] | None = None  # per layer, of every row, frozen ones first; where the input asks for it


class StepOutcome(NamedTuple):
    """An evaluated step as numbers, after a constraint or a policy has had its say."""

    state: CanvasState  # to go on with
    token_ids: tuple[int, ...]  # [C] the draft
    accepted: tuple[bool, ...]  # [C]
    entropies: tuple[float, ...]  # [C] nats, 0 where a constraint chose
    finished: bool
    pinned: tuple[bool, ...] = ()  # [C], see `DenoisingStep`
    committed: int | None = None  # tokens of the draft that a finished canvas commits; None for all


def plain_outcome(result: StepResult, pinned: tuple[bool, ...] = ()) -> StepOutcome:
    """Return an evaluated step as it is."""
    return StepOutcome(
        result.state,
        tuple(np.array(result.argmax).tolist()),
        tuple(np.array(result.accepted).tolist()),
        tuple(np.array(result.entropy).tolist()),
        bool(result.finished.item()),
        pinned,
    )


@dataclass(frozen=True)
class StepRules:
    """The numbers of the sampler and of the stop test. They are constants of a compiled step."""

    entropy_bound: float
    confidence_threshold: float
    shape: DrawShape
    banned: tuple[int, ...] = ()  # ids that the first of the rows may not take
    sparse: bool = False  # sum up the soft embeddings of the likeliest tokens only; `complete` does the rest


class StepInput(NamedTuple):
    """The inputs of one sequence to one step."""

    state: CanvasState
    noise: sampler.Noise
    temperature: mx.array  # scalar float32
    prefix: list[View]  # one read-only view per layer
    offset: mx.array  # int32, position of the first canvas token, or of every one [C] where some rows are frozen
    pins: mx.array | None = None  # [C] int32: the token that a position must have, -1 where it is free
    text_only: TextOnly | None = None
    tail: Tail | None = None  # of the prefix, to be encoded with the step, which has no other row then
    frozen: list[KeysAndValues] | None = None  # per layer, of the rows that are not computed
    is_seen: bool = False  # whether the result is to have what every layer saw of the canvas


def first_state(model: DiffusionGemma, token_ids: mx.array, stability_threshold: int) -> CanvasState:
    """Return the state before the first step: the canvas [C], noise by default, and no self-conditioning signal."""
    C, D = token_ids.shape[0], model.config.text.hidden_size
    return CanvasState(token_ids, mx.zeros((C, D), model.dtype), sampler.empty_history(stability_threshold, C))


def denoising_step(
    model: DiffusionGemma,
    rows: Sequence[StepInput],
    rules: Sequence[StepRules],
    *,
    lazy: bool = True,
    pieces: Pieces | None = None,
) -> list[StepResult]:
    """Run one step for every row.

    Args:
        model: the network.
        rows: one sequence each; canvases and prefixes may differ in length.
        rules: of each row.
        lazy: compute nothing yet; otherwise attention over a long prefix is computed block by block.
        pieces: what compiles the step and keeps what it has compiled; None compiles nothing. Layers that encode a tail
            too are not compiled: their shapes change with every prompt.

    Raises:
        ValueError: a tail in a step of several rows.
    """
    seen: list[list[KeysAndValues]] | None = [] if any(row.is_seen for row in rows) else None
    if tails := [row.tail for row in rows if row.tail is not None]:
        if len(rows) > 1:
            raise ValueError(f"tail: got {len(tails)} in a step of {len(rows)} rows, expected one in a step of one row")
        [tail], [row] = tails, rows
        hidden = [model.encode_and_denoise(tail, row.state.canvas, row.state.soft_embeddings, seen=seen)]
    else:
        hidden = model.denoise(
            [row.state.canvas for row in rows],
            [row.state.soft_embeddings for row in rows],
            [row.prefix for row in rows],
            [row.offset for row in rows],
            [row.frozen for row in rows],
            seen=seen,
            lazy=lazy,
            run=directly if pieces is None else pieces,
        )
    results = [
        _next_canvas(model, *of_row) if pieces is None else _compiled_next_canvas(pieces, model, *of_row)
        for of_row in zip(rows, rules, hidden, strict=True)
    ]
    if seen is None:
        return results
    return [
        result._replace(seen=[layer[index] for layer in seen] if row.is_seen else None)
        for index, (row, result) in enumerate(zip(rows, results, strict=True))
    ]


def _compiled_next_canvas(
    pieces: Pieces, model: DiffusionGemma, row: StepInput, rules: StepRules, hidden: mx.array
) -> StepResult:
    """Call `_next_canvas` as a piece of its own for these rules, without the prefix, of which it needs nothing."""
    key = ("next canvas", rules, row.pins is None, row.text_only is None)
    table = model.model.decoder.embed_tokens

    def next_canvas(flat: Any, hidden: mx.array) -> tuple[Any, ...]:
        return tuple(_next_canvas(model, _unflatten(flat), rules, hidden))[:-1]  # `seen` is not known here

    state, *rest = pieces.call(key, table, next_canvas, _flatten(row), hidden)
    return StepResult(CanvasState(*state), *rest)


def _next_canvas(model: DiffusionGemma, row: StepInput, rules: StepRules, hidden: mx.array) -> StepResult:
    """Turn hidden states [C, D] of one row into its next canvas and its stop test."""
    state, noise = row.state, row.noise
    table: Any = model.model.decoder.embed_tokens
    softcap = model.config.text.final_logit_softcapping
    banned = mx.array(rules.banned) if rules.banned else None
    given = (hidden, table, softcap, row.temperature, noise.uniforms, rules.shape, banned, row.text_only)
    if isinstance(table, DividedEmbedding):
        reading = read_divided_canvas(*given)
    else:
        reading = read_canvas(*given, sparse=rules.sparse)
    if row.pins is not None:
        reading = _pinned(reading, row.pins, model)
    accepted = sampler.accept(reading.entropy, rules.entropy_bound)
    finished = sampler.is_stable(state.history, reading.argmax) & sampler.is_confident(
        reading.entropy, rules.confidence_threshold
    )
    following = CanvasState(
        sampler.renoise(accepted, reading.draw, noise.token_ids),
        reading.soft_embeddings,
        sampler.remember(state.history, reading.argmax),
    )
    return StepResult(
        following,
        reading.argmax,
        accepted,
        mx.mean(reading.entropy),
        finished,
        reading.entropy,
        hidden,
        reading.confidence,
        reading.wide,
    )


def complete(model: DiffusionGemma, row: StepInput, rules: StepRules, result: StepResult) -> CanvasState:
    """Return the state after an evaluated step, with the soft embeddings that a sparse sum cannot give.

    They are computed with the step that follows, for as many positions as need them, rounded up to a power of two so
    that few shapes occur. After the last step of a canvas nobody asks for them.

    Args:
        model: whose table holds the embeddings.
        row: the input of the step; its prefix is not needed.
        rules: of the step.
        result: of the step, evaluated.
    """
    wide = np.flatnonzero(np.array(result.wide)) if rules.sparse else np.zeros(0, np.int64)
    if not wide.size:
        return result.state
    C = len(result.wide)
    count = min(C, 1 << (wide.size - 1).bit_length())
    source = np.arange(C)
    source[wide] = C + np.arange(wide.size)
    dense = read_soft_embeddings(
        result.hidden,
        mx.array(np.resize(wide, count).astype(np.int32)),
        model.model.decoder.embed_tokens,
        model.config.text.final_logit_softcapping,
        row.temperature,
        mx.array(rules.banned) if rules.banned else None,
        row.text_only,
    )
    every = mx.concatenate([result.state.soft_embeddings, dense])
    return result.state._replace(soft_embeddings=every[mx.array(source.astype(np.int32))])


def _pinned(reading: CanvasReading, pins: mx.array, model: DiffusionGemma) -> CanvasReading:
    """Make what pins [C] hold certain, whatever the model thinks of it."""
    return CanvasReading(
        mx.where(pins >= 0, 0.0, reading.entropy),
        place(pins, reading.argmax),
        place(pins, reading.draw),
        _embed_pins(pins, reading.soft_embeddings, model),
        mx.where(pins >= 0, 1.0, reading.confidence),
        reading.wide & (pins < 0),
    )


def pin_state(model: DiffusionGemma, state: CanvasState, pins: mx.array) -> CanvasState:
    """Put tokens into a canvas that is under way, and into its self-conditioning as exact embeddings.

    Args:
        model: whose table embeds them.
        state: after a step.
        pins: [C] int32, -1 where a position is left as it is.
    """
    return state._replace(
        canvas=place(pins, state.canvas), soft_embeddings=_embed_pins(pins, state.soft_embeddings, model)
    )


def place(pins: mx.array, token_ids: mx.array) -> mx.array:
    """Return token_ids [C] with the tokens of pins [C] where these are not -1."""
    return mx.where(pins >= 0, pins, token_ids)


def _embed_pins(pins: mx.array, soft_embeddings: mx.array, model: DiffusionGemma) -> mx.array:
    exact = model.model.decoder.embed_tokens(mx.maximum(pins, 0)).astype(soft_embeddings.dtype)
    return mx.where(pins[:, None] >= 0, exact, soft_embeddings)


class Denoiser:
    """Calls `denoising_step`, compiled where that pays."""

    def __init__(self, model: DiffusionGemma, compiled: bool | None = None) -> None:
        """Bind the model; `compiled=None` compiles on a GPU only (on the CPU it costs seconds and gains nothing)."""
        self._model = model
        self.compiled = mx.default_device() != mx.Device(mx.cpu) if compiled is None else compiled
        self._pieces = Pieces()

    @property
    def retraces(self) -> int:
        """Pieces traced so far: each once for every number of canvas tokens, rules and kind of input; 0 uncompiled."""
        return self._pieces.retraces

    def __call__(self, rows: Sequence[StepInput], rules: Sequence[StepRules]) -> list[StepResult]:
        """Run one step; the arguments and the result are those of `denoising_step`."""
        pieces = self._pieces if self.compiled else None
        return denoising_step(self._model, rows, rules, lazy=not self._is_long(rows), pieces=pieces)

    def _is_long(self, rows: Sequence[StepInput]) -> bool:
        """Tell whether the scores of one row are too many for one time, so that attention has to wait for blocks."""
        text, C = self._model.config.text, self._model.config.canvas_length
        keys = C + max((view.keys.shape[2] for row in rows for view in row.prefix), default=0)
        return not fits_at_once(text.num_attention_heads, C, keys)


def _flatten(row: StepInput) -> tuple[Any, ...]:
    """Return a row without its prefix as plain tuples: `mx.compile` does not keep named ones."""
    pins = () if row.pins is None else (row.pins,)
    text_only = () if row.text_only is None else tuple(row.text_only)
    return tuple(row.state), tuple(row.noise), row.temperature, row.offset, pins, text_only


def _unflatten(flat: tuple[Any, ...]) -> StepInput:
    """Undo `_flatten`."""
    state, noise, temperature, offset, pins, text_only = flat
    return StepInput(
        CanvasState(*state),
        sampler.Noise(*noise),
        temperature,
        [],
        offset,
        pins[0] if pins else None,
        TextOnly(*text_only) if text_only else None,
    )
