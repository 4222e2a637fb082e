"""Scoring: a figure for every group of samples of a run, metric by metric.

Scores are appended in the order of the groups, and existing ones are not computed again. So a
metric can be added to a finished run, and a run that has grown is scored where it is new.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby
from typing import Any

from baco.batch.job import append, cut_back, line, matches, processes
from baco.errors import BacoError
from baco.evaluation.metrics import Entry, Metric, MetricUnavailable, entry, metric
from baco.evaluation.metrics import names as metric_names
from baco.evaluation.records import Group
from baco.evaluation.store import Run, batches, count_rows
from baco.evaluation.tasks import accuracy
from baco.files import locked, write_atomic

ACCURACY = "accuracy"
# Groups that are scored in one call.
GROUPS_A_BATCH = 40
# Receives progress: the name of a metric, and how many more groups were scored.
Advance = Callable[[str, int], None]
# Roles whose default model is installed with the package, so that no hub is needed.
OFFLINE_ROLES = frozenset({"embedding"})


@dataclass(frozen=True, slots=True)
class MetricRequest:
    """A metric to score, with its models in each task.

    Attributes:
        name: of a metric, or ``accuracy``.
        models: keywords of :func:`baco.evaluation.metrics.metric`, by task.
        verifiers: the verifier of every task that has one.
    """

    name: str
    models: Mapping[str, Mapping[str, str]]
    verifiers: Mapping[str, str] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """The tasks that this metric is for."""
        return list(self.verifiers if self.name == ACCURACY else self.models)

    @property
    def cheap(self) -> bool:
        """Whether it needs no model, so that worker processes can share the work."""
        return all(set(self.roles(task).values()) <= {"demo"} for task in self.tasks)

    def roles(self, task: str) -> dict[str, str | None]:
        """The models it needs in a task, by role; None for the default one."""
        if self.name == ACCURACY:
            return {}
        given = self.models[task]
        roles = entry(self.name).models
        if self.name == "semantic_entropy":  # needs only one of the two
            roles = ("equivalence",) if "equivalence" in given else ("nli",)
        return {role: given.get(role) for role in roles}

    def build(self, task: str) -> Metric:
        """The metric of a task, ready to score; MetricUnavailable where it cannot run."""
        if self.name == ACCURACY:
            return accuracy(self.verifiers[task])
        return metric(self.name, **self.models[task])


def requested_metrics(
    run: Run, names: Sequence[str], models: Mapping[str, str]
) -> list[MetricRequest]:
    """The metrics of these names on the tasks of a run; by default all that apply.

    Raises:
        BacoError: an unknown metric or role, too few samples for one that compares them, or
            accuracy where no task has a verifier.
    """
    tasks = {task["name"]: task for task in run.config["tasks"]}
    judged = {
        name: ({"equivalence": "demo", "reward": "demo"} if task["judge"] == "demo" else {})
        | dict(models)
        for name, task in tasks.items()
    }
    verifiers = {name: task["verifier"] for name, task in tasks.items() if task["verifier"]}
    chosen = list(dict.fromkeys(names)) or [*metric_names(), *([ACCURACY] if verifiers else [])]
    check_metrics(chosen, run.config["n"])
    check_verifiable(chosen, verifiers)
    return [MetricRequest(name, judged, verifiers) for name in chosen]


def check_metrics(names: Sequence[str], n: int) -> None:
    """Check names of metrics.

    Raises:
        BacoError: no such metric, or one that needs more samples per prompt.
    """
    lines: list[Entry] = [entry(name) for name in names if name != ACCURACY]
    for known in lines:
        if n < known.needs:
            raise BacoError(
                f"{known.name} compares a prompt's samples and there is {n}: draw {known.needs} or "
                "more with -n, or name other metrics with --metric"
            )


def check_verifiable(names: Sequence[str], verifiers: Collection[str]) -> None:
    """Check that accuracy is requested only where a task has right answers.

    Raises:
        BacoError: it is requested without one.
    """
    if ACCURACY in names and not verifiers:
        raise BacoError("accuracy needs a task with right answers: add --task gsm8k, say")


def needs_hub(request: MetricRequest) -> str | None:
    """The reason to skip a metric that was not requested by name; None to try it.

    Tasks of the demo world have judges that need no hub, so metrics that need it are left to the
    user there.
    """
    missing: set[str] = set()
    for task in request.tasks:
        roles = request.roles(task)
        lacking = {r for r, model in roles.items() if model is None} - OFFLINE_ROLES
        if not lacking or request.models[task].get("reward") != "demo":
            return None
        missing |= lacking
    role = min(missing)
    return (
        f"{request.name} needs a model from the hub for {role!r}: run 'baco score RUN --metric "
        f"{request.name}', with --model {role}=ID_OR_FOLDER for one of your own"
    )


def score(
    run: Run,
    metrics: Sequence[MetricRequest],
    workers: int,
    advance: Advance = lambda *_: None,
    *,
    by_name: bool = True,
) -> dict[str, str]:
    """Score all groups of the run by every metric, except those that have scores.

    Returns:
        The metrics that could not run, on any task or on some, and why.

    Raises:
        BacoError: a metric has scores of other models.
    """
    refused: dict[str, str] = {}
    with locked(run.path), processes(workers).workers(_worker) as in_workers:
        (run.path / "scores").mkdir(exist_ok=True)
        for request in metrics:
            why = None if by_name else needs_hub(request)
            if why is not None and not count_rows(run.score_file(request.name)):
                refused[request.name] = why
                _note(run, request.name, {"unavailable": why})
                continue
            available = _prepare(run, request)
            if isinstance(available, str):
                refused[request.name] = available
                continue
            scores = in_workers if request.cheap else partial(map, _score)
            batches = _due(run, request, available, advance)
            for lines in scores(batches):
                append(run.score_file(request.name), lines)
                advance(request.name, len(lines))
            if request.name in (partly := run.unavailable()):
                refused[request.name] = f"{request.name} is {partly[request.name]}"
    return refused


def _prepare(run: Run, request: MetricRequest) -> frozenset[str] | str:
    """The tasks a metric can run on, or the reason why there is none; writes its description.

    Raises:
        BacoError: there are scores of other models.
    """
    made_by: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for task in request.tasks:
        try:
            built = _built(request, task)
        except MetricUnavailable as error:
            refused[task] = str(error)
        else:
            made_by[task] = dict(built.made_by)
            kind = built.kind
    before = run.about(request.name) if count_rows(run.score_file(request.name)) else {}
    if not made_by:
        why = next(iter(refused.values()))
        if not before:
            _note(run, request.name, {"unavailable": why})
        return why
    description = {"name": request.name, "kind": kind, "made_by": made_by}
    description |= {"unavailable_for": refused} if refused else {}
    scored_by = before.get("made_by", made_by)
    if not scored_by.items() <= made_by.items():
        raise BacoError(
            f"{request.name} has scores that other models or versions made: remove "
            f"{run.score_file(request.name)} and its .json to score it anew, or name the same "
            "models"
        )
    if scored_by != made_by:
        run.score_file(request.name).unlink(missing_ok=True)  # one more task can be scored now
    _note(run, request.name, description)
    return frozenset(made_by)


def _note(run: Run, name: str, description: Mapping[str, Any]) -> None:
    path = run.score_file(name).with_suffix(".json")
    write_atomic(path, json.dumps(description, indent=2, ensure_ascii=False) + "\n")


@dataclass(frozen=True, slots=True)
class Batch:
    """Groups of one task that are scored together."""

    request: MetricRequest
    task: str
    groups: tuple[Group, ...]


def _due(
    run: Run, request: MetricRequest, available: frozenset[str], advance: Advance
) -> Iterator[Batch]:
    """The groups without a score; scores that do not match their groups are cut off."""
    path = run.score_file(request.name)
    groups: Iterator[Group] = (group for group in run.groups() if group.task in available)
    done, rest = 0, groups
    if path.exists():
        with path.open("rb") as file:
            for group in groups:
                if not matches(file.readline(), _of(group)):
                    rest = chain([group], groups)
                    break
                done += 1
    cut_back(path, done)
    advance(request.name, done)
    for batch in batches(rest, GROUPS_A_BATCH):
        for task, same in groupby(batch, lambda group: group.task):
            yield Batch(request, task, tuple(same))


def _of(group: Group) -> dict[str, str]:
    """The fields that identify a group's row."""
    return {
        "pair": group.pair,
        "task": group.task,
        "method": group.method,
        "setting": group.setting,
        "prompt": group.prompt.id,
    }


def _score(batch: Batch) -> list[str]:
    """The lines of a batch's scores."""
    request = batch.request
    built = _built(request, batch.task)
    values = built.score(
        [group.prompt for group in batch.groups], [group.texts for group in batch.groups]
    )
    return [
        line({**_of(group), "value": None if value is None else round(float(value), 9)})
        for group, value in zip(batch.groups, values, strict=True)
    ]


_kept: dict[tuple[str, str], tuple[MetricRequest, Metric]] = {}


def _built(request: MetricRequest, task: str) -> Metric:
    """The metric of a task, built once per process."""
    if (request.name, task) not in _kept or _kept[request.name, task][0] != request:
        _kept[request.name, task] = (request, request.build(task))
    return _kept[request.name, task][1]


def _worker(_: object) -> Callable[[Batch], list[str]]:
    """A process needs nothing before its first batch."""
    return _score
