"""Content parts of messages: which there are, and where their images and videos come from.

A part with an image becomes `{"type": "image"}`, which every chat template knows, and keeps its source beside it under
`SOURCE` until `take_media` collects the sources of a conversation. Nothing is opened here.

Messages may come from strangers, through a server: text inside them is taken as a data URL and as nothing else, so that
no message reads a file of this machine or makes it fetch an address. Paths belong into `images=` and `videos=`.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .sources import shorten

Kind = Literal["image", "video"]
Message = dict[str, Any]

KINDS: tuple[Kind, ...] = ("image", "video")
# Types of parts in OpenAI's dialects and Hugging Face's, and the keys under which they keep what is shown.
MEDIA_TYPES: dict[str, Kind] = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
    "input_video": "video",
}
SOURCE_KEYS: dict[Kind, tuple[str, ...]] = {
    "image": ("image", "image_url", "url"),
    "video": ("video", "video_url", "url"),
}
# Keys that mean some content: those above, and what other programs read. The rest is not for us: `detail`, a cache.
CONTENT_KEYS = frozenset({key for keys in SOURCE_KEYS.values() for key in keys})
CONTENT_KEYS |= {"path", "file_id", "source", "data", "base64"}
TEXT_TYPES = ("text", "input_text")
SOUND = ("audio", "audio_url", "input_audio")
SOURCE = "source"


@dataclass(frozen=True, eq=False)
class Source:
    """An image or a video of a prompt before it is read. `where` names it in errors."""

    kind: Kind
    content: Any  # an `images.ImageSource` or a `video.VideoSource`; None while it waits for `images=` or `videos=`
    where: str


def check_part(where: str, role: str, part: Any) -> Message:
    """Check one part of a message's content; return what templates know, sources beside it."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in SOUND:
        raise ValueError(f"{where}: got a part of type {kind!r}, expected text, image or video: this model is deaf")
    if kind in MEDIA_TYPES:
        return _check_media(where, role, part)
    if kind not in TEXT_TYPES:
        expected = '{"type": "text", "text": "..."}'
        raise ValueError(f"{where} must be a part like {expected}, of type text, image or video, got {_short(part)}")
    if not isinstance(text := part.get("text"), str):
        raise ValueError(f"{where}.text must be text, got {type(text).__name__}")
    return {"type": "text", "text": text}


def _check_media(where: str, role: str, part: Mapping[str, Any]) -> Message:
    kind = MEDIA_TYPES[part["type"]]
    if role not in ("user", "tool"):
        raise ValueError(f"{where}: got {part['type']!r} in a message of role {role!r}, expected it in user or tool")
    keys = SOURCE_KEYS[kind]
    given = {key: value for key, value in part.items() if key in CONTENT_KEYS and value is not None}
    if len(given) > 1 or set(given) - set(keys):
        raise ValueError(f"{where}: got {', '.join(map(repr, given))}, expected one of {', '.join(map(repr, keys))}")
    content = next(iter(given.values()), None)
    if isinstance(content, Mapping):  # OpenAI's {"url": ..., "detail": ...}
        content = content.get("url")
    if content is None and part["type"] != kind:
        raise ValueError(f'{where}: got no address, expected {{"type": "{part["type"]}", "{keys[1]}": {{"url": ...}}}}')
    _refuse_addresses(where, kind, content)
    return {"type": kind, SOURCE: Source(kind, content, where)}


def _refuse_addresses(where: str, kind: Kind, content: Any) -> None:
    """Raise ValueError for text that is not a data URL, in lists of frames too."""
    if isinstance(content, str) and content[:5].lower() != "data:":
        problem = f"{where}: got the address {shorten(content)}, expected a data URL"
        raise ValueError(f"{problem}: what a message names is not opened; give files through {kind}s=")
    if isinstance(content, list | tuple):
        for item in content:
            _refuse_addresses(where, kind, item)


