"""Judge routing with the real client, against a real server on this machine."""

import ast
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from baco import Baco
from baco.errors import BacoError
from baco.evaluation.methods import Draw, Grid
from baco.evaluation.methods import judge as module
from baco.evaluation.methods.judge import Judge
from baco.evaluation.records import Prompt
from baco.evaluation.tasks import load_task

DRAW = Draw(3, 3, {"max_tokens": 20})


class Server:
    """An OpenAI-compatible endpoint with replies set by the test."""

    def __init__(self, reply: Callable[[dict[str, Any]], tuple[int, str]]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body | {"path": self.path})
                outer.keys.add(self.headers["Authorization"])
                status, text = reply(body)
                message = {"role": "assistant", "content": text}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                envelope = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
                data = json.dumps(envelope | {"choices": [choice]}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(reply: Callable[[dict[str, Any]], tuple[int, str]]) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def prompts() -> tuple[Prompt, ...]:
    return load_task("demo", 2).prompts


def judged(baco: Baco, server: Server, prompts: tuple[Prompt, ...], draw: Draw = DRAW) -> Any:
    judge = Judge(server.url, "m")
    (setting,) = judge.settings(Grid("full", draw.n))
    return judge.answer(baco, setting, prompts, draw)


@pytest.mark.parametrize("reply", ["aligned", "Aligned.", "base or aligned", "what?", ""])
def test_a_judge_that_never_names_base_gives_the_aligned_model(
    demo: Baco, prompts: tuple[Prompt, ...], serve: Callable[..., Server], reply: str
) -> None:
    rows = judged(demo, serve(lambda _: (200, reply)), prompts)
    alone = demo.generate_batch(
        [p.text for p in prompts], router="Aligned", n=3, seed=3, max_tokens=20
    )
    assert [[a.text for a in row] for row in rows] == [[c.text for c in row] for row in alone]
    assert all(a.base_share == 0 for row in rows for a in row)


def test_words_that_the_judge_gives_to_base_are_whole_words_of_base(
    demo: Baco, prompts: tuple[Prompt, ...], serve: Callable[..., Server]
) -> None:
    rows = judged(demo, serve(lambda _: (200, "base")), prompts)
    answers = [a for row in rows for a in row]
    assert any(a.base_share for a in answers) and any(a.switches for a in answers)
    for sample in answers:
        assert "".join(text for text, _ in sample.pieces) == sample.text
        for (before, _), (after, _) in zip(sample.pieces, sample.pieces[1:], strict=False):
            assert before[-1].isspace() or not (before[-1].isalnum() and after[0].isalnum())


def test_the_judge_gets_question_answer_and_both_words_once(
    demo: Baco, prompts: tuple[Prompt, ...], serve: Callable[..., Server], monkeypatch: Any
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = serve(lambda _: (200, "base"))
    judged(demo, server, prompts)
    questions = [body["messages"][1]["content"] for body in server.bodies]
    assert len(questions) == len(set(questions))
    assert server.keys == {"Bearer secret"}
    for body, question in zip(server.bodies, questions, strict=True):
        assert body["path"] == "/v1/chat/completions"
        assert body["model"] == "m" and body["temperature"] == 0
        assert any(prompt.text in question for prompt in prompts)
        base, aligned = (
            question.split(f"{name} would write: ")[1].split("\n")[0]
            for name in ("base", "aligned")
        )
        assert base != aligned


def test_the_judge_is_called_only_where_a_word_begins(
    demo: Baco, prompts: tuple[Prompt, ...], serve: Callable[..., Server]
) -> None:
    """The source is always aligned, so a word begins where its next token is a word start."""
    server = serve(lambda _: (200, "aligned"))
    hot = Draw(8, 3, {"max_tokens": 40, "temperature": 1.5, "min_p": 0.0})
    judged(demo, server, prompts, hot)
    questions = [body["messages"][1]["content"] for body in server.bodies]
    assert len(questions) > 50
    form = re.compile(
        r".*\nAnswer so far: (.*)\nbase would .*\naligned would write: (.*)\n", re.DOTALL
    )
    for question in questions:
        answer, token = form.match(question).groups()  # type: ignore[union-attr]
        goes_on = answer[-1:].isalnum() and ast.literal_eval(token)[0].isalnum()
        assert not goes_on, question


@pytest.mark.parametrize("url", ["http://me:secret@gpu1/v1", "http://gpu1/v1?key=secret"])
def test_an_address_with_secrets_is_refused_and_not_printed(url: str) -> None:
    with pytest.raises(BacoError, match="holds a password or a query") as refused:
        Judge(url, "m").settings(Grid("full", 1))
    assert "secret" not in str(refused.value)


def test_a_judge_that_fails_is_one_line(
    demo: Baco, prompts: tuple[Prompt, ...], serve: Callable[..., Server]
) -> None:
    server = serve(lambda _: (400, "no"))
    with pytest.raises(BacoError, match=r"the judge at http://127\.0\.0\.1.* failed") as refused:
        judged(demo, server, prompts)
    assert "\n" not in str(refused.value)


def test_a_call_to_a_busy_judge_is_retried(
    demo: Baco, prompts: tuple[Prompt, ...], serve: Callable[..., Server]
) -> None:
    turns = iter([503])
    server = serve(lambda _: (next(turns, 200), "aligned"))
    rows = judged(demo, server, prompts[:1])
    assert all(a.base_share == 0 for row in rows for a in row)


def test_the_key_is_not_part_of_a_setting(monkeypatch: Any) -> None:
    monkeypatch.setenv(module.KEY, "secret")
    (setting,) = Judge("http://localhost/v1", "m").settings(Grid("full", 3))
    assert "secret" not in json.dumps(dict(setting.options))
