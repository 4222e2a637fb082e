"""How often the intervals of indicators hold the truth.

    python -m benchmarks.intervals [--replicates 300] [--pool FILE]

The demo pair answers 40 prompts 64 times at each of ten settings of two methods. These answers are
the population: its means are known. A replicate draws prompts and ten answers to each from it, and
computes every interval from these alone. The share of the replicates whose interval holds the
population's figure should be 95%. *Plain* is the percentile bootstrap of the same replicates, which
BACo used before.

The second table has invented answers, with independent noise: a method that owns the front, and a
rival just behind it. There Dominance is hardest: noise puts points on the front that do not belong
there.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baco.evaluation.indicators import Floats, Indicator, Indicators, Measured, indicators
from baco.evaluation.inference import interval
from benchmarks import launch

PROMPTS = 40
ANSWERS = 64
SAMPLES = 10  # answers to a prompt in a replicate
RESAMPLES = 300
NAMES: dict[Indicator, str] = {
    "coverage": "Coverage",
    "coverage_at_k": "Coverage at 3 settings",
    "dominance": "Dominance",
}
PARTS = {"lexical": ("distinct_1",), "semantic": ("distinct_k",)}
SETTINGS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "P-Punc": [(f"P-Punc:{threshold}", {}) for threshold in (0.2, 0.4, 0.6, 0.8, 0.95)],
    "aligned": [("Aligned", {"temperature": t, "min_p": 0.0}) for t in (0.7, 1.0, 1.3, 1.6, 2.0)],
}


@dataclass(frozen=True, slots=True)
class Pool:
    """All answers as numbers, [settings, prompts, answers]; words [..., words of the vocabulary].

    Attributes:
        methods: of each setting.
        quality: of every answer, 0 to 1.
        keys: the number of its meaning.
        lengths: its number of words.
        words: which words it has.
    """

    methods: Sequence[str]
    quality: Floats
    keys: NDArray[np.intp]
    lengths: NDArray[np.intp]
    words: NDArray[np.bool_]

    def measured(self, prompts: NDArray[np.intp], generator: np.random.Generator) -> Measured:
        """The scores of `SAMPLES` answers to each of these prompts, drawn anew at every setting."""
        settings, _, answers = self.quality.shape
        shape = (settings, len(prompts), answers)
        chosen = np.argsort(generator.random(shape), axis=-1)[..., :SAMPLES]
        rows = np.arange(settings)[:, None, None]
        at = (rows, prompts[None, :, None], chosen)
        keys = np.sort(self.keys[at], axis=-1)
        words = self.words[at].any(axis=2).sum(axis=-1)
        return Measured(
            methods=self.methods,
            settings=[str(row) for row in range(settings)],
            values=[None] * settings,
            prompts=[str(place) for place in range(len(prompts))],
            metrics={
                "reward": self.quality[at].mean(axis=-1),
                "distinct_k": 1.0 + (np.diff(keys, axis=-1) != 0).sum(axis=-1),
                "distinct_1": words / np.maximum(self.lengths[at].sum(axis=-1), 1),
            },
        )


def drawn_pool(prompts: int) -> Pool:
    """Answers of the demo pair, judged by the demo world."""
    from baco import Baco
    from baco.demo.world import questions
    from baco.demo.world.judge import judge
    from baco.text.segmentation import words

    baco = Baco.load("demo")
    asked = questions("test", prompts, seed=0)
    known: dict[str, int] = {}
    quality, keys, texts = [], [], []
    for settings in SETTINGS.values():
        for router, sampling in settings:
            rows = baco.generate_batch(
                [question.text for question in asked],
                router=router, n=ANSWERS, seed=0, max_tokens=96, **sampling,
            )  # fmt: skip
            judged = [
                [judge(question, answer.text.strip()) for answer in row]
                for question, row in zip(asked, rows, strict=True)
            ]
            quality.append([[answer.quality for answer in row] for row in judged])
            keys.append([[known.setdefault(a.key, len(known)) for a in row] for row in judged])
            texts.append([[words(answer.text) for answer in row] for row in rows])
    vocabulary = {word: place for place, word in enumerate(sorted(_every(texts)))}
    shape = np.shape(quality)
    present = np.zeros((*shape, len(vocabulary)), dtype=np.bool_)
    lengths = np.zeros(shape, dtype=np.intp)
    for at in np.ndindex(*shape):
        own = texts[at[0]][at[1]][at[2]]
        lengths[at] = len(own)
        present[at][[vocabulary[word] for word in own]] = True
    methods = [name for name, settings in SETTINGS.items() for _ in settings]
    return Pool(methods, np.array(quality), np.array(keys), lengths, present)


def _every(texts: Sequence[Sequence[Sequence[Sequence[str]]]]) -> set[str]:
    return {word for rows in texts for row in rows for own in row for word in own}


def truth_of_pool(pool: Pool, rounds: int = 200) -> Measured:
    """The population: the mean scores of ten answers to each prompt, over many draws."""
    generator = np.random.default_rng(1)
    prompts = np.arange(pool.quality.shape[1])
    drawn = [pool.measured(prompts, generator) for _ in range(rounds)]
    metrics = {
        name: np.mean([measured.metrics[name] for measured in drawn], axis=0)
        for name in drawn[0].metrics
    }
    return replace(drawn[0], metrics=metrics)


def invented(
    generator: np.random.Generator | None, behind: float, prompts: int = PROMPTS
) -> Measured:
    """Scores of a method that owns the front, and of a rival behind it.

    Args:
        generator: of the noise, independent for every setting, prompt and metric; None for none.
        behind: how far the rival is behind, in standard errors of a setting's mean.
        prompts: their number.
    """
    noise = 0.2
    places = np.concatenate([np.linspace(0.05, 0.95, 7), np.linspace(0.02, 0.98, 7)]) * np.pi / 2
    radius = np.repeat([1.0, 1.0 - behind * noise / np.sqrt(prompts)], 7)
    means = radius * np.stack([np.cos(places), np.sin(places), np.sin(places)])
    scores = np.repeat(means[:, :, None], prompts, axis=-1)
    if generator is not None:
        scores = scores + noise * generator.standard_normal(scores.shape)
    return Measured(
        methods=["owner"] * 7 + ["rival"] * 7,
        settings=[str(row) for row in range(14)],
        values=[None] * 14,
        prompts=[str(place) for place in range(prompts)],
        metrics=dict(zip(("reward", "distinct_k", "distinct_1"), scores, strict=True)),
    )


@dataclass(frozen=True, slots=True)
class Held:
    """How often intervals of a figure held the truth.

    Attributes:
        figure: what they are of.
        plain: the share of plain percentile intervals of the bootstrap.
        now: the share of the intervals that BACo gives.
        width: their mean width.
    """

    figure: str
    plain: float
    now: float
    width: float


def held(
    draw: Callable[[np.random.Generator], Measured], truth: Measured, replicates: int
) -> list[Held]:
    """How often the intervals of replicates hold the figures of the truth."""
    known = _figures(_indicators(truth, 1))
    generator = np.random.default_rng(0)
    hits = {name: np.zeros(3) for name in known}
    for _ in range(replicates):
        for name, (_, plain, now) in _figures(_indicators(draw(generator), RESAMPLES)).items():
            value = known[name][0]
            hits[name] += [
                plain[0] - 1e-9 <= value <= plain[1] + 1e-9,
                now[0] - 1e-9 <= value <= now[1] + 1e-9,
                now[1] - now[0],
            ]
    return [Held(name, *map(float, hit / replicates)) for name, hit in hits.items()]


def _indicators(measured: Measured, resamples: int) -> Indicators:
    return indicators([measured], PARTS, ("reward",), resamples, seed=0, k=3)


Ends = tuple[float, float]


def _figures(computed: Indicators) -> dict[str, tuple[float, Ends, Ends]]:
    """Every figure: its value, the plain interval, and BACo's."""
    figures: dict[str, tuple[float, Ends, Ends]] = {}
    for indicator, title in NAMES.items():
        drawn = {method: _drawn(computed, indicator, method) for method in computed.methods}
        for method, draws in drawn.items():
            estimate = computed.estimate(indicator, method)
            assert estimate is not None
            name = f"{title} of {method}"
            figures[name] = (estimate.value, interval(draws[1:]), (estimate.low, estimate.high))
        first, second = computed.methods
        lead = computed.compare(first, second, indicator)
        assert lead is not None
        draws = drawn[first] - drawn[second]
        figures[f"{title}, difference"] = (
            lead.difference, interval(draws[1:]), (lead.low, lead.high),
        )  # fmt: skip
    return figures


