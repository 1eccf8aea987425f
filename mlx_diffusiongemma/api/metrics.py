"""Prometheus metrics and the log of requests. Labels are bounded: routes, methods, codes and reasons, never text."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..scheduler import EngineStats
from .service import Answer, Done

PREFIX = "mlx_diffusiongemma_"
METHODS = ("GET", "POST", "DELETE", "OPTIONS", "HEAD", "PUT", "PATCH")
QUIET = ("/health", "/healthz", "/metrics")  # asked all the time: not logged unless they fail
MAX_LOGGED = 4000  # characters of one text
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)

logger = logging.getLogger("mlx_diffusiongemma.server")


class _EngineCollector(Collector):
    """What the engine reports, read when somebody asks."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield _gauge("model_loaded", "Whether a model is in memory.", stats is not None and stats.loaded)
        if stats is None:
            return
        running = stats.prefilling + stats.waiting + stats.denoising
        yield _gauge("requests_running", "Requests that hold a prefix.", running)
        yield _gauge("requests_queued", "Requests that wait to begin.", stats.queued)
        yield _gauge("active_memory_bytes", "Memory in use by MLX.", stats.active_memory_gb * 1e9)
        yield _gauge("cache_memory_bytes", "Memory that MLX keeps for reuse.", stats.cache_memory_gb * 1e9)
        yield _gauge("peak_memory_bytes", "Most memory that MLX has used.", stats.peak_memory_gb * 1e9)
        counts = stats.counts
        for name, gloss, value in (
            ("requests_refused", "Requests that found the queue full.", counts.refused),
            ("requests_completed", "Requests that ended by themselves.", counts.completed),
            ("requests_cancelled", "Requests that were given up.", counts.cancelled),
            ("requests_failed", "Requests that ended with an error of the model.", counts.failed),
            ("model_loads", "Times the model was loaded.", counts.loads),
            ("engine_restarts", "Times the model thread was replaced.", counts.restarts),
            ("denoising_steps", "Denoising steps, of one or more canvases.", counts.steps),
            ("denoising_rows", "Canvases denoised in those steps.", counts.rows),
        ):
            yield CounterMetricFamily(PREFIX + name, gloss, value=value)


def _gauge(name: str, gloss: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, gloss, value=float(value))


class Metrics:
    """Counts of one server."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        """Bind what gives the engine's statistics."""
        self._registry = registry = CollectorRegistry()
        registry.register(_EngineCollector(stats))
        self._http = Counter(
            PREFIX + "http_requests", "HTTP requests.", ("route", "method", "status"), registry=registry
        )
        self._http_seconds = Histogram(
            PREFIX + "http_seconds", "Seconds of HTTP requests.", ("route",), buckets=SECONDS, registry=registry
        )
        self._answers = Counter(PREFIX + "answers", "Answers that ended.", ("finish_reason",), registry=registry)
        self._tokens = {
            name: Counter(f"{PREFIX}{name}_tokens", f"{gloss}.", registry=registry)
            for name, gloss in (
                ("prompt", "Tokens of prompts"),
                ("cached", "Tokens of prompts that were known"),
                ("generated", "Tokens of answers"),
            )
        }
        self._seconds = {
            name: Histogram(f"{PREFIX}{name}_seconds", gloss, buckets=SECONDS, registry=registry)
            for name, gloss in (
                ("queue", "Seconds before the first event."),
                ("first_draft", "Seconds from the first event to the first draft."),
                ("prefill", "Seconds of encoding the prompt."),
                ("denoising", "Seconds of denoising."),
            )
        }
        self._steps = Histogram(
            PREFIX + "steps_per_canvas",
            "Denoising steps of a canvas.",
            buckets=(1, 2, 4, 8, 12, 16, 24, 32, 48, 64),
            registry=registry,
        )

    def page(self) -> bytes:
        """Return the text of /metrics."""
        return generate_latest(self._registry)

    def note_http(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count an HTTP request."""
        self._http.labels(route, method if method in METHODS else "other", str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def note_answer(self, answer: Answer, done: Done) -> None:
        """Count an answer that ended, and log its numbers."""
        stats = done.result.stats
        self._answers.labels(done.finish_reason).inc()
        self._tokens["prompt"].inc(stats.prompt_tokens)
        self._tokens["cached"].inc(stats.cached_tokens)
        self._tokens["generated"].inc(stats.generated_tokens)
        self._seconds["queue"].observe(stats.queue_seconds)
        self._seconds["prefill"].observe(stats.prefill_seconds)
        self._seconds["denoising"].observe(stats.denoising_seconds)
        if stats.first_draft_seconds is not None:
            self._seconds["first_draft"].observe(stats.first_draft_seconds)
        for steps in stats.denoising_steps:
            self._steps.observe(steps)
        logger.info(
            "answer",
            extra={
                "fields": {
                    "model": answer.model,
                    "finish_reason": done.finish_reason,
                    "prompt_tokens": stats.prompt_tokens,
                    "cached_tokens": stats.cached_tokens,
                    "generated_tokens": stats.generated_tokens,
                    "canvases": stats.canvases,
                    "steps": sum(stats.denoising_steps),
                    "queue_seconds": round(stats.queue_seconds, 4),
                    "total_seconds": round(stats.total_seconds, 4),
                }
            },
        )


def log_texts(answer: Answer, done: Done) -> None:
    """Write a prompt and its answer to the log, long texts shortened."""
    result = done.result
    texts = {"messages": _shortened(answer.ask.messages), "text": result.text, "reasoning": result.reasoning}
    logger.info("texts", extra={"fields": {"model": answer.model, **texts}})


def _shortened(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_LOGGED:
        return f"{value[:MAX_LOGGED]}... ({len(value):,} characters)"
    if isinstance(value, Mapping):
        return {name: _shortened(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shortened(item) for item in value]
    return value if isinstance(value, str | int | float | None) else f"({type(value).__name__})"


class Observer:
    """ASGI middleware, the outermost: an id for every request, a line in the log, a count."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, began, status = uuid.uuid4().hex, time.perf_counter(), 499  # nothing was sent: the client left

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            seconds, route = time.perf_counter() - began, route_of(scope)
            self._metrics.note_http(route, scope["method"], status, seconds)
            quiet = route in QUIET and status < 400
            fields = {
                "id": request_id,
                "method": scope["method"],
                "route": route,
                "status": status,
                "seconds": round(seconds, 4),
            }
            logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})


def route_of(scope: Scope) -> str:
    """Return the pattern of the route that a request took: few of them exist, unlike paths."""
    route: Any = scope.get("route")
    return str(getattr(route, "path", "unmatched"))
