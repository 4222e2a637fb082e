"""Makes the pictures of the page: `python -m docs.screenshots` from the repository's root."""

from pathlib import Path
from typing import Any

from playwright.sync_api import Page

from baco import Baco
from tests.pages import chromium, visit
from tests.serving import served

FOLDER = Path(__file__).parent
DESK: dict[str, Any] = {"viewport": {"width": 1280, "height": 1000}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 780},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}


def light(page: Page) -> None:
    """At rest."""
    page.mouse.move(2, 2)


def dark(page: Page) -> None:
    """With a base word pointed at."""
    page.locator(".of-baco li:nth-child(2) .base").nth(1).hover()


def phone(page: Page) -> None:
    """At the answers, the dial within reach."""
    page.locator("section.results fieldset").evaluate("part => part.scrollIntoView()")


def main() -> None:
    """One picture for each way to look at a second run, the dial turned further."""
    looks: dict[Any, dict[str, Any]] = {light: DESK, dark: DESK, phone: PHONE}
    with chromium() as browser, served(Baco.load("demo")) as server:
        for look, screen in looks.items():
            theme = "dark" if look is dark else "light"
            with visit(browser, server.url + "/", color_scheme=theme, **screen) as seen:
                page = seen.page
                page.get_by_role("button", name="Write 6 answers").click()
                seen.settle()
                for _ in range(5):
                    page.locator("#dial").press("ArrowRight")
                page.locator(".history button").nth(1).wait_for()
                seen.settle()
                page.locator("#dial").evaluate("dial => dial.blur()")
                page.evaluate("scrollTo({ top: 0, behavior: 'instant' })")
                look(page)
                page.wait_for_timeout(500)  # meters glide
                page.screenshot(path=FOLDER / f"page-{look.__name__}.png")


if __name__ == "__main__":
    main()
