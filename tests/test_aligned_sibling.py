"""The aligned sibling of `benchmarks.aligned_sibling`, at a tiny scale."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from baco import Baco
from baco.errors import BacoError
from baco.models.known_pairs import demo_folder
from benchmarks import aligned_sibling
from benchmarks.aligned_sibling import Recipe, make
from tests.pairs import PairFolder


class Stopped(Exception):  # noqa: N818
    """In place of a kill."""


def data(path: Path, count: int = 24) -> None:
    rows = [
        [f"Name colour {i}", "Blue is a colour." if i % 2 else "Red is one."] for i in range(count)
    ]
    path.write_text(
        "".join(json.dumps({"rows": rows[i : i + 4]}) + "\n" for i in range(0, count, 4)),
        encoding="utf-8",
    )


def recipe(pair: PairFolder, **more: int) -> Recipe:
    sizes = {"pairs": 24, "steps": 12, "batch": 4, "rank": 2} | more
    return Recipe(str(pair.base), "never loaded", **sizes)


@pytest.fixture(scope="module")
def whole(
    random_pair: Callable[..., PairFolder], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, object]]:
    out = tmp_path_factory.mktemp("sibling") / "whole"
    out.mkdir()
    data(out / "data.jsonl")
    return out, make(recipe(random_pair("llama")), out)


def test_training_that_was_stopped_continues_to_the_same_adapter(
    random_pair: Callable[..., PairFolder],
    whole: tuple[Path, dict[str, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, result = whole
    out = tmp_path / "again"
    out.mkdir()
    data(out / "data.jsonl")
    losses, loss = 0, aligned_sibling._loss

    def stopping(*arguments: object) -> torch.Tensor:
        nonlocal losses
        losses += 1
        if losses == 8:  # three steps after the checkpoint of step 5
            raise Stopped
        return loss(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(aligned_sibling, "_loss", stopping)
    with pytest.raises(Stopped):
        make(recipe(random_pair("llama")), out)
    monkeypatch.setattr(aligned_sibling, "_loss", loss)
    assert make(recipe(random_pair("llama")), out) == result
    assert {"sha256_data", "sha256_adapter", "held_out_loss", "torch"} <= result.keys()


def test_the_adapter_is_a_pair_that_has_learned_its_answers(
    random_pair: Callable[..., PairFolder], whole: tuple[Path, dict[str, object]]
) -> None:
    out, _ = whole
    pair = Baco.load(base=str(random_pair("llama").base), aligned=str(out / "adapter"))
    assert pair.pair.shares_weights
    prompt = "Name colour 3"
    likelier = {
        source: float(
            pair.pair.model(source)
            .score(
                [
                    *pair.pair.renderer.render(prompt).aligned_ids,
                    *pair.pair.tokenizer.encode("Blue"),
                ]
            )[-2]
            .log_softmax(-1)[pair.pair.tokenizer.encode("Blue")[-1]]
        )
        for source in ("base", "aligned")
    }
    assert likelier["aligned"] > likelier["base"]


def test_another_recipe_does_not_continue_it(
    random_pair: Callable[..., PairFolder], whole: tuple[Path, dict[str, object]]
) -> None:
    with pytest.raises(BacoError, match="begun with another recipe"):
        make(recipe(random_pair("llama"), steps=13), whole[0])


def test_the_teachers_data_continue_after_the_last_whole_batch(tmp_path: Path) -> None:
    """The demo pair's aligned model as the teacher."""
    teacher = str(demo_folder() / "aligned")
    few = Recipe("no base", teacher, pairs=3, prompts=24)
    path = tmp_path / "data.jsonl"
    rows = aligned_sibling.write_data(few, path)
    assert len(rows) >= 3 and all(len(prompt) > 12 and len(answer) > 10 for prompt, answer in rows)
    written = path.read_bytes()
    path.write_bytes(written[: len(written) - 5])
    assert aligned_sibling.write_data(few, path) == rows
    assert path.read_bytes() == written
