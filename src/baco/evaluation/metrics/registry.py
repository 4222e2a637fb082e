"""The metrics by name. A metric is registered where it is defined: adding one is adding a file."""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

from baco.errors import BacoError
from baco.evaluation.metrics.demo import DEMO, DemoJudge
from baco.evaluation.metrics.embedding import embedder
from baco.evaluation.metrics.equivalence import similarity_classifier
from baco.evaluation.metrics.loading import require
from baco.evaluation.metrics.nli import nli
from baco.evaluation.metrics.protocols import (
    Answers,
    Kind,
    Metric,
    MetricUnavailable,
    Prompts,
)
from baco.evaluation.metrics.reference import reference_model
from baco.evaluation.metrics.reward import reward_model
from baco.plugins import plugins

Figures = Sequence[float | None]
Compute = Callable[[Prompts, Answers], Figures]
Function = TypeVar("Function", bound=Callable[..., Any])
Judge = TypeVar("Judge")
Built = tuple[Mapping[str, str], Compute]


@dataclass(frozen=True, slots=True)
class Figure:
    """A metric: a function of all answers to many prompts, with its name and kind."""

    name: str
    kind: Kind
    needs: int
    made_by: Mapping[str, str]
    compute: Compute = field(repr=False)

    def score(self, prompts: Prompts, answers: Answers) -> list[float | None]:
        """See :meth:`Metric.score`."""
        for prompt, row in zip(prompts, answers, strict=True):
            if len(row) < self.needs:
                raise BacoError(
                    f"prompt {prompt.id!r} has {len(row)} of the {self.needs} samples that "
                    f"{self.name} compares: draw more with -n, or leave the metric out"
                )
        figures = list(self.compute(prompts, answers))
        for prompt, value in zip(prompts, figures, strict=True):
            if value is not None and not math.isfinite(value):
                raise BacoError(
                    f"{self.name} of the answers to prompt {prompt.id!r} is {value}: a metric must "
                    "be a finite number, or None where there is nothing to measure"
                )
        return figures


def _judge(load: Callable[[str | None], Judge], given: str | Judge | None) -> DemoJudge | Judge:
    """The demo world's judge, a loaded one, or an object of the user's."""
    if given == DEMO:
        return DemoJudge()
    return load(given) if given is None or isinstance(given, str) else given


