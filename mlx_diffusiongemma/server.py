"""Command line: serve a model over HTTP, to programs that know OpenAI, Anthropic or LM Studio, and to the browser.

    python -m mlx_diffusiongemma.server --model tiny

Standard output carries one line of JSON, when requests are served: {"event": "ready", "url": ..., ...}; standard error
the log, one JSON object per line, without any text of prompts or answers unless asked for. Exit codes: 0 after SIGTERM,
SIGINT or the end of the watched process, 2 for bad input, 1 where a file or the ready line cannot be written. What is
served is in `api/`.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .cli import (
    LOAD_OPTIONS,
    BadInput,
    Parser,
    WorkFailed,
    add_loading_options,
    bad_input,
    json_line,
    on_ranks,
    run_command_line,
    size,
)
from .policies import POLICIES

if TYPE_CHECKING:
    import socket

    from .api.settings import Settings
    from .team import Team

DEFAULT_MODEL = "mlx-community/diffusiongemma-26B-A4B-it-4bit"
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 1234
KEY_VARIABLE = "MLX_DIFFUSIONGEMMA_API_KEY"
MAX_FILES = 4096
CLOSING_SECONDS = 5.0  # for the model thread; loading cannot be interrupted
SWITCH_SECONDS = 0.001  # for which a thread keeps Python's lock while the event loop, or the model's thread, waits


def setup_parser() -> argparse.ArgumentParser:
    """Return the parser. A default that the settings or the engine have is in the help only; a test compares them."""
    parser = Parser(
        prog="mlx_diffusiongemma.server",
        description="Serve a model over HTTP, in the dialects of OpenAI, Anthropic and LM Studio.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=DEFAULT_MODEL, help="'tiny', a folder or a Hub id (default: %(default)s)")
    group.add_argument("--models", nargs="+", action="extend", metavar="MODEL", help="more that requests may name")
    group.add_argument("--hub-models", action="store_true", help="and those in the local Hub cache")
    group.add_argument("--alias", nargs="+", action="extend", metavar="NAME", help="more names of --model")
    group.add_argument("--any-model", action="store_true", help="answer for every model name, with --model")
    add_loading_options(group)
    group.add_argument("--prompt-cache-bytes", type=size, metavar="SIZE", help="memory for known prompts (2GiB)")
    group.add_argument("--prompt-cache-dir", metavar="DIR", help="keep them in this folder too (default: no)")
    group.add_argument("--lazy", action="store_true", help="load the model at the first request")
    group.add_argument("--ttl", type=float, metavar="S", help="unload it after so many seconds without a request")
    group.add_argument("--estimate-only", action="store_true", help="print the memory it needs, load nothing")

    group = parser.add_argument_group("where to listen")
    group.add_argument("--host", default=DEFAULT_HOST, help="address (default: %(default)s, this machine only)")
    group.add_argument("--port", type=int, default=DEFAULT_PORT, help="0 takes a free one (default: %(default)s)")
    group.add_argument("--uds", metavar="PATH", help="a unix socket instead, for this user only")

    group = parser.add_argument_group("who may ask")
    group.add_argument("--api-key-file", metavar="FILE", help=f"key that requests must show; or {KEY_VARIABLE}")
    group.add_argument("--allowed-host", nargs="+", action="extend", metavar="NAME", help="more names of this server")
    group.add_argument("--allowed-origin", nargs="+", action="extend", metavar="URL", help="web pages that may ask")
    group.add_argument("--remote-media", action="store_true", help="fetch images from public web addresses")

    group = parser.add_argument_group("how much")
    group.add_argument("--max-tokens", type=int, metavar="N", help="of answers whose requests do not say (8192)")
    group.add_argument("--max-batch", type=int, metavar="N", help="canvases denoised in one step (4)")
    group.add_argument("--max-active", type=int, metavar="N", help="requests that take turns (64)")
    group.add_argument("--max-queue", type=int, metavar="N", help="requests that wait; one more gets 503 (64)")
    group.add_argument("--max-body", type=size, metavar="SIZE", help="of a request (64MiB)")
    group.add_argument("--request-timeout", type=float, metavar="S", help="for one request (default: none)")
    group.add_argument(
        "--drain-timeout", type=float, metavar="S", help="for running requests after a signal; new ones get 503 (0)"
    )
    group.add_argument("--enable-thinking", action="store_true", help="think where a request does not say")
    group.add_argument(
        "--policy", choices=list(POLICIES), default="exact", help="of requests that do not say (default: %(default)s)"
    )

    group = parser.add_argument_group("for the program that starts it")
    group.add_argument("--ready-file", metavar="FILE", help="write the ready line there too; removed at the end")
    group.add_argument("--discovery-file", metavar="FILE", help="where apps find the server (default: see the docs)")
    group.add_argument("--no-discovery", action="store_true", help="write no discovery file")
    group.add_argument("--watchdog-ppid", type=int, metavar="PID", help="end when this process has gone")
    levels = ("debug", "info", "warning", "error")
    group.add_argument("--log-level", default="info", choices=levels, help="least to log (default: %(default)s)")
    group.add_argument("--log-prompts", action="store_true", help="prompts and answers too")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments; exit with 2 when they do not go together."""
    parser = setup_parser()
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        parser.error(f"--port: got {args.port}, expected 0 to 65535")
    if args.no_discovery and args.discovery_file:
        parser.error("--no-discovery and --discovery-file exclude each other")
    if args.drain_timeout is not None and not 0 <= args.drain_timeout < float("inf"):
        parser.error(f"--drain-timeout: got {args.drain_timeout:g}, expected seconds, 0 or more")
    return args


