"""Log-probabilities of the tokens of a canvas, read from the hidden states that a denoising step leaves behind.

All of them are natural logarithms at temperature 1 of the soft-capped logits. The step itself is not touched, so tokens
are the same with and without them. A position is read only in steps that change its draft, and once more at the end:
about two passes over the vocabulary for a canvas that settles quickly. The rows go through in chunks, each computed and
summed up before the next one starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .divided import DividedEmbedding, own_logits, vocabulary_rows
from .events import TokenLogprob
from .model import DiffusionGemma
from .vocabulary import chunk_rows, likeliest, row_sums


class LogprobReading(NamedTuple):
    """Log-probabilities of R positions, in float32."""

    logprob: np.ndarray  # [R], of one given token each
    top_ids: np.ndarray  # [R, k] int, likeliest first; of equals the lower id first
    top_logprobs: np.ndarray  # [R, k]
    candidates: np.ndarray  # [R, n], of the same tokens at every position


def read_logprobs(
    hidden: mx.array,
    token_ids: np.ndarray,
    embedding: nn.Module,
    softcap: float,
    top: int = 0,
    candidates: Sequence[int] = (),
    chunk_elements: int | None = None,
) -> LogprobReading:
    """Evaluate log-probabilities.

    Args:
        hidden: [R, D], after the final norm.
        token_ids: [R], the token that each position has.
        embedding: the tied table [V, D].
        softcap: of the logits.
        top: how many of the likeliest tokens to return, at most V.
        candidates: ids of n tokens to return at every position.
        chunk_elements: rows x vocabulary of one chunk; None for what suits the device.
    """
    everywhere = mx.array(list(candidates), dtype=mx.int32)
    is_divided = isinstance(embedding, DividedEmbedding)
    k, n = min(top, embedding.share.of if is_divided else embedding["weight"].shape[0]), len(candidates)
    rows = chunk_rows(vocabulary_rows(embedding), chunk_elements)
    parts = [LogprobReading(np.zeros(0), np.zeros((0, k), np.int32), np.zeros((0, k)), np.zeros((0, n)))]
    for start in range(0, len(token_ids), rows):
        logits = own_logits(hidden[start : start + rows], embedding, softcap, mx.array(1.0))
        ids = mx.array(token_ids[start : start + rows])
        if isinstance(embedding, DividedEmbedding):
            arrays = _read_divided_rows(logits, ids, k, everywhere, embedding)
        else:
            arrays = _read_rows(logits, ids, k, everywhere)
        mx.eval(arrays)
        parts.append(LogprobReading(*(np.array(array) for array in arrays)))
    joined = LogprobReading(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    order = np.lexsort((joined.top_ids, -joined.top_logprobs), axis=-1)
    return joined._replace(
        top_ids=np.take_along_axis(joined.top_ids, order, -1),
        top_logprobs=np.take_along_axis(joined.top_logprobs, order, -1),
    )


def _read_rows(logits: mx.array, token_ids: mx.array, top: int, candidates: mx.array) -> tuple[mx.array, ...]:
    """Read logits [R, V] float32 at temperature 1; see `LogprobReading`, whose order the likeliest lack."""
    highest = logits.max(axis=-1, keepdims=True)
    total = mx.log(row_sums(mx.exp(logits - highest)))[:, None]
    top_ids = likeliest(logits, top)

    def logprobs(ids: mx.array) -> mx.array:
        return mx.take_along_axis(logits, ids, axis=-1) - highest - total

    everywhere = mx.broadcast_to(candidates, (logits.shape[0], candidates.shape[0]))
    return logprobs(token_ids[:, None])[:, 0], top_ids, logprobs(top_ids), logprobs(everywhere)


def _read_divided_rows(
    logits: mx.array, token_ids: mx.array, top: int, candidates: mx.array, embedding: DividedEmbedding
) -> tuple[mx.array, ...]:
    """Read logits of which every rank has its own [R, V / n]; the result is that of `_read_rows`, on every rank."""
    R, ranks = logits.shape[0], embedding.ranks
    highest = ranks.all_max(logits.max(axis=-1, keepdims=True))
    total = mx.log(ranks.all_sum(row_sums(mx.exp(logits - highest))))[:, None]
    count = min(top, logits.shape[-1])
    best = likeliest(logits, count)
    values = mx.pad(mx.take_along_axis(logits, best, axis=-1), [(0, 0), (0, top - count)], constant_values=-mx.inf)
    ids = mx.pad(best.astype(mx.int32) + embedding.share.start, [(0, 0), (0, top - count)])
    all_values = ranks.all_gather(values).swapaxes(0, 1).reshape(R, -1)
    all_ids = ranks.all_gather(ids).swapaxes(0, 1).reshape(R, -1)
    order = mx.argsort(-all_values, axis=-1)[:, :top]
    everywhere = mx.broadcast_to(candidates, (R, candidates.shape[0]))

    def logprobs(ids: mx.array) -> mx.array:
        return embedding.values_at(logits, ids) - highest - total

    return (
        logprobs(token_ids[:, None])[:, 0],
        mx.take_along_axis(all_ids, order, axis=-1),
        mx.take_along_axis(all_values, order, axis=-1) - highest - total,
        logprobs(everywhere),
    )


class CanvasLogprobs:
    """Follows one canvas from step to step, and knows when each position settled."""

    def __init__(self, model: DiffusionGemma, top: int, candidates: Sequence[int]) -> None:
        """Begin before the first step; `top` and `candidates` are those of `read_logprobs`."""
        C = model.config.canvas_length
        self._embedding = model.model.decoder.embed_tokens
        self._softcap = model.config.text.final_logit_softcapping
        self._top = top
        self._candidates = tuple(candidates)
        self._step = 0
        self._argmax = np.full(C, -1)
        self._settled_step = np.zeros(C, np.int32)
        self._settled_logprob = np.zeros(C, np.float32)
        self._hidden: mx.array | None = None  # [C, D] of the last step

    def absorb(self, hidden: mx.array, argmax: np.ndarray) -> None:
        """Take over a step: its hidden states [C, D] and its draft [C]."""
        self._step += 1
        self._hidden = hidden
        changed = np.flatnonzero(argmax != self._argmax)
        if changed.size:
            reading = read_logprobs(hidden[mx.array(changed)], argmax[changed], self._embedding, self._softcap)
            self._settled_logprob[changed] = reading.logprob
            self._settled_step[changed] = self._step
        self._argmax = argmax

    def amend(self, token_ids: Sequence[int]) -> None:
        """Take over what a constraint has made of the beginning of the last draft: it settled in the last step."""
        count = len(token_ids)
        changed = self._argmax[:count] != np.array(token_ids, self._argmax.dtype)
        self._settled_step[:count][changed] = self._step
        self._argmax = np.concatenate([np.array(token_ids, self._argmax.dtype), self._argmax[count:]])

    def finish(self, count: int) -> list[TokenLogprob]:
        """Return the log-probabilities of the first `count` tokens of the canvas after its last step."""
        if self._hidden is None:
            raise ValueError("a canvas that has taken no step has no log-probabilities")
        last = read_logprobs(
            self._hidden[:count], self._argmax[:count], self._embedding, self._softcap, self._top, self._candidates
        )
        changed_last = self._settled_step[:count] == self._step  # rows read alone may round apart
        settled = np.where(changed_last, last.logprob, self._settled_logprob[:count])
        return [
            TokenLogprob(
                token_id=int(self._argmax[index]),
                logprob=float(last.logprob[index]),
                settled_logprob=float(settled[index]),
                settled_step=int(self._settled_step[index]),
                top=tuple(zip(last.top_ids[index].tolist(), last.top_logprobs[index].tolist(), strict=True)),
                candidates=tuple(last.candidates[index].tolist()),
            )
            for index in range(count)
        ]
