"""Fields of other servers that clients send: accepted only where they change nothing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baco import Baco
from baco.serve import fields
from baco.serve.fields import ForeignField, by_name
from baco.serve.parse_request import RequestParser
from baco.serve.request_models import ChatRequest, CompletionRequest, Message
from baco.serve.settings import Settings
from tests.serving import PROMPT, ROUTER, Served, chat, served

DOCS = Path(__file__).parents[1] / "docs" / "serve.md"
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
TEXT: dict[str, Any] = {"prompt": "For dinner, I", "router": ROUTER}
FIELDS = {CHAT: ChatRequest.foreign, COMPLETION: CompletionRequest.foreign}
SHAPED: list[Any] = [7, "x", True, [1], {"a": [None]}, None]


@pytest.fixture(scope="module")
def server(demo: Baco) -> Iterator[Served]:
    with served(demo, max_n=16, max_tokens=300) as running:
        yield running


def ask(server: Served, path: str, **more: Any) -> Any:
    body = (chat() if path == CHAT else dict(TEXT)) | {"seed": 3, "max_tokens": 12} | more
    with server.client as client:
        return client.post(path, json=body)


def texts(answer: Any) -> list[str]:
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    return [c["text"] if "text" in c else c["message"]["content"] for c in choices]


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_fields_without_effect_here_change_no_answer(server: Served, path: str) -> None:
    plain = texts(ask(server, path))
    most = max(len(entry.accepted) for entry in FIELDS[path].values() if entry.accepted is not None)
    for turn in range(max(most, len(SHAPED))):
        sent = {}
        for name, entry in FIELDS[path].items():
            values = SHAPED if entry.accepted is None else [*entry.accepted, None]
            sent[name] = values[turn % len(values)]
        assert texts(ask(server, path, **sent)) == plain


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_values_that_would_change_answers_are_refused_with_the_reason(
    server: Served, path: str
) -> None:
    with server.client as client:
        for name, entry in FIELDS[path].items():
            if entry.accepted is None:
                continue
            for value in (0.5, "something", [{"type": "function"}], not_this(entry)):
                body = (chat() if path == CHAT else TEXT) | {name: value}
                answer = client.post(path, json=body)
                assert answer.status_code == 400, (name, value)
                error = answer.json()["error"]
                assert error["param"] == name
                assert error["message"].startswith(f"{name} is ")
                assert error["message"].endswith(f"this is not supported; {entry.reason}")


def not_this(entry: ForeignField) -> Any:
    """Another value of a field: a switch turned, or a number near to an accepted one."""
    accepted = entry.accepted
    assert accepted is not None
    first = accepted[0] if accepted else 3
    return (not first) if isinstance(first, bool) else 3


@pytest.mark.parametrize(("given", "is_accepted"), [(1, True), (1.0, True), (True, False)])
def test_a_number_is_not_accepted_as_a_switch(
    server: Served, given: Any, is_accepted: bool
) -> None:
    assert (ask(server, CHAT, repeat_penalty=given).status_code == 200) == is_accepted


def test_null_means_not_given_in_every_field(server: Served) -> None:
    for path, model in ((CHAT, ChatRequest), (COMPLETION, CompletionRequest)):
        plain = texts(ask(server, path))
        optional = set(model.model_fields) - {"messages", "prompt", "router", "seed", "max_tokens"}
        nulls = dict.fromkeys([*optional, *model.foreign, *fields.ALIASES, "nobody_knows_it"])
        assert texts(ask(server, path, **nulls)) == plain
    more = dict.fromkeys([*Message.foreign, "prefix"])
    part = {"type": "text", "text": PROMPT, "cache_control": None}
    for content in (PROMPT, [part]):
        messages = [{"role": "user", "content": content} | more]
        options = {"include_usage": None, "continuous_usage_stats": None}
        answer = ask(server, CHAT, messages=messages, stream_options=None, stop=None)
        assert texts(answer) == texts(ask(server, CHAT))
        assert ask(server, CHAT, stream=True, stream_options=options).status_code == 200


def test_numbers_without_integers_empty_lists_and_minus_one_are_read(
    server: Served, demo: Baco
) -> None:
    plain = texts(ask(server, CHAT, n=2))
    assert texts(ask(server, CHAT, n=2.0, seed=3.0, max_tokens=12.0, top_k=-1)) == plain
    assert texts(ask(server, CHAT, n=2, top_k=-1.0)) == plain
    assert texts(ask(server, CHAT, n=2, logit_bias=[])) == plain
    refused = ask(server, CHAT, logit_bias=[[7, -100]]).json()["error"]
    assert refused["message"].startswith("logit_bias is [[7, -100]]: give an object")
    assert refused["param"] == "logit_bias"
    for wrong in ({"n": 1.5}, {"n": "1"}, {"n": True}, {"top_k": -2}, {"seed": -2}):
        assert ask(server, CHAT, **wrong).status_code == 400
    drawn = {ask(server, CHAT, seed=-1).json()["choices"][0]["baco"]["seed"] for _ in range(3)}
    assert len(drawn) == 3


def test_max_tokens_minus_one_uses_the_rest_of_the_context(server: Served, demo: Baco) -> None:
    asking = RequestParser(demo, Settings(max_tokens=4096))
    for spelled in ({"max_tokens": -1}, {"n_predict": -1.0}):
        assert asking.chat(ChatRequest(**chat(**spelled))).params.max_tokens == 4096
    question = asking.completion(CompletionRequest(**TEXT, max_tokens=-1))
    assert question.params.max_tokens == 4096
    # To the end of the context, where no token ends the answer before.
    with served(demo) as roomy:
        ends = dict.fromkeys(map(str, demo.pair.end_ids), -100)
        body = {"prompt": [5] * 500, "max_tokens": -1, "logit_bias": ends, "router": "Base"}
        with roomy.client as client:
            reply = client.post(COMPLETION, json=body).json()
    assert reply["usage"]["total_tokens"] == demo.pair.base.context
    assert reply["choices"][0]["finish_reason"] == "length"


def test_other_names_of_a_field_are_read_and_must_agree_with_it(server: Served) -> None:
    plain = texts(ask(server, COMPLETION, stop=["the"]))
    whole = dict.fromkeys(("max_new_tokens", "n_predict", "num_predict"), 12)
    more = {"sampler_seed": 3, "stopping_strings": ["the"]}
    assert texts(ask(server, COMPLETION, stop=["the"], **whole, **more)) == plain
    body = {"seed": None, "max_tokens": None, "n_predict": 12}
    assert texts(ask(server, COMPLETION, **body, **more)) == plain
    refused = ask(server, COMPLETION, n_predict=13)
    assert refused.status_code == 400
    message = refused.json()["error"]["message"]
    assert message == "n_predict is 13 and max_tokens is 12: give one of them"


def test_best_of_n_is_n(server: Served) -> None:
    assert texts(ask(server, COMPLETION, n=2, best_of=2)) == texts(ask(server, COMPLETION, n=2))
    refused = ask(server, COMPLETION, n=2, best_of=3)
    assert "best_of is 3: no answer is chosen here" in refused.json()["error"]["message"]


def test_content_may_be_a_list_of_texts(server: Served) -> None:
    first, rest = PROMPT[:10], PROMPT[10:]
    content = [
        {"type": "text", "text": first, "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": rest},
    ]
    message = {"role": "user", "content": content, "id": "m1", "cache_control": {}, "name": "me"}
    assert texts(ask(server, CHAT, messages=[message])) == texts(ask(server, CHAT))


@pytest.mark.parametrize(
    ("message", "param", "fault"),
    [
        (
            {"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]},
            "messages.0.content.0.type",
            "is 'image_url': the models read parts of type 'text' alone",
        ),
        ({"content": None}, "messages.0.content", "is missing"),
        ({"content": 5}, "messages.0.content", "is 5: input should be a valid string"),
        ({"role": "tool", "content": "4"}, "messages.0.role", "is 'tool'"),
        ({"tool_calls": [{"id": "1"}]}, "messages.0.tool_calls", "this is not supported; no tools"),
        ({"colour": "red"}, "messages.0.colour", "is not a parameter"),
    ],
    ids=str,
)
def test_a_message_that_cannot_be_read_is_refused(
    server: Served, message: dict[str, Any], param: str, fault: str
) -> None:
    refused = ask(server, CHAT, messages=[{"role": "user", "content": PROMPT} | message])
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(param)
    assert fault in error["message"]


def test_a_last_message_of_the_assistant_is_continued(server: Served, demo: Baco) -> None:
    begun = [*chat()["messages"], {"role": "assistant", "content": "I would go to"}]
    expected = [demo.generate(begun, router=ROUTER, seed=3, max_tokens=12)[0].text]
    consistent: list[dict[str, Any]] = [
        {},
        {"continue_final_message": True},
        {"add_generation_prompt": False},
        {"continue_final_message": True, "add_generation_prompt": False},
    ]
    for switches in consistent:
        assert texts(ask(server, CHAT, messages=begun, **switches)) == expected
    marked = [begun[0], begun[1] | {"prefix": True}]
    assert texts(ask(server, CHAT, messages=marked)) == expected
    empty = [begun[0], {"role": "assistant", "content": None}]
    assert texts(ask(server, CHAT, messages=empty)) == texts(ask(server, CHAT))
    answered = ask(server, CHAT, continue_final_message=False, add_generation_prompt=True)
    assert texts(answered) == texts(ask(server, CHAT))


@pytest.mark.parametrize(
    ("begun", "switches", "fault"),
    [
        (True, {"continue_final_message": False}, "continue_final_message is false, but"),
        (True, {"add_generation_prompt": True}, "add_generation_prompt is true, but"),
        (
            True,
            {"add_generation_prompt": True, "continue_final_message": True},
            "are both true: give one of them",
        ),
        (False, {"continue_final_message": True}, "end the conversation with a message of role"),
        (False, {"add_generation_prompt": False}, "add_generation_prompt is false: end the"),
    ],
)
def test_switches_that_contradict_the_last_message_are_refused(
    server: Served, begun: bool, switches: dict[str, Any], fault: str
) -> None:
    messages = chat()["messages"]
    if begun:
        messages = [*messages, {"role": "assistant", "content": "I would go to"}]
    server.settles()  # after other tests
    refused = ask(server, CHAT, messages=messages, **switches)
    assert refused.status_code == 400
    assert fault in refused.json()["error"]["message"]
    assert not server.engine_thread.open


def test_arguments_of_the_chat_template_reach_it(server: Served) -> None:
    assert texts(ask(server, CHAT, chat_template_kwargs={"enable_thinking": False}))
    for name in ("messages", "add_generation_prompt", "not a name"):
        refused = ask(server, CHAT, chat_template_kwargs={name: 1})
        assert refused.status_code == 400
        assert name in refused.json()["error"]["message"]


def row(entry: ForeignField) -> str:
    """An entry's line in the documentation's tables."""
    names = ", ".join(f"`{name}`" for name in entry.names.split())
    accepted = "any"
    if entry.accepted is not None:
        accepted = ", ".join(f"`{json.dumps(value)}`" for value in entry.accepted) or "–"
    return f"| {names} | {accepted} | {entry.reason} |"


@pytest.mark.parametrize("table", ["COMMON", "CHAT", "COMPLETION", "MESSAGE", "PART", "STREAM"])
def test_the_documentation_lists_them_all(table: str) -> None:
    entries: tuple[ForeignField, ...] = getattr(fields, table)
    assert "\n".join(map(row, entries)) in DOCS.read_text(encoding="utf-8")


def test_a_field_is_listed_once() -> None:
    own = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    for tables in ((fields.COMMON, fields.CHAT), (fields.COMMON, fields.COMPLETION)):
        named = [name for table in tables for entry in table for name in entry.names.split()]
        assert len(named) == len(set(named))
    assert not own & {*by_name(fields.COMMON), *fields.ALIASES}
