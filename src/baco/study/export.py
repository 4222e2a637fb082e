"""Writes a study for other tools, and its judgments as tables.

Other tools get the items without anything that names a method: an item has a key, a hash that
follows from the plan, and `study.importing` finds the item again by it. Formats: Potato 2.12 (a
YAML file and JSON lines per unit), Label Studio 1.23 (a labelling configuration and tasks per
unit), CSV and Parquet.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, get_args
from xml.sax.saxutils import escape, quoteattr

from baco.errors import BacoError
from baco.files import write_atomic
from baco.study.plan import Item, Plan, Question, Unit
from baco.study.schedule import UNITS, Screen, method_pairs
from baco.study.store import Judgment
from baco.study.study import Study

Format = Literal["potato", "label-studio", "csv", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
SIDES = ("A", "B")
# What raters of other tools choose where they see no difference.
TIE = {"potato": "tie", "label-studio": "No difference"}
NAMES: Mapping[Unit, str] = {"set": "sets", "answer": "answers"}


def write(study: Study, format: str, folder: Path) -> list[Path]:
    """Write a study in one of `FORMATS` into a folder, and return the files.

    Raises:
        BacoError: an unknown format, no judgments to write, a missing library, or a folder that
            cannot be written.
    """
    if format not in FORMATS:
        raise BacoError(f"format is {format!r}: use one of {', '.join(FORMATS)}")
    files = dict(_WRITERS[format](study))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomic(folder / name, content)
    except OSError as error:
        raise BacoError(f"cannot write {folder}: {error.strerror}") from error
    return [folder / name for name in files]


# Items for other tools.


def screens(plan: Plan) -> list[Screen]:
    """Every comparison and check once, with half of each pair of methods swapped."""
    items = [item for item in plan.items if item.kind != "training"]
    seen = dict.fromkeys([(unit, pair) for unit in UNITS for pair in method_pairs(plan)], 0)
    screens: list[Screen] = []
    for item in sorted(items, key=lambda item: key_of(plan, item, False)):
        pair = item.unit, (plan.stimulus[item.first].method, plan.stimulus[item.second].method)
        swapped = int(key_of(plan, item, True)[:8], 16) % 2 == 1
        if pair in seen:
            swapped, seen[pair] = seen[pair] % 2 == 1, seen[pair] + 1
        screens.append(Screen(len(screens), 0, item, swapped))
    return screens


def key_of(plan: Plan, item: Item, swapped: bool) -> str:
    """The name of an item in other tools; it reveals neither the methods nor the kind."""
    words = f"{plan.origin.samples}/{plan.seed}/{item.id}/{swapped}"
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def side_text(answers: Sequence[str]) -> str:
    """An answer, or a set as a numbered list."""
    if len(answers) == 1:
        return answers[0]
    return "\n\n".join(f"{number}. {text}" for number, text in enumerate(answers, 1))


def _shown(study: Study, unit: Unit) -> Iterator[tuple[str, str, list[str]]]:
    """Key, prompt and both sides of every item of a unit."""
    for screen in screens(study.plan):
        if screen.item.unit == unit:
            sides = (study.plan.stimulus[id] for id in (screen.left, screen.right))
            yield (
                key_of(study.plan, screen.item, screen.swapped),
                study.prompt_text(screen.item.prompt),
                [side_text(study.answers(side)) for side in sides],
            )


def _potato(study: Study) -> Iterator[tuple[str, str]]:
    for unit in UNITS:
        name, questions = NAMES[unit], study.plan.asked(unit)
        rows = [
            {"id": key, "text": f"Request: {prompt}", "responses": sides}
            for key, prompt, sides in _shown(study, unit)
        ]
        yield f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        config = {
            "annotation_task_name": study.plan.title,
            "task_dir": ".",
            "output_annotation_dir": f"annotation_output/{name}/",
            "export_annotation_format": "csv",
            "data_files": [f"{name}.jsonl"],
            "item_properties": {"id_key": "id", "text_key": "text"},
            "user_config": {"allow_all_users": True, "users": []},
            "annotation_schemes": [s for question in questions for s in _potato_schemes(question)],
            "site_dir": "default",
        }
        # JSON is YAML.
        yield f"{name}.yaml", json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _potato_schemes(question: Question) -> list[dict[str, Any]]:
    required = {"label_requirement": {"required": True}}
    if question.form == "preference":
        return [
            {
                "annotation_type": "pairwise",
                "name": question.id,
                "description": question.text,
                "mode": "binary",
                "items_key": "responses",
                "labels": list(SIDES),
                "allow_tie": True,
                "tie_label": question.anchors[1],
                **required,
            }
        ]
    scale = "; ".join(f"{point}: {text}" for point, text in enumerate(question.anchors, 1))
    return [
        {
            "annotation_type": "likert",
            "name": f"{question.id}_{side}",
            "description": f"{side}: {question.text} ({scale})",
            "size": len(question.anchors),
            "min_label": question.anchors[0],
            "max_label": question.anchors[-1],
            **required,
        }
        for side in SIDES
    ]


def _label_studio(study: Study) -> Iterator[tuple[str, str]]:
    for unit in UNITS:
        tasks = [
            {"data": {"item": key, "prompt": prompt, "a": sides[0], "b": sides[1]}}
            for key, prompt, sides in _shown(study, unit)
        ]
        name = NAMES[unit]
        yield f"{name}.json", json.dumps(tasks, indent=1, ensure_ascii=False) + "\n"
        controls = "\n".join(map(_label_studio_control, study.plan.asked(unit)))
        yield (
            f"{name}.xml",
            "<View>\n"
            '  <Text name="prompt" value="$prompt"/>\n'
            '  <View style="display: grid; grid-template-columns: 1fr 1fr; column-gap: 1em">\n'
            '    <View><Header value="A"/><Text name="a" value="$a"/></View>\n'
            '    <View><Header value="B"/><Text name="b" value="$b"/></View>\n'
            f"  </View>\n{controls}\n</View>\n",
        )


def _label_studio_control(question: Question) -> str:
    lines = [f"  <Header value={quoteattr(question.text)}/>"]
    if question.form == "preference":
        choices = (SIDES[0], TIE["label-studio"], SIDES[1])
        lines += [
            f'  <Choices name={quoteattr(question.id)} toName="prompt" choice="single-radio" '
            'showInline="true" required="true">',
            *(f"    <Choice value={quoteattr(choice)}/>" for choice in choices),
            "  </Choices>",
        ]
        return "\n".join(lines)
    for point, anchor in enumerate(question.anchors, 1):
        lines.append(f'  <Header size="6" value={quoteattr(f"{point}: {anchor}")}/>')
    for side in SIDES:
        lines.append(f'  <Header size="5" value="{escape(side)}"/>')
        lines.append(
            f'  <Rating name={quoteattr(f"{question.id}_{side}")} toName="{side.lower()}" '
            f'maxRating="{len(question.anchors)}" required="true"/>'
        )
    return "\n".join(lines)


# Judgments as tables.

JUDGMENT_COLUMNS = (*(field.name for field in fields(Judgment)), "passed", "plan")


def judgment_rows(study: Study) -> list[dict[str, Any]]:
    """All judgments, with the hash of the plan that they were given under."""
    hashes = {version.version: version.hash for version in study.store.versions()}
    return [
        asdict(judgment) | {"passed": judgment.passed, "plan": hashes[judgment.version]}
        for judgment in study.judgments()
    ]


def rater_table(study: Study) -> list[dict[str, Any]]:
    """All raters who have answers, without dates, links and codes."""
    seconds: dict[str, float] = {}
    for answer in study.store.answers():
        seconds[answer.rater] = seconds.get(answer.rater, 0.0) + answer.seconds
    return [
        {
            "rater": rater.id,
            "origin": rater.origin,
            "finished": rater.state == "finished",
            "mistakes": rater.mistakes,
            "seconds": round(seconds[rater.id], 1),
        }
        for rater in study.store.raters()
        if rater.id in seconds
    ]


def item_table(study: Study) -> list[dict[str, Any]]:
    """All items with their texts; the answers of a set as a JSON list."""
    plan = study.plan
    return [
        {
            "item": item.id,
            "kind": item.kind,
            "unit": item.unit,
            "check": item.check,
            "prompt": item.prompt,
            "prompt_text": study.prompt_text(item.prompt),
            "first_method": plan.stimulus[item.first].method,
            "second_method": plan.stimulus[item.second].method,
            "first": json.dumps(study.answers(plan.stimulus[item.first]), ensure_ascii=False),
            "second": json.dumps(study.answers(plan.stimulus[item.second]), ensure_ascii=False),
        }
        for item in plan.items
    ]


def _tables(study: Study) -> dict[str, list[dict[str, Any]]]:
    judgments = judgment_rows(study)
    if not judgments:
        raise BacoError(f"{study.path} holds no judgments yet: there is nothing to write")
    return {"judgments": judgments, "raters": rater_table(study), "items": item_table(study)}


def _csv(study: Study) -> Iterator[tuple[str, str]]:
    tables = _tables(study)
    for name, rows in tables.items():
        file = io.StringIO()
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        yield f"{name}.csv", file.getvalue()
    yield "README.md", data_card(study, tables["judgments"])


def _parquet(study: Study) -> Iterator[tuple[str, bytes | str]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise BacoError(
            f"Parquet needs {error.name}: install it with pip install 'baco[evaluation]'"
        ) from error
    tables = _tables(study)
    for name, rows in tables.items():
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), file)
        yield f"{name}.parquet", file.getvalue()
    yield "README.md", data_card(study, tables["judgments"])


def data_card(study: Study, judgments: Sequence[Mapping[str, Any]]) -> str:
    """What the tables are, how they were collected, and what is not in them."""
    plan = study.plan
    raters: dict[str, set[str]] = {}
    for judgment in judgments:
        raters.setdefault(judgment["origin"], set()).add(judgment["rater"])
    simulated = "simulated" in raters
    counts = ", ".join(f"{len(ids)} {origin}" for origin, ids in sorted(raters.items()))
    versions = study.store.versions()
    columns = "\n".join(f"| `{name}` | {_COLUMNS[name]} |" for name in JUDGMENT_COLUMNS)
    questions = "\n".join(f"| `{q.id}` | {q.unit} | {q.form} | {q.text} |" for q in plan.questions)
    changes = "\n".join(
        f"- version {v.version}, `{v.hash}`" + (f": {v.reason}" if v.reason else "")
        for v in versions
    )
    warning = (
        "**These judgments are from simulated raters, in whole or in part. They are no human "
        "result.**\n\n"
        if simulated
        else ""
    )
    return f"""# Judgments of the study “{plan.title}”

