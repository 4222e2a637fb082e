"""``baco study``: one clear line for bad input, and what the commands write."""

import json
import math
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from baco.cli import run as baco
from baco.study.study import Study
from tests.studies import METHODS, fill, made_study, write_run


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command is refused."""
    capsys.readouterr()
    assert baco(["study", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_plan_takes_methods_by_name_and_prints_its_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run")
    out = tmp_path / "study"
    command = [tmp_path / "run", "--methods", "P-Punc:0.4", "aligned", "base", "--prompts", 8]
    assert baco(["study", "plan", *map(str, command), "--out", str(out)]) == 0
    study = Study.open(out)
    assert capsys.readouterr().out == f"plan {study.plan.hash}\n"
    assert study.plan.methods == ("P-Punc:0.4", "Aligned T=1", "Base T=1")
    assert (study.plan.origin.task, study.plan.origin.pair) == ("trips", "demo")
    study.close()


def test_texts_of_raters_can_be_the_labs_own(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    consent = tmp_path / "consent.txt"
    consent.write_text("Our study.\nIt is short.\n\nAsk ethics@example.org.\n", encoding="utf-8")
    command = ["study", "plan", tmp_path / "run", "-m", "aligned", "-m", "base", "--prompts", 3]
    more = ["--consent", consent, "--out", tmp_path / "study"]
    assert baco([*map(str, command), *map(str, more)]) == 0
    study = Study.open(tmp_path / "study")
    assert study.plan.consent == ("Our study. It is short.", "Ask ethics@example.org.")
    study.close()


BAD_PLANS: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "no run": (lambda run: None, [], "holds no run"),
    "no texts": (
        lambda run: (write_run(run).path / "samples.jsonl").write_text("", encoding="utf-8"),
        [],
        "holds no answers of these methods yet: let 'baco sweep' finish",
    ),
    "empty texts": (
        lambda run: write_run(run, text=lambda *_: " "),
        [],
        "all answers of Aligned T=1 are empty",
    ),
    "a method without some prompts": (
        lambda run: _without(write_run(run).path, "Base T=1", "trip-3"),
        [],
        "Base T=1 has no answers to 1 of 12 prompts (such as 'trip-3')",
    ),
    "too few answers": (
        lambda run: write_run(run, n=5),
        [],
        "has 5 answers to a prompt: sets of 5 and one answer beside them need 6",
    ),
    "too few prompts": (write_run, ["--prompts", "13"], "has 12 prompts"),
    "an unknown method": (write_run, ["-m", "P-Punk:0.4"], "name one such as P-Punc:0.4"),
    "one method": (write_run, ["--methods", "base"], "two or more methods of the run: name them"),
    "an unknown task": (write_run, ["-t", "poems"], "the run has no task 'poems': it has trips"),
    "an unknown pair": (write_run, ["-p", "qwen"], "the run has no pair 'qwen': it has demo"),
    "a set size": (write_run, ["--set-size", "7"], "--set-size is 7: give 4, 5 or 6"),
    "no raters": (write_run, ["--raters", "0"], "--raters is 0: give 1 or more"),
    "creativity": (write_run, ["--creativity", "both"], "use set or answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PLANS)
def test_a_plan_that_cannot_be_is_refused_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, more, message = BAD_PLANS[name]
    write(tmp_path / "run")
    methods = [] if name == "one method" else ["-m", "aligned", "-m", "base"]
    prompts = [] if "--prompts" in more else ["--prompts", "3"]
    arguments = [tmp_path / "run", *methods, *prompts, *more, "--out", tmp_path / "study"]
    assert message in refused(capsys, "plan", *arguments)
    assert not (tmp_path / "study").exists()


def _without(run: Path, method: str, prompt: str) -> None:
    path = run / "samples.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = ((line, json.loads(line)) for line in lines)
    kept = [line for line, row in rows if (row["setting"], row["prompt"]) != (method, prompt)]
    path.write_text("".join(kept), encoding="utf-8")


def test_another_plan_does_not_replace_one_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = made_study(tmp_path)
    study.close()
    command = [tmp_path / "run", "-m", "aligned", "-m", "base", "--prompts", 3]
    line = refused(capsys, "plan", *command, "--out", study.path)
    assert "holds a study with another plan" in line


EQUIVALENCE = {
    "id": "no-loss",
    "question": "quality_rating",
    "treatment": METHODS[0],
    "control": METHODS[1],
    "test": "equivalence",
    "hypothesis": "They are equally good.",
}
BAD_FIELDS = {
    "an unknown field": ({"colour": "red"}, "plan has a field 'colour', which is unknown"),
    "a missing field": ({"raters": None}, "plan.raters is null: give a whole number"),
    "a wrong type": ({"raters": "many"}, 'plan.raters is "many": give a whole number'),
    "a wrong number": ({"raters": 0}, "the plan's raters is 0: give 1 or more"),
    "another format": ({"format": 9}, "the plan has another format"),
    "a method that is unknown": ({"methods": ["a", "b"]}, "the plan names method"),
    "a stimulus that is unknown": ({"stimuli": []}, "the plan names stimulus"),
    "a reading speed of zero": (
        {"checks": {"words_per_second": 0}},
        "the plan's words_per_second is 0: give a number above 0",
    ),
    "a number that is none": (
        {"checks": {"words_per_second": math.nan}},
        "plan.checks.words_per_second is NaN: give a number",
    ),
    "a negative margin": (
        {"contrasts": [EQUIVALENCE | {"margin": -0.5}]},
        "contrast 'no-loss' tests equivalence: give it a margin above 0",
    ),
    "a nested field": ({"checks": {"equal": "no"}}, 'plan.checks.equal is "no"'),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_a_plan_that_was_edited_wrongly_is_refused_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = made_study(tmp_path)
    study.close()
    fields, message = BAD_FIELDS[name]
    path = study.path / "plan.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(value | fields), encoding="utf-8")
    assert message in refused(capsys, "status", study.path)


def test_a_plan_that_lacks_a_comparison_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = made_study(tmp_path)
    study.close()
    path = study.path / "plan.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    value["items"] = [item for item in value["items"] if item["id"] != value["items"][0]["id"]]
    path.write_text(json.dumps(value), encoding="utf-8")
    line = refused(capsys, "status", study.path)
    assert f"the plan has no comparison of {METHODS[0]} and {METHODS[1]} (unit set)" in line


def test_a_plan_changed_after_data_is_refused_by_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = made_study(tmp_path)
    fill(study, 1)
    study.close()
    path = study.path / "plan.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(value | {"raters": 9}), encoding="utf-8")
    for command in ("status", "serve"):
        assert "was changed after the first answer" in refused(capsys, command, study.path)
    assert baco(["study", "amend", str(study.path), "--reason", "more raters"]) == 0
    assert "version 2" in capsys.readouterr().out
    assert "needs a reason" in refused(capsys, "amend", study.path, "--reason", " ")


def test_a_folder_without_a_study_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "holds no study" in refused(capsys, "status", tmp_path)
    assert "holds no study" in refused(capsys, "serve", tmp_path / "none")


def test_a_port_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = made_study(tmp_path)
    study.close()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(capsys, "serve", study.path, "--port", port)
    assert f"cannot listen at 127.0.0.1:{port}" in line
    assert "give another --host or --port" in line


def test_a_study_with_simulated_raters_is_not_served_to_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = made_study(tmp_path)
    study.store.add_rater(origin="simulated", linked=False)
    study.close()
    assert "holds simulated raters" in refused(capsys, "serve", study.path, "--port", 0)


def test_the_status_counts_items_of_raters_and_of_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = made_study(tmp_path, prompts=6, raters=3)
    fill(study, 1)
    study.close()
    assert baco(["study", "status", str(study.path), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    (rater,) = status["raters"]
    assert (rater["state"], rater["items"], rater["of"]) == ("finished", 15, 15)
    assert [(pair["items"], pair["of"]) for pair in status["comparisons"]] == [(2, 6)] * 6
    assert baco(["study", "status", str(study.path)]) == 0
    assert "15/15" in capsys.readouterr().out
