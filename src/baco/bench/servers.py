"""Two servers asked over HTTP, token by token: how published token-level collaboration is run.

Each half is a server of its own. For every token the client sends both the text so far, takes the
most likely tokens with their log-probabilities, asks the router, and appends what it drew.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch
from torch import Tensor

from baco.bench.contestants import Run, Stopwatch, Task, checked
from baco.drawing import DrawTable, draw
from baco.errors import BacoError
from baco.noise import COIN, noise_keys, uniform
from baco.pair import Pair
from baco.routing.routers import HALVES
from baco.routing.select import NOTHING, select

# Log-probabilities that such servers return at most.
_MOST = 20
_NO_ANSWER = 120.0  # seconds


@dataclass(frozen=True, slots=True)
class Http:
    """The client of two servers, one connection each.

    Attributes:
        pair: for its vocabulary; its models are not run.
        clients: by half.
        both: asks both at once.
        fields: what requests to each say beside, such as a model's name.
    """

    pair: Pair
    clients: dict[str, httpx.Client]
    both: ThreadPoolExecutor
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def decode(self, task: Task) -> Run:
        """Decode one answer, timed."""
        assert task.params.n == 1
        watch = Stopwatch(torch.device("cpu"))
        params = task.params
        table = DrawTable.of([params], "cpu")
        texts = {"base": list(task.prompt.base_ids), "aligned": list(task.prompt.aligned_ids)}
        previous, active = torch.tensor([NOTHING]), torch.tensor([False])
        tokens, sources = list[int](), list[str]()
        for at in range(params.max_tokens):
            asked = [self.both.submit(self._row, half, texts[half]) for half in HALVES]
            base, aligned = (one.result() for one in asked)
            keys = noise_keys(torch.tensor([params.seed]), torch.tensor([0]), torch.tensor([at]))
            logits, active = select(
                base,
                aligned,
                previous,
                active,
                router=task.router,
                vocabulary=self.pair.vocabulary,
                banned=self.pair.banned,
                coin=uniform(keys, torch.tensor([COIN])),
            )
            if not bool(logits.isfinite().any()):
                # No word start among the few tokens that a server tells: say what it would say.
                logits = torch.where(active[:, None], base, aligned)
            previous = draw(table.bias(logits), table, keys)
            tokens.append(int(previous))
            sources.append("base" if bool(active) else "aligned")
            for text in texts.values():
                text.append(tokens[-1])
            watch.said()
        seconds = watch.now()
        return checked(task, Run([tokens], seconds, watch.first or seconds, [sources]))

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
def two_servers(pair: Pair, *, rereads: bool = False) -> Iterator[Http]:
    """Start a server for each half, and stop both at the end.

    Together they have as many threads as every other contestant.

    Raises:
        BacoError: a server that does not start.
    """
    halves = {"base": pair.base, "aligned": pair.aligned}
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(_server(halves[name], rereads)) for name in HALVES}
        clients: dict[str, httpx.Client] = {}
        for name, process in processes.items():
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            if not port:
                raise BacoError(f"no server of the {name} model came up: {_last_words(process)}")
            url = f"http://127.0.0.1:{port}"
            clients[name] = stack.enter_context(httpx.Client(base_url=url, timeout=_NO_ANSWER))
        yield Http(pair, clients, stack.enter_context(ThreadPoolExecutor(2)))


def _last_words(process: "subprocess.Popen[str]") -> str:
    assert process.stderr is not None
    return (process.stderr.read().strip().splitlines() or ["it said nothing"])[-1]


@contextlib.contextmanager
def _server(half: Any, rereads: bool) -> Iterator["subprocess.Popen[str]"]:
    device, dtype = str(half.device), str(half.model.dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "baco.bench.server", half.name]
    command += ["--dtype", dtype, "--device", device, *(["--rereads"] if rereads else [])]
    threads = str(max(1, torch.get_num_threads() // 2))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
