"""Files of prompts and answers, their scores, and NoveltyBench's published figures as an oracle."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from baco.cli import run as baco
from baco.errors import BacoError
from baco.evaluation.answer_files import AnswerFile, parse_answers, read_answers
from baco.evaluation.answer_scores import against, published, score_answers
from baco.evaluation.methods import Draw
from baco.evaluation.methods.answer_file import AnswersOfFile
from baco.evaluation.metrics import metric
from baco.evaluation.metrics.registry import Figure
from baco.evaluation.records import Prompt

ROWS = [
    {"prompt": "Name a city.", "answers": ["Oslo", "Oslo", "Rome", "a long way"]},
    {"prompt": 'Name, please, a "dish".', "answers": ["Soup", "Stew,\nhot", "Soup", "Pie"]},
]
PUBLISHED = Path(__file__).parent / "data/noveltybench.jsonl"


def written(folder: Path, suffix: str) -> Path:
    """ROWS in a form that programs write."""
    path = folder / f"answers{suffix}"
    single = [
        {"question": row["prompt"], "response": answer} for row in ROWS for answer in row["answers"]
    ]
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(single), encoding="utf-8")
    elif suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        import csv

        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(
                file, ["question", "response"], delimiter="\t" if suffix == ".tsv" else ","
            )
            table.writeheader()
            table.writerows(single)
    return path


def test_a_cell_of_csv_may_be_a_long_document() -> None:
    assert parse_answers("prompt,answer\np," + "x" * 200_000).answers == [["x" * 200_000]]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_form_of_file_is_read_alike(tmp_path: Path, suffix: str) -> None:
    file = read_answers(written(tmp_path, suffix))
    assert [prompt.text for prompt in file.prompts] == [row["prompt"] for row in ROWS]
    assert list(file.answers) == [row["answers"] for row in ROWS]
    if suffix in (".jsonl", ".json", ".csv"):
        text = written(tmp_path, suffix).read_text(encoding="utf-8")
        assert parse_answers(text).answers == file.answers


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a", "outputs": ["x", "y"]},
        {"query": "a", "generations": ["x", "y"]},
        {
            "messages": [{"role": "user", "content": "a"}],
            "completions": [{"text": "x"}, {"text": "y"}],
        },
        {"input": "a", "responses": json.dumps(["x", "y"])},
    ],
)  # fmt: skip
def test_usual_names_of_columns_are_known(row: dict[str, Any]) -> None:
    file = parse_answers(json.dumps(row) + "\n")
    assert (file.prompts[0].text, file.answers[0]) == ("a", ["x", "y"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no answers"),
        ("{}\n", "line 1: no prompt; name its column prompt, question,"),
        ('{"prompt": "a"}\n', "line 1: no answer; name the column answers, generations,"),
        ('{"prompt": "a", "answers": []}\n', "'answers' is \\[\\]; give a list of texts"),
        ('{"prompt": "a", "answer": 3}\n', "'answer' has 3 for an answer; give a text"),
        ('{"prompt": 3, "answer": "x"}\n', "'prompt' is 3; give a text, or a list of messages"),
        ('{"prompt": "a", "answer": "x"}\n{', "line 2: give a JSON object on every line"),
        ("[3]", "entry 1: give an object with a prompt and its answers"),
        ("prompt,other\na,b\n", "no answer; name the column"),
    ],
)
def test_a_bad_row_is_one_line_with_its_place(text: str, message: str) -> None:
    with pytest.raises(BacoError, match=message) as caught:
        parse_answers(text)
    assert "\n" not in str(caught.value)


def test_scores_are_those_of_the_metrics(tmp_path: Path) -> None:
    file = read_answers(written(tmp_path, ".csv"))
    scores = score_answers(file, (), {})
    assert [row.metric for row in scores] == [
        "distinct_1", "distinct_2", "distinct_3", "ead", "self_bleu", "self_rouge_l",
    ]  # fmt: skip
    for row in scores:
        expected = metric(row.metric).score(file.prompts, file.answers)
        assert row.values.tolist() == expected
        assert row.estimate is not None
        assert row.estimate.value == pytest.approx(np.mean(row.values))
        assert row.estimate.low <= row.estimate.value <= row.estimate.high


def of(rows: dict[str, list[str]]) -> AnswerFile:
    prompts = [Prompt(text, ({"role": "user", "content": text},)) for text in rows]
    return AnswerFile("f", prompts, list(rows.values()))


def test_two_files_are_compared_on_the_prompts_of_both() -> None:
    one = of({str(place): ["a b", "c d"] for place in range(4)} | {"own": ["a", "a"]})
    other = of({"other": ["x", "y"]} | {str(place): ["a b", "a b"] for place in reversed(range(4))})
    (own,), (theirs,) = (score_answers(file, ["distinct_1"], {}) for file in (one, other))
    lead = against(one, own, other, theirs)
    assert lead is not None
    assert lead.difference == pytest.approx(0.5)
    assert lead.p_value == pytest.approx(0.125)  # the least that 4 prompts can give
    assert against(one, own, of({"other": ["x", "y"]}), score_answers(
        of({"other": ["x", "y"]}), ["distinct_1"], {})[0]) is None  # fmt: skip


def test_a_file_is_scored_on_one_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, ".jsonl")
    assert baco(["score", str(path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["prompts"], summary["answers"], summary["answers_per_prompt"]) == (2, 8, [4, 4])
    assert summary["equal_answers"] == pytest.approx(2 / 8)
    monkeypatch.setattr("sys.stdin", io.StringIO(path.read_text(encoding="utf-8")))
    assert baco(["score", "-", "--metric", "distinct_1", "--against", str(path)]) == 0
    shown = capsys.readouterr()
    assert "2 prompts, 4 answers each; 25% of the answers equal an earlier one" in shown.out
    assert "+0.000" in shown.out
    assert "only 2 prompts: intervals are rough; use 20 or more" in shown.err
    assert baco(["score", str(path), "--against", "gemma-2-2b-it"]) == 0
    shown = capsys.readouterr()
    assert "gemma-2-2b-it on NB-Curated (100 prompts, 10 answers each) has distinct_k 6.340" in (
        " ".join(shown.out.split())
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jsonl"], "cannot read missing.jsonl"),
        (["answers.jsonl", "--against", "gemma-2-2b"], "use gemma-2-2b-it,"),
        (["answers.jsonl", "--metric", "self_blue"], "unknown metric 'self_blue'"),
        (["answers.txt"], "its name must end in one of .jsonl"),
    ],
)
def test_bad_requests_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    written(tmp_path, ".jsonl")
    monkeypatch.chdir(tmp_path)
    assert baco(["score", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_an_infinite_figure_names_metric_and_prompt() -> None:
    figure = Figure("odd", "lexical", 1, {}, lambda prompts, answers: [1.0, float("inf")])
    prompts = [Prompt(name, ({"role": "user", "content": "?"},)) for name in ("p", "q")]
    with pytest.raises(BacoError, match="odd of the answers to prompt 'q' is inf: a metric must"):
        figure.score(prompts, [["a"], ["b"]])


class AsPublished:
    """Classes and ratings as NoveltyBench publishes them; the rating of a repeat is not known."""

    made_by = {"figures": "published"}  # noqa: RUF012

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows

    def partition(self, prompts: Any, answers: Any) -> list[list[int]]:
        return [row["partition"] for row in self.rows]

    def rewards(self, prompts: Any, answers: Any) -> list[list[float]]:
        return [[score or 7.0 for score in row["generation_scores"]] for row in self.rows]

    def ratings(self, rewards: Sequence[Sequence[float]]) -> list[list[float]]:
        return [list(row) for row in rewards]


def test_distinct_k_and_utility_k_are_noveltybenchs_own() -> None:
    rows = [json.loads(line) for line in PUBLISHED.read_text(encoding="utf-8").splitlines()]
    models = {row["model"] for row in rows}
    assert len(models) == 24
    assert models < set(published())
    judge = AsPublished(rows)
    prompts = [Prompt(row["prompt"], ({"role": "user", "content": "?"},)) for row in rows]
    answers = [[str(place) for place in range(10)] for _ in rows]
    judges = {"equivalence": judge, "reward": judge}
    classes = metric("distinct_k", **judges).score(prompts, answers)
    assert classes == [row["distinct"] for row in rows]
    utility = metric("utility_k", **judges).score(prompts, answers)
    assert utility == pytest.approx([row["utility"] for row in rows], abs=1e-9)


def test_prompts_that_end_alike_get_the_answers_to_their_own_conversation(tmp_path: Path) -> None:
    chats = [
        [
            {"role": "user", "content": city},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Tell me more"},
        ]
        for city in ("Oslo", "Rome")
    ]
    path = tmp_path / "others.jsonl"
    rows = [{"messages": chat, "answers": [chat[0]["content"]]} for chat in chats]
    rows.append({"prompt": "Why?", "answers": ["Because"]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def tokenizer(text: str, *, add_special_tokens: bool = True) -> dict[str, list[str]]:
        return {"input_ids": ["<s>"] * add_special_tokens + text.split()}

    pair: Any = SimpleNamespace(pair=SimpleNamespace(tokenizer=tokenizer))
    system = {"role": "system", "content": "Be brief."}
    prompts = [Prompt(str(number), tuple(chat)) for number, chat in enumerate(chats)]
    prompts.append(Prompt("2", (system, {"role": "user", "content": "Why?"})))
    method = AnswersOfFile()
    answers = method.answer(pair, method.setting(str(path)), prompts, Draw(1, 0))
    assert [(row[0].text, row[0].tokens) for row in answers] == [
        ("Oslo", 1),
        ("Rome", 1),
        ("Because", 1),
    ]
    other = Prompt("3", ({"role": "user", "content": "Tell me more"},))
    with pytest.raises(BacoError, match="has 0 answers to prompt '3'"):
        method.answer(pair, method.setting(str(path)), [other], Draw(1, 0))
