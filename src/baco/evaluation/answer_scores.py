"""Scores of a file of prompts and answers, alone and against another one."""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from baco.errors import BacoError
from baco.evaluation.answer_files import AnswerFile
from baco.evaluation.indicators import Comparison, Difference, Estimate, Floats, Resamples, combined
from baco.evaluation.inference import interval
from baco.evaluation.metrics import entries, metric, names
from baco.evaluation.records import Prompt


@dataclass(frozen=True, slots=True)
class AnswerScores:
    """A metric's figure for every prompt of a file.

    Attributes:
        metric: its name.
        values: [prompts], NaN where there was nothing to measure.
    """

    metric: str
    values: Floats

    @property
    def estimate(self) -> Estimate | None:
        """The mean over prompts with its 95% interval; None where no prompt has a figure."""
        known = self.values[~np.isnan(self.values)]
        if not len(known):
            return None
        draws = Resamples.of(len(known)).counts @ known / len(known)
        ends = interval(draws, len(known)) if len(known) > 1 else (float(known[0]),) * 2
        return Estimate(float(known.mean()), *ends)


def score_answers(
    file: AnswerFile, chosen: Sequence[str], models: Mapping[str, Any]
) -> list[AnswerScores]:
    """Score a file by metrics; by default by all lexical ones that its answers allow.

    Raises:
        BacoError: an unknown metric, or a prompt with too few answers for one.
        MetricUnavailable: a metric cannot run here.
    """
    if not chosen:
        known = entries()
        chosen = [name for name in names("lexical") if known[name].needs <= file.fewest]
    scores = []
    for name in dict.fromkeys(chosen):
        values = metric(name, **models).score(file.prompts, file.answers)
        row = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
        scores.append(AnswerScores(name, row))
    return scores


def against(
    file: AnswerFile, scores: AnswerScores, other_file: AnswerFile, other: AnswerScores
) -> Comparison | None:
    """A file's mean minus another's on the prompts of both; None where they share no prompt."""
    theirs = dict(zip(map(_text, other_file.prompts), other.values, strict=True))
    apart = np.array(
        [
            value - theirs[_text(prompt)]
            for prompt, value in zip(file.prompts, scores.values, strict=True)
            if _text(prompt) in theirs
        ]
    )
    apart = apart[~np.isnan(apart)]
    count = len(apart)
    if not count:
        return None
    draws = np.concatenate([[apart.mean()], Resamples.of(count).counts @ apart / count])
    without = apart if count == 1 else (apart.sum() - apart) / (count - 1)
    return combined([Difference(draws, without, count)])


def _text(prompt: Prompt) -> str:
    """A prompt's conversation, to recognise it in another file."""
    return json.dumps(prompt.messages)


@dataclass(frozen=True, slots=True)
class Published:
    """Figures of a model that NoveltyBench's leaderboard publishes, on NB-Curated.

    Attributes:
        distinct_k: mean number of distinct answers of 10.
        utility_k: mean utility of 10 answers, patience 0.8.
    """

    distinct_k: float
    utility_k: float


@cache
def published() -> Mapping[str, Published]:
    """NoveltyBench's figures by model: 100 prompts × 10 answers, measured by its authors."""
    text = resources.files("baco.evaluation").joinpath("noveltybench.toml").read_text("utf-8")
    return {name: Published(**row) for name, row in tomllib.loads(text)["curated"].items()}


def published_model(name: str) -> Published:
    """The published figures of a model.

    Raises:
        BacoError: there are none, with the nearest names.
    """
    known = published()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or sorted(known)[:3]
    raise BacoError(
        f"{name!r} is neither a file nor a model of NoveltyBench's leaderboard: use "
        f"{', '.join(near)}, or the path of a file"
    )
