"""`baco dataset dedupe`: which rows go, which stay, and a copy that can be continued."""

import csv
import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from baco.cli import run
from baco.dataset import near_duplicates
from baco.dataset.dedupe import Result, dedupe
from baco.dataset.files import Answer, Dataset
from baco.dataset.near_duplicates import (
    SHINGLE,
    Duplicates,
    Rule,
    find_duplicates,
    read_index,
    write_index,
)
from baco.errors import BacoError
from baco.text.segmentation import bare_words

LONG = (
    "You can sit by the fire in the evening and enjoy the wonderful view of the quiet old harbour"
)
ROWS = [
    {"prompt": "p", "answer": LONG + "."},
    {"prompt": "p", "answer": "Go to Oslo."},
    {"prompt": "q", "answer": LONG + ".\n"},  # exact
    {"prompt": "q", "answer": LONG.upper() + "!"},  # the same words
    {"prompt": "p", "answer": LONG + " of Bergen, tonight."},  # near, and longer
    {"prompt": "q", "answer": "Go to Rome."},
    {"prompt": "p", "answer": ""},
    {"prompt": "p", "answer": " "},  # exact
]


def ignore(_: int) -> None:
    pass


def write(folder: Path, rows: list[dict], suffix: str = "jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    else:
        pandas.DataFrame(rows).to_parquet(path, index=False)
    return path


def duplicates_of(texts: list[str], rule: Rule, folder: Path) -> Duplicates:
    path = folder / "index"
    write_index(path, iter([Answer("", text, {}) for text in texts]), ignore)
    return find_duplicates(read_index(path), rule)


def kept_rows(out: Path) -> list[dict]:
    (file,) = (out / "data").iterdir()
    return [json.loads(line) for line in file.read_text().splitlines()]


def removed_rows(out: Path) -> list[tuple[int, int, bool]]:
    lines = (out / "removed.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["row"], row["kept"]["row"], row["exact"]) for row in rows]


@pytest.mark.parametrize(
    ("options", "removed"),
    [
        ([], [(2, 0, True), (3, 0, False), (4, 0, False), (7, 6, True)]),
        (["--keep", "longest"], [(0, 4, False), (2, 4, True), (3, 4, False), (7, 6, True)]),
        (["--same-prompt"], [(3, 2, False), (4, 0, False), (7, 6, True)]),
        (["--threshold", "1"], [(2, 0, True), (3, 0, False), (7, 6, True)]),
    ],
)
def test_of_every_group_of_duplicates_the_rule_keeps_one(
    options: list[str],
    removed: list[tuple[int, int, bool]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = write(tmp_path, ROWS), tmp_path / "out"
    assert run(["dataset", "dedupe", str(path), str(out), *options, "--json"]) == 0
    assert removed_rows(out) == removed
    gone = {row for row, _, _ in removed}
    assert kept_rows(out) == [row for place, row in enumerate(ROWS) if place not in gone]
    said = json.loads(capsys.readouterr().out)
    exact = sum(exact for _, _, exact in removed)
    assert (said["rows"], said["kept"]) == (len(ROWS), len(ROWS) - len(removed))
    assert (said["exact"], said["near"]) == (exact, len(removed) - exact)


def jaccard(a: str, b: str) -> float:
    sets = []
    for text in (a, b):
        words = bare_words(text)
        sets.append({tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_groups_are_those_of_the_exact_similarity_of_all_pairs(tmp_path: Path) -> None:
    chance = random.Random(3)
    vocabulary = [f"word{number}" for number in range(200)]
    texts = []
    for _ in range(120):
        words = [chance.choice(vocabulary) for _ in range(50)]
        texts.append(" ".join(words))
        for changes in (1, 15):  # similarity about 0.9, and about 0.2
            other = list(words)
            for place in chance.sample(range(50), changes):
                other[place] = "changed"
            texts.append(" ".join(other))
    found = duplicates_of(texts, Rule(0.6), tmp_path)
    for a, b in combinations(range(len(texts)), 2):
        same = found.kept[a] == found.kept[b]
        assert same == (jaccard(texts[a], texts[b]) >= 0.6)
    similar = jaccard(texts[0], texts[1])
    assert found.similarity[1] == pytest.approx(similar, abs=4 * (0.25 / 128) ** 0.5)
    assert not found.exact.any()


def test_a_chain_of_near_duplicates_is_one_group(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(60)]
    chain = [" ".join(words[start : start + 40]) for start in range(0, 20, 4)]
    assert jaccard(chain[0], chain[1]) > 0.7 > jaccard(chain[0], chain[-1])
    found = duplicates_of(chain, Rule(0.7), tmp_path)
    assert found.kept.tolist() == [0] * 5


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.9, 1.0])
def test_bands_are_enough_to_find_pairs_at_the_threshold(threshold: float) -> None:
    size = Rule(threshold).rows_a_band
    assert 1 - (1 - threshold**size) ** (128 // size) >= 0.95


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_stopped_copy_is_continued_and_ends_with_the_same_files(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_duplicates, "ANSWERS_AT_ONCE", 3)
    folder = tmp_path / "in" / "data"
    write(folder, [{**row, "more": f"a,\n{n}"} for n, row in enumerate(ROWS)], suffix)
    (folder / f"rows.{suffix}").rename(folder / f"a.{suffix}")
    write(folder, [*ROWS[:2], {"prompt": "p", "answer": "Another one"}], suffix)
    dataset = Dataset.open(tmp_path / "in", nested=False)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = dedupe(dataset, whole, Rule(), ignore, {})
    assert result == Result(11, 4, 2)

    def stop(_: int) -> None:
        if (stopped / "_index.bin").stat().st_size >= 6 * near_duplicates.ITEM.itemsize:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dedupe(dataset, stopped, Rule(), stop, {})
    with (stopped / "_index.bin").open("ab") as file:
        file.write(b"half an item")
    counts: list[int] = []
    assert dedupe(dataset, stopped, Rule(), counts.append, {}) == result
    assert counts == [6, 3, 2]
    names = sorted(path.relative_to(whole) for path in whole.rglob("*.*"))
    assert names == sorted(path.relative_to(stopped) for path in stopped.rglob("*.*"))
    for name in names:
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()
    # A finished copy is left alone, and one file of it that was not written is written again.
    assert dedupe(dataset, stopped, Rule(), counts.append, {}) == result
    (stopped / "_result.json").write_text("{", encoding="utf-8")  # as a full disk leaves it
    (stopped / "data" / f"rows.{suffix}").unlink()
    assert dedupe(dataset, stopped, Rule(), counts.append, {}) == result
    for name in names:
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()


def test_kept_rows_are_unchanged_in_every_format(tmp_path: Path) -> None:
    rows = [{**row, "n": n, "text": 'say "hi",\nnow'} for n, row in enumerate(ROWS[:3])]
    for suffix in ("csv", "parquet"):
        dataset = Dataset.open(write(tmp_path, rows, suffix), nested=False)
        dedupe(dataset, tmp_path / f"out-{suffix}", Rule(), ignore, {})
        target = tmp_path / f"out-{suffix}" / "data" / f"rows.{suffix}"
        if suffix == "csv":
            with target.open(newline="") as file:
                table: list[dict[str, Any]] = list(csv.DictReader(file))
            assert table == [{k: str(v) for k, v in row.items()} for row in rows[:2]]
        else:
            assert pandas.read_parquet(target).to_dict("records") == rows[:2]


def test_the_card_is_kept_and_says_what_was_removed(tmp_path: Path) -> None:
    import datasets

    write(tmp_path / "in" / "data", ROWS)
    configs = "configs:\n- config_name: default\n  data_files: data/*.jsonl\n"
    own = f"---\nlicense: mit\n{configs}---\nMy own"
    for name, card in (("own", own), ("foreign", "---\nx: 1\n---\nMy own"), ("none", None)):
        if card is None:
            (tmp_path / "in" / "README.md").unlink()
        else:
            (tmp_path / "in" / "README.md").write_text(card)
        dataset = Dataset.open(tmp_path / "in", nested=False)
        dedupe(dataset, tmp_path / name, Rule(), ignore, {})
        text = (tmp_path / name / "README.md").read_text()
        assert ("My own" in text) == (card is not None)
        assert "4 of 8 rows are left; 2 exact and 2 near" in " ".join(text.split())
        cache = str(tmp_path / "cache" / name)
        rows = datasets.load_dataset(str(tmp_path / name), cache_dir=cache)["train"]
        assert len(rows) == 4
    assert (tmp_path / "own" / "README.md").read_text().startswith(own)


def test_a_card_keeps_its_licence_and_not_what_it_says_of_files(tmp_path: Path) -> None:
    path = write(tmp_path / "in" / "data", ROWS)
    header = "license: mit\nlanguage:\n- en\n"
    files = "dataset_info:\n  splits:\n  - num_examples: 8\nconfigs:\n- config_name: x\n"
    card = path.parent.parent / "README.md"
    card.write_text(f"\ufeff---\n{header}{files}tags:\n- baco\n---\nMy own\n", encoding="utf-8")
    dedupe(Dataset.open(tmp_path / "in", nested=False), tmp_path / "out", Rule(), ignore, {})
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    own = "configs:\n- config_name: default\n  data_files:\n  - data/*.jsonl\n"
    assert text.startswith(f"---\n{header}tags:\n- baco\n{own}---\nMy own\n")


def test_a_card_that_begins_with_a_rule_has_no_header(tmp_path: Path) -> None:
    path = write(tmp_path / "in", ROWS)
    (path.parent / "README.md").write_text("---\nMy own\n")
    dedupe(Dataset.open(tmp_path / "in", nested=False), tmp_path / "out", Rule(), ignore, {})
    assert (tmp_path / "out" / "README.md").read_text().count("---\nMy own\n") == 1


def test_a_card_that_is_not_utf8_is_refused_before_rows_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "in", ROWS)
    (path.parent / "README.md").write_bytes(b"caf\xe9")
    with pytest.raises(BacoError, match=r"README\.md: it is not UTF-8"):
        dedupe(Dataset.open(tmp_path / "in", nested=False), tmp_path / "out", Rule(), ignore, {})
    assert not (tmp_path / "out").exists()


def test_lines_of_any_white_space_are_no_rows(tmp_path: Path) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\ufeff\n{rows.replace(chr(10), chr(10) + chr(0xA0) + chr(10))}")
    dedupe(Dataset.open(path, nested=False), tmp_path / "out", Rule(), ignore, {})
    assert kept_rows(tmp_path / "out") == [ROWS[place] for place in (0, 1, 5, 6)]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"prompt": "p", "samples": [{"text": "x"}]}],
            [],
            "line 1: 'samples' is a list; give one",
        ),
        ([{"answer": "x"}, {"prompt": "p"}], [], "line 2: no answer; name its column answer,"),
        ([{"answer": "\ud800"}], [], "line 1 holds half a surrogate pair"),
        ([{"answer": "x"}], ["--column", "y"], "line 1: the column 'y' holds no text"),
        ([{"answer": "x"}], ["--threshold", "0"], "threshold is 0: give a number from 0.1 to 1"),
        ([{"answer": "x"}], ["--keep", "best"], "keep is 'best': use first or longest"),
    ],
)
def test_bad_input_is_one_line(
    rows: list[dict],
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path, rows)
    assert run(["dataset", "dedupe", str(path), str(tmp_path / "out"), *options]) == 2
    stderr = " ".join(capsys.readouterr().err.split())
    assert message in stderr and stderr.count("baco:") == 1


