"""Where images and videos stand in a prompt: a placeholder in its text, a run of soft tokens among its ids.

    <|image|>  ->  <|image> <|image|> ... <|image|> <image|>                        one <|image|> per soft token
    <|video|>  ->  00:00 <|image> <|video|> ... <image|> 00:01 <|image> ...         one run per frame

Chat templates write placeholders, and so may the author of a raw prompt. The same spelling inside a message is text:
before the template runs, `Typed.hide` puts characters in its place that nobody uses, and `encode_prompt` gives it the
ids of its letters. Where strangers write the messages, that holds for every control token: nobody forges a turn. Runs
are the spans of the reference's `mm_token_type_ids`, one per image and one per frame.

Reference: transformers `processing_gemma4.py`. What ids stand in a run has no influence on the model: their embeddings
are replaced. They are the reference's all the same, and those of <|image|> for a tokenizer without <|video|>.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import islice, zip_longest
from typing import Any, NamedTuple

from .media import ImageBlock, Medium
from .parts import KINDS, Kind, check_count
from .tokenizer import SPELLINGS, Tokenizer

PLACEHOLDERS: dict[Kind, str] = {kind: SPELLINGS[kind] for kind in KINDS}
PLACEHOLDER = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))
RESERVED = [SPELLINGS[name] for name in ("image", "boi", "eoi", "video", "audio", "boa", "eoa")]
CONTROL = list(SPELLINGS.values())
PRIVATE_USE = range(0xF0000, 0xFFFFE)  # code points without a meaning
PRIVATE = re.compile(f"[{chr(PRIVATE_USE[0])}-{chr(PRIVATE_USE[-1])}]")


class Typed:
    """Spellings of control tokens that somebody typed, each under a character that occurs nowhere else.

    Nor can one be put together from two text parts of a message, or from what stands on both sides of a thought.
    """

    def __init__(self, *data: Any, reserved: Sequence[str] = RESERVED) -> None:
        """Choose characters that do not occur in the data, whatever is in it; `reserved` are the spellings."""
        used = set(json.dumps(data, ensure_ascii=False, default=str))
        unused = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
        # Where something is joined to a text, the beginning of a spelling may become all of it. Longest first.
        beginnings = sorted({text[:end] for text in reserved for end in range(1, len(text))}, key=len, reverse=True)
        hidden = list(dict.fromkeys([*reserved, *beginnings]))
        free = list(islice(unused, len(hidden)))
        if len(free) < len(hidden):
            raise ValueError("the prompt uses every private character of Unicode, expected a few left over")
        self._stand_ins = dict(zip(hidden, free, strict=True))
        whole, begun = (f"(?:{'|'.join(map(re.escape, spellings))})" for spellings in (reserved, beginnings))
        marker = "|".join(re.escape(SPELLINGS[name]) for name in ("channel_open", "channel_close"))
        self._reserved = re.compile(rf"{whole}|{begun}(?={marker})")  # templates cut out the marker, maybe a thought
        self._joined = re.compile(rf"{whole}|{begun}(?={marker}|\s*\Z)")  # and trim what they join
        self._spellings = {character: spelling for spelling, character in self._stand_ins.items()}

    def hide(self, value: Any, *, joined: bool = False) -> Any:
        """Return a copy of text, or of lists and mappings with text, with the characters in place of the spellings.

        `joined` says that other text follows, which the template may join to this one.
        """
        if isinstance(value, str):
            spellings = self._joined if joined else self._reserved
            return spellings.sub(lambda match: self._stand_ins[match[0]], value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item, joined=joined) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item, joined=_is_text(after)) for item, after in zip_longest(value, value[1:])]
        return value

    def split(self, text: str) -> list[tuple[str, bool]]:
        """Cut a text at the characters: pieces, and whether each is a spelling that was typed."""
        pieces: list[tuple[str, bool]] = []
        begin = 0
        for match in PRIVATE.finditer(text):  # a class of single characters takes 50 times as long as a range
            if match[0] in self._spellings:
                pieces += [(text[begin : match.start()], False), (self._spellings[match[0]], True)]
                begin = match.end()
        pieces.append((text[begin:], False))
        return [piece for piece in pieces if piece[0]]


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text"


class EncodedPrompt(NamedTuple):
    """A text with its placeholders expanded, its ids, and the soft tokens among them."""

    text: str
    token_ids: tuple[int, ...]
    blocks: tuple[ImageBlock, ...]


def placeholder_kinds(text: str) -> list[Kind]:
    """Return the kinds of the placeholders in a text, in order."""
    kinds: dict[str, Kind] = {spelling: kind for kind, spelling in PLACEHOLDERS.items()}
    return [kinds[spelling] for spelling in PLACEHOLDER.findall(text)]


def encode_prompt(
    tokenizer: Tokenizer, text: str, media: Sequence[Medium], typed: Typed | None = None
) -> EncodedPrompt:
    """Expand the placeholders of a rendered text and encode it.

    Args:
        tokenizer: of the checkpoint.
        text: with one placeholder for each medium.
        media: in the order of their placeholders.
        typed: what hides spellings in the text that are no placeholders.

    Raises:
        ValueError: more or fewer placeholders than media, in another order, or a tokenizer without the tokens.
    """
    missing = [SPELLINGS[name] for name in ("boi", "image", "eoi") if getattr(tokenizer.special, name) is None]
    if media and missing:
        raise ValueError(f"{media[0].kind}s: got some, expected none: this tokenizer has no token {missing[0]}")
    text = _expand(tokenizer, text, media)
    pieces = [(text, False)] if typed is None else typed.split(text)
    token_ids: list[int] = []
    for piece, is_typed in pieces:
        token_ids += tokenizer.encode_letters(piece) if is_typed else tokenizer.encode(piece)
    return EncodedPrompt("".join(piece for piece, _ in pieces), tuple(token_ids), _blocks(tokenizer, token_ids, media))


def _soft_token(tokenizer: Tokenizer, kind: Kind) -> str:
    """Return the field of `SpecialTokens` that a soft token of this kind is."""
    return "video" if kind == "video" and tokenizer.special.video is not None else "image"


def _expand(tokenizer: Tokenizer, text: str, media: Sequence[Medium]) -> str:
    kinds = placeholder_kinds(text)
    for kind in KINDS:
        check_count(kind, sum(medium.kind == kind for medium in media), kinds.count(kind))
    if kinds != [medium.kind for medium in media]:
        got, expected = ", ".join(kinds), ", ".join(medium.kind for medium in media)
        raise ValueError(f"the chat template changes the order of media: got {got}, expected {expected}")
    waiting = iter(media)
    return PLACEHOLDER.sub(lambda _: _expansion(tokenizer, next(waiting)), text)


def _expansion(tokenizer: Tokenizer, medium: Medium) -> str:
    soft = SPELLINGS[_soft_token(tokenizer, medium.kind)]
    runs = [SPELLINGS["boi"] + soft * image.soft_tokens + SPELLINGS["eoi"] for image in medium.images]
    if medium.kind == "image":
        return runs[0]
    return " ".join(f"{time} {run}" for time, run in zip(medium.times, runs, strict=True))


def _blocks(tokenizer: Tokenizer, token_ids: Sequence[int], media: Sequence[Medium]) -> tuple[ImageBlock, ...]:
    """Find the run of every image and frame. Each begins behind a <|image> of its own."""
    blocks: list[ImageBlock] = []
    position = 0
    for medium in media:
        soft = getattr(tokenizer.special, _soft_token(tokenizer, medium.kind))
        for image in medium.images:
            position = token_ids.index(soft, position)
            blocks.append(ImageBlock(medium.kind, position, image))
            position += image.soft_tokens
    return tuple(blocks)
