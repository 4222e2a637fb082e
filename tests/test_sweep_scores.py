"""Scoring a run: later, in parts, never twice, and never silently with other models."""

import json
from pathlib import Path

import pytest

from baco.cli import run as baco_run
from baco.evaluation.metrics import metric
from baco.evaluation.report.results import reference
from baco.evaluation.score import requested_metrics, score
from baco.evaluation.store import Run

SWEEP = ["sweep", "--limit", "3", "-n", "2", "-r", "P-Punc:0.4", "-r", "Rand:0.5", "--workers", "1"]


@pytest.fixture
def drawn(tmp_path: Path) -> Run:
    """A run with samples and without scores."""
    out = tmp_path / "run"
    assert baco_run([*SWEEP, "--max-tokens", "12", "--no-score", "--out", str(out)]) == 0
    return Run.open(out)


def test_a_metric_added_later_is_the_metric_of_the_samples(drawn: Run) -> None:
    before = (drawn.path / "samples.jsonl").read_bytes()
    for name in ("distinct_2", "self_bleu"):
        assert baco_run(["score", str(drawn.path), "--metric", name, "--workers", "1"]) == 0
    groups = list(drawn.groups())
    for name in ("distinct_2", "self_bleu"):
        expected = metric(name).score([g.prompt for g in groups], [g.texts for g in groups])
        rows = list(drawn.scores(name))
        assert [row["value"] for row in rows] == pytest.approx(expected, abs=1e-9)
        assert [(r["method"], r["setting"], r["prompt"]) for r in rows] == [
            (g.method, g.setting, g.prompt.id) for g in groups
        ]
    assert drawn.metrics() == ["distinct_2", "self_bleu"]
    assert (drawn.path / "samples.jsonl").read_bytes() == before
    assert (drawn.path / "scores.parquet").exists()


def test_scoring_is_resumed_after_an_interruption(drawn: Run) -> None:
    score(drawn, requested_metrics(drawn, ["distinct_1"], {}), workers=1)
    path = drawn.score_file("distinct_1")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    marked = lines[0].replace(b'"value": ', b'"value": 9')
    path.write_bytes(marked + lines[1] + lines[2][:20])
    score(drawn, requested_metrics(drawn, ["distinct_1"], {}), workers=1)
    assert path.read_bytes() == marked + b"".join(lines[1:]), "what is there is not scored again"


def test_another_reason_for_a_task_that_cannot_be_scored_keeps_the_scores(drawn: Run) -> None:
    score(drawn, requested_metrics(drawn, ["distinct_1"], {}), workers=1)
    path = drawn.score_file("distinct_1")
    kept = path.read_bytes().replace(b'"value": ', b'"value": 9')
    path.write_bytes(kept)
    about = drawn.about("distinct_1") | {"unavailable_for": {"another": "no network"}}
    path.with_suffix(".json").write_text(json.dumps(about), encoding="utf-8")
    score(drawn, requested_metrics(drawn, ["distinct_1"], {}), workers=1)
    assert path.read_bytes() == kept


def test_scores_are_the_same_from_several_workers(drawn: Run, tmp_path: Path) -> None:
    names = ["distinct_1", "reward", "distinct_k"]
    score(drawn, requested_metrics(drawn, names, {}), workers=1)
    alone = {name: drawn.score_file(name).read_bytes() for name in names}
    for name in names:
        drawn.score_file(name).unlink()
    score(drawn, requested_metrics(drawn, names, {}), workers=2)
    assert alone == {name: drawn.score_file(name).read_bytes() for name in names}


def test_scores_of_other_models_are_not_mixed(drawn: Run) -> None:
    score(drawn, requested_metrics(drawn, ["reward"], {}), workers=1)
    about = drawn.score_file("reward").with_suffix(".json")
    description = json.loads(about.read_text(encoding="utf-8"))
    description["made_by"]["demo"]["judge"] = "another"
    about.write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(ValueError, match="other models or versions made") as refused:
        score(drawn, requested_metrics(drawn, ["reward"], {}), workers=1)
    assert "\n" not in str(refused.value)


def test_a_judge_that_refuses_the_prompts_leaves_no_scores_behind(tmp_path: Path) -> None:
    """It fails at the first prompt and leaves no scores, so that another judge may be used."""
    prompts = tmp_path / "own.txt"
    prompts.write_text("Name a colour.\n", encoding="utf-8")
    out = str(tmp_path / "run")
    arguments = ["-t", str(prompts), "-r", "P:0.5", "-n", "2", "--max-tokens", "4", "-o", out]
    assert baco_run(["sweep", *arguments, "--workers", "1", "--metric", "distinct_1"]) == 0
    assert baco_run(["score", out, "--metric", "reward", "--model", "reward=demo"]) == 2
    run = Run.open(out)
    assert run.metrics() == ["distinct_1"]
    other = requested_metrics(run, ["reward"], {"reward": str(tmp_path / "no-model")})
    assert "cannot be loaded" in score(run, other, workers=1)["reward"]
    assert run.unavailable().keys() == {"reward"}


def test_a_metric_that_cannot_run_is_left_out_with_the_reason(drawn: Run) -> None:
    models = {"nli": str(drawn.path / "no-model")}
    refused = score(
        drawn, requested_metrics(drawn, ["nli_diversity", "distinct_1"], models), workers=1
    )
    assert drawn.metrics() == ["distinct_1"]
    assert drawn.unavailable() == refused
    assert "cannot be loaded" in refused["nli_diversity"]
    assert not drawn.score_file("nli_diversity").exists()


