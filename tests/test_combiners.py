"""Combiners make one row of the rows of both models, and say where it comes from."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
from playwright.sync_api import Browser, expect
from torch import Tensor

from baco import Baco, BacoError, SamplingParams, register_combiner, register_router
from baco.backends.vllm.backend import CAPABILITIES
from baco.cli import run
from baco.decoder import Decoder
from baco.engine.engine import Engine
from baco.engine.sequence import Request
from baco.integrations.transformers import as_transformers
from baco.outputs import Completion, record
from baco.routing.combiners import ALIGNED, BASE, MIXED, Combination, Combined, pooled_logprobs
from baco.routing.parser import router
from tests import naive_decoding as naive
from tests.pages import visit
from tests.registries import restored
from tests.remoting import remote
from tests.serving import PROMPT, served

SAMPLING: dict[str, Any] = {"n": 4, "seed": 3, "max_tokens": 24}


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with restored():
        yield


def register_gate() -> None:
    """A combiner with rows of every provenance: mixed in the middle, of one model at the ends."""

    @register_combiner("Gate", low=(0.0, 1.0), high=(0.0, 1.0))
    def gate(base: Tensor, aligned: Tensor, low: float = 0.4, high: float = 0.9) -> Combined:
        """whichever model is sure"""
        sure = base.amax(dim=-1).exp()
        logits = torch.logaddexp(base, aligned)
        logits = torch.where((sure > high)[:, None], base, logits)
        logits = torch.where((sure < low)[:, None], aligned, logits)
        source = torch.full(sure.shape, MIXED).where(sure <= high, BASE)
        return Combined(logits, source.where(sure >= low, ALIGNED))


def rows_of(spelling: str, base: Tensor, aligned: Tensor) -> Combined:
    chosen = router(spelling)
    assert isinstance(chosen, Combination)
    return chosen.combine(base, aligned)


def plain(row: Tensor) -> list[float]:
    """The probabilities of log-probabilities."""
    return [math.exp(value) for value in row.double().tolist()]


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    """Log-probabilities of both models; the base may not write token 3, neither token 5."""
    generator = torch.Generator().manual_seed(0)
    base, aligned = torch.randn(2, 4, 12, generator=generator)
    base[:, 3] = base[:, 5] = aligned[:, 5] = -math.inf
    return base.log_softmax(-1), aligned.log_softmax(-1)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_an_ensemble_of_probabilities_is_their_weighted_mean(
    rows: tuple[Tensor, Tensor], weight: float
) -> None:
    row = rows_of(f"Ensemble:{weight}", *rows)
    assert row.source.tolist() == [MIXED] * 4
    for mixed, base, aligned in zip(row.logits, *rows, strict=True):
        mean = [
            weight * b + (1 - weight) * a for b, a in zip(plain(base), plain(aligned), strict=True)
        ]
        assert plain(mixed.log_softmax(-1)) == pytest.approx(mean, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_an_ensemble_of_logits_is_their_weighted_geometric_mean(
    rows: tuple[Tensor, Tensor], weight: float
) -> None:
    row = rows_of(f"LogitEnsemble:{weight}", *rows)
    for mixed, base, aligned in zip(row.logits, *rows, strict=True):
        products = [
            (b or a) ** weight * a ** (1 - weight)
            for b, a in zip(plain(base), plain(aligned), strict=True)
        ]
        products[5] = 0.0
        mean = [product / sum(products) for product in products]
        assert plain(mixed.log_softmax(-1)) == pytest.approx(mean, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(("strength", "plausible"), [(0.5, 0.1), (1.0, 0.5), (0.0, 0.0)])
def test_contrast_raises_what_the_aligned_model_likes_better_than_the_base(
    rows: tuple[Tensor, Tensor], strength: float, plausible: float
) -> None:
    """The reference: p_aligned · (p_aligned / p_base)^β over the plausible tokens."""
    row = rows_of(f"Contrast:{strength},plausible={plausible}", *rows)
    for mixed, base, aligned in zip(row.logits, *rows, strict=True):
        expert, amateur = plain(aligned), plain(base)
        kept = [
            a * (a / (b or a)) ** strength if a and a >= plausible * max(expert) else 0.0
            for a, b in zip(expert, amateur, strict=True)
        ]
        mean = [value / sum(kept) for value in kept]
        assert plain(mixed.log_softmax(-1)) == pytest.approx(mean, rel=1e-4, abs=1e-9)


def test_end_tokens_of_both_models_are_one_event() -> None:
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    pooled = pooled_logprobs(logits, (6, 2))
    for row, source in zip(pooled, logits, strict=True):
        expected = plain(source.log_softmax(-1))
        expected[2] += expected[6]
        expected[6] = 0.0
        assert plain(row) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(pooled_logprobs(logits, (6,)), logits.log_softmax(-1))


def naive_answers(baco: Baco, spelling: str, sampling: dict[str, Any]) -> list[list[int]]:
    """Greedy answers token by token, without a cache: the prompts are read whole at every token."""
    prompt = baco.pair.renderer.render(PROMPT)
    chosen = router(spelling)
    assert isinstance(chosen, Combination)
    ends, tokens = tuple(sorted(baco.pair.end_ids)), list[int]()
    while len(tokens) < sampling["max_tokens"] and not (tokens and tokens[-1] in ends):
        base = baco.pair.base.score([*prompt.base_ids, *tokens])[-1:]
        aligned = baco.pair.aligned.score([*prompt.aligned_ids, *tokens])[-1:]
        base = base.masked_fill(baco.pair.banned, -math.inf)
        row = chosen.combine(pooled_logprobs(base, ends), pooled_logprobs(aligned, ends))
        seed = naive.prompt_seed(
            sampling["seed"], naive.chat_digest([{"role": "user", "content": PROMPT}])
        )
        noise = torch.tensor(
            [
                -math.log(-math.log(naive.uniform(seed, 0, len(tokens), token)))
                for token in range(base.shape[-1])
            ]
        )
        scores = row.logits.log_softmax(-1)[0].double()
        tokens.append(int((scores + (noise if sampling["temperature"] else 0)).argmax()))
    return [tokens]


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("spelling", ["Ensemble:0.3", "LogitEnsemble:0.7", "Contrast:0.5", "Gate"])
def test_a_combiner_draws_with_the_replayable_noise_from_its_rows(
    demo: Baco, spelling: str, temperature: float
) -> None:
    register_gate()
    sampling: dict[str, Any] = {
        "seed": 3,
        "max_tokens": 8,
        "temperature": temperature,
        "min_p": 0.0,
    }
    answers = demo.generate(PROMPT, router=spelling, **sampling)
    assert [list(a.token_ids) for a in answers] == naive_answers(demo, spelling, sampling)


def test_both_models_are_read_at_every_token_of_a_combiner() -> None:
    """Also where no joint forward reads both anyway, and one model's row would decide a router."""
    register_gate()
    apart = Baco.load("demo", packed=False)
    assert isinstance(apart.pair.joint, str)
    sampling: dict[str, Any] = {"seed": 3, "max_tokens": 24, "min_p": 0.0, "temperature": 1}
    for spelling in ("Gate:0.6,0.95", "Gate:0.9,0.999", "Ensemble:0.5"):
        answers = apart.generate(PROMPT, router=spelling, **sampling)
        assert [list(a.token_ids) for a in answers] == naive_answers(apart, spelling, sampling)


