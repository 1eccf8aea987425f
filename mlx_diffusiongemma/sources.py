"""A file from wherever the user has it: a path, bytes or a data URL; what `images` and `video` read from.

Nothing is fetched from the network: whoever has a URL downloads it under rules of their own.
"""

from __future__ import annotations

import base64
import binascii
import os
from io import BytesIO
from pathlib import Path
from typing import BinaryIO


def open_source(source: object, kind: str, error: type[ValueError], expected: str) -> tuple[str, BinaryIO]:
    """Return a name for messages and the open file, for the caller to close.

    Args:
        source: a path, the bytes of a file, or a data URL in base64 (its media type is not read: the content decides).
        kind: what it should be, as a word for messages: "image".
        error: what is raised, with a message of one line.
        expected: what the caller takes, for the message about anything else.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        return f"of {len(data):,} bytes", BytesIO(data)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return f"in a data URL {shorten(source)}", BytesIO(_data_url(source, kind, error))
    if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        raise error(f"{kind} {shorten(source)}: got a web address, expected a file: {kind}s are not fetched")
    if not isinstance(source, str | os.PathLike):
        raise error(f"{kind}: got {type(source).__name__}, expected {expected}")
    name = shorten(os.fsdecode(source))
    try:
        return name, Path(os.fsdecode(source)).expanduser().open("rb")
    except (OSError, ValueError, RuntimeError) as reason:  # ValueError: a null byte; RuntimeError: nobody's home
        text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
        raise error(f"{kind} {name} cannot be read: {text}") from None


def shorten(text: str) -> str:
    """Return a name fit for a message of one line: control characters escaped, the middle of a long one left out."""
    text = text if len(text) <= 80 else f"{text[:50]}...{text[-20:]}"
    return repr(text)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, its type where it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _data_url(url: str, kind: str, error: type[ValueError]) -> bytes:
    """Return the bytes in `data:image/png;base64,...`."""
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        got = "got a data URL without base64"
        raise error(f"{kind} {shorten(url)}: {got}, expected data:{kind}/...;base64,...")
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as reason:
        raise error(f"{kind} {shorten(url)}: the data URL is not valid base64: {reason}") from None
