"""Two servers asked over HTTP, token by token: how published token-level collaboration is run.

Each half is a server of its own. For every token the client sends both the text so far, takes the
most likely tokens with their log-probabilities, asks the router, and appends what it drew.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any

import httpx
import torch
from torch import Tensor

from baco.bench.contestants import Run, Stopwatch, Task, checked
from baco.errors import BacoError
from baco.models.pair import Pair
from baco.routing.word_boundaries import NO_TOKEN, select
from baco.sampling.noise import ROUTER, coin, noise_keys
from baco.sampling.sampler import DrawTable, draw
from baco.sampling.seeds import noise_seed
from baco.source import MODELS

# Log-probabilities that such servers return at most.
_MOST = 20
_NO_ANSWER = 120.0  # seconds


@dataclass(frozen=True, slots=True)
class Http:
    """The client of two servers.

    Attributes:
        pair: for its vocabulary; its models are not run.
        clients: by half; connections stay open.
        concurrent: ask both at once, and for all answers at once; else one request follows another.
        fields: what requests to each say beside, such as a model's name.
    """

    pair: Pair
    clients: dict[str, httpx.Client]
    concurrent: bool
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def decode(self, task: Task) -> Run:
        """Decode a task, timed."""
        watch = Stopwatch(torch.device("cpu"))
        samples, at_once = range(task.params.n), task.params.n if self.concurrent else 1
        with ThreadPoolExecutor(at_once) as people, ThreadPoolExecutor(2 * at_once) as askers:
            ask = askers.map if self.concurrent else map
            answers = list(people.map(partial(self._answer, task, watch, ask), samples))
        seconds = watch.now()
        tokens, sources, first = (list(column) for column in zip(*answers, strict=True))
        return checked(task, Run(tokens, seconds, max(first), sources))

    def _answer(
        self, task: Task, watch: Stopwatch, ask: Any, sample: int
    ) -> tuple[list[int], list[str], float]:
        """One answer: its tokens, their sources, when the first was said."""
        params = task.params
        table = DrawTable.of([params], "cpu")
        texts = {"base": list(task.prompt.base_ids), "aligned": list(task.prompt.aligned_ids)}
        previous, active = torch.tensor([NO_TOKEN]), torch.tensor([False])
        tokens, sources, first = list[int](), list[str](), 0.0
        seed = noise_seed(params.seed or 0, task.prompt.digest)
        for at in range(params.max_tokens):
            base, aligned = ask(self._row, MODELS, (texts[half] for half in MODELS))
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
                # No word start among the few tokens that a server tells: say what it would say.
                logits = torch.where(active[:, None], base, aligned)
            previous = draw(table.bias(logits), table, keys)
            tokens.append(int(previous))
            sources.append("base" if bool(active) else "aligned")
            for text in texts.values():
                text.append(tokens[-1])
            first = first or watch.now()
        return tokens, sources, first

    def _row(self, half: str, text: list[int]) -> Tensor:
        """What a half says next, as far as its server tells: [1, V], -inf elsewhere."""
        body = {"prompt": text, "max_tokens": 1, "temperature": 0, "logprobs": _MOST}
        body |= self.fields.get(half, {})
        told = self.clients[half].post("/v1/completions", json=body).raise_for_status().json()
        top = told["choices"][0]["logprobs"]["top_logprobs"][0]
        row = torch.full((1, self.pair.vocabulary.size), -torch.inf)
        for token, logprob in top.items():
            index = int(token.removeprefix("token_id:"))
            if index < row.shape[1]:  # rows of logits may go on behind the vocabulary
                row[0, index] = logprob
        return row


@contextlib.contextmanager
def two_servers(pair: Pair, *, concurrent: int = 0, rereads: bool = False) -> Iterator[Http]:
    """Start a server for each half, and stop both at the end.

    Those that work at a time have together as many threads as every other contestant.

    Args:
        pair: whose halves.
        concurrent: at most so many answers are asked for at once, and both halves for each; 0 lets
            one request follow another.
        rereads: servers that read every request whole.

    Raises:
        BacoError: a server that does not start.
    """
    halves = {"base": pair.base, "aligned": pair.aligned}
    with contextlib.ExitStack() as stack:
        options = ["--texts", str(max(1, concurrent)), *(["--rereads"] if rereads else [])]
        threads = max(1, torch.get_num_threads() // (2 if concurrent else 1))
        started = {
            name: stack.enter_context(_server(halves[name], options, threads)) for name in MODELS
        }
        clients: dict[str, httpx.Client] = {}
        for name, (process, said) in started.items():
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            if not port:
                process.wait()
                raise BacoError(f"no server of the {name} model came up: {_last_words(said)}")
            url = f"http://127.0.0.1:{port}"
            clients[name] = stack.enter_context(httpx.Client(base_url=url, timeout=_NO_ANSWER))
        yield Http(pair, clients, concurrent > 0)


def _last_words(said: IO[str]) -> str:
    said.seek(0)
    return (said.read().strip().splitlines() or ["it said nothing"])[-1]


@contextlib.contextmanager
def _server(
    half: Any, options: list[str], threads: int
) -> Iterator[tuple["subprocess.Popen[str]", IO[str]]]:
    """A server process, and what it says of itself: a file, which never fills as a pipe does."""
    device, dtype = str(half.device), str(half.model.dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "baco.bench.server", half.name]
    command += ["--dtype", dtype, "--device", device, *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=environment,
            text=True,
        )
        try:
            yield process, said
        finally:
            process.terminate()
            process.wait()
