"""The examples do what they say, on the demo pair."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from baco import Baco

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
    """The line with which a script refuses its options."""
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


def test_synthetic_data_keeps_different_answers_that_their_provenance_gives_again(
    tmp_path: Path, demo: "Baco"
) -> None:
    run("synthetic_data.py", "mixed.jsonl", "-n", "8", folder=tmp_path)
    run("synthetic_data.py", "alone.jsonl", "-n", "8", "--router", "Aligned", folder=tmp_path)
    mixed, alone = rows(tmp_path / "mixed.jsonl"), rows(tmp_path / "alone.jsonl")
    assert len(alone) < len(mixed) <= 24
    for made in (mixed, alone):
        assert len({(row["prompt"], row["text"]) for row in made}) == len(made)
        assert len({row["id"] for row in made}) == len(made)
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


def test_story_writing_refuses_bad_input_in_one_line() -> None:
    assert refusal("story_writing.py", "--thresholds", "7").startswith(
        "story_writing: router 'P-Punc:7': threshold 7"
    )
