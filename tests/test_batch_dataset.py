"""Datasets of `baco batch`: prompts from a template, one row per answer, and a card."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml

from baco import Baco
from baco.batch.rows import prompt_template, read_rows
from baco.cli import run
from baco.errors import BacoError

TEMPLATE = "Recommend a {{ kind }} destination"
ROWS = [
    {"id": "a", "kind": "summer", "seed": 7, "note": None, "tags": ["x"], "prompt": "own"},
    {"id": "b", "kind": "winter", "seed": 8, "note": "a\nb", "tags": {"y": 1}, "prompt": "own"},
    {"id": "c", "kind": "summer", "seed": 9, "note": "c", "tags": None, "prompt": "own"},
]
SETTINGS = ["-n", "2", "-r", "P-Punc:0.4", "-s", "5", "--max-tokens", "12", "--shard-rows", "1"]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make(folder: Path, form: str, *more: str) -> Path:
    """A dataset of ROWS."""
    rows, out = write_rows(folder / "in.jsonl", ROWS), folder / "out"
    command = ["batch", str(rows), str(out), "--prompt-template", TEMPLATE, "--dataset", *SETTINGS]
    assert run([*command, "--format", form, *more]) == 0
    return out


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dataset"), request.param)


def loaded(made: Path, cache: Path) -> Any:
    import datasets

    return datasets.load_dataset(str(made), cache_dir=str(cache))["train"]


def test_datasets_reads_a_row_per_answer_with_its_provenance(
    made: Path, tmp_path: Path, demo: Baco
) -> None:
    rows = list(loaded(made, tmp_path))
    assert [(row["row"], row["id"], row["sample"]) for row in rows] == [
        (number, name, sample) for number, name in enumerate("abc") for sample in (0, 1)
    ]
    for row in rows:
        assert row["prompt"] == f"Recommend a {row['kind']} destination"
        params = json.loads(row["params"])
        alone = demo.generate(
            row["prompt"],
            n=2,
            router=row["router"],
            seed=row["seed"],
            max_tokens=params["max_tokens"],
        )[row["sample"]]
        assert row["answer"] == alone.text
        assert (row["pair"], row["finish_reason"]) == ("demo", alone.finish_reason)
        assert row["base_share"] == pytest.approx(alone.base_share, abs=1e-5)
        assert row["logprob"] == pytest.approx(sum(alone.logprobs), abs=1e-3)
        assert (row["tokens"], row["switches"]) == (len(alone.token_ids), alone.switches)
        # Spans cover the answer, and each is of the model that wrote it.
        writers = [piece.source for piece in alone.pieces for _ in piece.text]
        spans = row["spans"]
        covered = [s["source"] for s in spans for _ in range(s["start"], s["end"])]
        assert covered == writers
        assert all(a["end"] == b["start"] for a, b in pairwise(spans))


def test_columns_of_the_input_keep_their_types_and_never_replace_those_of_the_answer(
    made: Path, tmp_path: Path
) -> None:
    rows = loaded(made, tmp_path)
    assert rows.features["input_seed"].dtype == "int64"
    assert set(rows["input_seed"]) == {7, 8, 9}
    assert set(rows["seed"]) == {5}
    assert set(rows["input_prompt"]) == {"own"}
    # The first shard has nothing but null here.
    assert rows["note"][:] == [None, None, "a\nb", "a\nb", "c", "c"]
    assert [None if tags is None else json.loads(tags) for tags in rows["tags"][::2]] == [
        ["x"],
        {"y": 1},
        None,
    ]


def test_whole_numbers_beyond_64_bits_keep_all_their_digits(tmp_path: Path) -> None:
    numbers = [2**63, 10**400, 0.5]
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "Hi", "number": n} for n in numbers])
    out = tmp_path / "out"
    assert run(["batch", str(rows), str(out), "--dataset", "--max-tokens", "1"]) == 0
    (shard,) = (out / "data").iterdir()
    cells = [json.loads(line)["number"] for line in shard.read_text("utf-8").splitlines()]
    assert [json.loads(cell) for cell in cells] == numbers


def test_pandas_reads_the_same_rows(made: Path, tmp_path: Path) -> None:
    files = sorted((made / "data").iterdir())
    assert [file.name[:14] for file in files] == [f"rows-{row:09d}" for row in range(3)]
    if files[0].suffix == ".parquet":
        table = pandas.read_parquet(made / "data")
    else:
        table = pandas.concat([pandas.read_json(file, lines=True) for file in files])
    rows = loaded(made, tmp_path)
    assert list(table.columns) == rows.column_names
    assert list(table["answer"]) == list(rows["answer"])
    assert list(table["base_share"]) == pytest.approx(list(rows["base_share"]))


def test_the_card_says_how_the_dataset_was_made_and_leaves_the_licence_open(made: Path) -> None:
    text = (made / "README.md").read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert "license" not in metadata and "# license:" in header
    assert [feature["name"] for feature in metadata["dataset_info"]["features"]][:4] == [
        "row",
        "id",
        "sample",
        "prompt",
    ]
    for fact in ("| pair | demo |", "| router | P-Punc:0.4 |", "| seed | 5 |", TEMPLATE, "baco 0."):
        assert fact in body
    assert "6 answers to 3 prompts" in body


def test_a_card_that_was_edited_stays_when_the_dataset_is_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = make(tmp_path, "jsonl")
    shard = out / "data" / "rows-000000001-000000001.jsonl"
    before = shard.read_bytes()
    shard.unlink()
    (out / "README.md").write_text("my own\n")
    make(tmp_path, "jsonl")
    assert shard.read_bytes() == before
    assert (out / "README.md").read_text() == "my own\n"
    rows = write_rows(tmp_path / "in.jsonl", [{**row, "note": "new"} for row in ROWS])
    command = ["batch", str(rows), str(out), "--prompt-template", TEMPLATE, *SETTINGS]
    assert run([*command, "--dataset"]) == 2
    assert "other settings (columns)" in " ".join(capsys.readouterr().err.split())


def test_answers_in_a_schema_are_valid_rows(tmp_path: Path) -> None:
    schema: dict[str, Any] = {"type": "object", "required": ["season"]}
    schema["properties"] = {"season": {"enum": ["summer", "winter"]}}
    schema["additionalProperties"] = False
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    out = make(tmp_path, "jsonl", "--schema", str(tmp_path / "schema.json"), "--max-tokens", "24")
    rows = list(loaded(out, tmp_path / "cache"))
    assert {row["finish_reason"] for row in rows} == {"stop"}
    assert {json.loads(row["answer"])["season"] for row in rows} <= {"summer", "winter"}
    assert json.loads(rows[0]["params"])["schema"] == schema


def test_a_folder_that_holds_only_a_card_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("my own\n")
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}])
    assert run(["batch", str(rows), str(out), "--dataset", *SETTINGS]) == 2
    assert "holds no batch" in capsys.readouterr().err
    assert (out / "README.md").read_text() == "my own\n"


def test_a_template_is_filled_from_every_kind_of_file(tmp_path: Path) -> None:
    table = pandas.DataFrame({"a b": ["one", "two"], "n": [1, 2]})
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_parquet(tmp_path / "t.parquet")
    table.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    file = tmp_path / "t.jinja"
    file.write_text('{{ row["a b"] | upper }} of {{ n }}\n')
    for suffix in ("csv", "parquet", "jsonl"):
        rows = read_rows([tmp_path / f"t.{suffix}"], prompt_template(str(file)))
        assert [row.prompt for row in rows] == ["ONE of 1", "TWO of 2"]
        assert all(not row.columns for row in rows)


def test_csv_has_a_column_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text('id,prompt,more\n1,"two\nlines, quoted",x\n2,plain,y\n', encoding="utf-8-sig")
    rows = read_rows([path])
    assert [(row.prompt, row.kept, row.columns) for row in rows] == [
        ("two\nlines, quoted", {"id": "1"}, {}),
        ("plain", {"id": "2"}, {}),
    ]
    assert read_rows([path], keep_columns=True)[0].columns == {"more": "x"}
    path.write_text("question\nx\n")
    with pytest.raises(BacoError, match=r"no column prompt: rename one of question, or give a"):
        read_rows([path])
    path.write_text("prompt\nx,y\n")
    with pytest.raises(BacoError, match=r"line 2: more cells than columns"):
        read_rows([path])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ kinds }}",
            "line 1: the prompt template needs the column 'kinds'; the row has kind, n",
        ),
        ("{{ row.kinds }}", "line 1: the prompt template needs the column 'kinds'"),
        ("{{ kind }}{{ strftime_now('%Y') }}", "needs the column 'strftime_now'"),
        ("{% if n == 2 %}{{ gone }}{% endif %}x", "line 2: the prompt template needs the column"),
        ("{{ kind ", "the prompt template is not valid Jinja: line 1"),
        ("{% if n == 2 %}x{% endif %}", "line 1: the prompt template renders this row as an empty"),
        ("{{ ''.__class__.__mro__ }}", "the prompt template fails on this row: SecurityError"),
        ("no-such-file", "'no-such-file' is neither Jinja text nor a readable file"),
    ],
)
def test_a_template_that_cannot_be_filled_is_one_line_before_any_decoding(
    template: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"kind": "a", "n": 1}, {"kind": "b", "n": 2}])
    # A pair that is not there: the template is checked before any pair is loaded.
    command = ["batch", str(rows), str(tmp_path / "out"), "--pair", "/nowhere", "--dataset"]
    assert run([*command, "--prompt-template", template]) == 2
    stderr = capsys.readouterr().err
    assert message in " ".join(stderr.split()) and stderr.count("baco:") == 1
    assert not (tmp_path / "out").exists()


def test_a_row_whose_id_is_null_has_its_number_as_id(tmp_path: Path) -> None:
    rows: list[dict] = [{"prompt": "a", "id": None}, {"prompt": "b", "id": "b"}]
    path, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out"
    assert run(["batch", str(path), str(out), "--dataset", "-s", "1", "--max-tokens", "2"]) == 0
    read = [json.loads(line) for line in (out / "data/rows-000000000-000000001.jsonl").open()]
    assert [row["id"] for row in read] == ["0", "b"]
