"""Fixtures: a server that all tests share, one of a test's own, and clients, a browser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from .browsing import PATIENCE, Visit
from .chromium import MISSING, find_chromium
from .process import ServerProcess, StartServer, start


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Return a server that all tests share; none may change what the others see."""
    running = start(tmp_path_factory.mktemp("server"), "--max-batch", "4")
    yield running
    running.stop()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Return what starts a server for one test."""
    started: list[ServerProcess] = []

    def begin(*arguments: str, **options: object) -> ServerProcess:
        started.append(start(tmp_path, *arguments, **options))  # type: ignore[arg-type]
        return started[-1]

    yield begin
    for running in started:
        running.stop()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    """Return an HTTP client of the shared server."""
    with server.client() as made:
        yield made


@pytest.fixture
def ai(server: ServerProcess) -> Iterator[openai.OpenAI]:
    """Return an OpenAI client of the shared server."""
    with server.openai() as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Return Chromium."""
    expect.set_options(timeout=PATIENCE)
    path = find_chromium()
    assert path is not None, MISSING
    with sync_playwright() as playwright:
        root = hasattr(os, "geteuid") and os.geteuid() == 0  # Chromium has no sandbox for root
        launched = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"] if root else [], timeout=2 * PATIENCE
        )
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: Browser, server: ServerProcess) -> Iterator[Visit]:
    """Return a visit of the shared server's page."""
    made = Visit(browser, server.url, viewport={"width": 1280, "height": 860})
    yield made
    made.close()
