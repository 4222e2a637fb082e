"""How often bfloat16 answers differ from plain decoding's, and whether each difference is a tie.

    python -m benchmarks.divergence [--pair body:50m | FOLDER] [--unpacked] [--json]

In float32, speculation and batching change no token. In bfloat16 a row that is read among others,
or with its drafts, is rounded differently from the same row read alone, so where two tokens or the
two sources are level to within that rounding, either may win. The same prompts are decoded plainly
(one row, one token a forward, nothing drafted) and with all that the engine has. Every first
difference is then decided again from float32 rows to which noise of the size of bfloat16's measured
rounding is added: it is a tie if both answers come up. With ``--unpacked`` the plain way runs
weights and forward of `transformers`, as the naive loop of `baco bench` does.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baco import Baco
from baco.calibration.agreement import answer_logits
from baco.decoder import Decoder
from baco.demo.world import questions
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
from baco.sampling.sampler import SamplingTensors, draw
from baco.sampling.seeds import noise_seed
from baco.source import MODELS, Source
from baco.text.prompts import Prompt
from benchmarks import launch
from benchmarks.bodies import make

# Number of perturbations of a row, and their size in standard deviations of the rounding.
PERTURBATIONS, DEVIATIONS = 1000, 2.0


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token in which two decodings of one sample differ.

    Attributes:
        prompt, sample, position: where.
        plain, fast: (token, source) of plain decoding and of the engine's.
        gap: how far the two tokens are apart in float32, noise added, over temperature; None where
            the sources differ.
        seen: shares of the perturbed rows that give plain's token and the engine's.
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
        """Whether rounding alone can give either."""
        return min(self.seen) > 0


@dataclass(slots=True)
class Report:
    """All differences of two ways of decoding.

    Attributes:
        samples, tokens: decoded both ways; tokens up to and with the first difference.
        rounding: standard deviation of bfloat16's logits from float32's, by model.
        off: root mean square of the answers' log-probabilities from float32's, in nats, of plain
            decoding and of the engine's.
        differences: the first of each sample that differs.
    """

    samples: int = 0
    tokens: int = 0
    rounding: dict[str, float] = field(default_factory=dict)
    off: dict[str, float] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)

    @property
    def per_thousand(self) -> float:
        """First differences per 1,000 tokens."""
        return 1000 * len(self.differences) / max(self.tokens, 1)

    @property
    def ties(self) -> int:
        """Number of differences that are ties."""
        return sum(difference.tie for difference in self.differences)


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
    first: list[tuple[tuple[int, int], int]] = []
    for key, answer in plain.items():
        prompt, other = pair.renderer.render(prompts[key[0]]), fast[key]
        read, truth = _rows(alone, prompt, answer), _rows(exact, prompt, answer)
        for source, rows in truth.items():
            spread[source].add(_rounding(read[source], rows))
        spread["plain"].add(_off(answer, truth))
        spread["fast"].add(_off(other, _rows(exact, prompt, other)))
        at = _first_difference(answer, other)
        report.tokens += len(answer.token_ids) if at is None else at + 1
        if at is not None:
            first.append((key, at))
    report.rounding = {source: spread[source].deviation for source in MODELS}
    report.off = {way: spread[way].deviation for way in ("plain", "fast")}
    for key, at in first:
        prompt = pair.renderer.render(prompts[key[0]])
        truth = {source: rows[at] for source, rows in _rows(exact, prompt, plain[key]).items()}
        perturbed = _perturbed(truth, report.rounding)
        seed = noise_seed(plain[key].seed, prompt.digest)
        place = _Place(exact, router, pair.defaults.updated(sampling), plain[key], at, seed)
        report.differences.append(
            _difference(key, place, truth, fast[key], place.decide(perturbed))
        )
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
    """A position of an answer, and all that decides its token besides the two rows."""

    pair: Pair
    router: Router
    params: SamplingParams
    answer: Completion
    at: int
    noise_seed: int

    def decide(self, rows: dict[str, Tensor]) -> list[tuple[int, Source]]:
        """The token and source of each of K rows, [K, V] of each model."""
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
        tokens = draw(logits, SamplingTensors.of([self.params] * count, "cpu"), keys)
        sources: list[Source] = ["base" if one else "aligned" for one in base.tolist()]
        return list(zip(tokens.tolist(), sources, strict=True))

    def score(self, row: Tensor, token: int) -> float:
        """Score of a token in the draw from a row [V]: logit over temperature, plus its noise."""
        logit, heat = float(row[token]), self.params.temperature
        if heat == 0:
            return logit
        return logit / heat + gumbel_of(self.noise_seed, self.answer.sample, self.at, token)


def _difference(
    key: tuple[int, int],
    place: _Place,
    truth: dict[str, Tensor],
    other: Completion,
    decided: list[tuple[int, Source]],
) -> Difference:
    plain = (place.answer.token_ids[place.at], _source(place.answer, place.at))
    fast = (other.token_ids[place.at], _source(other, place.at))
    gap = None
    if plain[1] == fast[1]:
        row = truth[plain[1]]
        gap = abs(place.score(row, plain[0]) - place.score(row, fast[0]))
    seen = (decided.count(plain) / len(decided), decided.count(fast) / len(decided))
    return Difference(*key, place.at, plain, fast, gap, seen)


def _source(answer: Completion, at: int) -> Source:
    source = answer.sources[at]
    assert source is not None  # routers mix no rows
    return source


def _decode(
    engine: Engine, prompts: Sequence[Any], router: Router, sampling: dict[str, Any]
) -> dict[tuple[int, int], Completion]:
    """Every sample, by prompt and number."""
    decoder = Decoder(engine.pair, engine)
    for prompt in prompts:
        decoder.submit(prompt, router=router, **sampling)
    completions = {}
    while decoder.busy:
        for chunk in decoder.step():
            if chunk.completion is not None:
                completions[chunk.prompt, chunk.sample] = chunk.completion
    return dict(sorted(completions.items()))


def _rows(pair: Pair, prompt: Prompt, answer: Completion) -> dict[str, Tensor]:
    """Both models' logits that each of an answer's T tokens is drawn from: [T, V]."""
    ids = {"base": prompt.base_ids, "aligned": prompt.aligned_ids}
    return {name: answer_logits(getattr(pair, name), ids[name], answer.token_ids) for name in ids}


def _rounding(read: Tensor, truth: Tensor) -> Tensor:
    """Errors of logits [T, V] of the tokens that can win; a row's common shift does not count."""
    can_win = truth >= truth.amax(dim=-1, keepdim=True) - (GUMBEL_MAX - GUMBEL_MIN)
    off = (read - truth).masked_fill(~can_win, 0.0)
    mean = off.sum(dim=-1, keepdim=True) / can_win.sum(dim=-1, keepdim=True)
    return (off - mean)[can_win]


