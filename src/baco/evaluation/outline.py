"""The outline of a sweep: all that it would run, without loading a model or fetching data."""

from collections.abc import Mapping, Sequence
from typing import Any

from baco.evaluation.metrics import entry
from baco.evaluation.plan import PairSpec, Plan
from baco.evaluation.score import ACCURACY
from baco.evaluation.tasks import check_limit, load_task, task_files
from baco.evaluation.tasks.catalogue import HUB


def outline(
    plan: Plan,
    tasks: Sequence[str],
    limit: int | None,
    metrics: Sequence[str],
    models: Mapping[str, str],
) -> dict[str, Any]:
    """Pairs, tasks, settings and metrics of a plan, and how many answers and tokens at most.

    Args:
        plan: without its tasks.
        tasks: spellings, as `load_task` takes them; only local rows are read.
        limit: prompts of every task.
        metrics: names; none where nothing is scored.
        models: of the metrics, by role.

    Returns:
        Plain JSON. Numbers are None where a task's prompts are not known without fetching it.

    Raises:
        BacoError: no such task or file, or a pair of this name; or a limit below 1.
    """
    check_limit(limit)
    described = [_task(spelling, limit, plan) for spelling in tasks]
    methods: dict[str, list[str]] = {}
    for setting in plan.settings:
        methods.setdefault(setting.method, []).append(setting.label)
    each = len(plan.pairs) * len(plan.settings) * plan.n
    prompts = [task["prompts"] for task in described]
    known = all(count is not None for count in prompts)
    jobs = sum(-(-count // plan.prompts_a_job) for count in prompts) if known else 0
    longest = [task["max_tokens"] for task in described]
    tokens = (
        sum(count * length for count, length in zip(prompts, longest, strict=True))
        if known and None not in longest
        else None
    )
    return {
        "pairs": [_pair(pair) for pair in plan.pairs],
        "tasks": described,
        "methods": methods,
        "metrics": [_metric(name, models) for name in metrics],
        "n": plan.n,
        "seed": plan.seed,
        "sampling": dict(plan.sampling),
        "settings": len(plan.settings),
        "answers": each * sum(prompts) if known else None,
        "most_tokens": None if tokens is None else each * tokens,
        "jobs": len(plan.pairs) * len(plan.settings) * jobs if known else None,
    }


def _pair(pair: PairSpec) -> dict[str, str]:
    known = pair.known()
    return {"name": pair.name, "base": known.base, "aligned": known.aligned}


def _task(spelling: str, limit: int | None, plan: Plan) -> dict[str, Any]:
    name, given, place = spelling.partition("=")
    known = task_files().get(name)
    longest = plan.sampling.get("max_tokens")
    if known is None or "world" in known.source or (given and not place.startswith(HUB)):
        task = load_task(spelling, limit)
        count: int | None = len(task.prompts)
        name, source, own = task.name, task.source, task.max_tokens
    else:
        count = known.limit if limit is None else limit
        own = known.max_tokens
        source = place or HUB + str(known.source.get("hub"))
        if not given and "hub" not in known.source:
            source = f"not on the hub: fetch {known.source['published']} and give {name}=PATH"
    return {"name": name, "prompts": count, "max_tokens": longest or own, "source": source}


def _metric(name: str, models: Mapping[str, str]) -> dict[str, Any]:
    roles = () if name == ACCURACY else entry(name).models
    return {"name": name, "models": {role: models.get(role, "default") for role in roles}}
