"""Small studies: runs with texts made here, plans of them, raters who answer."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from baco.evaluation.records import Setting
from baco.evaluation.store import Run
from baco.study.build import StudyOptions, build
from baco.study.plan import Plan
from baco.study.schedule import Screen, schedule
from baco.study.store import Answer, Rater
from baco.study.study import Study

METHODS = ("P-Punc:0.4", "Aligned T=1", "Base T=1")
KINDS = {
    "P-Punc:0.4": "P-Punc",
    "Aligned T=1": "aligned, temperature",
    "Base T=1": "base, temperature",
}


def write_run(
    folder: Path,
    *,
    prompts: int = 12,
    n: int = 8,
    methods: Sequence[str] = METHODS,
    text: Callable[[str, int, int], str] | None = None,
) -> Run:
    """A run directory with texts that name nothing of their method.

    Args:
        text: of (method, prompt's index, sample's index).
    """

    def sentence(method: str, prompt: int, sample: int) -> str:
        # Aligned answers repeat themselves.
        idea = sample % 2 if method.startswith("Aligned") else sample
        return f"Idea {idea} for request {prompt} is worth a visit in the month of May."

    folder.mkdir(parents=True)
    settings = [Setting(KINDS.get(method, method), method) for method in methods]
    config = {
        "format": 1,
        "pairs": [{"name": "demo", "options": {}}],
        "tasks": [{"name": "trips", "prompts": prompts}],
        "settings": [asdict(setting) for setting in settings],
        "n": n,
        "seed": 0,
    }  # fmt: skip
    rows: list[dict[str, Any]] = [
        {
            "task": "trips",
            "id": f"trip-{prompt}",
            "messages": [{"role": "user", "content": f"Recommend a trip, number {prompt}."}],
            "category": None,
            "reference": {},
            "paraphrases": [],
        }
        for prompt in range(prompts)
    ]
    samples: list[dict[str, Any]] = [
        {
            "pair": "demo",
            "task": "trips",
            "prompt": f"trip-{prompt}",
            "method": setting.method,
            "setting": setting.label,
            "value": None,
            "sample": sample,
            "text": (text or sentence)(setting.label, prompt, sample),
            "pieces": [],
            "tokens": 12,
            "base_share": None,
            "switches": None,
            "finish_reason": "stop",
            "seed": 0,
        }
        for setting in settings
        for prompt in range(prompts)
        for sample in range(n)
    ]
    (folder / "run.json").write_text(json.dumps(config), encoding="utf-8")
    for name, lines in (("prompts", rows), ("samples", samples)):
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(content, encoding="utf-8")
    return Run.open(folder)


def made_plan(run: Run, **options: Any) -> tuple[Plan, dict[str, str]]:
    """A plan of a run, by default of all its methods on 6 prompts for 4 raters."""
    defaults: dict[str, Any] = {
        "methods": [setting.label for setting in run.settings],
        "prompts": 6,
        "raters": 4,
    }
    return build(run, StudyOptions(**defaults | options))


def made_study(folder: Path, *, run: Mapping[str, Any] | None = None, **options: Any) -> Study:
    """A study in ``folder/study`` of a run in ``folder/run``."""
    return Study.create(
        folder / "study", *made_plan(write_run(folder / "run", **run or {}), **options)
    )


def right_responses(plan: Plan, screen: Screen) -> dict[str, Any]:
    """Responses that pass a check; on a comparison, everything is a tie."""
    responses: dict[str, Any] = {}
    for question in plan.asked(screen.item.unit):
        choice = screen.item.expected.get(question.id, "tie")
        side = (
            choice
            if choice == "tie"
            else ("left" if (choice == "first") != screen.swapped else "right")
        )
        ratings = {"left": (5, 1), "tie": (3, 3), "right": (1, 5)}
        responses[question.id] = side if question.form == "preference" else ratings[side]
    return responses


def answer(study: Study, rater: Rater, screen: Screen, **changes: Any) -> Answer:
    """The right answer of a rater to a screen, after a sufficient time."""
    values: dict[str, Any] = {
        "rater": rater.id,
        "item": screen.item.id,
        "position": screen.position,
        "left": screen.left,
        "right": screen.right,
        "responses": right_responses(study.plan, screen),
        "seconds": study.plan.words(screen.item) / study.plan.checks.words_per_second + 1,
        "version": study.version,
    }
    return Answer(**values | changes)


def fill(study: Study, raters: int) -> None:
    """Raters who answer everything right."""
    for _ in range(raters):
        rater = study.store.add_rater()
        assert rater is not None
        assert rater.number is not None
        study.store.save([answer(study, rater, s) for s in schedule(study.plan, rater.number)])
        study.store.update_rater(rater.id, "finished")
