"""A pair on two servers whose models have different tokenizers: the local engine's answers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import chi2_contingency

from baco import Baco, BacoError
from baco.cli import run
from baco.models.model import PairModel
from baco.models.pair import make_pair
from tests.remoting import calls, remote
from tests.serving import served
from tests.text_pairs import PROMPT, baco_of, tiny_model
from tests.tokenizer_kinds import tokenizer_of

KINDS = {"base": "gpt2", "aligned": "gemma"}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        source: tiny_model(tokenizer_of(kind), seed)
        for seed, (source, kind) in enumerate(KINDS.items())
    }


@pytest.fixture(scope="module")
def local(models: dict[str, Any]) -> Baco:
    return baco_of(*((tokenizer_of(KINDS[source]), models[source]) for source in KINDS))


@pytest.fixture(scope="module")
def folder(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pair")
    for source, kind in KINDS.items():
        models[source].save_pretrained(place / source)
        tokenizer_of(kind).save_pretrained(place / source)
    return place


@pytest.fixture(scope="module")
def urls(models: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Two servers, each of which runs one model and knows nothing of the other."""
    alone = []
    for source, kind in KINDS.items():
        model = PairModel(source, models[source], tokenizer_of(kind))
        alone.append(Baco(make_pair(source, model, model)))
    with served(alone[0], max_logprobs=2048) as base, served(alone[1], max_logprobs=2048) as other:
        yield {"base_url": base.url, "aligned_url": other.url}


@pytest.fixture(scope="module")
def on_servers(urls: dict[str, str], folder: Path) -> Iterator[Baco]:
    with remote(urls["base_url"], folder, aligned_url=urls["aligned_url"]) as loaded:
        yield loaded


def answers(baco: Baco, **options: Any) -> list[tuple[Any, ...]]:
    given: dict[str, Any] = {"seed": 3, "temperature": 0, "max_tokens": 24} | options
    return [
        (one.token_ids, one.sources, one.text, one.finish_reason, one.error)
        for one in baco.generate(PROMPT, **given)
    ]


@pytest.mark.parametrize(
    "router",
    ["P:0.5", "P-Punc:0.6", "H:1.5", "Punc:predict=aligned", "FC:predict=either", "Rand:0.5",
     "Nudging:0.5", "Base", "Aligned"],
)  # fmt: skip
def test_at_temperature_0_answers_are_those_of_this_process(
    on_servers: Baco, local: Baco, router: str
) -> None:
    before = calls(on_servers)
    expected = answers(local, router=router)
    assert answers(on_servers, router=router) == expected
    if router in ("Base", "Aligned"):
        assert calls(on_servers) - before < 0.2 * len(expected[0][0])


def test_log_probabilities_and_reasons_are_those_of_this_process(
    on_servers: Baco, local: Baco
) -> None:
    options: dict[str, Any] = {"router": "P-Punc:0.6", "temperature": 0, "logprobs": 2}
    (mine,), (expected,) = (
        baco.generate(PROMPT, max_tokens=24, **options) for baco in (on_servers, local)
    )
    assert {*mine.sources} == {"base", "aligned"}
    assert mine.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
    assert mine.top_logprobs is not None and expected.top_logprobs is not None
    for ours, theirs in zip(mine.top_logprobs, expected.top_logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


def test_above_temperature_0_first_tokens_have_the_distribution_of_this_process(
    on_servers: Baco, local: Baco
) -> None:
    options: dict[str, Any] = {"router": "Rand:0.5", "n": 150, "max_tokens": 2, "temperature": 0.7}
    counts = []
    for seed, baco in enumerate((on_servers, local), 1):
        answers = baco.generate(PROMPT, seed=seed, **options)
        firsts = [(one.sources[0], one.token_ids[0]) for one in answers]
        counts.append({key: firsts.count(key) for key in firsts})
    keys = [key for key in counts[0].keys() | counts[1].keys()
            if counts[0].get(key, 0) + counts[1].get(key, 0) >= 15]  # fmt: skip
    table = [[count.get(key, 0) for key in keys] for count in counts]
    assert len(keys) > 1
    assert chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "Gap:0.5"}, "compares the distributions of both models"),
        ({"router": "P:0.5", "logit_bias": {3: 1.0}}, "logit_bias names tokens"),
        ({"router": "P:0.5", "switch": "token"}, "between words only"),
        ({"router": "P:0.5", "top_p": 0.9}, "top_k and top_p truncate the row"),
        ({"router": "P:0.5", "presence_penalty": 1.0}, "penalties need the weights"),
    ],
)
def test_what_two_servers_cannot_do_is_refused_in_one_line(
    on_servers: Baco, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BacoError, match=message) as refused:
        on_servers.generate(PROMPT, max_tokens=3, **options)
    assert "\n" not in str(refused.value)


def test_the_command_line_answers_from_two_servers(
    urls: dict[str, str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ["--pair", str(folder), "--backend", "remote", "--base-url", urls["base_url"]]
    pair += ["--aligned-url", urls["aligned_url"], "--max-tokens", "8", "-s", "1", "-t", "0"]
    assert run(["generate", PROMPT, *pair, "-r", "P:0.5"]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip()
    assert "the models have different tokenizers" in shown.err


def test_the_server_of_a_pair_on_two_servers_answers_with_pieces_and_sources(
    on_servers: Baco, local: Baco
) -> None:
    body = {
        "model": "baco",
        "router": "P-Punc:0.6",
        "messages": [{"role": "user", "content": PROMPT}],
        "temperature": 0,
        "max_tokens": 24,
        "logprobs": True,
    }
    replies = []
    for baco in (on_servers, local):
        with served(baco) as server, server.client as client:
            reply = client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            choice = reply.json()["choices"][0]
            replies.append((choice["message"]["content"], choice["baco"]["sources"]))
    assert replies[0] == replies[1]
