"""Accessibility of the page: keyboard, screen reader, phone, themes, and clear errors."""

import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from baco import Baco
from tests.pages import broken, visit
from tests.serving import reserved_port, served, step_by_step
from tests.thinking_pairs import END_ID, save_thinking_pair

PROMPT = "Give me a cosy dinner idea"
EVIL = "<img src=x onerror='window.evil=1'><script>window.evil=1</script>"
PHONE: dict[str, Any] = {
    "viewport": {"width": 360, "height": 740},
    "has_touch": True,
    "is_mobile": True,
}


def link(server: str, **settings: object) -> str:
    return f"{server}/#{urlencode({'prompt': PROMPT, 'n': 2, 'seed': 1} | settings)}"


def focused(page: Page) -> Any:
    return page.evaluate_handle("document.activeElement").as_element()


def test_the_keyboard_alone_writes_dials_and_reads(browser: Browser, server: str) -> None:
    with visit(browser, server + "/") as seen:
        page, keys = seen.page, seen.page.keyboard
        expect(page.get_by_role("button", name="Write 6 answers")).to_be_enabled()
        stops = []
        while keys.press("Tab") or page.evaluate("document.activeElement !== document.body"):
            stops.append(focused(page).get_attribute("id") or focused(page).inner_text())
            assert page.evaluate("document.activeElement.matches(':focus-visible')")
            line = focused(page).evaluate("element => getComputedStyle(element).outlineStyle")
            assert line != "none", stops[-1]
        order = [stops.index(name) for name in ("prompt", "Write 6 answers", "New seed", "dial")]
        assert order == sorted(order)

        page.get_by_role("button", name="Write 6 answers").focus()
        keys.press("Enter")
        seen.settle()
        assert focused(page).inner_text() == "Write 6 answers"
        page.locator("#dial").focus()
        keys.press("ArrowRight")
        expect(page.get_by_role("list", name="Runs").get_by_role("button")).to_have_count(2)
        seen.settle()

        page.get_by_role("button", name="Copy answer 1 of BACo").focus()
        keys.press("Tab")
        card = page.get_by_role("tooltip")
        words = page.locator(".of-baco li:first-child [data-word]").all_inner_texts()
        expect(card).to_contain_text(f"{words[0]} is from")
        assert focused(page).get_attribute("aria-describedby") == "why"
        keys.press("ArrowRight")
        expect(card).to_contain_text(f"{words[1]} is from")
        keys.press("End")
        expect(card).to_contain_text(f"{words[-1]} is from")
        keys.press("Escape")
        expect(card).to_have_count(0)
        keys.press("Home")
        expect(card).to_contain_text(f"{words[0]} is from")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_violations(browser: Browser, server: str, theme: str) -> None:
    with visit(browser, server + "/", color_scheme=theme) as seen:
        page = seen.page
        expect(page.get_by_role("button", name="Write 6 answers")).to_be_enabled()
        assert broken(page) == []
        page.get_by_role("button", name="Write 6 answers").click()
        seen.settle()
        page.get_by_text("Router:").click()
        page.get_by_text("Answers, seed, sampling").click()
        page.get_by_text("What the meters say").click()
        page.locator(".of-baco [data-word].base").first.hover()
        assert broken(page) == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_violations_on_the_safety_page(
    browser: Browser, server: str, theme: str
) -> None:
    with visit(browser, server + "/", color_scheme=theme) as seen:
        seen.page.get_by_role("link", name="What this does to refusals").click()
        expect(seen.page.get_by_role("heading", name="Safety")).to_be_visible()
        assert broken(seen.page) == []


def test_the_safety_notice_is_dismissed_for_good_and_its_page_stays_in_reach(
    browser: Browser, server: str
) -> None:
    with visit(browser, server + "/") as seen:
        page = seen.page
        notice = page.get_by_role("complementary", name="Safety notice")
        expect(notice).to_contain_text("An unaligned base model writes part of every answer.")
        notice.get_by_role("button", name="Dismiss").focus()
        page.keyboard.press("Enter")
        expect(notice).to_have_count(0)
        assert focused(page).get_attribute("id") == "safety"
        page.reload()
        expect(page.get_by_role("button", name="Write 6 answers")).to_be_enabled()
        expect(notice).to_have_count(0)
        page.get_by_role("link", name="Safety", exact=True).click()
        expect(page.get_by_text("Answers refuse less.")).to_be_visible()


