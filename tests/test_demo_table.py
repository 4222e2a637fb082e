"""What is measured on the demo pair, and what the table says of it."""

import json
from pathlib import Path

import pytest

from baco.demo.recipe import MINUTE
from baco.demo.train import train
from baco.evaluation.demo_pair.measure import (
    Point,
    Scored,
    Setting,
    add_seed,
    distinct_keys,
    measure,
    mixtures,
    settings,
    word_overlap_diversity,
)
from baco.evaluation.demo_pair.table import report, summarise, write_report


def said(text: str, key: str, quality: float = 1.0) -> Scored:
    return Scored(quality, key, frozenset(text.split()))


def test_diversity_counts_keys_and_shared_words() -> None:
    answers = [said("a b", "x"), said("a b", "x"), said("c d", ""), said("e f", "")]
    assert distinct_keys(answers) == 0.5
    assert word_overlap_diversity(answers) == pytest.approx(5 / 6)
    assert word_overlap_diversity(answers[:2]) == 0


def test_mixing_takes_whole_answers_of_both_halves() -> None:
    base = [[said("b", f"b{i}", 0.0) for i in range(4)]]
    aligned = [[said("a", "a", 1.0) for _ in range(4)]]
    points = [Point("mixing", str(share)) for share in range(5)]
    mixtures(base, aligned, points)
    assert [point.quality[0][0] for point in points] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [point.keys[0][0] for point in points] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_the_plan_holds_every_router_and_rival_once() -> None:
    plan = settings()
    assert len({(s.method, s.label) for s in plan}) == len(plan)
    assert {s.method for s in plan} >= {
        "base, temperature", "base, min-p", "aligned, temperature", "aligned, min-p", "Nudging",
        "Rand", "P", "H", "Punc", "FC", "Punc-FC", "P-Punc", "H-Punc", "P-FC", "H-FC", "P-Punc-FC",
        "Gap",
    }  # fmt: skip
    assert max(s.temperature for s in plan if s.router == "Aligned") == 3.0


def invented(training_seed: int) -> dict:
    points = []
    for method, quality, keys in [
        ("base, min-p", 0.5, 0.8), ("aligned, min-p", 1.0, 0.1), ("Nudging", 0.6, 0.5),
        ("P-Punc", 0.8, 0.6), ("mixing", 0.7, 0.5),
    ]:  # fmt: skip
        point = Point(method, method)
        add = training_seed / 100
        for _ in range(2):
            add_seed(point, [[said("a", "k", quality)] * 2] * 4)
            point.keys[-1] = [keys + add] * 4
            point.overlap[-1] = [keys / 2] * 4
            point.base_share.append(0.25)
        points.append({f: getattr(point, f) for f in Point.__dataclass_fields__})
    return {
        "training_seed": training_seed, "decoding_seeds": [1, 2], "questions": 4, "answers": 2,
        "families": [], "seconds": 1.0, "machine": "none", "versions": {"torch": "0"},
        "points": points,
    }  # fmt: skip


def test_the_table_compares_coverage_with_the_best_single_model() -> None:
    summary = summarise([invented(0), invented(1)])
    assert summary["best single, keys"] == "base, min-p"
    keys = summary["methods"]["P-Punc"]["keys"]
    assert keys["by_training_seed"] == pytest.approx([0.48, 0.8 * 0.61])
    assert keys["coverage"] == pytest.approx(0.8 * 0.605)
    assert keys["low"] == pytest.approx(keys["high"])
    against = keys["against"]["base, min-p"]
    assert against["ratio"] == pytest.approx(0.8 * 0.605 / (0.5 * 0.805))
    assert against["won"] == 1.0
    text = report([invented(0), invented(1)])
    assert text.index("**P-Punc**") < text.index("*base, min-p*")
    assert "| Nudging | Nudging | 0.600 |" in text


def test_measuring_goes_on_where_it_was_cut_off_and_is_reported(tmp_path: Path) -> None:
    pair = tmp_path / "pair"
    train(pair, seed=0, progress=False, recipe=MINUTE)
    plan = [Setting("base, min-p", "Base"), Setting("aligned, min-p", "Aligned")]
    plan += [Setting("Nudging", "Nudging:0.5"), Setting("Rand", "Rand:0.5")]
    parts: list[float] = []
    measure(pair, 0, parts.append, count=2, plan=plan, workers=1)
    assert sum(parts) == pytest.approx(1)
    first = json.loads((pair / "measured.json").read_text())
    methods = [point["method"] for point in first["points"]]
    assert methods == [setting.method for setting in plan] + ["mixing"] * 11
    assert all(len(point["quality"]) == 2 for point in first["points"])
    measure(pair, 0, lambda _: None, count=2, plan=plan, workers=1)
    again = json.loads((pair / "measured.json").read_text())
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    write_report(tmp_path / "report.md", [pair])
    assert "Coverage" in (tmp_path / "report.md").read_text()
    assert "Nudging" in json.loads((tmp_path / "report.json").read_text())["methods"]
