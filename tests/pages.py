"""Pages in a real browser."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT = 240_000  # milliseconds: machines that run all tests at once are slow
expect.set_options(timeout=TIMEOUT)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Headless Chromium; CHROMIUM names another binary."""
    executable = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        missing = "no Chromium for the tests of pages: install it, or name it in CHROMIUM"
        if os.environ.get("CI"):
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(
            executable_path=executable, args=list(QUIET), timeout=TIMEOUT
        )


def new_page(browser: Browser, **screen: Any) -> Page:
    """A page in a new context of the browser, with patience for a busy machine."""
    context = browser.new_context(**screen)
    context.set_default_timeout(TIMEOUT)
    return context.new_page()


@dataclass
class Visit:
    """An open page and the requests it has sent."""

    page: Page
    requests: list[Request] = field(default_factory=list)

    def record(self, request: Request) -> None:
        """Note a request."""
        self.requests.append(request)

    @property
    def answer_requests(self) -> int:
        """Number of requests for answers so far."""
        return sum("/v1/" in request.url for request in self.requests)

    def settle(self) -> None:
        """Wait until all requested answers are written."""
        results = self.page.get_by_role("region", name="Results")
        expect(results.locator(".columns")).to_be_visible()
        expect(results).to_have_attribute("aria-busy", "false")

    def column(self, kind: str) -> list[str]:
        """The answers of the column of "base", "aligned" or "baco"."""
        texts: list[str] = self.page.locator(f".of-{kind} li p").all_text_contents()
        return texts


def broken(page: Page) -> list[str]:
    """What axe finds: WCAG, levels A and AA, and good practice."""
    page.wait_for_load_state()  # colours are those of the style sheet from then on
    page.evaluate(
        "() => Promise.allSettled(document.getAnimations().map(each => each.finished))"
        ".then(() => null)"
    )
    violations = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    return [f"{rule['impact']}: {rule['help']}: {rule['nodes'][0]['html']}" for rule in violations]


@contextmanager
def visit(
    browser: Browser, address: str, *, faults: tuple[str, ...] = (), **screen: Any
) -> Iterator[Visit]:
    """Open a page. It may call only its own server and log no errors except ``faults``.

    Args:
        browser: what to open it in.
        address: of the page, with the settings behind #.
        faults: parts of the console messages that are expected.
        screen: of the browser's context: viewport, color_scheme, …
    """
    visited = Visit(new_page(browser, **({"viewport": {"width": 1280, "height": 900}} | screen)))
    messages: list[str] = []
    visited.page.on("console", lambda message: messages.append(message.text))
    visited.page.on("pageerror", lambda error: messages.append(str(error)))
    visited.page.on("request", visited.record)
    visited.page.goto(address)
    yield visited
    hosts = {urlsplit(request.url).netloc for request in visited.requests} - {""}
    assert hosts == {urlsplit(address).netloc}
    assert [text for text in messages if not any(fault in text for fault in faults)] == []
    visited.page.context.close()