def drawn(completion: Completion) -> tuple[Any, ...]:
    return completion.token_ids, completion.sources, completion.text


def test_a_combiner_gives_the_same_answers_in_any_company_and_with_drafts(demo: Baco) -> None:
    register_gate()
    spellings = ["Ensemble:0.3", "Gate", "P-Punc:0.4", "Base", "Contrast:0.5"]
    alone = {s: demo.generate(PROMPT, router=s, **SAMPLING) for s in spellings}
    for speculate in (False, True):
        decoder = Decoder(demo.pair, Engine(demo.pair, speculate=speculate))
        tickets = {
            decoder.submit(PROMPT, router=demo.router(spelling), **SAMPLING): spelling
            for spelling in spellings
        }
        together: dict[str, list[Completion]] = {spelling: [] for spelling in spellings}
        while decoder.busy:
            for chunk in decoder.step():
                if chunk.completion is not None:
                    together[tickets[chunk.prompt]].append(chunk.completion)
        for spelling, completions in together.items():
            answers = sorted(completions, key=lambda c: c.sample)
            assert list(map(drawn, answers)) == list(map(drawn, alone[spelling])), spelling


def test_mixed_rows_have_no_source_and_others_that_of_their_model(demo: Baco) -> None:
    register_gate()
    answers = demo.generate(PROMPT, router="Gate:0.3,0.999", logprobs=3, **SAMPLING)
    prompt = demo.pair.renderer.render(PROMPT)
    assert {source for answer in answers for source in answer.sources} == {"base", "aligned", None}
    ends = tuple(sorted(demo.pair.end_ids))
    for answer in answers:
        assert answer.base_share is None
        assert answer.switches is None
        assert answer.top_logprobs is not None
        assert {piece.source for piece in answer.pieces} <= set(answer.sources)
        for at, (token, source) in enumerate(zip(answer.token_ids, answer.sources, strict=True)):
            before = answer.token_ids[:at]
            base = demo.pair.base.score([*prompt.base_ids, *before])[-1:]
            aligned = demo.pair.aligned.score([*prompt.aligned_ids, *before])[-1:]
            banned = pooled_logprobs(base.masked_fill(demo.pair.banned, -math.inf), ends)
            both = torch.logaddexp(banned, pooled_logprobs(aligned, ends)).log_softmax(-1)
            row = {"base": base.log_softmax(-1), "aligned": aligned.log_softmax(-1), None: both}
            assert answer.logprobs[at] == pytest.approx(float(row[source][0, token]), abs=1e-3)
            assert max(answer.top_logprobs[at].values()) == pytest.approx(
                float(row[source].max()), abs=1e-3
            )
    kept = record(PROMPT, demo.pair, {"system": None, "switch": "word"}, answers)["samples"]
    assert {sample["base_share"] for sample in kept} == {None}


