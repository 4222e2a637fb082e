"""A run as an entry of NoveltyBench's leaderboard: the four files that its own programs write."""

import json
from pathlib import Path
from typing import Any

import pytest

from baco.cli import run as baco
from baco.errors import BacoError
from baco.evaluation.metrics import metric
from baco.evaluation.report.load_scores import load_scores
from baco.evaluation.store import Run
from baco.evaluation.submission import export_submission
from baco.integrations.noveltybench import Evaluated, write_submission
from tests.test_answer_files import PUBLISHED

PROMPTS = [
    {"id": f"curated-{place}", "prompt": text, "category": "c", "prompt_paraphrases": []}
    for place, text in enumerate(("Recommend a city.", "Name a dish."))
]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_scores_are_noveltybenchs_own(tmp_path: Path) -> None:
    known = rows_of(PUBLISHED)
    rows = [
        Evaluated(
            row["prompt"], "?", row["model"], [str(place) for place in range(10)],
            row["partition"], [score or 7 for score in row["generation_scores"]],
        )
        for row in known
    ]  # fmt: skip
    summary = write_submission(tmp_path, rows)
    assert {path.name for path in tmp_path.iterdir()} == {
        "generations.jsonl", "partitions.jsonl", "scores.jsonl", "summary.json",
    }  # fmt: skip
    scores = rows_of(tmp_path / "scores.jsonl")
    for own, row in zip(scores, known, strict=True):
        assert list(own) == [
            "id", "prompt", "model", "generations", "partition", "distinct", "generation_scores",
            "partition_scores", "utility",
        ]  # fmt: skip
        assert own["generation_scores"] == row["generation_scores"]
        assert len(own["partition_scores"]) == row["distinct"] == own["distinct"] + 1
        assert own["utility"] == pytest.approx(row["utility"], abs=1e-9)
    assert json.loads((tmp_path / "summary.json").read_text("utf-8")) == summary
    assert summary["mean_distinct"] == sum(row["distinct"] for row in known) / len(known)


class FirstWords:
    """Answers of one first word are equivalent; the rating grows with the length."""

    made_by = {"judge": "first words"}  # noqa: RUF012

    def partition(self, prompts: Any, answers: Any) -> list[list[int]]:
        classes = []
        for row in answers:
            firsts = [text.split(" ")[0] for text in row]
            known = list(dict.fromkeys(firsts))
            classes.append([known.index(first) for first in firsts])
        return classes

    def rewards(self, prompts: Any, answers: Any) -> list[list[float]]:
        return [[float(len(text)) for text in row] for row in answers]

    def ratings(self, rewards: Any) -> list[list[float]]:
        return [[1 + min(9.0, reward // 20) for reward in row] for row in rewards]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("novelty")
    data = folder / "curated.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS), encoding="utf-8")
    options = ["-t", f"noveltybench-curated={data}", "-n", "11", "-r", "P-Punc:0.4"]
    options += ["--max-tokens", "16", "--metric", "distinct_1", "--workers", "1"]
    assert baco(["sweep", "-o", str(folder / "run"), *options]) == 0
    return folder / "run"


def test_a_setting_of_a_run_is_an_entry_with_its_first_ten_answers(
    run: Path, tmp_path: Path
) -> None:
    judges = {"equivalence": FirstWords(), "reward": FirstWords()}
    there = Run.open(run)
    summaries = export_submission(there, "P-Punc:0.4", "mine", tmp_path, judges)
    rows = rows_of(tmp_path / "nb-curated/scores.jsonl")
    groups = list(there.groups())
    assert [row["generations"] for row in rows] == [group.texts[:10] for group in groups]
    assert [row["id"] for row in rows] == ["curated-0", "curated-1"]
    prompts = [group.prompt for group in groups]
    answers = [group.texts[:10] for group in groups]
    utility = metric("utility_k", **judges).score(prompts, answers)
    assert [row["utility"] for row in rows] == pytest.approx(utility)
    classes = metric("distinct_k", **judges).score(prompts, answers)
    assert summaries["noveltybench-curated"]["mean_distinct"] == pytest.approx(
        sum(value or 0 for value in classes) / 2
    )


def test_a_run_that_is_no_entry_is_refused_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    export = ["noveltybench", str(run), "-o", str(tmp_path), "--name", "mine", "--setting"]
    assert baco([*export, "P-Punc:0.5"]) == 2
    assert "has no setting 'P-Punc:0.5': use P-Punc:0.4" in capsys.readouterr().err
    assert baco(["noveltybench", str(run), "--name", "a/b", "--setting", "P-Punc:0.4"]) == 2
    assert "name 'a/b' becomes a folder's: leave out slashes" in capsys.readouterr().err
    few = Run(run, {**Run.open(run).config, "n": 9})
    with pytest.raises(BacoError, match="has 9 answers to a prompt, and NoveltyBench reads 10"):
        export_submission(few, "P-Punc:0.4", "mine", tmp_path, {})
    other = Run(run, {**few.config, "n": 10, "tasks": [{"name": "demo"}]})
    with pytest.raises(BacoError, match="has no task of NoveltyBench"):
        export_submission(other, "P-Punc:0.4", "mine", tmp_path, {})
    assert not list(tmp_path.iterdir())


def published_file(folder: Path) -> Path:
    """A file as NoveltyBench publishes it: its folder has the model's name."""
    path = folder / "gemma" / "generations.jsonl"
    path.parent.mkdir()
    answers = [f"{place} a" for place in range(3)]
    rows = [
        {"id": row["id"], "prompt": row["prompt"], "model": "gemma", "generations": answers}
        for row in reversed(PROMPTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_published_answers_are_a_method_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = published_file(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{row['prompt']}\n" for row in PROMPTS), encoding="utf-8")
    sweep = ["sweep", "-t", str(prompts), "-m", str(path), "-r", "P-Punc:0.4", "--workers", "1"]
    sweep += ["--metric", "distinct_1", "--max-tokens", "8"]
    assert baco([*sweep, "-n", "2", "-o", str(tmp_path / "run")]) == 0
    run = Run.open(tmp_path / "run")
    texts = {group.method: group.texts for group in run.groups()}
    assert texts["gemma"] == ["0 a", "1 a"]
    assert set(texts) == {"gemma", "P-Punc"}
    assert all(sample.tokens > 0 for sample in run.samples() if sample.method == "gemma")
    (scores,) = load_scores(run)
    assert scores.costs["gemma", "gemma"].tokens_per_second is None, "nothing was generated"
    assert scores.costs["P-Punc", "P-Punc:0.4"].tokens_per_second is not None
    capsys.readouterr()
    assert baco([*sweep, "-n", "4", "-o", str(tmp_path / "more")]) == 2
    assert "has 3 answers to prompt" in capsys.readouterr().err.splitlines()[-1]
    assert baco([*sweep, "-m", "missing.jsonl", "-n", "2", "-o", str(tmp_path / "none")]) == 2
    assert "cannot read missing.jsonl" in capsys.readouterr().err
