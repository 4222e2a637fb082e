"""A pair with Llama 2's byte fallback that writes mostly invalid bytes: all answers still end."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baco import Baco
from baco.cli import run
from tests.pairs import PairFolder, save_byte_fallback_pair
from tests.serving import served

DRAWS = ["-r", "Rand:0.5", "-s", "1", "--max-tokens", "40"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> PairFolder:
    return save_byte_fallback_pair(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def pair(folder: PairFolder) -> Baco:
    return Baco.load(base=str(folder.base), aligned=str(folder.aligned), dtype="float32")


@pytest.fixture(scope="module")
def address(pair: Baco) -> Iterator[Any]:
    with served(pair) as running:
        yield running


def test_every_answer_comes_with_the_text_that_the_tokenizer_decodes(pair: Baco) -> None:
    chunks = list(pair.stream("the cat", router="Rand:0.5", n=8, seed=1, max_tokens=40))
    done = [chunk.completion for chunk in chunks if chunk.completion is not None]
    assert len(done) == 8
    for answer in done:
        text = pair.pair.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        assert answer.text == text
        own = [chunk for chunk in chunks if chunk.sample == answer.sample]
        assert "".join(chunk.text for chunk in own) == text
        assert [token.id for chunk in own for token in chunk.tokens] == list(answer.token_ids)
    assert any("\ufffd" in answer.text for answer in done)


def test_the_command_writes_all_answers(
    folder: PairFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--base", str(folder.base), "--aligned", str(folder.aligned)]
    assert run(["generate", "the cat", *models, "-n", "8", "--json", *DRAWS]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert len(reply["samples"]) == 8
    assert any("\ufffd" in answer["text"] for answer in reply["samples"])


def test_a_batch_writes_all_samples_of_every_prompt(folder: PairFolder, tmp_path: Path) -> None:
    prompts = tmp_path / "in.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the cat {i}"}) + "\n" for i in range(3)))
    models = ["--base", str(folder.base), "--aligned", str(folder.aligned)]
    assert run(["batch", str(prompts), str(tmp_path / "out"), *models, "-n", "4", *DRAWS]) == 0
    [shard] = (tmp_path / "out").glob("*.jsonl")
    rows = [json.loads(line) for line in shard.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 3
    assert all(len(row["samples"]) == 4 for row in rows)


def test_the_server_spells_every_token(address: Any) -> None:
    body = {"router": "Rand:0.5", "seed": 1, "max_tokens": 40, "n": 4, "explain": True}
    with address.client as client:
        chat = client.post(
            "/v1/chat/completions",
            json={
                **body,
                "messages": [{"role": "user", "content": "the cat"}],
                "logprobs": True,
                "top_logprobs": 5,
            },
        )
        text = client.post("/v1/completions", json={**body, "prompt": "the cat", "logprobs": 5})
        echo = client.post(
            "/v1/completions",
            json={
                "model": "baco/base",
                "prompt": "the 夏🌊 cat",
                "echo": True,
                "logprobs": 1,
                "max_tokens": 0,
            },
        )
    for choice in chat.json()["choices"]:
        names = [token["token"] for token in choice["logprobs"]["content"]]
        assert any(name.startswith("bytes:") for name in names)
        assert len(choice["baco"]["why"]) >= len(names)
    for choice in text.json()["choices"]:
        offsets = choice["logprobs"]["text_offset"]
        assert offsets == sorted(offsets)
        assert offsets[-1] <= len(choice["text"])
    [scored] = echo.json()["choices"]
    assert scored["text"] == "the 夏🌊 cat"
    at = scored["logprobs"]["text_offset"]
    names = scored["logprobs"]["tokens"]
    assert scored["text"][at[names.index("c")] :] == "cat"
