"""OpenAI's API on the demo pair, over a real socket."""

import json
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import pytest

from baco import Baco
from baco.demo.world import ask
from baco.demo.world.grammar import families
from baco.sampling.params import SamplingParams
from baco.serve import playground
from baco.serve.playground import DEMO_PROMPTS
from baco.serve.response_models import Diversity
from tests.serving import (
    PROMPT,
    ROUTER,
    WAIT,
    Served,
    chat,
    connect,
    events,
    post_request,
    served,
    wait_for,
    waiting_router,
)


@pytest.fixture(scope="module")
def server(demo: Baco) -> Iterator[Served]:
    with served(demo, max_n=16, max_tokens=300, max_body=4000, max_open=8) as running:
        yield running


def test_the_same_seed_gives_the_answers_of_generate(server: Served, demo: Baco) -> None:
    reply = server.ask(n=3, seed=7).json()
    expected = demo.generate(PROMPT, router=ROUTER, n=3, seed=7)
    assert [c["index"] for c in reply["choices"]] == [0, 1, 2]
    for choice, completion in zip(reply["choices"], expected, strict=True):
        assert choice["message"] == {
            "role": "assistant",
            "content": completion.text,
            "refusal": None,
        }
        assert choice["finish_reason"] == completion.finish_reason
        provenance = choice["baco"]
        stretches = [
            ["".join(piece.text for piece in same), source]
            for source, same in groupby(completion.pieces, key=lambda piece: piece.source)
        ]
        assert provenance["sources"] == stretches
        assert provenance["base_share"] == pytest.approx(completion.base_share, abs=1e-4)
        assert (provenance["switches"], provenance["router"], provenance["seed"]) == (
            completion.switches,
            ROUTER,
            7,
        )
    prompt = len(demo.pair.renderer.render(PROMPT).aligned_ids)
    generated = sum(len(completion.token_ids) for completion in expected)
    assert reply["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_stream_joins_to_the_answers_and_ends_with_the_usage(server: Served) -> None:
    whole = server.ask(n=3, seed=7).json()
    body = chat(n=3, seed=7, stream=True, stream_options={"include_usage": True})
    with server.client as client, client.stream("POST", "/v1/chat/completions", json=body) as got:
        assert got.headers["content-type"].startswith("text/event-stream")
        chunks = list(events(got))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    for index, choice in enumerate(whole["choices"]):
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(c["delta"].get("content", "") for c in own)
        assert text == choice["message"]["content"]
        sources = [piece for c in own[1:] for piece in c["baco"]["sources"]]
        assert "".join(piece for piece, _ in sources) == text
        assert [c["finish_reason"] for c in own[-2:]] == [None, choice["finish_reason"]]
        for name in ("base_share", "switches", "router", "seed"):
            assert own[-1]["baco"][name] == choice["baco"][name]


def test_without_a_seed_one_is_drawn_and_returned_that_repeats_the_answer(server: Served) -> None:
    first = server.ask().json()["choices"][0]
    again = server.ask(seed=first["baco"]["seed"]).json()["choices"][0]
    assert again == first


@pytest.mark.parametrize(
    ("model", "router"),
    [
        ("baco/base", "Base"),
        ("baco/ALIGNED", "Aligned"),
        ("baco/P-Punc:0.3", "P-Punc:0.3"),
        ("baco/p-PUNC:0.3", "P-Punc:0.3"),
    ],
)
def test_the_models_name_may_name_the_router(
    server: Served, demo: Baco, model: str, router: str
) -> None:
    choice = server.ask(model=model, router=None, seed=3).json()["choices"][0]
    assert choice["message"]["content"] == demo.generate(PROMPT, router=router, seed=3)[0].text
    assert choice["baco"]["router"] == router


def test_a_routers_case_does_not_matter_and_its_canonical_spelling_is_returned(
    server: Served,
) -> None:
    fields = {"model": "baco/p-punc:0.4", "seed": 3}
    choices = [
        server.ask(router=router, **fields).json()["choices"][0]
        for router in ("P-Punc:0.4", "p-punc:.4", None)
    ]
    assert choices[0] == choices[1] == choices[2]
    assert choices[0]["baco"]["router"] == "P-Punc:0.4"
    with server.client as client:
        assert client.get("/v1/models/baco/h-FC:1.5").status_code == 200
        assert client.get("/v1/models/baco/no-rule").status_code == 404


def test_every_listed_model_can_be_retrieved_and_used(server: Served) -> None:
    with server.client as client:
        listed = client.get("/v1/models").json()["data"]
        names = [card["id"] for card in listed]
        assert names[:3] == ["baco", "baco/base", "baco/aligned"]
        assert "baco/P-Punc:0.4" in names
        for card in listed:
            assert client.get(f"/v1/models/{card['id']}").json() == card
            body = chat(model=card["id"], router=None, max_tokens=1)
            assert client.post("/v1/chat/completions", json=body).status_code == 200


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {"top_p": 0.5},
    {"top_k": 3, "temperature": 1.5},
    {"min_p": 0.2},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"max_tokens": 3},
    {"stop": [" is", "."]},
]