def test_thinking_is_shown_apart_from_the_answer(browser: Browser, tmp_path: Path) -> None:
    folder = save_thinking_pair(tmp_path)
    baco = Baco.load(base=str(folder.base), aligned=str(folder.aligned), dtype="float32")
    baco.pair = replace(
        baco.pair, defaults=baco.pair.defaults.updated({"logit_bias": ((END_ID, 6.0),)})
    )
    router: dict[str, Any] = {"router": "P:0.5", "max_tokens": 24}
    expected = baco.generate(PROMPT, n=4, seed=1, **router)
    thinking = [" ".join(answer.thinking.split()) for answer in expected if answer.thinking]
    assert thinking and any(answer.text.strip() for answer in expected)
    with served(baco) as server, visit(browser, link(server.url, n=4, **router)) as seen:
        seen.settle()
        answers = seen.page.locator(".of-baco li")
        shown = answers.locator("details p").all_text_contents()
        assert [" ".join(text.split()) for text in shown] == thinking
        for number, answer in enumerate(expected):
            text = answers.nth(number).get_by_role("group", name="BACo").inner_text()
            assert "".join(text.split()) == "".join(answer.text.split())
        answers.locator("summary").first.click()
        expect(answers.locator("details p").first).to_be_visible()
        assert broken(seen.page) == []


def test_a_screen_reader_is_told_the_progress(browser: Browser, server: str) -> None:
    with visit(browser, link(server)) as seen:
        seen.settle()
        status = seen.page.locator("section[aria-label=Results] > [role=status]")
        expect(status).to_have_text(
            re.compile(
                r"Done. Base alone: 2 of 2 distinct answers, base share 100%. Aligned alone:"
            )
        )
        group = seen.page.get_by_role("group", name="BACo, answer 1. Arrow keys walk through")
        expect(group).to_be_visible()


def test_a_phone_shows_one_column_and_scrolls_one_way(browser: Browser, server: str) -> None:
    with visit(browser, server + "/", **PHONE) as seen:
        page = seen.page
        expect(page.get_by_role("button", name="Write 6 answers")).to_be_enabled()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.get_by_role("button", name="Write 6 answers").tap()
        seen.settle()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        expect(page.locator(".of-baco")).to_be_visible()
        expect(page.locator(".of-aligned")).to_be_hidden()
        expect(page.get_by_role("heading", name="History")).to_be_in_viewport()
        expect(page.get_by_role("slider", name="Diversity")).to_be_in_viewport()
        page.get_by_text("Aligned alone", exact=True).first.tap()
        expect(page.locator(".of-aligned")).to_be_visible()
        expect(page.locator(".of-baco")).to_be_hidden()
        page.locator(".of-aligned [data-word]").nth(2).tap()
        card = page.get_by_role("tooltip")
        expect(card).to_be_visible()
        box = card.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360


def test_the_theme_follows_the_system_and_the_choice_is_kept(browser: Browser, server: str) -> None:
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    with visit(browser, server + "/", color_scheme="dark") as seen:
        page = seen.page
        expect(page.get_by_label("Theme")).to_be_visible()
        dark = page.evaluate(ground)
        page.get_by_label("Theme").select_option("light")
        light = page.evaluate(ground)
        assert dark != light
        page.reload()
        expect(page.get_by_label("Theme")).to_have_value("light")
        assert page.evaluate(ground) == light


def test_a_wrong_router_is_reported_and_the_single_models_still_answer(
    browser: Browser, server: str
) -> None:
    with visit(browser, link(server, router="Nonsense:2"), faults=("400",)) as seen:
        page = seen.page
        expect(page.get_by_role("alert")).to_contain_text("BACo: Unknown router 'Nonsense:2'")
        expect(page.get_by_role("button", name="Try again")).to_have_count(0)
        seen.settle()
        assert all(seen.column("base")) and all(seen.column("aligned"))
        assert seen.column("baco") == []
        page.get_by_text("Router:").click()
        page.get_by_role("radio", name="P-Punc Punc keeps").check()
        expect(page.get_by_role("alert")).to_have_count(0)
        seen.settle()
        assert all(seen.column("baco"))


def test_a_link_may_name_a_router_in_any_case_and_without_its_threshold(
    browser: Browser, server: str, demo: Baco
) -> None:
    middle = demo.router("P-Punc")
    with visit(browser, link(server, router="p-punc")) as seen:
        seen.settle()
        assert seen.column("baco") == [
            answer.text for answer in demo.generate(PROMPT, n=2, seed=1, router=middle)
        ]
        expect(seen.page.locator("#dial")).to_be_enabled()
        expect(seen.page.locator(".dial output")).to_contain_text("γ = ")
        seen.page.get_by_text("Router:").click()
        expect(seen.page.get_by_role("radio", name="P-Punc Punc keeps")).to_be_checked()
        assert parse_qs(urlsplit(seen.page.url).fragment)["router"] == [middle.spelling]


def test_a_threshold_that_adapts_is_not_compared_with_its_start(
    browser: Browser, server: str, demo: Baco
) -> None:
    router = "P:0.1,share=0.5"
    with visit(browser, link(server, router=router, n=1, compare=0)) as seen:
        seen.settle()
        page, card = seen.page, seen.page.get_by_role("tooltip")
        expect(page.locator(".dial output")).to_have_text("γ adapts")
        expect(page.locator("#dial")).to_be_disabled()
        expect(page.locator("#dial-sentence")).to_contain_text("adapts while an answer is written")
        expect(page.locator("#dial-sentence")).not_to_contain_text("10%")
        for word in page.locator(".of-baco [data-word].base").all():
            word.hover()
            expect(card).to_contain_text("So base speaks.")
            expect(card).not_to_contain_text("γ = 10%")


