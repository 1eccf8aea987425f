"""The web page in a browser: a visit with all that it asked for and complained about, and what a reader does there."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

STORY = "Tell me a story about a fox."
PATIENCE = 150_000  # ms: a busy machine takes its time
DONE = "data: [DONE]\n\n"  # the last event of a stream

browser_test = pytest.mark.browser


class Visit:
    """The page in a context of its own, with all that it asked for and complained about."""

    def __init__(self, browser: Browser, url: str, **context: Any) -> None:
        self.url = url
        self.context = browser.new_context(base_url=url, **context)
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        self.page.on("request", self._note)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self._note_console(message.type, message.text))

    def _note(self, request: Any) -> None:
        self.requests.append(request.url)
        if request.method == "POST":
            self.bodies.append(json.loads(request.post_data))

    def _note_console(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and "Failed to load resource" not in text:  # what the tests of errors provoke
            self.complaints.append(text)

    def open(self, **parameters: str | bool) -> Page:
        """Open the page with parameters that were entered at an earlier visit."""
        stored = json.dumps(json.dumps(parameters))
        self.page.add_init_script(f"localStorage.setItem('diffusiongemma.parameters', {stored})")
        self.page.goto("/")
        expect(self.page.locator("#model option").first).to_be_attached()
        return self.page

    def close(self) -> None:
        self.context.close()
        assert not self.complaints
        foreign = [url for url in self.requests if not url.startswith((self.url, "data:", "blob:"))]
        assert not foreign, "a request left the origin"


def ask(page: Page, text: str = STORY) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()


def wait_for_end(page: Page) -> None:
    expect(page.locator(".answer").last).not_to_have_class(re.compile("live"), timeout=PATIENCE)


def rewind(page: Page) -> None:
    """Show the first step of a finished answer."""
    page.get_by_role("slider", name="Denoising step").press("Home")


def recorded(client: httpx.Client, **parameters: str) -> tuple[list[dict[str, Any]], str, dict[str, Any]]:
    """Return the frames, the text and the timings that the API gives for the same request."""
    fields = {name: int(value) if value.isdigit() else value for name, value in parameters.items() if name != "pace"}
    body = {"messages": [{"role": "user", "content": STORY}], "stream": True, "diffusion_frames": True, **fields}
    frames, text, timings = [], "", {}
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk.get("type") == "diffusion_frame":
                frames.append(chunk)
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
            timings = chunk.get("timings", timings)
    return frames, text, timings


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> str:
    choice = {"index": 0, "delta": delta or {}, "finish_reason": finish}
    return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [choice], **more})}\n\n"


def frame(tokens: list[str], settled: list[bool], **more: Any) -> str:
    detail = {"tokens": tokens, "settled": settled, "entropies": [0.5] * len(tokens), "mean_entropy": 0.5}
    return chunk(type="diffusion_frame", **{"block": 0, "step": 1, "total": 48, "diffusion": detail, **more})


def answer_with(page: Page, *events: str, status: int = 200) -> None:
    """Let requests for an answer get these events instead of the server's."""
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=status, content_type="text/event-stream", body="".join(events)),
    )


def assert_fits(page: Page, width: int) -> None:
    """Fail if something lies outside of the window's width."""
    outside = page.evaluate(
        """(width) => [...document.querySelectorAll("body *:not(.visually-hidden, .skip, symbol *)")]
          .filter((node) => node.checkVisibility() && node.getBoundingClientRect().right > width + 0.5)
          .map((node) => node.tagName + "." + node.getAttribute("class"))""",
        width,
    )
    assert outside == []
