"""A pair on two servers: whole spans per call against token by token, on the same servers.

    python -m benchmarks.remote [--body 50m] [--router P-Punc:0.4] [--quick] [--json]
    python -m benchmarks.remote --base-url http://… --aligned-url http://…

Starts two `baco serve` processes of one thread each, one for the base model and one for the aligned
model, or takes two running servers of the pair. Every contestant answers the same prompts, in turn.
Token by token is how token-level collaboration over HTTP is published: two calls per token, one to
each server. The aligned model alone, also in spans, shows the speed of the servers themselves.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from baco import Baco, BacoError
from baco.bench.contestants import Task, never_ending
from baco.bench.measure import machine, prompts_for
from baco.models.known_pairs import KnownPair, find_pair
from baco.routing.parser import router as parse
from baco.source import MODELS
from benchmarks import launch
from benchmarks.bodies import cached
from benchmarks.serve import served
from benchmarks.two_servers import Http

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one way to write n answers at once, medians over repeats.

    Attributes:
        calls_per_token: HTTP requests to either server.
        tokens_per_second: of all answers together.
    """

    way: str
    temperature: float
    n: int
    calls_per_token: float
    tokens_per_second: float


class Spans:
    """The remote backend."""

    def __init__(self, baco: Baco) -> None:
        self._baco = baco

    @property
    def calls(self) -> int:
        """Requests so far."""
        backend: Any = self._baco.backend
        return sum(backend.calls.values())

    def write(self, task: Task, prompt: str) -> int:
        """Write a task's answers; how many tokens they have."""
        params = task.params
        answers = self._baco.generate(
            prompt,
            router=task.router,
            n=params.n,
            temperature=params.temperature,
            min_p=params.min_p,
            max_tokens=params.max_tokens,
            logit_bias=dict(params.logit_bias),
            seed=params.seed,
        )
        errors = {answer.error for answer in answers} - {None}
        if errors:
            raise BacoError(f"an answer broke off: {errors.pop()}")
        return sum(len(answer.token_ids) for answer in answers)


class TokenByToken:
    """Calls both servers for every token, for all answers at once."""

    def __init__(self, baco: Baco, urls: dict[str, str], most: int) -> None:
        there: Any = baco.backend
        fields: dict[str, dict[str, Any]] = {
            source: {
                "model": there.models[source].ability.model,
                "return_tokens_as_token_ids": True,
                "min_p": 0.0,
            }
            for source in MODELS
        }
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=2 * most)
        clients = {
            source: httpx.Client(base_url=url, timeout=120, limits=limits)
            for source, url in urls.items()
        }
        self._http = Http(baco.pair, clients, True, fields)
        self.calls = 0

    def write(self, task: Task, prompt: str) -> int:  # noqa: ARG002
        """Write a task's answers; how many tokens they have."""
        tokens = sum(len(answer) for answer in self._http.decode(task).answers)
        self.calls += 2 * tokens
        return tokens


def measure(
    way: str, contestant: Any, task: Callable[[int], tuple[Task, str]], repeats: int
) -> Figures:
    """Time a contestant after one run that does not count."""
    rates, calls = [], []
    for repeat in range(repeats + 1):
        bench_task, prompt = task(repeat)
        before, started = contestant.calls, time.perf_counter()
        tokens = contestant.write(bench_task, prompt)
        rates.append(tokens / (time.perf_counter() - started))
        calls.append((contestant.calls - before) / tokens)
    params = bench_task.params
    middle = statistics.median
    return Figures(way, params.temperature, params.n, middle(calls[1:]), middle(rates[1:]))


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--body", help="the demo pair in a larger model, of this size")
    parser.add_argument("--base-url", help="A server of the base model; else one is started.")
    parser.add_argument("--aligned-url", help="A server of the aligned model.")
    parser.add_argument("--router", default="P-Punc:0.4")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    known: KnownPair = cached("body", given.body, "float32") if given.body else find_pair("demo")
    folder, repeats = str(Path(known.base).parent), 1 if given.quick else given.repeats
    with contextlib.ExitStack() as stack:
        urls: dict[str, str] = {
            source: _root(getattr(given, f"{source}_url"))
            or stack.enter_context(served(folder, **ONE_THREAD))[0]
            for source in MODELS
        }
        figures = race(urls, folder, known, given, repeats)
    if given.json:
        print(json.dumps({"machine": machine(torch.device("cpu")), "figures": figures}))
        return
    print(f"{'way':24} {'temperature':>11} {'n':>3} {'calls/token':>12} {'tokens/s':>9}")
    for row in figures:
        print(
            f"{row['way']:24} {row['temperature']:11g} {row['n']:3} "
            f"{row['calls_per_token']:12.2f} {row['tokens_per_second']:9.1f}"
        )


def _root(url: str | None) -> str | None:
    return url and url.rstrip("/").removesuffix("/v1")


def race(
    urls: dict[str, str], folder: str, known: KnownPair, given: argparse.Namespace, repeats: int
) -> list[dict[str, Any]]:
    """Measure all ways, at both temperatures, for one answer and for eight at once."""
    baco = Baco.load(folder, backend="remote", base_url=urls["base"], aligned_url=urls["aligned"])
    prompts = prompts_for(known)
    router, alone = parse(given.router), parse("Aligned")
    spans, tokens = Spans(baco), TokenByToken(baco, urls, 8)
    ways = [
        ("spans", spans, router),
        ("token by token", tokens, router),
        ("spans, aligned alone", spans, alone),
    ]
    figures = []
    for temperature in (0.0, 1.0):
        for n in (1, 8):
            params = never_ending(baco.pair, given.tokens, temperature=temperature, n=n)
            for way, contestant, chosen in ways:

                def task(
                    repeat: int, chosen: Any = chosen, params: Any = params
                ) -> tuple[Task, str]:
                    prompt = prompts[repeat % len(prompts)]
                    rendered = baco.pair.renderer.render(prompt)
                    return Task(rendered, chosen, params.updated({"seed": 100 * repeat})), prompt

                figures.append(asdict(measure(way, contestant, task, repeats)))
    baco.close()
    return figures


if __name__ == "__main__":
    launch(main)
