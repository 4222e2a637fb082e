"""Two servers called over HTTP token by token, as token-level collaboration is published.

    python -m benchmarks.two_servers [PAIR | --body SIZE] [--n N ...] [--rereads] [--json]

Each model of the pair is a server of its own. For every token the client sends the text so far to
both, takes their most likely tokens with log-probabilities, applies the router and appends the
token it draws. Paired decoding takes turns with it: in turn (one request after the other) and at
once (both servers and all answers at the same time).
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import IO, Any

import httpx
import torch
from torch import Tensor

from baco.bench.contestants import Contestant, Paired, Run, Stopwatch, Task, checked
from baco.bench.measure import load, machine, prompts_for, repeated_tasks
from baco.bench.race import Entry, race, ratios
from baco.errors import BacoError
from baco.models.model import PairModel
from baco.models.pair import Pair
from baco.routing.parser import router as parse
from baco.routing.word_boundaries import NO_TOKEN, select
from baco.sampling.noise import ROUTER, coin, noise_keys
from baco.sampling.sampler import SamplingTensors, draw
from baco.sampling.seeds import noise_seed
from baco.source import MODELS
from benchmarks import launch
from benchmarks.bodies import add_pair, named_pair

# Log-probabilities that such servers return at most.
_MOST = 20
_TIMEOUT = 120.0  # seconds


@dataclass(frozen=True, slots=True)
class Http:
    """The client of two servers.

    Attributes:
        pair: for its vocabulary; its models are not run.
        clients: by source; connections stay open.
        concurrent: call both servers at once, for all answers at once; else one request at a time.
        fields: further fields of the requests to each, such as a model's name.
    """

    pair: Pair
    clients: dict[str, httpx.Client]
    concurrent: bool
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def decode(self, task: Task) -> Run:
        """Decode a task, timed."""
        watch = Stopwatch(torch.device("cpu"))
        samples, at_once = range(task.params.n), task.params.n if self.concurrent else 1
        with ThreadPoolExecutor(at_once) as writers, ThreadPoolExecutor(2 * at_once) as callers:
            call = callers.map if self.concurrent else map
            answers = list(writers.map(partial(self._answer, task, watch, call), samples))
        seconds = watch.now()
        tokens, sources, first = (list(column) for column in zip(*answers, strict=True))
        return checked(task, Run(tokens, seconds, max(first), sources))

    def _answer(
        self, task: Task, watch: Stopwatch, call: Any, sample: int
    ) -> tuple[list[int], list[str], float]:
        """One answer: its tokens, their sources, seconds until the first token."""
        params = task.params
        table = SamplingTensors.of([params], "cpu")
        texts = {"base": list(task.prompt.base_ids), "aligned": list(task.prompt.aligned_ids)}
        previous, active = torch.tensor([NO_TOKEN]), torch.tensor([False])
        tokens, sources, first = list[int](), list[str](), 0.0
        seed = noise_seed(params.seed or 0, task.prompt.digest)
        for at in range(params.max_tokens):
            base, aligned = call(self._row, MODELS, (texts[source] for source in MODELS))
            keys = noise_keys(torch.tensor([seed]), torch.tensor([sample]), torch.tensor([at]))
            logits, active = select(
                base,
                aligned,
                previous,
                active,
                router=task.router,
                vocabulary=self.pair.vocabulary,
                banned=self.pair.banned,
                coin=coin(keys, ROUTER),
            )
            if not bool(logits.isfinite().any()):
                # None of the returned tokens is a word start: draw from all of them.
                logits = torch.where(active[:, None], base, aligned)
            previous = draw(table.bias(logits), table, keys)
            tokens.append(int(previous))
            sources.append("base" if bool(active) else "aligned")
            for text in texts.values():
                text.append(tokens[-1])
            first = first or watch.now()
        return tokens, sources, first

    def _row(self, source: str, text: list[int]) -> Tensor:
        """Log-probabilities of the next token, [1, V]; -inf where the server returns none."""
        body = {"prompt": text, "max_tokens": 1, "temperature": 0, "logprobs": _MOST}
        body |= self.fields.get(source, {})
        reply = self.clients[source].post("/v1/completions", json=body).raise_for_status().json()
        logprobs = reply["choices"][0]["logprobs"]
        if "content" in logprobs:  # llama.cpp
            entries = logprobs["content"][0]["top_logprobs"]
            top = [(entry["id"], entry["logprob"]) for entry in entries]
        else:
            names = logprobs["top_logprobs"][0].items()
            top = [(int(name.removeprefix("token_id:")), logprob) for name, logprob in names]
        row = torch.full((1, self.pair.vocabulary.size), -torch.inf)
        for index, logprob in top:
            if index < row.shape[1]:  # rows of logits may be longer than the vocabulary
                row[0, index] = logprob
        return row


@contextlib.contextmanager
def two_servers(pair: Pair, *, concurrent: int = 0, rereads: bool = False) -> Iterator[Http]:
    """Start a server for each model, and stop both at the end.

    Servers that work at the same time share the threads that every other contestant has.

    Args:
        pair: whose models are served.
        concurrent: the most answers at once, with both servers called at once for each; 0: one
            request at a time.
        rereads: the servers read every request whole.

    Raises:
        BacoError: a server that does not start.
    """
    models = {"base": pair.base, "aligned": pair.aligned}
    with contextlib.ExitStack() as stack:
        options = ["--texts", str(max(1, concurrent)), *(["--rereads"] if rereads else [])]
        threads = max(1, torch.get_num_threads() // (2 if concurrent else 1))
        started = {
            name: stack.enter_context(_server(models[name], options, threads)) for name in MODELS
        }
        clients: dict[str, httpx.Client] = {}
        for name, (process, log) in started.items():
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            if not port:
                process.wait()
                raise BacoError(f"no server of the {name} model came up: {_last_line(log)}")
            url = f"http://127.0.0.1:{port}"
            clients[name] = stack.enter_context(httpx.Client(base_url=url, timeout=_TIMEOUT))
        yield Http(pair, clients, concurrent > 0)


def _last_line(log: IO[str]) -> str:
    log.seek(0)
    return (log.read().strip().splitlines() or ["it printed nothing"])[-1]


@contextlib.contextmanager
def _server(
    model: PairModel, options: list[str], threads: int
) -> Iterator[tuple["subprocess.Popen[str]", IO[str]]]:
    """A server process and its log, a file because a pipe that nobody reads would fill up."""
    device, dtype = str(model.device), str(model.model.dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "benchmarks.model_server", model.name]
    command += ["--dtype", dtype, "--device", device, *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        )
        try:
            yield process, log
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    """Race both ways of calling two servers against paired decoding, and print speeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_pair(parser)
    parser.add_argument("--router", default="P-Punc:0.4")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rereads", action="store_true", help="servers read every request whole")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = parser.parse_args()
    known = named_pair(given)
    weights = load(known, given.dtype, given.device)
    pair, prompts = weights.ours, prompts_for(known)
    tasks = repeated_tasks(pair, prompts, parse(given.router), given.tokens, given.repeats)
    with contextlib.ExitStack() as servers:
        contestants: dict[str, Contestant] = {"paired": Paired(pair)}
        for name, concurrent in (("in turn", 0), ("at once", max(given.n))):
            http = two_servers(weights.plain, concurrent=concurrent, rereads=given.rereads)
            contestants[name] = servers.enter_context(http)
        entries = [Entry(name, n, contestants[name]) for n in given.n for name in contestants]
        race(entries, tasks, lambda _: None)
    speeds = [
        {"name": e.name, "n": e.n, "tokens_per_second": e.speed, "first_token_seconds": e.first}
        for e in entries
    ]
    spreads = {name: asdict(ratio) for name, ratio in ratios(entries).items()}
    if given.json:
        report = {"pair": pair.name, "machine": machine(pair.aligned.device)}
        print(json.dumps(report | {"contestants": speeds, "ratios": spreads}))
        return
    print(f"{pair.name}, {given.router}, answers of {given.tokens} tokens, {given.repeats} repeats")
    print(f"{'contestant':12} {'n':>3} {'tokens/s':>9} {'first, ms':>10}  paired decoding is")
    for entry in entries:
        ratio = spreads.get(entry.key)
        spread = ratio and "{middle:.2f} × ({low:.2f} to {high:.2f})".format(**ratio)
        print(
            f"{entry.name:12} {entry.n:3} {entry.speed:9.0f} {1000 * entry.first:10.0f}  "
            f"{spread or ''}"
        )


if __name__ == "__main__":
    launch(main)
