"""The metrics by name, and what each is made of."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

from baco.errors import BacoError
from baco.evaluation.metrics import lexical, quality, semantic
from baco.evaluation.metrics.demo import DEMO, DemoJudge
from baco.evaluation.metrics.embedding import Embedder, embedder
from baco.evaluation.metrics.equivalence import Entailment, similarity_classifier
from baco.evaluation.metrics.loading import require
from baco.evaluation.metrics.nli import nli
from baco.evaluation.metrics.protocols import (
    Answers,
    Equivalence,
    Kind,
    Metric,
    MetricUnavailable,
    Prompts,
    Reward,
)
from baco.evaluation.metrics.reference import reference_model
from baco.evaluation.metrics.reward import reward_model
from baco.segmentation import distinct

Figures = Sequence[float | None]
Compute = Callable[[Prompts, Answers], Figures]


@dataclass(frozen=True, slots=True)
class Figure:
    """A metric: a function of all answers to many prompts, and what it is called."""

    name: str
    kind: Kind
    needs: int
    made_by: Mapping[str, str]
    compute: Compute = field(repr=False)

    @property
    def higher_is_better(self) -> bool:
        """Always: see :class:`Metric`."""
        return True

    def score(self, prompts: Prompts, answers: Answers) -> list[float | None]:
        """See :meth:`Metric.score`."""
        for prompt, row in zip(prompts, answers, strict=True):
            if len(row) < self.needs:
                raise BacoError(
                    f"prompt {prompt.id!r} has {len(row)} of the {self.needs} samples that "
                    f"{self.name} compares: draw more with -n, or leave the metric out"
                )
        return list(self.compute(prompts, answers))


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the catalogue.

    Attributes:
        name, kind: see :class:`Metric`.
        needs: the least number of samples a prompt must have.
        models: the roles it needs a model for: keywords of :func:`metric`.
    """

    name: str
    kind: Kind
    needs: int
    models: tuple[str, ...] = ()


CATALOGUE = (
    Entry("distinct_1", "lexical", 1),
    Entry("distinct_2", "lexical", 1),
    Entry("distinct_3", "lexical", 1),
    Entry("ead", "lexical", 1),
    Entry("self_bleu", "lexical", 2),
    Entry("self_rouge_l", "lexical", 2),
    Entry("embedding_distance", "semantic", 2, ("embedding",)),
    Entry("vendi", "semantic", 2, ("embedding",)),
    Entry("nli_diversity", "semantic", 2, ("nli",)),
    Entry("semantic_entropy", "semantic", 2, ("nli", "equivalence")),
    Entry("distinct_k", "semantic", 2, ("equivalence",)),
    Entry("reward", "quality", 1, ("reward",)),
    Entry("perplexity", "quality", 1, ("reference",)),
    Entry("utility_k", "utility", 1, ("equivalence", "reward")),
)
METRICS = tuple(entry.name for entry in CATALOGUE)
LEXICAL = tuple(entry.name for entry in CATALOGUE if entry.kind == "lexical")
SEMANTIC = tuple(entry.name for entry in CATALOGUE if entry.kind == "semantic")
DIVERSITY = LEXICAL + SEMANTIC
QUALITY = tuple(entry.name for entry in CATALOGUE if entry.kind == "quality")
UTILITY = "utility_k"


def entry(name: str) -> Entry:
    """The catalogue's line of a metric.

    Raises:
        BacoError: no such metric, with the nearest names.
    """
    for line in CATALOGUE:
        if line.name == name:
            return line
    near = difflib.get_close_matches(name, METRICS, n=3, cutoff=0.5) or METRICS
    raise BacoError(f"unknown metric {name!r}: use {', '.join(near)}")


