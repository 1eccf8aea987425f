"""Images and videos that messages refer to.

Data URLs go to the engine as they are. Web addresses are refused unless the operator allowed them, then fetched from
public addresses only. Nothing else is opened: no file of this machine, no private network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..parts import MEDIA_TYPES, SOURCE_KEYS
from ..sources import shorten
from .errors import refuse
from .settings import Settings


async def resolve_media(messages: Sequence[Any], settings: Settings) -> list[Any]:
    """Return messages whose images and videos are data URLs or bytes. Raise `ApiError` for other addresses."""
    return [await _resolve_message(f"messages[{index}]", message, settings) for index, message in enumerate(messages)]


async def _resolve_message(where: str, message: Any, settings: Settings) -> Any:
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    parts = [await _resolve_part(f"{where}.content[{i}]", part, settings) for i, part in enumerate(content)]
    return {**message, "content": parts}


async def _resolve_part(where: str, part: Any, settings: Settings) -> Any:
    kind = (
        MEDIA_TYPES.get(part.get("type")) if isinstance(part, Mapping) and isinstance(part.get("type"), str) else None
    )
    if kind is None:
        return part
    for key in SOURCE_KEYS[kind]:
        value = part.get(key)
        url = value.get("url") if isinstance(value, Mapping) else value
        if url is None:
            continue
        if isinstance(url, str) and url[:5].lower() == "data:":
            return part
        raise refuse(f"{where}.{key}", f"got {shorten(str(url))}, expected a data URL: nothing is fetched")
    raise refuse(where, f"got a part of type {part['type']!r} without an address, expected a data URL")
