"""The application: routers, errors in the dialect of the path, /health, /metrics, and the guard before all of them."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response

from .. import __version__
from ..sources import shorten
from . import anthropic, decisions, infill, lmstudio, lmstudio_chat, openai, page, responses
from .errors import ApiError, from_exception, short
from .limits import Guard
from .metrics import Metrics, Observer, log_texts
from .replies import json_reply
from .service import Service


def make_app(service: Service) -> FastAPI:
    """Return the application that serves a service."""
    app = FastAPI(title="mlx_diffusiongemma", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    # One line per dialect.
    app.include_router(openai.router)
    app.include_router(responses.make_router())
    app.include_router(infill.router)
    app.include_router(anthropic.router)
    app.include_router(decisions.router)
    app.include_router(lmstudio.router)
    app.include_router(lmstudio_chat.make_router())
    app.include_router(page.make_router())
    _add_errors(app)
    metrics = Metrics(service.stats)
    service.listeners.append(metrics.note_answer)
    if service.settings.log_prompts:
        service.listeners.append(log_texts)
    _add_health(app, service, metrics)
    # The one that is added last comes first.
    app.add_middleware(Guard, settings=service.settings)
    app.add_middleware(Observer, metrics=metrics)
    return app


def _add_errors(app: FastAPI) -> None:
    def reply(request: Request, error: ApiError) -> Response:
        return json_reply(error.spelled_for(request.url.path, request.headers), error.status, error.headers)

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
    place = [part for part in problem["loc"] if part != "body"]
    # What follows a name are places in a list, then pydantic's own names of alternatives.
    items = takewhile(lambda part: isinstance(part, int), place[1:])
    name = f"{place[0]}{''.join(f'[{item}]' for item in items)}" if place else None
    got = "nothing" if problem["type"] == "missing" else short(problem.get("input"))
    if isinstance(problem.get("input"), bytes):
        return ApiError(415, "the body: expected JSON, with Content-Type: application/json", code="invalid_json")
    message = f"{name or 'the body'}: got {got}, expected: {problem['msg']}"
    return ApiError(400, message, param=name, code="invalid_value")


def _add_health(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.api_route("/healthz", methods=["GET", "HEAD"], include_in_schema=False)
    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        """Tell whether requests are served now: 503 while the model is being loaded."""
        if service.is_ready:
            return json_reply({"status": "ok"})
        error = {"code": 503, "message": "Loading model", "type": "unavailable_error"}
        return json_reply({"error": error}, 503, {"Retry-After": "2"})

    @app.get("/metrics", include_in_schema=False)
    async def numbers() -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)
