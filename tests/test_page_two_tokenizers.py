"""A server, its page and a chat whose two models share text instead of token ids."""

from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, expect

from baco import Baco
from baco.cli.chat.conversation import Conversation
from baco.cli.chat.session import Session
from tests.pages import visit
from tests.serving import WAIT, served

PROMPT = "Recommend a summer destination"


@pytest.fixture(scope="module")
def pair() -> Baco:
    return Baco.load("demo", separate_tokenizers=True)


@pytest.fixture(scope="module")
def server(pair: Baco) -> Iterator[str]:
    with served(pair) as running:
        yield running.url


def test_a_server_lists_what_can_decode_the_pair(server: str) -> None:
    names = {entry["name"] for entry in httpx.get(f"{server}/baco/routers", timeout=WAIT).json()}
    assert {"P-Punc", "Rand", "Base"} <= names
    assert names.isdisjoint({"Gap", "Ensemble", "LogitEnsemble", "Contrast"})
    listed = httpx.get(f"{server}/v1/models", timeout=WAIT).json()["data"]
    models = {card["id"] for card in listed}
    assert {"baco", "baco/base", "baco/Nudging:0.3"} <= models
    assert not any("Gap" in name or "nsemble" in name for name in models)


@pytest.mark.parametrize("router", ["P-Punc:0.3", "Rand:0.5"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_word_shows_its_source_and_why(
    browser: Browser, server: str, pair: Baco, router: str, theme: str
) -> None:
    address = f"{server}/#prompt={PROMPT}&router={router}&n=1&seed=1&compare=1"
    with visit(browser, address, color_scheme=theme) as seen:
        seen.settle()
        for kind, name in (("base", "Base"), ("aligned", "Aligned"), ("baco", router)):
            answers = pair.generate(PROMPT, n=1, seed=1, router=name)
            assert seen.column(kind) == [answer.text for answer in answers]
        words = seen.page.locator(".of-baco [data-word]")
        card = seen.page.get_by_role("tooltip")
        for number in range(min(words.count(), 8)):
            words.nth(number).hover()
            expect(card).to_contain_text("is from")
            text = card.inner_text()
            assert "NaN" not in text and "null" not in text


def test_chat_offers_the_routers_that_can_decode_the_pair(pair: Baco, demo: Baco) -> None:
    def offered(baco: Baco) -> set[str]:
        conversation = Conversation(baco, baco.router("P-Punc:0.4"), {})
        words = Session(conversation, interactive=False)._router_words()
        return {spelling.split(":")[0] for spelling, _ in words}

    assert {"Gap", "P", "Punc"} <= offered(demo)
    assert {"P", "Punc"} <= offered(pair)
    assert "Gap" not in offered(pair)