def test_another_rule_or_dataset_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path, out = write(tmp_path, ROWS), tmp_path / "out"
    dedupe(Dataset.open(path, nested=False), out, Rule(), ignore, {})
    with pytest.raises(BacoError, match=r"other settings \(threshold\)"):
        dedupe(Dataset.open(path, nested=False), out, Rule(0.9), ignore, {})
    write(tmp_path, ROWS[:2])
    with pytest.raises(BacoError, match=r"other settings \(files\)"):
        dedupe(Dataset.open(path, nested=False), out, Rule(), ignore, {})
    assert len(kept_rows(out)) == 4
    with pytest.raises(BacoError, match="holds no deduplicated dataset"):
        dedupe(Dataset.open(path, nested=False), tmp_path, Rule(), ignore, {})
    with pytest.raises(BacoError, match="out is the dataset itself: give another directory"):
        dedupe(Dataset.open(out, nested=False), out, Rule(), ignore, {})


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_an_empty_dataset_has_no_duplicates(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.touch()
    result = dedupe(Dataset.open(path, nested=False), tmp_path / "out", Rule(), ignore, {})
    assert result == Result(0, 0, 0)
    assert isinstance(result.kept, int | np.integer)


def test_a_long_cell_of_csv_is_copied(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "answer": "word " * 50_000}, {"prompt": "p", "answer": "other"}]
    path, out = write(tmp_path, rows, "csv"), tmp_path / "out"
    dedupe(Dataset.open(path, nested=False), out, Rule(), ignore, {})
    assert pandas.read_csv(out / "data" / path.name).to_dict("records") == rows
