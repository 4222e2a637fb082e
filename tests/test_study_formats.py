"""What other tools get of a study, and what comes back from them."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest

from baco.errors import BacoError
from baco.study.export import JUDGMENT_COLUMNS, screens, write
from baco.study.importing import import_judgments
from baco.study.store import Judgment
from baco.study.study import Study
from tests.studies import METHODS, fill, made_study


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    new_study = made_study(tmp_path, prompts=6)
    yield new_study
    new_study.close()


def rows_of(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("tool", ["potato", "label-studio"])
def test_other_tools_get_every_item_once_and_no_method(study: Study, tool: str) -> None:
    files = write(study, tool, study.path / "out")
    content = "".join(path.read_text(encoding="utf-8") for path in files)
    for word in (*METHODS, "trip-", "repeated", "shuffled", "comparison"):
        assert word not in content
    data = [path for path in files if path.suffix in (".jsonl", ".json")]
    keys = [
        key for path in data for key in re.findall(r'"(?:id|item)": "(\w{16})"', path.read_text())
    ]
    shown = [item for item in study.plan.items if item.kind != "training"]
    assert len(keys) == len(set(keys)) == len(shown)


def test_half_of_each_pair_of_methods_is_swapped(study: Study) -> None:
    sides: Counter[tuple[str, str, str]] = Counter()
    for screen in screens(study.plan):
        if screen.item.kind == "comparison":
            methods = (study.plan.stimulus[id].method for id in (screen.left, screen.right))
            sides[screen.item.unit, *methods] += 1  # type: ignore[index]
    assert len(sides) == 12
    assert set(sides.values()) == {3}


def test_potato_gets_schemes_that_it_knows(study: Study) -> None:
    write(study, "potato", study.path / "out")
    config = json.loads((study.path / "out" / "sets.yaml").read_text(encoding="utf-8"))
    schemes = {scheme["name"]: scheme for scheme in config["annotation_schemes"]}
    assert list(schemes) == [
        "diversity_rating_A",
        "diversity_rating_B",
        "diversity",
        "creativity",
        "overall",
    ]
    assert schemes["diversity"]["annotation_type"] == "pairwise"
    assert schemes["diversity"]["allow_tie"]
    assert schemes["diversity_rating_A"]["size"] == 5
    (line, *_) = (study.path / "out" / "sets.jsonl").read_text(encoding="utf-8").splitlines()
    item = json.loads(line)
    assert len(item[schemes["diversity"]["items_key"]]) == 2
    assert item["responses"][0].startswith("1. ")


def test_label_studio_gets_a_configuration_whose_names_fit_its_tasks(study: Study) -> None:
    write(study, "label-studio", study.path / "out")
    view = ElementTree.parse(study.path / "out" / "answers.xml")
    texts = {tag.get("name"): tag.get("value") for tag in view.iter("Text")}
    assert texts == {"prompt": "$prompt", "a": "$a", "b": "$b"}
    controls = [*view.iter("Choices"), *view.iter("Rating")]
    assert {tag.get("name") for tag in controls} == {
        "quality",
        "quality_rating_A",
        "quality_rating_B",
    }
    assert {tag.get("toName") for tag in controls} <= texts.keys()
    tasks = json.loads((study.path / "out" / "answers.json").read_text(encoding="utf-8"))
    assert all(task["data"].keys() == {"item", "prompt", "a", "b"} for task in tasks)


def test_tables_hold_all_judgments_and_nothing_of_the_raters(study: Study) -> None:
    fill(study, 2)
    kept = list(study.judgments())
    for path in write(study, "parquet", study.path / "out"):
        if path.name == "judgments.parquet":
            assert pq.read_table(path).num_rows == len(kept)
    judgments, raters, items, card = write(study, "csv", study.path / "out")
    rows = rows_of(judgments)
    assert tuple(rows[0]) == JUDGMENT_COLUMNS
    assert len(rows) == len(kept)
    content = "".join(p.read_text(encoding="utf-8") for p in (judgments, raters, items, card))
    for rater in study.store.raters():
        assert rater.id in content
        assert str(rater.link) not in content
        assert rater.code not in content
    for column in JUDGMENT_COLUMNS:
        assert f"| `{column}` |" in card.read_text(encoding="utf-8")
    assert "simulated" not in card.read_text(encoding="utf-8").partition("## Files")[0]


def test_the_data_card_says_that_raters_are_simulated(study: Study) -> None:
    fill(study, 1)
    rater = study.store.add_rater(origin="simulated", linked=False)
    assert rater is not None
    (first, *_) = study.store.answers()
    study.store.save([replace(first, rater=rater.id)])
    card = write(study, "csv", study.path / "out")[-1].read_text(encoding="utf-8")
    assert "They are no human result." in card


def essence(judgments: Iterator[Judgment]) -> Counter[tuple[Any, ...]]:
    """Judgments without what other tools do not keep."""
    return Counter(
        (j.item, j.question, j.left, j.side, j.left_rating, j.right_rating) for j in judgments
    )


def test_our_own_tables_come_back_as_they_were(study: Study, tmp_path: Path) -> None:
    fill(study, 2)
    path = write(study, "csv", tmp_path / "out")[0]
    other = made_study(tmp_path / "other", prompts=6)
    assert import_judgments(other, path) == ("BACo", 2, 2 * 15)
    before = [{**_fields(j), "origin": ""} for j in study.judgments()]
    after = [{**_fields(j), "origin": ""} for j in other.judgments()]
    assert before == after
    other.close()


def test_a_table_that_was_cut_off_is_named_by_its_last_line(study: Study, tmp_path: Path) -> None:
    fill(study, 1)
    path = write(study, "csv", tmp_path / "out")[0]
    *lines, last = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines, ",".join(last.split(",")[:2])]), encoding="utf-8")
    with pytest.raises(BacoError, match=rf"line {len(lines) + 1}: ") as caught:
        import_judgments(study, path)
    assert "\n" not in str(caught.value)


def test_our_own_tables_keep_the_plan_that_was_in_force(study: Study, tmp_path: Path) -> None:
    fill(study, 1)
    path = write(study, "csv", tmp_path / "out")[0]
    write_rows(path, [row | {"rater": "another"} for row in rows_of(path)])
    study.store.adopt(replace(study.plan, notes="one more rater"), "more raters")
    again = replace(study, plan=study.store.versions()[-1].plan, version=2)
    import_judgments(again, path)
    assert {j.version for j in again.judgments() if j.rater == "another"} == {1}


def test_json_lines_may_hold_other_line_separators(study: Study, tmp_path: Path) -> None:
    potato_file(study, tmp_path / "annotations.csv")
    keys = [row["instance_id"] for row in rows_of(tmp_path / "annotations.csv")[:2]]
    labels = {"diversity": {"A": "A"}}
    rows = [{"instance_id": key, "user_id": "Ann\u2028B.", "labels": labels} for key in keys]
    path = tmp_path / "annotations.jsonl"
    path.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    assert import_judgments(study, path) == ("Potato", 1, 2)


def _fields(judgment: Judgment) -> dict[str, Any]:
    return {name: getattr(judgment, name) for name in Judgment.__slots__}


def potato_file(study: Study, path: Path, *, rater: str = "ann@example.org") -> None:
    """What Potato's CSV exporter writes."""
    folder = path.parent / "potato"
    write(study, "potato", folder)
    keys = [json.loads(line)["id"] for line in (folder / "sets.jsonl").read_text().splitlines()]
    columns = ["instance_id", "user_id", "diversity.selection", "creativity.selection"]
    columns += ["overall.selection", *(f"diversity_rating_A.{p}" for p in range(1, 6))]
    columns += [f"diversity_rating_B.{p}" for p in range(1, 6)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        for key in keys:
            row = {"instance_id": key, "user_id": rater, "diversity.selection": "A"}
            row |= {"creativity.selection": "tie", "overall.selection": "B"}
            writer.writerow(row | {"diversity_rating_A.4": "4", "diversity_rating_B.2": "2"})


def test_potatos_tables_are_read(study: Study, tmp_path: Path) -> None:
    potato_file(study, tmp_path / "annotations.csv")
    sets = sum(item.unit == "set" and item.kind != "training" for item in study.plan.items)
    assert import_judgments(study, tmp_path / "annotations.csv") == ("Potato", 1, sets)
    chosen = Counter((j.question, j.side, j.left_rating, j.right_rating) for j in study.judgments())
    assert chosen == {
        ("diversity", "left", None, None): sets,
        ("creativity", "tie", None, None): sets,
        ("overall", "right", None, None): sets,
        ("diversity_rating", None, 4, 2): sets,
    }
    (rater,) = study.store.raters()
    assert rater.origin == "imported"
    files = [path.read_bytes() for path in study.path.glob("judgments.sqlite*")]
    assert all(b"ann@example.org" not in content for content in files)


def test_potatos_json_lines_are_read_as_its_tables_are(study: Study, tmp_path: Path) -> None:
    potato_file(study, tmp_path / "annotations.tsv")
    rows = csv.DictReader((tmp_path / "annotations.tsv").open(newline=""), delimiter="\t")
    lines = []
    for row in rows:
        labels: dict[str, dict[str, str]] = {}
        for column, value in row.items():
            schema, dot, label = column.partition(".")
            if dot and value:
                labels.setdefault(schema, {})[label] = value
        lines.append(
            {"instance_id": row["instance_id"], "user_id": row["user_id"], "labels": labels}
        )
    path = tmp_path / "annotations.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    other = made_study(tmp_path / "other", prompts=6)
    import_judgments(study, tmp_path / "annotations.tsv")
    import_judgments(other, path)
    assert essence(study.judgments()) == essence(other.judgments())
    other.close()


def label_studio_file(study: Study, path: Path, result: list[dict[str, Any]]) -> int:
    """What Label Studio exports as JSON."""
    folder = path.parent / "label-studio"
    write(study, "label-studio", folder)
    tasks = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    for number, task in enumerate(tasks):
        annotation = {"id": number, "result": result, "was_cancelled": False, "lead_time": 4.5}
        skipped = {"id": -1, "result": [], "was_cancelled": True, "completed_by": 3}
        task |= {"id": number, "annotations": [annotation | {"completed_by": 7}, skipped]}
    path.write_text(json.dumps(tasks), encoding="utf-8")
    return len(tasks)


RESULT: list[dict[str, Any]] = [
    {"from_name": "quality", "to_name": "prompt", "type": "choices", "value": {"choices": ["B"]}},
    {"from_name": "quality_rating_A", "to_name": "a", "type": "rating", "value": {"rating": 2}},
    {"from_name": "quality_rating_B", "to_name": "b", "type": "rating", "value": {"rating": 5}},
]


def test_label_studios_json_is_read(study: Study, tmp_path: Path) -> None:
    tasks = label_studio_file(study, tmp_path / "export.json", RESULT)
    assert import_judgments(study, tmp_path / "export.json") == ("Label Studio", 1, tasks)
    chosen = Counter((j.question, j.side, j.left_rating, j.right_rating) for j in study.judgments())
    assert chosen == {
        ("quality", "right", None, None): tasks,
        ("quality_rating", None, 2, 5): tasks,
    }
    assert {judgment.seconds for judgment in study.judgments()} == {4.5}


BATTLES = [
    {"question_id": "{0}", "model_a": METHODS[0], "model_b": METHODS[1], "winner": "model_a"},
    {"question_id": "{1}", "model_a": METHODS[2], "model_b": METHODS[0], "winner": "model_b"},
    {"question_id": "{2}", "model_a": METHODS[1], "model_b": METHODS[2], "winner": "tie (bothbad)"},
]


def battles(study: Study, path: Path, **changes: Any) -> None:
    prompts = sorted({i.prompt for i in study.plan.items if i.kind == "comparison"})
    rows = [
        battle | {"question_id": battle["question_id"].format(*prompts), "judge": "arena_user_1"}
        for battle in BATTLES
    ]
    rows[0] |= changes
    path.write_text(json.dumps(rows), encoding="utf-8")


def test_battles_of_fastchat_are_read(study: Study, tmp_path: Path) -> None:
    battles(study, tmp_path / "clean_battle.json")
    assert import_judgments(study, tmp_path / "clean_battle.json") == ("FastChat", 1, 3)
    chosen = [(j.question, j.left_method, j.right_method, j.side) for j in study.judgments()]
    assert sorted(chosen) == sorted(
        [
            ("quality", METHODS[0], METHODS[1], "left"),
            ("quality", METHODS[2], METHODS[0], "right"),
            ("quality", METHODS[1], METHODS[2], "tie"),
        ]
    )


def spoil_potato(name: str, value: str) -> Callable[[Study, Path], Path]:
    def spoil(study: Study, folder: Path) -> Path:
        path = folder / "annotations.csv"
        potato_file(study, path)
        rows = rows_of(path)
        rows[3][name] = value
        write_rows(path, rows)
        return path

    return spoil


def doubled(study: Study, folder: Path) -> Path:
    path = folder / "annotations.csv"
    potato_file(study, path)
    path.write_text(
        path.read_text(encoding="utf-8") + path.read_text(encoding="utf-8").splitlines()[2] + "\n",
        encoding="utf-8",
    )
    return path


def imported_before(study: Study, folder: Path) -> Path:
    path = folder / "annotations.csv"
    potato_file(study, path)
    import_judgments(study, path)
    return path


def own_table(column: str, value: str) -> Callable[[Study, Path], Path]:
    def spoil(study: Study, folder: Path) -> Path:
        other = made_study(folder / "other", prompts=6)
        fill(other, 1)
        path = write(other, "csv", folder / "out")[0]
        other.close()
        rows = rows_of(path)
        rows[5][column] = value
        write_rows(path, rows)
        return path

    return spoil


def text_file(content: str, name: str = "file.json") -> Callable[[Study, Path], Path]:
    def spoil(_: Study, folder: Path) -> Path:
        (folder / name).write_text(content, encoding="utf-8")
        return folder / name

    return spoil


def battle(**changes: Any) -> Callable[[Study, Path], Path]:
    def spoil(study: Study, folder: Path) -> Path:
        battles(study, folder / "battles.json", **changes)
        return folder / "battles.json"

    return spoil


def label_studio(
    result: list[dict[str, Any]] | None = None, **changes: Any
) -> Callable[[Study, Path], Path]:
    def spoil(study: Study, folder: Path) -> Path:
        path = folder / "export.json"
        label_studio_file(study, path, RESULT if result is None else result)
        tasks = json.loads(path.read_text(encoding="utf-8"))
        tasks[0] |= changes
        path.write_text(json.dumps(tasks), encoding="utf-8")
        return path

    return spoil


BAD_FILES: dict[str, tuple[Callable[[Study, Path], Path], str]] = {
    "no file": (lambda _, folder: folder / "none.csv", "cannot read"),
    "no format": (text_file('{"rows": 1}'), "has none of the formats that can be imported"),
    "an empty file": (text_file("", "file.csv"), "has none of the formats"),
    "no JSON": (text_file("{"), "is neither CSV nor JSON"),
    "endless JSON": (text_file("[" * 100_000), "is neither CSV nor JSON"),
    "no objects": (text_file("[1]"), "holds something that is no JSON object"),
    "an unknown item": (
        spoil_potato("instance_id", "0" * 16),
        "row 4: item '0000000000000000' is not in this study",
    ),
    "a doubled judgment": (doubled, "twice: keep one of the judgments"),
    "a file again": (imported_before, "the file was imported before"),
    "an unknown choice": (
        spoil_potato("diversity.selection", "C"),
        "row 4: the response to diversity is not one of its options",
    ),
    "an unknown item of ours": (own_table("item", "set/x"), "line 7: item 'set/x' is not in"),
    "an unknown question": (own_table("question", "beauty"), "question 'beauty' is unknown"),
    "another plan": (own_table("plan", "f" * 64), "line 7: plan ffffffffffff is not this study's"),
    "other sides": (own_table("left", "set/x"), "are not sides of"),
    "a time that is no number": (own_table("seconds", "soon"), "line 7: position and seconds must"),
    "a time that is not finite": (own_table("seconds", "nan"), "line 7: position and seconds must"),
    "a negative time": (own_table("seconds", "-1"), "line 7: position and seconds must"),
    "a rater of no origin": (own_table("origin", "bot"), "line 7: origin is 'bot'"),
    "a row of another form": (
        text_file('{"model_a": "a", "model_b": "b", "winner": "tie"}\n{"rows": 1}', "rows.jsonl"),
        "has none of the formats",
    ),
    "an unknown model": (battle(model_a="gpt"), "the plan has no answer of question_id"),
    "an unknown winner": (battle(winner="me"), "winner is 'me': it must be one of model_a"),
    "a list of winners": (battle(winner=["model_a"]), "it must be one of model_a"),
    "data of another form": (label_studio(data="text"), "task 0: this is not what Label Studio"),
    "an empty choice": (
        label_studio(result=[{"from_name": "quality", "value": {"choices": []}}]),
        "task 0: this is not what Label Studio exports",
    ),
    "a result without its control": (
        label_studio(result=[{"value": {"choices": ["A"]}}]),
        "task 0: this is not what Label Studio exports",
    ),
    "other controls": (
        label_studio(result=[{"from_name": "beauty", "value": {"choices": ["A"]}}]),
        "holds no response to a question of this study",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_with_a_fault_is_refused_in_one_line_and_nothing_is_imported(
    name: str, study: Study, tmp_path: Path
) -> None:
    spoil, message = BAD_FILES[name]
    path = spoil(study, tmp_path)
    before = study.store.answers()
    with pytest.raises(BacoError, match=re.escape(message)) as error:
        import_judgments(study, path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert study.store.answers() == before


def test_bad_exports_are_refused(study: Study, tmp_path: Path) -> None:
    with pytest.raises(BacoError, match="use one of potato, label-studio, csv, parquet"):
        write(study, "excel", tmp_path / "out")
    with pytest.raises(BacoError, match="holds no judgments yet"):
        write(study, "csv", tmp_path / "out")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(BacoError, match="cannot write"):
        write(study, "potato", tmp_path / "file")
