"""OpenAI's older endpoint: texts, or their token ids, continued as they are."""

from collections.abc import Iterator
from typing import Any

import pytest

from baco import Baco
from tests.serving import ROUTER, Served, events, served

TEXTS = ["Question: Recommend a summer destination\nAnswer:", "For dinner, I"]


@pytest.fixture(scope="module")
def server(demo: Baco) -> Iterator[Served]:
    with served(demo, max_n=16) as running:
        yield running


def test_completions_continue_texts_as_they_are(server: Served) -> None:
    body = {
        "prompt": TEXTS,
        "router": "Base",
        "n": 2,
        "seed": 4,
        "max_tokens": 12,
        "logprobs": 1,
    }
    with server.client as client:
        reply = client.post("/v1/completions", json=body).json()
        assert [c["index"] for c in reply["choices"]] == [0, 1, 2, 3]
        for choice in reply["choices"]:
            # The space between the prompt and what follows is part of what follows.
            assert choice["text"].startswith(" ")
            told = choice["logprobs"]
            assert "".join(told["tokens"]) == choice["text"]
            offsets = [len("".join(told["tokens"][:at])) for at in range(len(told["tokens"]))]
            assert told["text_offset"] == offsets
            assert all(len(top) == 1 for top in told["top_logprobs"])
        streamed = [""] * 4
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as got:
            for chunk in events(got):
                for choice in chunk["choices"]:
                    streamed[choice["index"]] += choice["text"]
    assert streamed == [choice["text"] for choice in reply["choices"]]


def test_token_ids_are_as_good_as_the_text_they_spell(server: Served, demo: Baco) -> None:
    ids = [demo.pair.renderer.raw(text).aligned_ids for text in TEXTS]
    with server.client as client:

        def choices(prompt: Any) -> list[Any]:
            asked = {"prompt": prompt, "router": ROUTER, "seed": 4, "max_tokens": 12}
            told: list[Any] = client.post("/v1/completions", json=asked).json()["choices"]
            return told

        assert choices(ids) == choices(TEXTS)
        assert choices(ids[0]) == choices(TEXTS[0])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([2048], "prompt names token 2048: the vocabulary has 2048 tokens"),
        ([-1], "prompt.0 is -1"),
        ([1, "a"], "prompt.0 is 1: input should be a valid string"),
        ([True], "prompt.0 is True"),
        ([[1], []], "prompt.1 is []"),
        ([], "prompt is []"),
        ("", "prompt is ''"),
    ],
    ids=str,
)
def test_a_prompt_that_is_none_is_refused(server: Served, prompt: Any, message: str) -> None:
    with server.client as client:
        answer = client.post("/v1/completions", json={"prompt": prompt})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
