"""The browser that the machine has, for pages that must be seen in one."""

from __future__ import annotations

import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """Path of a browser of Chromium's kind; ``None`` where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)
