"""What is timed: paired decoding, the naive two-model loop, and `generate` on one model alone.

All take token ids and return token ids; none of them produces text. Where the models have different
tokenizers, their answers are compared by the characters of their text.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from baco.bench import naive
from baco.engine.engine import Engine, Stats
from baco.engine.sequence import Request
from baco.engine.shared_text_engine import SharedTextEngine
from baco.errors import BacoError
from baco.models.pair import Pair
from baco.routing.router import Router
from baco.sampling.params import SamplingParams
from baco.source import Source
from baco.text.prompts import Prompt

# Bias of end tokens: the most that sampling parameters allow, and far more than noise can outweigh.
_NEVER = -100.0


@dataclass(frozen=True, slots=True)
class Task:
    """What to decode: ``params.n`` answers of exactly ``params.max_tokens`` tokens each.

    Attributes:
        prompt: as each model reads it.
        router: picks the source of every word.
        params: seeded; end tokens are never drawn.
    """

    prompt: Prompt
    router: Router
    params: SamplingParams

    def of(self, n: int, tokens: int | None = None) -> "Task":
        """The same task with ``n`` answers, of ``tokens`` tokens where given."""
        length = self.params.max_tokens if tokens is None else tokens
        return replace(self, params=self.params.updated({"n": n, "max_tokens": length}))


@dataclass(slots=True)
class Run:
    """The answers of a contestant to a task, and its time.

    Attributes:
        answers: token ids.
        seconds: for all of it.
        first: seconds until every answer had its first token.
        sources: of the tokens, where two models write.
        characters: of the text of all answers, where the models have different tokenizers.
    """

    answers: list[list[int]]
    seconds: float
    first: float
    sources: list[list[Source]] = field(default_factory=list)
    characters: int | None = None

    @property
    def speed(self) -> float:
        """Tokens or characters per second, of all answers together."""
        tokens = sum(len(answer) for answer in self.answers)
        return (tokens if self.characters is None else self.characters) / self.seconds


class Contestant(Protocol):
    """Decodes tasks."""

    def decode(self, task: Task) -> Run:
        """Decode one task, timed."""


def never_ending(pair: Pair, tokens: int, **sampling: Any) -> SamplingParams:
    """The pair's own sampling at temperature 1, for answers of exactly ``tokens`` tokens.

    Speeds are comparable only where answers have one length, so no end token is ever drawn.
    """
    # Models with different tokenizers never draw an end by `_without_ends`.
    bias = {} if pair.own_vocabularies is not None else dict.fromkeys(pair.end_ids, _NEVER)
    given = {"temperature": 1.0, "max_tokens": tokens, "logit_bias": bias, "stop": ()}
    return pair.defaults.updated(given | sampling).seeded()


def _without_ends(pair: Pair) -> Pair:
    """A pair of models with different tokenizers that never draw an end token."""
    assert pair.own_vocabularies is not None
    own = {}
    for source, tables in pair.own_vocabularies.items():
        banned = tables.banned.clone()
        banned[sorted(tables.end_ids)] = True
        own[source] = replace(tables, end_ids=frozenset[int](), banned=banned)
    return replace(pair, own_vocabularies=own)


def _characters(
    pair: Pair, answers: Sequence[Sequence[int]], sources: Sequence[Sequence[Source]]
) -> int | None:
    """See `Run.characters`."""
    if pair.own_vocabularies is None:
        return None
    texts = (
        b"".join(pair.spelling(token, source) for token, source in zip(ids, names, strict=True))
        for ids, names in zip(answers, sources, strict=True)
    )
    return sum(len(text.decode("utf-8", errors="replace")) for text in texts)


class Stopwatch:
    """Seconds since its creation; every reading waits for the device to finish its work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.first: float | None = None
        self._start = 0.0
        self._start = self.now()

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - self._start

    def on_token(self) -> None:
        """Record the time of the first token."""
        if self.first is None:
            self.first = self.now()


