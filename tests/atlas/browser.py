"""Chromium, driven by playwright: one page that notes every error and every request that leaves the atlas."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sparseclt.atlas.server import AtlasServer

TIMEOUT = 60_000  # ms: for a machine that is busy with other tests


class Pages:
    """An atlas in a browser."""

    def __init__(self, page: Any, url: str):
        self.page, self.url = page, url
        self.troubles: list[str] = []
        page.set_default_timeout(TIMEOUT)
        page.on(
            "console", lambda m: self.troubles.append(f"console: {m.text}") if m.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: self.troubles.append(f"error: {error}"))
        page.on("requestfailed", lambda request: self.troubles.append(f"failed: {request.url}"))
        page.on("request", self._request)

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:")):
            self.troubles.append(f"foreign: {request.url}")

    def open(self, hash: str) -> None:
        """Go to a page, as by its link."""
        self.page.goto(self.url + hash)
        self.shows(hash)

    def shows(self, hash: str) -> None:
        """Wait until that page is shown."""
        self.page.wait_for_function("hash => document.body.dataset.page === hash", arg=hash, timeout=TIMEOUT)

    def text(self, selector: str = "main") -> str:
        return self.page.inner_text(selector)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; the test is skipped, and says what is missing, where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is part of the extra test")
    binary = shutil.which("chromium")
    if binary is None:
        pytest.skip("chromium is missing: apt-get install chromium")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=binary)
        yield browser
        browser.close()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which an atlas is served."""
    with AtlasServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server.url
        server.shutdown()
        thread.join()
