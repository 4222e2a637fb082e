"""Prompting methods as models of the server: the answers of a sweep, in the server's own batch."""

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from baco import Baco
from baco.evaluation.methods import Answer, Draw, answer, methods, register_method
from baco.evaluation.methods.method import Family, sampled
from baco.evaluation.methods.served import served_examples, served_method
from baco.evaluation.records import Prompt, Setting
from tests.registries import restored
from tests.serving import (
    PROMPT,
    WAIT,
    Served,
    connect,
    events,
    post_request,
    served,
    wait_for,
    waiting_router,
)

SAMPLING = {"max_tokens": 12, "temperature": 1.2}
SERVED = [
    "paraphrase",
    "regeneration",
    "verbalized",
    "system-prompt",
    "plain-prompt",
    "minimal-prompt",
    "string-seed",
    "verbalized-tail:0.1",
    "verbalized-cot",
    "verbalized-multi",
    "nudging-authors:0.3",
]


@pytest.fixture(scope="module")
def server(demo: Baco) -> Iterator[Served]:
    with served(demo, max_n=8, max_tokens=64) as running:
        yield running


def ask(server: Served, spelling: str, **body: Any) -> httpx.Response:
    return server.ask(**{"model": f"baco/{spelling}", "router": None, "seed": 3} | body)


def of_a_sweep(demo: Baco, spelling: str, n: int) -> list[Answer]:
    prompt = Prompt("1", ({"role": "user", "content": PROMPT},))
    draw = Draw(n, 3, SAMPLING)
    return answer(demo, served_method(spelling).setting, [prompt], draw)[0]


def test_every_prompting_method_and_the_authors_nudging_is_served() -> None:
    assert served_examples() == SERVED
    assert {name for name, method in methods().items() if method.family == "prompting"} == {
        name for name in SERVED if not name.startswith("nudging")
    } - {"verbalized-tail:0.1"} | {"verbalized-tail"}


@pytest.mark.parametrize("spelling", SERVED)
def test_answers_are_those_of_a_sweep(server: Served, demo: Baco, spelling: str) -> None:
    expected = of_a_sweep(demo, spelling, 3)
    reply = ask(server, spelling, n=3, **SAMPLING).json()
    choices = reply["choices"]
    assert [choice["message"]["content"] for choice in choices] == [one.text for one in expected]
    for choice, one in zip(choices, expected, strict=True):
        provenance = choice["baco"]
        assert "".join(text for text, _ in provenance["sources"]) == one.text
        assert provenance["base_share"] == pytest.approx(one.base_share, abs=1e-4)
        assert (provenance["router"], provenance["seed"]) == (spelling, 3)
        assert choice["finish_reason"] in ("stop", "length")
        assert provenance.get("outcome") == (
            None if one.finish_reason in ("stop", "length") else one.finish_reason
        )
    assert reply["model"] == f"baco/{spelling}"


def test_a_stream_has_the_whole_answers(server: Served) -> None:
    body = {"n": 3, **SAMPLING}
    whole = ask(server, "string-seed", **body).json()
    parts: list[list[Any]] = [[], [], []]
    usage = None
    with server.client as client:
        request = {
            "model": "baco/string-seed",
            "messages": [{"role": "user", "content": PROMPT}],
            "seed": 3,
            "stream": True,
            "stream_options": {"include_usage": True},
        } | body
        with client.stream("POST", "/v1/chat/completions", json=request) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            for event in events(response):
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    parts[choice["index"]].append(choice)
    for choice, chunks in zip(whole["choices"], parts, strict=True):
        opening, chunk = chunks
        assert opening["delta"]["role"] == "assistant"
        assert chunk["delta"].get("content", "") == choice["message"]["content"]
        assert chunk["finish_reason"] == choice["finish_reason"]
        assert chunk["baco"] == choice["baco"]
    # What is kept of the first request's prompts is not read again.
    counts = ("prompt_tokens", "completion_tokens")
    assert usage is not None
    assert [usage[name] for name in counts] == [whole["usage"][name] for name in counts]


def test_usage_counts_the_tokens_of_all_calls(server: Served) -> None:
    replies = [ask(server, "regeneration", n=n, max_tokens=8) for n in (1, 5)]
    one, five = (reply.json()["usage"] for reply in replies)
    assert five["completion_tokens"] > one["completion_tokens"]
    # Every call reads the whole conversation, which grows.
    assert five["prompt_tokens"] > 5 * one["prompt_tokens"]
    counted = server.entry(replies[1])
    assert counted["router"] == "regeneration"
    assert counted["tokens"] == five["completion_tokens"]
    assert counted["prompt_tokens"] == five["prompt_tokens"]
    assert counted["outcome"] == "finished"


def test_calls_keep_prefixes_apart_by_cache_salt(server: Served) -> None:
    messages = [{"role": "user", "content": "Recommend a summer destination. " * 20}]
    for salt, kept in (("a", False), ("b", False), ("a", True)):
        body = {"messages": messages, "cache_salt": salt, "max_tokens": 4}
        usage = ask(server, "system-prompt", **body).json()["usage"]
        assert (usage["prompt_tokens_details"]["cached_tokens"] > 0) is kept, salt


