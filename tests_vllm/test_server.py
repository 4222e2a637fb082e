"""vLLM's own server, and BACo's with its page, over a pair in vLLM."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from baco import Baco
from baco.backends.vllm.folder import export_pair
from baco.models.known_pairs import find_pair
from tests_vllm.serving import WAIT, baco, served, vllm_serve

PROMPT = "Recommend a summer destination"
ROUTERS = ("Base", "Aligned", "P:0.5", "H:1.0", "Punc", "FC", "P-Punc:0.4", "Nudging:0.5")

pytestmark = pytest.mark.timeout(600)  # a server may take its time to start


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
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
def test_their_server_says_what_is_said_here(router: str, theirs: str) -> None:
    here = Baco.load("demo").generate(
        PROMPT, router=router, temperature=0, max_tokens=40, min_p=0.0
    )[0]
    told = httpx.post(f"{theirs}/v1/chat/completions", json=chat(router), timeout=WAIT).json()
    assert told["choices"][0]["message"]["content"].strip() == here.text.strip()
    sources = told["kv_transfer_params"]["baco_sources"]
    assert sources == "".join(source[0] for source in here.sources)


def test_the_client_of_openai_reads_their_server(theirs: str) -> None:
    client = OpenAI(base_url=f"{theirs}/v1", api_key="none")
    asked = chat("P-Punc:0.4")
    own = {name: asked.pop(name) for name in ("vllm_xargs", "min_p")}
    whole = client.chat.completions.create(**asked, extra_body=own)
    text = whole.choices[0].message.content
    parts = client.chat.completions.create(**asked, extra_body=own, stream=True)
    assert text == "".join(part.choices[0].delta.content or "" for part in parts)
    assert set(whole.model_extra["kv_transfer_params"]["baco_sources"]) == {"a", "b"}
    with pytest.raises(BadRequestError, match="threshold 7"):
        client.chat.completions.create(
            **asked, extra_body=own | {"vllm_xargs": {"baco_router": "P:7"}}
        )


def test_sixty_four_streams_with_different_routers_at_once(theirs: str) -> None:
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
        async with httpx.AsyncClient(base_url=theirs, timeout=WAIT) as client:
            return await asyncio.gather(*(stream(client, r) for r in ROUTERS * 8))

    told = asyncio.run(all_at_once())
    here = Baco.load("demo")
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "min_p": 0.0}
    expected = {r: here.generate(PROMPT, router=r, **greedy)[0].text.strip() for r in ROUTERS}
    assert [text.strip() for text in told] == [expected[router] for router in ROUTERS * 8]


@pytest.mark.parametrize(
    ("fields", "says"),
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
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "baco_switch=token"),
    ],
)
def test_what_cannot_be_is_a_400_in_one_line(
    fields: dict[str, Any], says: str, theirs: str
) -> None:
    refused = httpx.post(f"{theirs}/v1/chat/completions", json=chat(**fields), timeout=WAIT)
    assert refused.status_code == 400, refused.text
    assert says in refused.json()["error"]["message"]
    assert httpx.get(f"{theirs}/health", timeout=WAIT).status_code == 200


def test_a_base_prompt_longer_than_the_prompt_ends_that_request_alone(theirs: str) -> None:
    body = {"model": "demo", "prompt": "Hello", "max_tokens": 4}
    bad = body | {"vllm_xargs": {"baco_base_prompt_ids": [5] * 60}}
    assert httpx.post(f"{theirs}/v1/completions", json=bad, timeout=WAIT).status_code >= 400
    assert httpx.post(f"{theirs}/v1/completions", json=body, timeout=WAIT).status_code == 200


def test_structured_output_is_what_was_asked_for(theirs: str) -> None:
    xargs = {"baco_router": "P:0.5", "baco_switch": "token"}
    body = chat(vllm_xargs=xargs, structured_outputs={"choice": ["Lisbon", "Naxos"]})
    told = httpx.post(f"{theirs}/v1/chat/completions", json=body, timeout=WAIT).json()
    assert told["choices"][0]["message"]["content"] in ("Lisbon", "Naxos")


def test_answers_of_one_request_and_their_logprobs(theirs: str) -> None:
    body = chat(n=3, temperature=1.0, logprobs=True, top_logprobs=2)
    told = httpx.post(f"{theirs}/v1/chat/completions", json=body, timeout=WAIT).json()
    assert len(told["choices"]) == 3
    for choice in told["choices"]:
        assert all(len(each["top_logprobs"]) == 2 for each in choice["logprobs"]["content"])


def test_the_page_of_the_local_server_stands_on_vllm() -> None:
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
        told = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=WAIT).json()
        assert [c["message"]["content"] for c in told["choices"]] == [c.text for c in here]
        assert (
            httpx.post(
                f"{url}/v1/chat/completions", json=body | {"router": "P:7"}, timeout=WAIT
            ).status_code
            == 400
        )
