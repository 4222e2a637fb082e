"""Makes the pictures of the pages: `python -m docs.screenshots` from the repository's root."""

import shutil
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from playwright.sync_api import Browser, Page

from baco import Baco
from benchmarks.study_load import StudyServer
from tests.pages import chromium, visit
from tests.serving import served

FOLDER = Path(__file__).parent
# A threshold at which both models write in the fields of the example schema.
SCHEMA_LINK = "/#" + urlencode(
    {"prompt": "Recommend a summer destination", "router": "P:0.4", "n": 6, "seed": 1, "compare": 0}
)
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


def schema(browser: Browser, address: str) -> None:
    """Answers under the example schema as tables."""
    with visit(browser, address + SCHEMA_LINK, **DESK) as seen:
        page = seen.page
        seen.settle()
        page.get_by_text("JSON schema:").click()
        page.get_by_role("button", name="Example schema").click()
        page.get_by_role("button", name="Write 6 answers").click()
        seen.settle()
        page.locator("#schema").evaluate("box => box.blur()")
        page.evaluate("scrollTo({ top: 0, behavior: 'instant' })")
        light(page)
        page.wait_for_timeout(500)
        page.screenshot(path=FOLDER / "page-schema.png")


def study(browser: Browser) -> None:
    """The first item of the example study, on a desk and on a phone."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("plan.json", "texts.json"):
            shutil.copy(FOLDER / "results" / "study-demo" / name, folder)
        server = StudyServer(Path(folder))
        looks = {"study-item": ("light", DESK), "study-phone": ("dark", PHONE)}
        for (name, (theme, screen)), link in zip(looks.items(), server.links, strict=False):
            with visit(browser, link, color_scheme=theme, **screen) as seen:
                page = seen.page
                page.get_by_role("checkbox").check()
                page.get_by_role("button", name="Begin").click()
                for number, option in enumerate((1, 2, 1)):
                    page.locator(f'input[name=q{number}][value="{option}"]').check()
                page.get_by_role("button", name="Continue").click()
                page.locator("form[data-ready=yes]").wait_for()
                for key in "15bb":
                    page.keyboard.press(key)
                page.evaluate("scrollTo({ top: 0, behavior: 'instant' })")
                page.wait_for_timeout(500)
                page.screenshot(path=FOLDER / f"{name}.png")
        server.kill()


def main() -> None:
    """One picture for each way to look at a second run, the dial turned further."""
    looks: dict[Any, dict[str, Any]] = {light: DESK, dark: DESK, phone: PHONE}
    with chromium() as browser, served(Baco.load("demo")) as server:
        study(browser)
        schema(browser, server.url)
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
