"""`baco bench` compares like with like; how fast anything is, no test says."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from baco import Baco
from baco.bench.contestants import Contestant, Generate, Naive, Paired, Task, never_ending
from baco.bench.race import Entry, same_answers
from baco.bench.server import Speaker
from baco.bench.servers import two_servers
from baco.cli import run

PROMPT = "Write a short story about a dragon."
TOKENS = 40
BACO = [sys.executable, "-c", "from baco.cli import main; main()"]


def task(baco: Baco, n: int, router: str = "P-Punc:0.4", **sampling: Any) -> Task:
    params = never_ending(baco.pair, TOKENS, n=n, seed=3, **sampling)
    return Task(baco.pair.renderer.render(PROMPT), baco.router(router), params)


@pytest.mark.parametrize("kind", [Paired, Naive, Generate])
@pytest.mark.parametrize("n", [1, 3])
def test_every_contestant_says_as_many_tokens_and_never_ends(
    demo: Baco, kind: type[Contestant], n: int
) -> None:
    made = kind(demo.pair).decode(task(demo, n))  # type: ignore[call-arg]
    assert [len(answer) for answer in made.answers] == [TOKENS] * n
    assert not demo.pair.end_ids & {token for answer in made.answers for token in answer}
    assert 0 < made.first <= made.seconds


@pytest.mark.parametrize("router", ["P-Punc:0.4", "H:1.5", "Rand:0.5", "Aligned"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_naive_loop_gives_the_very_tokens_of_the_engine(
    demo: Baco, router: str, temperature: float
) -> None:
    asked = task(demo, 4, router, temperature=temperature)
    naive, paired = Naive(demo.pair).decode(asked), Paired(demo.pair).decode(asked)
    assert (naive.answers, naive.sources) == (paired.answers, paired.sources)


def test_generate_draws_with_the_same_temperature_and_truncation(demo: Baco) -> None:
    greedy = task(demo, 1, "Aligned", temperature=0.0)
    assert Generate(demo.pair).decode(greedy).answers == Paired(demo.pair).decode(greedy).answers


@pytest.mark.parametrize("concurrent", [0, 2])
def test_two_servers_say_what_the_engine_says_at_temperature_0(demo: Baco, concurrent: int) -> None:
    greedy = task(demo, 2, temperature=0.0)
    with two_servers(demo.pair, concurrent=concurrent) as servers:
        asked = servers.decode(greedy)
    paired = Paired(demo.pair).decode(greedy)
    assert (asked.answers, asked.sources) == (paired.answers, paired.sources)


@pytest.mark.parametrize("texts", [1, 3])
def test_a_server_that_keeps_what_it_read_says_what_one_that_rereads_says(
    demo: Baco, texts: int
) -> None:
    model = demo.pair.base.model
    keeps, rereads = Speaker(model, texts=texts), Speaker(model, rereads=True)
    for text in ([5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 8, 9, 10], [5, 6, 9], [40, 41], [40, 41]):
        assert torch.allclose(keeps.logprobs(text), rereads.logprobs(text), atol=1e-4)


def test_answers_that_differ_are_counted(demo: Baco) -> None:
    entries = [Entry("paired", 2, Paired(demo.pair)), Entry("naive", 2, Naive(demo.pair))]
    for entry, seed in zip(entries, (3, 4), strict=True):
        changed = replace(task(demo, 2).params, seed=seed)
        entry.runs.append(entry.contestant.decode(replace(task(demo, 2), params=changed)))
    assert same_answers(entries) == {"naive_n2": 0.0}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    options = ["--quick", "--json", "-n", "1", "-n", "8", "--tokens", "16", "--gamma", "0.4"]
    options += ["--most-asked", "8"]
    done = subprocess.run(
        [*BACO, "bench", *options], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_json_names_every_ratio(report: dict[str, Any]) -> None:
    for name in (
        "generate_n1",
        "generate_n8",
        "naive",
        "naive_n8",
        "http",
        "http_n8",
        "http_concurrent",
    ):
        assert 0 < report[name] < math.inf
        spread = report["ratios"][name]
        assert spread["low"] <= spread["middle"] <= spread["high"]


def test_the_report_says_what_was_measured_on_what(report: dict[str, Any]) -> None:
    assert report["command"].startswith("baco bench --quick --json")
    assert (report["pair"], report["tokens"], report["dtype"]) == ("demo", 16, "float32")
    assert report["machine"]["threads"] >= 1
    assert {(c["name"], c["n"]) for c in report["contestants"]} >= {
        (name, n) for name in ("paired", "undrafted", "generate", "naive") for n in (1, 8)
    }
    assert 0.5 < report["agreement"] <= 1
    assert all(share > 0.9 for share in report["same_answers"].values())


def test_memory_and_the_long_prompt_are_told(report: dict[str, Any]) -> None:
    memory, prompt = report["memory"], report["long_prompt"]
    assert memory["n"] == 8
    assert memory["weights"] == 2 * 7_512_960  # 1.9 M parameters a half, in float32
    assert memory["peak"] > memory["cache"] > 8 * 16
    assert memory["ratio"] == memory["peak"] / (memory["weights"] + memory["cache"])
    assert prompt["n"] == 32
    assert prompt["tokens"] == 508  # the demo's context window less what is said
    assert prompt["reads"] == {"base": 1, "aligned": 1}


def test_the_bound_is_above_what_is_reached_without_drafts(report: dict[str, Any]) -> None:
    bound = report["bound"]
    undrafted = next(c for c in report["contestants"] if c["name"] == "undrafted")
    assert bound["few"] > undrafted["tokens_per_second"]
    assert bound["few"] == bound["bandwidth"] / sum(bound["bytes"].values())


def test_the_sweep_tells_what_drafting_took(report: dict[str, Any]) -> None:
    for row in report["gammas"]:
        assert row["router"] == "P-Punc:0.4"
        assert 0 <= row["stood"] <= row["drafted"]
        assert 0 <= row["base_share"] <= 1
        assert all(0 < forwards < 3 for forwards in row["forwards"].values())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--only", "speed"], "speed"),
        (["--tokens", "600"], "512"),
        (["--body", "7b"], "7b"),
        (["demo", "--body", "50m"], "one pair"),
        (["--base", "x"], "--aligned"),
        (["nosuch"], "nosuch"),
        (["--gamma", "0.3", "--router", "Aligned"], "threshold"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], named: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *arguments]) == 2
    told = capfd.readouterr()
    assert not told.out
    assert named in told.err
    assert told.err.count("\n") == 1
