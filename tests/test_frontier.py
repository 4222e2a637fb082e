"""`baco diagnose --frontier` says whether a router gets beyond the aligned model's own sampling."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baco.api import Baco
from baco.cli import run as baco
from baco.errors import BacoError
from baco.evaluation import frontier
from baco.evaluation.indicators import Measured
from baco.evaluation.methods import Draw, answer
from baco.evaluation.pareto import beyond, pareto_front
from baco.evaluation.plan import PairSpec
from baco.evaluation.records import Prompt, Setting
from baco.evaluation.report.load_scores import Cost, TaskScores
from baco.evaluation.store import Run
from baco.evaluation.tasks import Task
from tests.pairs import PairFolder

SMALL = ["diagnose", "--frontier", "--limit", "4", "-n", "2", "--max-tokens", "16"]
SMALL += ["--router", "P-Punc:0.4", "--router", "Rand:0.5"]
COORDINATE = st.integers(0, 12).map(lambda steps: steps / 12)
PLANE = st.lists(st.tuples(COORDINATE, COORDINATE), min_size=1, max_size=8)


@given(PLANE, PLANE)
def test_a_lead_is_what_a_point_must_lose_to_be_on_the_line_through_the_front(
    points: list[tuple[float, float]], rivals: list[tuple[float, float]]
) -> None:
    """Against a line of many points between neighbours of the front."""
    front = np.array(sorted(set(rivals)))
    front = front[pareto_front(front)]
    steps = np.linspace(0, 1, 241)[:, None]
    pieces = [front[i] + steps * (front[i + 1] - front[i]) for i in range(len(front) - 1)]
    line = np.concatenate([front, *pieces])
    expected = [(np.array(point) - line).max(axis=1).min() for point in points]
    assert beyond(np.array(points), np.array(rivals)) == pytest.approx(expected, abs=0.005)


def test_a_point_between_two_settings_of_the_rival_is_not_beyond_them() -> None:
    rivals = np.array([[1.0, 0.0], [0.0, 1.0], [0.4, 0.0]])
    leads = beyond(np.array([[0.5, 0.5], [0.6, 0.6], [0.3, 0.3], [1.0, 0.1]]), rivals)
    assert leads == pytest.approx([0.0, 0.1, -0.2, 0.05])


def scores(lead: float, prompts: int = 24, seed: int = 0, routers: int = 6) -> TaskScores:
    """Aligned settings on the line quality + diversity = 1, routers beyond it by `lead`."""
    random = np.random.default_rng(seed)
    diversity = np.concatenate([np.linspace(0, 1, 6), np.linspace(0.3, 0.7, routers)])
    quality = 1 - diversity + np.where(np.arange(6 + routers) < 6, 0.0, 2 * lead)
    figures = {
        name: mean[:, None] + random.normal(0, 0.15, (6 + routers, prompts))
        for name, mean in (("distinct_2", diversity), ("reward", quality))
    }
    methods = ["aligned, temperature"] * 6 + ["P-Punc"] * routers
    labels = [setting.label for setting in made_settings(routers)]
    return TaskScores(
        "some pair",
        "task",
        Measured(methods, labels, [None] * len(labels), [str(i) for i in range(prompts)], figures),
        {key: Cost() for key in zip(methods, labels, strict=True)},
        [Prompt(str(i), ({"role": "user", "content": "?"},)) for i in range(prompts)],
    )


def made_settings(routers: int) -> list[Setting]:
    temperatures = [0.5 + place / 4 for place in range(6)]
    return [
        *(
            Setting("aligned, temperature", f"Aligned T={t:g}", t, {"sampling": {"temperature": t}})
            for t in temperatures
        ),
        *(
            Setting("P-Punc", f"P-Punc:{i}", i, {"router": f"P-Punc:0.{i}"})
            for i in range(1, routers + 1)
        ),
    ]


def test_a_router_that_is_beyond_the_front_is_recommended_with_its_threshold() -> None:
    result = frontier.read(scores(0.2), made_settings(6), 4)
    assert (result.verdict, result.outcome) == ("router", "better")
    assert result.lead.low > 0.05 and result.lead.p_value < 0.05
    assert result.router.startswith("P-Punc:") and result.router in result.advice.replace("0.", "")
    assert f"--router {result.router.replace(':', ':0.')}" in result.command


def test_a_router_behind_the_front_leaves_the_aligned_model_at_a_temperature() -> None:
    result = frontier.read(scores(-0.2), made_settings(6), 4)
    assert (result.verdict, result.outcome) == ("aligned", "worse")
    assert result.advice.startswith("Use the aligned model at temperature ")
    assert "--router Aligned --temperature" in result.command


def test_routers_on_the_front_do_not_win_by_being_many() -> None:
    """The best of 40 on its own prompts looks beyond the front; on other prompts it is not."""
    won, looked = 0, 0
    for seed in range(12):
        result = frontier.read(scores(0.0, seed=seed, routers=40), made_settings(40), 4)
        won += result.verdict == "router"
        looked += max(point.lead.low for point in result.points if point.lead is not None) > 0
    assert looked > 3
    assert won <= 1


def test_every_router_is_also_run_under_each_sampler_that_is_named() -> None:
    plain = frontier.settings(["P-Punc:0.4"], 2)
    more = frontier.settings(["P-Punc:0.4"], 2, samplers=["base_min_p", "base_top_p:0.8"])
    assert more[: len(plain)] == plain
    added = more[len(plain) :]
    assert [setting.label for setting in added] == [
        "P-Punc:0.4 base_min_p:0.1",
        "P-Punc:0.4 base_top_p:0.8",
    ]
    assert added[1].options["sampling"] == {"samplers": ["base_top_p:0.8"]}
    assert frontier._spoken(added[1]) == "P-Punc:0.4 with base_top_p:0.8"
    command = "baco generate PROMPT --pair demo --router P-Punc:0.4 --sampler base_top_p:0.8"
    assert frontier._command("demo", added[1]) == command
    with pytest.raises(BacoError, match="unknown sampler"):
        frontier.settings(["P-Punc:0.4"], 2, samplers=["nope"])


def test_the_command_names_the_pair_as_a_user_does() -> None:
    pairs = {"a+b": "--base a --aligned b", "a+a": "--model a", "demo": "--pair demo"}
    for name, options in pairs.items():
        result = frontier.read(replace(scores(-0.2), pair=name), made_settings(6), 4)
        assert f" PROMPT {options} --router Aligned" in result.command


def test_a_pair_in_a_folder_with_a_plus_or_a_space_is_one_argument(tmp_path: Path) -> None:
    aligned = made_settings(0)[0]
    for name in ("a+b", "a b"):
        (tmp_path / name).mkdir()
        words = shlex.split(frontier._command(str(tmp_path / name), aligned))
        assert words[words.index("--pair") + 1] == str(tmp_path / name)


def test_a_combiner_is_advised_by_its_spelling() -> None:
    plain, truncated = frontier.settings(["Ensemble:0.5"], 2)[-2:]
    assert frontier._spoken(plain) == "Ensemble:0.5"
    assert frontier._spoken(truncated) == "Ensemble:0.5 with min-p 0.1"
    command = "baco generate PROMPT --pair demo --router Ensemble:0.5 --min-p 0.1"
    assert frontier._command("demo", truncated) == command


def test_few_prompts_are_named_and_cannot_give_a_small_p() -> None:
    result = frontier.read(scores(0.3, prompts=6), made_settings(6), 4)
    assert result.lead.p_value >= 2 / 2**6
    assert "only 6 prompts" in result.caveats[0]


def test_the_sweep_has_each_router_at_two_samplings_and_the_aligned_model_without_top_p() -> None:
    settings = frontier.settings(["P-Punc"], 4)
    methods = {setting.method for setting in settings}
    assert methods == {"aligned, temperature", "aligned, min-p", "P-Punc", "P-Punc, min-p"}
    own = frontier.settings(["P-Punc"], 4, min_p=frontier.MIN_P)
    assert {setting.method for setting in own} == methods - {"P-Punc, min-p"}


@pytest.mark.parametrize("router", ["P:0.5", "Ensemble:0.5"])
def test_a_routers_second_sampling_is_drawn_at_its_min_p(
    random_pair: Callable[..., PairFolder], router: str
) -> None:
    folder = random_pair("llama")
    pair = Baco.load(base=str(folder.base), aligned=str(folder.aligned))
    setting = next(
        s for s in frontier.settings([router], 2) if s.label == f"{router} min-p={frontier.MIN_P:g}"
    )
    prompts = [Prompt("1", ({"role": "user", "content": "Name a colour"},))]
    drawn = answer(pair, setting, prompts, Draw(2, 3, {"max_tokens": 12}))
    expected = [
        [
            c.text
            for c in pair.generate(
                "Name a colour", router=router, n=2, seed=3, max_tokens=12, min_p=p
            )
        ]
        for p in (frontier.MIN_P, 0.0)
    ]
    texts = [sample.text for sample in drawn[0]]
    assert texts == expected[0] != expected[1]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "frontier"
    assert baco([*SMALL, "--out", str(path)]) == 0
    return path


def test_the_answer_is_one_json_object_with_every_setting(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert baco([*SMALL, "--out", str(begun), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verdict"] in ("router", "aligned") and result["run"] == str(begun)
    assert len(result["points"]) == 12 + 2
    assert {"distinct_2", "distinct_k", "reward"} <= result["points"][0]["figures"].keys()
    assert result["command"].startswith("baco generate PROMPT --pair demo --router ")
    assert len(result["chosen"]) == 2 and result["lead"]["low"] <= result["lead"]["high"]


def test_a_stopped_search_continues_and_ends_the_same(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert baco([*SMALL, "--out", str(begun), "--json"]) == 0
    whole = capsys.readouterr()
    assert "takes" not in whole.err  # nothing is left to draw
    samples = (begun / "samples.jsonl").read_bytes()
    again = tmp_path / "again"
    again.mkdir()
    for name in ("run.json", "prompts.jsonl"):
        (again / name).write_bytes((begun / name).read_bytes())
    (again / "samples.jsonl").write_bytes(samples[: len(samples) // 2])
    assert baco([*SMALL, "--out", str(again), "--json"]) == 0
    shown = capsys.readouterr()
    assert (again / "samples.jsonl").read_bytes() == samples
    assert "drawing them takes" in shown.err and "were done before" in shown.err
    first, second = json.loads(whole.out), json.loads(shown.out)
    assert {**first, "run": ""} == {**second, "run": ""}


def test_an_equal_command_continues_in_the_users_cache_and_another_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BACO_HOME", str(tmp_path))
    runs = []
    for more in ([], [], ["--seed", "1"]):
        assert baco([*SMALL, "--router", "P:0.5", "--json", *more]) == 0
        runs.append(json.loads(capsys.readouterr().out)["run"])
    assert runs[0] == runs[1] != runs[2]
    assert Run.open(Path(runs[0])).complete and Path(runs[0]).is_relative_to(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--router", "P-Punc"], "--router belongs to --frontier: give both"),
        (["--frontier", "--limit", "3"], "too few prompts (3): give 4 or more"),
        (["--frontier", "--limit", "0"], "limit is 0: take at least one prompt"),
        (["--frontier", "--limit", "-3"], "limit is -3: take at least one prompt"),
        (["--frontier", "--router", "Base"], "Base is one model alone"),
        (["--frontier", "--router", "P-Pun"], "P-Pun"),
        (["--frontier", "--judge", "nil=x"], "judge 'nil=x': give ROLE=ID_OR_FOLDER"),
        (["--frontier", "--samples", "1"], "distinct_k compares a prompt's samples"),
        (["--frontier", "--prompts", "none.txt"], "none.txt"),
        (["--frontier", "--model", "x", "--pair", "demo"], "give --model alone"),
    ],
)
def test_wrong_input_is_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert baco(["diagnose", *options]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and len(shown.err.splitlines()) == 1 and not shown.out


def test_without_a_judge_of_quality_nothing_is_drawn(
    tmp_path: Path, random_pair: Callable[..., PairFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = random_pair("llama")
    options = ["diagnose", "--frontier", "--base", str(folder.base)]
    options += ["--aligned", str(folder.aligned), "--out", str(tmp_path / "run")]
    assert baco([*options, "--judge", f"reference={tmp_path / 'none'}"]) == 2
    shown = capsys.readouterr().err
    assert "nothing can judge quality" in shown and "--judge reference=ID_OR_FOLDER" in shown
    assert not (tmp_path / "run").exists()


def test_a_model_of_the_pair_is_named_an_unfair_judge(
    random_pair: Callable[..., PairFolder],
) -> None:
    folder = random_pair("llama")
    aligned = str(folder.aligned)
    task = Task("mine", "a file", ())
    own = frontier.metrics(task, {"reference": aligned}, PairSpec(f"{folder.base}+{aligned}"))
    assert any("a model of the pair" in caveat for caveat in own.caveats)
    other = frontier.metrics(task, {"reference": aligned}, PairSpec("demo"))
    assert not any("a model of the pair" in caveat for caveat in other.caveats)
