"""A file from wherever the user has it: a path, bytes or a data URL; what `images` and `video` read from.

Nothing is fetched from the network: whoever has a URL downloads it under rules of their own.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from io import BytesIO
from typing import BinaryIO
from urllib.parse import unquote

STREAMS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")  # where a pipe may be: somebody writes into it
MAX_PIPE_BYTES = 2**30
PIECE = 2**20  # characters of base64 that are decoded at a time


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
    if not (path := os.fsdecode(source)):
        raise error(f"{kind}: got an empty path, expected {expected}")
    try:
        return shorten(path), _open(path)
    except (OSError, ValueError) as reason:  # ValueError: a null byte
        text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
        raise error(f"{kind} {shorten(path)} cannot be read: {text}") from None


def is_stream(path: str) -> bool:
    """Say whether a path can be read but once: the end of a pipe that a shell gives, standard input."""
    return path.startswith(STREAMS)


def _open(path: str) -> BinaryIO:
    """Open a file; read a stream to its end, because decoders go back and forth."""
    if not os.path.exists(path):  # as it is first: a name may begin with ~
        path = os.path.expanduser(path)
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or (stat.S_ISFIFO(mode) and is_stream(path))):
        raise ValueError(f"got {_kind(mode)}, expected a file")  # it may have no end, or nobody who writes
    if not is_stream(path):
        return open(path, "rb")
    with open(path, "rb") as stream:
        data = stream.read(MAX_PIPE_BYTES + 1)
    if len(data) > MAX_PIPE_BYTES:
        raise ValueError(f"got more than {MAX_PIPE_BYTES:,} bytes from a pipe")
    return BytesIO(data)


def _kind(mode: int) -> str:
    return "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


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
    if not comma or head.lower().replace(" ", "").rpartition(";")[2] != "base64":
        got = "got a data URL without base64"
        raise error(f"{kind} {shorten(url)}: {got}, expected data:{kind}/...;base64,...")
    try:
        return _from_base64(unquote(payload))
    except (binascii.Error, ValueError) as reason:
        raise error(f"{kind} {shorten(url)}: the data URL is not valid base64: {reason}") from None


def _from_base64(text: str) -> bytes:
    """Decode base64 or base64url, with or without white space and padding, in pieces: other threads have their turn."""
    text = text.rstrip("= \t\r\n")
    if "=" in text:
        raise binascii.Error("padding before the end")
    data, rest = bytearray(), ""
    for start in range(0, len(text), PIECE):
        rest += "".join(text[start : start + PIECE].split()).replace("-", "+").replace("_", "/")
        whole = len(rest) - len(rest) % 4
        data += base64.b64decode(rest[:whole], validate=True)
        rest = rest[whole:]
    return bytes(data + base64.b64decode(rest + "=" * (-len(rest) % 4), validate=True))
