"""``baco study power``, ``simulate`` and ``report``, and ``baco report --study``."""

import json
import sys
from pathlib import Path

import pytest

from baco.cli import run as baco
from baco.study.schedule import schedule
from baco.study.study import Study
from tests.studies import answer, made_study, write_run

FAST = ["--studies", "60", "--prompt-spread", "0.5", "--rater-spread", "0.3"]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    new_study = made_study(tmp_path, prompts=9, raters=6)
    new_study.close()
    return new_study.path


def printed(
    capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0
) -> tuple[str, str]:
    """Standard output and standard error of a command."""
    capsys.readouterr()
    assert baco(["study", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_power_warns_of_a_plan_below_eighty_percent(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = printed(capsys, "power", study, *FAST, "--effect", "0.6")
    assert out.split()[:7] == ["contrast", "planned", "power", "alone", "needs", "raters", "or"]
    assert max(map(len, out.splitlines())) <= 80
    assert "For 80% a contrast needs these raters" in err
    assert "diversity-1" in out
    assert "warning: diversity-1 has a power of" in err
    assert "plan" in err
    out, err = printed(capsys, "power", study, *FAST, "--effect", "0.95", "--json")
    powers = {c["id"]: c for c in json.loads(out)["contrasts"]}
    assert powers["diversity-1"]["sufficient"]
    assert powers["diversity-1"]["judgments"] == 18
    assert "diversity-1 has" not in err


def test_power_is_estimated_from_a_pilot(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pilot = made_study(tmp_path / "pilot", prompts=9, raters=9)
    pilot.close()
    printed(capsys, "simulate", pilot.path, "--raters", 9, "--ties", "0.5")
    _, err = printed(capsys, "power", study, *FAST, "--pilot", pilot.path)
    assert "from the pilot: rater spread" in err
    _, err = printed(capsys, "power", study, "--pilot", study, code=2)
    assert "the pilot has no pair of methods" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--effect", "1.5"], "--effect is 1.5: give a number from 0.02 to 0.98"),
        (["--excluded", "1"], "--excluded is 1: give a share from 0 to less than 1"),
        (["--studies", "0"], "--studies is 0: give 1 or more"),
    ],
)
def test_power_refuses_numbers_out_of_range(
    study: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert printed(capsys, "power", study, *options, code=2)[1] == f"baco: {message}\n"


def test_simulate_and_report_say_that_no_person_judged(
    study: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, err = printed(capsys, "simulate", study, "--raters", 6, "--effect", "0.8", "--lazy", "0.2")
    assert "SIMULATED" in err
    out, err = printed(capsys, "report", study, "--no-metrics")
    assert out.startswith("SIMULATED RATERS")
    assert (study / "report/index.html").is_file()
    out, _ = printed(capsys, "report", study, "-o", tmp_path / "out", "--json", "--no-metrics")
    result = json.loads(out)
    assert result["raters"] == "simulated"
    assert result["page"] == str(tmp_path / "out/index.html")
    assert {c["id"] for c in result["contrasts"]} == {"diversity-1", "no-loss-1", "quality-2"}


def test_simulate_refuses_a_study_that_people_have_begun(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Study.open(study)
    rater = opened.store.add_rater()
    assert rater is not None
    opened.store.update_rater(rater.id, "consented")
    opened.close()
    _, err = printed(capsys, "simulate", study, code=2)
    assert "has answers of people: simulate raters in a copy" in err


def test_a_report_needs_judgments_and_the_right_run(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has no judgments yet" in printed(capsys, "report", study, code=2)[1]
    printed(capsys, "simulate", study, "--raters", 2)
    other = write_run(tmp_path / "other", methods=["Base T=1"])
    _, err = printed(capsys, "report", study, "--run", other.path, code=2)
    assert "has no method 'P-Punc:0.4'" in err
    _, err = printed(capsys, "report", study, "--model", "judge=x", code=2)
    assert "give ROLE=ID_OR_FOLDER" in err


def test_answers_under_an_older_plan_are_reported_with_both_versions(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Study.open(study)
    for _ in range(2):
        rater = opened.store.add_rater()
        assert rater is not None
        assert rater.number is not None
        screens = schedule(opened.plan, rater.number)
        opened.store.save([answer(opened, rater, screen) for screen in screens])
    opened.close()
    path = study / "plan.json"
    changed = json.loads(path.read_text(encoding="utf-8")) | {"notes": "One rater fell ill."}
    path.write_text(json.dumps(changed), encoding="utf-8")
    assert "was changed after the first answer" in printed(capsys, "report", study, code=2)[1]
    printed(capsys, "amend", study, "--reason", "Illness")
    printed(capsys, "report", study, "--no-metrics")
    text = (study / "report/report.md").read_text(encoding="utf-8")
    assert "change after the first answer: yes" in text
    assert "Illness" in text
    assert "simulated" not in text.lower().replace("simulated studies", "")


@pytest.mark.parametrize("command", ["power", "simulate", "report"])
def test_without_scipy_one_line_says_what_to_install(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    _, err = printed(capsys, command, study, code=2)
    assert err == (
        "baco: this command needs scipy: install it with pip install 'baco[evaluation]'\n"
    )
