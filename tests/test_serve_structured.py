"""Structured answers over HTTP, with OpenAI's own client and vLLM's names."""

import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pydantic
import pytest

from baco import Baco
from baco.sampling import constraint
from tests.serving import PROMPT, ROUTER, WAIT, Served, served, wait_for


class Trip(pydantic.BaseModel):
    place: str = pydantic.Field(max_length=12)
    days: int = pydantic.Field(ge=1, le=14)


@pytest.fixture(scope="module")
def server(demo: Baco) -> Iterator[Served]:
    with served(demo) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def messages() -> Any:
    return [{"role": "user", "content": PROMPT}]


def test_openais_client_parses_answers_into_pydantic_models(
    client: openai.OpenAI, demo: Baco
) -> None:
    answer = client.chat.completions.parse(
        model="baco",
        messages=messages(),
        response_format=Trip,
        n=3,
        seed=1,
        max_tokens=80,
        extra_body={"router": ROUTER},
    )
    here = demo.generate(PROMPT, router=ROUTER, schema=Trip, n=3, seed=1, max_tokens=80)
    assert [choice.message.parsed for choice in answer.choices] == [one.parsed for one in here]
    assert all(isinstance(one.parsed, Trip) for one in here)


def test_an_answer_that_reaches_its_limit_is_reported_to_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="baco", messages=messages(), response_format=Trip, seed=1, max_tokens=5
        )


def test_a_json_object_is_one_and_streams_too(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="baco",
        messages=messages(),
        response_format={"type": "json_object"},
        seed=2,
        max_tokens=120,
        stream=True,
        temperature=0.7,
    )
    text, reason = "", None
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason or reason
    assert text.startswith("{")
    if reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"json": {"type": "integer", "minimum": 1, "maximum": 9}}, r"[1-9]"),
        ({"json": '{"type": "boolean"}'}, r"true|false"),
        ({"regex": "[a-c]{2}!"}, r"[a-c]{2}!"),
        ({"choice": ["north", "south"], "disable_fallback": True}, r"north|south"),
        ({"grammar": 'root ::= "go " ("on" | "home")'}, r"go (on|home)"),
    ],
)
def test_vllms_names_are_taken_on_both_endpoints(
    client: openai.OpenAI, outputs: dict[str, Any], pattern: str
) -> None:
    extra: dict[str, Any] = {"structured_outputs": outputs}
    chat = client.chat.completions.create(
        model="baco", messages=messages(), n=2, seed=1, max_tokens=20, extra_body=extra
    )
    plain = client.completions.create(
        model="baco", prompt="The way is", n=2, seed=1, max_tokens=20, extra_body=extra
    )
    texts = [choice.message.content or "" for choice in chat.choices]
    for text in [*texts, *(choice.text for choice in plain.choices)]:
        assert re.fullmatch(pattern, text)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"structured_outputs": {"regex": "(a"}}, "unclosed group"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "more than one structure"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
        (
            {
                "response_format": {"type": "json_object"},
                "structured_outputs": {"regex": "a"},
            },
            "more than one structure",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"uniqueItems": True}},
                }
            },
            "'uniqueItems'",
        ),
    ],
)
def test_structures_that_cannot_be_used_are_refused(
    server: Served, body: dict[str, Any], message: str
) -> None:
    answer = server.ask(messages=messages(), **body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_a_schema_that_compiles_for_hours_delays_no_other_request(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraint, "SECONDS", WAIT)
    patterns = [{"type": "string", "pattern": f"[a-z]{{0,{n}}}x"} for n in range(1, 40)]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"allOf": patterns}}}
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(server.ask, messages=messages(), response_format=form)
        wait_for(lambda: endless.done() or constraint._process._lock.locked())
        assert server.ask(messages=messages(), max_tokens=2).status_code == 200
        assert not endless.done()
        wait_for(lambda: constraint._process._process)
        process = constraint._process._process
        assert process is not None
        os.kill(process.pid, signal.SIGPROF)  # as at the end of its time
        refusal = endless.result()
    assert refusal.status_code == 400
    assert "the schema is too complex" in refusal.json()["error"]["message"]


def test_a_structure_that_turns_out_too_complex_is_the_clients_fault(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraint, "_REHEARSED", 0)
    rules = "".join(f"a{n}: a{n + 1} a{n + 1}\n" for n in range(30))
    grammar = f'start: /[a-z][a-z][a-z]/ a0\n{rules}a30: "x"'
    answer = server.ask(messages=messages(), structured_outputs={"grammar": grammar})
    assert answer.status_code == 400
    assert "the answer's grammar cannot be followed" in answer.json()["error"]["message"]


def test_a_text_format_changes_nothing(server: Served) -> None:
    plain = server.ask(messages=messages(), seed=1).json()["choices"][0]["message"]
    same = server.ask(messages=messages(), seed=1, response_format={"type": "text"})
    assert same.json()["choices"][0]["message"] == plain


def test_a_schema_can_be_checked_without_decoding(server: Served) -> None:
    good: list[Any] = [{"type": "object"}, '{"type": "integer"}']
    bad: list[tuple[Any, str]] = [
        ("{", "not JSON"),
        ({"uniqueItems": True}, "'uniqueItems'"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "no answer can satisfy"),
    ]
    with server.client as client:
        for schema in good:
            assert client.post("/baco/schema", json={"json": schema}).status_code == 204
        for schema, message in bad:
            refused = client.post("/baco/schema", json={"json": schema})
            assert refused.status_code == 400
            assert message in refused.json()["error"]["message"]