@pytest.mark.parametrize("sampling", SAMPLING, ids="+".join)
def test_sampling_parameters_reach_the_draw(
    server: Served, demo: Baco, sampling: dict[str, Any]
) -> None:
    choice = server.ask(seed=5, **sampling).json()["choices"][0]
    expected = demo.generate(PROMPT, router=ROUTER, seed=5, **sampling)[0]
    assert choice["message"]["content"] == expected.text
    assert choice["finish_reason"] == expected.finish_reason


def test_a_bias_can_forbid_a_token(server: Served, demo: Baco) -> None:
    first = demo.generate(PROMPT, router=ROUTER, seed=5)[0].token_ids[0]
    fields = {"seed": 5, "logprobs": True, "max_tokens": 1}
    biased = server.ask(logit_bias={str(first): -100}, **fields).json()["choices"][0]
    plain = server.ask(**fields).json()["choices"][0]
    assert biased["logprobs"]["content"][0]["token"] != plain["logprobs"]["content"][0]["token"]


def test_max_completion_tokens_is_max_tokens(server: Served) -> None:
    assert server.ask(max_completion_tokens=3, seed=1).json()["usage"]["completion_tokens"] == 3
    assert server.ask(max_completion_tokens=3, max_tokens=4).status_code == 400


def test_log_probabilities_are_the_sources_own(server: Served, demo: Baco) -> None:
    choice = server.ask(seed=5, logprobs=True, top_logprobs=2).json()["choices"][0]
    expected = demo.generate(PROMPT, router=ROUTER, seed=5, logprobs=2)[0]
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens).lstrip() == expected.text
    # The end token is none of the text's.
    assert len(tokens) == len(expected.token_ids) - 1
    for token, logprob in zip(tokens, expected.logprobs, strict=False):
        # The last digits depend on how many tokens a forward reads, which depends on how earlier
        # answers' drafts fared.
        assert token["logprob"] == pytest.approx(logprob, abs=1e-4)
        assert bytes(token["bytes"]).decode() == token["token"]
        assert len(token["top_logprobs"]) == 2
        assert token["top_logprobs"][0]["logprob"] >= token["top_logprobs"][1]["logprob"]


def test_explain_returns_the_routers_signals_for_every_token(server: Served) -> None:
    choice = server.ask(seed=5, explain=True, logprobs=True).json()["choices"][0]
    why = choice["baco"]["why"]
    assert "".join(token["text"] for token in why) == choice["message"]["content"]
    assert why[0]["asked"]
    for token, logprob in zip(why, choice["logprobs"]["content"], strict=False):
        assert math.log(token[token["source"]]) == pytest.approx(logprob["logprob"], abs=1e-3)
        assert token["wanted"] == token["source"] or not token["asked"]


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"temperature": -1}, 400, "temperature is -1"),
    ({"temperature": "hot"}, 400, "temperature is 'hot'"),
    ({"n": 17}, 400, "number of answers is 17: this server gives at most 16"),
    ({"max_tokens": 301}, 400, "max_tokens is 301: this server gives at most 300"),
    ({"router": "Pun:0.4"}, 400, "unknown router 'Pun:0.4'"),
    ({"model": "gpt-4"}, 404, "there is no model 'gpt-4' here"),
    ({"model": "baco/Pun"}, 404, "unknown router 'Pun'"),
    ({"model": "baco/base", "router": "P:0.4"}, 400, "name two routers"),
    ({"messages": []}, 400, "messages is []"),
    ({"messages": [{"role": "user", "content": " "}]}, 400, "the prompt is empty"),
    ({"messages": [{"role": "tool", "content": "4"}]}, 400, "role is 'tool'"),
    ({"response_format": {"type": "json_schema"}}, 400, "goes with the type 'json_schema'"),
    ({"response_format": {"type": "xml"}}, 400, "response_format.type is 'xml'"),
    ({"guided_json": {"type": "object"}}, 400, "give response_format or structured_outputs"),
    ({"tool_choice": "required"}, 400, "this is not supported; no tools are called"),
    ({"tempreature": 1}, 400, "tempreature is not a parameter"),
    ({"logit_bias": {"99999": 1}}, 400, "logit_bias names token 99999"),
    ({"top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
    ({"router": "P" * 1001}, 400, "router is 'PPP"),
    ({"stop": ["."] * 17}, 400, "at most 16 items"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options goes with stream"),
    ({"messages": [{"role": "user", "content": "long " * 600}]}, 400, "context window"),
    ({"messages": [{"role": "user", "content": "long " * 900}]}, 413, "at most 4000 bytes"),
]


@pytest.mark.parametrize(("wrong", "status", "message"), REFUSED, ids=lambda v: str(v)[:30])
def test_errors_have_openais_format(
    server: Served, wrong: dict[str, Any], status: int, message: str
) -> None:
    for stream in (False, True):
        answer = server.ask(**wrong, stream=True) if stream else server.ask(**wrong)
        if "stream_options" in wrong and stream:
            continue
        assert answer.status_code == status
        error = answer.json()["error"]
        assert message in error["message"]
        assert "\n" not in error["message"]
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v2", b"", 404),
        ("GET", "/v1/chat/completions", b"", 405),
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"[]", 400),
        ("POST", "/v1/chat/completions", b"\xff", 400),
        ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user"}]}', 400),
        ("POST", "/v1/completions", b'{"prompt": "a", "best_of": 2}', 400),
        ("POST", "/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400),
        ("POST", "/v1/completions", b'{"prompt": "\\ud800"}', 400),
    ],
)
def test_an_invalid_request_is_refused(
    server: Served, method: str, path: str, body: bytes, status: int
) -> None:
    headers = {"Content-Type": "application/json"}
    with server.client as client:
        answer = client.request(method, path, content=body, headers=headers)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


LONE = "a \\ud83d"  # half of a pair of surrogates, as JSON escapes it


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (
            "/v1/chat/completions",
            '{"messages": [{"role": "user", "content": "@"}]}',
            "messages.0.content",
        ),
        (
            "/v1/chat/completions",
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": "@"}]}]}',
            "messages.0.content.0.text",
        ),
        ("/v1/chat/completions", '{"messages": [], "user": "@"}', "user"),
        ("/v1/chat/completions", '{"messages": [], "metadata": {"@": 1}}', "metadata"),
        (
            "/v1/chat/completions",
            '{"messages": [], "chat_template_kwargs": {"a": ["@"]}}',
            "chat_template_kwargs.a.0",
        ),
        ("/v1/chat/completions", '{"messages": [], "@": 1}', None),
        ("/v1/completions", '{"prompt": ["b", "@"]}', "prompt.1"),
        ("/v1/completions", '{"prompt": "b", "stop": ["@"]}', "stop.0"),
        ("/v1/completions", '{"prompt": "b", "model": "baco/@"}', "model"),
        ("/v1/completions", '{"prompt": "b", "logit_bias": {"@": 1}}', "logit_bias"),
        ("/baco/diversity", '{"texts": ["@", "b"]}', "texts.0"),
    ],
)
def test_a_lone_surrogate_is_refused_with_its_place(
    server: Served, path: str, body: str, param: str | None
) -> None:
    headers = {"Content-Type": "application/json"}
    with server.client as client:
        for spelled in (LONE.encode(), "a \ud83d".encode(errors="surrogatepass")):
            content = body.encode().replace(b"@", spelled)
            answer = client.post(path, content=content, headers=headers)
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert error["param"] == param
            assert error["message"] == (
                f"{param or 'the body'} holds half a surrogate pair ('\\ud83d'), which is not a "
                "character: give Unicode text"
            )


def test_messages_of_errors_are_printable_and_on_one_line(server: Served) -> None:
    with server.client as client:
        answers = [
            client.get("/v2/a%0ab%1b%5b31m"),
            server.ask(**{"a\nb\x1b[31m": 1}),
            server.ask(model="baco/a\nb\x1b[31m"),
            server.ask(router="P:\x1b[31m\u202e"),
            server.ask(messages=[{"role": "user\n", "content": "\x1b[31m"}]),
        ]
    for answer in answers:
        error = answer.json()["error"]
        assert error["message"].isprintable()
        assert (error["param"] or "").isprintable()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 70_000}, "the number of answers is 70000: this server gives at most 16"),
        ({"max_tokens": 3 * 10**9}, "max_tokens is 3000000000: this server gives at most 300"),
        ({"max_tokens": 0}, "max_tokens is 0: give at least 1"),
    ],
)
def test_errors_name_the_limits_of_this_server(
    server: Served, wrong: dict[str, Any], message: str
) -> None:
    assert message in server.ask(**wrong).json()["error"]["message"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": ["a"] * 17}, "the number of answers is 17: this server gives at most 16"),
        ({"prompt": ["a"] * 9, "n": 2}, "the number of answers is 18: this server gives at most"),
        ({"prompt": "a", "logprobs": 70_000}, "logprobs is 70000: this server gives at most 20"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_fields_of_the_older_endpoint_are_refused(
    server: Served, wrong: dict[str, Any], message: str
) -> None:
    with server.client as client:
        answer = client.post("/v1/completions", json=wrong)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_a_request_with_one_wrong_prompt_is_refused_before_any_is_decoded(server: Served) -> None:
    server.settles()
    with server.client as client:
        before = server.rounds
        for stream in (False, True):
            body = {"prompt": [[5, 6], [5, 2048]], "max_tokens": 300, "stream": stream}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 400
            assert "prompt names token 2048" in answer.json()["error"]["message"]
    assert server.rounds == before


def test_a_body_without_a_length_is_measured_too(server: Served) -> None:
    def pieces() -> Iterator[bytes]:
        yield json.dumps(chat("long " * 2000)).encode()

    headers = {"Content-Type": "application/json"}
    with server.client as client:
        answer = client.post("/v1/chat/completions", content=pieces(), headers=headers)
    assert answer.status_code == 413


@pytest.mark.parametrize("stream", [True, False])
def test_the_rows_of_a_client_that_disconnects_leave_within_a_step(
    demo: Baco, stream: bool
) -> None:
    story = "Give me a four-sentence story about a dragon."
    body = chat(story, router="Waits", n=128, stream=stream)
    with served(demo) as server, server.client as client, waiting_router("Waits") as decides:
        if stream:
            with client.stream("POST", "/v1/chat/completions", json=body) as got:
                next(events(got))
                assert decides.awaited.wait(WAIT)
        else:
            with connect(server.url, post_request("/v1/chat/completions", body)):
                assert decides.awaited.wait(WAIT)
        wait_for(server.log)
        rounds = server.rounds
        decides.set()
        server.settles()
        # The one that was under way, and one that the rows are gone from.
        assert server.rounds <= rounds + 2
        entry = server.log()[0]
        assert (entry["status"], entry.get("outcome", "gone")) == (200 if stream else 499, "gone")


def test_concurrent_requests_share_the_batch(server: Served) -> None:
    def ask(seed: int) -> str:
        story = "Give me a four-sentence story about a dragon."
        answer = server.ask(prompt=story, seed=seed).json()["choices"][0]
        return str(answer["message"]["content"])

    before = server.rounds
    alone = [ask(seed) for seed in range(6)]
    one_by_one, before = server.rounds - before, server.rounds
    with waiting_router("Waits") as decides, ThreadPoolExecutor(7) as pool:
        pool.submit(server.ask, router="Waits", max_tokens=1)
        wait_for(lambda: server.engine_thread.open == 1)
        together = [pool.submit(ask, seed) for seed in range(6)]
        wait_for(lambda: server.arrived == 7)
        decides.set()
        assert [answer.result() for answer in together] == alone
    assert server.rounds - before < one_by_one / 2


def test_the_page_and_its_endpoints_are_served(server: Served) -> None:
    with server.client as client:
        assert "<title>BACo" in client.get("/").text
        info = client.get("/baco/info").json()
        assert info["pair"] == "demo"
        assert info["default_router"].startswith("P-Punc:")
        assert info["limits"] == {"n": 16, "max_tokens": 300}
        routers = {entry["name"]: entry for entry in client.get("/baco/routers").json()}
        dial = routers["P-Punc"]["dial"]
        assert [mark for mark, _ in dial] == sorted(mark for mark, _ in dial)
        assert (dial[0][0], dial[-1][0]) == (0.0, 1.0)
        assert f"P-Punc:{routers['P-Punc']['default']:g}" == info["default_router"]
        assert routers["Punc"]["dial"] is None
        texts = ["a cat sat", "a cat sat", "two dogs ran far"]
        diversity = client.post("/baco/diversity", json={"texts": texts}).json()
        assert diversity["distinct"] == 2
        assert diversity["distinct_2"] == pytest.approx(5 / 7)
        assert diversity["embedding_distance"] > 0 or diversity["why_not"]
        assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("path", ["/baco/diversity", "/baco/schema"])
def test_work_of_a_client_that_left_before_its_turn_is_not_begun(
    demo: Baco, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    begun, proceed = threading.Event(), threading.Event()
    done: list[str] = []

    def work(name: str) -> None:
        done.append(name)
        begun.set()
        assert proceed.wait(WAIT)

    def measure(texts: list[str]) -> Diversity:
        work(texts[0])
        return Diversity(distinct=1, distinct_2=1.0, embedding_distance=None, why_not="none")

    def check(_: Baco, params: SamplingParams) -> None:
        assert params.structure is not None
        work(json.loads(params.structure.text)["const"])

    def body(name: str) -> dict[str, Any]:
        return {"texts": [name]} if path == "/baco/diversity" else {"json": {"const": name}}

    monkeypatch.setattr(playground, "measure", measure)
    monkeypatch.setattr(Baco, "check_structure", check)
    with served(demo) as server, server.client as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, path, json=body("first"))
        assert begun.wait(WAIT)
        with connect(server.url, post_request(path, body("left"))):
            wait_for(lambda: server.connections.counts()["answer"] == 2)
        wait_for(server.log)
        proceed.set()
        assert first.result().is_success
        client.post(path, json=body("last"))
    assert done == ["first", "last"]


def test_the_pages_examples_are_questions_that_the_demo_pair_was_made_for() -> None:
    known = {
        ask(family, paraphrase, value).text
        for family in families().values()
        for paraphrase in (*family.prompts, *family.held)
        for value in family.values
    }
    assert set(DEMO_PROMPTS) <= known
