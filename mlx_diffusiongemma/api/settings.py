"""What the server was told to do. Checked here once; nothing here is read from the environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import check_integer, check_number
from ..pipeline import Pipeline, load
from ..scheduler import EngineOptions

MIB = 2**20
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Settings:
    """Everything that the HTTP layer is configured with.

    Attributes:
        model: what is served unless a request names another: "tiny", a folder or a Hub id.
        models: more of these that requests may name; the one in use is replaced by the one that is asked for.
        aliases: more names of `model`.
        any_model: answer requests for unknown models with `model` instead of 404.
        hub_models: offer the DiffusionGemma checkpoints of the local Hub cache too.
        load: what loads a model, `pipeline.load` or that of a team of ranks.
        load_options: of it.
        engine: how the model is shared.
        lazy: load at the first request rather than at the start.
        api_key: what requests must show; None for nothing.
        hosts: names that the Host header may have, beside the loopback ones and the address of the connection.
        origins: of web pages that may use this server, beside its own page; CORS headers are sent to these alone.
        body_bytes: of a request at most.
        body_seconds: in which a request's body must have arrived.
        send_seconds: for which a client may take no data.
        request_seconds: for one request from when it is queued; None for no limit.
        max_tokens: of an answer whose request does not say.
        max_choices: `n` at most.
        enable_thinking, policy: what holds where a request does not say.
        remote_media: fetch images and videos from public web addresses.
        remote_bytes, remote_seconds: for one of those.
        log_prompts: write prompts and answers to the log.
    """

    model: str = "tiny"
    models: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    any_model: bool = False
    hub_models: bool = False
    load: Callable[..., Pipeline] = field(default=load, repr=False)
    load_options: Mapping[str, Any] = field(default_factory=dict)
    engine: EngineOptions = field(default_factory=EngineOptions)
    lazy: bool = False
    api_key: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    body_bytes: int = 64 * MIB
    body_seconds: float = 30.0
    send_seconds: float = 60.0
    request_seconds: float | None = None
    max_tokens: int = 8192
    max_choices: int = 16
    enable_thinking: bool = False
    policy: str = "exact"
    remote_media: bool = False
    remote_bytes: int = 20 * MIB
    remote_seconds: float = 20.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("body_bytes", "max_tokens", "max_choices", "remote_bytes"):
            check_integer(name, getattr(self, name), 1)
        for name in ("body_seconds", "send_seconds", "remote_seconds"):
            check_number(name, getattr(self, name), 0, exclusive=True)
        if self.request_seconds is not None:
            check_number("request_seconds", self.request_seconds, 0, exclusive=True)
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii() or " " in self.api_key):
            raise ValueError("the API key must be printable ASCII without spaces, and not empty")