def _drawn(computed: Indicators, indicator: Indicator, method: str) -> Floats:
    """The draws of an indicator, overall: the mean of its two sub-spaces."""
    row = computed.methods.index(method)
    rows = [computed.draws[indicator, "", space][row] for space in computed.spaces]
    mean: Floats = np.mean(rows, axis=0)
    return mean


def _saved(path: Path | None) -> Pool:
    """The pool of a file, or a new one, which is kept there."""
    if path is not None and path.exists():
        with np.load(path, allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in kept.files}
        return Pool(**(arrays | {"methods": [str(name) for name in arrays["methods"]]}))
    pool = drawn_pool(PROMPTS)
    if path is not None:
        np.savez_compressed(path, **asdict(pool))
    return pool


def table(title: str, rows: Sequence[Held]) -> str:
    """A table in Markdown."""
    lines = [
        f"### {title}",
        "",
        "| figure | plain | now | mean width now |",
        "|---|---:|---:|---:|",
    ]
    lines += [f"| {r.figure} | {r.plain:.1%} | {r.now:.1%} | {r.width:.3f} |" for r in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Simulate and print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicates", type=int, default=300)
    parser.add_argument("--pool", type=Path, help="file of the pool; drawn and kept there if new")
    arguments = parser.parse_args()
    for behind in (1.0, 2.0, 4.0):
        rows = held(partial(invented, behind=behind), invented(None, behind), arguments.replicates)
        print(table(f"Invented: the rival is {behind:g} standard errors behind", rows), flush=True)
    pool = _saved(arguments.pool)
    count = pool.quality.shape[1]

    def replicate(generator: np.random.Generator) -> Measured:
        return pool.measured(np.array(generator.integers(count, size=count)), generator)

    rows = held(replicate, truth_of_pool(pool), arguments.replicates)
    print(table(f"The demo pair, {count} prompts, {SAMPLES} of {ANSWERS} answers", rows))


if __name__ == "__main__":
    launch(main)
