"""The studies of `benchmarks/` count and compare what they report. No test asserts a speed."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from baco import Baco, BacoError
from baco.bench.contestants import Paired, Run, Task, never_ending
from baco.evaluation import store as evaluation_store
from baco.evaluation.records import Group
from baco.models.known_pairs import find_pair
from benchmarks import (
    architectures,
    gpu,
    launch,
    near_duplicates,
    struct_rule,
    thresholds,
    vllm_pair,
)
from benchmarks.bodies import SHAPES, make
from benchmarks.judges import judged, well_formed
from benchmarks.long_prompt import long_prompt
from benchmarks.model_server import ServedModel
from benchmarks.real_weights import fewest_forwards
from benchmarks.two_servers import two_servers

ROOT = Path(__file__).parent.parent


def task(baco: Baco, n: int, **sampling: Any) -> Task:
    prompt = baco.pair.renderer.render("Write a short story about a dragon.")
    params = never_ending(baco.pair, 24, n=n, seed=3, **sampling)
    return Task(prompt, baco.router("P-Punc:0.4"), params)


@pytest.mark.parametrize("concurrent", [0, 2])
def test_two_servers_give_the_answers_of_the_engine_at_temperature_0(
    demo: Baco, concurrent: int
) -> None:
    greedy = task(demo, 2, temperature=0.0)
    with two_servers(demo.pair, concurrent=concurrent) as servers:
        over_http = servers.decode(greedy)
    paired = Paired(demo.pair).decode(greedy)
    assert (over_http.answers, over_http.sources) == (paired.answers, paired.sources)


def test_the_pair_in_vllm_is_compared_with_one_model_in_vllm() -> None:
    speeds = {"pair_in_vllm": {1: 50.0}, "aligned_in_vllm": {1: 100.0}, "local": {1: 25.0}}
    last = vllm_pair.table(speeds, [1]).splitlines()[-1]
    assert last.split()[-1] == "0.50"


@pytest.mark.parametrize("texts", [1, 3])
def test_a_served_model_gives_the_same_logits_for_kept_and_reread_texts(
    demo: Baco, texts: int
) -> None:
    model = demo.pair.base.model
    keeps, rereads = ServedModel(model, texts=texts), ServedModel(model, rereads=True)
    for text in ([5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 8, 9, 10], [5, 6, 9], [40, 41], [40, 41]):
        assert torch.allclose(keeps.logprobs(text), rereads.logprobs(text), atol=1e-4)


def test_a_long_prompt_is_read_once_by_each_model(demo: Baco) -> None:
    result = long_prompt(demo.pair, task(demo, 1))
    assert (result.n, result.reads) == (32, {"base": 1, "aligned": 1})
    assert result.tokens == 508  # the demo's context less the tokens of an answer


def test_thresholds_count_drafts_and_forwards(demo: Baco) -> None:
    row = thresholds.work(demo.pair, [task(demo, 2), task(demo, 2)])
    assert (row.router, row.n) == ("P-Punc:0.4", 2)
    assert 0 <= row.accepted <= row.drafted
    assert 0 <= row.base_share <= 1
    assert all(0 < forwards < 3 for forwards in row.forwards.values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_that_of_weights_and_caches_at_least() -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.peak_memory",
        "--n",
        "8",
        "--tokens",
        "16",
        "--json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    memory = json.loads(done.stdout)
    assert memory["n"] == 8
    # 1.9 M parameters of each model, in float32; small weights may be held in two layouts.
    assert 2 * 7_512_960 <= memory["weights"] < 4 * 7_512_960
    assert memory["peak"] > memory["cache"] > 8 * 16
    assert memory["ratio"] == memory["peak"] / (memory["weights"] + memory["cache"])


def test_a_model_with_a_trained_body_gives_the_demo_pairs_answers(
    demo: Baco, tmp_path: Path
) -> None:
    assert "50m" in SHAPES
    folder = make("body", "50m", tmp_path / "body", torch.float32)
    body = Baco.load(str(folder), dtype="float32")
    greedy: dict[str, Any] = {
        "temperature": 0.0,
        "n": 1,
        "max_tokens": 24,
        "router": "P-Punc:0.4",
        "seed": 0,
    }
    prompt = "Write a short story about a dragon."
    (large,), (small,) = body.generate(prompt, **greedy), demo.generate(prompt, **greedy)
    assert large.token_ids == small.token_ids


def test_ways_of_a_gpu_are_compared_with_the_naive_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROUTERS", ("P-Punc:0.3",))
    monkeypatch.setattr(gpu, "SHAPES", ((4, 1.0),))
    way = gpu.Way("drafts", {"device": "cpu", "dtype": "float32"})
    exact = gpu.check(way, find_pair("demo"))
    assert (exact["equal"], exact["passed"], exact["first_difference"]) == (1.0, True, None)

    decode = Paired.decode

    def with_another_token(paired: Paired, task: Task) -> Run:
        run = decode(paired, task)
        run.answers[2][5] += 1
        return run

    monkeypatch.setattr(Paired, "decode", with_another_token)
    wrong = gpu.check(way, find_pair("demo"))
    assert (wrong["equal"], wrong["passed"]) == (0.75, False)
    assert (wrong["first_difference"]["sample"], wrong["first_difference"]["position"]) == (2, 5)


def test_the_fewest_forwards_follow_from_the_acceptance_rate() -> None:
    # With rate 0.8, three draft tokens cost 4 forwards and give 2.44 tokens.
    assert fewest_forwards(0.8) == pytest.approx(4 / 2.44)
    assert fewest_forwards(None) == 2.0
    assert fewest_forwards(1.0) == pytest.approx(33 / 32, rel=0.02)


def test_real_weights_counts_forwards_and_shares_of_the_time() -> None:
    command = [sys.executable, "-m", "benchmarks.real_weights", "demo", "--n", "2", "--json"]
    command += ["--repeats", "1", "--tokens", "12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (row,) = report["rows"]
    assert (row["pair"], row["n"]) == ("demo", 2)
    assert row["product_share"] > 0
    assert 0 < row["forward_share"] < 1
    assert 0.5 < sum(row["forwards"].values()) < 3
    events = report["start"]["demo"]
    assert list(events) == ["import", "load", "first token", "first answer"]
    seconds = [event[0] for event in events.values()]
    assert seconds == sorted(seconds)


def test_every_architecture_is_compared_with_the_naive_loop_and_has_a_row_of_the_page() -> None:
    result = architectures.measure("lfm2", with_speed=False)
    assert result.right
    assert result.batched
    wrong = architectures.Result(path="a path", equal=False)
    report = {
        "versions": {"transformers": "5"},
        "machine": "a machine",
        "cases": {"lfm2": asdict(result), "other": asdict(wrong)},
    }
    page = architectures.page(report)
    assert "Of 2 configurations, 1 are decoded exactly" in page
    assert f"| lfm2 | yes | together | yes | – | – | {result.path} |" in page
    assert "| other | **no** | one by one | no | – | – | a path |" in page


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Go to Lisbon in May. It is warm and quiet.", True),
        ("1. **Pasta** with basil, a salad and bread.", True),
        ("Lisbon", False),
        ("and then it was over, she thought.", False),
        ("Go on and on and on and on and on and on and on and on.", False),
        ("A fine day.\nQuestion: What is the time?", False),
        ("Das ist ein schöner Tag im Mai.", False),
    ],
)
def test_answers_with_few_words_loops_markup_or_foreign_letters_are_not_well_formed(
    text: str, expected: bool
) -> None:
    assert well_formed(text) is expected


def test_a_run_is_read_anew_by_each_judge_of_quality(tmp_path: Path) -> None:
    command = ["diagnose", "--frontier", "--limit", "4", "-n", "2", "--max-tokens", "12"]
    command += ["--router", "Rand:0.5", "--out", str(tmp_path / "run")]
    subprocess.run([sys.executable, "-m", "baco", *command], check=True, capture_output=True)
    run = evaluation_store.Run.open(tmp_path / "run")

    def base_words(groups: Sequence[Group]) -> list[float | None]:
        return [sum(sample.base_share or 0 for sample in group.samples) for group in groups]

    def aligned_words(groups: Sequence[Group]) -> list[float | None]:
        return [-(share or 0) for share in base_words(groups)]

    results = judged(run, {"base": base_words, "aligned": aligned_words})
    for point in results["base"].points:
        own = point.method.startswith("aligned, ")
        assert (point.figures["reward"] == 0) is own
    assert results["base"].lead.difference > results["aligned"].lead.difference


def test_rows_of_countries_are_checked_and_a_stopped_comparison_continues(
    demo: Baco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [prompt, *_] = prompts = struct_rule.countries()
    row = {"country": " France", "capital": "Paris", "continent": "Europe"}
    assert prompt.judge(row) == (1, "france")
    assert prompt.judge(row | {"continent": "Asia"}) == (0.5, "france")
    assert prompt.judge(row | {"country": "Atlantis"}) == (0, "atlantis")
    [question, *_] = struct_rule.sentences()
    [answer] = demo.generate(question.text, seed=1, router="Aligned", **question.structure)
    assert question.judge(question.read(answer))[0] == 1
    settings = [struct_rule.Setting("Aligned", "Aligned", 1.0)]
    settings += [struct_rule.Setting("P-Struct", "P-Struct:0.4", 1.0)]
    out, claim = tmp_path / "out.json", {"task": "countries"}
    monkeypatch.setattr(struct_rule, "all_settings", lambda: settings[:1])
    struct_rule.measure_all(demo, prompts[:2], 2, out, claim)
    monkeypatch.setattr(struct_rule, "all_settings", lambda: settings)
    both = struct_rule.measure_all(demo, prompts[:2], 2, out, claim)
    monkeypatch.setattr(struct_rule, "measure", None)  # nothing is left to measure
    assert struct_rule.measure_all(demo, prompts[:2], 2, out, claim) == both
    assert [setting["base_share"] > 0 for setting in both] == [False, True]
    assert [setting["valid"] for setting in both] == [[1.0, 1.0]] * 2
    assert "| P-Struct:0.4 | 1 |" in struct_rule.table(both, prompt.fields)
    with pytest.raises(BacoError, match="begun with other settings"):
        struct_rule.measure_all(demo, prompts[:2], 2, out, {"task": "sentences"})


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (thresholds.main, ["no-such-pair"], "unknown pair 'no-such-pair'"),
        (
            thresholds.main,
            ["demo", "--router", "no-such-rule"],
            "unknown router 'no-such-rule:0.2'",
        ),
        (near_duplicates.main, ["--rows", "1", "--folder", "/no-such-folder"], "/no-such-folder"),
    ],
)
def test_bad_input_of_a_benchmark_is_one_line(
    main: Callable[[], None],
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as ended:
        launch(main)
    assert ended.value.code == 2
    line = " ".join(capsys.readouterr().err.split())
    assert line.startswith("baco: ")
    assert message in line


def test_every_benchmark_is_launched_alike() -> None:
    for file in (ROOT / "benchmarks").glob("*.py"):
        _, is_program, start = file.read_text("utf-8").partition('\nif __name__ == "__main__":\n')
        assert not is_program or start == "    launch(main)\n", file
