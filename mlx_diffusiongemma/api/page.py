"""The web page at `/` and its files: what may be fetched, and the headers that keep the page to this server.

The files are in `web/`. They are read once, so a request can name no other file, and they need no key: the page asks
for one when the API does.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

from .errors import ApiError

FOLDER = Path(__file__).parent / "web"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",  # ask every time, so that an update shows at once; the tag makes that cheap
}


@dataclass(frozen=True)
class Asset:
    """One file of the page."""

    body: bytes
    media_type: str
    tag: str

    def response(self, request: Request) -> Response:
        """Return the file, or 304 where the browser has it."""
        headers = {**HEADERS, "ETag": self.tag}
        if request.headers.get("if-none-match") == self.tag:
            return Response(status_code=304, headers=headers)
        return Response(self.body, media_type=self.media_type, headers=headers)


def read_assets(folder: Path = FOLDER) -> dict[str, Asset]:
    """Return the files of the page by name."""
    return {path.name: _read(path) for path in sorted(folder.iterdir()) if path.suffix in MEDIA_TYPES}


def _read(path: Path) -> Asset:
    body = path.read_bytes()
    return Asset(body, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def make_router() -> APIRouter:
    """Return the routes of the page: `/`, and `/web/NAME` for its files."""
    router = APIRouter(include_in_schema=False)
    assets = read_assets()

    @router.get("/")
    async def index(request: Request) -> Response:
        return assets["index.html"].response(request)

    @router.get("/web/{name}")
    async def asset(name: str, request: Request) -> Response:
        if name not in assets:
            raise ApiError(404, f"got {name[:100]!r}, expected one of {', '.join(assets)}", code="not_found")
        return assets[name].response(request)

    return router
