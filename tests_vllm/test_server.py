"""vLLM's own server, and BACo's server with its page, on a pair in vLLM."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field

from baco import Baco
from baco.backends.vllm.folder import export_pair
from baco.models.known_pairs import find_pair
from tests_vllm.serving import WAIT, baco, served, vllm_serve

PROMPT = "Recommend a summer destination"
ROUTERS = (
    "Base",
    "Aligned",
    "P:0.5",
    "H:1.0",
    "Punc",
    "FC",
    "P-Punc:0.4",
    "Nudging:0.5",
    "Ensemble:0.3",
)

pytestmark = pytest.mark.timeout(3600)  # a busy machine starts a server late


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``vllm serve`` of the demo pair."""
    room = tmp_path_factory.mktemp("served")
    folder, metadata = room / "pair", room / "metadata"
    export_pair(find_pair("demo"), folder)
    command = vllm_serve(folder, metadata)
    command += ["--served-model-name", "demo", "--dtype", "float32", "--max-num-seqs", "64"]
    command += ["--middleware", "baco.backends.vllm.middleware.TwoPrompts"]
    with served(command, metadata) as url:
        yield url


def chat(router: str = "P-Punc:0.4", **fields: Any) -> dict[str, Any]:
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": PROMPT}],
        "temperature": 0,
        "max_tokens": 40,
        "min_p": 0.0,
        "vllm_xargs": {"baco_router": router},
    } | fields


@pytest.mark.parametrize("router", ROUTERS)
def test_vllm_serve_gives_the_answers_of_this_process(router: str, vllm_server: str) -> None:
    here = Baco.load("demo").generate(
        PROMPT, router=router, temperature=0, max_tokens=40, min_p=0.0
    )[0]
    reply = httpx.post(f"{vllm_server}/v1/chat/completions", json=chat(router), timeout=WAIT).json()
    assert reply["choices"][0]["message"]["content"].strip() == here.text.strip()
    sources = reply["kv_transfer_params"]["baco_sources"]
    assert sources == "".join("m" if source is None else source[0] for source in here.sources)


def test_openais_client_works_with_vllm_serve(vllm_server: str) -> None:
    client = OpenAI(base_url=f"{vllm_server}/v1", api_key="none")
    body = chat("P-Punc:0.4")
    own = {name: body.pop(name) for name in ("vllm_xargs", "min_p")}
    whole = client.chat.completions.create(**body, extra_body=own)
    text = whole.choices[0].message.content
    parts = client.chat.completions.create(**body, extra_body=own, stream=True)
    assert text == "".join(part.choices[0].delta.content or "" for part in parts)
    assert set(whole.model_extra["kv_transfer_params"]["baco_sources"]) == {"a", "b"}
    with pytest.raises(BadRequestError, match="threshold 7"):
        client.chat.completions.create(
            **body, extra_body=own | {"vllm_xargs": {"baco_router": "P:7"}}
        )


