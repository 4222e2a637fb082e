"""A batch in one process: whole shards, with the same bytes however often it was killed."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from baco import Baco
from baco.batch.rows import read_rows
from baco.cli import run
from baco.cli.calibrate import read_prompts
from baco.dataset.dedupe import dedupe
from baco.dataset.files import Dataset
from baco.dataset.near_duplicates import Rule
from baco.evaluation.answer_files import read_answers
from baco.evaluation.methods.answer_file import AnswersOfFile
from baco.evaluation.tasks import load_task
from baco.files import locked
from tests.held import held

PROMPT = "Recommend a summer destination"
# Until a command is taken for stuck; on a busy machine it is slow.
WAIT_SECONDS = 400
BACO = [sys.executable, "-c", "from baco.cli import main; main()"]
DRAWS = ["-n", "2", "-r", "P-Punc:0.4", "-s", "5", "--max-tokens", "12"]


def prompt_file(path: Path, rows: int) -> Path:
    lines = [{"prompt": f"Give me dinner idea {i}", "id": f"dinner-{i}"} for i in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return path


def shards(out: Path) -> dict[str, bytes]:
    """The bytes of every shard, and the manifest's settings; no other file may be there."""
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}
    manifest = json.loads(files.pop("_manifest.json"))
    return files | {"settings": json.dumps(manifest["settings"]).encode()}


def answers(out: Path) -> list[dict]:
    lines = [p.read_text(encoding="utf-8").splitlines() for p in sorted(out.glob("*.jsonl"))]
    return [json.loads(line) for some in lines for line in some]


def wait_for(process: subprocess.Popen, enough: Callable[[], bool]) -> None:
    """Wait until ``enough`` holds; the command must not end before."""
    until = time.monotonic() + WAIT_SECONDS
    while not enough():
        assert time.monotonic() < until
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompt_file(tmp_path_factory.mktemp("in") / "in.jsonl", 9)


