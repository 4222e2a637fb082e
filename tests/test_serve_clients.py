"""Common clients (OpenAI's, LangChain, curl) work; the API agrees with its OpenAPI document."""

import asyncio
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from langchain_openai import ChatOpenAI
from pydantic import SecretStr
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from baco import Baco
from tests.fuzzing import budget
from tests.serving import PROMPT, ROUTER, WAIT, Served, events, served

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "serve.md"]
ADDRESS = "http://127.0.0.1:8000"
MESSAGES: Any = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def server(demo: Baco) -> Iterator[Served]:
    with served(demo, max_n=8, max_tokens=64) as running:
        yield running


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def expected(demo: Baco, n: int = 1) -> list[str]:
    answers = demo.generate(PROMPT, router=ROUTER, seed=2, n=n, max_tokens=64)
    return [answer.text for answer in answers]


def test_openais_client_gets_answers_with_their_provenance(
    client: openai.OpenAI, demo: Baco
) -> None:
    reply = client.chat.completions.create(
        model="baco",
        messages=MESSAGES,
        n=3,
        seed=2,
        extra_body={"router": ROUTER},
    )
    assert [choice.message.content for choice in reply.choices] == expected(demo, 3)
    assert reply.usage is not None
    for choice in reply.choices:
        assert choice.model_extra is not None
        provenance = choice.model_extra["baco"]
        assert "".join(text for text, _ in provenance["sources"]) == choice.message.content
        assert 0 <= provenance["base_share"] <= 1


def test_openais_client_reads_how_many_tokens_of_a_second_turn_were_kept(
    client: openai.OpenAI,
) -> None:
    history: list[Any] = [{"role": "user", "content": "Recommend a summer destination. " * 20}]
    first = client.chat.completions.create(model="baco", messages=history, seed=2)
    history += [first.choices[0].message, {"role": "user", "content": "And in winter?"}]
    for salt, kept in ((None, True), ("mine", False)):
        body = {"router": ROUTER, "cache_salt": salt}
        reply = client.chat.completions.create(model="baco", messages=history, extra_body=body)
        assert reply.usage is not None
        details = reply.usage.prompt_tokens_details
        assert details is not None
        assert details.cached_tokens is not None
        assert (details.cached_tokens >= 64) is kept
        assert details.cached_tokens < reply.usage.prompt_tokens


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "baco", "messages": MESSAGES}
    first = client.chat.completions.create(**body).choices[0].message
    body["messages"] = [*MESSAGES, first, {"role": "user", "content": "Why?"}]
    again = client.chat.completions.create(**body)
    assert again.choices[0].message.role == "assistant"


