"""The application: routers, errors in the dialect of the path, /health, the page."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from .. import __version__
from ..sources import shorten
from . import openai
from .errors import ApiError, from_exception
from .replies import json_reply
from .service import Service

PAGE_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src data: blob:; "
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def make_app(service: Service) -> FastAPI:
    """Return the application that serves a service."""
    app = FastAPI(title="mlx_diffusiongemma", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    # One line per dialect.
    app.include_router(openai.router)
    _add_errors(app)
    _add_health(app, service)
    _add_page(app)
    return app


def _add_errors(app: FastAPI) -> None:
    def reply(request: Request, error: ApiError) -> Response:
        return json_reply(error.spelled_for(request.url.path), error.status, error.headers)

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return reply(request, error)

    @app.exception_handler(RequestValidationError)
    async def on_bad_body(request: Request, error: RequestValidationError) -> Response:
        return reply(request, describe(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {shorten(request.url.path)}: {error.detail}"
        response = reply(
            request, ApiError(error.status_code, message, code="not_found" if error.status_code == 404 else None)
        )
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def on_mistake(request: Request, error: Exception) -> Response:
        return reply(request, from_exception(error))


def describe(problem: dict[str, Any]) -> ApiError:
    """Return the error for what pydantic found first."""
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {problem.get('ctx', {}).get('error', '')}", code="invalid_json")
    path = [str(part) for part in problem["loc"] if part != "body"]
    name = ".".join(path) or None
    got = "nothing" if problem["type"] == "missing" else shorten(repr(problem.get("input")))
    message = f"{name or 'the body'}: got {got}, expected: {problem['msg']}"
    return ApiError(400, message, param=name, code="invalid_value")


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    @app.get("/healthz", include_in_schema=False)
    async def health() -> Response:
        """Tell whether requests are served now: 503 while the model is being loaded."""
        if service.is_ready:
            return json_reply({"status": "ok"})
        error = {"code": 503, "message": "Loading model", "type": "unavailable_error"}
        return json_reply({"error": error}, 503, {"Retry-After": "2"})


def _add_page(app: FastAPI) -> None:
    assets = {
        file.name: file for file in (files(__package__) / "web").iterdir() if Path(file.name).suffix in PAGE_TYPES
    }

    def page(name: str) -> Response:
        if name not in assets:  # names of files and nothing else: no path can lead out of the folder
            raise HTTPException(404, "Not Found")
        return Response(assets[name].read_bytes(), 200, PAGE_HEADERS, PAGE_TYPES[Path(name).suffix])

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page("index.html")

    @app.get("/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        return page(name)