def test_a_seed_that_the_page_cannot_hold_is_reported(browser: Browser, server: str) -> None:
    with visit(browser, link(server, seed=2**53 + 1)) as seen:
        expect(seen.page.get_by_role("alert")).to_contain_text(f"from 0 to {2**53 - 1}")
        assert seen.answer_requests == 0


def test_an_empty_prompt_is_reported_at_its_field(browser: Browser, server: str) -> None:
    with visit(browser, server + "/") as seen:
        page = seen.page
        expect(page.get_by_role("button", name="Write 6 answers")).to_be_enabled()
        page.get_by_label("Prompt").fill("  ")
        page.get_by_role("button", name="Write 6 answers").click()
        expect(page.get_by_role("alert")).to_have_text(re.compile("The prompt is empty"))
        expect(page.get_by_label("Prompt")).to_be_focused()
        assert seen.answer_requests == 0
        page.get_by_role("button", name=PROMPT).click()
        expect(page.get_by_role("alert")).to_have_count(0)
        seen.settle()
        assert all(seen.column("baco"))


def test_errors_of_the_server_are_shown_in_its_words(browser: Browser, server: str) -> None:
    long = "Recommend a summer destination. " * 200
    with visit(browser, link(server, prompt=long), faults=("400",)) as seen:
        expect(seen.page.get_by_role("alert")).to_contain_text("context window")
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_a_server_that_is_gone_is_reported_and_retried(browser: Browser, demo: Baco) -> None:
    with reserved_port() as port, ExitStack() as first:
        address = first.enter_context(served(demo, port)).url
        with visit(browser, address + "/", faults=("ERR_CONNECTION_REFUSED",)) as seen:
            page = seen.page
            expect(page.get_by_role("button", name="Write 6 answers")).to_be_enabled()
            first.close()
            page.get_by_role("button", name="Write 6 answers").click()
            expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
            with served(demo, port):
                page.get_by_role("button", name="Try again").click()
                seen.settle()
                expect(page.get_by_role("alert")).to_have_count(0)
                assert len(seen.column("baco")) == 6


def test_a_full_queue_is_reported_with_the_time_to_retry(browser: Browser, demo: Baco) -> None:
    with served(demo, max_open=0) as full, visit(browser, link(full.url), faults=("429",)) as seen:
        expect(seen.page.get_by_role("alert")).to_have_text(re.compile(r"Try again in \d+ s\."))
        expect(seen.page.get_by_role("button", name="Try again")).to_be_visible()


def test_a_server_with_a_key_asks_for_it(browser: Browser, demo: Baco) -> None:
    keys = ("open sesame",)
    with (
        served(demo, api_keys=keys) as locked,
        visit(browser, link(locked.url), faults=("401",)) as seen,
    ):
        page = seen.page
        field = page.get_by_label("API key")
        field.fill("guess")
        page.get_by_role("button", name="Use this key").click()
        expect(page.get_by_role("alert")).to_contain_text("key")
        field.fill("open sesame")
        page.get_by_role("button", name="Use this key").click()
        expect(field).to_have_count(0)
        seen.settle()
        assert all(seen.column("baco"))


def test_stop_keeps_the_text_written_so_far(
    browser: Browser, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with step_by_step(monkeypatch) as steps, visit(browser, server + "/") as seen:
        page = seen.page
        page.get_by_label("Compare with each model alone").uncheck()
        page.get_by_label("Prompt").fill("Give me a four-sentence story about a dragon.")
        page.get_by_text("Answers, seed, sampling").click()
        page.get_by_label("Answers", exact=True).fill("32")
        page.get_by_role("button", name="Write 32 answers").click()
        while not any(chunk.text.strip() for chunk in steps.take()):
            pass
        expect(page.locator(".of-baco [data-word]")).not_to_have_count(0)
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("button", name="Write 32 answers")).to_be_visible()
        before = seen.column("baco")
        assert any(before)
        expect(page.get_by_role("status").filter(has_text="Stopped.")).to_have_count(1)
        steps.release()
        page.wait_for_timeout(300)
        assert seen.column("baco") == before


def test_html_in_prompts_is_shown_and_never_run(browser: Browser, server: str) -> None:
    with visit(browser, link(server, prompt=EVIL, compare=0)) as seen:
        seen.settle()
        assert seen.page.evaluate("window.evil") is None
        expect(seen.page.get_by_role("heading", level=2, name=EVIL)).to_be_visible()


def test_the_page_can_ask_no_other_host(browser: Browser, server: str) -> None:
    with visit(browser, server + "/", faults=("Content Security Policy",)) as seen:
        refused = seen.page.evaluate("""() => new Promise((tell) => {
            addEventListener('securitypolicyviolation', (event) => tell(event.blockedURI));
            fetch('http://127.0.0.1:9/').catch(() => {});
        })""")
        assert refused == "http://127.0.0.1:9/"
