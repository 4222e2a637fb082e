"""Reads judgments that were collected elsewhere: in our tables, Potato, Label Studio or FastChat.

A file is imported whole or not at all. Names of raters in other tools may be e-mail addresses, so
only a keyed hash of them is stored.
"""

import hashlib
import hmac
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from baco.errors import BacoError, one_line
from baco.files import read_csv
from baco.study.export import JUDGMENT_COLUMNS, SIDES, TIE, key_of
from baco.study.plan import POINTS, Item, Plan, Question
from baco.study.rating import check_responses
from baco.study.schedule import Screen
from baco.study.store import Answer, RaterOrigin
from baco.study.study import Study

Row = Mapping[str, Any]
WINNERS = {"model_a": "left", "model_b": "right", "tie": "tie", "tie (bothbad)": "tie"}


@dataclass(frozen=True, slots=True)
class ImportedJudgment:
    """One or more responses of a rater to an item.

    Attributes:
        place: in the file, for messages.
        rater: name or id in the file.
        screen: the item, and its sides.
        responses: by question.
        seconds: on the item; 0 where the file does not say.
        origin: of the rater.
        position: in the rater's schedule; None where the file does not say.
        version: of the plan that was in force; None for the present one.
    """

    place: str
    rater: str
    screen: Screen
    responses: dict[str, Any]
    seconds: float = 0.0
    origin: RaterOrigin = "imported"
    position: int | None = None
    version: int | None = None


@dataclass(slots=True)
class _Merged:
    first: ImportedJudgment
    responses: dict[str, Any] = field(default_factory=dict)


def import_judgments(study: Study, path: Path, question: str | None = None) -> tuple[str, int, int]:
    """Add the judgments of a file to a study.

    Args:
        study: with the plan whose items were judged.
        path: CSV, TSV, JSON or JSON lines.
        question: the question that battles of FastChat answer; by default the plan's preference on
            quality.

    Returns:
        The format, and the numbers of raters and answers.

    Raises:
        BacoError: a file of an unknown format or without responses, an unknown item or question, a
            response that is none, or a rater who answers a question twice. Nothing is imported
            then.
    """
    rows = _read(path)
    name, read = _format(path, rows)
    answers: dict[tuple[str, str], _Merged] = {}
    try:
        for judgment in read(study, rows, question):
            id = judgment.rater if name == "BACo" else _hidden(study, f"{name}:{judgment.rater}")
            merged = answers.setdefault((id, judgment.screen.item.id), _Merged(judgment))
            twice = judgment.responses.keys() & merged.responses.keys()
            if twice or judgment.screen.left != merged.first.screen.left:
                raise BacoError(
                    f"{judgment.place}: rater {judgment.rater} judges item "
                    f"{judgment.screen.item.id} twice: keep one of the judgments"
                )
            merged.responses |= judgment.responses
    except BacoError as error:
        raise BacoError(f"{path}, {error}") from error
    if not answers:
        raise BacoError(
            f"{path} holds no response to a question of this study: its questions are "
            f"{', '.join(study.plan.question)}"
        )
    _add(study, path, answers)
    return name, len({rater for rater, _ in answers}), len(answers)


def _format(path: Path, rows: list[Row]) -> "tuple[str, _Read]":
    for name, is_format, read in _FORMATS:
        if rows and all(map(is_format, rows)):
            return name, read
    raise BacoError(
        f"{path} has none of the formats that can be imported: tables of 'baco study export', "
        "Potato's CSV or JSON lines, Label Studio's JSON, or FastChat's battles"
    )


def _add(study: Study, path: Path, answers: Mapping[tuple[str, str], _Merged]) -> None:
    kept = {(answer.rater, answer.item) for answer in study.store.answers()}
    known = {rater.id for rater in study.store.raters()}
    for rater, item in answers:
        if (rater, item) in kept:
            raise BacoError(
                f"{path}: the study holds a judgment of rater {rater} on item {item} already: "
                "the file was imported before"
            )
    origins = {rater: merged.first.origin for (rater, _), merged in answers.items()}
    places: dict[str, int] = {}
    rows: list[Answer] = []
    for (rater, item), merged in answers.items():
        judgment = merged.first
        place = places[rater] = places.get(rater, -1) + 1
        rows.append(
            Answer(
                rater,
                item,
                place if judgment.position is None else judgment.position,
                judgment.screen.left,
                judgment.screen.right,
                merged.responses,
                judgment.seconds,
                version=judgment.version or study.version,
            )
        )
    study.store.add_imported({id: o for id, o in origins.items() if id not in known}, rows)


def _hidden(study: Study, name: str) -> str:
    key = study.store.secret("raters").encode()
    return "r" + hmac.new(key, name.encode(), hashlib.sha256).hexdigest()[:12]


# Files.


