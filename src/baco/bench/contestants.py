"""Who is timed: paired decoding, the naive two-model loop, and `generate` on one model alone.

All get token ids and give token ids; none turns them into text.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from baco.bench import naive
from baco.engine.engine import Engine
from baco.engine.metrics import Stats
from baco.engine.sequence import Request
from baco.errors import BacoError
from baco.models.pair import Pair
from baco.routing.router import Router
from baco.sampling.params import SamplingParams
from baco.text.prompts import Prompt

# What is added to the logits of end tokens: the most that sampling parameters allow, and far more
# than noise can make up for.
_NEVER = -100.0


@dataclass(frozen=True, slots=True)
class Task:
    """What to decode: ``params.n`` answers of exactly ``params.max_tokens`` tokens each.

    Attributes:
        prompt: as each half reads it.
        router: which of the pair speaks.
        params: seeded; end tokens are never drawn.
    """

    prompt: Prompt
    router: Router
    params: SamplingParams

    def of(self, n: int, tokens: int | None = None) -> "Task":
        """The same with so many answers, and as many tokens or so many."""
        length = self.params.max_tokens if tokens is None else tokens
        return replace(self, params=self.params.updated({"n": n, "max_tokens": length}))


@dataclass(slots=True)
class Run:
    """What a contestant made of a task.

    Attributes:
        answers: token ids.
        seconds: for all of it.
        first: seconds until every answer had its first token.
        sources: of the tokens, where two halves speak.
    """

    answers: list[list[int]]
    seconds: float
    first: float
    sources: list[list[str]] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Tokens per second, of all answers together."""
        return sum(len(answer) for answer in self.answers) / self.seconds


class Contestant(Protocol):
    """Decodes tasks."""

    def decode(self, task: Task) -> Run:
        """Decode one task, timed."""


def never_ending(pair: Pair, tokens: int, **sampling: Any) -> SamplingParams:
    """The pair's own sampling at temperature 1, for answers of exactly so many tokens.

    Answers of one length are what makes speeds comparable: no end token of either half is drawn.
    """
    bias = dict.fromkeys(pair.end_ids, _NEVER)
    given = {"temperature": 1.0, "max_tokens": tokens, "logit_bias": bias, "stop": ()}
    return pair.defaults.updated(given | sampling).seeded()


class Stopwatch:
    """Seconds since it was made, with all work of the device done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.first: float | None = None
        self._start = 0.0
        self._start = self.now()

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - self._start

    def said(self) -> None:
        """A token has been said."""
        if self.first is None:
            self.first = self.now()


@dataclass(slots=True)
class Paired:
    """This project's engine.

    Attributes:
        pair: the two halves, laid out as they are by default.
        speculate: draft tokens where that pays.
        stats: of the latest task.
    """

    pair: Pair
    speculate: bool = True
    stats: Stats | None = None

    def decode(self, task: Task) -> Run:
        """Decode one task, timed, on an engine that knows nothing yet."""
        watch = Stopwatch(self.pair.aligned.device)
        engine = Engine(self.pair, max_rows=task.params.n, speculate=self.speculate)
        prompt, params = task.prompt, task.params
        request = Request(
            prompt.base_ids, prompt.aligned_ids, params, task.router, digest=prompt.digest
        )
        rows = engine.add(request)
        while engine.busy:
            engine.step()
            watch.said()
        seconds, self.stats = watch.now(), engine.stats
        answers = [list(row.tokens) for row in rows]
        return checked(
            task, Run(answers, seconds, watch.first or seconds, [list(row.sources) for row in rows])
        )


@dataclass(frozen=True, slots=True)
class Naive:
    """The two-model loop.

    Attributes:
        pair: its halves' weights as ``transformers`` loads them.
    """

    pair: Pair

    def decode(self, task: Task) -> Run:
        """Decode one task, timed."""
        watch = Stopwatch(self.pair.aligned.device)
        tokens, base = naive.decode(self.pair, task.prompt, task.router, task.params, watch.said)
        answers, seconds = tokens.tolist(), watch.now()
        sources = [["base" if one else "aligned" for one in row] for row in base.tolist()]
        return checked(task, Run(answers, seconds, watch.first or seconds, sources))


@dataclass(frozen=True, slots=True)
class Generate:
    """``transformers``' own `generate` on the aligned model alone.

    Attributes:
        pair: whose aligned half speaks.
    """

    pair: Pair

    def decode(self, task: Task) -> Run:
        """Decode one task, timed."""
        half, params = self.pair.aligned, task.params
        ids = torch.tensor([task.prompt.aligned_ids], device=half.device)
        torch.manual_seed(params.seed or 0)
        watch = Stopwatch(half.device)
        made = half.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            num_return_sequences=params.n,
            max_new_tokens=params.max_tokens,
            suppress_tokens=sorted(self.pair.end_ids),
            pad_token_id=min(self.pair.end_ids, default=0),
            streamer=_Streamer(watch.said),
            **_sampling(params),
        )
        answers, seconds = made[:, ids.shape[1] :].tolist(), watch.now()
        return checked(task, Run(answers, seconds, watch.first or seconds))


class _Streamer:
    """Tells when `generate` has said a token; the prompt comes first."""

    def __init__(self, said: Callable[[], None]) -> None:
        self._said, self._prompted = said, False

    def put(self, tokens: torch.Tensor) -> None:  # noqa: ARG002
        if self._prompted:
            self._said()
        self._prompted = True

    def end(self) -> None:
        pass


def _sampling(params: SamplingParams) -> dict[str, Any]:
    """The same sampling, as `generate` names it."""
    if params.temperature == 0:
        return {"do_sample": False}
    named = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p")}
    if params.min_p:
        named["min_p"] = params.min_p
    return {"do_sample": True, **named}


def checked(task: Task, run: Run) -> Run:
    """A run whose answers all have the length asked for."""
    lengths = {len(answer) for answer in run.answers}
    if len(run.answers) != task.params.n or lengths != {task.params.max_tokens}:
        raise BacoError(
            f"{len(run.answers)} answers of {sorted(lengths)} tokens came back where "
            f"{task.params.n} of {task.params.max_tokens} were asked for: speeds do not compare"
        )
    return run
