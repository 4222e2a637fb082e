"""The thread that owns the decoder: concurrent requests share it and do not affect each other."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest
from fastapi import Request

from baco import Baco
from baco.calibration.store import Calibration
from baco.decoder import Decoder, Scored
from baco.errors import BacoError
from baco.outputs import Chunk
from baco.routing.router import Router, RuleRouter
from baco.routing.rules import LogitRule
from baco.serve.app import create_app
from baco.serve.engine_thread import ClosedError, EngineThread, Job, QueueFullError
from baco.serve.errors import ClientGoneError
from baco.serve.stream import unless_disconnected
from tests.serving import WAIT, wait_for, waiting_router

PROMPT = "Give me a dinner idea"
ROUTER = "P-Punc:0.4"

Results = SimpleQueue[Chunk | Scored | Exception]


@pytest.fixture
def engine_thread(demo: Baco) -> Iterator[EngineThread]:
    engine_thread = EngineThread(demo.decoder, max_open=3)
    yield engine_thread
    engine_thread.close()


def job(demo: Baco, router: str = ROUTER, **sampling: Any) -> tuple[Job, Results]:
    results: Results = SimpleQueue()
    chosen = demo.router(router)
    return Job(lambda d: d.submit(PROMPT, router=chosen, **sampling), results.put), results


def ask(engine_thread: EngineThread, demo: Baco, **sampling: Any) -> Results:
    submitted, results = job(demo, **sampling)
    engine_thread.submit([submitted])
    return results


def texts(results: Results, n: int = 1) -> list[str]:
    """The texts that a caller joins from its chunks; no chunk may follow the last of an answer."""
    parts = [""] * n
    ended: set[int] = set()
    while len(ended) < n:
        chunk = results.get(timeout=WAIT)
        assert isinstance(chunk, Chunk), chunk
        assert chunk.sample not in ended
        parts[chunk.sample] += chunk.text
        if chunk.finish_reason is not None:
            ended.add(chunk.sample)
            assert chunk.completion is not None
            assert chunk.completion.text == parts[chunk.sample]
    return parts


def alone(demo: Baco, **sampling: Any) -> list[str]:
    return [c.text for c in demo.generate(PROMPT, router=ROUTER, **sampling)]


def settle(engine_thread: EngineThread) -> None:
    """Wait until the thread has done everything submitted before."""
    done: SimpleQueue[None] = SimpleQueue()
    engine_thread._work.put((0, lambda: done.put(None)))
    done.get(timeout=WAIT)


def test_concurrent_requests_get_the_answers_they_get_alone(
    engine_thread: EngineThread, demo: Baco
) -> None:
    queues = [ask(engine_thread, demo, seed=seed) for seed in range(3)]
    for seed, results in enumerate(queues):
        assert texts(results) == alone(demo, seed=seed)


def test_all_answers_arrive_when_several_end_in_one_step(
    engine_thread: EngineThread, demo: Baco
) -> None:
    results = ask(engine_thread, demo, seed=1, n=6, max_tokens=4)
    assert texts(results, 6) == alone(demo, seed=1, n=6, max_tokens=4)


def test_a_refused_request_is_reported_to_its_own_caller_only(
    engine_thread: EngineThread, demo: Baco
) -> None:
    good = ask(engine_thread, demo, seed=1)
    bad = ask(engine_thread, demo, temperature=-1.0)
    assert isinstance(bad.get(timeout=WAIT), BacoError)
    assert texts(good) == alone(demo, seed=1)


def test_a_full_queue_refuses_and_a_cancelled_request_makes_room(
    engine_thread: EngineThread, demo: Baco
) -> None:
    with waiting_router("Waits") as decides:
        jobs = [job(demo, "Waits", seed=seed, n=16)[0] for seed in range(3)]
        engine_thread.submit(jobs)
        with pytest.raises(QueueFullError):
            ask(engine_thread, demo)
        for one in jobs:
            engine_thread.cancel(one)
        decides.set()
        settle(engine_thread)
    assert engine_thread.open == 0
    assert engine_thread._decoder is not None
    assert not any(engine_thread._decoder.holds(ticket) for ticket in range(3))
    assert texts(ask(engine_thread, demo, seed=1)) == alone(demo, seed=1)


def test_jobs_are_taken_all_or_none(engine_thread: EngineThread, demo: Baco) -> None:
    with pytest.raises(QueueFullError):
        engine_thread.submit([job(demo, seed=seed)[0] for seed in range(4)])
    assert engine_thread.open == 0


class BrokenError(RuntimeError):
    pass


def poisoned(innocent_steps: int) -> Router:
    """A router that raises in every step after ``innocent_steps``."""
    left = [innocent_steps]

    def decide(signals: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise BrokenError("the poison works")
        return signals.max_base < 2

    return RuleRouter(LogitRule("Poisoned", decide, "breaks", threshold=False))


def poison(engine_thread: EngineThread, innocent_steps: int) -> Results:
    results: Results = SimpleQueue()
    router = poisoned(innocent_steps)
    engine_thread.submit([Job(lambda d: d.submit(PROMPT, router=router, seed=9), results.put)])
    return results


def broke_off(results: Results) -> bool:
    """Is an answer's last chunk that of a broken step?"""
    while isinstance(item := results.get(timeout=WAIT), Chunk) and item.finish_reason is None:
        pass
    assert isinstance(item, Chunk) and item.completion is not None
    return item.finish_reason == "error" and "BrokenError" in str(item.completion.error)


