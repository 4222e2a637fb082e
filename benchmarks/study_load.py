"""`baco study serve` under load: many raters at once, as fast as they can, the server killed once.

    python -m benchmarks.study_load [--raters 30] [--prompts 20] [--no-kill] [--json]

Starts a server of its own on a study with made-up texts. Each simulated browser loads every page
and sends what the page sends: the answer to an item after each choice, and once more when the rater
goes on. Nobody pauses to read, so the load is many times that of people. In the middle the server
is killed with SIGKILL and started again; browsers repeat what was not acknowledged. At the end the
file must hold exactly the last acknowledged responses to every item, each once.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from baco.study.plan import Plan
from baco.study.schedule import Screen, schedule, training
from baco.study.study import Study
from benchmarks import launch
from tests.serving import reserved_port
from tests.studies import made_study

RETRY = 0.05
Kept = dict[str, dict[str, Any]]  # responses by item


class StudyServer:
    """``baco study serve`` as people start it, always on one port."""

    def __init__(self, study: Path, *options: str) -> None:
        self._reserved = reserved_port()
        self.port = self._reserved.__enter__()
        self.study, self.options = study, options
        self.url = f"http://127.0.0.1:{self.port}"
        self.key, self.links = "", list[str]()
        self.start()

    def start(self) -> None:
        """Start the process, and wait until it answers."""
        command = [sys.executable, "-c", "from baco.cli import main; main()"]
        arguments = ["study", "serve", str(self.study), "--port", str(self.port), *self.options]
        self.process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        self.links = []
        for line in self.process.stdout:
            if line.startswith("operator"):
                self.key = line.split()[-1]
                break
            self.links.append(line.split()[-1])
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except ConnectionRefusedError:
                time.sleep(0.02)

    def kill(self) -> None:
        """End the process as the kernel does when memory runs out."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@dataclass
class Load:
    """What all browsers together did.

    Attributes:
        acknowledged: the last acknowledged responses, by link and item.
        saves, pages: seconds of each request that succeeded.
        repeated: requests that failed and were sent again.
        each_choice: whether an answer is sent after each choice, as pages do, or once.
    """

    acknowledged: dict[str, Kept] = field(default_factory=dict)
    saves: list[float] = field(default_factory=list)
    pages: list[float] = field(default_factory=list)
    repeated: int = 0
    each_choice: bool = True

    async def request(
        self, client: httpx.AsyncClient, times: list[float], method: str, url: str, **more: Any
    ) -> httpx.Response:
        """One request, sent until it succeeds."""
        while True:
            started = time.perf_counter()
            try:
                reply = await client.request(method, url, **more)
                reply.raise_for_status()
            except (httpx.TransportError, httpx.HTTPStatusError) as error:
                if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
                    raise
                self.repeated += 1
                await asyncio.sleep(RETRY)
                continue
            times.append(time.perf_counter() - started)
            return reply

    async def rate(self, client: httpx.AsyncClient, link: str, plan: Plan, number: int) -> None:
        """A whole rater, from consent to thanks, with random answers."""
        rng = random.Random(number)
        kept = self.acknowledged.setdefault(link, {})

        async def page(path: str = "") -> httpx.Response:
            return await self.request(client, self.pages, "GET", link + path)

        async def form(path: str, **fields: str) -> None:
            await self.request(client, self.pages, "POST", link + path, data=fields)

        async def save(screen: Screen, responses: dict[str, Any]) -> None:
            body = {"plan": plan.hash, "position": screen.position}
            body |= {"responses": responses, "seconds": 1}
            await self.request(client, self.saves, "POST", f"{link}/answer", json=body)
            kept[screen.item.id] = dict(responses)

        await page()
        await form("/consent")
        right = {f"q{n}": str(asked.right) for n, asked in enumerate(plan.comprehension)}
        await form("/questions", **right)
        for screen in (*training(plan), *schedule(plan, number)):
            await page("" if screen.position < 0 else f"/{screen.position}")
            responses: dict[str, Any] = {}
            for question in plan.asked(screen.item.unit):
                responses[question.id] = (
                    rng.choice(("left", "tie", "right"))
                    if question.form == "preference"
                    else [rng.randint(1, 5), rng.randint(1, 5)]
                )
                if self.each_choice:
                    await save(screen, responses)
            await save(screen, responses)
        await form("/finish")
        assert re.search("Thank you", (await page()).text)


async def load(
    server: StudyServer, plan: Plan, raters: int, *, kill: bool, each_choice: bool = True
) -> tuple[Load, float]:
    """Run raters on a server at once; what they did, and the seconds without the restart."""
    done = Load(each_choice=each_choice)
    expected = raters * len(schedule(plan, 0)) * (5 if each_choice else 1)
    limits = httpx.Limits(max_connections=raters)
    away = 0.0
    async with httpx.AsyncClient(follow_redirects=True, limits=limits, timeout=60) as client:
        started = time.perf_counter()
        tasks = [
            asyncio.create_task(done.rate(client, link, plan, number))
            for number, link in enumerate(server.links[:raters])
        ]
        if kill:
            while len(done.saves) < expected / 2:
                await asyncio.sleep(0.01)
            before = time.perf_counter()
            server.kill()
            await asyncio.to_thread(server.start)
            away = time.perf_counter() - before
        await asyncio.gather(*tasks)
        return done, time.perf_counter() - started - away


def check(study: Study, done: Load) -> int:
    """Compare the file with what was acknowledged; the number of answers."""
    by_link = {rater.link: rater for rater in study.store.raters()}
    answers = 0
    for link, kept in done.acknowledged.items():
        rater = by_link[link.rpartition("/")[2]]
        assert rater.state == "finished"
        stored = study.store.answers(rater.id)
        assert len(stored) == len({answer.item for answer in stored}) == len(kept)
        for answer in stored:
            responses = {
                q: r if isinstance(r, str) else list(r) for q, r in answer.responses.items()
            }
            assert responses == kept[answer.item]
        answers += len(stored)
    return answers


@dataclass(frozen=True, slots=True)
class Figures:
    """The result: times in milliseconds."""

    raters: int
    answers: int
    requests: int
    repeated: int
    seconds: float
    requests_per_second: float
    save_median: float
    save_p99: float
    page_median: float
    page_p99: float


def measure(raters: int, prompts: int, *, kill: bool) -> Figures:
    """Run the benchmark in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        run = {"prompts": prompts + 3}
        study = made_study(Path(folder), run=run, prompts=prompts, raters=raters)
        study.close()
        server = StudyServer(study.path, "--per-minute", "1000000")
        try:
            done, seconds = asyncio.run(load(server, study.plan, raters, kill=kill))
        finally:
            server.kill()
        study = Study.open(study.path)
        answers = check(study, done)
        study.close()
    requests = len(done.saves) + len(done.pages)
    return Figures(
        raters,
        answers,
        requests,
        done.repeated,
        round(seconds, 1),
        round(requests / seconds, 1),
        *(
            round(1000 * value, 1)
            for times in (done.saves, done.pages)
            for value in (statistics.median(times), statistics.quantiles(times, n=100)[98])
        ),
    )


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description="baco study serve under load")
    parser.add_argument("--raters", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--no-kill", action="store_true", help="let the server live")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    figures = asdict(measure(given.raters, given.prompts, kill=not given.no_kill))
    if given.json:
        print(json.dumps(figures))
        return
    print(f"{platform.machine()}, Python {platform.python_version()}, {os.cpu_count()} cores")
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):>20}  {value}")


if __name__ == "__main__":
    launch(main)
