"""Finds the browser that drives the web page: `python tests/server/chromium.py` prints its path, or fails."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
MISSING = (
    f"no Chromium: none of {', '.join(NAMES)} is on PATH. Install it (playwright install chromium, or apt install "
    "chromium) or name it in CHROMIUM"
)


def find_chromium() -> str | None:
    """Return the path of a Chromium: named by CHROMIUM, on PATH, or Playwright's own; None without any."""
    if named := os.environ.get("CHROMIUM"):
        return named if Path(named).is_file() else None
    with sync_playwright() as playwright:
        paths = [*map(shutil.which, NAMES), playwright.chromium.executable_path, MAC]
    return next((path for path in paths if path and Path(path).is_file()), None)


if __name__ == "__main__":
    sys.exit(f"error: {MISSING}" if (found := find_chromium()) is None else print(found))
