"""Servers that fail, lack fields, or serve another model: detected, tolerated, or refused."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse

from baco import Baco, BacoError
from baco.cli import run
from baco.routing.signals import Distribution
from baco.source import MODELS
from tests.remoting import Backing, Door, Stalling, calls, listening, remote, wait_until_idle
from tests.serving import PROMPT, WAIT, Served, events, reserved_port, served, wait_for

STORY = "Give me a four-sentence story about a dragon."
ROUTER = "P-Punc:0.4"
OPENAI = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "logit_bias"}


@pytest.fixture(scope="module")
def server(demo: Baco) -> Iterator[Served]:
    with served(demo) as running:
        yield running


def bare(body: dict[str, Any]) -> dict[str, Any] | tuple[int, dict[str, str]]:
    """A server that knows OpenAI's fields only and returns no log-probabilities."""
    if not body.keys() <= OPENAI or not isinstance(body["prompt"][0], int):
        return 400, {}
    return body | {"min_p": 0.0}


def textual(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice without log-probabilities and token ids."""
    return {name: choice[name] for name in ("index", "text", "finish_reason")}


@pytest.mark.parametrize("which", ["base", "aligned", "both"])
def test_content_routers_work_with_a_server_that_returns_only_text(
    server: Served, demo: Baco, which: str
) -> None:
    door = Door(Backing(server.url), bare, textual)
    with listening(door) as url:
        options: dict[str, Any] = {} if which == "both" else {f"{which}_url": url}
        with remote(url if which == "both" else server.url, **options) as remote_pair:
            for router in ("Punc", "Role:name=aligned,content=aligned", "Rand:0.4"):
                settings: dict[str, Any] = {"router": router, "temperature": 0, "seed": 3}
                (mine,) = remote_pair.generate(PROMPT, max_tokens=12, **settings)
                (expected,) = demo.generate(PROMPT, max_tokens=12, **settings)
                assert (mine.token_ids, mine.error) == (expected.token_ids, None)
                assert mine.sources == expected.sources
            (drawn,) = remote_pair.generate(PROMPT, router="Punc", max_tokens=6, min_p=0.0, seed=2)
            assert (len(drawn.token_ids), drawn.error) == (6, None)


def strict(body: dict[str, Any]) -> dict[str, Any] | tuple[int, dict[str, str]]:
    """A server with vLLM's limits: temperature at most 2, 20 top tokens, whole prompts to score."""
    if body["temperature"] > 2 or body.get("logprobs", 0) > 20:
        return 400, {}
    return {name: value for name, value in body.items() if name != "echo_from"}


def deaf(body: dict[str, Any]) -> dict[str, Any]:
    """A server that ignores the fields it does not know."""
    return {name: value for name, value in body.items() if name not in ("min_p", "top_k")}


def test_the_parameters_of_a_server_are_found_within_the_bounds_it_sets(server: Served) -> None:
    for change, obeyed in ((strict, {"min_p", "top_k", "logit_bias"}), (deaf, {"logit_bias"})):
        door = Door(Backing(server.url), change)
        with listening(door) as url, remote(server.url, aligned_url=url) as remote_pair:
            backend: Any = remote_pair.backend
            assert backend.models["aligned"].ability.obeys == obeyed
            if change is strict:  # the pair's own sampling has a min_p
                assert remote_pair.generate(PROMPT, router=ROUTER, max_tokens=4)[0].error is None
            else:
                with pytest.raises(BacoError, match="does not follow min_p: give min_p 0"):
                    remote_pair.generate(PROMPT, router=ROUTER)


def early(body: dict[str, Any]) -> dict[str, Any] | tuple[int, dict[str, str]]:
    """A server that truncates before the temperature: the same tokens survive as with another
    min_p after it.
    """
    if "samplers" in body:
        return 400, {}
    return body | {"min_p": body.get("min_p", 0.0) ** (1 / (body["temperature"] or 1))}


def test_a_server_that_truncates_before_the_temperature_is_detected(server: Served) -> None:
    door = Door(Backing(server.url), early)
    with listening(door) as url, remote(server.url, aligned_url=url) as remote_pair:
        backend: Any = remote_pair.backend
        abilities = {source: model.ability for source, model in backend.models.items()}
        assert [abilities[source].truncates_first for source in MODELS] == [False, True]
        settings: dict[str, Any] = {"router": ROUTER, "min_p": 0.1, "max_tokens": 4}
        assert remote_pair.generate(PROMPT, **settings)[0].error is None
        with pytest.raises(BacoError, match="truncates before it applies the temperature"):
            remote_pair.generate(PROMPT, temperature=1.3, **settings)
        settings["min_p"] = 0.0
        assert remote_pair.generate(PROMPT, temperature=1.3, **settings)[0].error is None


def test_json_has_null_for_log_probabilities_that_a_server_does_not_return(
    server: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", PROMPT, "-r", "Punc", "-t", "0", "--max-tokens", "6", "--json"]
    with listening(Door(Backing(server.url), bare, textual)) as url:
        servers = ["--backend", "remote", "--base-url", url, "--aligned-url", url]
        assert run([*command, *servers]) == 0
    (sample,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["samples"]
    assert sample["logprobs"] == [None] * 6


def test_routers_that_read_probabilities_are_refused_without_them(server: Served) -> None:
    with listening(Door(Backing(server.url), bare, textual)) as url:
        with remote(server.url, base_url=url) as remote_pair:
            with pytest.raises(BacoError, match=r"P-Punc:0.4 needs probabilities and the base"):
                remote_pair.generate(PROMPT, router=ROUTER)
            with pytest.raises(BacoError, match="the remote backend returns at most 0"):
                remote_pair.generate(PROMPT, router="Punc", logprobs=1)
            with pytest.raises(BacoError, match="does not follow min_p"):
                remote_pair.generate(PROMPT, router="Punc", min_p=0.1)
        with remote(server.url, aligned_url=url) as remote_pair:
            # P reads the base alone: it needs no probabilities of the aligned model.
            (answer,) = remote_pair.generate(PROMPT, router="P:0.3", temperature=0, max_tokens=8)
            assert (len(answer.token_ids), answer.error) == (8, None)


def test_an_answer_ends_where_its_entropy_cannot_be_bounded(server: Served, demo: Baco) -> None:
    """20 tokens bound the entropy of 2,048; a threshold between the bounds is an error."""
    with remote(server.url) as remote_pair:
        decided = 0
        for gamma in (0.3, 1.0, 1.5, 2.0, 4.0, 7.0):
            settings: dict[str, Any] = {"router": f"H:{gamma}", "temperature": 0}
            (mine,), (expected,) = (
                remote_pair.generate(PROMPT, **settings),
                demo.generate(PROMPT, **settings),
            )
            kept = len(mine.token_ids)
            assert mine.token_ids == expected.token_ids[:kept]
            if mine.error is None:
                decided += 1
            else:
                assert mine.finish_reason == "error"
                assert "most likely tokens that the server returns leave" in mine.error
        assert decided > 0


def test_bounds_of_few_tokens_decide_most_entropies(demo: Baco) -> None:
    """All log-probabilities are requested only where those of few tokens leave a decision open."""
    text = list(demo.pair.renderer.render(PROMPT).base_ids)
    first = float(Distribution(demo.pair.base.score(text)[-1:]).entropy)
    with (
        served(demo, max_logprobs=2048) as whole,
        listening(door := Door(Backing(whole.url), lambda body: body)) as url,
        remote(whole.url, base_url=url) as remote_pair,
    ):
        for gamma, most in (("1.5", 20), (f"{first - 5e-4:.6f}", 2048)):
            door.bodies.clear()
            settings: dict[str, Any] = {"router": f"H:{gamma}", "temperature": 0}
            (mine,) = remote_pair.generate(PROMPT, **settings)
            (expected,) = demo.generate(PROMPT, **settings)
            assert (mine.token_ids, mine.error) == (expected.token_ids, None)
            assert mine.sources == expected.sources
            requested = [body["logprobs"] for body in door.bodies]
            assert max(requested) == most
            assert sum(top > 20 for top in requested) < len(requested) / 3


@pytest.mark.parametrize("returned", [200, 2048])
def test_the_whole_vocabulary_is_requested_where_nothing_less_decides(
    demo: Baco, monkeypatch: pytest.MonkeyPatch, returned: int
) -> None:
    """A server that returned all it was asked for at the start may return more, or refuse it."""
    monkeypatch.setattr("baco.backends.remote.model.TOP_PROBED", 200)
    monkeypatch.setattr("baco.backends.remote.probe._TOPS", (200, 20, 5, 1))
    text = list(demo.pair.renderer.render(PROMPT).base_ids)
    first = float(Distribution(demo.pair.base.score(text)[-1:]).entropy)
    with served(demo, max_logprobs=returned) as running, remote(running.url) as remote_pair:
        settings: dict[str, Any] = {"router": f"H:{first:.6f}", "temperature": 0, "max_tokens": 4}
        (answer,) = remote_pair.generate(PROMPT, **settings)
    if returned == 2048:
        assert (len(answer.token_ids), answer.error) == (4, None)
    else:
        assert answer.error is not None
        assert "the 200 most likely tokens that the server returns leave" in answer.error


def test_a_rule_that_reads_whole_rows_is_refused(server: Served) -> None:
    from baco.routing.parser import register_router
    from baco.routing.rules import RULES

    register_router("Spread", lambda signals: signals.base.std(dim=-1) > 3)
    try:
        with remote(server.url) as remote_pair, pytest.raises(BacoError, match="whole rows"):
            remote_pair.generate(PROMPT, router="Spread")
    finally:
        del RULES["Spread"]


def failing(status: int, headers: dict[str, str]) -> Any:
    """Fails two of three calls while answers are written, which have longer prompts than probes."""
    count = 0

    def change(body: dict[str, Any]) -> Any:
        nonlocal count
        count += len(body["prompt"]) > 14
        return (status, headers) if count % 3 else body

    return change


@pytest.mark.parametrize(
    ("status", "headers"), [(429, {"retry-after": "0.05"}), (500, {}), (503, {})], ids=str
)
def test_transient_errors_are_retried(
    server: Served, demo: Baco, status: int, headers: dict[str, str]
) -> None:
    door = Door(Backing(server.url), failing(status, headers))
    with listening(door) as url, remote(server.url, aligned_url=url) as remote_pair:
        before = len(door.bodies)
        settings: dict[str, Any] = {"router": ROUTER, "temperature": 0, "max_tokens": 12}
        (mine,), (expected,) = (
            remote_pair.generate(STORY, **settings),
            demo.generate(STORY, **settings),
        )
        assert (mine.token_ids, mine.error) == (expected.token_ids, None)
        assert len(door.bodies) - before > 3


def test_a_refused_call_is_not_retried_and_ends_its_own_answer_only(server: Served) -> None:
    def change(body: dict[str, Any]) -> Any:
        return (400, {}) if body["prompt"][-1:] == [99] or len(body["prompt"]) > 14 else body

    door = Door(Backing(server.url), change)
    with listening(door) as url, remote(server.url, aligned_url=url) as remote_pair:
        before = len(door.bodies)
        answers = remote_pair.generate_batch([PROMPT, STORY], router=ROUTER, temperature=0)
        broken = answers[1][0]
        assert broken.finish_reason == "error"
        assert broken.error is not None
        assert broken.error.startswith("the aligned server at http://127.0.0.1:")
        assert broken.error.endswith("answers 400: no")
        assert broken.error_kind == "server"
        assert len(door.bodies) - before < 12


def test_a_batch_keeps_no_answer_that_broke_off(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = True

    def change(body: dict[str, Any]) -> Any:
        return (400, {}) if broken and len(body["prompt"]) > 13 else body

    prompts, out = tmp_path / "in.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (PROMPT, STORY)))
    batch = ["batch", str(prompts), str(out), "--shard-rows", "1", "-r", "Aligned", "-n", "2"]
    short = ["--max-tokens", "4", "--backend", "remote", "--base-model", "baco/base"]
    with listening(Door(Backing(server.url), change)) as url:
        command = [*batch, *short, "--base-url", server.url, "--aligned-url"]
        assert run([*command, url]) == 2
        assert "line 2: its answer broke off: the aligned server" in " ".join(
            capsys.readouterr().err.split()
        )
        assert [path.name for path in out.glob("rows-*")] == ["rows-000000000-000000000.jsonl"]
    # Servers may have other addresses when it is resumed: no output depends on them.
    assert run([*command, server.url]) == 0
    rows = [path.read_text() for path in sorted(out.glob("rows-*"))]
    assert not any("http" in row for row in rows)
    answers = [json.loads(row) for row in rows]
    assert [row["prompt"] for row in answers] == [PROMPT, STORY]
    assert {sample["finish_reason"] for row in answers for sample in row["samples"]} == {"length"}


def test_a_server_that_does_not_answer_in_time_ends_the_answer(server: Served) -> None:
    stalling = Stalling(Backing(server.url))
    with (
        listening(stalling) as url,
        remote(server.url, aligned_url=url, timeout=3.0) as remote_pair,
    ):
        stalling.replies = 0
        (answer,) = remote_pair.generate(PROMPT, router="Aligned", max_tokens=4)
        assert answer.error is not None
        assert "gave no answer within 3 s: raise the timeout" in answer.error


def test_clients_of_a_gateway_get_the_error_of_its_server(server: Served) -> None:
    broken = False

    def change(body: dict[str, Any]) -> Any:
        return (500, {}) if broken else body

    door = Door(Backing(server.url), change)
    with (
        listening(door) as url,
        remote(server.url, aligned_url=url, retries=0) as remote_pair,
        served(remote_pair) as gateway,
    ):
        assert gateway.ask(max_tokens=4).status_code == 200
        broken = True
        failed = gateway.ask(max_tokens=4)
        assert failed.status_code == 502
        assert "the aligned server at" in failed.json()["error"]["message"]
        body = {"messages": [{"role": "user", "content": PROMPT}], "stream": True}
        with (
            gateway.client as client,
            client.stream("POST", "/v1/chat/completions", json=body) as got,
        ):
            assert "error" in list(events(got))[-1]
        assert gateway.ask(model="baco/base", router=None, max_tokens=4).status_code == 200
        broken = False
        assert gateway.ask(max_tokens=4).status_code == 200
        gateway.settles()


def test_a_cancelled_request_leaves_no_call_open(server: Served) -> None:
    stalling = Stalling(Backing(server.url))
    with listening(stalling) as url, remote(url) as remote_pair:
        decoder = remote_pair.decoder()
        stalling.replies = 0
        ticket = decoder.submit(STORY, router=remote_pair.router(ROUTER), n=8)
        wait_for(lambda: decoder.running == 8)
        decoder.cancel(ticket)
        assert not decoder.busy
        wait_until_idle(remote_pair)
        assert decoder.running == 0


def test_answers_of_a_closed_stream_are_cancelled(server: Served) -> None:
    stalling = Stalling(Backing(server.url))
    with listening(stalling) as url, remote(url) as remote_pair:
        chunks = remote_pair.stream(STORY, router=ROUTER, n=8, max_tokens=200)
        next(chunks)
        stalling.replies = 0
        chunks.close()  # type: ignore[attr-defined]
        wait_until_idle(remote_pair)
        del chunks
        remote_pair.stream(STORY, router=ROUTER, n=8, max_tokens=200)  # never read
        with pytest.raises(BacoError, match="context window"):
            remote_pair.generate_batch([STORY, "long " * 600], router=ROUTER, max_tokens=200)
        wait_until_idle(remote_pair)


def test_a_closed_backend_raises(server: Served) -> None:
    stalling = Stalling(Backing(server.url))
    with listening(stalling) as url:
        with remote(server.url, aligned_url=url) as remote_pair:
            stalling.replies = 2  # too few for the whole answer
            chunks = remote_pair.stream(STORY, router=ROUTER, max_tokens=200)
            next(chunks)
        with pytest.raises(BacoError, match="is closed"):
            list(chunks)


def test_a_shard_of_answers_that_broke_off_is_not_written(server: Served, tmp_path: Path) -> None:
    broken = True

    def change(body: dict[str, Any]) -> Any:
        return (400, {}) if broken and len(body["prompt"]) > 14 else body

    (tmp_path / "in.txt").write_text(f"{STORY}\n", encoding="utf-8")
    door = Door(Backing(server.url), change)
    with listening(door) as url:
        command = ["batch", str(tmp_path / "in.txt"), str(tmp_path / "out"), "--max-tokens", "12"]
        command += ["--backend", "remote", "--base-url", server.url, "--aligned-url", url]
        command += ["-r", ROUTER, "-s", "1", "--temperature", "0"]
        assert run(command) == 2
        assert not list((tmp_path / "out").glob("*.jsonl"))
        broken = False
        assert run(command) == 0
    assert len(list((tmp_path / "out").glob("*.jsonl"))) == 1


def test_no_more_answers_run_at_once_than_the_concurrency(server: Served) -> None:
    with remote(server.url, concurrency=2) as remote_pair:
        decoder, most, ended = remote_pair.decoder(), 0, 0
        decoder.submit(PROMPT, router=remote_pair.router(ROUTER), n=6, max_tokens=8)
        while decoder.busy:
            most = max(most, decoder.running)
            ended += sum(chunk.completion is not None for chunk in decoder.step())
        assert (most, ended) == (2, 6)


def test_connections_stay_open_for_the_next_call(server: Served) -> None:
    backing, peers = Backing(server.url), list[tuple[str, int]]()

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        peers.append(scope["client"])
        await backing(scope, receive, send)

    with listening(counted) as url, remote(url) as remote_pair:
        remote_pair.generate(STORY, router=ROUTER, n=1, max_tokens=8)
        first = set(peers)
        peers.clear()
        remote_pair.generate(STORY, router=ROUTER, n=3, max_tokens=40)
    assert len(peers) > 20
    assert len(set(peers) - first) <= 2 * 3  # one per model and concurrent answer


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"base_url": "localhost:8000"}, "base_url is 'localhost:8000': give an address such as"),
    ({"base_url": "http://[::1"}, r"base_url is 'http://\[::1': give an address such as"),
    ({"base_url": "http://gpu1:80a/v1"}, "base_url is 'http://gpu1:80a/v1': give an address"),
    ({"aligned_url": "http://gpu1:80000"}, "aligned_url is 'http://gpu1:80000': give an address"),
    ({"base_url": "http://me:secret@gpu1/v1"}, "base_url holds a password or a query: give the"),
    ({"base_url": "http://gpu1/v1?key=secret"}, "base_url holds a password or a query: give the"),
    ({"base_url": "me:secret@gpu1"}, "base_url is 'gpu1': give an address"),
    ({"base_url": "http://127.0.0.1:9", "retries": 0}, "the base server at http://127.0.0.1:9/v1"),
    ({"aligned_model": "gpt-4"}, "there is no model 'gpt-4' here"),
    ({"concurrency": 0}, "concurrency is 0"),
    ({"timeout": 0}, "timeout is 0"),
    ({"device": "cpu"}, "the remote backend takes no device"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
def test_wrong_options_and_servers_are_refused_at_the_start(
    server: Served, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BacoError, match=message) as raised, remote(server.url, **options):
        pass
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("listed", [[1], {"data": "none"}, {"data": ["one"]}], ids=str)
def test_an_address_that_lists_no_models_is_refused(server: Served, listed: Any) -> None:
    with (
        listening(JSONResponse(listed)) as url,
        pytest.raises(BacoError, match=r"has 0 models: name one with base_model \(--base-model\)"),
        remote(server.url, base_url=url),
    ):
        pass


def test_a_server_of_another_pair_is_refused(server: Served, random_pair: Any) -> None:
    folder = random_pair("llama", noise=0.3).base.parent
    with pytest.raises(BacoError, match="its model is of another pair"), remote(server.url, folder):
        pass


def test_keys_are_taken_from_the_environment(demo: Baco, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(demo, api_keys=("one", "two")) as locked:
        with pytest.raises(BacoError, match=r"401.*BACO_(BASE|ALIGNED)_API_KEY"):
            Baco.load("demo", backend="remote", base_url=locked.url, aligned_url=locked.url)
        monkeypatch.setenv("BACO_BASE_API_KEY", "one")
        monkeypatch.setenv("OPENAI_API_KEY", "two")
        with remote(locked.url) as remote_pair:
            assert remote_pair.generate(PROMPT, router=ROUTER, max_tokens=4)[0].error is None


@pytest.mark.parametrize("key", ["schlüssel", "one\ntwo"])
def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(
    key: str, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACO_ALIGNED_API_KEY", key)
    with pytest.raises(BacoError, match="check BACO_ALIGNED_API_KEY") as raised:
        Baco.load("demo", backend="remote", base_url=server.url, aligned_url=server.url)
    assert key not in str(raised.value)


@pytest.fixture
def port() -> Iterator[int]:
    with reserved_port() as number:
        yield number


def started(port: int) -> "subprocess.Popen[bytes]":
    """A server process of the embedded pair, once it takes requests."""
    command = [sys.executable, "-m", "baco", "serve", "--port", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet)  # type: ignore[call-overload]

    def up() -> bool:
        assert process.poll() is None
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health", timeout=WAIT).status_code == 200
        except httpx.TransportError:
            return False

    wait_for(up)
    return process  # type: ignore[no-any-return]


def test_a_server_that_is_killed_and_restarted_loses_no_answer(
    server: Served, demo: Baco, port: int
) -> None:
    """Under load. A server that does not come back loses the answers that need it, and no other."""
    process = started(port)
    url = f"http://127.0.0.1:{port}"
    settings: dict[str, Any] = {"router": ROUTER, "temperature": 0, "n": 1}
    prompts = [PROMPT, STORY, "Give me a cosy dinner idea", "Give me a name for my puppy."] * 5
    expected = [demo.generate(prompt, **settings)[0].token_ids for prompt in prompts[:4]] * 5
    try:
        with (
            remote(server.url, aligned_url=url, retries=500) as remote_pair,
            ThreadPoolExecutor(1) as pool,
        ):
            writing = pool.submit(remote_pair.generate_batch, prompts, **settings)
            before = calls(remote_pair)
            wait_for(lambda: calls(remote_pair) > before + 20)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            failed = calls(remote_pair)
            wait_for(lambda: calls(remote_pair) > failed + 5)  # calls to the killed server
            process = started(port)
            answers = writing.result()
        assert [answer.error for (answer,) in answers] == [None] * len(prompts)
        assert [answer.token_ids for (answer,) in answers] == expected

        with remote(server.url, aligned_url=url, retries=1) as remote_pair:
            decoder = remote_pair.decoder()
            never = dict.fromkeys(demo.pair.end_ids, -100.0)
            endless: dict[str, Any] = {"logit_bias": never, "max_tokens": 300}
            tickets = [
                decoder.submit(STORY, router=remote_pair.router(name), temperature=0, n=3, **more)
                for name, more in ((ROUTER, endless), ("Base", dict[str, Any]()))
            ]
            ended: dict[int, list[Any]] = {ticket: [] for ticket in tickets}
            while decoder.busy:
                for chunk in decoder.step():
                    if chunk.prompt == tickets[0]:
                        process.kill()
                    if chunk.completion is not None:
                        ended[chunk.prompt].append(chunk.completion)
            for broken in ended[tickets[0]]:
                assert broken.finish_reason == "error"
                # Twice, unless another answer's failures had already shown that it is gone.
                assert "the aligned server" in broken.error
                assert "failed" in broken.error
            for whole in ended[tickets[1]]:
                assert (whole.finish_reason, whole.error) == ("stop", None)
    finally:
        process.kill()
        process.wait()