def test_a_default_sweep_scores_all_that_needs_no_hub(drawn: Run) -> None:
    assert baco_run(["score", str(drawn.path), "--workers", "1"]) == 0
    assert set(drawn.metrics()) == {
        "distinct_1", "distinct_2", "distinct_3", "ead", "self_bleu", "self_rouge_l",
        "embedding_distance", "vendi", "semantic_entropy", "distinct_k", "reward", "utility_k",
        "effective_distinct_k", "effective_distance",
    }  # fmt: skip
    assert set(drawn.unavailable()) == {"nli_diversity", "perplexity"}
    assert all("--model" in why for why in drawn.unavailable().values())


def test_accuracy_is_scored_if_a_task_has_right_answers(tmp_path: Path) -> None:
    out = tmp_path / "facts"
    arguments = [*SWEEP, "--task", "demo-facts", "--metric", "accuracy", "--metric", "reward"]
    assert baco_run([*arguments, "--out", str(out)]) == 0
    run = Run.open(out)
    accurate = [row["value"] for row in run.scores("accuracy")]
    rewards = [row["value"] for row in run.scores("reward")]
    assert all(0 <= a <= r <= 1 for a, r in zip(accurate, rewards, strict=True))
    assert any(accurate)


REFUSED = [
    (["--task", "nope"], "unknown task 'nope'"),
    (["--metric", "self_blue"], "unknown metric 'self_blue': use self_bleu"),
    (["--method", "mixin"], "unknown method 'mixin'"),
    (["--router", "Q:0.4"], "unknown router 'Q:0.4'"),
    (["--router", "P:7"], "threshold 7"),
    (["--pair", "nobody"], "unknown pair 'nobody'"),
    (["--pair", "demo", "--pair", "demo"], "'demo' is named twice"),
    (["-n", "1"], "self_bleu compares a prompt's samples and there is 1: draw 2 or more with -n"),
    (["-n", "0"], "n is 0"),
    (["--limit", "0"], "limit is 0"),
    (["--preset", "huge"], "preset is 'huge': use full, quick or paper"),
    (["--temperature", "-1"], "temperature is -1"),
    (["--workers", "0"], "workers is 0"),
    (["--judge-model", "m"], "a judge needs both"),
    (["--method", "judge"], "--judge-url"),
    (["--model", "nil=x"], "give ROLE=ID_OR_FOLDER"),
    (["--metric", "accuracy"], "accuracy needs a task with right answers"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line_with_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    arguments = ["sweep", "--limit", "1", *arguments, "--out", str(tmp_path / "run")]
    assert baco_run(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and message in printed
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_score_refuses_a_folder_that_is_not_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert baco_run(["score", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_the_papers_preset_is_printed_without_loading_or_fetching_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a dry run loads and fetches nothing")

    for name in ("baco.api.Baco.load", "baco.evaluation.tasks.rows.from_hub"):
        monkeypatch.setattr(name, never)
    stories = tmp_path / "stories.json"
    stories.write_text(
        json.dumps([{"narrative_id": i, "synopsis": "A ship sails. It sinks."} for i in range(3)]),
        encoding="utf-8",
    )
    options = ["sweep", "--preset", "paper", "--dry-run", "-t", f"narrative-discourse={stories}"]
    assert baco_run([*options, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [pair["name"] for pair in planned["pairs"]] == ["llama-3-8b", "olmo-2-7b"]
    prompts = {task["name"]: task["prompts"] for task in planned["tasks"]}
    assert prompts == {"noveltybench-curated": 100, "wildchat": 100, "narrative-discourse": 3}
    assert set(reference("routers").figures) - {"Judge"} <= planned["methods"].keys()
    assert "mixing" not in planned["methods"]
    assert planned["settings"] == sum(map(len, planned["methods"].values()))
    assert planned["answers"] == 2 * planned["settings"] * 10 * 203
    assert planned["most_tokens"] == 2 * planned["settings"] * 10 * (200 * 512 + 3 * 1024)
    assert baco_run(options) == 0
    shown = capsys.readouterr().out
    assert f"{planned['answers']:,} answers" in shown and "allenai/OLMo-2-1124-7B" in shown


def test_what_a_user_names_takes_the_place_of_the_presets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["sweep", "--preset", "paper", "--dry-run", "--json", "--no-score"]
    named = ["-p", "demo", "-t", "demo", "-r", "P:0.5", "--limit", "2", "-n", "3"]
    assert baco_run([*options, *named, "--max-tokens", "7"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["methods"], planned["metrics"]) == ({"P": ["P:0.5"]}, [])
    assert (planned["answers"], planned["most_tokens"], planned["jobs"]) == (6, 42, 1)


@pytest.mark.parametrize("limit", ["0", "-5"])
def test_a_dry_run_refuses_a_limit_below_one_for_tasks_of_the_hub_too(
    capsys: pytest.CaptureFixture[str], limit: str
) -> None:
    assert baco_run(["sweep", "--dry-run", "-t", "gsm8k", "--limit", limit]) == 2
    assert f"limit is {limit}: take at least one prompt" in capsys.readouterr().err


def test_a_sweep_without_its_directory_says_what_to_give(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert baco_run(["sweep"]) == 2
    assert "give --out, the run's directory, or --dry-run" in capsys.readouterr().err
