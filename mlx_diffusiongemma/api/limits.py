"""Who may ask, and how much: an ASGI middleware in front of everything else.

    Host      a name that this server is known by: a page that rebinds its own name to 127.0.0.1 gets nothing
    Origin    this server's own page, or a page that was allowed; other pages get nothing, not even a side effect
    key       compared in constant time, in `Authorization: Bearer` or `x-api-key`
    body      read here to its end, within bounds of size and time

Heads of requests (slow, or too long) are bounded in `host.py`, before there is a request.
"""

from __future__ import annotations

import asyncio
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .replies import json_reply
from .settings import LOOPBACK, Settings

# Paths without a key: whether the server lives, and the page, which asks for the key. They hold nothing of anybody.
PUBLIC_PATHS = ("/", "/health", "/healthz")
PUBLIC_FOLDER = "/web/"
METHODS = "GET, POST, DELETE, OPTIONS"
ALLOWED_HEADERS = "authorization, content-type, x-api-key, anthropic-version, anthropic-beta"
PREFLIGHT_SECONDS = "600"


class Guard:
    """Lets a request through, or answers it with an error in its dialect."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        """Bind what is behind."""
        self._app = app
        self._settings = settings
        self._hosts = frozenset(_host(name) for name in (*LOOPBACK, *settings.hosts))
        self._origins = frozenset(origin.rstrip("/").lower() for origin in settings.origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(scope, headers)
            origin = self._check_origin(headers)
            if origin is not None:
                send = _with_cors(send, origin)
                if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                    await _preflight(scope, receive, send)
                    return
            self._check_key(scope, headers)
            body = await self._read_body(headers, receive)
        except ApiError as error:
            reply = json_reply(error.spelled_for(scope["path"], headers), error.status, error.headers)
            await reply(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        got = headers.getlist("host")
        server = scope.get("server")
        address = _host(server[0]) if server else None
        if len(got) != 1 or not ((host := _host(_without_port(got[0]))) in self._hosts or host == address):
            name = got[0] if len(got) == 1 else got
            message = f"Host: got {name!r}, expected a name of this server (see --allowed-host)"
            raise ApiError(403, message, code="host_not_allowed")

    def _check_origin(self, headers: Headers) -> str | None:
        """Return the foreign page that is allowed to read the reply; None for no page, or our own."""
        origin = headers.get("origin")
        if origin is None or _is_own(origin, headers["host"]):
            return None
        if origin.lower() not in self._origins:
            message = f"Origin: got {origin!r}, expected this server's own page or none (see --allowed-origin)"
            raise ApiError(403, message, code="origin_not_allowed")
        return origin

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        key = self._settings.api_key
        if key is None or (scope["method"] in ("GET", "HEAD") and _is_public(scope["path"])):
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not hmac.compare_digest(given.encode(), key.encode()):
            got = "a wrong one" if given else "none"
            message = f"API key: got {got}, expected the server's in 'Authorization: Bearer ...' or 'x-api-key'"
            raise ApiError(401, message, type="authentication_error", code="invalid_api_key")

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes | None:
        """Return the whole body; None when the client leaves before its end."""
        limit, seconds = self._settings.body_bytes, self._settings.body_seconds
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            raise _too_large(int(length), limit)
        body = bytearray()
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise _too_large(len(body), limit)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {seconds:g} s", code="body_timeout") from None


def _is_public(path: str) -> bool:
    return path in PUBLIC_PATHS or path.startswith(PUBLIC_FOLDER)


def _too_large(got: int, limit: int) -> ApiError:
    return ApiError(413, f"the body has {got:,} bytes or more, expected at most {limit:,}", code="body_too_large")


def _host(name: str) -> str:
    """Return the form in which host names are compared."""
    return name.strip().lower().strip("[]").rstrip(".")


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() and (name.endswith("]") or ":" not in name) else host


def _is_own(origin: str, host: str) -> bool:
    """Tell whether a page comes from the address that it asks."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return what gives the body in one piece, and then what the client does."""
    pending = True

    async def receive_again() -> Message:
        nonlocal pending
        if pending:
            pending = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return receive_again


def _with_cors(send: Send, origin: str) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = "x-request-id, retry-after"
            headers.add_vary_header("Origin")
        await send(message)

    return send_with_headers


async def _preflight(scope: Scope, receive: Receive, send: Send) -> None:
    reply = json_reply({}, 200, {
        "Access-Control-Allow-Methods": METHODS,
        "Access-Control-Allow-Headers": ALLOWED_HEADERS,
        "Access-Control-Max-Age": PREFLIGHT_SECONDS,
    })  # fmt: skip
    await reply(scope, receive, send)
