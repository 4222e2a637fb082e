"""The page exports links, text and JSON."""

import json
import re
from typing import Any
from urllib.parse import urlencode

from playwright.sync_api import Browser, expect

from tests.pages import visit

PROMPT = "Recommend a summer destination"


def link(server: str, **settings: object) -> str:
    defaults = {"prompt": PROMPT, "router": "P-Punc:0.3", "n": 3, "seed": 1, "compare": 1}
    return f"{server}/#{urlencode(defaults | settings)}"


def test_a_link_gives_the_same_answers_and_settings(browser: Browser, server: str) -> None:
    address = link(
        server, n=2, seed=77, router="H-Punc:2.5", temperature=0.8, min_p=0.05, max_tokens=12
    )
    with visit(browser, address) as seen:
        seen.settle()
        first = {kind: seen.column(kind) for kind in ("base", "aligned", "baco")}
        shared = seen.page.url
        seen.page.reload()
        seen.settle()
        assert {kind: seen.column(kind) for kind in first} == first
    with visit(browser, shared) as other:
        other.settle()
        assert {kind: other.column(kind) for kind in first} == first
        page = other.page
        page.get_by_text("Answers, seed, sampling").click()
        fields = {
            "Answers": "2",
            "Seed": "77",
            "Temperature": "0.8",
            "Min-p": "0.05",
            "Most tokens": "12",
        }
        for label, value in fields.items():
            expect(page.get_by_label(label, exact=True)).to_have_value(value)
        expect(page.get_by_role("slider")).to_have_attribute("aria-valuetext", re.compile("2.5$"))
        body = json.loads(next(r for r in other.requests if "/v1/" in r.url).post_data)
        assert {
            "n": 2,
            "seed": 77,
            "temperature": 0.8,
            "min_p": 0.05,
            "max_tokens": 12,
        }.items() <= body.items()


def test_answers_can_be_copied_and_downloaded(browser: Browser, server: str) -> None:
    with visit(browser, link(server), permissions=["clipboard-read", "clipboard-write"]) as seen:
        seen.settle()
        page = seen.page

        def copied() -> str:
            text: str = page.evaluate("navigator.clipboard.readText()")
            return text

        page.get_by_role("button", name="Copy link").click()
        expect(page.get_by_text("Link copied.")).to_be_visible()
        assert copied() == page.url
        page.get_by_role("button", name="Copy answers").click()
        expect(page.get_by_text("Answers copied.")).to_be_visible()
        for kind in ("base", "aligned", "baco"):
            assert all(text in copied() for text in seen.column(kind))
        page.evaluate("window.setTimeout = () => 0")  # what says "Copied" stays
        page.get_by_role("button", name="Copy answer 2 of BACo").click()
        expect(page.get_by_title("Copied")).to_be_visible()
        assert copied() == seen.column("baco")[1]

        with page.expect_download() as download:
            page.get_by_role("button", name="Download JSON").click()
        downloaded: dict[str, Any] = json.loads(download.value.path().read_text(encoding="utf-8"))
        assert downloaded["settings"]["prompt"] == PROMPT
        assert [method["router"] for method in downloaded["methods"]] == [
            "Base",
            "Aligned",
            "P-Punc:0.3",
        ]
        for method, kind in zip(downloaded["methods"], ("base", "aligned", "baco"), strict=True):
            texts = [
                "".join(piece["text"] for piece in answer["pieces"]) for answer in method["answers"]
            ]
            assert texts == [answer["text"] for answer in method["answers"]] == seen.column(kind)