@dataclass(slots=True)
class Paired:
    """This project's engine.

    Attributes:
        pair: laid out as it is by default.
        speculate: draft tokens where that pays.
        memory: limit of the caches, as `Engine` takes it.
        stats: of the latest task.
    """

    pair: Pair
    speculate: bool = True
    memory: str | None = None
    stats: Stats | None = None

    def decode(self, task: Task) -> Run:
        """Decode one task, timed, on a new engine."""
        watch = Stopwatch(self.pair.aligned.device)
        engine: Engine | SharedTextEngine
        if self.pair.own_vocabularies is None:
            engine = Engine(
                self.pair, max_rows=task.params.n, speculate=self.speculate, memory=self.memory
            )
        else:
            engine = SharedTextEngine(
                _without_ends(self.pair), max_rows=task.params.n, memory=self.memory
            )
        prompt, params = task.prompt, task.params
        request = Request(
            prompt.base_ids, prompt.aligned_ids, params, task.router, digest=prompt.digest
        )
        rows = engine.add(request)
        while engine.busy:
            engine.step()
            watch.on_token()
        seconds, self.stats = watch.now(), engine.stats
        answers = [list(row.tokens) for row in rows]
        sources = [[source or "aligned" for source in row.sources] for row in rows]
        characters = _characters(self.pair, answers, sources)
        return checked(task, Run(answers, seconds, watch.first or seconds, sources, characters))


@dataclass(frozen=True, slots=True)
class Naive:
    """The two-model loop.

    Attributes:
        pair: with weights as ``transformers`` loads them.
    """

    pair: Pair

    def decode(self, task: Task) -> Run:
        """Decode one task, timed."""
        watch = Stopwatch(self.pair.aligned.device)
        tokens, base = naive.decode(
            self.pair, task.prompt, task.router, task.params, watch.on_token
        )
        answers, seconds = tokens.tolist(), watch.now()
        sources: list[list[Source]] = [
            ["base" if is_base else "aligned" for is_base in row] for row in base.tolist()
        ]
        return checked(task, Run(answers, seconds, watch.first or seconds, sources))


@dataclass(frozen=True, slots=True)
class Generate:
    """``transformers``' own `generate` on the aligned model alone.

    Attributes:
        pair: whose aligned model generates.
        options: of `generate`, such as ``cache_implementation``.
    """

    pair: Pair
    options: Mapping[str, Any] = field(default_factory=dict)

    def decode(self, task: Task) -> Run:
        """Decode one task, timed."""
        model, params = self.pair.aligned, task.params
        ids = torch.tensor([task.prompt.aligned_ids], device=model.device)
        torch.manual_seed(params.seed or 0)
        watch = Stopwatch(model.device)
        tokens = model.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            num_return_sequences=params.n,
            max_new_tokens=params.max_tokens,
            suppress_tokens=sorted(self.pair.end_ids),
            pad_token_id=min(self.pair.end_ids, default=0),
            streamer=_Streamer(watch.on_token),
            **_sampling(params),
            **self.options,
        )
        answers, seconds = tokens[:, ids.shape[1] :].tolist(), watch.now()
        sources: list[list[Source]] = [["aligned"] * len(answer) for answer in answers]
        characters = _characters(self.pair, answers, sources)
        return checked(task, Run(answers, seconds, watch.first or seconds, characters=characters))


class _Streamer:
    """Reports every token of `generate`; the prompt comes first and is not reported."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token, self._prompted = on_token, False

    def put(self, tokens: torch.Tensor) -> None:  # noqa: ARG002
        if self._prompted:
            self._on_token()
        self._prompted = True

    def end(self) -> None:
        pass


def _sampling(params: SamplingParams) -> dict[str, Any]:
    """The sampling parameters by the names that `generate` gives them."""
    if params.temperature == 0:
        return {"do_sample": False}
    names = ("temperature", "top_k", "top_p", *(("min_p",) if params.min_p else ()))
    return {"do_sample": True, **{name: getattr(params, name) for name in names}}


def checked(task: Task, run: Run) -> Run:
    """The run, once its answers are known to have the requested number and length. Answers that are
    compared by characters may be shorter.

    Raises:
        BacoError: they do not.
    """
    lengths = {len(answer) for answer in run.answers}
    as_long = run.characters is not None or lengths == {task.params.max_tokens}
    if len(run.answers) != task.params.n or not as_long:
        raise BacoError(
            f"{len(run.answers)} answers of {sorted(lengths)} tokens came back, expected "
            f"{task.params.n} of {task.params.max_tokens}: their speeds cannot be compared"
        )
    return run