def test_openais_client_streams(client: openai.OpenAI, demo: Baco) -> None:
    parts = ["", "", ""]
    stream = client.chat.completions.create(
        model=f"baco/{ROUTER}",
        messages=MESSAGES,
        n=3,
        seed=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
    assert parts == expected(demo, 3)
    assert usage is not None


def test_openais_asynchronous_client_sends_many_requests_at_once(
    server: Served, demo: Baco
) -> None:
    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:

            async def ask() -> str | None:
                reply = await client.chat.completions.create(
                    model=f"baco/{ROUTER}",
                    messages=MESSAGES,
                    seed=2,
                )
                return reply.choices[0].message.content

            async def listen() -> str:
                stream = await client.chat.completions.create(
                    model=f"baco/{ROUTER}",
                    messages=MESSAGES,
                    seed=2,
                    stream=True,
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return list(await asyncio.gather(ask(), listen(), ask(), listen()))

    assert asyncio.run(ask_all()) == expected(demo) * 4


def test_openais_older_endpoint_answers_too(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "baco/aligned", "prompt": "I would go to", "seed": 1}
    whole = client.completions.create(**body).choices[0]
    parts = client.completions.create(**body, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.text != ""


def test_openais_client_raises_its_own_exception_for_each_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="unknown router"):
        client.chat.completions.create(
            model="baco",
            messages=MESSAGES,
            extra_body={"router": "Pun"},
        )
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="baco", prompt="a long story " * 2000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as ids:
        client.completions.create(model="baco", prompt=[5] * 600)
    assert ids.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("gpt-4")
    assert missing.value.code == "model_not_found"
    names = [model.id for model in client.models.list()]
    assert client.models.retrieve(names[-1]).id == names[-1]


def test_langchain_answers_and_streams(server: Served, demo: Baco) -> None:
    chat = ChatOpenAI(
        base_url=f"{server.url}/v1",
        api_key=SecretStr("any"),
        model=f"baco/{ROUTER}",
        seed=2,
        max_retries=0,
        timeout=240,
    )
    assert chat.invoke(PROMPT).content == expected(demo)[0]
    assert "".join(str(part.content) for part in chat.stream(PROMPT)) == expected(demo)[0]


def fences(language: str) -> list[tuple[str, str]]:
    pattern = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        (page.name, fence[1])
        for page in PAGES
        for fence in pattern.finditer(page.read_text(encoding="utf-8"))
    ]


def curls() -> list[tuple[str, str]]:
    """The curl commands of the documentation, each of one or more lines."""
    return [
        (page, command)
        for page, text in fences("sh")
        for command in re.split(r"^(?=curl )", text, flags=re.MULTILINE)
        if command.startswith("curl ")
    ]


@pytest.mark.parametrize(("page", "command"), curls())
def test_curl_examples_of_the_documentation_answer(server: Served, page: str, command: str) -> None:
    ours = command.replace(ADDRESS, server.url).replace("curl ", "curl -sS --fail-with-body ", 1)
    environment = os.environ | {"BACO_API_KEY": "any"}
    done = subprocess.run(
        ["bash", "-c", ours], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, (page, done.stdout, done.stderr)
    assert done.stdout


@pytest.mark.parametrize(
    ("page", "code"), [example for example in fences("python no-run") if ADDRESS in example[1]]
)
def test_client_examples_of_the_documentation_run(
    server: Served, page: str, code: str, capsys: pytest.CaptureFixture
) -> None:
    exec(compile(code.replace(ADDRESS, server.url), page, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


OPERATIONS = [
    "GET /v1/models",
    "GET /v1/models/{model}",
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "GET /baco/info",
    "GET /baco/routers",
    "POST /baco/diversity",
    "POST /baco/schema",
    "GET /health",
    "GET /metrics",
]


@pytest.fixture(scope="module")
def described(demo: Baco) -> Iterator[Any]:
    with served(demo, max_n=2, max_tokens=2) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("label", OPERATIONS)
def test_the_api_agrees_with_its_openapi_document(described: Any, label: str) -> None:
    """Replies to valid and invalid requests match the document, and invalid requests are refused.

    Valid ones may be refused too: no schema can list the routers and models there are.
    """
    operations = {result.ok().label: result.ok() for result in described.get_all_operations()}
    assert list(operations) == OPERATIONS
    modes = [GenerationMode.POSITIVE]
    if label.startswith("POST"):
        modes.append(GenerationMode.NEGATIVE)
    for mode in modes:

        @settings(max_examples=budget(60), suppress_health_check=list(HealthCheck))
        @given(operations[label].as_strategy(generation_mode=mode))
        def holds(case: schemathesis.Case) -> None:
            case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=WAIT)

        holds()


@pytest.mark.parametrize(
    ("label", "prompt"),
    [
        ("POST /v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}),
        ("POST /v1/completions", {"prompt": PROMPT}),
    ],
)
def test_streams_agree_with_the_openapi_document(
    described: Any, label: str, prompt: dict[str, Any]
) -> None:
    operations = {result.ok().label: result.ok() for result in described.get_all_operations()}
    case = operations[label].Case(body={"model": "baco", "stream": True, **prompt})
    reply = case.call_and_validate(timeout=WAIT)
    assert reply.headers["content-type"][0].startswith("text/event-stream")


def test_mikupads_request_with_no_model_chosen_is_answered_by_the_default_router(
    server: Served,
) -> None:
    """The request that mikupad sends with its own defaults."""
    sampling: dict[str, Any] = {
        "temperature": 0.7,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "top_p": 0.95,
        "top_k": 40,
        "min_p": 0,
        "repetition_penalty": 1.1,
        "seed": 3,
        "max_tokens": 16,
        "logprobs": 10,
    }
    own = {"penalize_nl": False, "repetition_penalty_range": 256, "ban_eos_token": False}
    body = {"model": "", "prompt": "My favourite place is", **sampling, **own}
    with server.client as client:
        reply = client.post("/v1/completions", json=body).json()
        body = {"prompt": "My favourite place is", **sampling, "repetition_window": 256}
        expected = client.post("/v1/completions", json=body).json()
    assert reply["model"] == "baco"
    ((mine,), (theirs,)) = reply["choices"], expected["choices"]
    # The last digits depend on how many tokens a forward reads.
    logprobs, values = mine.pop("logprobs"), theirs.pop("logprobs")
    assert mine == theirs
    assert logprobs["tokens"] == values["tokens"]
    assert logprobs["token_logprobs"] == pytest.approx(values["token_logprobs"], abs=1e-4)


def test_sillytaverns_chat_is_answered(server: Served, demo: Baco) -> None:
    """Its messages with a character's card, shortened, and its other fields."""
    messages = [
        {"role": "system", "content": "Write Seraphina's next reply."},
        {"role": "system", "content": "[Start a new Chat]"},
        {"role": "assistant", "content": "You wake with a start."},
        {"role": "user", "content": PROMPT},
        {"role": "user", "content": "For a week."},
    ]
    sampling = {"temperature": 1, "presence_penalty": 0, "frequency_penalty": 0, "top_p": 1}
    body = {
        "model": f"baco/{ROUTER}",
        "messages": messages,
        "max_tokens": 32,
        "stream": True,
        "logit_bias": {},
        "seed": 3,
        **sampling,
    }
    with server.client as client, client.stream("POST", "/v1/chat/completions", json=body) as got:
        choices = [choice for event in events(got) for choice in event["choices"]]
    [answer] = demo.generate(
        messages, router=ROUTER, seed=3, max_tokens=32, temperature=1.0, top_p=1.0
    )
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == answer.text


def test_tools_that_a_client_offers_change_no_answer(server: Served) -> None:
    """Open WebUI offers its own tools with every message."""
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 16, "seed": 3}
    tool = {"type": "function", "function": {"name": "get_current_timestamp", "parameters": {}}}
    with server.client as client:
        replies = [
            client.post("/v1/chat/completions", json={**body, **offered}).json()
            for offered in ({}, {"tools": [tool]}, {"tools": [tool], "tool_choice": "auto"})
        ]
    assert replies[0]["choices"] == replies[1]["choices"] == replies[2]["choices"]