def test_answers_do_not_depend_on_other_requests(server: Served) -> None:
    alone = ask(server, "verbalized", n=2, **SAMPLING).json()["choices"]
    replies: list[Any] = []
    asks = [
        threading.Thread(
            target=lambda name=name: replies.append(ask(server, name, n=2, **SAMPLING).json())
        )
        for name in ("verbalized", "paraphrase", "P-Punc:0.4", "verbalized")
    ]
    for thread in asks:
        thread.start()
    for thread in asks:
        thread.join()
    same = [reply["choices"] for reply in replies if reply["model"] == "baco/verbalized"]
    assert same == [alone, alone]


def test_methods_are_listed_and_each_has_a_card(server: Served) -> None:
    with server.client as client:
        listed = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert listed[-len(SERVED) :] == [f"baco/{spelling}" for spelling in SERVED]
        card = client.get("/v1/models/baco/verbalized-tail:0.01").json()
        assert card["id"] == "baco/verbalized-tail:0.01"
        assert card["max_model_len"] > 0


@pytest.mark.parametrize(
    ("model", "status", "message"),
    [
        ("baco/judge", 404, "is no model of a server: it asks another model"),
        ("baco/mixing", 404, "ask baco/base for m of the answers"),
        ("baco/contrastive", 404, "name its combiner, as in baco/Contrast:0.5,0.1"),
        ("baco/truncation", 404, "name baco/aligned, and give the sampler in samplers"),
        ("baco/routers", 404, "name one router, as in baco/P-Punc:0.4"),
        ("baco/string-seed:0.4", 404, "takes no number: give 'string-seed'"),
        ("baco/verbalized-tail", 404, "a number from 0 to 1, as in verbalized-tail:0.1"),
        ("baco/nudging-authors:nan", 404, "a number from 0 to 1, as in nudging-authors:0.3"),
        ("baco/string-seeds", 404, "unknown router"),
    ],
)
def test_a_method_that_is_no_model_is_refused_with_the_reason(
    server: Served, model: str, status: int, message: str
) -> None:
    refused = server.ask(model=model, router=None)
    assert refused.status_code == status
    assert message in refused.json()["error"]["message"]
    with server.client as client:
        assert client.get(f"/v1/models/{model}").status_code == 404


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("router", "P-Punc:0.4"),
        ("switch", "token"),
        ("explain", True),
        ("logprobs", True),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ],
)
def test_fields_that_a_method_cannot_keep_are_refused(
    server: Served, field: str, value: Any
) -> None:
    refused = ask(server, "verbalized", **{field: value})
    assert refused.status_code == 400
    assert f"{field} goes with a router" in refused.json()["error"]["message"]


def test_an_answer_is_not_continued_and_texts_are_refused(server: Served) -> None:
    messages = [
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": "You could"},
    ]
    refused = ask(server, "paraphrase", messages=messages)
    assert refused.status_code == 400
    assert "end the conversation with a message of role 'user'" in refused.text
    with server.client as client:
        body = {"model": "baco/paraphrase", "prompt": PROMPT}
        refused = client.post("/v1/completions", json=body)
    assert refused.status_code == 400
    assert "give messages to /v1/chat/completions" in refused.text


def test_limits_and_faults_have_their_usual_status(server: Served) -> None:
    for body, status in (
        ({"n": 9}, 400),
        ({"max_tokens": 65}, 400),
        ({"temperature": -1}, 400),
        ({"stream_options": {"include_usage": True}}, 400),
        ({"messages": [{"role": "user", "content": "long " * 5000}]}, 400),
    ):
        assert ask(server, "verbalized", **body).status_code == status, body


class Waiting:
    """Calls a router that waits, and then calls it again."""

    name = "waiting"
    help = "two calls of a router that waits"
    family: Family = "prompting"

    def settings(self, grid: Any) -> list[Setting]:
        return [Setting("waiting", "waiting", None, {"kind": self.name})]

    def answer(self, baco: Any, setting: Any, prompts: Any, draw: Draw) -> list[list[Answer]]:
        conversations = [prompt.messages for prompt in prompts]
        for _ in range(2):
            rows = sampled(baco, "Waits", conversations, draw.n, draw.seed, draw.sampling)
        return rows


def test_a_registered_method_is_served_and_ends_with_its_client(demo: Baco) -> None:
    with restored(), waiting_router("Waits") as decides, served(demo) as server:
        register_method(Waiting())
        body = {"model": "baco/waiting", "messages": [{"role": "user", "content": PROMPT}]}
        with connect(server.url, post_request("/v1/chat/completions", body)):
            assert decides.awaited.wait(WAIT)
        wait_for(lambda: server.arrived == 2)  # the call, and its end
        decides.set()
        server.settles()
        assert server.rounds <= 2
        reply = ask(server, "waiting", max_tokens=4)
        assert reply.status_code == 200
        assert server.entry(reply)["outcome"] == "finished"
        assert [entry["outcome"] for entry in server.log()] == ["gone", "finished"]


def test_a_method_that_takes_too_long_is_a_504(demo: Baco) -> None:
    with restored(), waiting_router("Waits") as decides, served(demo, timeout=0.5) as server:
        register_method(Waiting())
        assert ask(server, "waiting").status_code == 504
        decides.set()
        server.settles()


def test_more_open_prompts_than_the_limit_are_a_429(demo: Baco) -> None:
    with restored(), waiting_router("Waits") as decides, served(demo, max_open=1) as server:
        register_method(Waiting())
        first = threading.Thread(target=lambda: ask(server, "waiting", max_tokens=4))
        first.start()
        wait_for(lambda: server.engine_thread.open)
        assert ask(server, "verbalized").status_code == 429
        decides.set()
        first.join()
