"""Whether a router of a pair gets beyond the aligned model's own sampling: a small sweep.

A user who has only the aligned model can raise its temperature, and truncate by min-p. A router is
worth its second model only where it gets beyond the front of these settings. The sweep, its metrics
and its scores are those of every run; this module chooses the settings and reads the answer.

Likelihood under the aligned model, or a model like it, is not a fair judge of quality. Among all
next-token distributions of one entropy, p^(1/T) has the highest expected log p (Gibbs). So raising
the temperature loses the least likelihood by construction.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from baco.batch.job import digest
from baco.calibration.measure import open_prompts
from baco.errors import BacoError
from baco.evaluation.indicators import (
    Comparison,
    Difference,
    Estimate,
    all_but_one,
    combined,
    prompt_weights,
)
from baco.evaluation.inference import FEW_PROMPTS, interval
from baco.evaluation.methods import Grid, select_settings
from baco.evaluation.metrics import MetricUnavailable, names
from baco.evaluation.metrics.loading import load
from baco.evaluation.metrics.reference import MODEL as REFERENCE
from baco.evaluation.pareto import Floats, beyond, normalised
from baco.evaluation.plan import Job, PairSpec, Plan
from baco.evaluation.records import Prompt, Setting
from baco.evaluation.report.load_scores import TaskScores
from baco.evaluation.report.ranking import balanced
from baco.evaluation.report.results import outcome
from baco.evaluation.sweep import Drawer
from baco.evaluation.tasks import Task, check_limit, load_task
from baco.models.known_pairs import DEMO
from baco.sampling.sampler_chain import parse_chain

# Content and logit rules, and a coin as control. Each is run at the pair's own sampling and at this
# min-p, which removes many careless words of a base model.
ROUTERS = ("P-Punc", "H-Punc", "Rand")
MIN_P = 0.1
PROMPTS = 24
LEAST_PROMPTS = 4  # two for each half
RESAMPLES = 1000
# Length of the answers that the estimate of time is made from.
PROBE_TOKENS = 8
# Options of 'baco generate' by sampling parameter.
_FLAGS = {"temperature": "--temperature", "min_p": "--min-p"}


def task(prompts: str | None, pair: str, limit: int | None) -> Task:
    """The prompts: as `load_task` takes them, or built-in ones that suit the pair.

    Raises:
        BacoError: as `load_task`, or there are too few.
    """
    check_limit(limit)
    if prompts is not None:
        chosen = load_task(prompts, limit)
    elif pair == DEMO:
        chosen = load_task("demo", limit or PROMPTS)
    else:
        texts = open_prompts()[: limit or PROMPTS]
        rows = tuple(
            Prompt(str(number), ({"role": "user", "content": text},))
            for number, text in enumerate(texts, 1)
        )
        chosen = Task("open-prompts", "built in", rows)
    if len(chosen.prompts) < LEAST_PROMPTS:
        raise BacoError(
            f"too few prompts ({len(chosen.prompts)}): give {LEAST_PROMPTS} or more, since a "
            "router is chosen on one half of them and tested on the other half"
        )
    return chosen


def settings(
    routers: Sequence[str], n: int, min_p: float = 0.0, samplers: Sequence[str] = ()
) -> list[Setting]:
    """The aligned model over temperature and min-p, and every router at two samplings or more.

    Args:
        routers: spellings, as `select_settings` takes them; none for `ROUTERS`.
        n: samples per prompt.
        min_p: of the pair's own sampling; where it is `MIN_P`, the two samplings are one.
        samplers: every router is run under each of them too.

    Raises:
        BacoError: no such router or sampler, or a router that is a single model.
    """
    own = [
        setting
        for setting in select_settings(["aligned"], (), Grid("full", n))
        if setting.method in ("aligned, temperature", "aligned, min-p")
    ]
    routed = select_settings((), list(routers) or ROUTERS, Grid("quick", n))
    if single := [s.label for s in routed if s.label.lower() in ("base", "aligned")]:
        raise BacoError(f"{single[0]} is one model alone: name a router that picks between both")
    samplings: list[tuple[str, str, dict[str, Any]]] = []
    if min_p != MIN_P:
        samplings.append(("min-p", f"min-p={MIN_P:g}", {"min_p": MIN_P}))
    for step in parse_chain(samplers):
        samplings.append((step.spelling, step.spelling, {"samplers": [step.spelling]}))
    truncated = [
        replace(
            setting,
            method=f"{setting.method}, {name}",
            label=f"{setting.label} {label}",
            options={**setting.options, "sampling": sampling},
        )
        for name, label, sampling in samplings
        for setting in routed
    ]
    return [*own, *routed, *truncated]


@dataclass(frozen=True, slots=True)
class Metrics:
    """The metrics of the sweep, and caveats about what judges quality."""

    diversity: tuple[str, ...]
    quality: tuple[str, ...]
    caveats: tuple[str, ...] = ()


def metrics(chosen: Task, models: Mapping[str, str], pair: PairSpec) -> Metrics:
    """The metrics that the models of a user allow; nothing is loaded but configurations.

    Args:
        chosen: the prompts.
        models: by role, see :func:`baco.evaluation.metrics.metric`.
        pair: whose models are no fair judges.

    Raises:
        BacoError: nothing can judge quality here.
    """
    if chosen.judge == DEMO:
        return Metrics(("distinct_2", "distinct_k", "embedding_distance"), ("reward",))
    diversity = ["distinct_2", "embedding_distance"]
    diversity += ["distinct_k"] if "equivalence" in models else []
    quality = ["reward"] if "reward" in models else []
    quality += ["perplexity"] if "reference" in models or not quality else []
    for metric in quality:
        role = "reward" if metric == "reward" else "reference"
        try:
            load(role, models.get(role, REFERENCE), _configuration)
        except MetricUnavailable as error:
            raise BacoError(
                f"nothing can judge quality: {error}; --judge {role}=ID_OR_FOLDER names one"
            ) from error
    caveats = []
    if "perplexity" in quality:
        reference = models.get("reference", REFERENCE)
        caveats.append(f"quality is likelihood under {reference}, which rewards ordinary words")
        known = pair.known()
        if reference in (known.base, known.aligned):
            caveats.append(
                "that is a model of the pair: a temperature gives up the least of its own "
                "likelihood, so a router can hardly win; name a third model, --judge reference=ID"
            )
    return Metrics(tuple(diversity), tuple(quality), tuple(caveats))


def _configuration(name: str, *, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def seconds(drawer: Drawer, jobs: Sequence[Job], max_tokens: int) -> float:
    """How long jobs take at most, from short answers to the same prompts; loads the pair.

    An upper bound, since reading the prompts is counted for every few tokens and answers may end
    early.
    """
    by_kind: dict[str, float] = {}
    for job in jobs:
        kind = str(job.setting.options["kind"])
        if kind in by_kind:
            continue
        short = {**job.draw.sampling, "max_tokens": PROBE_TOKENS}
        probe = replace(job, draw=replace(job.draw, sampling=short))
        drawer(replace(probe, prompts=job.prompts[:1]))  # what a pair does only once
        by_kind[kind] = drawer(probe).seconds / len(probe.prompts)
    longer = max(max_tokens / PROBE_TOKENS, 1.0)
    return longer * sum(
        by_kind[str(job.setting.options["kind"])] * len(job.prompts) for job in jobs
    )


def run_name(plan: Plan, chosen: Metrics, models: Mapping[str, str]) -> str:
    """The name of the folder in which an equal command continues."""
    config = {name: value for name, value in plan.config().items() if name != "made"}
    return digest([config, asdict(chosen), dict(models)])[:16]


@dataclass(frozen=True, slots=True)
class Point:
    """One setting.

    Attributes:
        method, setting: as in the run.
        figures: means over prompts by metric.
        base_share: of its tokens.
        lead: of a router's setting over the aligned model's front, see `beyond`; the mean over
            sub-spaces, each normalised over all settings.
    """

    method: str
    setting: str
    figures: dict[str, float]
    base_share: float | None
    lead: Estimate | None = None


@dataclass(frozen=True, slots=True)
class Frontier:
    """The answer for one pair.

    Attributes:
        verdict: ``router`` where one is shown to get beyond, else ``aligned``.
        outcome: ``better``, ``worse`` or ``open``: what the best router's lead shows on prompts
            that were not used to choose it.
        lead: the best router's lead on those prompts, with interval and p-value.
        chosen: the best router's setting on each half of the prompts.
        router: the best router's setting on all prompts.
        aligned: the aligned setting with the best balance of quality and diversity.
        by_space: lead of `router` in every sub-space, "diversity × quality".
        advice: what to do, in a sentence.
        command: the command that follows the advice.
        points: every setting.
        caveats: sentences.
    """

    pair: str
    prompts: int
    samples: int
    verdict: str
    outcome: str
    lead: Comparison
    chosen: list[str]
    router: str
    aligned: str
    by_space: dict[str, Estimate]
    advice: str
    command: str
    points: list[Point]
    caveats: list[str] = field(default_factory=list)


def read(scores: TaskScores, settings: Sequence[Setting], samples: int) -> Frontier:
    """Read the answer off the scores of a sweep over `settings`.

    Raises:
        BacoError: no metric of diversity or none of quality has scores.
    """
    measured = scores.measured
    spaces = [
        (diversity, quality)
        for diversity in names("lexical", "semantic")
        for quality in names("quality")
        if measured.figures(diversity) is not None and measured.figures(quality) is not None
    ]
    if not spaces:
        raise BacoError(
            "no pair of a diversity and a quality metric has scores: 'baco score' says why"
        )
    prompts = len(measured.prompts)
    own = np.array([method.startswith("aligned, ") for method in measured.methods])
    labels = [label for label, is_own in zip(measured.settings, own, strict=True) if not is_own]

    def planes(places: Sequence[int]) -> list[tuple[Floats, Floats]]:
        figures = (
            [measured.figures(name) for name in (quality, diversity)]
            for diversity, quality in spaces
        )
        return [(q[:, places], d[:, places]) for q, d in figures]  # type: ignore[index]

    everywhere = _Leads.of(planes(range(prompts)), own)
    tests: list[Difference] = []
    chosen: list[str] = []
    halves = [list(range(start, prompts, 2)) for start in (0, 1)]
    for chosen_on, tested_on in (halves, halves[::-1]):
        best = int(np.argmax(_Leads.of(planes(chosen_on), own, resamples=0).mean[0]))
        tested = _Leads.of(planes(tested_on), own, seed=len(tests), row=best)
        chosen.append(labels[best])
        tests.append(Difference(tested.mean[:, 0], tested.without, len(tested_on)))
    lead = combined(tests)
    best = int(np.argmax(everywhere.mean[0]))
    estimates = [_estimate(draws, prompts) for draws in everywhere.mean.T]
    # All sampling of the aligned model as one method, so that its best setting is of any kind.
    pooled = replace(
        measured,
        methods=["aligned" if o else m for m, o in zip(measured.methods, own, strict=True)],
    )
    aligned = balanced(replace(scores, measured=pooled), spaces)["aligned"][1]
    won = outcome(lead) == "better"
    by_label = {setting.label: setting for setting in settings}
    leads = iter(estimates)
    return Frontier(
        pair=scores.pair,
        prompts=prompts,
        samples=samples,
        verdict="router" if won else "aligned",
        outcome=outcome(lead),
        lead=lead,
        chosen=chosen,
        router=labels[best],
        aligned=aligned,
        by_space={
            f"{diversity} × {quality}": _estimate(draws[:, best], prompts)
            for (diversity, quality), draws in zip(spaces, everywhere.by_space, strict=True)
        },
        advice=_advice(outcome(lead), by_label[labels[best]], by_label[aligned]),
        command=_command(scores.pair, by_label[labels[best] if won else aligned]),
        points=[
            Point(
                method,
                label,
                {
                    name: float(figures[row].mean())
                    for name in sorted({name for space in spaces for name in space})
                    if (figures := measured.figures(name)) is not None
                },
                scores.costs[method, label].base_share,
                None if own[row] else next(leads),
            )
            for row, (method, label) in enumerate(scores.keys)
        ],
        caveats=[]
        if prompts >= FEW_PROMPTS
        else [
            f"only {prompts} prompts: give {FEW_PROMPTS} or more for intervals that say something"
        ],
    )


@dataclass(frozen=True, slots=True)
class _Leads:
    """Leads of the routers' settings over the aligned model's front.

    Attributes:
        by_space: of every sub-space, [1 + R, routers' settings]: itself, then its resamples.
        without: of one setting without each prompt, [prompts]; the mean over sub-spaces.
    """

    by_space: list[Floats]
    without: Floats

    @property
    def mean(self) -> Floats:
        mean: Floats = np.mean(self.by_space, axis=0)
        return mean

    @classmethod
    def of(
        cls,
        planes: Sequence[tuple[Floats, Floats]],
        own: np.ndarray,
        resamples: int = RESAMPLES,
        seed: int = 0,
        row: int | None = None,
    ) -> "_Leads":
        """Leads in planes of (quality, diversity), [settings, prompts] each.

        Args:
            own: which settings are the aligned model's.
            row: the only router's setting that is wanted; all others still normalise.
        """
        prompts = planes[0][0].shape[1]
        weights = prompt_weights(prompts, resamples, seed)
        size = len(weights)
        if row is not None and prompts < FEW_PROMPTS:
            weights = np.concatenate([weights, all_but_one(prompts)])
        routed = slice(None) if row is None else slice(row, row + 1)
        leads = []
        for plane in planes:
            # [draws, settings, 2]; each draw is normalised anew.
            points = np.stack([normalised(weights @ figures.T) for figures in plane], axis=-1)
            leads.append(np.stack([beyond(draw[~own][routed], draw[own]) for draw in points]))
        without = np.mean([lead[size:, 0] for lead in leads], axis=0)
        return cls([lead[:size] for lead in leads], without)


def _estimate(draws: Floats, prompts: int) -> Estimate:
    return Estimate(float(draws[0]), *interval(draws[1:], prompts))


def _advice(outcome: str, router: Setting, aligned: Setting) -> str:
    if outcome == "better":
        return (
            f"Use {_spoken(router)}: it gets beyond the aligned model's own temperature and min-p."
        )
    use = f"Use {_spoken(aligned)}: "
    if outcome == "worse":
        return use + "even the best router stays behind its own temperature and min-p."
    return use + (
        "no router is shown to get beyond its own temperature and min-p, and it runs one model in "
        "place of two."
    )


def _spoken(setting: Setting) -> str:
    """A setting in words."""
    sampling = setting.options.get("sampling", {})
    min_p = f"min-p {sampling['min_p']:g}" if sampling.get("min_p") else ""
    router = _router(setting)
    if router is not None:
        more = " and ".join([min_p] if min_p else sampling.get("samplers", ()))
        return f"{router}{f' with {more}' if more else ''}"
    temperature = f"the aligned model at temperature {sampling['temperature']:g}"
    return f"{temperature} and {min_p}" if min_p else temperature


def _router(setting: Setting) -> str | None:
    """The router or combiner of a setting; None for the aligned model alone."""
    return setting.options.get("router") or setting.options.get("combiner")


def _command(pair: str, setting: Setting) -> str:
    """The command that draws answers at a setting; the pair's options are the user's own."""
    sampling = setting.options.get("sampling", {})
    flags = [f"{flag} {sampling[name]:g}" for name, flag in _FLAGS.items() if name in sampling]
    given = " ".join([*flags, *(f"--sampler {name}" for name in sampling.get("samplers", ()))])
    where = {option: shlex.quote(value) for option, value in PairSpec(pair).where.items()}
    named = "--pair {name}" if "name" in where else "--base {base} --aligned {aligned}"
    if "base" in where and where["base"] == where["aligned"]:
        named = "--model {base}"
    router = shlex.quote(_router(setting) or "Aligned")
    return f"baco generate PROMPT {named.format(**where)} --router {router} {given}".rstrip()