# -- settings ---------------------------------------------------------------------------------------------------------


def read_key(args: argparse.Namespace) -> str | None:
    """Return the key of the file or of the environment. Raise `ValueError` for a file that others may read."""
    if args.api_key_file is None:
        return os.environ.get(KEY_VARIABLE)
    path = Path(args.api_key_file)
    mode = path.stat().st_mode & 0o077
    if mode:
        raise ValueError(f"--api-key-file {path}: others may read it, expected mode 600 (chmod 600 {path})")
    return path.read_text(encoding="utf-8").strip()


def read_settings(args: argparse.Namespace) -> Settings:
    """Return the settings of the arguments. Raise `ValueError`."""
    from .api.settings import LOOPBACK, Settings
    from .scheduler import EngineOptions

    key = read_key(args)
    if args.uds is None and args.host not in LOOPBACK and key is None:
        problem = f"--host {args.host}: other machines could use this server"
        raise ValueError(f"{problem}, expected a key (--api-key-file or {KEY_VARIABLE})")
    engine = {name: getattr(args, name) for name in ("max_batch", "max_active", "max_queue", "ttl")}
    loading = {name: getattr(args, name) for name in LOAD_OPTIONS}
    loading |= {"prefix_bytes": args.prompt_cache_bytes, "prefix_folder": args.prompt_cache_dir}
    more = {"max_tokens": args.max_tokens, "body_bytes": args.max_body, "request_seconds": args.request_timeout}
    return Settings(
        model=args.model,
        models=tuple(args.models or ()),
        aliases=tuple(args.alias or ()),
        any_model=args.any_model,
        hub_models=args.hub_models,
        load_options={name: value for name, value in loading.items() if value is not None},
        engine=EngineOptions(**{name: value for name, value in engine.items() if value is not None}),
        lazy=args.lazy,
        api_key=key,
        hosts=(*([] if args.uds or args.host in ("0.0.0.0", "::") else [args.host]), *(args.allowed_host or ())),
        origins=tuple(args.allowed_origin or ()),
        enable_thinking=args.enable_thinking,
        policy=args.policy,
        remote_media=args.remote_media,
        log_prompts=args.log_prompts,
        **{name: value for name, value in more.items() if value is not None},
    )


# -- files ------------------------------------------------------------------------------------------------------------


def default_discovery_file() -> Path:
    """Return where apps look for a server of this user."""
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support/mlx-diffusiongemma/server.json"
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(state) / "mlx-diffusiongemma/server.json"


