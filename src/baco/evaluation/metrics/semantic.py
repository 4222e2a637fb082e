"""Semantic diversity of the answers to a prompt: how far apart they are in meaning.

Functions of many prompts at once, so that a model reads their answers in few batches. Each takes
its model or judge, the prompts if that one reads them, and all samples of each.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np

from baco.evaluation.metrics.embedding import Embedder, Floats
from baco.evaluation.metrics.equivalence import Entailment
from baco.evaluation.metrics.nli import CONTRADICTION, ENTAILMENT, LABELS, Nli, nli
from baco.evaluation.metrics.protocols import Answers, Equivalence, Prompts
from baco.evaluation.metrics.registry import ROLES, Built, register_metric

# Prompts whose answers are embedded together: enough to fill batches, few enough for memory.
PROMPTS_AT_ONCE = 50


def cosines(embedder: Embedder, answers: Answers) -> Iterator[Floats]:
    """Cosine similarity of every two samples of each prompt, [n, n]."""
    for first in range(0, len(answers), PROMPTS_AT_ONCE):
        rows = answers[first : first + PROMPTS_AT_ONCE]
        vectors = embedder.embed([text for row in rows for text in row])
        start = 0
        for row in rows:
            own = vectors[start : start + len(row)]
            yield own @ own.T
            start += len(row)


@register_metric("embedding_distance", kind="semantic", needs=2, models=("embedding",))
def embedding_distance(embedder: Embedder, answers: Answers) -> list[float]:
    """Mean cosine distance of every two samples' sentence embeddings (Reimers and Gurevych 2019).

    Range 0 (all alike) to 2, in practice to about 1; higher is more diverse. Cost: each sample is
    embedded once.
    """
    figures = []
    for similar in cosines(embedder, answers):
        above = np.triu_indices(len(similar), 1)
        figures.append(float(np.mean(np.maximum(1.0 - similar[above], 0.0))))
    return figures


@register_metric("vendi", kind="semantic", needs=2, models=("embedding",))
def vendi(embedder: Embedder, answers: Answers) -> list[float]:
    """Vendi score: the effective number of different samples (Friedman and Dieng 2023).

    exp(−Σ λ ln λ) over the eigenvalues λ of K / n, K being the cosine similarity of the samples'
    embeddings. Range 1 (all alike) to n, higher is more diverse. Cost: each sample is embedded
    once, and n³.
    """
    figures = []
    for similar in cosines(embedder, answers):
        shares = np.linalg.eigvalsh(similar / len(similar))
        shares = shares[shares > 1e-12]
        shares /= shares.sum()
        figures.append(float(np.exp(-np.sum(shares * np.log(shares)))))
    return figures


@register_metric("nli_diversity", kind="semantic", needs=2, models=("nli",))
def nli_diversity(model: Nli, answers: Answers) -> list[float]:
    """How much every two samples contradict rather than entail each other.

    Mean over ordered pairs of the probability of the most likely class: positive for contradiction,
    negative for entailment, 0 for neutral. This is Confidence NLI Diversity (Stasaski and Hearst
    2022, 3.3), as a mean instead of a sum, so that n does not matter.
    Range −1 (all alike: a text entails itself) to 1, higher is more diverse. Cost: the NLI model
    reads n (n − 1) pairs a prompt.
    """
    pairs = [list(permutations(row, 2)) for row in answers]
    probabilities = model.judge([pair for row in pairs for pair in row])
    signs = np.zeros(len(LABELS))
    signs[CONTRADICTION], signs[ENTAILMENT] = 1.0, -1.0
    scores = iter(signs[probabilities.argmax(axis=1)] * probabilities.max(axis=1))
    return [math.fsum(next(scores) for _ in row) / len(row) for row in pairs]


def _by_entailment(models: Mapping[str, Any]) -> Built:
    """Classes of the judge that the user names; by default of answers that entail each other."""
    given = models.get("equivalence")
    judge = ROLES["equivalence"](given) if given is not None else Entailment(nli(models.get("nli")))
    return judge.made_by, partial(semantic_entropy, judge)


@register_metric(
    "semantic_entropy",
    kind="semantic",
    needs=2,
    models=("nli", "equivalence"),
    build=_by_entailment,
)
def semantic_entropy(judge: Equivalence, prompts: Prompts, answers: Answers) -> list[float]:
    """Entropy in nats of the samples' shares of the classes of equal meaning.

    −Σ p ln p, p being the share of the samples in a class: the discrete semantic entropy of
    Farquhar et al. 2024 (after Kuhn et al. 2023), whose classes are of answers that entail each
    other. Range 0 (one class) to ln n, higher is more diverse. Cost: up to n (n − 1) pairs a
    prompt, as few as 2 (n − 1) where all are alike.
    """
    figures = []
    for row in judge.partition(prompts, answers):
        shares = [count / len(row) for count in Counter(row).values()]
        figures.append(-math.fsum(share * math.log(share) for share in shares) + 0.0)
    return figures


@register_metric("distinct_k", kind="semantic", needs=2, models=("equivalence",))
def distinct_k(judge: Equivalence, prompts: Prompts, answers: Answers) -> list[float]:
    """Number of classes of equivalent samples (NoveltyBench, Zhang et al. 2025, distinct_k).

    Range 1 (all alike) to k, the number of samples; higher is more diverse. Cost: up to
    k (k − 1) / 2 pairs a prompt, as few as k − 1 where all are alike.
    """
    return [float(len(set(row))) for row in judge.partition(prompts, answers)]
