"""A stream and a whole reply agree in every field, however the answers end."""

import random
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from baco import Baco
from tests.fuzzing import budget
from tests.pairs import save_byte_fallback_pair
from tests.serving import PROMPT, Served, served, wait_for

BODY: dict[str, Any] = {"n": 3, "max_tokens": 16, "temperature": 1.2}
ROUTERS = ("P-Punc:0.6", "Punc", "Rand:0.5", "Base", "Aligned")


@pytest.fixture(scope="module", params=["demo", "byte fallback"])
def server(
    request: pytest.FixtureRequest, demo: Baco, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    baco = demo
    if request.param != "demo":
        folder = save_byte_fallback_pair(tmp_path_factory.mktemp("bytes"))
        baco = Baco.load(base=str(folder.base), aligned=str(folder.aligned), dtype="float32")
    with served(baco) as running:
        yield running


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def stop_strings(draw: random.Random, texts: list[str]) -> list[str]:
    """Up to four stretches of the answers: inside words and tokens, across them, at their ends."""
    stops = []
    for _ in range(draw.randrange(5)):
        text = draw.choice([text for text in texts if text] or ["x"])
        at = draw.randrange(len(text))
        stops.append(text[at : at + draw.choice((1, 2, 3, 5, 9))])
    return stops


def counted(server: Served) -> dict[str, float]:
    names = [f'baco_tokens_total{{source="{source}"}}' for source in ("base", "aligned")]
    return {name: server.metric(name) for name in names}


def merged(stretches: list[Any]) -> list[tuple[str, str]]:
    """Stretches of text with their sources, neighbours of one source as one."""
    joined: list[tuple[str, str]] = []
    for text, source in stretches:
        if joined and joined[-1][1] == source:
            joined[-1] = (joined[-1][0] + text, source)
        else:
            joined.append((text, source))
    return joined


def provenance(choices: list[Any]) -> dict[str, Any]:
    """BACo's own fields of a choice, of all its chunks together."""
    fields = [choice.model_extra["baco"] for choice in choices if "baco" in choice.model_extra]
    joined: dict[str, Any] = {
        name: fields[-1][name] for name in ("base_share", "switches", "router", "seed")
    }
    joined["sources"] = merged([stretch for part in fields for stretch in part["sources"]])
    joined["why"] = [why for part in fields for why in part.get("why", [])]
    return joined


def chat_choice(choices: list[Any]) -> dict[str, Any]:
    """A chat choice's fields, from one whole choice or from its chunks."""
    parts = [getattr(choice, "message", None) or choice.delta for choice in choices]
    logprobs = [choice.logprobs for choice in choices if choice.logprobs is not None]
    return {
        "text": "".join(part.content or "" for part in parts),
        "logprobs": [token.model_dump() for one in logprobs for token in one.content],
        "finish_reason": choices[-1].finish_reason,
        **provenance(choices),
    }


def text_choice(choices: list[Any]) -> dict[str, Any]:
    """A text choice's fields, from one whole choice or from its chunks."""
    extra = [choice.model_extra for choice in choices]
    columns = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {
        "text": "".join(choice.text for choice in choices),
        **{
            name: [value for choice in choices for value in getattr(choice.logprobs, name)]
            for name in columns
        },
        "finish_reason": choices[-1].finish_reason,
        "token_ids": [token for one in extra for token in one["token_ids"]],
        "prompt_token_ids": [one["prompt_token_ids"] for one in extra if "prompt_token_ids" in one],
        **provenance(choices),
    }


def logged(server: Served, count: int) -> list[dict[str, Any]]:
    """The access log's entries of answers, once there are ``count`` of them."""
    wait_for(lambda: sum("tokens" in entry for entry in server.log()) >= count)
    return [entry for entry in server.log() if "tokens" in entry]


def agree(streamed: Any, whole: Any) -> None:
    """Assert equality, up to the last digits of sums, which depend on the batch."""
    assert type(streamed) is type(whole)
    if isinstance(whole, dict):
        assert streamed.keys() == whole.keys()
        for name in whole:
            agree(streamed[name], whole[name])
    elif isinstance(whole, list | tuple):
        assert len(streamed) == len(whole)
        for one, other in zip(streamed, whole, strict=True):
            agree(one, other)
    elif isinstance(whole, float):
        assert streamed == pytest.approx(whole, abs=1e-3)
    else:
        assert streamed == whole


def check(server: Served, create: Any, read: Any, body: dict[str, Any]) -> list[str]:
    """Request the same answers whole and as a stream, compare every field, and return the texts."""
    earlier, before = len(logged(server, 0)), counted(server)
    whole = create(**body)
    between = counted(server)
    chunks = list(create(**body, stream=True, stream_options={"include_usage": True}))
    after = counted(server)
    once, streamed = logged(server, earlier + 2)[-2:]
    assert chunks[-1].usage == whole.usage
    counts = {name: between[name] - before[name] for name in before}
    assert {name: after[name] - between[name] for name in before} == counts
    assert sum(counts.values()) == whole.usage.completion_tokens == once["tokens"]
    for name in ("tokens", "base_share", "prompt_tokens"):
        assert streamed[name] == once[name]
    for index, choice in enumerate(whole.choices):
        own = [c for chunk in chunks for c in chunk.choices if c.index == index]
        agree(read(own), read([choice]))
        whole_choice = read([choice])
        if whole_choice["why"]:  # a stop string may have cut off the end of the last token
            assert "".join(token["text"] for token in whole_choice["why"]).startswith(
                whole_choice["text"]
            )
    return [read([choice])["text"] for choice in whole.choices]


def test_a_chat_stream_equals_the_whole_reply(server: Served, client: openai.OpenAI) -> None:
    create, body = client.chat.completions.create, {**BODY, "logprobs": True, "top_logprobs": 2}
    body |= {"model": "baco", "messages": [{"role": "user", "content": PROMPT}]}
    extra = {"router": "P-Punc:0.6", "explain": True}
    texts = check(server, create, chat_choice, body | {"seed": 1, "extra_body": extra})
    for seed in range(budget(6)):
        draw = random.Random(seed)
        extra = {"router": draw.choice(ROUTERS), "explain": draw.random() < 0.5}
        stop = stop_strings(draw, texts)
        check(server, create, chat_choice, body | {"seed": 1, "stop": stop, "extra_body": extra})


def test_a_text_stream_equals_the_whole_reply(server: Served, client: openai.OpenAI) -> None:
    create, body = client.completions.create, {**BODY, "model": "baco", "logprobs": 2}
    body |= {"prompt": ["For dinner, I", "Question: "]}
    extra: dict[str, Any] = {"router": "P-Punc:0.6", "return_token_ids": True}
    texts = check(server, create, text_choice, body | {"seed": 1, "extra_body": extra})
    for seed in range(budget(6)):
        draw = random.Random(seed)
        extra |= {"router": draw.choice(ROUTERS), "return_tokens_as_token_ids": seed % 2 == 0}
        stop = stop_strings(draw, texts)
        check(server, create, text_choice, body | {"seed": 1, "stop": stop, "extra_body": extra})


def test_a_tokens_text_begins_at_its_offset(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        **BODY, model="baco", prompt="For dinner, I", seed=1, logprobs=0, stop=["e", ". "]
    )
    for choice in reply.choices:
        assert choice.logprobs is not None
        offsets, names = choice.logprobs.text_offset, choice.logprobs.tokens
        assert offsets is not None
        assert names is not None
        assert len(offsets) == len(names)
        for at, name in zip(offsets, names, strict=True):
            assert at < len(choice.text)
            if not name.startswith(("bytes:", "<0x")) and "\ufffd" not in choice.text:
                assert choice.text[at:].startswith(name) or name.startswith(choice.text[at:])