class ReadyFiles:
    """Files that tell where the server is. They are for this user alone, complete, and gone when the server is."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def write(self, content: dict[str, Any]) -> None:
        """Write the content to every file. Raise `WorkFailed`."""
        for path in self._paths:
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(json.dumps(content) + "\n")
                temporary.replace(path)
            except OSError as error:
                raise WorkFailed(f"cannot write {path}: {error.strerror}") from None

    def remove(self) -> None:
        """Remove what is still ours: a later server may have taken the place."""
        for path in self._paths:
            try:
                if json.loads(path.read_text(encoding="utf-8")).get("pid") == os.getpid():
                    path.unlink()
            except (OSError, ValueError):
                continue


# -- running ----------------------------------------------------------------------------------------------------------


class JsonLines(logging.Formatter):
    """A log record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def allow_many_connections() -> None:
    """Raise the number of open files to what a server needs; on a Mac it is 256 at first."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def start_log(level: str) -> None:
    """Write records of this package and of uvicorn to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, own_level in (("mlx_diffusiongemma", level.upper()), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(own_level)
        logger.propagate = False


async def serve(
    args: argparse.Namespace, settings: Settings, listener: socket.socket, ready: ReadyFiles, team: Team | None
) -> bool:
    """Serve until a signal, or the loss of a rank, ends it.

    Returns:
        whether the model thread has ended too.

    Raises:
        BadInput: a model that cannot be loaded.
        WorkFailed: a rank that is lost; requests under way have got an error.
    """
    import asyncio

    from .api.app import make_app
    from .api.errors import ApiError
    from .api.host import Server, url_of, watch_parent
    from .api.service import Service

    service = Service(settings)
    drain = partial(service.drain, args.drain_timeout) if args.drain_timeout else None
    server = Server(make_app(service), service.abort_all, drain)
    # What is there now stays for good. Otherwise every full collection looks through it, and everybody waits meanwhile.
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_SECONDS)

    lost: list[Exception] = []

    def end() -> None:
        server.should_exit = True

    def end_with(error: Exception) -> None:
        lost.append(error)
        service.abort_all(ApiError(500, str(error), code="rank_lost"))
        end()

    if team is not None:
        loop = asyncio.get_running_loop()

        def report(error: Exception) -> None:
            loop.call_soon_threadsafe(end_with, error)

        team.on_fault(report)
    serving = asyncio.ensure_future(server.serve([listener]))
    tasks = [serving]
    if args.watchdog_ppid is not None:
        tasks.append(asyncio.ensure_future(watch_parent(args.watchdog_ppid, end)))
    try:
        if not settings.lazy:
            loading = asyncio.ensure_future(service.start())
            tasks.append(loading)
            await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done() and not lost and not server.should_exit:
                loading.result()
        if not server.should_exit:
            content = {
                "event": "ready",
                "url": url_of(listener),
                "pid": os.getpid(),
                "version": __version__,
                "model": service.catalog.default.id,
                "started": int(time.time()),
            }
            ready.write(content)
            print(json_line(content), flush=True)
        await serving
    except ApiError as error:
        end()
        await serving
        raise BadInput(error.message) from None
    finally:
        end()
        for task in tasks[1:]:
            task.cancel()
        has_ended = await service.close(CLOSING_SECONDS if not lost else 0)
    if lost:
        raise WorkFailed(str(lost[0]))
    return has_ended


def check_team(args: argparse.Namespace, team: Team) -> None:
    """Raise `ValueError` for what ranks cannot do together."""
    for name in ("models", "hub_models", "adapter_path"):
        if getattr(args, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag}: got it on {team.ranks.size} ranks, expected one model without an adapter")


def run(args: argparse.Namespace, team: Team | None = None) -> int:
    """Do what the arguments ask, with a model that a team of ranks shares or that is all here; return the exit code."""
    try:
        import asyncio

        from .api import host
    except ImportError as error:
        raise BadInput(f"{error}; the server needs: pip install 'mlx_diffusiongemma[server]'") from None
    with bad_input():
        settings = read_settings(args)
        if team is not None:
            check_team(args, team)
            settings = replace(settings, load=team.load)
        if args.estimate_only:
            from .api.estimate import estimate

            print(json_line(estimate(settings)))
            return 0
        listener = host.listen_on_path(Path(args.uds)) if args.uds else host.listen(args.host, args.port)
    start_log(args.log_level)
    allow_many_connections()
    files = [] if args.no_discovery else [Path(args.discovery_file or default_discovery_file())]
    ready = ReadyFiles([*files, *([Path(args.ready_file)] if args.ready_file else [])])
    try:
        has_ended = asyncio.run(serve(args, settings, listener, ready, team))
    finally:
        ready.remove()
        if args.uds:
            Path(args.uds).unlink(missing_ok=True)
    if not has_ended:
        os._exit(0)  # the model thread is inside of a loading, which nothing can interrupt
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return on_ranks(lambda team: run_command_line(lambda: parse(argv), partial(run, team=team), "the ready line"))


if __name__ == "__main__":
    sys.exit(main())
