"""Log-probabilities in OpenAI's two forms: that of chats, with bytes, and that of text completions, with offsets."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..events import TokenLogprob
from ..options import MAX_TOP_LOGPROBS
from ..scoring import Score
from ..tokenizer import Tokenizer
from .errors import refuse
from .fields import SamplingBody

INCLUDED = "message.output_text.logprobs"  # how the Responses API is asked for them


@dataclass(frozen=True)
class Spelled:
    """One token as its bytes, with its log-probability and those of the likeliest tokens in its place."""

    data: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...] = ()


def chat_options(body: SamplingBody) -> dict[str, Any]:
    """Return the option that `logprobs` and `top_logprobs` of a chat set. Raise `ApiError` for the second alone."""
    if not isinstance(body.logprobs, bool | None):
        raise refuse("logprobs", f"got {body.logprobs!r}, expected true or false, and their number in top_logprobs")
    if not body.logprobs:
        if body.top_logprobs:
            raise refuse("top_logprobs", f"got {body.top_logprobs} without logprobs, expected logprobs true with it")
        return {}
    return {"logprobs": _top(body)}


def response_options(body: SamplingBody, include: Sequence[str]) -> dict[str, Any]:
    """Return the option that `include` and `top_logprobs` of the Responses API set. Raise `ApiError` for others."""
    if body.logprobs:
        raise refuse("logprobs", f"got {body.logprobs!r}, expected none, and {INCLUDED} in include")
    if INCLUDED in include:
        return {"logprobs": _top(body)}
    if body.top_logprobs:
        raise refuse("top_logprobs", f"got {body.top_logprobs} alone, expected {INCLUDED} in include with it")
    return {}


def _top(body: SamplingBody) -> int:
    top = body.top_logprobs or 0
    if not 0 <= top <= MAX_TOP_LOGPROBS:
        raise refuse("top_logprobs", f"got {top}, expected 0 to {MAX_TOP_LOGPROBS}", "invalid_value")
    return top


def completion_options(body: SamplingBody) -> dict[str, Any]:
    """Return the option that `logprobs` of a text completion sets, a number. Raise `ApiError` for another type."""
    if body.top_logprobs:
        raise refuse("top_logprobs", f"got {body.top_logprobs}, expected none: logprobs is their number here")
    if isinstance(body.logprobs, bool) and body.logprobs:
        raise refuse("logprobs", "got true, expected the number of likeliest tokens, 0 to 20")
    return {} if body.logprobs is None or body.logprobs is False else {"logprobs": body.logprobs}


def spell(tokenizer: Tokenizer, entry: TokenLogprob) -> Spelled:
    """Return a token of an answer as its bytes."""
    return Spelled(
        tokenizer.token_bytes(entry.token_id),
        entry.logprob,
        tuple((tokenizer.token_bytes(token_id), logprob) for token_id, logprob in entry.top),
    )


def spell_score(tokenizer: Tokenizer, score: Score, text: str) -> list[Spelled]:
    """Return the tokens of a scored text, without the BOS that was put in front of it."""
    bos = tokenizer.bos_token
    added = score.token_ids[:1] == (tokenizer.special.bos,) and not (bos is not None and text.startswith(bos))
    return [
        Spelled(
            tokenizer.token_bytes(token.token_id),
            token.logprob,
            tuple((tokenizer.token_bytes(token_id), logprob) for token_id, logprob in token.top),
        )
        for token in score.tokens[added:]
    ]


def chat_logprobs(entries: Sequence[Spelled]) -> dict[str, Any]:
    """Return the `logprobs` of a choice of a chat."""
    return {"content": token_logprobs(entries), "refusal": None}


def token_logprobs(entries: Sequence[Spelled]) -> list[dict[str, Any]]:
    """Return what chats and the Responses API tell of each token."""
    return [
        {**_entry(entry.data, entry.logprob), "top_logprobs": [_entry(data, logprob) for data, logprob in entry.top]}
        for entry in entries
    ]


def _entry(data: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _text(data), "logprob": logprob, "bytes": list(data)}


def _text(data: bytes) -> str:
    """Return the text of a token; a part of a character as OpenAI writes it, `bytes:\\xe2\\x82`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class TextLogprobs:
    """Makes the `logprobs` of a text completion, piece by piece: it knows where in the text the next token stands."""

    def __init__(self) -> None:
        self._offset = 0  # characters
        self._characters = codecs.getincrementaldecoder("utf-8")("ignore")

    def of(self, entries: Sequence[Spelled]) -> dict[str, Any]:
        """Return those of the next tokens."""
        offsets = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += len(self._characters.decode(entry.data))
        return {
            "tokens": [_text(entry.data) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{_text(data): logprob for data, logprob in entry.top} for entry in entries],
            "text_offset": offsets,
        }
