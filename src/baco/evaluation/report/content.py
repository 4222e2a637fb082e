"""What a report says in words beside its tables."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from baco.evaluation.metrics import names
from baco.evaluation.report.ranking import Standing
from baco.evaluation.report.sections import Sections
from baco.evaluation.report.summary import Verdict, ranking
from baco.evaluation.store import Run

DEFINITIONS = (
    "A point is a setting's mean over prompts of one diversity and one quality metric; all metrics "
    "are oriented so that higher is better.",
    "Sub-space: one diversity with one quality metric. In each, both are min-max normalised over "
    "all points of all methods in the run, task by task.",
    "Coverage: the area that a method's own points dominate, with (0, 0) as reference.",
    "Dominance: a method's share of the points on the joint Pareto front of all methods.",
    "Lexical and semantic are means over their sub-spaces, overall is the mean of these two; over "
    "several tasks, the mean of the tasks.",
    "Intervals: 2000 bootstrap resamples of prompts, the same for all methods, the normalisation "
    "done anew in each. p: two-sided, from the same resamples.",
)


def content(
    run: Run, standings: Sequence[Standing], tables: Sections, verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    """What page and Markdown say besides tables."""
    findings = standings[0].findings
    n, prompts = run.config["n"], sum(len(found.prompts) for found in findings)
    pairs = _listed([one.pair for one in standings])
    names = _listed([found.task for found in findings])
    beside = _listed([found.task for found in standings[0].verified])
    settings = max(len(found.keys) for found in findings)
    lead = (
        f"{len(standings[0].families)} methods at {settings} settings on {names}: {prompts} "
        f"prompts × {n} samples each."
    )
    if beside:
        lead += f" Accuracy on {beside}, which is kept out of Coverage."
    return {
        "title": f"BACo evaluation: {pairs}",
        "lead": lead,
        "verdicts": verdicts,
        "ranking": [line for one in standings for line in ranking(one)],
        "headline": tables.headline,
        "routers": tables.routers,
        "methods": tables.methods,
        "parts": tables.parts,
        "accuracy": tables.accuracy,
        "points": tables.points,
        "prompts_said": f"the {prompts} prompts" if len(findings) == 1 else "a task's prompts",
        "samples_said": "Methods that mix the models' distributions have no source to show.",
        "command": _command(run),
        "facts": _facts(run, standings),
        "definitions": DEFINITIONS,
        "left_out": _left_out(run, standings),
        "configuration": json.dumps(run.config, indent=2, ensure_ascii=False),
    }


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def _command(run: Run) -> str:
    """What was typed; a run that was begun from Python has only its configuration to tell."""
    typed = run.config["made"].get("command") or "# begun from Python; its configuration is below"
    return f"{typed}\n{shlex.join(['baco', 'report', str(run.path)])}"


def _facts(run: Run, standings: Sequence[Standing]) -> list[tuple[str, str]]:
    """The settings that samples and scores hang on, and who made them."""
    config, made = run.config, run.config["made"]
    sampling = ", ".join(f"{name} {value}" for name, value in config["sampling"].items())
    versions = ", ".join(
        f"{name} {made[name]}"
        for name in ("baco", "python", "torch", "transformers", "numpy")
        if name in made
    )
    facts = [
        ("pairs", ", ".join(one.pair for one in standings)),
        ("tasks", ", ".join(f"{t['name']} ({t['prompts']} prompts)" for t in config["tasks"])),
        ("samples per prompt", str(config["n"])),
        ("decoding seed", str(config["seed"])),
        ("sampling, unless a setting says otherwise", sampling or "the pair's own"),
        ("metrics", ", ".join(_metrics(run))),
        ("versions", versions),
        ("git revision", str(made.get("git") or "not from a checkout")),
        ("machine", str(made.get("machine", ""))),
    ]
    return [(name, value) for name, value in facts if value]


def _metrics(run: Run) -> list[str]:
    known = run.metrics()
    return [name for name in names() if name in known] + [n for n in known if n not in names()]


def _left_out(run: Run, standings: Sequence[Standing]) -> list[tuple[str, str]]:
    """Metrics and settings that are in no figure, and why."""
    found = list(run.unavailable().items())
    for one in standings:
        for task in one.every:
            where = f"{one.pair}, {task.task}"
            found += [
                (name, f"not scored on {where}, so its sub-spaces are left out there")
                for name in names()
                if name in run.metrics() and name not in task.measured.metrics
            ]
            if task.missing:
                listed = ", ".join(task.missing)
                found.append((where, f"not complete yet, left out whole: {listed}"))
    return found


def markdown(told: Mapping[str, Any], tables: Sections, drawn: Sequence[str]) -> str:
    """The report as Markdown: the words of `content`, every table, links to the plots."""
    return "\n".join(_lines(told, tables, drawn)) + "\n"


def _lines(told: Mapping[str, Any], tables: Sections, drawn: Sequence[str]) -> Iterator[str]:
    yield f"# {told['title']}\n\n{told['lead']}\n"
    yield "## Does BACo beat its own halves?\n"
    for one in told["verdicts"]:
        yield f"**{one.pair}.** {one.first}\n"
        yield from (f"- {line}" for line in one.lines)
        yield "\n" + "\n\n".join(one.notes) + "\n"
    yield from (table.markdown() for table in tables.headline)
    yield "## Plots\n"
    yield from (f"![{stem}](plots/{stem}.svg)\n" for stem in drawn)
    yield "## Which router?\n"
    yield from (f"{line}\n" for line in told["ranking"])
    yield from (table.markdown() for table in tables.routers)
    rest = {
        "Every method": [table for _, found in tables.methods for table in found],
        "Tasks and categories": tables.parts,
        "Accuracy, where answers can be verified": tables.accuracy,
        "Operating points": tables.points,
    }
    for title, found in rest.items():
        if found:
            yield f"## {title}\n"
            yield from (table.markdown() for table in found)
    yield f"## How it was made\n\n```sh\n{told['command']}\n```\n"
    yield from (f"- {name}: {value}" for name, value in told["facts"])
    yield "\n### Definitions\n"
    yield from (f"- {line}" for line in told["definitions"])
    if told["left_out"]:
        yield "\n### Left out, and why\n"
        yield from (f"- {name}: {why}" for name, why in told["left_out"])
