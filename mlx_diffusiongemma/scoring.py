"""How likely a text is, token by token, to the causal encoder role with the tied head.

One pass over the text, chunk by chunk as a prompt is encoded: the state of a token, read by the head with soft cap and
temperature 1, says how likely the token behind it is. Reference: the encoder of transformers' DiffusionGemma and its
`lm_head`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .cache import KVQuantization
from .config import check_integer
from .logprobs import read_logprobs
from .model import DiffusionGemma
from .options import MAX_TOP_LOGPROBS
from .prefill import EmbedImage, encode_and_read
from .prompt import Prompt


@dataclass(frozen=True)
class ScoredToken:
    """One token of a text. `logprob` is None where nothing stands before it, and inside of images."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens in its place, likeliest first


@dataclass(frozen=True)
class Score:
    """Log-probabilities (natural) of the tokens of a text, and their sum."""

    tokens: tuple[ScoredToken, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens that were scored."""
        return tuple(token.token_id for token in self.tokens)

    @property
    def total(self) -> float:
        """The log-probability of the text: the sum of those of its tokens that have one."""
        return sum(token.logprob for token in self.tokens if token.logprob is not None)


def check_top(top: int) -> None:
    """Raise `ValueError` for a number of alternatives that cannot be asked for."""
    check_integer("top", top, 0, MAX_TOP_LOGPROBS)


def score_prompt(
    model: DiffusionGemma,
    prompt: Prompt,
    *,
    first: int,
    top: int,
    step_size: int,
    embed_image: EmbedImage | None = None,
    kv: KVQuantization | None = None,
) -> Score:
    """Score the tokens of a prompt from the one at `first` on; the other arguments are those of `prefill.encode`.

    Args:
        model: whose encoder role and head score.
        prompt: all tokens, those before `first` too.
        first: index of the first token to score.
        top: how many of the likeliest tokens to return at each position.
        step_size: tokens encoded at a time.
        embed_image: gives soft tokens of images.
        kv: how full-attention layers pack keys and values; None for not at all.
    """
    ids = np.array(prompt.token_ids, np.int64)
    in_image = np.zeros(len(ids), bool)
    for block in prompt.blocks:
        in_image[slice(*block.span)] = True
    scored = [ScoredToken(int(ids[0]), None)] if first == 0 else []
    cache = model.make_cache(kv)
    cache.reserve(len(ids))
    start = 0
    for hidden in encode_and_read(model, cache, prompt.token_ids, step_size, prompt.blocks, embed_image):
        stop = start + hidden.shape[0]
        begin, end = max(start, first - 1), min(stop, len(ids) - 1)  # states whose next token is to be scored
        if begin < end:
            following = slice(begin + 1, end + 1)
            reading = read_logprobs(
                hidden[begin - start : end - start],
                ids[following],
                model.model.decoder.embed_tokens,
                model.config.text.final_logit_softcapping,
                top,
            )
            scored += _tokens(
                ids[following], in_image[following], reading.logprob, reading.top_ids, reading.top_logprobs
            )
        start = stop
    return Score(tuple(scored))


def _tokens(
    ids: np.ndarray, in_image: np.ndarray, logprobs: np.ndarray, top_ids: np.ndarray, top_logprobs: np.ndarray
) -> Sequence[ScoredToken]:
    return [
        ScoredToken(int(token_id), None)
        if inside
        else ScoredToken(int(token_id), float(logprob), tuple(zip(best.tolist(), values.tolist(), strict=True)))
        for token_id, inside, logprob, best, values in zip(ids, in_image, logprobs, top_ids, top_logprobs, strict=True)
    ]
