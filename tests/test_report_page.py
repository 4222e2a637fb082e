"""The report's page in a browser, from disk: choosers, hover, keyboard, themes, phone."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from baco.text.invalid_characters import well_formed
from tests.pages import new_page
from tests.report_runs import EVIL, evil_run, made_run


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory) / "report/index.html"


@contextmanager
def opened(browser: Browser, file: Path, **screen: Any) -> Iterator[Page]:
    """The page when it is ready. It may log no message and load nothing but itself."""
    page = new_page(browser, **screen)
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: messages.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready=yes]")
    yield page
    assert [text for text in messages if text != file.as_uri() and text != "data:,"] == []
    page.context.close()


def test_pointing_at_a_point_shows_its_setting_and_answers(
    browser: Browser, page_file: Path
) -> None:
    with opened(browser, page_file, viewport={"width": 1200, "height": 900}) as page:
        card = page.locator("#told")
        assert not card.is_visible()
        mark = page.locator("#plane-plot .mark-symbol path[aria-label*='Rand:0.5']").first
        mark.evaluate("mark => mark.scrollIntoView({ block: 'center' })")
        scrolled(page)  # which hides the card of a point
        box = mark.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
        card.wait_for(state="visible")
        assert "Rand:0.5" in card.inner_text()
        assert card.locator("li").count() == 3
        assert re.search(r"base share\s+\d+%", card.inner_text())
        page.mouse.move(2, 2)
        card.wait_for(state="hidden")


def test_the_keyboard_walks_from_point_to_point(browser: Browser, page_file: Path) -> None:
    with opened(browser, page_file) as page:
        stops = page.locator("#plane-plot [tabindex='0']")
        assert stops.count() == 1
        stops.focus()
        scrolled(page)
        card = page.locator("#told")
        first = card.inner_text()
        assert card.is_visible()
        page.keyboard.press("ArrowRight")
        assert card.inner_text() != first
        page.keyboard.press("ArrowLeft")
        assert card.inner_text() == first
        page.keyboard.press("Escape")
        assert not page.locator("#told").is_visible()


def scrolled(page: Page) -> None:
    """Wait until the page has scrolled, and its listeners know."""
    page.evaluate(
        "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )


def points(page: Page) -> list[str]:
    transforms: list[str] = page.locator("#plane-plot .mark-symbol path").evaluate_all(
        "marks => marks.map(mark => mark.getAttribute('transform')).sort()"
    )
    return transforms


def test_the_choosers_change_the_plane(browser: Browser, page_file: Path) -> None:
    with opened(browser, page_file) as page:
        before = points(page)
        diversity = page.locator("#choose-diversity")
        assert diversity.input_value() == "distinct_k"
        diversity.select_option("self_rouge_l")
        page.wait_for_function(
            "document.querySelector('#plane-plot').textContent.includes('rouge')"
        )
        assert points(page) != before
        page.locator("#choose-view").select_option(label="demo: demo-facts")
        page.wait_for_function("document.querySelector('#choose-prompt').options.length > 0")
        listed = page.locator("#choose-prompt option").all_inner_texts()
        assert all(re.match(r"(opposite|capital|fact|name)", text) for text in listed)


def test_methods_can_be_highlighted(browser: Browser, page_file: Path) -> None:
    with opened(browser, page_file) as page:
        marks = page.locator("#plane-plot .mark-symbol path")
        bright = page.locator("#plane-plot .mark-symbol path[opacity='1']")
        count = marks.count()
        assert 0 < bright.count() < count
        page.get_by_role("button", name="all", exact=True).click()
        expect(bright).to_have_count(count)
        page.get_by_role("button", name="none", exact=True).click()
        expect(bright).to_have_count(0)
        expect(marks).to_have_count(count)
        page.locator("#method-list input[value=Nudging]").check()
        expect(bright).not_to_have_count(0)
        assert bright.count() <= 5


def test_samples_show_the_source_of_every_word(browser: Browser, page_file: Path) -> None:
    with opened(browser, page_file) as page:
        column = page.locator("#columns section").first
        chooser = column.locator("select")
        chooser.select_option(label="Base T=0.4")
        column = page.locator("#columns section").first
        assert column.locator("li").count() == 3
        assert column.locator("li .a").count() == 0
        base = column.locator("li .b").first
        style = base.evaluate("word => getComputedStyle(word).textDecorationLine")
        assert style == "underline"
        shown = column.locator("li").first.inner_text().split()
        coloured = column.locator("li").first.locator(".b").all_inner_texts()
        assert shown == [word for text in coloured for word in text.split()]
        column.locator("select").select_option(label="Aligned T=0.7")
        assert page.locator("#columns section").first.locator("li .b").count() == 0
        before = page.locator("#prompt-text").inner_text()
        page.get_by_role("button", name="Next").click()
        assert page.locator("#prompt-text").inner_text() != before


def test_the_theme_follows_the_system_and_the_button(browser: Browser, page_file: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, page_file, color_scheme="dark") as page:
        assert page.evaluate(ground) == "rgb(20, 23, 26)"
        page.get_by_role("button", name="Light theme").click()
        assert page.evaluate(ground) == "rgb(255, 255, 255)"
        assert page.get_by_role("button", name="Dark theme").is_visible()


def test_a_phone_scrolls_tables_and_not_the_page(browser: Browser, page_file: Path) -> None:
    with opened(browser, page_file, viewport={"width": 360, "height": 740}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for region in page.locator(".scroll").all():
            assert region.get_attribute("tabindex") == "0"


def test_a_phone_shows_the_whole_caption_of_a_wide_table(browser: Browser, page_file: Path) -> None:
    with opened(browser, page_file, viewport={"width": 360, "height": 740}) as page:
        ends = page.evaluate(
            "() => [...document.querySelectorAll('caption > *')]"
            ".map(part => part.getBoundingClientRect().right)"
        )
        assert len(ends) > 10 and max(ends) <= 360


def test_tables_have_captions_and_heads(browser: Browser, page_file: Path) -> None:
    with opened(browser, page_file) as page:
        for table in page.locator("table").all():
            assert table.locator("caption").count() == 1
            heads = table.locator("thead th[scope=col]").count()
            rows = table.locator("tbody tr").count()
            assert table.locator("tbody th[scope=row]").count() == rows
            assert table.locator("tbody td").count() == rows * (heads - 1)


def test_html_in_prompts_and_answers_is_shown_and_never_run(
    browser: Browser, tmp_path: Path
) -> None:
    with opened(browser, evil_run(tmp_path) / "report/index.html") as page:
        assert page.evaluate("window.evil") is None
        assert page.locator("#prompt-text").inner_text() == well_formed(EVIL)
