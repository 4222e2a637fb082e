"""Effective diversity: diversity among acceptable answers.

Noise is diverse, but useless to a reader. These metrics count only answers above a quality bar, as
Shypula et al. 2025 ("Evaluating the Diversity and Quality of LLM Generated Content", 2504.12522)
count only valid ones. Quality and diversity are in one figure, so they belong to no sub-space.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from baco.evaluation.metrics.embedding import Embedder
from baco.evaluation.metrics.protocols import Answers, Equivalence, Prompts, Reward
from baco.evaluation.metrics.registry import Built, register_metric, with_reward
from baco.evaluation.metrics.semantic import cosines

# An answer is acceptable from here on, on NoveltyBench's scale of 1 to 10: its upper half.
BAR = 5.5


def _above_bar(role: str, function: Any, models: Mapping[str, Any]) -> Built:
    made_by, compute = with_reward(role, function, models)
    return {**made_by, "bar": str(BAR)}, compute


def _acceptable(rewards: Reward, prompts: Prompts, answers: Answers) -> Iterator[list[int]]:
    """The places of the acceptable answers to each prompt."""
    for rated in rewards.ratings(rewards.rewards(prompts, answers)):
        yield [place for place, rating in enumerate(rated) if rating >= BAR]


def effective_distinct_k(
    judge: Equivalence, rewards: Reward, prompts: Prompts, answers: Answers
) -> list[float]:
    """Number of classes of equivalent samples that have an acceptable one.

    Range 0 (none is acceptable) to k, the number of samples; higher is better. Cost: that of
    distinct_k and reward, whose results are reused.
    """
    return [
        float(len({row[place] for place in places}))
        for row, places in zip(
            judge.partition(prompts, answers),
            _acceptable(rewards, prompts, answers),
            strict=True,
        )
    ]


def effective_distance(
    embedder: Embedder, rewards: Reward, prompts: Prompts, answers: Answers
) -> list[float]:
    """Mean cosine distance of every two samples, 0 where one of them is not acceptable.

    The sum over the pairs of acceptable samples, divided by the number of all pairs, so that two
    acceptable samples of ten count less than ten of ten. Range 0 to 2, in practice to about 1;
    higher is better. Cost: that of embedding_distance and reward, whose results are reused.
    """
    figures = []
    acceptable = _acceptable(rewards, prompts, answers)
    for similar, places in zip(cosines(embedder, answers), acceptable, strict=True):
        pairs = np.ix_(places, places)
        distance = np.triu(np.maximum(1.0 - similar, 0.0), 1)[pairs].sum()
        figures.append(float(distance) / (len(similar) * (len(similar) - 1) / 2))
    return figures


register_metric(
    "effective_distinct_k",
    kind="utility",
    needs=2,
    models=("equivalence", "reward"),
    help="classes of equivalent samples that have an acceptable one",
    build=partial(_above_bar, "equivalence", effective_distinct_k),
)(effective_distinct_k)

register_metric(
    "effective_distance",
    kind="utility",
    needs=2,
    models=("embedding", "reward"),
    help="mean cosine distance of every two samples, 0 where one is not acceptable",
    build=partial(_above_bar, "embedding", effective_distance),
)(effective_distance)
