"""Images and videos that messages refer to.

Data URLs go to the engine as they are. Web addresses are refused unless the operator allowed them, then fetched from
public addresses only, within bounds of size and time. Nothing else is opened: no file, no private network.
"""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from ..parts import MEDIA_TYPES, SOURCE_KEYS
from ..sources import shorten
from .errors import refuse
from .settings import Settings

MAX_REDIRECTS = 3
MAX_REMOTE = 16  # addresses in one request
PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # public in name, and may lead to any IPv4 address


class RemoteError(Exception):
    """What is behind an address cannot be had; the message goes to the client."""


async def resolve_media(messages: Sequence[Any], settings: Settings) -> list[Any]:
    """Return messages whose images and videos are data URLs or bytes. Raise `ApiError` for other addresses."""
    remote = 0
    resolved = []
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list):
            resolved.append(message)
            continue
        parts = []
        for place, part in enumerate(content):
            where = f"messages[{index}].content[{place}]"
            found = _address(where, part)
            if found is not None:
                remote += 1
                part = await _fetched(where, part, *found, settings, remote)
            parts.append(part)
        resolved.append({**message, "content": parts})
    return resolved


def _address(where: str, part: Any) -> tuple[str, str] | None:
    """Return the key and the address of a part that is not a data URL; None for other parts."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind not in MEDIA_TYPES:
        return None
    for key in SOURCE_KEYS[MEDIA_TYPES[kind]]:
        value = part.get(key)
        url = value.get("url") if isinstance(value, Mapping) else value
        if url is None:
            continue
        if not isinstance(url, str):
            raise refuse(f"{where}.{key}", f"got {type(url).__name__}, expected a data URL")
        return None if url[:5].lower() == "data:" else (key, url)
    raise refuse(where, f"got a part of type {kind!r} without an address, expected a data URL")


async def _fetched(
    where: str, part: Mapping[str, Any], key: str, url: str, settings: Settings, number: int
) -> dict[str, Any]:
    """Return a part with the content of its address."""
    name = f"{where}.{key}"
    if not settings.remote_media:
        raise refuse(name, f"got {shorten(url)}, expected a data URL: this server fetches nothing (see --remote-media)")
    if number > MAX_REMOTE:
        raise refuse(name, f"got more than {MAX_REMOTE} addresses in one request")
    try:
        data = await asyncio.to_thread(fetch, url, settings.remote_bytes, settings.remote_seconds)
    except RemoteError as error:
        raise refuse(name, f"got {shorten(url)}: {error}", "remote_media_failed") from None
    kind = MEDIA_TYPES[part["type"]]
    return {"type": kind, kind: data}


def fetch(url: str, max_bytes: int, seconds: float) -> bytes:
    """Return what is behind a public web address. Raise `RemoteError`."""
    end = time.monotonic() + seconds
    for _ in range(MAX_REDIRECTS + 1):
        found = _fetch_once(url, max_bytes, end)
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise RemoteError(f"expected at most {MAX_REDIRECTS} redirections")


def _fetch_once(url: str, max_bytes: int, end: float) -> bytes | str:
    """Return the content, or the address that the server names instead."""
    parts = _split(url)
    connection = _connect(parts, end)
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Host": parts.netloc, "Accept": "image/*,video/*"})
        reply = connection.getresponse()
        if reply.status in REDIRECTS:
            return reply.headers.get("Location", "")
        if reply.status != 200:
            raise RemoteError(f"got HTTP status {reply.status}, expected 200")
        data = bytearray()
        while chunk := reply.read1(65536):
            data += chunk
            if len(data) > max_bytes:
                raise RemoteError(f"expected at most {max_bytes:,} bytes")
            if time.monotonic() > end:
                raise RemoteError("it took too long")
        return bytes(data)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise RemoteError(f"it cannot be fetched ({type(error).__name__})") from None
    finally:
        connection.close()


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises for one that is no number
    except ValueError:
        raise RemoteError("expected an http or https address") from None
    if parts.scheme not in PORTS or not parts.hostname:
        raise RemoteError("expected an http or https address")
    if parts.username is not None or parts.password is not None:
        raise RemoteError("expected an address without a user name")
    return parts


def _connect(parts: SplitResult, end: float) -> http.client.HTTPConnection:
    """Connect to the very address that was found to be public: a name may mean another one the next moment."""
    host, port = str(parts.hostname), parts.port or PORTS[parts.scheme]
    left = max(0.1, end - time.monotonic())
    try:
        address = public_address(host, port)
        connected = socket.create_connection((address, port), timeout=left)
        if parts.scheme == "https":
            connected = ssl.create_default_context().wrap_socket(connected, server_hostname=host)
    except (OSError, UnicodeError) as error:
        raise RemoteError(f"it cannot be reached ({type(error).__name__})") from None
    connection = http.client.HTTPConnection(host, port, timeout=left)
    connection.sock = connected
    return connection


def public_address(host: str, port: int) -> str:
    """Return the IP address of a name. Raise `RemoteError` when any of its addresses is not public."""
    if port not in PORTS.values():
        raise RemoteError(f"got port {port}, expected {' or '.join(map(str, PORTS.values()))}")
    found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not found or not all(is_public(address) for address in found):
        raise RemoteError("expected a public address")
    return found[0]


def is_public(address: str) -> bool:
    """Tell whether an IP address is one of the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in NAT64 or ip.sixtofour is not None or ip.teredo is not None:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved
