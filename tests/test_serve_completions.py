"""OpenAI's older endpoint, ``/v1/completions``: texts or token ids, continued as they are."""

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
            logprobs = choice["logprobs"]
            assert "".join(logprobs["tokens"]) == choice["text"]
            offsets = [
                len("".join(logprobs["tokens"][:at])) for at in range(len(logprobs["tokens"]))
            ]
            assert logprobs["text_offset"] == offsets
            drawn = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
            for (token, logprob), top in zip(drawn, logprobs["top_logprobs"], strict=True):
                # The most likely token, and the drawn one, as OpenAI's API gives them.
                assert top[token] == logprob
                assert len(top) == 1 + (logprob < max(top.values()))
        streamed = [""] * 4
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as got:
            for chunk in events(got):
                for choice in chunk["choices"]:
                    streamed[choice["index"]] += choice["text"]
    assert streamed == [choice["text"] for choice in reply["choices"]]


def test_token_ids_give_the_answers_of_the_text_they_spell(server: Served, demo: Baco) -> None:
    ids = [demo.pair.renderer.raw(text).aligned_ids for text in TEXTS]
    with server.client as client:

        def choices(prompt: Any) -> list[Any]:
            body: dict[str, Any] = {
                "prompt": prompt,
                "router": ROUTER,
                "seed": 4,
                "max_tokens": 12,
            }
            completed: list[Any] = client.post("/v1/completions", json=body).json()["choices"]
            return completed

        assert choices(ids) == choices(TEXTS)
        assert choices(ids[0]) == choices(TEXTS[0])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([2048], "prompt names token 2048: the vocabulary has 2048 tokens"),
        ([-1], "prompt.0 is -1"),
        ([1, "a"], "prompt.1 is 'a': input should be a valid integer"),
        ([True], "prompt.0 is True"),
        ([[1], []], "prompt.1 is []"),
        ([], "prompt is []"),
        ("", "prompt is ''"),
    ],
    ids=str,
)
def test_a_value_that_is_not_a_prompt_is_refused(server: Served, prompt: Any, message: str) -> None:
    with server.client as client:
        answer = client.post("/v1/completions", json={"prompt": prompt})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def scored(server: Served, **body: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"model": "baco/base", "max_tokens": 0, "echo": True, "logprobs": 3}
    with server.client as client:
        reply: dict[str, Any] = client.post("/v1/completions", json=fields | body).json()
    return reply


@pytest.mark.parametrize("source", ["base", "aligned"])
def test_echo_returns_the_prompts_log_probabilities_under_one_model(
    server: Served, demo: Baco, source: str
) -> None:
    ids = getattr(demo.pair.renderer.raw(TEXTS[0]), f"{source}_ids")
    rows = getattr(demo.pair, source).score(ids).log_softmax(dim=-1)
    replies = [
        scored(server, prompt=prompt, model=f"baco/{source}") for prompt in ([TEXTS[0]], ids)
    ]
    for choice in [choice for reply in replies for choice in reply["choices"]]:
        logprobs = choice["logprobs"]
        assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
        assert logprobs["token_logprobs"][1:] == pytest.approx(
            [float(rows[at - 1, ids[at]]) for at in range(1, len(ids))], abs=1e-4
        )
        *_, last = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
        assert sorted(logprobs["top_logprobs"][-1].values(), reverse=True)[:3] == pytest.approx(
            rows[-2].topk(3).values.tolist(), abs=1e-4
        )
        assert last in logprobs["top_logprobs"][-1].items()
        assert "".join(logprobs["tokens"]) == choice["text"] == TEXTS[0]
    assert replies[0]["usage"]["completion_tokens"] == 0


def test_metrics_count_the_tokens_of_every_scored_prompt_once(demo: Baco) -> None:
    with served(demo) as server:
        alone = scored(server, prompt=TEXTS)["usage"]["prompt_tokens"]
        assert server.metric("baco_prompt_tokens_total") == alone > 0
        answered = scored(server, prompt=TEXTS[0], max_tokens=1)["usage"]["prompt_tokens"]
        assert server.metric("baco_prompt_tokens_total") == alone + answered


def test_ids_and_a_part_of_the_prompt_are_returned_on_request(server: Served, demo: Baco) -> None:
    ids = demo.pair.renderer.raw(TEXTS[0]).base_ids
    named = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    (choice,) = scored(server, prompt=ids, echo_from=4, **named)["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids[4:]]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (list(ids), [])
    whole = scored(server, prompt=ids, **named)["choices"][0]["logprobs"]
    expected = pytest.approx(whole["token_logprobs"][4:], abs=1e-4)
    assert choice["logprobs"]["token_logprobs"] == expected

    body = {"model": "baco/base", "prompt": ids, "seed": 4, "logprobs": 1} | named
    with server.client as client:
        (completed,) = client.post("/v1/completions", json=body).json()["choices"]
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as got:
            pieces = [choice for event in events(got) for choice in event["choices"]]
    assert completed["token_ids"][-1] in demo.pair.end_ids
    assert completed["logprobs"]["tokens"] == [
        f"token_id:{token}" for token in completed["token_ids"]
    ]
    assert [token for piece in pieces for token in piece["token_ids"]] == completed["token_ids"]
    assert [piece.get("prompt_token_ids") for piece in pieces][:2] == [list(ids), None]


def test_echo_puts_a_prompt_and_its_scores_before_each_of_its_answers(server: Served) -> None:
    asked = {"prompt": TEXTS[:2], "n": 2, "seed": 3, "return_token_ids": True}
    prompts = scored(server, prompt=TEXTS[:2])["choices"]
    with_prompts = scored(server, **asked, max_tokens=5)
    answers = scored(server, **asked, max_tokens=5, echo=False)
    assert with_prompts["usage"] == answers["usage"]
    for index, choice in enumerate(with_prompts["choices"]):
        prompt, answer = prompts[index // 2], answers["choices"][index]
        before, after = prompt["logprobs"], answer["logprobs"]
        assert choice["text"] == prompt["text"] + answer["text"]
        assert choice["logprobs"]["tokens"] == before["tokens"] + after["tokens"]
        expected = before["token_logprobs"] + after["token_logprobs"]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)
        pieces = zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True)
        assert all(choice["text"].startswith(token, start) for token, start in pieces)
        same = ("index", "finish_reason", "token_ids", "prompt_token_ids", "baco")
        assert [choice[name] for name in same] == [answer[name] for name in same]


def test_an_end_token_after_an_echoed_prompt_has_a_log_probability(
    server: Served, demo: Baco
) -> None:
    """So that max_tokens 1 gives one more log-probability than the prompt has tokens, always."""
    end = min(demo.pair.end_ids)
    asked = {"prompt": TEXTS[1], "max_tokens": 1, "logit_bias": {str(end): 100}}
    (choice,) = scored(server, **asked)["choices"]
    (prompt,) = scored(server, prompt=TEXTS[1])["choices"]
    logprobs = choice["logprobs"]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == prompt["text"]
    assert logprobs["tokens"][:-1] == prompt["logprobs"]["tokens"]
    assert logprobs["tokens"][-1] == demo.pair.spelling(end, "base").decode()
    assert logprobs["text_offset"][-1] == len(choice["text"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "baco"}, "echo scores with one model: give baco/base or baco/aligned"),
        ({"model": "baco/P-Punc:0.4"}, "a prompt has no likelihood under a router"),
        ({"n": 2}, "n is 2: with max_tokens 0 there are no answers"),
        ({"logprobs": None}, "give logprobs with it"),
        ({"logprobs": 21}, "logprobs is 21: this server gives at most 20"),
        ({"stream": True}, "and no stream"),
        ({"max_tokens": 4, "temperature": -1}, "temperature"),
        ({"echo_from": 99}, "echo_from is 99: the prompt has"),
        ({"echo": False}, "max_tokens 0 and echo_from go with echo"),
        ({"prompt": [1] * 513}, "context window is 512"),
        ({"prompt": [2048]}, "prompt names token 2048"),
    ],
    ids=str,
)
def test_requests_that_echo_cannot_serve_are_refused(
    server: Served, wrong: dict[str, Any], message: str
) -> None:
    assert message in scored(server, **{"prompt": TEXTS[0]} | wrong)["error"]["message"]
