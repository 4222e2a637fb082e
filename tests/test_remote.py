"""A pair on two servers over HTTP gives the answers of this process, in fewer calls than tokens."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from scipy.stats import chi2_contingency

from baco import Baco, BacoError
from benchmarks.model_server import ServedModel, application
from tests.pairs import PairFolder
from tests.remoting import calls, listening, remote
from tests.serving import PROMPT, Served, served

STORY = "Give me a four-sentence story about a dragon."
ROUTERS = [
    "P:0.3",
    "P-Punc:0.4",
    "P-Punc-FC:0.4",
    "H:1.5",
    "H-Punc:1.2",
    "Gap:0.3",
    "Punc",
    "Punc:predict=aligned",
    "FC:predict=either",
    "Role:number=aligned,name=aligned,opinion=base",
    "Rand:0.5",
    "Nudging:0.3",
    "Base",
    "Aligned",
]


@pytest.fixture(scope="module")
def server(demo: Baco) -> Iterator[Served]:
    with served(demo, max_logprobs=2048) as running:
        yield running


@pytest.fixture(scope="module")
def remote_pair(server: Served) -> Iterator[Baco]:
    with remote(server.url) as loaded:
        yield loaded


def generated(baco: Baco, prompt: str, router: str, **sampling: Any) -> list[tuple[Any, ...]]:
    answers = baco.generate(prompt, router=router, seed=3, **sampling)
    return [(a.token_ids, a.sources, a.text, a.finish_reason, a.error) for a in answers]


@pytest.mark.parametrize("router", ROUTERS)
def test_at_temperature_0_answers_are_those_of_this_process(
    remote_pair: Baco, demo: Baco, router: str
) -> None:
    for prompt in (PROMPT, STORY):
        before = calls(remote_pair)
        answers = generated(remote_pair, prompt, router, temperature=0)
        assert answers == generated(demo, prompt, router, temperature=0)
        assert calls(remote_pair) - before < 0.7 * len(answers[0][0])


@pytest.mark.parametrize(
    "sampling",
    [
        {"switch": "token"},
        {"max_tokens": 7},
        {"stop": [" is", "."]},
        {"logit_bias": {16: -100.0, 1341: 5.0, 654: 2.5}},
    ],
    ids=str,
)
def test_at_temperature_0_answers_agree_under_other_sampling_options(
    remote_pair: Baco, demo: Baco, sampling: dict[str, Any]
) -> None:
    for router in ("P-Punc:0.4", "FC"):
        expected = generated(demo, STORY, router, temperature=0, **sampling)
        assert generated(remote_pair, STORY, router, temperature=0, **sampling) == expected


def test_a_prefilled_answer_continues_as_in_this_process(remote_pair: Baco, demo: Baco) -> None:
    begun: Any = [
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": "You could go"},
    ]
    for router in ("P-Punc:0.4", "Base"):
        expected = generated(demo, begun, router, temperature=0, continue_final=True)
        assert generated(remote_pair, begun, router, temperature=0) == expected


def test_log_probabilities_are_the_sources_own(remote_pair: Baco, demo: Baco) -> None:
    sampling: dict[str, Any] = {"router": "P-Punc:0.4", "temperature": 0, "logprobs": 3}
    (mine,), (expected,) = (
        remote_pair.generate(PROMPT, **sampling),
        demo.generate(PROMPT, **sampling),
    )
    assert mine.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert mine.top_logprobs is not None and expected.top_logprobs is not None
    for ours, local in zip(mine.top_logprobs, expected.top_logprobs, strict=True):
        assert ours == pytest.approx(local, abs=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo2"])
def test_answers_agree_for_other_architectures_and_vocabularies(
    loaded_pair: Callable[[str, float], Baco],
    random_pair: Callable[..., PairFolder],
    architecture: str,
) -> None:
    local = loaded_pair(architecture, 0.3)
    folder = random_pair(architecture, noise=0.3).base.parent
    with served(local) as running, remote(running.url, folder) as remote_pair:
        for router in ("P-Punc:0.4", "Rand:0.5", "FC"):
            sampling: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
            assert generated(remote_pair, STORY, router, **sampling) == generated(
                local, STORY, router, **sampling
            )


def test_a_server_without_echo_is_asked_for_next_tokens(demo: Baco, server: Served) -> None:
    with (
        listening(application(ServedModel(demo.pair.aligned.model))) as plain,
        remote(server.url, aligned_url=plain, aligned_model="half") as remote_pair,
    ):
        backend: Any = remote_pair.backend
        ability = backend.models["aligned"].ability
        assert (ability.echo, ability.batches, ability.top) == (None, False, 20)
        for router in ("P-Punc:0.4", "Role:name=base,content=aligned"):
            expected = generated(demo, PROMPT, router, temperature=0)
            assert generated(remote_pair, PROMPT, router, temperature=0) == expected


def test_a_custom_rule_reads_whole_rows_from_a_server_that_returns_them(
    remote_pair: Baco, demo: Baco
) -> None:
    from baco.routing.parser import register_router
    from baco.routing.rules import RULES

    register_router("Flat", lambda signals, gamma: signals.base.softmax(-1).std(-1) < gamma)
    try:
        expected = generated(demo, PROMPT, "Flat:0.012", temperature=0)
        assert generated(remote_pair, PROMPT, "Flat:0.012", temperature=0) == expected
        assert {"base", "aligned"} == set(expected[0][1])
    finally:
        del RULES["Flat"]


def alike(mine: Counter[str], expected: Counter[str]) -> float:
    """p-value of a chi-square test that two counts have one distribution; rare cases are pooled."""
    rare = [key for key in mine | expected if mine[key] + expected[key] < 10]
    keys = [key for key in mine | expected if key not in rare]
    table = [
        [*(count[key] for key in keys), sum(count[key] for key in rare) + 1]
        for count in (mine, expected)
    ]
    return float(chi2_contingency(table).pvalue)


@pytest.mark.parametrize(
    ("router", "sampling"),
    [("P-Punc:0.4", {}), ("Rand:0.5", {"min_p": 0.0}), ("FC", {"min_p": 0.0, "temperature": 1.3})],
    ids=str,
)
def test_draws_follow_the_distribution_of_this_process(
    remote_pair: Baco, demo: Baco, router: str, sampling: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"router": router, "max_tokens": 3} | sampling
    mine = remote_pair.generate(PROMPT, n=200, seed=1, **settings)
    expected = demo.generate(PROMPT, n=1500, seed=2, **settings)
    assert {answer.error for answer in mine} == {None}
    for tokens in (1, 2, 3):
        counts = [Counter(str(a.token_ids[:tokens]) for a in each) for each in (mine, expected)]
        assert alike(*counts) > 0.001


@pytest.mark.parametrize("min_p", [0.0, 0.3])
def test_masked_tokens_do_not_change_the_distribution_of_the_others(
    loaded_pair: Callable[[str, float], Baco],
    random_pair: Callable[..., PairFolder],
    min_p: float,
) -> None:
    """Where models disagree the source often changes inside text, where most tokens are masked."""
    local, folder = loaded_pair("llama", 0.8), random_pair("llama", noise=0.8).base.parent
    settings: dict[str, Any] = {"router": "Rand:0.5", "max_tokens": 4, "min_p": min_p}
    with served(local) as running, remote(running.url, folder) as remote_pair:
        mine = remote_pair.generate(PROMPT, n=200, seed=1, **settings)
    expected = local.generate(PROMPT, n=1500, seed=2, **settings)
    words, switches = local.pair.vocabulary, 0
    for answer in mine:
        assert answer.error is None
        for before, after in pairwise(zip(answer.token_ids, answer.sources, strict=True)):
            if before[1] != after[1] and not words.ends_word[before[0]]:
                switches += 1
                assert words.word_start[after[0]]
    assert switches > 50
    for at in (1, 2, 3):
        # Tokens of a new source and of the old one: what is masked changes the former.
        counts = [
            Counter(
                f"{a.sources[at - 1 : at + 1]} {a.token_ids[at]}"
                for a in each
                if len(a.token_ids) > at
            )
            for each in (mine, expected)
        ]
        assert alike(*counts) > 0.001


def test_samples_differ_and_the_pair_is_not_replayable(remote_pair: Baco) -> None:
    first = generated(remote_pair, STORY, "P-Punc:0.4", n=4)
    assert len({tokens for tokens, *_ in first}) > 1
    assert not remote_pair.capabilities.replayable
    for tokens, sources, *_ in first:
        assert len(tokens) == len(sources)


def test_calls_are_far_fewer_than_tokens_at_temperature_1(remote_pair: Baco) -> None:
    before = calls(remote_pair)
    answers = generated(remote_pair, STORY, "P-Punc:0.4", n=8)
    assert (calls(remote_pair) - before) / sum(len(tokens) for tokens, *_ in answers) < 1.2


def test_the_server_of_a_model_that_is_never_needed_is_not_called(remote_pair: Baco) -> None:
    backend: Any = remote_pair.backend
    before = dict(backend.calls)
    generated(remote_pair, STORY, "Aligned")
    assert backend.calls["base"] == before["base"]
    assert backend.calls["aligned"] > before["aligned"]


def test_explain_returns_the_routers_signals(remote_pair: Baco, demo: Baco) -> None:
    def whys(baco: Baco, router: str) -> list[Any]:
        decoder = baco.decoder()
        decoder.submit(PROMPT, router=baco.router(router), temperature=0, explain=True)
        explanations = []
        while decoder.busy:
            explanations += [token.why for chunk in decoder.step() for token in chunk.tokens]
        return explanations

    for router in ("H-Punc:1.2", "P-Punc:0.4", "Aligned"):
        mine, expected = whys(remote_pair, router), whys(demo, router)
        assert len(mine) == len(expected)
        for one, other in zip(mine, expected, strict=True):
            assert (one.asked, one.wanted) == (other.asked, other.wanted)
            assert one.predicted == other.predicted
            assert one.max_base == pytest.approx(other.max_base, abs=1e-4)
            for name in ("base_logprob", "aligned_logprob"):
                logprob = getattr(one, name)
                assert logprob == pytest.approx(getattr(other, name), abs=1e-3) or math.isnan(
                    logprob
                )
            if router.startswith("H"):
                assert one.entropy_base == pytest.approx(other.entropy_base, abs=1e-3)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"presence_penalty": 1.0}, "penalties need the weights"),
    ({"top_p": 0.9}, "top_k and top_p truncate the row"),
    ({"samplers": "xtc"}, "the remote backend cannot run xtc:0.5,0.1: leave samplers out"),
    ({"logprobs": 2049}, "logprobs is 2049: the remote backend returns at most 2048"),
]


@pytest.mark.parametrize(("sampling", "message"), REFUSED, ids=str)
def test_options_that_servers_cannot_follow_are_refused(
    remote_pair: Baco, sampling: dict[str, Any], message: str
) -> None:
    with pytest.raises(BacoError, match=message):
        remote_pair.generate(PROMPT, router="P-Punc:0.4", **sampling)


def test_a_gateway_returns_sources_and_refuses_scores(remote_pair: Baco) -> None:
    with served(remote_pair) as gateway:
        reply = gateway.ask(temperature=0, seed=3).json()["choices"][0]
        assert reply["message"]["content"]
        assert reply["baco"]["sources"]
        body = {"prompt": "a", "model": "baco/base", "echo": True, "max_tokens": 0, "logprobs": 1}
        with gateway.client as client:
            refused = client.post("/v1/completions", json=body)
        assert refused.status_code == 400
        assert "needs the weights" in refused.json()["error"]["message"]