@pytest.mark.parametrize("innocent_steps", [0, 3])
def test_a_request_that_raises_fails_alone_and_other_answers_are_unchanged(
    demo: Baco, innocent_steps: int
) -> None:
    engine_thread = EngineThread(demo.decoder, max_open=10)
    before = [ask(engine_thread, demo, seed=seed, n=3) for seed in range(3)]
    bad = poison(engine_thread, innocent_steps)
    after = [ask(engine_thread, demo, seed=seed) for seed in range(3, 5)]
    assert broke_off(bad)
    for seed, results in enumerate(before):
        assert texts(results, 3) == alone(demo, seed=seed, n=3)
    for seed, results in enumerate(after, 3):
        assert texts(results) == alone(demo, seed=seed)
    settle(engine_thread)
    assert engine_thread.open == 0
    engine_thread.close()


def test_two_requests_that_raise_in_one_batch_are_both_isolated(demo: Baco) -> None:
    engine_thread = EngineThread(demo.decoder, max_open=10)
    good = ask(engine_thread, demo, seed=1)
    bad = [poison(engine_thread, 0), poison(engine_thread, 2)]
    other = ask(engine_thread, demo, seed=2)
    assert all(broke_off(results) for results in bad)
    assert (texts(good), texts(other)) == (alone(demo, seed=1), alone(demo, seed=2))
    engine_thread.close()


def test_a_decoder_that_cannot_be_made_fails_its_request_and_the_next_one_tries_again(
    demo: Baco,
) -> None:
    failures = [MemoryError("no room")]

    def make() -> Decoder:
        if failures:
            raise failures.pop()
        return demo.decoder()

    engine_thread = EngineThread(make, max_open=3)
    assert isinstance(ask(engine_thread, demo, seed=1).get(timeout=WAIT), MemoryError)
    assert texts(ask(engine_thread, demo, seed=1)) == alone(demo, seed=1)
    engine_thread.close()


def test_a_decoder_that_fails_ends_its_requests_and_the_next_one_gets_another(demo: Baco) -> None:
    class Failing(Decoder):
        def step(self) -> list[Chunk]:
            raise BrokenError

    failing = [Failing(demo.pair, demo.decoder().engine)]
    engine_thread = EngineThread(lambda: failing.pop() if failing else demo.decoder(), max_open=3)
    assert isinstance(ask(engine_thread, demo, seed=1).get(timeout=WAIT), BrokenError)
    assert texts(ask(engine_thread, demo, seed=1)) == alone(demo, seed=1)
    settle(engine_thread)
    assert engine_thread.open == 0
    engine_thread.close()


def test_a_job_whose_delivery_fails_is_cancelled_and_the_thread_continues(
    engine_thread: EngineThread, demo: Baco
) -> None:
    def gone(_: Chunk | Scored | Exception) -> None:
        raise RuntimeError("the loop is closed")

    router = demo.router(ROUTER)
    engine_thread.submit([Job(lambda d: d.submit(PROMPT, router=router, n=8, seed=1), gone)])
    assert texts(ask(engine_thread, demo, seed=2)) == alone(demo, seed=2)
    settle(engine_thread)
    assert engine_thread.open == 0


def test_an_application_that_is_refused_leaves_no_thread(
    demo: Baco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACO_HOME", str(tmp_path))
    Calibration().save(demo.pair).write_text("{")
    before = threading.enumerate()
    with pytest.raises(BacoError, match="calibration"):
        create_app(demo)
    assert threading.enumerate() == before


def test_closing_refuses_new_requests_and_finishes_open_ones(demo: Baco) -> None:
    engine_thread = EngineThread(demo.decoder, max_open=3)
    results = ask(engine_thread, demo, seed=1)
    engine_thread.drain()
    with pytest.raises(ClosedError):
        ask(engine_thread, demo, seed=2)
    engine_thread.close(grace=WAIT)
    assert texts(results) == alone(demo, seed=1)


def test_jobs_that_are_open_after_the_grace_end_with_an_error(demo: Baco) -> None:
    engine_thread = EngineThread(demo.decoder, max_open=3)
    results: Results = SimpleQueue()
    begun = threading.Event()

    def deliver(result: Chunk | Scored | Exception) -> None:
        results.put(result)
        begun.set()

    def decide(signals: Any) -> Any:
        if begun.is_set():  # the rest of the answer waits for the end of the grace
            wait_for(lambda: not engine_thread._work.empty())
        return signals.max_base < 2

    slow = RuleRouter(LogitRule("Slow", decide, "waits for the end", threshold=False))
    engine_thread.submit([Job(lambda d: d.submit(PROMPT, router=slow, seed=1, n=8), deliver)])
    results.get(timeout=WAIT)
    engine_thread.close(grace=0)
    assert isinstance(last_error(results), ClosedError)


def last_error(results: Results) -> Exception | None:
    error = None
    while True:
        try:
            item = results.get_nowait()
        except Empty:
            return error
        error = item if isinstance(item, Exception) else None


def test_jobs_of_a_client_that_is_gone_are_cancelled() -> None:
    async def disconnected() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def ask() -> None:
        cancelled = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        with pytest.raises(ClientGoneError):
            await unless_disconnected(Request({"type": "http"}, disconnected), work())
        await asyncio.wait_for(cancelled.wait(), WAIT)

    asyncio.run(ask())
