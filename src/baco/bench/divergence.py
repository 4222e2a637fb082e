"""How often bfloat16 answers part from plain decoding's, and whether each parting is a tie.

In float32, speculation and batching change no token. In bfloat16 a row read among others, or with
its drafts, is rounded otherwise than the same row read alone, and where two tokens or the two
sources are level to within that rounding, either may win. Here the same prompts are decoded plainly
(one row, one token a forward) and with all the engine has; every first difference is then decided
again from rows of float32, shaken by as much as bfloat16 was measured to round: a tie is where both
answers come up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from baco.calibration.agreement import rows as read_rows
from baco.decoder import Decoder
from baco.engine.engine import Engine
from baco.models.pair import Pair
from baco.outputs import Completion
from baco.routing.router import Router
from baco.routing.word_boundaries import NO_TOKEN, select
from baco.sampling.noise import (
    GUMBEL_MAX,
    GUMBEL_MIN,
    ROUTER,
    coin,
    gumbel_of,
    noise_keys,
)
from baco.sampling.params import SamplingParams
from baco.sampling.sampler import DrawTable, draw
from baco.sampling.seeds import noise_seed
from baco.source import Source
from baco.text.prompts import Prompt

# How often a row is shaken, and by how many standard deviations of the rounding.
SHAKES, DEVIATIONS = 1000, 2.0


@dataclass(frozen=True, slots=True)
class Parting:
    """The first token in which two decodings of one sample differ.

    Attributes:
        prompt, sample, position: where.
        plain, fast: (token, source) of plain decoding and of the engine's.
        gap: how far the two tokens are apart in float32, noise added, over temperature; None where
            the sources differ.
        seen: shares of the shaken rows that said plain's token and the engine's.
    """

    prompt: int
    sample: int
    position: int
    plain: tuple[int, str]
    fast: tuple[int, str]
    gap: float | None
    seen: tuple[float, float]

    @property
    def tie(self) -> bool:
        """Does rounding alone give either?"""
        return min(self.seen) > 0


@dataclass(slots=True)
class Report:
    """What was found.

    Attributes:
        samples, tokens: decoded both ways; tokens up to and with the first difference.
        rounding: standard deviation of bfloat16's logits from float32's, by half.
        off: root mean square of the answers' log-probabilities from float32's, in nats, of plain
            decoding and of the engine's.
        partings: the first differences.
    """

    samples: int = 0
    tokens: int = 0
    rounding: dict[str, float] = field(default_factory=dict)
    off: dict[str, float] = field(default_factory=dict)
    partings: list[Parting] = field(default_factory=list)

    @property
    def per_thousand(self) -> float:
        """First differences per 1,000 tokens."""
        return 1000 * len(self.partings) / max(self.tokens, 1)

    @property
    def ties(self) -> int:
        """How many of them are ties."""
        return sum(parting.tie for parting in self.partings)


def compare(
    pair: Pair,
    exact: Pair,
    prompts: Sequence[Any],
    router: Router,
    *,
    unpacked: Pair | None = None,
    **sampling: Any,
) -> Report:
    """Decode prompts both ways and explain every difference.

    Args:
        pair: in bfloat16.
        exact: the same numbers held in float32, not packed.
        prompts: texts or conversations.
        router: for all of them.
        unpacked: the same in bfloat16 as `transformers` runs it, to be decoded plainly in the place
            of ``pair``: then the layout of weights and the forward differ as well.
        sampling: fields of :class:`baco.sampling.params.SamplingParams`, a seed among them; no
            penalties.
    """
    alone = unpacked or pair
    plain = _decode(Engine(alone, max_rows=1, speculate=False), prompts, router, sampling)
    fast = _decode(Engine(pair), prompts, router, sampling)
    report = Report(samples=len(plain))
    spread = {name: _Spread() for name in ("base", "aligned", "plain", "fast")}
    parted: list[tuple[tuple[int, int], int]] = []
    for key, ours in plain.items():
        prompt, theirs = pair.renderer.render(prompts[key[0]]), fast[key]
        read, truth = _rows(alone, prompt, ours), _rows(exact, prompt, ours)
        for half, rows in truth.items():
            spread[half].add(_rounding(read[half], rows))
        spread["plain"].add(_off(ours, truth))
        spread["fast"].add(_off(theirs, _rows(exact, prompt, theirs)))
        at = _first_difference(ours, theirs)
        report.tokens += len(ours.token_ids) if at is None else at + 1
        if at is not None:
            parted.append((key, at))
    report.rounding = {half: spread[half].deviation for half in ("base", "aligned")}
    report.off = {way: spread[way].deviation for way in ("plain", "fast")}
    for key, at in parted:
        prompt = pair.renderer.render(prompts[key[0]])
        truth = {half: rows[at] for half, rows in _rows(exact, prompt, plain[key]).items()}
        shaken = _shaken(truth, report.rounding)
        seed = noise_seed(plain[key].seed, prompt.digest)
        place = _Place(exact, router, pair.defaults.updated(sampling), plain[key], at, seed)
        report.partings.append(_parting(key, place, truth, fast[key], place.decide(shaken)))
    return report


@dataclass(slots=True)
class _Spread:
    """A running root mean square."""

    squares: float = 0.0
    count: int = 0

    def add(self, errors: Tensor) -> None:
        self.squares += float(errors.double().square().sum())
        self.count += errors.numel()

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / max(self.count, 1))


@dataclass(frozen=True, slots=True)
class _Place:
    """A position of an answer, and all that decides it beside the two rows."""

    pair: Pair
    router: Router
    params: SamplingParams
    answer: Completion
    at: int
    noise_seed: int

    def decide(self, rows: dict[str, Tensor]) -> list[tuple[int, Source]]:
        """The token and source of each of K rows, [K, V] of each half."""
        count, before = len(rows["base"]), self.at - 1
        previous = self.answer.token_ids[before] if self.at else NO_TOKEN
        active = self.at > 0 and self.answer.sources[before] == "base"
        seed, sample = torch.tensor(self.noise_seed), torch.tensor(self.answer.sample)
        keys = noise_keys(seed, sample, torch.tensor(self.at)).expand(count, 2)
        logits, base = select(
            rows["base"],
            rows["aligned"],
            torch.full((count,), previous),
            torch.full((count,), active),
            router=self.router,
            vocabulary=self.pair.vocabulary,
            banned=self.pair.banned,
            coin=coin(keys, ROUTER),
        )
        tokens = draw(logits, DrawTable.of([self.params] * count, "cpu"), keys)
        sources: list[Source] = ["base" if one else "aligned" for one in base.tolist()]
        return list(zip(tokens.tolist(), sources, strict=True))

    def score(self, row: Tensor, token: int) -> float:
        """What a token has in the draw from a row [V]: logit over temperature, and its noise."""
        logit, heat = float(row[token]), self.params.temperature
        if heat == 0:
            return logit
        return logit / heat + gumbel_of(self.noise_seed, self.answer.sample, self.at, token)


def _parting(
    key: tuple[int, int],
    place: _Place,
    truth: dict[str, Tensor],
    theirs: Completion,
    decided: list[tuple[int, Source]],
) -> Parting:
    plain = (place.answer.token_ids[place.at], place.answer.sources[place.at])
    fast = (theirs.token_ids[place.at], theirs.sources[place.at])
    gap = None
    if plain[1] == fast[1]:
        row = truth[plain[1]]
        gap = abs(place.score(row, plain[0]) - place.score(row, fast[0]))
    seen = (decided.count(plain) / len(decided), decided.count(fast) / len(decided))
    return Parting(*key, place.at, plain, fast, gap, seen)


def _decode(
    engine: Engine, prompts: Sequence[Any], router: Router, sampling: dict[str, Any]
) -> dict[tuple[int, int], Completion]:
    """Every sample, by prompt and number."""
    decoder = Decoder(engine.pair, engine)
    for prompt in prompts:
        decoder.submit(prompt, router=router, **sampling)
    found = {}
    while decoder.busy:
        for chunk in decoder.step():
            if chunk.completion is not None:
                found[chunk.prompt, chunk.sample] = chunk.completion
    return dict(sorted(found.items()))


def _rows(pair: Pair, prompt: Prompt, answer: Completion) -> dict[str, Tensor]:
    """Both halves' rows that each of an answer's T tokens is drawn from: [T, V]."""
    ids = {"base": prompt.base_ids, "aligned": prompt.aligned_ids}
    return {half: read_rows(getattr(pair, half), ids[half], answer.token_ids) for half in ids}


def _rounding(read: Tensor, truth: Tensor) -> Tensor:
    """How far logits [T, V] are off, among tokens that can win; a row's common shift is nothing."""
    can_win = truth >= truth.amax(dim=-1, keepdim=True) - (GUMBEL_MAX - GUMBEL_MIN)
    off = (read - truth).masked_fill(~can_win, 0.0)
    mean = off.sum(dim=-1, keepdim=True) / can_win.sum(dim=-1, keepdim=True)
    return (off - mean)[can_win]


def _off(answer: Completion, truth: dict[str, Tensor]) -> Tensor:
    """How far an answer's log-probabilities are from float32's, in nats: [T]."""
    logp = {half: rows.log_softmax(dim=-1) for half, rows in truth.items()}
    told = zip(answer.sources, answer.token_ids, strict=True)
    right = torch.stack([logp[source][at, token] for at, (source, token) in enumerate(told)])
    return torch.tensor(answer.logprobs) - right


def _shaken(truth: dict[str, Tensor], rounding: dict[str, float]) -> dict[str, Tensor]:
    """Rows [V] shaken by rounding, [SHAKES, V] of each half."""
    generator = torch.Generator().manual_seed(0)
    return {
        half: row
        + torch.randn(SHAKES, len(row), generator=generator) * (DEVIATIONS * rounding[half])
        for half, row in truth.items()
    }


def _first_difference(ours: Completion, theirs: Completion) -> int | None:
    told = (zip(c.token_ids, c.sources, strict=True) for c in (ours, theirs))
    return next((at for at, (a, b) in enumerate(zip(*told, strict=False)) if a != b), None)
