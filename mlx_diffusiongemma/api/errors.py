"""Errors of the server, and how each dialect spells them.

What the engine raises becomes an `ApiError` in `from_exception`; nothing else decides which status an error has.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any

from ..handle import EngineError
from ..memory import MemoryLimitError
from ..scheduler import EngineClosedError, QueueFullError

ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}
# The field that an engine's message begins with: "temperature: got ...", "messages[0].content must be ...".
FIELD = re.compile(
    r"(messages|tools|temperature|top_p|top_k|min_p|seed|stop|max_tokens|max_denoising_steps|entropy_bound|t_min|t_max"
    r"|confidence_threshold|stability_threshold|policy|ttl|image_tokens|fps|video_frames|response_format|regex|lark|choices"
    r"|tool_choice|parallel_tool_calls|logprobs|state|forwards|content_free|calibration_temperature"
    r"|selection|instruction)\b(?:\[\d+\]|\.\w+)*"
)


class ApiError(Exception):
    """What a client is told when a request cannot be served.

    Attributes:
        status: of HTTP.
        message: one line with the value got and the values allowed.
        type: OpenAI's `error.type`.
        param: the field that is to blame.
        code: a short name for programs.
        retry_after: seconds after which it makes sense to try again; None where it does not.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = " ".join(message.split())
        self.type = type or ("server_error" if status >= 500 else "invalid_request_error")
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the response."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def openai(self) -> dict[str, Any]:
        """Return the body in OpenAI's form."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        """Return the body in Anthropic's form."""
        kind = ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def lmstudio(self) -> dict[str, Any]:
        """Return the body in the form of LM Studio's REST v1."""
        kind = {404: "model_not_found", 501: "not_implemented"}.get(self.status)
        kind = kind or ("internal_error" if self.status >= 500 else "invalid_request")
        return {"error": {"type": kind, "message": self.message, "code": self.code, "param": self.param}}

    def spelled_for(self, path: str, headers: Mapping[str, str]) -> dict[str, Any]:
        """Return the body in the dialect of a request."""
        if path.startswith("/v1/messages") or is_anthropic(headers):
            return self.anthropic()
        return self.lmstudio() if path.startswith("/api/v1/") else self.openai()


def is_anthropic(headers: Mapping[str, str]) -> bool:
    """Tell whether a client of Anthropic asks, on paths that other dialects have too."""
    return "anthropic-version" in headers


def refuse(param: str, message: str, code: str | None = "unsupported_value") -> ApiError:
    """Return the error for a field that cannot be what it is; the message need not repeat the field's name."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def short(value: Any) -> str:
    """Return what was got, for messages, without repeating a whole request."""
    return "nothing" if value is None else reprlib.repr(value)


def from_exception(error: BaseException) -> ApiError:
    """Return what a client is told about an error of the engine, or about a mistake of ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(503, str(error), type="overloaded_error", code="queue_full", retry_after=5)
    if isinstance(error, EngineClosedError):
        return shutting_down()
    if isinstance(error, MemoryLimitError):
        return ApiError(400, str(error), code="insufficient_memory")
    if isinstance(error, ValueError):
        field = FIELD.match(str(error))
        too_long = str(error).startswith("the prompt has ")
        return ApiError(
            400,
            str(error),
            param="messages" if too_long else field and field[0],
            code="context_length_exceeded" if too_long else "invalid_value",
        )
    if isinstance(error, EngineError | RuntimeError | OSError | FloatingPointError):
        return ApiError(500, f"the model failed: {error}", code="model_failed")
    return ApiError(500, f"internal error: {type(error).__name__}", code="internal_error")


def shutting_down() -> ApiError:
    """Return the error for requests that the end of the server cuts off."""
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=10)
