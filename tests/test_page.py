"""The page of a real server in a browser: answers, sources and explanations."""

import math
import re
from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from baco import Baco
from baco.outputs import Completion
from baco.text.segmentation import distinct
from tests.pages import Visit, visit
from tests.serving import step_by_step

PROMPT = "Recommend a summer destination"


def link(server: str, **settings: object) -> str:
    defaults = {"prompt": PROMPT, "router": "P-Punc:0.3", "n": 3, "seed": 1, "compare": 1}
    return f"{server}/#{urlencode(defaults | settings)}"


def stretches(words: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(source, text) of each run of words from one source, without the space between runs."""
    grouped = groupby(words, key=itemgetter(0))
    return [(source, "".join("".join(text.split()) for _, text in run)) for source, run in grouped]


def shown(page: Page, selector: str) -> list[tuple[str, str]]:
    words = page.locator(selector).evaluate_all(
        "words => words.map(w => [w.classList.contains('base') ? 'base' : 'aligned', w.innerText])"
    )
    return stretches((source, text) for source, text in words)


def written(completion: Completion) -> list[tuple[str, str]]:
    return stretches((str(piece.source), piece.text) for piece in completion.pieces)


def test_a_first_visit_explains_and_sends_no_request_for_answers(
    browser: Browser, server: str
) -> None:
    with visit(browser, server + "/") as first:
        page = first.page
        expect(page.get_by_role("heading", name="See who wrote which word")).to_be_visible()
        expect(page.get_by_label("Prompt")).to_have_value(PROMPT)
        expect(page.get_by_role("button", name="Write 6 answers")).to_be_enabled()
        assert first.answer_requests == 0


def test_the_example_of_a_first_visit_is_an_answer_of_the_pair(
    browser: Browser, server: str, demo: Baco
) -> None:
    with visit(browser, server + "/") as first:
        expect(first.page.locator("blockquote")).to_be_visible()
        example = shown(first.page, "blockquote span")
    assert example == written(demo.generate(PROMPT, n=1, seed=1)[0])


def test_every_word_shows_its_source_in_colour_and_line(
    browser: Browser, server: str, demo: Baco
) -> None:
    with visit(browser, server + "/") as first:
        page = first.page
        page.get_by_role("button", name="Write 6 answers").click()
        first.settle()
        answers = demo.generate(PROMPT, n=6, seed=1)
        assert first.column("baco") == [answer.text for answer in answers]
        for number, answer in enumerate(answers, 1):
            selector = f".of-baco li:nth-child({number}) [data-word]"
            assert shown(page, selector) == written(answer)
        looks = {
            source: page.locator(f".of-baco [data-word].{source}").first.evaluate(
                "word => [getComputedStyle(word).color, getComputedStyle(word).textDecorationLine]"
            )
            for source in ("base", "aligned")
        }
        assert looks["base"][1] == "underline"
        assert looks["aligned"][1] == "none"
        assert looks["base"][0] != looks["aligned"][0]


def test_answers_grow_word_by_word(
    browser: Browser, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with step_by_step(monkeypatch) as steps, visit(browser, server + "/") as first:
        # Its answers take more steps than are watched, however many tokens a step writes.
        first.page.get_by_label("Prompt").fill("Give me a four-sentence story about a dragon.")
        first.page.get_by_label("Compare with each model alone").uncheck()
        first.page.get_by_role("button", name="Write 6 answers").click()
        text, lengths = "", set[int]()
        while len(lengths) < 4:
            text += "".join(chunk.text for chunk in steps.take() if chunk.sample == 0)
            if text.strip():
                expect(first.page.locator(".of-baco li p").first).to_have_text(text)
                lengths.add(len(text))
        steps.release()
        first.settle()


def test_the_columns_are_the_models_alone_and_both_on_the_same_seed(
    browser: Browser, server: str, demo: Baco
) -> None:
    with visit(browser, link(server)) as seen:
        seen.settle()
        for kind, router in {"base": "Base", "aligned": "Aligned", "baco": "P-Punc:0.3"}.items():
            answers = demo.generate(PROMPT, n=3, seed=1, router=router)
            assert seen.column(kind) == [answer.text for answer in answers]
        assert seen.page.locator(".of-base [data-word].aligned").count() == 0
        assert seen.page.locator(".of-aligned [data-word].base").count() == 0
        tops = [
            seen.page.locator(f".of-{kind} li:nth-child(2)").bounding_box()["y"]
            for kind in ("base", "aligned", "baco")
        ]
        assert max(tops) - min(tops) < 1

        seen.page.get_by_label("Compare with each model alone").uncheck()
        expect(seen.page.locator(".of-base")).to_have_count(0)
        seen.settle()
        assert seen.column("baco") == [
            a.text for a in demo.generate(PROMPT, n=3, seed=1, router="P-Punc:0.3")
        ]


def test_answers_that_repeat_say_so(browser: Browser, server: str, demo: Baco) -> None:
    texts = [answer.text for answer in demo.generate(PROMPT, n=6, seed=1, router="Aligned")]
    repeats = [
        f"same as {texts.index(text) + 1}" for i, text in enumerate(texts) if text in texts[:i]
    ]
    assert repeats
    with visit(browser, link(server, n=6)) as seen:
        seen.settle()
        assert seen.page.locator(".of-aligned").get_by_text("same as").all_inner_texts() == repeats


# At once: a pause of the browser between two of them would begin another run.
FIVE_NOTCHES = """dial => {
  for (let notch = 0; notch < 5; notch += 1) {
    dial.stepUp();
    dial.dispatchEvent(new Event("input", { bubbles: true }));
  }
}"""


def test_the_dial_writes_again_and_keeps_the_history(browser: Browser, server: str) -> None:
    with visit(browser, link(server)) as seen:
        seen.settle()
        page, before = seen.page, seen.column("baco")
        dial = page.get_by_role("slider", name="Diversity")
        assert seen.answer_requests == 3
        dial.evaluate(FIVE_NOTCHES)
        runs = page.get_by_role("list", name="Runs").get_by_role("button")
        expect(runs).to_have_count(2)
        seen.settle()
        assert seen.answer_requests == 4  # the models alone stay: same seed, same answers
        assert seen.column("baco") != before
        turned = parse_qs(urlsplit(page.url).fragment)["router"][0]
        assert re.fullmatch(r"P-Punc:0\.\d+", turned) and turned != "P-Punc:0.3"
        expect(page.locator(".of-baco code")).to_have_text(turned)

        runs.nth(1).click()
        assert seen.column("baco") == before
        expect(runs.nth(1)).to_have_attribute("aria-current", "true")
        expect(page.locator(".of-baco code")).to_have_text("P-Punc:0.3")
        assert "P-Punc%3A0.3" in page.url
        assert seen.answer_requests == 4


def test_another_router_is_explained_and_decodes_again(browser: Browser, server: str) -> None:
    with visit(browser, link(server, compare=0)) as seen:
        seen.settle()
        page = seen.page
        page.get_by_text("Router:").click()
        routers = page.get_by_role("radio")
        assert routers.count() >= 15
        page.get_by_role("radio", name="Rand base with probability").check()
        expect(page.locator(".of-baco code")).to_have_text(re.compile(r"Rand:0\.\d+"))
        expect(page.locator("#dial-sentence")).to_contain_text("of the time, by chance")
        seen.settle()
        page.get_by_role("radio", name="Aligned the aligned model alone").check()
        expect(page.locator(".of-baco code")).to_have_text("Aligned")
        seen.settle()
        assert page.locator(".of-baco [data-word].base").count() == 0
        expect(page.get_by_role("slider")).to_be_disabled()


def test_pointing_at_a_word_shows_both_probabilities_and_the_decision(
    browser: Browser, server: str, demo: Baco
) -> None:
    decoder = demo.decoder()
    decoder.submit(PROMPT, router=demo.router("P-Punc:0.3"), n=1, seed=1, explain=True)
    tokens = []
    while decoder.busy:
        tokens += [token for chunk in decoder.step() for token in chunk.tokens]
    first, second = tokens[0], tokens[1]
    assert (first.source, second.source) == ("base", "aligned")
    assert first.why is not None
    percentages = [
        100 * math.exp(logprob) for logprob in (first.why.base_logprob, first.why.aligned_logprob)
    ]
    with visit(browser, link(server, n=1, compare=0)) as seen:
        seen.settle()
        page, card = seen.page, seen.page.get_by_role("tooltip")
        assert card.count() == 0
        page.locator("[data-word]").first.hover()
        expect(card).to_contain_text("is from base")
        assert probabilities(card.inner_text()) == pytest.approx(percentages, abs=0.5)
        expect(card).to_contain_text("is unsure")
        expect(card).to_contain_text("below γ = 30%. So base speaks.")
        page.locator("[data-word]").nth(1).hover()
        expect(card).to_contain_text("is from aligned")
        expect(card).to_contain_text("not below γ = 30%. So aligned speaks.")
        page.get_by_text(".", exact=True).first.hover()
        expect(card).to_contain_text("So aligned speaks.")
        page.mouse.move(2, 2)
        expect(card).to_have_count(0)


def probabilities(card: str) -> list[float]:
    """The two percentages of a card; "under 0.1%" is 0.1."""
    shares = re.findall(r"^(?:under )?([\d.]+)%$", card, re.MULTILINE)
    return [float(share) for share in shares]


def meters(seen: Visit, kind: str) -> dict[str, str]:
    column = seen.page.locator(f".of-{kind} dl")
    return dict(
        zip(
            column.locator("dt").all_inner_texts(),
            column.locator("dd").all_inner_texts(),
            strict=True,
        )
    )


def test_the_meters_measure_the_answers(browser: Browser, server: str, demo: Baco) -> None:
    with visit(browser, link(server, n=4)) as seen:
        seen.settle()
        for kind, router in {"base": "Base", "aligned": "Aligned", "baco": "P-Punc:0.3"}.items():
            answers = demo.generate(PROMPT, n=4, seed=1, router=router)
            texts = [answer.text for answer in answers]
            figures = meters(seen, kind)
            assert figures["Distinct answers"] == f"{len(set(texts))} of 4"
            assert figures["Distinct-2"] == f"{distinct(texts, 2):.2f}"
            assert re.fullmatch(r"0\.\d\d", figures["Embedding distance"])
            tokens = [source for answer in answers for source in answer.sources]
            share = 100 * tokens.count("base") / len(tokens)
            assert float(figures["Base share"].removesuffix("%")) == pytest.approx(share, abs=0.51)
        far, near = (
            float(meters(seen, kind)["Embedding distance"]) for kind in ("base", "aligned")
        )
        assert far > near