@pytest.fixture(scope="module")
def whole(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A batch that was not interrupted."""
    out = tmp_path_factory.mktemp("batches") / "whole"
    assert run(["batch", str(prompts), str(out), *DRAWS, "--shard-rows", "2"]) == 0
    return out


def test_every_prompt_has_its_answers_once_and_as_they_are_alone(whole: Path, demo: Baco) -> None:
    rows = answers(whole)
    assert [row["row"] for row in rows] == list(range(9))
    assert [row["id"] for row in rows] == [f"dinner-{i}" for i in range(9)]
    for row in rows[::4]:
        alone = demo.generate(row["prompt"], n=2, router="P-Punc:0.4", seed=5, max_tokens=12)
        assert [sample["text"] for sample in row["samples"]] == [c.text for c in alone]
        assert [sample["sources"] for sample in row["samples"]] == [list(c.sources) for c in alone]


def test_a_shard_is_named_after_its_rows(whole: Path) -> None:
    assert sorted(path.name for path in whole.glob("rows-*")) == [
        f"rows-{a:09d}-{b:09d}.jsonl" for a, b in ((0, 1), (2, 3), (4, 5), (6, 7), (8, 8))
    ]


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_batch_is_resumed_and_ends_with_the_same_bytes(
    kill: signal.Signals, prompts: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    command = ["batch", str(prompts), str(out), *DRAWS, "--shard-rows", "2"]
    held_command = held(command, f"len([*Path({str(out)!r}).glob('rows-*')]) >= 2")
    process = subprocess.Popen(held_command, stderr=subprocess.PIPE, text=True)
    wait_for(process, lambda: len(list(out.glob("rows-*"))) >= 2)
    process.send_signal(kill)
    _, stderr = process.communicate()
    assert process.returncode == (-9 if kill == signal.SIGKILL else 130)
    assert "Traceback" not in stderr
    written = {path.name: path.stat().st_mtime_ns for path in out.glob("rows-*")}
    assert 2 <= len(written) < 5
    (out / ".rows-000000008-000000008.jsonl.0.partial").write_text('{"row": 8, "id')
    assert run(command) == 0
    assert shards(out) == shards(whole)
    again = {name: (out / name).stat().st_mtime_ns for name in written}
    assert again == written, "a finished shard was written again"


def test_a_finished_batch_is_left_alone(prompts: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.glob("rows-*")}
    assert run(["batch", str(prompts), str(whole), *DRAWS, "--shard-rows", "2"]) == 0
    assert {path: path.stat().st_mtime_ns for path in whole.glob("rows-*")} == before


def test_a_seed_of_chance_is_kept(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["batch", str(prompts), str(out), "-r", "Aligned", "--max-tokens", "4"]
    command += ["--shard-rows", "3"]
    assert run(command) == 0
    before = shards(out)
    next(out.glob("rows-*")).unlink()
    assert run(command) == 0
    assert shards(out) == before


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["-s", "6"], "(seed)"),
        (["--max-tokens", "9"], "(max_tokens)"),
        (["--shard-rows", "3"], "(rows_a_shard)"),
        (["--format", "parquet"], "(shards)"),
        (["--threads", "2"], "(threads)"),
        (["--base-template", "{{ messages[-1].content }}:"], "(fingerprint)"),
    ],
)
def test_a_directory_of_other_settings_is_refused(
    more: list[str],
    named: str,
    prompts: Path,
    whole: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = shards(whole)
    assert run(["batch", str(prompts), str(whole), *DRAWS, "--shard-rows", "2", *more]) == 2
    stderr = capsys.readouterr().err
    assert named in stderr and "other settings" in stderr
    assert shards(whole) == before


def test_other_prompts_are_other_settings(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = prompt_file(tmp_path / "in.jsonl", 8)
    assert run(["batch", str(other), str(whole), *DRAWS, "--shard-rows", "2"]) == 2
    assert "(prompts, rows)" in capsys.readouterr().err


def test_files_folders_tables_and_lines_of_text_are_read_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "b.txt").write_text("one\n\n two \n")
    chat = [{"role": "user", "content": "three"}]
    table = pa.table({"messages": [chat], "id": [7], "more": ["left out"]})
    pq.write_table(table, folder / "c.parquet")
    (folder / "notes.md").write_text("no prompts")
    alone = prompt_file(tmp_path / "a.jsonl", 1)
    rows = read_rows([folder, alone])
    assert [(row.prompt, row.kept) for row in rows] == [
        ("one", {}),
        ("two", {}),
        (chat, {"id": 7}),
        ("Give me dinner idea 0", {"id": "dinner-0"}),
    ]


def test_file_names_with_upper_case_endings_are_read_as_with_lower_case(tmp_path: Path) -> None:
    (tmp_path / "A.CSV").write_text("prompt,answer\none,x\n")
    (tmp_path / "B.JSONL").write_text('{"prompt": "two"}\n')
    (tmp_path / "C.Txt").write_text("three\n")
    pq.write_table(pa.table({"prompt": ["four"]}), tmp_path / "D.PARQUET")
    table, *_ = paths = sorted(tmp_path.iterdir())
    assert [row.prompt for row in read_rows([tmp_path])] == ["one", "two", "three", "four"]
    assert [read_prompts(path) for path in paths] == [["one"], ["two"], ["three"], ["four"]]
    tasks = [load_task(str(path)) for path in paths]
    assert [task.prompts[0].text for task in tasks] == ["one", "two", "three", "four"]
    assert AnswersOfFile.names(table.name)
    assert list(read_answers(table).answers) == [["x"]]
    dedupe(Dataset.open(table, nested=False), tmp_path / "out", Rule(), lambda _: None, {})
    assert (tmp_path / "out" / "data" / "A.CSV").read_text() == "prompt,answer\none,x\n"


def test_an_error_in_a_file_of_another_ending_says_how_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.tsv").write_text("prompt\tmore\none\tx\n")
    assert run(["batch", str(tmp_path / "in.tsv"), str(tmp_path / "out")]) == 2
    assert "in.tsv is read as JSON lines" in " ".join(capsys.readouterr().err.split())


def test_parquet_shards_hold_the_rows_of_json_lines(
    prompts: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["batch", str(prompts), str(out), *DRAWS, "--shard-rows", "2"]
    assert run([*command, "--format", "parquet"]) == 0
    rows = pq.read_table(out).to_pylist()
    for row, record in zip(sorted(rows, key=lambda row: row["row"]), answers(whole), strict=True):
        for sample, same in zip(row["samples"], record["samples"], strict=True):
            assert sample.pop("logprobs") == pytest.approx(same.pop("logprobs"), abs=1e-5)
            # Columns of every row; JSON has them only where there is an error or a thinking.
            for name in ("error", "thinking", "thinking_tokens"):
                assert sample.pop(name) is None
            assert sample == same
        assert json.loads(row["params"]) == record["params"]
        names = ("row", "id", "prompt", "pair", "weights", "router", "seed")
        assert {name: row[name] for name in names} == {name: record[name] for name in names}
    flat = f"select id, unnest(samples).text as text from '{out}/*.parquet' order by row"
    assert duckdb.sql(flat).fetchall()[1] == ("dinner-0", answers(whole)[0]["samples"][1]["text"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "x"}\nnonsense\n', "in.jsonl, line 2: give a JSON object"),
        ('{"prompt": ""}\n', "line 1: the prompt is empty"),
        ('{"prompt": "x"}\n[]\n\n{"messages": []}\n', "line 2: give a JSON object"),
        ('{"prompt": "x"}\n[]\n\n{"messages": []}\n', "1 more bad: line 4"),
        ('{"prompt": "x"}\n{"prompt": "' + "word " * 600 + '"}\n', "line 2: prompt of 6"),
        ("\n", "holds no prompt"),
    ],
)
def test_invalid_rows_are_named_before_the_first_answer(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out"
    path.write_text(text)
    assert run(["batch", str(path), str(out), "-r", "Aligned"]) == 2
    stderr = capsys.readouterr().err
    assert message in " ".join(stderr.split()) and stderr.count("baco:") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.jsonl", "out"], "cannot read no.jsonl: No such file"),
        (["in.jsonl", "."], "holds no batch: choose another directory"),
        (["in.jsonl", "in.jsonl"], "holds no batch: choose another directory"),
        (["in.jsonl", "s3://bucket/out"], "s3://… is not a folder: mount that storage"),
        (["in.jsonl", "out", "--format", "csv"], "use one of jsonl, parquet"),
        (
            ["in.jsonl", "out", "--backend", "slurm"],
            "one of local, llamacpp, remote, vllm, ray",
        ),
        (["in.jsonl", "out", "--backend", "ray", "--replica", "ray"], "unknown replica 'ray'"),
        (["in.jsonl", "out", "--workers", "2"], "give --backend ray with them"),
        (["in.jsonl", "out", "--backend", "ray", "--workers", "0"], "workers is 0: give 1 or more"),
        (["in.jsonl", "out", "--threads", "0"], "threads is 0: give 1 or more"),
        (["in.jsonl", "out", "--shard-rows", "0"], "shard-rows is 0: give 1 or more"),
        (["in.jsonl", "out", "--pair", "nobody"], "nobody"),
        (["in.jsonl", "out", "-r", "Nobody:1"], "Nobody"),
    ],
)
def test_invalid_arguments_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    prompt_file(tmp_path / "in.jsonl", 1)
    assert run(["batch", *arguments]) == 2
    stderr = capsys.readouterr().err
    assert message in " ".join(stderr.split()) and stderr.count("baco:") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_two_commands_do_not_write_to_one_directory(
    prompts: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(whole):
        assert run(["batch", str(prompts), str(whole), *DRAWS, "--shard-rows", "2"]) == 2
    assert "another process writes" in capsys.readouterr().err


def test_a_log_shows_how_far_a_batch_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = prompt_file(tmp_path / "in.jsonl", 4), tmp_path / "out"
    command = ["batch", str(path), str(out), "-r", "Aligned", "-s", "1", "--max-tokens", "4"]
    command += ["--shard-rows", "1"]
    assert run(command) == 0
    assert " to go" not in capsys.readouterr().err, "a short batch needs no lines"
    for shard in sorted(out.glob("rows-*"))[2:]:
        shard.unlink()
    monkeypatch.setattr("baco.cli.progress.LINE_EVERY", 0)
    assert run(command) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "2 of 4 prompts were done before: going on"
    assert [line.split(" tokens/s")[0].split(",")[0] for line in lines[1:3]] == [
        "3 of 4 prompts",
        "4 of 4 prompts",
    ]
    assert all(re.search(r", \d+ tokens/s, \d:\d\d:\d\d to go$", line) for line in lines[1:3])
