"""`baco dataset report`: figures that follow from the rows, beside those of a baseline."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from baco.cli import run
from baco.dataset import figures
from baco.dataset.dataset_page import cells, verdict
from baco.dataset.figures import Report, make_report, schema_check
from baco.dataset.files import Dataset
from baco.dataset.near_duplicates import Rule
from baco.evaluation.metrics import MetricUnavailable, registry
from baco.evaluation.metrics.embedding import embedder

SCHEMA = {"type": "object", "required": ["name"], "properties": {"age": {"maximum": 40}}}
LONG = "you can sit by the fire in the evening and enjoy the view of the quiet old harbour"
# Two answers a prompt; a rich tapestry is a listed phrase.
ANSWERS = [
    '{"name": "Ada", "age": 30, "job": {"title": "cook"}}',
    '{"name": "Ada", "age": 50, "job": {"title": "pilot"}}',
    '{"name": "Bo"}',
    '{"age": 30}',
    '{"name": "Ada"',
    "42",
    f"A rich tapestry: {LONG}.",
    f"A rich tapestry: {LONG}!",
    f"A rich tapestry: {LONG}.",
    "Go to Rome <b>now</b>.",
]


@pytest.fixture(autouse=True)
def without_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: Any) -> Any:
        raise MetricUnavailable("no model here")

    monkeypatch.setitem(registry.ROLES, "embedding", missing)


def write(path: Path, answers: list[str], **more: Any) -> Path:
    rows = [{"prompt": f"p{i // 2}", "answer": text, **more} for i, text in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def report(path: Path, baseline: Path | None = None, check: Any = None) -> Report:
    other = None if baseline is None else Dataset.open(baseline)
    return make_report(Dataset.open(path), other, Rule(), check, {}, lambda _: None)


def test_validity_counts_json_and_the_schema(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    found = report(write(tmp_path / "a.jsonl", ANSWERS), check=schema_check(schema)).figures
    assert (found.rows, found.prompts, found.fewest, found.most) == (10, 5, 2, 2)
    assert (found.json, found.valid) == (0.4, 0.2)
    assert dict(found.faults) == {
        "not JSON": 5,
        "$: type": 1,
        "$.age: maximum": 1,
        "$: required": 1,
    }
    values = {field.name: field for field in found.fields}
    assert list(values) == ["age", "name", "job.title"]
    assert values["name"].present == 0.75 and values["name"].distinct == 2
    assert values["name"].top == [("Ada", 2 / 3), ("Bo", 1 / 3)]
    assert values["age"].mean == pytest.approx((30 + 50 + 30) / 3) and values["name"].mean is None
    assert values["job.title"].entropy == pytest.approx(0.6931, abs=1e-4)


def test_validity_is_of_any_json_value(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": ["string", "number", "null"]}')
    rows = write(tmp_path / "a.jsonl", ['"Ada"', "3", "null", "NaN", "[]", "Ada"])
    found = report(rows, check=schema_check(schema)).figures
    assert (found.json, found.valid) == (1 / 6, 3 / 6)
    assert dict(found.faults) == {"not JSON": 2, "$: type": 1}


def test_figures_are_numbers_of_json_whatever_the_rows_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [f'{{"a": 1e999, "b": 1{"0" * 400}}}', '{"a": 3, "b": 4}', '{"a": NaN}']
    rows = write(tmp_path / "a.jsonl", answers, base_share=float("nan"))
    assert run(["dataset", "report", str(rows), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["figures"]
    assert (found["base_share"], found["json"]) == (None, pytest.approx(2 / 3))
    assert [(field["name"], field["mean"]) for field in found["fields"]] == [
        ("a", None),
        ("b", None),
    ]


def test_base_shares_of_csv_are_read_like_those_of_json(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,answer,base_share\na,x,0.5\na,y,0.25\nb,z,\nb,w,2\n", "utf-8")
    assert report(rows).figures.base_share == 0.375


def test_duplicates_openings_and_overused_phrases_are_counted(tmp_path: Path) -> None:
    found = report(write(tmp_path / "a.jsonl", ANSWERS)).figures
    assert found.exact == pytest.approx(0.1)
    assert found.near == pytest.approx(0.1)
    assert found.groups == [(3, ANSWERS[6])]
    words = sum(len(re.findall(r"\w+", text)) for text in ANSWERS)
    assert found.words == words / 10
    assert found.slop == pytest.approx(1000 * 3 / words)
    assert list(found.phrases) == ["rich tapestry"]
    assert found.openings[1] == (2, "a rich", 0.3)
    assert [size for size, _, _ in found.openings] == list(range(1, 13))
    # Of the pairs of answers to a prompt: name ada age; –; –; all 21 words; –.
    assert found.shared_words == pytest.approx((3 + 0 + 0 + 21 + 0) / 5)
    assert found.unfinished is None and found.base_share is None


def test_a_baseline_is_measured_on_the_same_prompts_and_as_many_answers(tmp_path: Path) -> None:
    own = [f"answer {number} is about thing{number}" for number in range(40)]
    rows = write(tmp_path / "own.jsonl", own, finish_reason="stop", base_share=0.25)
    lines = [json.dumps({"prompt": f"p{i}", "answers": ["the same"] * 3}) for i in range(20)]
    (tmp_path / "other.jsonl").write_text("\n".join(lines))
    made = report(rows, tmp_path / "other.jsonl")
    assert made.baseline is not None
    assert (made.baseline.rows, made.baseline.fewest, made.baseline.exact) == (60, 3, 59 / 60)
    assert (made.figures.unfinished, made.figures.base_share) == (0, 0.25)
    # 40 pooled answers of both, and two answers to each prompt.
    assert made.baseline.pooled[1] == 2 / 80
    score, difference = made.baseline.scores["distinct_1"], made.differences["distinct_1"]
    assert score is not None and score.value == 0.5
    assert difference is not None and 0 < difference.low <= difference.difference
    assert "0.0% instead of 98.3% of the rows are duplicates" in verdict(made)[-1]


def test_a_sample_is_bounded_and_the_same_in_any_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "SAMPLE", 5)
    monkeypatch.setattr(figures, "PROMPTS", 3)
    answers = [f"answer {number}" for number in range(100)]
    seen = []
    for name, texts in (("a", answers), ("b", [text.upper() for text in answers])):
        observer, _ = figures._observe(
            Dataset.open(write(tmp_path / f"{name}.jsonl", texts)), Rule(), None, lambda _: None
        )
        assert len(observer.texts()) == 5 and len(observer.sample) <= 10
        assert len(observer.answers(8)) == 3 and len(observer.prompts) <= 6
        assert all(len(texts) == 2 for _, texts in observer.answers(8))
        seen.append((observer.texts(), [prompt for prompt, _ in observer.answers(8)]))
    assert [text.lower() for text in seen[1][0]] == seen[0][0]
    assert seen[1][1] == seen[0][1]


def test_missing_embeddings_are_said_and_the_rest_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["dataset", "report", str(write(tmp_path / "a.jsonl", ANSWERS))]) == 0
    printed = capsys.readouterr()
    assert "no model here" in printed.err
    assert "distinct_2 per prompt" in printed.out and "embedding_distance" not in printed.out


def test_differences_of_shares_are_rounded() -> None:
    assert cells(("base share", "percent", 0.5, 0.4871, 0.0129), True)[-1] == "+1.3%"


def test_the_page_runs_no_script_and_shows_both_datasets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, other = write(tmp_path / "a.jsonl", ANSWERS), write(tmp_path / "b.jsonl", ANSWERS[:4])
    page = tmp_path / "report.html"
    command = ["dataset", "report", str(own), "--baseline", str(other), "-o", str(page), "--json"]
    assert run(command) == 0
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "default-src 'none'" in text and "<b>now" not in text
    assert text.count("<svg") == 6  # lengths, openings, phrases, three fields
    # Colours of the plots follow the theme.
    assert "var(--own)" in text and "var(--other)" in text and "#24292e" not in text
    assert str(own) in text and str(other) in text
    summary = json.loads(capsys.readouterr().out)
    assert summary["figures"]["rows"] == 10 and summary["baseline"]["rows"] == 4
    assert set(summary["differences"]) == {"distinct_1", "distinct_2", "distinct_3"}


def test_embeddings_measure_pooled_answers_and_those_of_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.ROLES, "embedding", embedder)
    path = write(tmp_path / "a.jsonl", ["Go to Rome."] * 2 + ["Eat soup today.", "Swim at dawn."])
    found = report(path).figures
    distance = found.scores["embedding_distance"]
    assert 1.5 < found.spread["vendi"] < 4
    assert distance is not None and 0.1 < distance.value < found.spread["embedding_distance"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing is not there: give a file or the folder of a dataset"),
        (["."], "holds no file of rows: give .jsonl, .ndjson, .csv, .parquet"),
        (["empty.jsonl"], "empty.jsonl holds no rows"),
        (["rows.jsonl", "--schema", "rows.jsonl"], "rows.jsonl is not a JSON schema: "),
        (["rows.jsonl", "--schema", "bad.json"], "bad.json is not a JSON schema: 'thing' is not"),
        (["rows.jsonl", "--schema", "none.json"], "cannot read none.json: No such file"),
        (["rows.jsonl", "--model", "nli"], "give ROLE=ID_OR_FOLDER"),
        (["rows.jsonl", "--schema", "far.json"], "far.json cannot be checked: Unresolvable: http:"),
        (["rows.jsonl", "--schema", "loop.json"], "loop.json cannot be checked: maximum recursion"),
        (["rows.jsonl", "-o", "folder"], "folder is a folder: give a file, as in folder/report"),
        (["rows.jsonl", "-o", "rows.jsonl"], "--output rows.jsonl is read too: give another file"),
        (["rows.jsonl", "-o", "no/page.html"], "cannot write no/page.html: no such folder as"),
        (["rows.jsonl", "-o", "pipe"], "cannot write pipe: it is not a regular file"),
        (["half.jsonl"], "half.jsonl, line 1 holds half a surrogate pair"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "work" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    if arguments != ["."]:
        rows = write(Path("rows.jsonl"), ["1", "y"]).read_text()
        Path("empty.jsonl").touch()
        Path("bad.json").write_text('{"type": "thing"}')
        Path("far.json").write_text('{"$ref": "http://localhost:9/schema"}')
        Path("loop.json").write_text('{"$ref": "#"}')
        os.mkfifo("pipe")
        write(Path("half.jsonl"), ["a \ud800"])
    assert run(["dataset", "report", *arguments]) == 2
    stderr = " ".join(capsys.readouterr().err.split())
    assert message in stderr and stderr.count("baco:") == 1
    assert arguments == ["."] or Path("rows.jsonl").read_text() == rows
