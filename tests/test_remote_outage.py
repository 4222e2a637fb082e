"""A server that goes away under load: one call retries it, and the others wait for its result."""

from collections.abc import Iterator
from typing import Any

import pytest

from baco import Baco
from tests.remoting import Backing, Door, listening, remote
from tests.serving import PROMPT, Served, served, wait_for

STORY = "Give me a four-sentence story about a dragon."
ROUTER = "P-Punc:0.4"


@pytest.fixture(scope="module")
def server(demo: Baco) -> Iterator[Served]:
    with served(demo) as running:
        yield running


class Outage:
    """Refuses calls as long as it lasts.

    Args:
        ends_after: ends after this many refused calls; None: never by itself.
    """

    def __init__(self, ends_after: int | None = None) -> None:
        self.on, self.turned_away, self._ends_after = False, 0, ends_after

    def __call__(self, body: dict[str, Any]) -> Any:
        if not self.on:
            return body
        self.turned_away += 1
        self.on = self.turned_away != self._ends_after
        return 503, {}


def test_a_server_known_to_be_gone_is_called_once_per_answer(server: Served, demo: Baco) -> None:
    outage = Outage()
    door = Door(Backing(server.url), outage)
    with (
        listening(door) as url,
        remote(server.url, aligned_url=url, retries=3, concurrency=4) as remote_pair,
    ):
        outage.on = True
        answers = remote_pair.generate(STORY, router=ROUTER, n=40, max_tokens=8, seed=1)
        assert all("server at http" in str(answer.error) for answer in answers)
        # One call is made four times, the three beside it twice, and the other 36 once.
        assert outage.turned_away <= 4 + 3 * 2 + 36
        outage.on = False
        for answer in remote_pair.generate(STORY, router=ROUTER, n=4, max_tokens=8):
            assert answer.error is None


def test_a_short_outage_loses_no_answer_and_costs_few_calls(server: Served, demo: Baco) -> None:
    outage = Outage(ends_after=5)
    with (
        listening(Door(Backing(server.url), outage)) as url,
        remote(server.url, aligned_url=url, concurrency=8) as remote_pair,
    ):
        settings: dict[str, Any] = {"router": ROUTER, "temperature": 0, "max_tokens": 12}
        outage.on = True
        answers = remote_pair.generate_batch([PROMPT, STORY] * 8, **settings)
        assert outage.turned_away >= 5
        expected = [
            demo.generate(prompt, **settings)[0].token_ids for prompt in (PROMPT, STORY)
        ] * 8
        assert [(a.token_ids, a.error) for (a,) in answers] == [(ids, None) for ids in expected]


def test_a_request_that_always_fails_ends_its_own_answer_only(server: Served, demo: Baco) -> None:
    poison = list(demo.pair.renderer.render(STORY).aligned_ids)

    def change(body: dict[str, Any]) -> Any:
        return (502, {}) if body["prompt"][: len(poison)] == poison else body

    with (
        listening(Door(Backing(server.url), change)) as url,
        remote(server.url, aligned_url=url, retries=1) as remote_pair,
    ):
        settings: dict[str, Any] = {"router": "Aligned", "max_tokens": 40}
        (broken,), *others = remote_pair.generate_batch([STORY, *[PROMPT] * 6], **settings)
        assert "failed 2 times: 502 no" in str(broken.error)
        assert [answer.error for (answer,) in others] == [None] * 6


def test_when_the_retrying_call_is_cancelled_another_one_retries(
    server: Served, demo: Baco
) -> None:
    outage = Outage()
    with (
        listening(Door(Backing(server.url), outage)) as url,
        remote(server.url, aligned_url=url, retries=500) as remote_pair,
    ):
        outage.on = True
        decoder = remote_pair.decoder()
        first, second = (
            decoder.submit(PROMPT, router=remote_pair.router("Aligned"), max_tokens=4)
            for _ in range(2)
        )
        wait_for(lambda: outage.turned_away >= 3)
        decoder.cancel(first)
        turned_away = outage.turned_away
        wait_for(lambda: outage.turned_away > turned_away)
        outage.on = False
        ended = {}
        while decoder.busy:
            for chunk in decoder.step():
                if chunk.completion is not None:
                    ended[chunk.prompt] = chunk.completion.error
        assert ended == {second: None}
