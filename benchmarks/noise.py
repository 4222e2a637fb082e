"""Whether bootstrap intervals over prompts are as wide as answers spread over seeds.

    python -m benchmarks.noise [--seeds 20] [--prompts 100] [-n 4]

The demo pair answers the same prompts under many seeds by `Rand:0.5`. Every seed gives a mean base
share and its 95% bootstrap interval over prompts. Once all prompts draw with one key, as noise of
version 1 did, and once each prompt draws with its own.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from baco import Baco
from baco.demo.world import questions
from benchmarks import launch

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Spread:
    """Results over seeds.

    Attributes:
        means: the mean base share of each seed, [S].
        intervals: its 95% bootstrap interval over prompts, [S, 2].
        believed: the standard deviation of a mean, as the bootstrap has it; a mean over seeds.
    """

    means: NDArray[np.float64]
    intervals: NDArray[np.float64]
    believed: float

    @property
    def ratio(self) -> float:
        """The standard deviation of the means over what the bootstrap believes."""
        return float(self.means.std(ddof=1)) / self.believed

    def holding(self, truth: float) -> int:
        """How many intervals hold a value."""
        low, high = self.intervals.T
        return int(((low <= truth) & (truth <= high)).sum())


def spread(baco: Baco, prompts: Sequence[str], seeds: int, n: int, *, apart: bool) -> Spread:
    """The mean base share under many seeds; all prompts share one key unless they draw apart."""
    digests = None if apart else [b""] * len(prompts)
    rng = np.random.default_rng(0)
    means, intervals, deviations = [], [], []
    for seed in range(seeds):
        rows = baco.generate_batch(
            prompts, router="Rand:0.5", n=n, seed=seed, max_tokens=16, digests=digests
        )
        shares = np.array([np.mean([answer.base_share for answer in row]) for row in rows])
        picks = rng.integers(len(shares), size=(RESAMPLES, len(shares)))
        resampled = shares[picks].mean(axis=1)
        means.append(shares.mean())
        intervals.append(np.quantile(resampled, [0.025, 0.975]))
        deviations.append(resampled.std())
    return Spread(np.array(means), np.array(intervals), float(np.mean(deviations)))


def main() -> None:
    """Measure and print both ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("-n", type=int, default=4)
    arguments = parser.parse_args()
    baco = Baco.load("demo")
    prompts = [question.text for question in questions("test", arguments.prompts, seed=0)]
    spreads = {
        name: spread(baco, prompts, arguments.seeds, arguments.n, apart=name == "apart")
        for name in ("shared", "apart")
    }
    truth = float(spreads["apart"].means.mean())
    print("noise of prompts   spread of the means / bootstrap's   intervals that hold the truth")
    for name, measured in spreads.items():
        print(f"{name:18} {measured.ratio:33.2f}   {measured.holding(truth)} of {arguments.seeds}")


if __name__ == "__main__":
    launch(main)
