"""A sweep writes every sample once, with the same bytes however often it was killed."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import duckdb
import pandas
import pytest

from baco.batch.job import processes
from baco.cli import run as baco_run
from baco.evaluation.methods import Grid, select_settings
from baco.evaluation.plan import PairSpec, Plan
from baco.evaluation.records import Sample
from baco.evaluation.score import requested_metrics, score
from baco.evaluation.store import Run, begin
from baco.evaluation.sweep import resume, sweep
from baco.evaluation.tasks import load_task
from baco.files import locked
from tests import serving
from tests.held import held, lines_in
from tests.pairs import PairFolder
from tests.serving import WAIT, alive

BACO = [sys.executable, "-c", "from baco.cli import main; main()"]
SMALL = ["--limit", "3", "-n", "2", "--seed", "5", "--max-tokens", "12"]
SETTINGS = ["--method", "mixing", "--router", "P-Punc:0.4", "--router", "Rand:0.5"]
LEXICAL = ["--metric", "distinct_1", "--metric", "self_bleu"]


def call(*arguments: str) -> None:
    done = subprocess.run([*BACO, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def small_plan(tasks: tuple[str, ...] = ("demo",), n: int = 2) -> Plan:
    grid = Grid("quick", n)
    return Plan(
        pairs=[PairSpec("demo")],
        tasks=[load_task(name, 3) for name in tasks],
        settings=select_settings(["mixing"], ["P-Punc:0.4", "Rand:0.5"], grid),
        n=n,
        seed=5,
        sampling={"max_tokens": 12},
    )


def drawn(plan: Plan, path: Path) -> Run:
    run = begin(path, plan.config(), {task.name: task.prompts for task in plan.tasks})
    sweep(run, plan)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was not interrupted."""
    return drawn(small_plan(), tmp_path_factory.mktemp("runs") / "whole")


def bytes_of(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in [path / "samples.jsonl", *path.glob("scores/*")]}


def test_a_run_holds_every_sample_once_in_the_order_of_the_plan(whole: Run) -> None:
    plan = small_plan()
    keys = [(s.method, s.setting, s.prompt, s.sample) for s in whole.samples()]
    assert keys == [
        (setting.method, setting.label, prompt.id, sample)
        for setting in plan.settings
        for prompt in plan.tasks[0].prompts
        for sample in range(2)
    ]
    assert whole.complete and whole.expected == len(keys)