def test_sixty_four_streams_with_different_routers_at_once(vllm_server: str) -> None:
    async def stream(client: httpx.AsyncClient, router: str) -> str:
        text, body = "", chat(router, stream=True)
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    choices = json.loads(line.removeprefix("data: "))["choices"]
                    text += (choices[0]["delta"].get("content") or "") if choices else ""
        return text

    async def all_at_once() -> list[str]:
        async with httpx.AsyncClient(base_url=vllm_server, timeout=WAIT) as client:
            return await asyncio.gather(*(stream(client, r) for r in ROUTERS * 8))

    texts = asyncio.run(all_at_once())
    here = Baco.load("demo")
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "min_p": 0.0}
    expected = {r: here.generate(PROMPT, router=r, **greedy)[0].text.strip() for r in ROUTERS}
    assert [text.strip() for text in texts] == [expected[router] for router in ROUTERS * 8]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vllm_xargs": {"baco_router": "P-Pnuc:0.4"}}, "unknown router"),
        ({"vllm_xargs": {"baco_router": "P:7"}}, "threshold 7"),
        ({"vllm_xargs": {"baco_router": 5}}, "baco_router is 5"),
        ({"vllm_xargs": {"baco_router": "P", "baco_threshold": "much"}}, "baco_threshold"),
        ({"vllm_xargs": {"baco_rooter": "P:0.4"}}, "unknown argument baco_rooter"),
        ({"vllm_xargs": {"baco_switch": "letter"}}, "baco_switch is 'letter'"),
        ({"vllm_xargs": {"baco_seed": -1}}, "baco_seed is -1"),
        ({"vllm_xargs": {"baco_base_prompt_ids": [1, 999_999]}}, "999999"),
        ({"vllm_xargs": {"baco_base_prompt_ids": "no ids"}}, "baco_base_prompt_ids"),
        ({"vllm_xargs": {"baco_base_prompt_ids": [1] * 600}}, "context window"),
        ({"messages": [{"role": "user", "content": "sea " * 600}]}, "context"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "nobody"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structural_tag"),
        ({"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
        (
            {"structured_outputs": {"json": {"type": "integer", "minimum": 3, "maximum": 2}}},
            "minimum",
        ),
    ],
)
def test_wrong_arguments_are_a_400_in_one_line(
    fields: dict[str, Any], message: str, vllm_server: str
) -> None:
    refused = httpx.post(f"{vllm_server}/v1/chat/completions", json=chat(**fields), timeout=WAIT)
    assert refused.status_code == 400, refused.text
    assert message in refused.json()["error"]["message"]
    assert httpx.get(f"{vllm_server}/health", timeout=WAIT).status_code == 200


def test_a_base_prompt_longer_than_the_prompt_ends_that_request_alone(vllm_server: str) -> None:
    body = {"model": "demo", "prompt": "Hello", "max_tokens": 4}
    bad = body | {"vllm_xargs": {"baco_base_prompt_ids": [5] * 60}}
    assert httpx.post(f"{vllm_server}/v1/completions", json=bad, timeout=WAIT).status_code >= 400
    assert httpx.post(f"{vllm_server}/v1/completions", json=body, timeout=WAIT).status_code == 200


def test_structured_outputs_are_followed_and_streamed(vllm_server: str) -> None:
    chosen = chat(structured_outputs={"choice": ["Lisbon", "Naxos"]})
    reply = httpx.post(f"{vllm_server}/v1/chat/completions", json=chosen, timeout=WAIT).json()
    assert reply["choices"][0]["message"]["content"] in ("Lisbon", "Naxos")

    class Trip(BaseModel):
        days: int = Field(ge=1, le=14)
        kind: Literal["beach", "city"]

    client = OpenAI(base_url=f"{vllm_server}/v1", api_key="none")
    body = chat("P:0.5")
    own = {name: body.pop(name) for name in ("vllm_xargs", "min_p")}
    parsed = client.chat.completions.parse(**body, extra_body=own, response_format=Trip)
    assert isinstance(parsed.choices[0].message.parsed, Trip)


def test_answers_of_one_request_and_their_logprobs(vllm_server: str) -> None:
    body = chat(n=3, temperature=1.0, logprobs=True, top_logprobs=2)
    reply = httpx.post(f"{vllm_server}/v1/chat/completions", json=body, timeout=WAIT).json()
    assert len(reply["choices"]) == 3
    for choice in reply["choices"]:
        assert all(len(each["top_logprobs"]) == 2 for each in choice["logprobs"]["content"])


def test_bacos_own_server_and_page_run_on_vllm() -> None:
    with served(baco("serve", "--backend", "vllm")) as url:
        assert "<html" in httpx.get(url).text
        here = Baco.load("demo").generate(
            PROMPT, router="P-Punc:0.4", temperature=0, max_tokens=40, n=2
        )
        body = {
            "messages": [{"role": "user", "content": PROMPT}],
            "router": "P-Punc:0.4",
            "temperature": 0,
            "max_tokens": 40,
            "n": 2,
        }
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=WAIT).json()
        assert [c["message"]["content"] for c in reply["choices"]] == [c.text for c in here]
        assert (
            httpx.post(
                f"{url}/v1/chat/completions", json=body | {"router": "P:7"}, timeout=WAIT
            ).status_code
            == 400
        )
