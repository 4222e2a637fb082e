"""A learned router is trained from a run, saved in one file, and used like any other router."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from baco import Baco, BacoError, as_transformers, router
from baco.cli import run as baco_command
from baco.evaluation.train_router import _distances
from baco.routing.learned import FEATURES, LearnedModel, features, fit, load
from baco.routing.parser import lacks_threshold
from baco.routing.signals import Signals
from benchmarks.hidden_states import Words, auc_draws
from tests.test_adaptive import PROMPTS, decode


@pytest.fixture(scope="module")
def rows(demo: Baco) -> torch.Tensor:
    """Features of random rows of logits."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 600, demo.pair.vocabulary.size, generator=generator) * 4
    return features(Signals(logits[0], logits[1], demo.pair.vocabulary))


@pytest.fixture(scope="module")
def file(rows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A learned router that imitates P."""
    model = fit(rows, rows[:, 0] < 0.4, torch.ones(len(rows)), hidden=3)
    path = tmp_path_factory.mktemp("routers") / "router.json"
    path.write_text(json.dumps(model.to_json()))
    return str(path)


@pytest.mark.parametrize("hidden", [0, 4])
def test_a_model_learns_a_rule_from_its_decisions(rows: torch.Tensor, hidden: int) -> None:
    base = rows[:, 0] < rows[:, 0].median()
    model = fit(rows, base, torch.ones(len(rows)), hidden=hidden, decay=1e-5)
    assert ((model.probability(rows) > 0.5) == base).float().mean() > 0.95


def test_words_of_weight_0_are_not_learned(rows: torch.Tensor) -> None:
    base = rows[:, 0] < rows[:, 0].median()
    weight = (torch.arange(len(rows)) % 2).float()
    misleading = torch.where(weight > 0, base, ~base)
    model = fit(rows, misleading, weight, decay=1e-5)
    assert ((model.probability(rows) > 0.5) == base).float().mean() > 0.95


def test_a_probability_does_not_depend_on_other_rows(rows: torch.Tensor, file: str) -> None:
    model = load(file)
    together = model.probability(rows)
    for count in (1, 3, 64):
        assert torch.equal(model.probability(rows[:count]), together[:count])


def test_a_file_holds_all_of_the_model(rows: torch.Tensor, file: str) -> None:
    model = LearnedModel.from_json(json.loads(Path(file).read_text()))
    assert torch.equal(model.probability(rows), load(file).probability(rows))


def test_answers_do_not_depend_on_drafts_or_the_batch(demo: Baco, file: str) -> None:
    rules = [f"Learned:{file}", f"Learned-Punc:{file},0.3", f"Learned:{file},share=0.3"]
    expected = decode(demo, rules, speculate=False)
    assert decode(demo, rules, speculate=True) == expected
    assert decode(demo, rules, max_rows=1) == expected
    sources = {source for samples in expected for _, sources in samples for source in sources}
    assert sources == {"base", "aligned"}


def test_a_spelling_names_the_file_and_may_give_a_threshold(file: str) -> None:
    assert router(f"Learned:{file}").spelling == f"Learned:0.5,model={file}"
    assert router(f"P-Slop:0.3,{file}".replace("P-Slop:0.3,", "Learned-Slop:model=")).spelling
    assert lacks_threshold(f"Learned:{file}") and not lacks_threshold(f"Learned:{file},0.2")


def test_it_also_runs_in_transformers(demo: Baco, file: str) -> None:
    assert as_transformers(demo, f"Learned:{file}").router.spelling.startswith("Learned:0.5")


def broken(file: str, **changes: Any) -> str:
    return json.dumps({**json.loads(Path(file).read_text()), **changes})


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"format": "other"}, "it is no learned router"),
        ({"version": 2}, "its version is 2"),
        ({"features": ["max_base"]}, "its features are others"),
        ({"mean": [1.0]}, "its mean has the shape"),
        ({"mean": ["x"] * len(FEATURES)}, "its mean is not numbers"),
        ({"scale": [0.0] * len(FEATURES)}, "a scale is not positive"),
        ({"scale": [float("nan")] * len(FEATURES)}, "its scale is not finite"),
        ({"layers": []}, "it needs one or two layers"),
        ({"layers": [{"weight": [[1.0]], "bias": [0.0]}]}, "its weight has the shape"),
        ({"layers": [{"weight": []}, {}]}, "a hidden layer has 0 units"),
        ({"layers": [3]}, "a layer is not an object"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(
    file: str, tmp_path: Path, changes: dict[str, Any], error: str
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(broken(file, **changes))
    with pytest.raises(BacoError, match=error) as caught:
        router(f"Learned:{bad}")
    assert "\n" not in str(caught.value)


def test_what_is_no_file_of_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "binary").write_bytes(b"\x80\x04\x95")
    for path, error in (("text", "not JSON"), ("binary", "cannot be used"), ("no", "be read")):
        with pytest.raises(BacoError, match=error):
            router(f"Learned:{tmp_path / path}")
    with pytest.raises(BacoError, match="Learned needs a file"):
        router("Learned:0.4")


def test_the_distance_of_an_answer_is_to_its_siblings() -> None:
    same, other = "a red boat", "my blue car"
    assert _distances([same, same, other]) == pytest.approx([0.5, 0.5, 1.0])
    assert _distances([same]) == [0.0]


def test_a_run_trains_a_router(tmp_path: Path, demo: Baco) -> None:
    run, out = str(tmp_path / "run"), tmp_path / "router.json"
    sweep = ["sweep", "--pair", "demo", "--task", "demo", "--limit", "3", "-n", "4", "--no-score"]
    more = ["-r", "Rand:0.4", "--workers", "1", "--max-tokens", "48", "--out", run]
    assert baco_command([*sweep, *more]) == 0
    assert baco_command(["router", "train", run, "--out", str(out)]) == 0
    trained = load(str(out)).trained
    assert trained["pair"] == "demo" and trained["answers"] == 12 and trained["words"] > 200
    answer = demo.generate(PROMPTS[0], router=f"Learned:{out}", seed=1, max_tokens=8)[0]
    assert answer.router == f"Learned:0.5,model={out}"
    assert baco_command(["router", "train", run, "--out", str(out), "--pair", "other"]) == 2
    assert baco_command(["router", "train", run, "--out", str(out), "--quality", "ead"]) == 2
    assert baco_command(["router", "train", str(tmp_path), "--out", str(out)]) == 2
    for unwritable in (tmp_path / "no" / "out", tmp_path):
        assert baco_command(["router", "train", run, "--out", str(unwritable)]) == 2


def test_the_weighted_auc_counts_pairs_of_words() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(0, 5, (40,), generator=generator) / 4
    is_base = torch.rand(40, generator=generator) < 0.4
    weight = torch.rand(40, generator=generator)
    prompt = torch.arange(40) % 3
    pairs = weight[is_base][:, None] * weight[~is_base]
    above = predicted[is_base][:, None] - predicted[~is_base]
    right = (pairs * ((above > 0) + 0.5 * (above == 0))).sum() / pairs.sum()
    words = Words({}, is_base, weight, prompt, is_base)
    assert auc_draws(words, predicted, None, draws=1)[0] == pytest.approx(float(right), abs=1e-5)
