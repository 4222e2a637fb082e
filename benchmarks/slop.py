"""How many listed phrases `Slop` leaves in real text, and what it costs in quality.

    python -m benchmarks.slop [PAIR] [--judge MODEL] [--prompts 24] [--n 4] [--max-tokens 96]

Story and essay prompts are answered with and without `Slop`, with the same seeds. For each router:
listed phrases per 1,000 words, the base share, and quality: the mean log-probability of a token of
the answer under a third model, in nats. `Rand` at the base share of `Slop` is the control: as many
words from the base model, anywhere. Intervals are 95% bootstrap intervals over prompts; differences
are to the row named in brackets, prompt by prompt. The default pair is made from SmolLM2 by
`benchmarks.siblings`; the judge is Gemma 3.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from baco import Baco
from baco.models.dtypes import chosen_dtype
from baco.models.loading import Placement, load_model, load_tokenizer
from baco.text.phrases import load_phrases
from benchmarks import launch
from benchmarks.siblings import pair_folder
from tests_real.fetch import path_of

STARTS = ("Write the opening of a story about", "Write a short essay about")
SUBJECTS = (
    "an old lighthouse",
    "a city at night",
    "the first day of spring",
    "a violin maker",
    "a forest after rain",
    "two sisters who meet again",
    "the history of tea",
    "a village market",
    "learning a new language",
    "a scientist's discovery",
    "the sea in winter",
    "a train journey",
)
PROMPTS = [f"{start} {subject}." for subject in SUBJECTS for start in STARTS]


@dataclass
class Row:
    """One router: means over prompts, with 95% intervals."""

    router: str
    words: int
    phrases: int
    per_1000: tuple[float, float, float]
    base_share: float
    quality: tuple[float, float, float]
    against: str | None = None
    phrases_difference: tuple[float, float, float] | None = None
    quality_difference: tuple[float, float, float] | None = None


@dataclass
class Measured:
    """Per prompt: words, phrases, base tokens, tokens, sum and number of log-probabilities."""

    table: np.ndarray

    @property
    def base_share(self) -> float:
        return float(self.table[:, 2].sum() / self.table[:, 3].sum())


def main() -> None:
    """Answer, score and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pair", nargs="?", default="smollm2")
    parser.add_argument("--judge", default="gemma3", help="a model's folder, or gemma3 or smollm2")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--n", type=int, default=4, help="answers to each prompt")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--gamma", type=float, default=0.1, help="of P-Punc")
    parser.add_argument("--phrases", help="a list in place of the built-in one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = str(pair_folder("smollm2", 0.05)) if options.pair == "smollm2" else options.pair
    baco = Baco.load(folder)
    judge = path_of(options.judge) if options.judge in ("gemma3", "smollm2") else options.judge
    scorer = Scorer(str(judge))
    phrases = f"phrases={options.phrases}" if options.phrases else ""

    def spelled(*parts: str) -> str:
        return ":".join(filter(None, (parts[0], ",".join(filter(None, parts[1:])))))

    measured: dict[str, Measured] = {}

    def measure(router: str) -> str:
        answers = baco.generate_batch(
            PROMPTS[: options.prompts],
            router=router,
            n=options.n,
            seed=1,
            max_tokens=options.max_tokens,
        )
        measured[router] = scorer.measure(answers, load_phrases(options.phrases))
        return router

    aligned = measure("Aligned")
    slop = measure(spelled("Slop", phrases))
    rand = measure(f"Rand:{measured[slop].base_share:.3g}")
    routed = measure(f"P-Punc:{options.gamma:g}")
    both = measure(spelled("P-Punc-Slop", f"{options.gamma:g}", phrases))
    against = {slop: aligned, rand: aligned, routed: aligned, both: routed}
    rows = [_row(name, measured, against.get(name)) for name in measured]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    for row in rows:
        print(_line(row))


class Scorer:
    """Scores answers by their log-probability under a model that is none of the pair."""

    def __init__(self, path: str) -> None:
        device = torch.device("cpu")
        self._tokenizer = load_tokenizer(path)
        self._model = load_model(path, Placement(device, chosen_dtype("bfloat16", device)))

    def measure(self, answers: Sequence[Sequence[Any]], phrases: Any) -> Measured:
        rows = []
        for samples in answers:
            values = np.zeros(6)
            for sample in samples:
                total, count = self._logprob(sample.text)
                values += (
                    len(sample.text.split()),
                    phrases.count(sample.text),
                    sample.sources.count("base"),
                    len(sample.sources),
                    total,
                    count,
                )
            rows.append(values)
        return Measured(np.array(rows))

    @torch.inference_mode()
    def _logprob(self, text: str) -> tuple[float, int]:
        ids = self._tokenizer(text, return_tensors="pt").input_ids
        if ids.shape[1] < 2:
            return 0.0, 0
        logprobs = self._model(ids).logits[0, :-1].float().log_softmax(-1)
        return float(logprobs.gather(1, ids[0, 1:, None]).sum()), ids.shape[1] - 1


def _row(router: str, measured: dict[str, Measured], against: str | None) -> Row:
    table = measured[router].table
    other = None if against is None else measured[against].table
    draws = np.random.default_rng(0).integers(0, len(table), (4000, len(table)))

    def phrases(table: np.ndarray) -> Any:
        return 1000 * table[..., 1].sum(-1) / table[..., 0].sum(-1)

    def quality(table: np.ndarray) -> Any:
        return table[..., 4].sum(-1) / table[..., 5].sum(-1)

    def interval(figure: Any) -> tuple[float, float, float]:
        value, drawn = figure(lambda rows: rows), figure(lambda rows: rows[draws])
        low, high = np.percentile(drawn, (2.5, 97.5))
        return float(value), float(low), float(high)

    row = Row(
        router,
        int(table[:, 0].sum()),
        int(table[:, 1].sum()),
        interval(lambda take: phrases(take(table))),
        measured[router].base_share,
        interval(lambda take: quality(take(table))),
        against,
    )
    if other is not None:
        row.phrases_difference = interval(lambda take: phrases(take(table)) - phrases(take(other)))
        row.quality_difference = interval(lambda take: quality(take(table)) - quality(take(other)))
    return row


def _line(row: Row) -> str:
    def shown(values: tuple[float, float, float]) -> str:
        return "{:.2f} [{:.2f}, {:.2f}]".format(*values)

    line = (
        f"{row.router:<18} {row.phrases:>4} phrases in {row.words:,} words: {shown(row.per_1000)} "
        f"per 1,000; base share {row.base_share:.3f}; quality {shown(row.quality)}"
    )
    if row.phrases_difference is not None and row.quality_difference is not None:
        line += (
            f" | against {row.against}: {shown(row.phrases_difference)} per 1,000, "
            f"quality {shown(row.quality_difference)}"
        )
    return line


if __name__ == "__main__":
    launch(main)