def test_pieces_join_to_the_text_and_no_clock_is_in_the_samples(whole: Run) -> None:
    names = set(Sample.__dataclass_fields__)
    for line in (whole.path / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        assert set(json.loads(line)) == names
    for sample in whole.samples():
        assert "".join(text for text, _ in sample.pieces) == sample.text
    speed = list(whole.speed())
    assert len(speed) == len(list(whole.groups()))
    assert all(row["seconds"] > 0 or row["method"] == "mixing" for row in speed)


def test_the_directory_describes_itself(whole: Run) -> None:
    again = Run.open(whole.path)
    assert again.settings == small_plan().settings
    assert again.config["made"].keys() >= {"baco", "git", "python", "torch", "machine"}
    task = load_task("demo", 3)
    assert list(again.prompts().values()) == list(task.prompts)
    for group in again.groups():
        assert group.prompt in task.prompts and len(group.texts) == 2


def test_a_run_keeps_the_command_that_began_it(tmp_path: Path) -> None:
    prompts = tmp_path / "my prompts.txt"
    prompts.write_text("Name a colour.", encoding="utf-8")
    run = tmp_path / "run"
    begun = ["sweep", "-t", str(prompts), "-r", "P-Punc:0.4", "-n", "2", "--max-tokens", "4"]
    assert baco_run([*begun, "--no-score", "--workers", "1", "-o", str(run)]) == 0
    # Another command may go on with it: it is the first that the samples come of.
    assert baco_run([*begun, "--metric", "distinct_1", "--workers", "1", "-o", str(run)]) == 0
    typed = shlex.split(Run.open(run).config["made"]["command"])
    assert typed == ["baco", *begun, "--no-score", "--workers", "1", "-o", str(run)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_is_the_same_however_many_work_at_it(
    whole: Run, tmp_path: Path, workers: int
) -> None:
    plan = small_plan()
    run = begin(tmp_path / "r", plan.config(), {t.name: t.prompts for t in plan.tasks})
    sweep(run, plan, processes(workers))
    assert bytes_of(run.path) == bytes_of(whole.path)


def test_a_sweep_resumed_from_any_remains_ends_the_same(whole: Run, tmp_path: Path) -> None:
    """Files may be cut anywhere, also inside a line or character; speeds may be one job ahead."""
    plan, samples = small_plan(), (whole.path / "samples.jsonl").read_bytes()
    speed = (whole.path / "speed.jsonl").read_bytes()
    path = tmp_path / "r"
    begin(path, plan.config(), {t.name: t.prompts for t in plan.tasks})
    for cut in (0, 1, len(samples) // 3, len(samples) // 2 + 7, len(samples) - 1, len(samples)):
        (path / "samples.jsonl").write_bytes(samples[:cut])
        (path / "speed.jsonl").write_bytes(speed)
        run = Run.open(path)
        sweep(run, plan)
        assert (path / "samples.jsonl").read_bytes() == samples
        assert len(list(run.speed())) == len(list(run.groups()))


def test_a_resumed_sweep_draws_no_sample_twice(whole: Run, tmp_path: Path) -> None:
    plan, path = small_plan(), tmp_path / "r"
    run = begin(path, plan.config(), {t.name: t.prompts for t in plan.tasks})
    lines = (whole.path / "samples.jsonl").read_bytes().splitlines(keepends=True)
    for there in (2 * 6 + 3, 2 * 6):  # in the middle of a job, and just after one
        (path / "samples.jsonl").write_bytes(b"".join(lines[:there]))
        assert len(resume(run, plan)) == len(plan.settings) - 2
        assert (path / "samples.jsonl").read_bytes() == b"".join(lines[: 2 * 6])


def wait_for(process: subprocess.Popen[bytes], enough: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while process.poll() is None and not enough() and time.monotonic() < deadline:
        time.sleep(0.005)


def rows_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_run_killed_at_several_points_has_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL to a real process, before the first sample, between jobs and during scoring."""
    command = ["sweep", *SMALL, *SETTINGS, *LEXICAL]
    call(*command, "--workers", "1", "--out", str(tmp_path / "whole"))
    killed = tmp_path / "killed"
    samples = killed / "samples.jsonl"
    points: list[tuple[str, Callable[[], bool]]] = [
        ("True", (killed / "run.json").exists),
        (lines_in(samples, 6), lambda: rows_of(samples) >= 6),
        (lines_in(samples, 18), lambda: rows_of(samples) >= 18),
        ("False", (killed / "scores" / "distinct_1.jsonl").exists),
    ]
    kills = 0
    for when, enough in points:
        process = subprocess.Popen(
            held([*command, "--workers", "1", "--out", str(killed)], when),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(process, enough)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 3, "the runs ended before they were killed: the test shows nothing"
    call(*command, "--workers", "1", "--out", str(killed))
    assert bytes_of(killed) == bytes_of(tmp_path / "whole")
    assert not list(killed.rglob("*.partial"))


def test_workers_end_with_a_killed_sweep(tmp_path: Path) -> None:
    out = tmp_path / "r"
    process = subprocess.Popen(
        [*BACO, "sweep", *SMALL, "-n", "40", "--workers", "2", "--no-score", "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(process, lambda: rows_of(out / "samples.jsonl") >= 6)
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    children = [int(pid) for pid in listed.stdout.split()]
    process.kill()
    process.wait()
    assert len(children) >= 2
    serving.wait_for(lambda: not any(alive(pid) for pid in children))


def test_a_run_of_other_settings_is_refused(whole: Run, tmp_path: Path) -> None:
    for changed, name in (
        (replace(small_plan(), seed=6), "seed"),
        (small_plan(n=3), "n"),
        (small_plan(("demo-facts",)), "tasks"),
    ):
        with pytest.raises(ValueError, match=rf"begun with other settings \(.*{name}"):
            begin(whole.path, changed.config(), {})
    (tmp_path / "thesis.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no run"):
        begin(tmp_path, small_plan().config(), {})


def test_a_run_killed_while_it_was_begun_is_begun_again(whole: Run, tmp_path: Path) -> None:
    for left in (
        ["prompts.jsonl.partial"],
        ["prompts.jsonl"],
        ["prompts.jsonl", "run.json.partial"],
    ):
        path = tmp_path / str(len(left)) / left[-1]
        path.mkdir(parents=True)
        for name in left:
            (path / name).write_text("{", encoding="utf-8")
        plan = small_plan()
        run = begin(path, plan.config(), {task.name: task.prompts for task in plan.tasks})
        assert run.prompts() == whole.prompts()


def test_two_sweeps_do_not_write_to_one_run(whole: Run) -> None:
    with locked(whole.path), pytest.raises(ValueError, match="another"), locked(whole.path):
        pass


def test_one_run_may_have_several_pairs_and_tasks(
    random_pair: Callable[..., PairFolder], tmp_path: Path
) -> None:
    folder = random_pair("llama")
    other = str(Path(folder.base).parent)
    plan = Plan(
        pairs=[PairSpec("demo"), PairSpec(other)],
        tasks=[load_task("demo", 2), load_task("demo-facts", 2)],
        settings=select_settings([], ["P:0.5"], Grid("quick", 2)),
        n=2,
        seed=1,
        sampling={"max_tokens": 8},
    )
    run = drawn(plan, tmp_path / "r")
    assert [(g.pair, g.task) for g in run.groups()] == [
        (pair, task)
        for pair in ("demo", other)
        for task in ("demo", "demo-facts")
        for _ in range(2)
    ]
    refused = score(run, requested_metrics(run, ["accuracy", "reward"], {}), workers=1)
    assert not refused and run.metrics() == ["accuracy", "reward"]
    assert {row["task"] for row in run.scores("accuracy")} == {"demo-facts"}
    assert len(list(run.scores("reward"))) == 8


def test_pandas_and_duckdb_open_the_exports_of_a_run(tmp_path: Path) -> None:
    out = tmp_path / "r"
    code = baco_run(
        ["sweep", *SMALL, *SETTINGS, *LEXICAL, "--workers", "1", "--out", str(out), "--json"]
    )
    assert code == 0
    run = Run.open(out)
    samples = pandas.read_parquet(out / "samples.parquet")
    assert samples["text"].tolist() == [sample.text for sample in run.samples()]
    assert samples["category"].notna().all()
    means = duckdb.sql(
        f"select metric, setting, threshold, avg(value) from '{out}/scores.parquet' "
        "where metric = 'distinct_1' and method = 'P-Punc' group by all"
    ).fetchall()
    rows = [r["value"] for r in run.scores("distinct_1") if r["method"] == "P-Punc"]
    assert means == [
        ("distinct_1", "P-Punc:0.4", 0.4, pytest.approx(sum(rows) / len(rows), abs=1e-9))
    ]
    pieces = duckdb.sql(f"select pieces from '{out}/samples.parquet' limit 1").fetchall()
    assert set(pieces[0][0][0]) == {"text", "source"}


def test_a_prompt_that_does_not_fit_is_refused_and_earlier_samples_are_kept(tmp_path: Path) -> None:
    prompts = tmp_path / "long.txt"
    prompts.write_text("word " * 2000, encoding="utf-8")
    out = tmp_path / "r"
    arguments = ["sweep", *SMALL, "--task", str(prompts), "-r", "P:0.5", "--out", str(out)]
    assert baco_run([*arguments, "--workers", "1", "--no-score"]) == 2
    assert os.path.exists(out / "run.json")  # noqa: PTH110


def test_a_prompt_with_missing_samples_is_not_scored(whole: Run, tmp_path: Path) -> None:
    run = begin(tmp_path / "r", small_plan().config(), {"demo": small_plan().tasks[0].prompts})
    lines = (whole.path / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (run.path / "samples.jsonl").write_bytes(b"".join(lines[:5]))
    assert [len(group.samples) for group in run.groups()] == [2, 2]
