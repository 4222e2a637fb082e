"""`baco bench` compares like with like. No test asserts a speed."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baco import Baco
from baco.bench.contestants import Contestant, Generate, Naive, Paired, Task, never_ending
from baco.bench.race import Entry, same_answers
from baco.cli import run as baco_run
from baco.routing.parser import router as parse
from tests.text_pairs import baco_of_kinds, save_pair
from tests.tokenizer_kinds import tokenizer_of

PROMPT = "Write a short story about a dragon."
TOKENS = 40
BACO = [sys.executable, "-c", "from baco.cli import main; main()"]


def task(baco: Baco, n: int, router: str = "P-Punc:0.4", **sampling: Any) -> Task:
    params = never_ending(baco.pair, TOKENS, n=n, seed=3, **sampling)
    return Task(baco.pair.renderer.render(PROMPT), baco.router(router), params)


@pytest.mark.parametrize("kind", [Paired, Naive, Generate])
@pytest.mark.parametrize("n", [1, 3])
def test_every_contestant_writes_all_tokens_and_no_end_of_text(
    demo: Baco, kind: type[Contestant], n: int
) -> None:
    run = kind(demo.pair).decode(task(demo, n))  # type: ignore[call-arg]
    assert [len(answer) for answer in run.answers] == [TOKENS] * n
    assert not demo.pair.end_ids & {token for answer in run.answers for token in answer}
    assert 0 < run.first <= run.seconds


@pytest.mark.parametrize("router", ["P-Punc:0.4", "H:1.5", "Rand:0.5", "Aligned"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_naive_loop_gives_the_tokens_and_sources_of_the_engine(
    demo: Baco, router: str, temperature: float
) -> None:
    same = task(demo, 4, router, temperature=temperature)
    naive, paired = Naive(demo.pair).decode(same), Paired(demo.pair).decode(same)
    assert (naive.answers, naive.sources) == (paired.answers, paired.sources)


def test_generate_draws_with_the_same_temperature_and_truncation(demo: Baco) -> None:
    greedy = task(demo, 1, "Aligned", temperature=0.0)
    assert Generate(demo.pair).decode(greedy).answers == Paired(demo.pair).decode(greedy).answers


def test_answers_that_differ_are_counted(demo: Baco) -> None:
    entries = [Entry("paired", 2, Paired(demo.pair)), Entry("naive", 2, Naive(demo.pair))]
    for entry, seed in zip(entries, (3, 4), strict=True):
        changed = replace(task(demo, 2).params, seed=seed)
        entry.runs.append(entry.contestant.decode(replace(task(demo, 2), params=changed)))
    assert same_answers(entries) == {"naive_n2": 0.0}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    options = ["--quick", "--json", "-n", "1", "-n", "8", "--tokens", "16"]
    done = subprocess.run(
        [*BACO, "bench", *options], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_json_names_every_ratio(report: dict[str, Any]) -> None:
    for name in ("generate_n1", "generate_n8", "naive", "naive_n8", "undrafted"):
        assert 0 < report[name] < math.inf
        spread = report["ratios"][name]
        assert spread["low"] <= spread["middle"] <= spread["high"]


def test_the_report_names_the_measurements_and_the_machine(report: dict[str, Any]) -> None:
    assert report["command"].startswith("baco bench --quick --json")
    assert (report["pair"], report["tokens"], report["dtype"]) == ("demo", 16, "float32")
    assert report["machine"]["threads"] >= 1
    assert {(c["name"], c["n"]) for c in report["contestants"]} == {
        (name, n) for name in ("paired", "undrafted", "generate", "naive") for n in (1, 8)
    }
    assert 0.5 < report["agreement"] <= 1
    assert all(share > 0.9 for share in report["same_answers"].values())


def test_the_bound_is_above_the_speed_without_drafts(report: dict[str, Any]) -> None:
    bound = report["bound"]
    undrafted = next(c for c in report["contestants"] if c["name"] == "undrafted")
    assert bound["few"] > undrafted["tokens_per_second"]
    assert bound["few"] == bound["bandwidth"] / sum(bound["bytes"].values())


@pytest.mark.parametrize("n", [1, 3])
def test_models_with_different_tokenizers_are_timed_by_text_without_an_end(n: int) -> None:
    pair = baco_of_kinds("gemma", "gpt2").pair
    assert pair.own_vocabularies is not None
    ends = {source: own.end_ids for source, own in pair.own_vocabularies.items()}
    params = never_ending(pair, TOKENS, n=n, seed=3)
    given = Task(pair.renderer.render(PROMPT), parse("Rand:0.5"), params)
    both, alone = Paired(pair).decode(given), Generate(pair).decode(given)
    for run in (both, alone):
        assert len(run.answers) == n
        assert all(TOKENS / 3 < len(answer) <= TOKENS for answer in run.answers)
    texts = [pair.tokenizer.decode(answer) for answer in alone.answers]
    assert alone.characters == sum(map(len, texts))
    for answer, sources in zip(both.answers, both.sources, strict=True):
        assert {*sources} == {"base", "aligned"}
        assert not any(token in ends[source] for token, source in zip(answer, sources, strict=True))
    assert both.characters is not None and both.characters > 0
    assert pair.own_vocabularies["base"].end_ids == ends["base"]  # the pair itself still ends


def test_a_pair_with_two_tokenizers_is_timed_by_characters(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_pair(tmp_path, tokenizer_of("gemma"), tokenizer_of("gpt2"))
    options = ["bench", str(tmp_path), "--quick", "-n", "2", "--tokens", "12"]
    assert baco_run([*options, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["unit"] == "character"
    assert [c["name"] for c in report["contestants"]] == ["paired", "generate"]
    assert all(c["characters_per_second"] > 0 for c in report["contestants"])
    assert report["left_out"].keys() == {"undrafted", "naive", "bound"}
    assert "bound" not in report
    assert baco_run(options) == 0
    shown = capfd.readouterr().out
    assert "characters/s" in shown
    assert "left out: naive:" in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--only", "speed"], "speed"),
        (["--tokens", "600"], "512"),
        (["demo", "--base", "x", "--aligned", "y"], "not both"),
        (["--base", "x"], "aligned"),
        (["nosuch"], "nosuch"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], named: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert baco_run(["bench", *arguments]) == 2
    printed = capfd.readouterr()
    assert not printed.out
    assert named in printed.err
    assert printed.err.count("\n") == 1
