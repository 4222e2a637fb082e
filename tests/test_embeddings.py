"""A model never reads a token that it has no embedding for."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from baco import Baco, BacoError, as_transformers
from baco.batch.answering import check_fit
from baco.batch.rows import read_rows
from baco.cli import run
from baco.errors import UnfitPairError
from baco.models.known_pairs import KnownPair
from baco.models.weightless import load_weightless_pair
from tests.pairs import FIRST_SPECIAL, SIZE, TURN_END, TURN_START, PairFolder
from tests.serving import served

PROMPT = "Plan a walk."
IMAGE = "<image>"


def resized(source: Path, target: Path, rows: int, *tokens: str) -> Path:
    """A copy of a model with ``rows`` rows of embeddings, and with further special tokens."""
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.config.pad_token_id = None
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)})
    tokenizer.save_pretrained(target)
    return target


def test_a_model_without_embeddings_for_its_own_template_is_refused_naming_ids_and_rows(
    random_pair: Callable[..., PairFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = random_pair("llama")
    short = resized(folder.aligned, tmp_path, SIZE - 2)
    message = rf"398 rows .*398 '{TURN_START}', 399 '{TURN_END}'.* at least 400 rows"
    message = message.replace("|", r"\|")
    with pytest.raises(UnfitPairError, match=message):
        Baco.load(base=str(folder.base), aligned=str(short), dtype="float32")
    with pytest.raises(UnfitPairError, match=message):  # weights elsewhere
        load_weightless_pair(
            KnownPair("pair", str(folder.base), str(short)), dict.fromkeys(("base", "aligned"), "")
        )
    where = ["--base", str(folder.base), "--aligned", str(short)]
    assert run(["generate", PROMPT, *where]) == 2
    assert re.search(f"^.*{message}.*$", capsys.readouterr().err, re.MULTILINE)
    # A template without these tokens makes it a model like any other.
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    baco = Baco.load(
        base=str(folder.base), aligned=str(short), dtype="float32", chat_template=plain
    )
    assert baco.generate(PROMPT, router="P:0.5", max_tokens=4, seed=1)


def test_a_base_model_without_embeddings_for_ordinary_tokens_is_refused(
    random_pair: Callable[..., PairFolder], tmp_path: Path
) -> None:
    folder = random_pair("llama")
    short = resized(folder.base, tmp_path, FIRST_SPECIAL - 7)
    with pytest.raises(UnfitPairError, match=r"390 rows .*: 390 '.*, 391 .*, 394 '[^']*', 2 more;"):
        Baco.load(base=str(short), aligned=str(folder.aligned), dtype="float32")


@pytest.fixture(scope="module")
def with_image(
    random_pair: Callable[..., PairFolder], tmp_path_factory: pytest.TempPathFactory
) -> Baco:
    """A pair whose aligned tokenizer has a token that no prompt uses and no model embeds."""
    folder = random_pair("llama")
    aligned = resized(folder.aligned, tmp_path_factory.mktemp("image"), SIZE, IMAGE)
    return Baco.load(base=str(folder.base), aligned=str(aligned), dtype="float32")


def test_a_special_token_that_no_template_uses_may_lack_an_embedding(
    with_image: Baco, random_pair: Callable[..., PairFolder]
) -> None:
    folder = random_pair("llama")
    plain = Baco.load(base=str(folder.base), aligned=str(folder.aligned), dtype="float32")
    settings: dict[str, Any] = {"router": "P-Punc:0.5", "n": 2, "seed": 3, "max_tokens": 16}
    answers = [baco.generate(PROMPT, **settings) for baco in (with_image, plain)]
    assert [one.token_ids for one in answers[0]] == [one.token_ids for one in answers[1]]


def test_a_prompt_with_a_token_that_has_no_embedding_is_refused_everywhere(
    with_image: Baco, tmp_path: Path
) -> None:
    text = f"Describe {IMAGE} for me."
    message = f"the aligned model reads it.*400 '{IMAGE}'"
    with pytest.raises(BacoError, match=message):
        with_image.generate(text, router="P:0.5")

    file = tmp_path / "in.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n{{"prompt": "{text}"}}\n')
    with pytest.raises(BacoError, match=rf"in\.jsonl, line 2: .*{message}"):
        check_fit(with_image, read_rows([file]), {"system": None})
    with served(with_image) as server:
        answer = server.ask(messages=[{"role": "user", "content": text}])
        assert answer.status_code == 400
        assert IMAGE in answer.json()["error"]["message"]
    model = as_transformers(with_image, "P:0.5")
    ids = with_image.pair.renderer.render(text).aligned_ids
    with pytest.raises(BacoError, match=message):
        model.generate(torch.tensor([ids]), max_new_tokens=2)
    # Padding is not read, whatever its id.
    padded = torch.tensor([[SIZE] * 3 + list(with_image.pair.renderer.render(PROMPT).aligned_ids)])
    mask = (padded != SIZE).long()
    mine = model.generate(padded, attention_mask=mask, max_new_tokens=4, do_sample=False)
    alone = model.generate(padded[:, 3:], max_new_tokens=4, do_sample=False)
    assert mine[:, 3:].equal(alone)
