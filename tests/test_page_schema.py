"""The page under a JSON schema: its box, and answers as a table of fields by source."""

import json
import re
from itertools import groupby
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from baco import Baco
from tests.pages import broken, visit
from tests.serving import step_by_step
from tests.test_page_use import PHONE, focused

PROMPT = "Recommend a summer destination"
SCHEMA = {
    "type": "object",
    "properties": {
        "place": {"type": "string", "maxLength": 24},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "more": {"type": "array", "items": {"enum": ["sun", "sea"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["place", "days", "more"],
    "additionalProperties": False,
}
# Mostly answers whose place has words of both models.
ROUTER = "Rand:0.5"


def link(server: str, schema: object = SCHEMA, **settings: object) -> str:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    defaults = {"prompt": PROMPT, "router": ROUTER, "n": 3, "seed": 1, "compare": 0}
    return f"{server}/#{urlencode(defaults | {'schema': text} | settings)}"


def cells(page: Page, kind: str = "baco") -> list[list[str]]:
    rows: list[list[str]] = page.locator(f".of-{kind} tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.querySelectorAll('td:not(.about)')]"
        ".map(cell => cell.textContent))"
    )
    return rows


def shown_values(answer: Any) -> list[str]:
    """The values of an answer as its row shows them."""
    values = json.loads(answer.text).values()
    return [value if isinstance(value, str) else json.dumps(value) for value in values]


def test_answers_under_a_schema_are_a_table_of_their_fields(
    browser: Browser, server: str, demo: Baco
) -> None:
    with visit(browser, link(server, compare=1)) as seen:
        seen.settle()
        for kind, router in {"base": "Base", "aligned": "Aligned", "baco": ROUTER}.items():
            answers = demo.generate(PROMPT, n=3, seed=1, router=router, schema=SCHEMA)
            assert cells(seen.page, kind) == [shown_values(answer) for answer in answers]
        table = seen.page.get_by_role("table", name="BACo: a row for each answer")
        names = table.get_by_role("columnheader").all_inner_texts()
        assert names == ["Answer", "place", "days", "more", "About the answer"]
        assert seen.page.locator("[data-word].base").count() > 0


def test_text_in_a_cell_is_coloured_by_source_like_the_running_text(
    browser: Browser, server: str, demo: Baco
) -> None:
    answers = demo.generate(PROMPT, n=3, seed=1, router=ROUTER, schema=SCHEMA)
    with visit(browser, link(server)) as seen:
        seen.settle()
        mixed = 0
        for number, answer in enumerate(answers, 1):
            sources = [piece.source for piece in answer.pieces for _ in piece.text]
            begin = answer.text.index(": ") + 3
            place = answer.parsed["place"]
            expected = [
                (str(source), "".join(char for _, char in run).strip())
                for source, run in groupby(
                    zip(sources[begin : begin + len(place)], place, strict=True),
                    key=lambda pair: pair[0],
                )
            ]
            words = seen.page.locator(f".of-baco tbody tr:nth-child({number}) td:nth-child(2)")
            shown = words.locator("[data-word]").evaluate_all(
                "words => words.map(word => [word.className.split(' ')[0], word.textContent])"
            )
            runs = [
                (source, "".join(text for _, text in run))
                for source, run in groupby(shown, key=lambda word: word[0])
            ]
            assert runs == [(s, text.replace(" ", "")) for s, text in expected if text]
            mixed += len({source for source, _ in runs}) > 1
        assert mixed
        in_table = looks(seen.page)
        seen.page.get_by_label("Show as JSON").check()
        assert seen.column("baco") == [answer.text for answer in answers]
        assert looks(seen.page) == in_table


def looks(page: Page) -> list[list[str]]:
    """Colour and line of the first word of each source."""
    return [
        page.locator(f".of-baco [data-word].{source}").first.evaluate(
            "word => [getComputedStyle(word).color, getComputedStyle(word).textDecorationLine]"
        )
        for source in ("base", "aligned")
    ]


def test_a_text_shows_without_its_escapes_and_a_missing_field_as_a_dash(
    browser: Browser, server: str, demo: Baco
) -> None:
    schema = {
        "type": "object",
        "properties": {
            "quote": {"const": 'say "hé\\llo"\n🎈'},
            "list": {"const": [1, {"a": "},]"}]},
            "gone": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["quote", "list"],
        "additionalProperties": False,
    }
    hot: dict[str, Any] = {"n": 6, "seed": 1, "router": ROUTER, "temperature": 4.0, "min_p": 0}
    answers = demo.generate(PROMPT, schema=schema, **hot)
    gone = [str(answer.parsed.get("gone", "–")) for answer in answers]
    assert "–" in gone
    with visit(browser, link(server, schema, **hot)) as seen:
        seen.settle()
        written = ['say "hé\\llo"\n🎈', '[1, {"a": "},]"}]']
        assert cells(seen.page) == [[*written, text] for text in gone]
        seen.page.get_by_text("🎈").first.hover()
        expect(seen.page.get_by_role("tooltip")).to_contain_text("🎈 is from")


def test_the_table_fills_in_while_the_answers_are_written(
    browser: Browser, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A place of more tokens than one step writes.
    long = {"place": {"type": "string", "minLength": 90, "maxLength": 99}}
    schema = SCHEMA | {"properties": SCHEMA["properties"] | long}  # type: ignore[operator]
    with step_by_step(monkeypatch) as steps, visit(browser, server + "/") as seen:
        page = seen.page
        page.get_by_label("Compare with each model alone").uncheck()
        page.get_by_text("JSON schema:").click()
        page.get_by_label("Every answer is JSON").fill(json.dumps(schema))
        page.get_by_role("button", name="Write 6 answers").click()
        row = page.locator(".of-baco tbody tr").first.locator("td:not(.about)")
        place, *others = (row.nth(column).locator("[data-word]") for column in range(3))
        expect(row).to_have_count(3)
        for words in (place, *others):
            expect(words).to_have_count(0)
        text = ""
        while not re.match(r'\{"place": *"[^"]*\w', text):
            text += "".join(chunk.text for chunk in steps.take() if chunk.sample == 0)
        expect(place).not_to_have_count(0)
        for words in others:
            expect(words).to_have_count(0)
        steps.release()
        seen.settle()
        for words in (place, *others):
            expect(words).not_to_have_count(0)


BAD = {
    "{": "The schema is not JSON",
    '{"type": "array", "uniqueItems": true}': "keyword 'uniqueItems' (at #) is not supported",
    '{"type": "integer", "minimum": 3, "maximum": 2}': "No answer can satisfy the schema",
}


def test_a_bad_schema_is_reported_at_its_box_and_nothing_is_decoded(
    browser: Browser, server: str
) -> None:
    first, *others = BAD
    with visit(browser, link(server, first), faults=("400",)) as seen:
        page = seen.page
        alert = page.get_by_role("region", name="What to write").get_by_role("alert")
        box = page.get_by_label("Every answer is JSON")
        expect(alert).to_contain_text(BAD[first])
        expect(box).to_be_focused()
        assert broken(page) == []
        for schema in others:
            box.fill(schema)
            expect(alert).to_have_count(0)
            page.get_by_role("button", name="Write 3 answers").click()
            expect(alert).to_contain_text(BAD[schema])
            expect(box).to_be_focused()
            expect(box).to_have_attribute("aria-invalid", "true")
            assert "schema-fault" in str(box.get_attribute("aria-describedby")).split()
        assert seen.answer_requests == 0
        page.get_by_role("button", name="Clear").click()
        expect(alert).to_have_count(0)
        page.get_by_role("button", name="Write 3 answers").click()
        seen.settle()
        assert seen.answer_requests == 1


def test_the_keyboard_puts_an_example_and_walks_through_a_row(
    browser: Browser, server: str
) -> None:
    with visit(browser, server + "/") as seen:
        page, keys = seen.page, seen.page.keyboard
        page.get_by_label("Compare with each model alone").uncheck()
        page.get_by_text("JSON schema:").focus()
        keys.press("Enter")
        keys.press("Tab")
        assert focused(page).get_attribute("id") == "schema"
        keys.press("Tab")
        assert focused(page).inner_text() == "Example schema"
        keys.press("Enter")
        expect(page.get_by_label("Every answer is JSON")).to_have_value(re.compile('"tip"'))
        page.get_by_role("button", name="Write 6 answers").focus()
        keys.press("Enter")
        seen.settle()
        page.get_by_role("button", name="Copy answer 2 of BACo").focus()
        keys.press("Tab")
        card = page.get_by_role("tooltip")
        row = page.locator(".of-baco tbody tr:nth-child(2)")
        words = row.locator("[data-word]").all_inner_texts()
        expect(card).to_contain_text(f"{words[0]} is from")
        keys.press("ArrowRight")
        expect(card).to_contain_text(f"{words[1]} is from")
        keys.press("End")
        expect(card).to_contain_text(f"{words[-1]} is from")
        assert row.locator("td:nth-child(4) [data-word]").last.evaluate(
            "word => word === document.activeElement"
        )
        keys.press("Escape")
        keys.press("Tab")
        assert focused(page).get_attribute("aria-label") == "Copy answer 3 of BACo"
        shared = parse_qs(urlsplit(page.url).fragment)
        assert json.loads(shared["schema"][0])["required"] == ["tip", "days", "kind"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_violations_in_tables(browser: Browser, server: str, theme: str) -> None:
    with visit(browser, link(server, compare=1), color_scheme=theme) as seen:
        seen.settle()
        seen.page.get_by_text("JSON schema:").click()
        seen.page.locator(".of-baco [data-word].base").first.hover()
        assert broken(seen.page) == []


def test_a_phone_shows_one_table_and_the_page_scrolls_one_way(
    browser: Browser, server: str
) -> None:
    wide = {f"field_number_{number}": {"enum": ["north", "south"]} for number in range(8)}
    schema = {"type": "object", "properties": wide, "required": [*wide]}
    with visit(browser, link(server, schema, n=1, compare=1), **PHONE) as seen:
        seen.settle()
        page = seen.page
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        expect(page.locator(".of-baco table")).to_be_visible()
        expect(page.locator(".of-aligned table")).to_be_hidden()
        assert page.locator(".of-baco .scroll").evaluate("box => box.scrollWidth > box.clientWidth")
        assert broken(page) == []


def test_a_schema_of_something_else_than_an_object_shows_running_text(
    browser: Browser, server: str, demo: Baco
) -> None:
    schema = {"enum": ["north", "south"]}
    with visit(browser, link(server, schema)) as seen:
        seen.settle()
        answers = demo.generate(PROMPT, n=3, seed=1, router=ROUTER, schema=schema)
        assert seen.column("baco") == [answer.text for answer in answers]
        assert seen.page.get_by_role("table").count() == 0
        expect(seen.page.get_by_label("Show as JSON")).to_have_count(0)