# Loads the model of each role from an id, a folder, or None for the default.
ROLES: Mapping[str, Callable[[Any], Any]] = {
    "embedding": embedder,
    "nli": nli,
    "equivalence": partial(_judge, similarity_classifier),
    "reward": partial(_judge, reward_model),
    "reference": reference_model,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A registered metric.

    Attributes:
        name, kind: see :class:`Metric`.
        needs: the least number of samples a prompt must have.
        models: the roles it needs a model for: keywords of :func:`metric`.
        help: one sentence.
        build: takes the user's models by role; returns what the metric is made of, and its
            function of prompts and answers.
    """

    name: str
    kind: Kind
    needs: int
    models: tuple[str, ...]
    help: str
    build: Callable[[Mapping[str, Any]], Built] = field(repr=False)


_ENTRIES: dict[str, Entry] = {}
_KINDS: tuple[Kind, ...] = ("lexical", "semantic", "quality", "utility")


def register_metric(
    name: str,
    *,
    kind: Kind,
    needs: int = 1,
    models: Sequence[str] = (),
    libraries: Sequence[str] = (),
    help: str = "",
    build: Callable[[Mapping[str, Any]], Built] | None = None,
) -> Callable[[Function], Function]:
    """Register a metric under a name; decorates the function that computes it.

    Without models the function takes the samples of one prompt and returns its figure. With models
    it takes them first, in the order of their roles, then ``prompts`` if it names them, then the
    answers [prompts][samples], and returns a figure for each prompt. Higher must be better.

    Args:
        name: as a user types it.
        kind: ``lexical`` or ``semantic`` (diversity), ``quality``, or ``utility``.
        needs: the least number of samples a prompt must have.
        models: roles, of ``ROLES``, that it needs a model for.
        libraries: packages it imports, for the record.
        help: one sentence; by default the first line of the function's docstring.
        build: for a metric that chooses its models itself, see :class:`Entry`.

    Raises:
        BacoError: a name that is taken, an unknown kind or role.
    """
    if name in _ENTRIES:
        raise BacoError(f"metric name {name!r} is taken: choose another")
    if kind not in _KINDS:
        raise BacoError(f"metric {name!r} is of kind {kind!r}: use one of {', '.join(_KINDS)}")
    if unknown := [role for role in models if role not in ROLES]:
        raise BacoError(f"metric {name!r} needs unknown role {unknown[0]!r}: use {_listed(ROLES)}")

    def register(function: Function) -> Function:
        def of_samples(_: Mapping[str, Any]) -> Built:
            made_by = require(*libraries) if libraries else {"baco": version("baco")}
            return made_by, lambda _, answers: [function(row) for row in answers]

        def of_models(given: Mapping[str, Any]) -> Built:
            loaded = {role: ROLES[role](given.get(role)) for role in models}
            made_by = {
                (key if len(loaded) == 1 else f"{role} {key}"): value
                for role, model in loaded.items()
                for key, value in model.made_by.items()
            }
            judges = tuple(loaded.values())
            if "prompts" in inspect.signature(function).parameters:
                return made_by, lambda prompts, answers: function(*judges, prompts, answers)
            return made_by, lambda _, answers: function(*judges, answers)

        sentence = help or (function.__doc__ or "").strip().partition("\n")[0]
        make = build or (of_models if models else of_samples)
        _ENTRIES[name] = Entry(name, kind, needs, tuple(models), sentence, make)
        return function

    return register


def with_reward(role: str, function: Callable[..., Figures], models: Mapping[str, Any]) -> Built:
    """The `build` of a metric that takes the judge of a role and a reward with a rating.

    Raises:
        MetricUnavailable: the rewards' scale is unknown.
    """
    judge, rewards = (ROLES[name](models.get(name)) for name in (role, "reward"))
    rewards.ratings([])  # an unknown scale is refused before any scoring
    made_by = {f"{role} {key}": value for key, value in judge.made_by.items()}
    made_by |= {f"reward {key}": value for key, value in rewards.made_by.items()}
    return made_by, partial(function, judge, rewards)


def entries() -> dict[str, Entry]:
    """Every metric by its name, by kind; those of installed packages and the user's own included.

    Raises:
        BacoError: an installed package's metric cannot be loaded.
    """
    for name, part in plugins("metrics").items():
        if name in _ENTRIES:
            continue
        if not callable(part):
            raise BacoError(f"entry point {name!r} in baco.metrics is {part!r}: give a function")
        register_metric(name, kind="lexical")(part)
    order = sorted(_ENTRIES.values(), key=lambda entry: _KINDS.index(entry.kind))
    return {entry.name: entry for entry in order}


def names(*kinds: Kind) -> tuple[str, ...]:
    """The metrics of some kinds, of all where none is given."""
    return tuple(name for name, entry in entries().items() if not kinds or entry.kind in kinds)


def entry(name: str) -> Entry:
    """The registered metric of a name.

    Raises:
        BacoError: no such metric, with the nearest names.
    """
    known = entries()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
    raise BacoError(f"unknown metric {name!r}: use {', '.join(near)}")


def metric(name: str, **models: Any) -> Metric:
    """The metric of a name, ready to score: its models are loaded, once in a process.

    Args:
        name: one of :func:`names`.
        models: by role, a hub id or folder instead of the default:
            ``embedding``, ``nli``, ``equivalence`` (distinct_k, semantic_entropy, utility_k),
            ``reward`` (reward, utility_k) and ``reference`` (perplexity). ``equivalence`` and
            ``reward`` may be ``demo``, the demo world's judge, or objects of your own with the
            methods of :class:`Equivalence` and :class:`Reward`. Roles that this metric does not
            use are ignored.

    Raises:
        BacoError: no such metric or role.
        MetricUnavailable: a library or model is missing.
    """
    known = entry(name)
    if unknown := sorted(models.keys() - ROLES.keys()):
        raise BacoError(f"unknown model role {unknown[0]!r}: use {_listed(ROLES)}")
    try:
        made_by, compute = known.build(models)
    except MetricUnavailable as error:
        raise MetricUnavailable(f"{name} is unavailable: {error}") from error
    return Figure(name, known.kind, known.needs, made_by, compute)


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(names))