def _read(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BacoError(f"cannot read {path}: {one_line(error)}") from error
    if path.suffix.lower() in (".csv", ".tsv"):
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        columns, lines = read_csv(io.StringIO(text, newline=""), path, delimiter)
        # A row that ends early keeps its columns, so that the error names its line.
        return [{**dict.fromkeys(columns, ""), **row} for _, row in lines]
    try:
        value = json.loads(text)
        rows = value if isinstance(value, list) else [value]
    except (ValueError, RecursionError):
        try:
            # Not splitlines(): a JSON text may hold U+2028 and other characters that it splits at.
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        except (ValueError, RecursionError) as error:
            raise BacoError(f"{path} is neither CSV nor JSON: {one_line(error)}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise BacoError(f"{path} holds something that is no JSON object")
    return rows


# Our own tables.


def _is_ours(row: Row) -> bool:
    return row.keys() >= {*JUDGMENT_COLUMNS}


def _ours(study: Study, rows: list[Row], _: str | None) -> Iterator[ImportedJudgment]:
    versions = {version.hash: version for version in study.store.versions()}
    for number, cells in enumerate(rows, 2):
        place = f"line {number}"
        row = {name: str(cells[name]) for name in JUDGMENT_COLUMNS}
        if row["plan"] not in versions:
            raise BacoError(
                f"{place}: plan {row['plan'][:12]} is not this study's "
                f"({study.plan.hash[:12]}): import into the study that was exported"
            )
        version = versions[row["plan"]]
        plan = version.plan
        item = _item(plan, row["item"], place)
        question = _question(plan, row["question"], place)
        if question.form == "preference":
            response: Any = row["side"]
        else:
            response = (_point(row["left_rating"], place), _point(row["right_rating"], place))
        swapped = row["left"] == item.second
        if (row["left"], row["right"]) != (
            (item.second, item.first) if swapped else (item.first, item.second)
        ):
            raise BacoError(
                f"{place}: {row['left']!r} and {row['right']!r} are not sides of {item.id}"
            )
        if row["origin"] not in get_args(RaterOrigin):
            raise BacoError(
                f"{place}: origin is {row['origin']!r}: it must be one of "
                f"{', '.join(get_args(RaterOrigin))}"
            )
        try:
            position, seconds = int(row["position"]), _seconds(row["seconds"])
        except ValueError as error:
            raise BacoError(f"{place}: position and seconds must be numbers") from error
        yield _found(
            plan,
            place,
            row["rater"],
            Screen(position, 0, item, swapped),
            {question.id: response},
            seconds=seconds,
            origin=row["origin"],
            position=position,
            version=version.version,
        )


def _seconds(value: Any) -> float:
    """A time; ValueError or TypeError if it is not a finite number from 0 up."""
    seconds = float(value)
    if not 0 <= seconds < math.inf:
        raise ValueError(value)
    return seconds


def _point(value: str, place: str) -> int:
    if not value.isdecimal():
        raise BacoError(f"{place}: rating {value!r} is not a number from 1 to {POINTS}")
    return int(value)


# Potato.


def _is_potato(row: Row) -> bool:
    return {"instance_id", "user_id"} <= row.keys()


def _potato(study: Study, rows: list[Row], _: str | None) -> Iterator[ImportedJudgment]:
    screens = _screens_by_key(study.plan)
    for number, row in enumerate(rows, 1):
        place = f"row {number}"
        screen = _screen(screens, str(row["instance_id"]), place)
        responses = _by_sides(study.plan, screen, _potato_labels(row), TIE["potato"], place)
        if responses:
            yield _found(study.plan, place, str(row["user_id"]), screen, responses)


def _potato_labels(row: Row) -> dict[str, str]:
    """The value of every scheme: ``selection`` of a pairwise one, the point of a Likert scale."""
    if isinstance(row.get("labels"), dict):
        return {
            schema: str(next(iter(values.values())) if isinstance(values, dict) else values)
            for schema, values in row["labels"].items()
            if values
        }
    labels: dict[str, str] = {}
    for column, value in row.items():
        if value not in (None, "") and column not in ("instance_id", "user_id"):
            labels[column.partition(".")[0]] = str(value)
    return labels


# Label Studio.


def _is_label_studio(row: Row) -> bool:
    return "annotations" in row and "data" in row


def _label_studio(study: Study, rows: list[Row], _: str | None) -> Iterator[ImportedJudgment]:
    screens = _screens_by_key(study.plan)
    for row in rows:
        place = f"task {row.get('id', '?')}"
        try:
            key = str(row["data"].get("item"))
            annotations = [_annotation(a) for a in row["annotations"] if not a.get("was_cancelled")]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise BacoError(f"{place}: this is not what Label Studio exports as JSON") from error
        screen = _screen(screens, key, place)
        for rater, labels, seconds in annotations:
            responses = _by_sides(study.plan, screen, labels, TIE["label-studio"], place)
            if responses:
                yield _found(study.plan, place, rater, screen, responses, seconds=seconds)


def _annotation(annotation: Mapping[str, Any]) -> tuple[str, dict[str, str], float]:
    """The rater, the labels by the names of their controls, and the seconds of an annotation."""
    labels: dict[str, str] = {}
    for result in annotation.get("result", ()):
        value = result.get("value", {})
        if "choices" in value:
            labels[result["from_name"]] = str(value["choices"][0])
        elif "rating" in value:
            labels[result["from_name"]] = str(value["rating"])
    rater = annotation.get("completed_by")
    name = rater.get("id") if isinstance(rater, dict) else rater
    return str(name), labels, _seconds(annotation.get("lead_time") or 0)


# FastChat.


def _is_fastchat(row: Row) -> bool:
    return {"model_a", "model_b", "winner"} <= row.keys()


def _fastchat(study: Study, rows: list[Row], question_id: str | None) -> Iterator[ImportedJudgment]:
    plan = study.plan
    if question_id is None:
        preferences = [q for q in plan.questions if q.form == "preference"]
        question = next((q for q in preferences if q.dimension == "quality"), preferences[0])
    else:
        question = _question(plan, question_id, "--question")
    if question.form != "preference":
        raise BacoError(f"question {question.id} is a rating: battles need a preference")
    items = {
        (item.prompt, frozenset(plan.stimulus[id].method for id in (item.first, item.second))): item
        for item in plan.items
        if item.kind == "comparison" and item.unit == question.unit
    }
    for number, row in enumerate(rows, 1):
        place = f"battle {number}"
        prompt, left, right = (str(row.get(k)) for k in ("question_id", "model_a", "model_b"))
        item = items.get((prompt, frozenset((left, right))))
        if item is None:
            raise BacoError(
                f"{place}: the plan has no {question.unit} of question_id {prompt!r} with "
                f"{left!r} and {right!r}: question_id must be a prompt's id, and models must be "
                f"{', '.join(plan.methods)}"
            )
        winner = str(row["winner"])
        if winner not in WINNERS:
            raise BacoError(
                f"{place}: winner is {winner!r}: it must be one of {', '.join(WINNERS)}"
            )
        screen = Screen(0, 0, item, plan.stimulus[item.second].method == left)
        responses = {question.id: WINNERS[winner]}
        yield _found(plan, place, str(row.get("judge", "judge")), screen, responses)


# Parts.


def _screens_by_key(plan: Plan) -> dict[str, Screen]:
    return {
        key_of(plan, item, swapped): Screen(0, 0, item, swapped)
        for item in plan.items
        for swapped in (False, True)
    }


def _screen(screens: Mapping[str, Screen], key: str, place: str) -> Screen:
    if key not in screens:
        raise BacoError(
            f"{place}: item {key!r} is not in this study: import what was made from its export"
        )
    return screens[key]


def _item(plan: Plan, id: str, place: str) -> Item:
    if id not in plan.item:
        raise BacoError(f"{place}: item {id!r} is not in this study's plan")
    return plan.item[id]


def _question(plan: Plan, id: str, place: str) -> Question:
    if id not in plan.question:
        raise BacoError(f"{place}: question {id!r} is unknown: it has {', '.join(plan.question)}")
    return plan.question[id]


def _by_sides(
    plan: Plan, screen: Screen, labels: Mapping[str, str], tie: str, place: str
) -> dict[str, Any]:
    """Responses from the labels of another tool: one per preference, two per rating."""
    sides = {SIDES[0]: "left", SIDES[1]: "right", tie: "tie"}
    responses: dict[str, Any] = {}
    for question in plan.asked(screen.item.unit):
        if question.form == "preference" and question.id in labels:
            responses[question.id] = sides.get(labels[question.id], labels[question.id])
        ratings = [labels.get(f"{question.id}_{side}") for side in SIDES]
        if question.form == "rating" and all(rating is not None for rating in ratings):
            responses[question.id] = tuple(_point(str(rating), place) for rating in ratings)
    return responses


def _found(
    plan: Plan,
    place: str,
    rater: str,
    screen: Screen,
    responses: dict[str, Any],
    **more: Any,
) -> ImportedJudgment:
    try:
        checked = check_responses(plan, screen, responses)
    except BacoError as error:
        raise BacoError(f"{place}: {error}") from error
    return ImportedJudgment(place, rater, screen, checked, **more)


_Read = Callable[[Study, list[Row], str | None], Iterator[ImportedJudgment]]
_FORMATS: tuple[tuple[str, Callable[[Row], bool], _Read], ...] = (
    ("BACo", _is_ours, _ours),
    ("Potato", _is_potato, _potato),
    ("Label Studio", _is_label_studio, _label_studio),
    ("FastChat", _is_fastchat, _fastchat),
)