def media_count(messages: Sequence[Message]) -> int:
    """Return how many images and videos checked messages have."""
    return len(_sources(messages))


def take_media(messages: Sequence[Message], given: Mapping[Kind, Sequence[Any]]) -> tuple[list[Message], list[Source]]:
    """Give every part of checked messages its source.

    A list fills the parts of its kind that came without content, in order. Where there is no part of its kind at all,
    it goes in front of the text of the last user message.

    Returns:
        the messages as templates want them, and the sources in the order of their parts.

    Raises:
        ValueError: a list that is longer or shorter than the parts it fills.
    """
    chat = list(messages)
    present = {source.kind for source in _sources(chat)}
    for kind in reversed(KINDS):  # images end up in front of videos
        if given[kind] and kind not in present:
            _put_in_front(chat, kind, len(given[kind]))
    sources = _sources(chat)
    for kind in KINDS:
        empty = sum(source.kind == kind and source.content is None for source in sources)
        if empty != len(given[kind]):
            raise ValueError(
                f"{kind}s: got {len(given[kind])}, expected {empty}, one for every {kind} part without content"
            )
    waiting = {kind: iter(_as_sources(kind, given[kind])) for kind in KINDS}
    found = [next(waiting[source.kind]) if source.content is None else source for source in sources]
    return [_plain(message) for message in chat], found


def as_list(kind: Kind, value: Any) -> list[Any]:
    """Return `images=` or `videos=` as a list; a single image or file may stand without one."""
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return list(value)
    if kind == "image" or isinstance(value, str | bytes | os.PathLike):
        return [value]
    raise ValueError(f"{kind}s: got {type(value).__name__}, expected a list of {kind}s")


def match_placeholders(kinds: Sequence[Kind], given: Mapping[Kind, Sequence[Any]]) -> list[Source]:
    """Return the sources for the placeholders of a raw prompt. Raise ValueError unless there are as many of each."""
    waiting = {kind: iter(_as_sources(kind, given[kind])) for kind in KINDS}
    for kind in KINDS:
        check_count(kind, len(given[kind]), kinds.count(kind))
    return [next(waiting[kind]) for kind in kinds]


def check_count(kind: Kind, media: int, placeholders: int) -> None:
    """Raise ValueError unless a prompt has one placeholder for each image or video."""
    if media != placeholders:
        raise ValueError(f"{kind}s: got {media}, expected {placeholders}: the prompt has {placeholders} <|{kind}|>")


def _as_sources(kind: Kind, contents: Sequence[Any]) -> list[Source]:
    return [Source(kind, content, f"{kind}s[{index}]") for index, content in enumerate(contents)]


def _put_in_front(chat: list[Message], kind: Kind, count: int) -> None:
    """Put empty parts in front of the last user message's content."""
    last = next((index for index in reversed(range(len(chat))) if chat[index]["role"] == "user"), None)
    if last is None:
        raise ValueError(f"{kind}s: got {count}, expected none: there is no user message to show them in")
    content = chat[last]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    empty = [{"type": kind, SOURCE: Source(kind, None, f"{kind}s")} for _ in range(count)]
    chat[last] = {**chat[last], "content": [*empty, *parts]}


def _parts(message: Message) -> Sequence[Message]:
    content = message["content"]
    return () if isinstance(content, str) else content


def _sources(chat: Sequence[Message]) -> list[Source]:
    return [part[SOURCE] for message in chat for part in _parts(message) if SOURCE in part]


def _plain(message: Message) -> Message:
    """Return a message without sources: what a template may see is plain data."""
    if not any(SOURCE in part for part in _parts(message)):
        return message
    return {**message, "content": [{k: v for k, v in part.items() if k != SOURCE} for part in _parts(message)]}


def _short(value: Any) -> str:
    """Return a representation that does not show megabytes of base64."""
    return reprlib.repr(dict(value) if isinstance(value, Mapping) else value)
