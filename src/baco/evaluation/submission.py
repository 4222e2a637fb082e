"""A setting of a run as a submission to NoveltyBench's leaderboard."""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from baco.errors import BacoError
from baco.evaluation.metrics import ROLES
from baco.evaluation.records import Group
from baco.evaluation.store import Run
from baco.integrations.noveltybench import GENERATIONS, Evaluated, write_submission

# Tasks that the leaderboard has, and its names for them.
SPLITS = {"noveltybench-curated": "nb-curated", "noveltybench-wildchat": "nb-wildchat"}


def export_submission(
    run: Run, setting: str, name: str, folder: Path, models: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Write the four files of every NoveltyBench task of a run, into FOLDER/nb-curated and so on.

    Args:
        run: with 10 or more answers to a prompt; the first 10 are exported.
        setting: the label of one of its settings, such as `P-Punc:0.4`.
        name: of the entry, the `model` in the files.
        folder: the entry's, by NoveltyBench's rule `DATE_NAME`.
        models: by role; `equivalence` and `reward` are NoveltyBench's own by default.

    Returns:
        The summary of every split.

    Raises:
        BacoError: no such task or setting, too few answers, or several pairs.
        MetricUnavailable: a judge cannot be loaded.
    """
    tasks = [task["name"] for task in run.config["tasks"] if task["name"] in SPLITS]
    if not tasks:
        raise BacoError(
            f"{run.path} has no task of NoveltyBench: sweep {' or '.join(SPLITS)} for a submission"
        )
    if run.config["n"] < GENERATIONS:
        raise BacoError(
            f"{run.path} has {run.config['n']} answers to a prompt, and NoveltyBench reads "
            f"{GENERATIONS}: sweep with -n {GENERATIONS}"
        )
    pairs = [pair["name"] for pair in run.config["pairs"]]
    if len(pairs) > 1:
        raise BacoError(f"{run.path} has {len(pairs)} pairs: a submission is of one")
    labels = list(dict.fromkeys(known.label for known in run.settings))
    if setting not in labels:
        near = difflib.get_close_matches(setting, labels, n=3, cutoff=0.3) or labels[:5]
        raise BacoError(f"{run.path} has no setting {setting!r}: use {', '.join(near)}")
    judge, rewards = (ROLES[role](models.get(role)) for role in ("equivalence", "reward"))
    rewards.ratings([])  # an unknown scale is refused before any rating
    summaries = {}
    for task in tasks:
        groups = [group for group in run.groups() if (group.task, group.setting) == (task, setting)]
        expected = next(t["prompts"] for t in run.config["tasks"] if t["name"] == task)
        if len(groups) != expected:
            raise BacoError(
                f"{task} has answers to {len(groups)} of {expected} prompts at {setting}: let "
                "'baco sweep' go on"
            )
        rows = list(_evaluated(groups, name, judge, rewards))
        summaries[task] = write_submission(folder / SPLITS[task], rows)
    return summaries


def _evaluated(groups: list[Group], name: str, judge: Any, rewards: Any) -> Iterator[Evaluated]:
    prompts = [group.prompt for group in groups]
    answers = [group.texts[:GENERATIONS] for group in groups]
    classes = judge.partition(prompts, answers)
    ratings = rewards.ratings(rewards.rewards(prompts, answers))
    for prompt, texts, partition, rated in zip(prompts, answers, classes, ratings, strict=True):
        yield Evaluated(prompt.id, prompt.text, name, texts, partition, rated)
