"""One process at a time writes to an output, and the next one checks what is in it."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from baco.batch import answer_file
from baco.batch.rows import read_rows
from baco.cli import run
from baco.cli.chat.lines import Piped
from baco.cli.generate import _prompt
from baco.cli.options import StructureOptions
from baco.cli.study import _paragraphs
from baco.dataset.figures import schema_check
from baco.demo.recipe import Recipe
from baco.demo.train import train
from baco.errors import BacoError
from baco.evaluation.answer_files import read_answers
from baco.evaluation.store import Run
from baco.evaluation.sweep import resume
from baco.files import locked, read_csv, write_atomic, write_output
from baco.study.importing import import_judgments
from baco.text.prompts import template_source
from tests.held import held, lines_in
from tests.test_sweep import drawn, small_plan

MARK = "\ufeff"
DRAWS = ["-n", "2", "-r", "P-Punc:0.4", "-s", "5", "--max-tokens", "12"]
WAIT_SECONDS = 200


def jsonl_command(prompts: Path, out: Path) -> list[str]:
    return ["generate", "--jsonl", str(prompts), "-o", str(out), *DRAWS]


def batch_command(prompts: Path, out: Path) -> list[str]:
    return ["batch", str(prompts), str(out), *DRAWS]


def sweep_command(prompts: Path, out: Path) -> list[str]:
    chosen = ["--task", str(prompts), "-r", "P-Punc:0.4", "-n", "2", "--max-tokens", "12"]
    return ["sweep", "--out", str(out), *chosen, "--workers", "1", "--no-score"]


def score_command(prompts: Path, out: Path) -> list[str]:
    if not out.joinpath("run.json").exists():
        assert run(sweep_command(prompts, out)) == 0
    return ["score", str(out), "--metric", "distinct_1", "--workers", "1"]


COMMANDS = {
    "generate": jsonl_command,
    "batch": batch_command,
    "sweep": sweep_command,
    "score": score_command,
}

NO_STUDY: Any = None  # a table is read before the study


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    rows = [{"prompt": f"Suggest a hobby for day {day}", "id": day} for day in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def wait_until(enough: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + WAIT_SECONDS
    while not enough():
        assert time.monotonic() < until
        assert process.poll() is None, "it ended before it was stopped"
        time.sleep(0.002)


@contextmanager
def another_process_holds(output: Path) -> "Iterator[subprocess.Popen[str]]":
    code = (
        "import sys, time; from pathlib import Path; from baco.files import locked\n"
        f"with locked(Path({str(output)!r})): print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_command_is_refused_until_the_first_is_killed(
    name: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    if name != "generate":
        out.mkdir()
    command = COMMANDS[name](prompts, out)
    capsys.readouterr()
    with another_process_holds(out) as process:
        assert run(command) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert f"another process writes to {out}: wait until it has ended" in captured.err
        assert captured.err.count("\n") == 1
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert run(command) == 0


def test_two_runs_on_one_output_write_every_line_once(prompts: Path, tmp_path: Path) -> None:
    """With real commands: the second is refused, the first is killed, a third finishes the work."""
    out = tmp_path / "out.jsonl"
    many = tmp_path / "many.jsonl"
    many.write_text("".join(f'{{"prompt": "Suggest hobby {i}", "id": {i}}}\n' for i in range(60)))
    partial = tmp_path / "out.jsonl.partial"
    command = held(jsonl_command(many, out), lines_in(partial, 3))
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, text=True)
    wait_until(lambda: partial.exists() and partial.read_bytes().count(b"\n") >= 3, first)
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.poll() is None, "it ended before it was stopped"
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1
    assert "another process writes" in second.stderr
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert run(jsonl_command(many, out)) == 0
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == list(range(60))
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl"]


def test_curves_measured_at_once_are_all_kept(tmp_path: Path) -> None:
    out, prompt = tmp_path / "curves.json", tmp_path / "in.txt"
    prompt.write_text("Suggest a hobby\n")
    quick = ["--prompts", str(prompt), "-n", "2", "--max-tokens", "3", "-o", str(out)]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "baco", "calibrate", "-r", router, *quick],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for router in ("H", "Rand")
    ]
    for process in running:
        _, stderr = process.communicate(timeout=WAIT_SECONDS)
        assert process.returncode == 0, stderr
    assert {"H", "Rand"} <= json.loads(out.read_text())["curves"].keys()


def test_a_calibration_of_another_pair_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "curves.json"
    out.write_text('{"pair": "qwen", "curves": {}}')
    assert run(["calibrate", "-r", "H", "-o", str(out)]) == 2
    assert "holds the calibration of qwen" in capsys.readouterr().err
    assert out.read_text() == '{"pair": "qwen", "curves": {}}'


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    with locked(tmp_path / "work"), pytest.raises(ValueError, match="another process writes"):
        train(tmp_path, progress=False, recipe=Recipe())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
        lambda lines: [lines[0], lines[1], lines[2].replace(b"day 1", b"day 7"), *lines[3:]],
        lambda lines: [lines[0], lines[1], b"\0" * len(lines[2]) + b"\n", *lines[3:]],
        lambda lines: [lines[0], lines[1], lines[2], lines[2], *lines[3:], *lines[1:]],
        lambda lines: [*lines, b"{}\n", b"left over"],
    ],
    ids=["swapped", "another prompt", "zeros", "doubled", "too many"],
)
def test_lines_with_answers_to_other_prompts_are_answered_again(
    spoil: Callable[[list[bytes]], list[bytes]],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answer_file, "ANSWERS_A_WRITE", 2)  # one prompt a write
    whole, spoilt = tmp_path / "whole.jsonl", tmp_path / "spoilt.jsonl"
    with monkeypatch.context() as context:
        context.setattr(answer_file.AnswerFile, "finish", lambda _: None)
        assert run(jsonl_command(prompts, whole)) == 0
    lines = (tmp_path / "whole.jsonl.partial").read_bytes().splitlines(keepends=True)
    (tmp_path / "spoilt.jsonl.partial").write_bytes(b"".join(spoil(list(lines))))
    assert run(jsonl_command(prompts, spoilt)) == 0
    assert spoilt.read_bytes() == b"".join(lines[1:])


def test_samples_and_scores_out_of_order_are_made_again(tmp_path: Path) -> None:
    plan = small_plan()
    sweep_run = drawn(plan, tmp_path / "run")
    assert run(["score", str(sweep_run.path), "--metric", "distinct_1", "--workers", "1"]) == 0
    files = [sweep_run.path / "samples.jsonl", sweep_run.score_file("distinct_1")]
    whole = [file.read_bytes() for file in files]
    for file, data in zip(files, whole, strict=True):
        lines = data.splitlines(keepends=True)
        file.write_bytes(b"".join([*lines[:7], lines[8], lines[7], *lines[9:]]))
    assert len(resume(Run.open(sweep_run.path), plan)) == len(plan.settings) - 1
    drawn(plan, sweep_run.path)
    assert run(["score", str(sweep_run.path), "--metric", "distinct_1", "--workers", "1"]) == 0
    assert [file.read_bytes() for file in files] == whole


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("prompt,answer,prompt\na,b,c\n", "has several columns 'prompt': rename them"),
        ("prompt,answer\na,b,c\n", "line 2: more cells than columns"),
        ('prompt,answer\na,"b\n', "line 2: unexpected end of data"),
    ],
)
@pytest.mark.parametrize(
    "read",
    [lambda path: read_rows([path]), read_answers, lambda path: import_judgments(NO_STUDY, path)],
    ids=["rows", "answers", "judgments"],
)
def test_a_damaged_table_is_one_line_wherever_tables_are_read(
    read: Callable[[Path], object], table: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "table.csv"
    path.write_text(table)
    with pytest.raises(BacoError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_columns_without_a_name_and_rows_that_end_early_are_read() -> None:
    columns, rows = read_csv(io.StringIO("prompt,,id,\na,x,1,y\nb\n"), "t.csv")
    assert columns == ["prompt", "", "id", ""]
    assert list(rows) == [(2, {"prompt": "a", "": "y", "id": "1"}), (3, {"prompt": "b"})]


def test_a_written_file_keeps_its_link_and_replaces_no_device(tmp_path: Path) -> None:
    file, link, pipe = tmp_path / "a", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(file)
    write_atomic(link, "new")
    assert link.is_symlink() and file.read_text() == "new"
    os.mkfifo(pipe)
    with pytest.raises(BacoError, match=r"cannot write .*pipe: it is not a regular file"):
        write_output(pipe, "new")
    assert pipe.is_fifo() and {path.name for path in tmp_path.iterdir()} == {"a", "link", "pipe"}


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file grows beyond some bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_the_same_command_continues(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"answer": f"answer {i}"}) + "\n" for i in range(100)))
    commands = [sweep_command(prompts, tmp_path / "run")]
    commands.append(["dataset", "dedupe", str(rows), str(tmp_path / "copy")])
    for command in commands:
        capsys.readouterr()
        with small_disk(4000):
            assert run(command) == 2
        assert "baco: cannot write" in capsys.readouterr().err
        assert run(command) == 0
    assert len((tmp_path / "copy/data/rows.jsonl").read_text().splitlines()) == 100
    assert len(list(Run.open(tmp_path / "run").samples())) == 10


@pytest.mark.parametrize("command", ["batch", "sweep"])
def test_a_manifest_without_settings_is_refused_in_one_line(
    command: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(COMMANDS[command](prompts, out)) == 0
    manifest = out / {"batch": "_manifest.json", "sweep": "run.json"}[command]
    manifest.write_text(json.dumps({"format": json.loads(manifest.read_text())["format"]}))
    capsys.readouterr()
    assert run(COMMANDS[command](prompts, out)) == 2
    assert f"{manifest.name} is damaged: it has no settings" in capsys.readouterr().err


def test_the_byte_order_mark_of_a_file_or_pipe_is_no_part_of_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "marked"

    def marked(text: str) -> Path:
        path.write_text(MARK + text, encoding="utf-8")
        return path

    assert template_source(str(marked("About {{ topic }}"))) == "About {{ topic }}"
    assert StructureOptions(schema=marked('{"type": "integer"}')).settings() == {
        "schema": {"type": "integer"}
    }
    assert StructureOptions(grammar=marked('start: "a"')).settings() == {"grammar": 'start: "a"'}
    assert schema_check(marked('{"type": "integer"}'))(1) is None
    assert _paragraphs(marked("Thank you.\n\nBegin.")) == ["Thank you.", "Begin."]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{MARK}A joke\n"))
    assert _prompt("-") == "A joke"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{MARK}\n/help\n"))
    assert Piped().read() == "/help"
