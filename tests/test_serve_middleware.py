"""Keys and origins, metrics and the access log, limits, and how a server ends."""

import json
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from baco import Baco, register_router
from baco.cli import run
from baco.errors import BacoError
from baco.routing.rules import RULES
from baco.routing.signals import Signals
from baco.serve.settings import Settings
from tests.serving import (
    PROMPT,
    ROUTER,
    WAIT,
    Served,
    chat,
    events,
    process,
    served,
    wait_for,
    waiting_router,
)

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def server(demo: Baco) -> Iterator[Served]:
    with served(demo, max_n=64) as running:
        yield running


def test_with_keys_requests_without_a_valid_key_are_refused(demo: Baco) -> None:
    with served(demo, api_keys=KEYS) as server, server.client as client:
        for path in ("/v1/models", "/baco/info", "/metrics", "/openapi.json"):
            refused = client.get(path)
            assert refused.status_code == 401
            assert refused.json()["error"]["type"] == "authentication_error"
            assert refused.headers["WWW-Authenticate"] == "Bearer"
            for key in ("wrong", KEYS[0][:-1], f"{KEYS[0]} {KEYS[1]}"):
                assert client.get(path, headers=bearer(key)).status_code == 401
            for key in KEYS:
                assert client.get(path, headers=bearer(key)).status_code == 200
        basic = {"Authorization": f"Basic {KEYS[0]}"}
        assert client.get("/v1/models", headers=basic).status_code == 401
        # What asks for the key itself, and what a load balancer asks.
        assert client.get("/").status_code == client.get("/health").status_code == 200
        assert KEYS[0] not in "".join(server.records.lines)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/page/favicon.svg"])
def test_head_is_answered_as_get_without_the_body(server: Served, path: str) -> None:
    with server.client as client:
        got, head = client.get(path), client.head(path)
        assert head.status_code == got.status_code
        assert head.headers["content-type"] == got.headers["content-type"]
        assert head.content == b""
        refused = client.head("/v1/chat/completions")
        assert refused.status_code == 405
        assert client.get("/health").status_code == 200  # the connection is still in step
    methods = [server.entry(reply)["method"] for reply in (got, head, refused)]
    assert methods == ["GET", "HEAD", "HEAD"]


def test_pages_of_other_origins_may_call_only_if_their_origin_is_listed(
    server: Served, demo: Baco
) -> None:
    mine = "https://mine.example"
    headers = {"Origin": mine, "Access-Control-Request-Method": "POST"}
    with server.client as client:
        assert "Access-Control-Allow-Origin" not in client.get("/health", headers=headers).headers
        assert client.options("/v1/chat/completions", headers=headers).status_code == 405
    with served(demo, cors_origins=(mine,), api_keys=KEYS) as named, named.client as client:
        allowed = client.options("/v1/chat/completions", headers=headers)
        assert (allowed.status_code, allowed.headers["Access-Control-Allow-Origin"]) == (200, mine)
        refused = client.get("/v1/models", headers={"Origin": mine})
        # A page can read why it is refused.
        assert (refused.status_code, refused.headers["Access-Control-Allow-Origin"]) == (401, mine)
        other = client.get("/health", headers={"Origin": "https://other.example"})
        assert "Access-Control-Allow-Origin" not in other.headers


def test_an_origin_that_no_browser_sends_is_refused() -> None:
    sent = ("*", "null", "https://mine.example", "http://[::1]:3000", "chrome-extension://abc")
    assert Settings(cors_origins=sent).cors_origins == sent
    for origin in ("", "mine.example", "https://mine.example/", "https://Mine.example", "http://"):
        with pytest.raises(BacoError, match=f"origin '{origin}': give it as browsers send it"):
            Settings(cors_origins=(origin,))


def test_the_access_log_holds_everything_but_texts(server: Served) -> None:
    answer = server.ask(seed=3, n=2)
    entry = server.entry(answer)
    reply = answer.json()
    assert entry["path"] == "/v1/chat/completions"
    assert (entry["method"], entry["status"], entry["outcome"]) == ("POST", 200, "finished")
    assert (entry["router"], entry["n"], entry["seed"], entry["stream"]) == (ROUTER, 2, 3, False)
    assert entry["prompt_tokens"] == reply["usage"]["prompt_tokens"]
    assert entry["tokens"] == reply["usage"]["completion_tokens"]
    assert 0 < entry["base_share"] < 1
    assert entry["client"] == "127.0.0.1"
    line = json.dumps(entry)
    assert PROMPT not in line
    assert reply["choices"][0]["message"]["content"] not in line


def test_metrics_count_the_tokens_that_are_kept(demo: Baco) -> None:
    with served(Baco(demo.pair)) as server:
        asked = {"messages": [{"role": "user", "content": f"{PROMPT} " * 30}], "max_tokens": 2}
        for salt in (None, None, "another"):
            usage = server.ask(**asked, cache_salt=salt).json()["usage"]
        for model in ("base", "aligned"):
            queries = server.metric(f'baco_prefix_cache_queries_total{{model="{model}"}}')
            hits = server.metric(f'baco_prefix_cache_hits_total{{model="{model}"}}')
            # A block of the second prompt at least, and nothing of the others.
            assert 64 <= hits <= queries / 3
        assert queries / 3 == usage["prompt_tokens"] - 1
        assert server.metric("baco_prefix_cache_bytes") > 0


def test_prompts_are_logged_only_with_the_option(demo: Baco) -> None:
    with served(demo, log_prompts=True) as server:
        entry = server.entry(server.ask(max_tokens=1))
        assert entry["prompts"] == [[{"role": "user", "content": PROMPT}]]


def test_metrics_count_the_tokens_of_answers(demo: Baco) -> None:
    with served(demo) as server:
        reply = server.ask(seed=3, n=4).json()
        server.ask(n=0)
        server.settles()
        path = 'path="/v1/chat/completions"'
        assert server.metric(f'baco_requests_total{{{path},status="200"}}') == 1
        assert server.metric(f'baco_requests_total{{{path},status="400"}}') == 1
        answers = demo.generate(PROMPT, router=ROUTER, seed=3, n=4)
        for source in ("base", "aligned"):
            expected = sum(answer.sources.count(source) for answer in answers)
            assert server.metric(f'baco_tokens_total{{source="{source}"}}') == expected > 0
        assert server.metric("baco_prompt_tokens_total") == reply["usage"]["prompt_tokens"]
        assert server.metric("baco_answer_base_share_count") == 4
        shares = sum(answer.base_share or 0 for answer in answers)
        assert server.metric("baco_answer_base_share_sum") == pytest.approx(shares)
        assert server.metric("baco_time_to_first_token_seconds_count") == 1
        assert server.metric("baco_answer_tokens_per_second_count") == 4
        assert server.metric("baco_drafted_tokens_total") >= 1
        drafted = server.metric("baco_drafted_tokens_total")
        accepted = server.metric("baco_accepted_tokens_total")
        assert server.metric("baco_acceptance") == pytest.approx(accepted / drafted)
        for name in ("baco_prompts_open", "baco_answers_waiting", "baco_answers_running"):
            assert server.metric(name) == 0


def test_a_full_queue_is_a_429_with_retry_after(demo: Baco) -> None:
    body = chat(router="Waits", stream=True)
    with (
        served(demo, max_open=1) as server,
        waiting_router("Waits") as decides,
        server.client as client,
        client.stream("POST", "/v1/chat/completions", json=body) as open_one,
    ):
        chunks = events(open_one)
        next(chunks)
        assert server.metric("baco_prompts_open") == 1
        refused = server.ask()
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) > 0
        assert refused.json()["error"]["type"] == "rate_limit_error"
        decides.set()
        assert list(chunks)
        server.settles()
        assert server.ask(max_tokens=1).status_code == 200


def test_a_request_that_takes_too_long_is_ended(demo: Baco) -> None:
    with served(demo, timeout=0.05) as server, waiting_router("Waits") as decides:
        ended = server.ask(router="Waits")
        assert (ended.status_code, ended.json()["error"]["type"]) == (504, "server_error")
        body = chat(router="Waits", stream=True)
        with (
            server.client as client,
            client.stream("POST", "/v1/chat/completions", json=body) as got,
        ):
            chunks = list(events(got)) if got.status_code == 200 else [json.loads(got.read())]
        assert "longer than the time limit of this server" in chunks[-1]["error"]["message"]
        decides.set()
        server.settles()
        assert server.rounds <= 2


@contextmanager
def poison() -> Iterator[None]:
    """A router that raises in every step."""

    def broken(signals: Signals) -> torch.Tensor:
        raise RuntimeError("secret details")

    register_router("Poison", broken)
    try:
        yield
    finally:
        del RULES["Poison"]


def test_a_request_that_raises_is_a_500_and_other_answers_are_unchanged(server: Served) -> None:
    alone = server.ask(seed=1, n=8).json()["choices"]
    with poison(), server.client as client:
        body = chat(seed=1, n=8, stream=True)
        with client.stream("POST", "/v1/chat/completions", json=body) as neighbour:
            chunks = events(neighbour)
            first = next(chunks)
            broken = server.ask(router="Poison")
            assert broken.status_code == 500
            assert "secret" not in broken.text
            texts = [""] * 8
            for chunk in [first, *chunks]:
                for choice in chunk["choices"]:
                    texts[choice["index"]] += choice["delta"].get("content", "")
        assert texts == [choice["message"]["content"] for choice in alone]
        body = chat(router="Poison", stream=True)
        with client.stream("POST", "/v1/chat/completions", json=body) as broken_stream:
            assert list(events(broken_stream))[-1]["error"]["type"] == "server_error"


WAITS = """
import time
from pathlib import Path
from baco import register_router

def decide(signals):
    while not Path({path!r}).exists():
        time.sleep(0.01)
    return signals.max_base < 2

register_router("Waits", decide)
"""
SLOW = """
import time
from baco import register_router
register_router("Slow", lambda signals: time.sleep(0.5) or signals.max_base < 2)
"""


def stream_of(client: httpx.Client, router: str) -> Iterator[str]:
    body = chat("Give me a four-sentence story about a dragon.", router=router, stream=True)
    with client.stream("POST", "/v1/chat/completions", json=body) as got:
        yield from got.iter_lines()


def test_sigterm_lets_running_requests_finish_and_takes_no_new_ones(tmp_path: Path) -> None:
    decides = tmp_path / "decides"
    before = WAITS.format(path=str(decides))
    with process("--grace", str(WAIT), before=before) as (running, url):
        with httpx.Client(base_url=url, headers=bearer("two"), timeout=WAIT) as client:
            lines = stream_of(client, "Waits")
            next(lines)
            running.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx.get(f"{url}/health", timeout=WAIT).status_code == 503)
            refused = client.post("/v1/chat/completions", json=chat())
            assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")
            decides.touch()
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert running.wait(WAIT) == 0
        assert running.stdout is not None
        entries = [json.loads(line) for line in running.stdout]
        assert entries[-1]["outcome"] == "finished"


def test_after_the_grace_running_requests_get_an_error_and_the_server_ends() -> None:
    with process("--grace", "0", before=SLOW) as (running, url):
        with httpx.Client(base_url=url, headers=bearer("one"), timeout=WAIT) as client:
            lines = stream_of(client, "Slow")
            next(lines)
            running.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert running.wait(WAIT) == 0


@pytest.mark.parametrize(
    ("options", "environment", "complaint"),
    [
        (["--port", "TAKEN"], {}, "cannot listen at 127.0.0.1:"),
        (["--host", "192.0.2.1"], {}, "cannot listen at 192.0.2.1:8000"),
        (["--api-key", ""], {}, "an API key is empty"),
        (["--port", "0", "--memory", "lots"], {}, "memory is 'lots'"),
        (["--trusted-proxy", "nginx"], {}, "trusted proxy 'nginx': give an address"),
        ([], {"BACO_API_KEY": " "}, "BACO_API_KEY is empty"),
    ],
)
def test_options_that_cannot_be_served_are_one_line(
    options: list[str],
    environment: dict[str, str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(["serve", *[option.replace("TAKEN", port) for option in options]]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"baco: {complaint}")
    assert message.count("\n") == 1