def _off(answer: Completion, truth: dict[str, Tensor]) -> Tensor:
    """Errors of an answer's log-probabilities next to float32's, in nats: [T]."""
    logp = {source: rows.log_softmax(dim=-1) for source, rows in truth.items()}
    tokens = enumerate(answer.token_ids)
    right = torch.stack([logp[_source(answer, at)][at, token] for at, token in tokens])
    return torch.tensor(answer.logprobs) - right


def _perturbed(truth: dict[str, Tensor], rounding: dict[str, float]) -> dict[str, Tensor]:
    """Rows [V] plus noise of the size of rounding, [PERTURBATIONS, V] of each model."""
    generator = torch.Generator().manual_seed(0)
    return {
        source: row
        + torch.randn(PERTURBATIONS, len(row), generator=generator)
        * (DEVIATIONS * rounding[source])
        for source, row in truth.items()
    }


def _first_difference(answer: Completion, other: Completion) -> int | None:
    left, right = (zip(c.token_ids, c.sources, strict=True) for c in (answer, other))
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), None)


def exact(folder: str) -> Baco:
    """The pair with the numbers of bfloat16, computed in float32."""
    baco = Baco.load(folder, dtype="bfloat16", packed=False)
    for model in (baco.pair.base, baco.pair.aligned):
        model.model.float()
    return baco


def show(report: Report, *, router: str, temperature: float) -> None:
    """Print one row of figures, and one for every difference."""
    print(
        f"{router}, temperature {temperature:g}: {report.samples} samples, {report.tokens} tokens, "
        f"{len(report.differences)} differ ({report.per_thousand:.2f} per 1,000 tokens), "
        f"{report.ties} of them ties"
    )
    print(
        f"  rounding of logits: base {report.rounding['base']:.4f}, aligned "
        f"{report.rounding['aligned']:.4f}; log-probabilities off by {report.off['plain']:.4f} "
        f"plain, {report.off['fast']:.4f} drafted and batched"
    )
    for difference in report.differences:
        gap = "sources differ" if difference.gap is None else f"gap {difference.gap:.4f}"
        print(
            f"  prompt {difference.prompt} sample {difference.sample} at {difference.position}: "
            f"{difference.plain} or {difference.fast}, {gap}, "
            f"seen {difference.seen[0]:.1%} and {difference.seen[1]:.1%}"
        )


def main() -> None:
    """Read the command line, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pair", default="body:50m", help="KIND:SIZE to make, or a folder")
    parser.add_argument("--router", action="append", help="may be given again")
    parser.add_argument("--temperature", action="append", type=float, help="may be given again")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("-n", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--unpacked", action="store_true", help="next to transformers' forward")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made_in:
        folder = given.pair
        if not Path(folder).is_dir():
            kind, _, size = folder.partition(":")
            folder = str(make(kind, size, Path(made_in), torch.bfloat16))
        fast, slow = Baco.load(folder, dtype="bfloat16"), exact(folder)
        unpacked = None
        if given.unpacked:
            unpacked = Baco.load(folder, dtype="bfloat16", packed=False).pair
    prompts = [question.text for question in questions("dev", given.prompts, 0)]
    reports: list[dict[str, Any]] = []
    for router in given.router or ["P-Punc:0.4"]:
        for temperature in given.temperature or [1.0, 0.0]:
            sampling = {"seed": given.seed, "temperature": temperature, "n": given.n}
            sampling["max_tokens"] = given.max_tokens
            pairs, parsed = (fast.pair, slow.pair), fast.router(router)
            report = compare(*pairs, prompts, parsed, unpacked=unpacked, **sampling)
            reports.append({"router": router, "temperature": temperature, **asdict(report)})
            if not given.json:
                show(report, router=router, temperature=temperature)
    if given.json:
        print(json.dumps(reports, indent=1))


if __name__ == "__main__":
    launch(main)
