"""A whole study in a real browser: several raters at once, the server killed in the middle."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from baco.study.schedule import schedule
from baco.study.study import Study
from benchmarks.study_load import StudyServer
from tests.pages import broken, new_page
from tests.studies import made_study

PHONE: dict[str, Any] = {
    "viewport": {"width": 360, "height": 740},
    "has_touch": True,
    "is_mobile": True,
}
DESK: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}}


@pytest.fixture(scope="module")
def study_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = made_study(tmp_path_factory.mktemp("study"), prompts=2, raters=7, set_size=4, block=3)
    study.close()
    return study.path


@pytest.fixture(scope="module")
def server(study_path: Path) -> Iterator[StudyServer]:
    running = StudyServer(study_path)
    yield running
    running.kill()


@contextmanager
def opened(browser: Browser, link: str, **screen: Any) -> Iterator[Page]:
    """A page that may complain of nothing but a lost connection."""
    page = new_page(browser, **(screen or DESK))
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(link)
    yield page
    assert [text for text in messages if "ERR_CONNECTION" not in text] == []
    page.context.close()


def begin(page: Page) -> None:
    """Consent and the questions."""
    page.get_by_role("checkbox").check()
    page.get_by_role("button", name="Begin").click()
    for number, option in enumerate((1, 2, 1)):
        page.locator(f'input[name=q{number}][value="{option}"]').check()
    page.get_by_role("button", name="Continue").click()


def position(page: Page) -> int | None:
    """Of the item that the page shows, once its script runs; None on other pages."""
    page.locator("body:not(.item), form[data-ready=yes]").first.wait_for()
    form = page.locator("#item")
    return int(form.get_attribute("data-position") or "") if form.count() else None


def press_answers(page: Page, number: int) -> dict[str, Any]:
    """Answer the open rows of an item by keys that follow from a number; what was chosen."""
    chosen: dict[str, Any] = {}
    rows = page.locator(".row").evaluate_all(
        "rows => rows.map(row => [row.dataset.question, row.dataset.side ?? null,"
        " row.querySelector('input:checked') !== null])"
    )
    for index, (question, side, answered) in enumerate(rows):
        if answered:
            continue
        if side is None:
            choice = (number + index) % 3
            page.keyboard.press("anb"[choice])
            chosen[question] = ("left", "tie", "right")[choice]
        else:
            rating = (number + index) % 5 + 1
            page.keyboard.press(str(rating))
            chosen.setdefault(question, []).append(rating)
    return chosen


def go_on(page: Page, at: int) -> None:
    """To the next item; a training item is checked first."""
    page.keyboard.press("Enter")
    if at < 0:
        expect(page.locator("#feedback")).to_be_visible()
        page.keyboard.press("Enter")
    page.locator(f'body:not(.item), form:not([data-position="{at}"])').first.wait_for()


def test_raters_finish_though_the_server_is_killed_and_nothing_is_lost_or_twice(
    browser: Browser, server: StudyServer, study_path: Path
) -> None:
    raters, chosen = 3, list[dict[int, dict[str, Any]]]()
    pages: list[Page] = []
    for number in range(raters):
        pages.append(new_page(browser, **(PHONE if number == 1 else DESK)))
        pages[-1].goto(server.links[number])
        begin(pages[-1])
        chosen.append({})
    total = len(schedule(made(study_path), 0))
    killed, open_raters = False, set(range(raters))
    while open_raters:
        for number in sorted(open_raters):
            page = pages[number]
            at = position(page)
            if at is None:
                button = page.locator("#next")
                if "Finish" in button.inner_text():
                    open_raters.discard(number)
                button.click()
                continue
            if at == total // 2 and number == 0 and not killed:
                killed = True
                server.kill()
                chosen[number][at] = press_answers(page, number + at)
                expect(page.locator("#state")).to_have_text("Not saved yet. Trying again…")
                server.start()
                expect(page.locator("#state")).to_have_text("Saved")
            else:
                chosen[number][at] = press_answers(page, number + at)
            go_on(page, at)
    for page in pages:
        expect(page.get_by_role("heading", name="Thank you")).to_be_visible()
        page.context.close()
    assert killed
    study = Study.open(study_path)
    for number, rater in enumerate(study.store.raters()[:raters]):
        assert rater.state == "finished"
        answers = study.store.answers(rater.id)
        kept = {a.position: {q: _plain(r) for q, r in a.responses.items()} for a in answers}
        assert len(answers) == total + 4
        assert kept == chosen[number]
        assert all(answer.seconds > 0 for answer in answers)
        assert {answer.revisions for answer in answers if answer.position < 0} == {0}
    study.close()


def made(path: Path) -> Any:
    study = Study.open(path)
    study.close()
    return study.plan


def _plain(response: Any) -> Any:
    return response if isinstance(response, str) else list(response)


def test_a_reload_and_another_device_continue_where_the_rater_was(
    browser: Browser, server: StudyServer
) -> None:
    link = server.links[3]
    with opened(browser, link) as page:
        begin(page)
        for at in range(-4, 0):
            assert position(page) == at
            press_answers(page, at + 10)
            go_on(page, at)
        page.get_by_role("link", name="Begin").click()
        assert position(page) == 0
        page.keyboard.press("2")
        page.keyboard.press("4")
        expect(page.locator("#state")).to_have_text("Saved")
        page.reload()
        assert position(page) == 0
        expect(page.locator("input:checked:not(#shortcuts)")).to_have_count(2)
    with opened(browser, link, **PHONE) as page:
        assert position(page) == 0
        expect(page.locator("input:checked:not(#shortcuts)")).to_have_count(2)
        press_answers(page, 1)
        go_on(page, 0)
        assert position(page) == 1
        page.get_by_role("link", name="Back").click()
        page.locator('form[data-position="0"]').wait_for()
        assert position(page) == 0
        page.locator(".row").last.get_by_label("No difference").check()
        expect(page.locator("#state")).to_have_text("Saved")
        go_on(page, 0)
        assert position(page) == 1
        width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1]


def test_an_item_needs_all_answers_and_shows_which_one_is_missing(
    browser: Browser, server: StudyServer
) -> None:
    with opened(browser, server.links[4]) as page:
        begin(page)
        assert position(page) == -4
        page.keyboard.press("Enter")
        expect(page.locator("#state")).to_have_text("Answer the marked row first.")
        assert position(page) == -4
        page.keyboard.press("ArrowDown")
        page.keyboard.press("3")
        assert page.locator(".row").nth(1).locator("input:checked").get_attribute("value") == "3"
        page.get_by_text("Keyboard").click()
        page.get_by_label("Use these keys").uncheck()
        page.locator("h1").click()
        page.keyboard.press("2")
        expect(page.locator("input:checked")).to_have_count(1)


@pytest.mark.parametrize(("theme", "screen"), [("light", DESK), ("dark", PHONE)])
def test_axe_finds_nothing_to_mend(
    browser: Browser, server: StudyServer, theme: str, screen: dict[str, Any]
) -> None:
    link = server.links[5 if theme == "light" else 6]
    with opened(browser, link, color_scheme=theme, **screen) as page:
        assert broken(page) == []
        begin_wrongly(page)
        assert broken(page) == []
        page.locator('input[name=q0][value="1"]').check()
        page.get_by_role("button", name="Continue").click()
        for at in range(-4, 0):
            position(page)
            press_answers(page, 5)
            if at == -3:
                page.keyboard.press("Enter")
                expect(page.locator("#feedback")).to_be_visible()
                for summary in page.locator("summary").all():
                    summary.click()
                page.locator("#feedback").wait_for()
                assert broken(page) == []
                page.locator("#next").click()
                page.locator('form[data-position="-2"]').wait_for()
            else:
                go_on(page, at)
        assert broken(page) == []
        page.get_by_role("link", name="Begin").click()
        position(page)
        assert broken(page) == []
        page.goto(f"{link}/withdraw")
        assert broken(page) == []
        page.goto(f"{server.url}/operator")
        page.get_by_label("Key").fill(server.key)
        page.get_by_role("button", name="Open").click()
        expect(page.get_by_role("heading", name="Progress")).to_be_visible()
        assert broken(page) == []


def begin_wrongly(page: Page) -> None:
    page.get_by_role("checkbox").check()
    page.get_by_role("button", name="Begin").click()
    for number, option in enumerate((0, 2, 1)):
        page.locator(f'input[name=q{number}][value="{option}"]').check()
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_role("alert")).to_be_visible()