def metric(name: str, **models: Any) -> Metric:
    """The metric of a name, ready to score: its models are loaded, once in a process.

    Args:
        name: one of ``METRICS``.
        models: by role, a hub id or folder instead of the default:
            ``embedding``, ``nli``, ``equivalence`` (distinct_k, semantic_entropy, utility_k),
            ``reward`` (reward, utility_k) and ``reference`` (perplexity). ``equivalence`` and
            ``reward`` may be ``demo``, the demo world's judge, or objects of your own with the
            methods of :class:`Equivalence` and :class:`Reward`. Roles that this metric does not
            use are left alone.

    Raises:
        BacoError: no such metric or role.
        MetricUnavailable: a library or model is missing.
    """
    line = entry(name)
    if strange := sorted(models.keys() - ROLES):
        raise BacoError(f"unknown model role {strange[0]!r}: use {', '.join(sorted(ROLES))}")
    try:
        made_by, compute = _BUILDERS[name](models)
    except MetricUnavailable as error:
        raise MetricUnavailable(f"{name} is unavailable: {error}") from error
    return Figure(name, line.kind, line.needs, made_by, compute)


Built = tuple[Mapping[str, str], Compute]
ROLES = frozenset(role for line in CATALOGUE for role in line.models)


def _of_texts(figure: Callable[[Sequence[str]], float], *libraries: str) -> Built:
    """A figure of a prompt's samples alone, for many prompts."""
    made_by = require(*libraries) if libraries else {"baco": version("baco")}
    return made_by, lambda _, answers: [figure(row) for row in answers]


def _embedded(figure: Callable[[Embedder, Answers], Figures], models: Mapping[str, Any]) -> Built:
    model = embedder(models.get("embedding"))
    return model.made_by, lambda _, answers: figure(model, answers)


def _nli_diversity(models: Mapping[str, Any]) -> Built:
    model = nli(models.get("nli"))
    return model.made_by, lambda _, answers: semantic.nli_diversity(model, answers)


def _semantic_entropy(models: Mapping[str, Any]) -> Built:
    given = models.get("equivalence")
    judge = _equivalence(given) if given is not None else Entailment(nli(models.get("nli")))
    return judge.made_by, partial(semantic.semantic_entropy, judge)


def _distinct_k(models: Mapping[str, Any]) -> Built:
    judge = _equivalence(models.get("equivalence"))
    return judge.made_by, partial(semantic.distinct_k, judge)


def _reward(models: Mapping[str, Any]) -> Built:
    judge = _rewarding(models.get("reward"))
    return judge.made_by, partial(quality.reward, judge)


def _perplexity(models: Mapping[str, Any]) -> Built:
    model = reference_model(models.get("reference"))
    return model.made_by, partial(quality.perplexity, model)


def _utility_k(models: Mapping[str, Any]) -> Built:
    judge, rewards = _equivalence(models.get("equivalence")), _rewarding(models.get("reward"))
    rewards.ratings([])  # says now, not after a night of scoring, that nobody knows its scale
    made_by = {f"equivalence {key}": value for key, value in judge.made_by.items()}
    made_by |= {f"reward {key}": value for key, value in rewards.made_by.items()}
    return made_by, partial(quality.utility_k, judge, rewards)


def _equivalence(given: str | Equivalence | None) -> Equivalence:
    if given == DEMO:
        return DemoJudge()
    return similarity_classifier(given) if given is None or isinstance(given, str) else given


def _rewarding(given: str | Reward | None) -> Reward:
    if given == DEMO:
        return DemoJudge()
    return reward_model(given) if given is None or isinstance(given, str) else given


_BUILDERS: dict[str, Callable[[Mapping[str, Any]], Built]] = {
    "distinct_1": lambda _: _of_texts(partial(distinct, order=1)),
    "distinct_2": lambda _: _of_texts(partial(distinct, order=2)),
    "distinct_3": lambda _: _of_texts(partial(distinct, order=3)),
    "ead": lambda _: _of_texts(lexical.expectation_adjusted_distinct),
    "self_bleu": lambda _: _of_texts(lexical.self_bleu, "sacrebleu"),
    "self_rouge_l": lambda _: _of_texts(lexical.self_rouge_l, "rapidfuzz"),
    "embedding_distance": partial(_embedded, semantic.embedding_distance),
    "vendi": partial(_embedded, semantic.vendi),
    "nli_diversity": _nli_diversity,
    "semantic_entropy": _semantic_entropy,
    "distinct_k": _distinct_k,
    "reward": _reward,
    "perplexity": _perplexity,
    "utility_k": _utility_k,
}
