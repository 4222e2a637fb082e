"""The thread that owns the decoder: requests share it and never hurt each other."""

from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import pytest

from baco import Baco
from baco.completion import Chunk
from baco.decoder import Decoder
from baco.errors import BacoError
from baco.serve.driver import Driver, QueueFullError


class Broken(Decoder):
    """A decoder whose step raises."""

    def step(self) -> list[Chunk]:
        raise RuntimeError("the step broke")


PROMPT = "Give me a dinner idea"
WAIT = 60


@pytest.fixture
def driver(demo: Baco) -> Iterator[Driver]:
    driver = Driver(demo.decoder, most=3)
    yield driver
    driver.close()


def ask(driver: Driver, demo: Baco, **sampling: Any) -> tuple[int, SimpleQueue]:
    told: SimpleQueue[Chunk | Exception] = SimpleQueue()
    router = demo.router("P-Punc:0.4")
    key = driver.submit(lambda d: d.submit(PROMPT, router=router, **sampling), told.put)
    return key, told


def text(told: SimpleQueue) -> str:
    parts = []
    while True:
        chunk = told.get(timeout=WAIT)
        assert isinstance(chunk, Chunk), chunk
        parts.append(chunk.text)
        if chunk.finish_reason is not None:
            return "".join(parts)


def test_concurrent_requests_get_the_answers_they_get_alone(driver: Driver, demo: Baco) -> None:
    asked = [ask(driver, demo, seed=seed)[1] for seed in range(3)]
    for seed, told in enumerate(asked):
        alone = demo.generate(PROMPT, router="P-Punc:0.4", seed=seed)[0]
        assert text(told) == alone.text


def test_a_refused_request_tells_its_caller_and_no_neighbour(driver: Driver, demo: Baco) -> None:
    good = ask(driver, demo, seed=1)[1]
    bad = ask(driver, demo, temperature=-1.0)[1]
    assert isinstance(bad.get(timeout=WAIT), BacoError)
    assert text(good) == demo.generate(PROMPT, router="P-Punc:0.4", seed=1)[0].text


def test_a_full_queue_refuses_and_a_cancelled_request_makes_room(
    driver: Driver, demo: Baco
) -> None:
    keys = [ask(driver, demo, seed=seed, n=16)[0] for seed in range(3)]
    with pytest.raises(QueueFullError):
        ask(driver, demo)
    for key in keys:
        driver.cancel(key)
    done: SimpleQueue[None] = SimpleQueue()
    driver._asked.put(lambda: done.put(None))
    done.get(timeout=WAIT)
    assert driver.open == 0
    assert not any(driver._decoder.holds(ticket) for ticket in range(3))
    assert text(ask(driver, demo, seed=1)[1])


def test_after_a_step_that_raises_its_requests_are_told_and_the_next_is_answered(
    driver: Driver, demo: Baco
) -> None:
    ask(driver, demo, seed=0)[1].get(timeout=WAIT)

    def submit_and_break(decoder: Decoder) -> int:
        ticket = decoder.submit(PROMPT, router=demo.router("P-Punc:0.4"), seed=1)
        decoder.__class__ = Broken
        return ticket

    told: SimpleQueue[Chunk | Exception] = SimpleQueue()
    driver.submit(submit_and_break, told.put)
    assert isinstance(told.get(timeout=WAIT), RuntimeError)
    alone = demo.generate(PROMPT, router="P-Punc:0.4", seed=2)[0]
    assert text(ask(driver, demo, seed=2)[1]) == alone.text