{warning}- raters with answers: {counts}; judgments: {len(judgments)}
- methods: {", ".join(plan.methods)}
- answers: run `{plan.origin.run}`, pair `{plan.origin.pair}`, task `{plan.origin.task}`, by BACo \
{plan.origin.version}; cut at {plan.word_limit} words for every method
- plans that were in force:

{changes}

## Files

- `judgments`: a row per rater, item and question, attention checks and training included;
- `raters`: a row per rater;
- `items`: what was compared, with the texts.

## Questions

| question | asked on | form | text |
|---|---|---|---|
{questions}

## Columns of `judgments`

| column | meaning |
|---|---|
{columns}

## Collection and privacy

Raters agreed to the consent text of the plan. Nothing about them is in these tables: ids are
random, and no names, addresses, dates or ids of platforms are stored with answers. Raters who
withdrew are not in the tables. No judgment is left out: exclusions are rules of the plan, and the
analysis applies them.
"""


_COLUMNS = {
    "rater": "random id",
    "item": "id in `items`",
    "question": "see above",
    "origin": "of the rater: human, simulated or imported",
    "kind": "comparison, check (attention) or training",
    "unit": "set or answer",
    "check": "equal, repeated or shuffled, for attention checks",
    "prompt": "id of the prompt",
    "left": "id of the stimulus that was left (A)",
    "right": "id of the stimulus that was right (B)",
    "left_method": "method that was left (A); empty for checks and training",
    "right_method": "method that was right (B)",
    "side": "choice of a preference: left, tie or right",
    "left_rating": "1 to 5, for ratings",
    "right_rating": "1 to 5, for ratings",
    "expected": "right answer of a check or training item",
    "position": "of the item in the rater's schedule, from 0; negative for training",
    "seconds": "that the item was visible",
    "words": "of the item",
    "version": "of the plan",
    "passed": "whether the expected answer was given",
    "plan": "hash of the plan",
}
_WRITERS: Mapping[str, Any] = {
    "potato": _potato,
    "label-studio": _label_studio,
    "csv": _csv,
    "parquet": _parquet,
}
