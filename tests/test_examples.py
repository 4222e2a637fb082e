"""The examples work as described, on the demo pair."""

import ast
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.pairs import PairFolder
from tests.registries import restored
from tests.serving import served

if TYPE_CHECKING:
    from baco import Baco

# Most tests start several processes that load models.
pytestmark = pytest.mark.timeout(900)

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def run(script: str, *options: str, folder: Path, code: int = 0) -> subprocess.CompletedProcess:
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *options],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert finished.returncode == code, finished.stderr
    return finished


def refusal(script: str, *options: str) -> str:
    """The error line of a script that refuses its options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *options])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    message = stopped.value.code
    assert isinstance(message, str)
    assert "\n" not in message
    return message


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_readme_lists_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert set(re.findall(r"\]\((\w+\.(?:py|ipynb))\)", text)) == files


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_describes_the_script_and_gives_an_example(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"example: python examples/{script}" in " ".join(shown.split())
    assert "--pair" in shown


def test_synthetic_data_keeps_distinct_answers_that_their_provenance_reproduces(
    tmp_path: Path, demo: "Baco"
) -> None:
    run("synthetic_data.py", "mixed.jsonl", "-n", "8", folder=tmp_path)
    run("synthetic_data.py", "alone.jsonl", "-n", "8", "--router", "Aligned", folder=tmp_path)
    mixed, alone = rows(tmp_path / "mixed.jsonl"), rows(tmp_path / "alone.jsonl")
    assert len(alone) < len(mixed) <= 24
    for dataset in (mixed, alone):
        assert len({(row["prompt"], row["text"]) for row in dataset}) == len(dataset)
        assert len({row["id"] for row in dataset}) == len(dataset)
    for row in mixed[:3] + mixed[-3:]:
        origin = row["provenance"]
        assert origin["pair"] == "demo"
        answers = demo.generate(
            row["prompt"], router=origin["router"], seed=origin["seed"], n=origin["params"]["n"]
        )
        assert answers[origin["sample"]].text == row["text"]
        assert answers[origin["sample"]].base_share == pytest.approx(origin["base_share"], abs=1e-5)


def test_synthetic_data_resumes_and_leaves_out_unfinished_and_repeated_answers(
    tmp_path: Path,
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    conversation = [{"role": "user", "content": "Recommend a summer destination"}]
    prompts.write_text(json.dumps({"messages": conversation}), encoding="utf-8")
    options = ("data.jsonl", "--prompts", "prompts.jsonl", "-n", "4")
    run("synthetic_data.py", *options, folder=tmp_path)
    (shard,) = (tmp_path / "data.jsonl.answers").glob("*.jsonl")
    record = json.loads(shard.read_text(encoding="utf-8"))
    assert rows(tmp_path / "data.jsonl")[0]["prompt"] == conversation

    # The shard that is there is not drawn again, so changes to it reach the rows.
    one, two, three, four = record["samples"]
    two["text"] = one["text"].upper() + " "
    three["finish_reason"] = "length"
    shard.write_text(json.dumps(record) + "\n", encoding="utf-8")
    finished = run("synthetic_data.py", *options, folder=tmp_path)
    assert "2 rows of 4 answers; left out: 1 repeated, 1 unfinished" in finished.stdout
    assert [row["text"] for row in rows(tmp_path / "data.jsonl")] == [one["text"], four["text"]]

    refused = run("synthetic_data.py", *options, "--seed", "2", folder=tmp_path, code=2)
    assert "seed" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_synthetic_data_refuses_a_folder_before_it_draws(tmp_path: Path) -> None:
    assert refusal("synthetic_data.py", str(tmp_path)) == (
        f"synthetic_data: {tmp_path} is a folder: give a file to write"
    )


def test_a_distilabel_step_writes_the_answers_of_the_pair(tmp_path: Path, demo: "Baco") -> None:
    pytest.importorskip("distilabel")
    schema = {"type": "integer", "minimum": 1, "maximum": 99}
    (tmp_path / "schema.json").write_text(json.dumps(schema), encoding="utf-8")
    options = ("out.jsonl", "-n", "2", "--schema", "schema.json")
    run("distilabel_pipeline.py", *options, folder=tmp_path)
    written = rows(tmp_path / "out.jsonl")
    assert len(written) == 6
    for row in written:
        answers = demo.generate(row["instruction"], router="P-Punc:0.4", n=2, seed=1, schema=schema)
        answer = answers[row["sample"]]
        assert row["generation"] == answer.text
        assert [part["source"] for part in row["spans"]] == [p.source for p in answer.pieces]


def test_the_distilabel_example_refuses_a_wrong_schema_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("distilabel")
    (tmp_path / "schema.json").write_text("{", encoding="utf-8")
    line = refusal("distilabel_pipeline.py", "out.jsonl", "--schema", str(tmp_path / "schema.json"))
    assert "the schema is not JSON" in line


def test_story_writing_marks_the_words_of_the_base_model(tmp_path: Path, demo: "Baco") -> None:
    shown = run("story_writing.py", "--thresholds", "0.1", "0.7", folder=tmp_path).stdout
    for gamma, part in zip((0.1, 0.7), shown.split("--- ")[1:], strict=True):
        heading, rest = part.split("\n", 1)
        text, share = rest.rsplit("base share", 1)
        assert heading == f"P-Punc:{gamma:g}"
        (answer,) = demo.generate("Write a short story", router=heading, seed=1, max_tokens=400)
        assert text.replace("[", "").replace("]", "").strip() == answer.text
        assert share.strip() == f"{answer.base_share:.0%}"
        marked = "".join(re.findall(r"\[(.*?)\]", text, re.DOTALL)).replace(" ", "")
        base = "".join(piece.text for piece in answer.pieces if piece.source == "base")
        assert marked == base.replace(" ", "")
    assert "[" in shown


def test_story_writing_takes_a_pair_of_your_own(
    random_pair: Callable[..., PairFolder],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--pair", str(random_pair().base.parent), "--thresholds", "0.5", "--max-tokens", "8"]
    monkeypatch.setattr(sys, "argv", ["story_writing.py", *options])
    runpy.run_path(str(EXAMPLES / "story_writing.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert shown.startswith("--- P-Punc:0.5\n")
    assert "base share" in shown


def test_answers_that_a_combiner_mixed_have_no_base_share(
    demo: "Baco", monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    story = ["story_writing.py", "--router", "Ensemble", "--thresholds", "0.3"]
    with served(demo) as server:
        client = ["openai_client.py", "--url", server.url, "--router", "Ensemble:0.3", "-n", "1"]
        for script, *options in (client, [*story, "--max-tokens", "8"]):
            monkeypatch.setattr(sys, "argv", [script, *options])
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
            shown = capsys.readouterr().out
            assert "mixed" in shown
            assert "]" not in shown


def test_story_writing_refuses_bad_input_in_one_line() -> None:
    assert refusal("story_writing.py", "--thresholds", "7").startswith(
        "story_writing: router 'P-Punc:7': threshold 7"
    )


def test_own_router_answers_at_its_calibrated_threshold(tmp_path: Path, demo: "Baco") -> None:
    shown = run("own_router.py", "--diversity", "0.7", folder=tmp_path).stdout
    parts = re.findall(
        r"^(\S+): base share (\d+%), (\d) of 4 differ\n((?:  .*\n)+)", shown, re.MULTILINE
    )
    assert [router.split(":")[0] for router, *_ in parts] == ["Overlap-Punc", "P-Punc"]
    with restored():
        namespace = runpy.run_path(str(EXAMPLES / "own_router.py"))
        for router, share, different, texts in parts:
            answers = demo.generate(namespace["PROMPTS"][0], router=router, n=4, seed=1)
            assert texts.splitlines() == [f"  {answer.text}" for answer in answers]
            assert different == str(len({answer.text for answer in answers}))
            assert share == f"{sum(answer.base_share or 0 for answer in answers) / 4:.0%}"
            assert share != "0%"
        name, gamma = parts[0][0].split(":")
        curve = namespace["calibrate"](demo, name, namespace["PROMPTS"], samples=4, seed=1)
        assert f"{curve.at_diversity(0.7):g}" == gamma


def test_own_routers_rule_picks_base_where_the_models_overlap_little() -> None:
    with restored():
        overlap = runpy.run_path(str(EXAMPLES / "own_router.py"))["overlap"]
    base = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    aligned = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.3, 0.7], [0.0, 0.0, 1.0]]).log()
    signals = SimpleNamespace(base=base, aligned=aligned)  # overlaps: 1, 0.3 and 0
    assert overlap(signals, 0.4).tolist() == [False, True, True]
    assert overlap(signals, 0.2).tolist() == [False, False, True]


def test_own_router_refuses_bad_input_in_one_line() -> None:
    with restored():
        assert refusal("own_router.py", "--diversity", "2").startswith(
            "own_router: diversity is 2: give a number from 0 to 1"
        )
    with restored():
        assert refusal("own_router.py", "-n", "1").startswith("own_router: samples is 1: ")


def test_openai_client_shows_the_pair_s_answers_and_their_sources(
    tmp_path: Path, demo: "Baco"
) -> None:
    shown = run("openai_client.py", folder=tmp_path).stdout
    whole, streamed = shown.split("\n\n")
    answers = demo.generate("Recommend a summer destination", router="P-Punc:0.4", n=4, seed=1)
    assert whole.splitlines() == [f"base share {a.base_share:.0%}: {a.text}" for a in answers]
    _, text, end = streamed.strip().split("\n")
    assert re.sub(r"[\[\]]", "", text) == answers[0].text
    assert "".join(re.findall(r"\[(.*?)\]", text)) == "".join(
        piece.text for piece in answers[0].pieces if piece.source == "base"
    )
    assert end == f"base share {answers[0].base_share:.0%}, seed 1"


def test_openai_client_uses_a_running_server_and_refuses_bad_input_in_one_line(
    demo: "Baco",
) -> None:
    with served(demo) as server:
        message = refusal("openai_client.py", "--url", server.url, "--router", "Nope:1")
    assert message.startswith(f"openai_client: {server.url}: Error code: 400 - unknown router")


def test_inspect_scores_every_router_and_counts_distinct_answers(tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai", reason="needs pip install inspect-ai")
    shown = run("inspect_eval.py", "-n", "2", "--routers", "Aligned", folder=tmp_path).stdout
    first, *rest = shown.splitlines()
    assert first == "Aligned: accuracy 1.00"  # the facts of the demo world, and any destination
    assert [re.sub(r"^  [12] of 2 differ: ", "", line) for line in rest] == [
        "What is the capital of Norway?",
        "What is the capital of Italy?",
        "Recommend a summer destination",
    ]


def cells(kind: str) -> list[dict]:
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_of_format_4_5_and_holds_no_outputs() -> None:
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    texts, programs = cells("markdown"), cells("code")
    assert len(texts) + len(programs) == len(notebook["cells"])
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    fields = {"cell_type", "id", "metadata", "source"}
    assert all(cell.keys() == fields for cell in texts)
    for cell in programs:
        assert cell.keys() == fields | {"execution_count", "outputs"}
        assert cell["execution_count"] is None
        assert cell["outputs"] == []


def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    demo: "Baco",
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The value of each cell's last expression equals the output shown below it."""
    pytest.importorskip("altair", reason="the notebook draws with altair: baco[evaluation]")
    monkeypatch.chdir(tmp_path)
    programs = ["".join(cell["source"]) for cell in cells("code")]
    assert any('"--limit", "8"' in program for program in programs)
    names: dict[str, Any] = {"__name__": "__main__"}
    shown: list[Any] = []
    for program in programs:
        tree = ast.parse(program.replace('"--limit", "8"', '"--limit", "2"'))
        shown.append(None)
        if isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)  # type: ignore[attr-defined]
            exec(compile(tree, "notebook", "exec"), names)
            shown[-1] = eval(compile(last, "notebook", "eval"), names)
        else:
            exec(compile(tree, "notebook", "exec"), names)

    question = "Recommend a summer destination"
    printed = capsys.readouterr().out
    for router in ("Base", "Aligned", "P-Punc:0.4"):
        for answer in demo.generate(question, router=router, n=4, seed=1):
            assert f"   {answer.text}\n" in printed
    coloured = shown[1]._repr_html_()
    assert re.findall(r"<u[^>]*>(.*?)</u>", coloured) == [
        piece.text
        for answer in demo.generate(question, router="P-Punc:0.4", n=4, seed=1)
        for piece in answer.pieces
        if piece.source == "base"
    ]
    points = shown[3].set_index("setting")
    assert {"Base", "Aligned", "P-Punc:0.15", "P-Punc:0.6"} <= set(points.index)
    assert points.distinct_2["Aligned"] < points.distinct_2["P-Punc:0.6"]
    assert points.reward["Base"] < points.reward["P-Punc:0.15"]
    (drawn,) = shown[4].to_dict()["datasets"].values()
    assert [row["setting"] for row in drawn] == list(points.index)