def test_a_combiner_that_only_picks_rows_keeps_base_shares(demo: Baco) -> None:
    @register_combiner("OneModel")
    def one_model(base: Tensor, aligned: Tensor) -> Combined:
        return Combined(base, torch.full(base.shape[:1], BASE))

    (answer,) = demo.generate(PROMPT, router="onemodel", seed=3, max_tokens=8)
    assert answer.base_share == 1.0
    assert answer.switches == 0


def test_a_row_without_any_token_left_is_the_aligned_models(demo: Baco) -> None:
    @register_combiner("Nothing")
    def nothing(base: Tensor, aligned: Tensor) -> Tensor:
        return torch.full_like(base, -math.inf)

    (answer,) = demo.generate(PROMPT, router="Nothing", seed=3, max_tokens=8)
    (aligned,) = demo.generate(PROMPT, router="Aligned", seed=3, max_tokens=8)
    assert (answer.text, set(answer.sources)) == (aligned.text, {"aligned"})


def test_a_combiner_of_another_shape_ends_the_answer_in_one_line(demo: Baco) -> None:
    @register_combiner("Short")
    def short(base: Tensor, aligned: Tensor) -> Tensor:
        return base[:, 1:]

    (answer,) = demo.generate(PROMPT, router="Short", seed=3, max_tokens=8)
    assert answer.finish_reason == "error"
    assert answer.error is not None
    assert "combiner Short returned (" in answer.error


def test_names_of_combiners_are_ones_own() -> None:
    for name, message in (("P", "taken"), ("ensemble", "taken"), ("base", "taken"), ("a b", "use")):
        with pytest.raises(BacoError, match=message):
            register_combiner(name)(lambda base, aligned: base)
    with pytest.raises(BacoError, match="give a function of"):
        register_combiner("Own")(lambda base: base)
    with pytest.raises(BacoError, match="router name 'ensemble' is a combiner's"):
        register_router("ensemble", lambda signals: signals.max_base < 0.5)


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("Ensemble:2", "combiner Ensemble: weight is 2: give a number from 0 to 1"),
        ("Ensemble:a", "'a' is not a number"),
        ("Contrast:1,0,3", "takes strength, plausible, as in Contrast:0.5,0.1"),
        ("Ensemble-Punc:0.3", "the combiner Ensemble stands alone, as in Ensemble:0.5"),
        ("Esemble", "Ensemble, LogitEnsemble, Contrast"),
    ],
)
def test_a_bad_spelling_is_refused_in_one_line(
    spelling: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "Hi", "--router", spelling]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_dial_of_a_combiner_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "Hi", "--router", "Ensemble", "--diversity", "0.5"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--diversity turns the threshold of a router, and Ensemble is a combiner" in error


def test_backends_that_cannot_combine_refuse(demo: Baco) -> None:
    prompt, params = demo.pair.renderer.render("Hello"), SamplingParams(seed=1)
    request = Request(
        prompt.base_ids, prompt.aligned_ids, params, router("Ensemble"), digest=prompt.digest
    )
    combining = replace(CAPABILITIES, name="other", combiners=False)
    with pytest.raises(BacoError, match=r"the other backend cannot run the combiner Ensemble:0\.5"):
        combining.check(request)
    with pytest.raises(BacoError, match="runs routers, not the combiner"):
        as_transformers(demo, "Ensemble:0.3")
    refusal = pytest.raises(BacoError, match="the remote backend cannot run the combiner")
    with served(demo) as server, remote(server.url) as elsewhere, refusal:
        elsewhere.generate(PROMPT, router="Ensemble:0.3")


def test_the_server_names_combiners_and_says_null_for_their_sources(demo: Baco) -> None:
    expected = demo.generate(PROMPT, router="Ensemble:0.3", seed=1)[0].text
    with served(demo) as server:
        reply = server.ask(model="baco/Ensemble:0.3", router=None, seed=1, explain=True).json()
        with server.client as client:
            models = {model["id"] for model in client.get("/v1/models").json()["data"]}
            [entry] = [e for e in client.get("/baco/routers").json() if e["name"] == "Ensemble"]
        assert server.metric('baco_tokens_total{source="mixed"}') > 0
        assert server.metric("baco_answer_base_share_count") == 0
    assert {"baco/Ensemble:0.5", "baco/LogitEnsemble:0.5", "baco/Contrast:0.5,0.1"} <= models
    assert (entry["example"], entry["low"], entry["high"]) == ("Ensemble:0.5", 0.0, 1.0)
    choice = reply["choices"][0]
    assert choice["message"]["content"] == expected
    assert choice["baco"]["sources"] == [[expected, None]]
    assert choice["baco"]["base_share"] is None
    assert {token["source"] for token in choice["baco"]["why"]} == {None}
    assert {token["wanted"] for token in choice["baco"]["why"]} == {None}


def test_the_page_says_mixed_where_a_combiner_wrote(demo: Baco, browser: Browser) -> None:
    (expected,) = demo.generate(PROMPT, router="Ensemble:0.3", seed=1)
    settings = {"prompt": PROMPT, "router": "Ensemble:0.3", "n": 1, "seed": 1, "compare": 0}
    with served(demo) as server, visit(browser, f"{server.url}/#{urlencode(settings)}") as seen:
        seen.settle()
        assert seen.column("baco") == [expected.text]
        expect(seen.page.locator(".of-baco li")).to_contain_text("mixed")
        seen.page.locator(".of-baco [data-word]").first.focus()
        expect(seen.page.locator("#why")).to_contain_text("is mixed")
        expect(seen.page.locator("#why")).to_contain_text("both models’ distributions at once")


def test_the_command_line_lists_combiners_and_says_mixed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["combiners"]) == 0
    assert "Contrast:0.5,0.1" in capsys.readouterr().out
    assert run(["combiners", "--json"]) == 0
    names = [entry["name"] for entry in json.loads(capsys.readouterr().out)]
    assert names[:3] == ["Ensemble", "LogitEnsemble", "Contrast"]
    assert run(["generate", PROMPT, "-r", "Ensemble:0.3", "-s", "1", "--max-tokens", "8"]) == 0
    captured = capsys.readouterr()
    assert "mixed" in captured.out + captured.err
    assert "base share" not in captured.out + captured.err
