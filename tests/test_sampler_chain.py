"""Samplers are pure functions of logits, earlier tokens and parameters, named by spellings."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import NoRepeatNGramLogitsProcessor

from baco import Baco, BacoError, Completion, SamplingParams, register_sampler
from baco.decoder import Decoder
from baco.engine.engine import Engine
from baco.engine.isolation import IsolatingEngine
from baco.sampling.noise import noise_keys
from baco.sampling.sampler_chain import Context, apply_chains, parse_chain, samplers
from tests.fuzzing import budget
from tests.registries import restored
from tests.test_engine import reference, rules, without_turn_cut
from tests.text_pairs import baco_of_kinds

PROMPTS = ["What do you recommend for a rainy day?", "Plan a walk.", "Where should I go?"]
CHAINS: list[tuple[str, ...]] = [
    (),
    ("top_n_sigma:1.0",),
    ("xtc:0.7,0.02", "p_less"),
    ("no_repeat_ngram:2",),
    ("base_top_p:0.7", "base_min_p:0.2"),
    ("rhythm:3", "xtc:0.5,0.05"),
]


@pytest.fixture(autouse=True)
def rhythm() -> Iterator[None]:
    """A sampler that reads everything that samplers may read."""
    with restored():

        @register_sampler("rhythm", period=(2, 100))
        def rhythm(logits: torch.Tensor, context: Context, period: int) -> torch.Tensor:
            """lower tokens of one remainder, which the tokens so far and a coin choose"""
            tokens = context.tokens.clamp(min=0)
            choice = tokens.sum(dim=1) + (context.coin("rhythm") * period).long()
            ids = torch.arange(logits.shape[-1], device=logits.device)
            seen = context.counts(logits.shape[-1])
            return logits - seen - 3.0 * ((ids + choice[:, None]) % period == 0)

        yield


def decode(
    baco: Baco,
    requests: list[tuple[str, tuple[str, ...]]],
    *,
    speculate: bool = True,
    **sampling: Any,
) -> list[list[tuple[list[int], list[str]]]]:
    """Tokens and sources of every sample of requests that are decoded in one batch."""
    decoder = Decoder(baco.pair, Engine(baco.pair, speculate=speculate))
    tickets = [
        decoder.submit(prompt, router=baco.router("P-Punc:0.6"), samplers=chain, **sampling)
        for prompt, chain in requests
    ]
    answers: dict[int, dict[int, Any]] = {}
    while decoder.busy:
        for chunk in decoder.step():
            if (done := chunk.completion) is not None:
                answer = (list(done.token_ids), list(done.sources))
                answers.setdefault(chunk.prompt, {})[chunk.sample] = answer
    return [[answer for _, answer in sorted(answers[ticket].items())] for ticket in tickets]


@settings(max_examples=budget(12), deadline=None)
@given(
    chains=st.lists(st.sampled_from(CHAINS), min_size=3, max_size=3),
    seed=st.integers(0, 2**40),
    temperature=st.sampled_from([0.0, 1.0, 1.5]),
)
def test_answers_do_not_depend_on_batch_n_or_speculation(
    loaded_pair: Callable[..., Baco], chains: list[tuple[str, ...]], seed: int, temperature: float
) -> None:
    baco = loaded_pair("llama", 0.1)
    sampling: dict[str, Any] = {"seed": seed, "temperature": temperature, "max_tokens": 20}
    requests = list(zip(PROMPTS, chains, strict=True))
    together = decode(baco, requests, n=2, **sampling)
    assert together == decode(baco, requests, n=2, speculate=False, **sampling)
    for request, samples in zip(requests, together, strict=True):
        assert decode(baco, [request], n=1, **sampling) == [samples[:1]]


def test_drafts_are_accepted_with_samplers(loaded_pair: Callable[..., Baco]) -> None:
    baco = loaded_pair("llama", 0.1)
    engine = Engine(baco.pair)
    decoder = Decoder(baco.pair, engine)
    chain = ("xtc:0.7,0.02", "no_repeat_ngram:2")
    decoder.submit(PROMPTS[0], router=baco.router("P:0.5"), samplers=chain, seed=1, max_tokens=60)
    while decoder.busy:
        decoder.step()
    assert engine.stats.accepted > 0


def test_a_sampler_sees_the_answers_tokens_before_each_position(demo: Baco) -> None:
    seen: list[list[int]] = []

    @register_sampler("watch")
    def watch(logits: torch.Tensor, context: Context) -> torch.Tensor:
        """keep everything"""
        seen.extend(row[row >= 0].tolist() for row in context.tokens)
        return logits

    [[(tokens, _)]] = decode(
        demo, [(PROMPTS[0], ("watch",))], speculate=False, seed=3, n=1, max_tokens=15
    )
    assert seen == [tokens[:at] for at in range(len(tokens))]


def test_a_sampler_runs_before_the_temperature_and_the_truncations(demo: Baco) -> None:
    @register_sampler("only")
    def only(logits: torch.Tensor, _: Context, token: int) -> torch.Tensor:
        """leave one token"""
        ids = torch.arange(logits.shape[-1])
        return logits.where(ids == token, -math.inf)

    word = demo.pair.tokenizer.encode(" the", add_special_tokens=False)[0]
    for temperature in (0.0, 2.0):
        [answer] = demo.generate(
            PROMPTS[0], router="Aligned", samplers=f"only:{word}", temperature=temperature,
            top_k=5, top_p=0.5, min_p=0.1, max_tokens=4, switch="token",
        )  # fmt: skip
        assert set(answer.token_ids) == {word}


def context(tokens: list[list[int]], seed: int = 0) -> Context:
    """The context of rows that are samples 0, 1, … of one prompt; base writes every other one."""
    sample = torch.arange(len(tokens))
    keys = noise_keys(torch.full_like(sample, seed), sample, torch.zeros_like(sample))
    table = torch.tensor(tokens, dtype=torch.int64).view(len(tokens), -1)
    return Context(lambda: table, keys, sample % 2 == 0)


def run(spelling: str, logits: torch.Tensor, tokens: list[list[int]]) -> torch.Tensor:
    which = torch.zeros(len(logits), dtype=torch.int64)
    return apply_chains(logits, [parse_chain([spelling])], which, context(tokens))


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=4),
    st.integers(1, 4),
)
def test_no_repeat_ngram_is_that_of_transformers(answers: list[list[int]], size: int) -> None:
    logits = torch.linspace(0, 1, 6).repeat(len(answers), 1)
    expected = NoRepeatNGramLogitsProcessor(size)(torch.tensor(answers), logits.clone())
    assert torch.equal(run(f"no_repeat_ngram:{size}", logits, answers), expected)


def test_padding_of_shorter_answers_does_not_count_as_repetition() -> None:
    logits = torch.zeros(2, 4)
    got = run("no_repeat_ngram:1", logits, [[-1, -1, 2], [1, 2, 3]])
    assert got.isinf().tolist() == [[False, False, True, False], [False, True, True, True]]


def test_top_n_sigma_keeps_logits_within_n_deviations_of_the_highest() -> None:
    logits = torch.tensor([[4.0, 3.0, 0.0, 0.0, -math.inf]])
    deviation = torch.tensor([4.0, 3.0, 0.0, 0.0]).std(unbiased=False)
    for n in (0.0, 0.5, 1.0, 3.0):
        kept = run(f"top_n_sigma:{n}", logits, [[]]).isfinite()[0].tolist()
        assert kept == [value >= 4.0 - n * deviation for value in (4.0, 3.0, 0.0, 0.0)] + [False]


@pytest.mark.parametrize(
    ("spelling", "kept"),
    [
        ("base_min_p:0.5", [True, True, False, False]),
        ("base_min_p:0", [True, True, True, True]),
        ("base_top_p:0.6", [True, True, False, False]),
        ("base_top_p:0", [True, False, False, False]),
        ("base_top_p:1", [True, True, True, True]),
    ],
)
def test_truncation_of_the_base_leaves_the_words_of_the_aligned_model_alone(
    spelling: str, kept: list[bool]
) -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]] * 3).log()
    assert run(spelling, logits, [[], [], []]).isfinite().tolist() == [kept, [True] * 4, kept]


@pytest.mark.parametrize("speculate", [True, False])
def test_a_naive_loop_that_truncates_the_base_alone_gives_the_same_answers(
    plain: Baco, speculate: bool
) -> None:
    baco, settings = without_turn_cut(plain), {"seed": 4, "temperature": 1.0, "max_tokens": 16}
    chain: tuple[str, ...] = ("base_min_p:0.3",)
    asked = [(prompt, chain) for prompt in PROMPTS]
    rule, written = rules(baco.pair)["P-Punc:0.6"], set()
    for prompt, answers in zip(
        PROMPTS, decode(baco, asked, speculate=speculate, n=2, **settings), strict=True
    ):
        expected = reference(baco, prompt, rule, sample=1, base_min_p=0.3, **settings)
        assert answers[1] == expected
        written |= {expected == reference(baco, prompt, rule, sample=1, **settings)}
    assert False in written  # it changes answers


def test_the_base_alone_is_truncated_where_the_tokenizers_differ() -> None:
    baco = baco_of_kinds("gpt2", "gemma")

    def tokens(router: str, **sampling: Any) -> tuple[int, ...]:
        drawn = {"seed": 5, "temperature": 1.0, "max_tokens": 16, **sampling}
        return baco.generate(PROMPTS[0], router=router, **drawn)[0].token_ids

    likeliest, only_likeliest = {"temperature": 0.0}, {"samplers": "base_min_p:1"}
    assert tokens("Base") != tokens("Base", **likeliest) == tokens("Base", **only_likeliest)
    assert tokens("Aligned", **only_likeliest) == tokens("Aligned")


def test_p_less_keeps_tokens_at_least_as_likely_as_two_equal_draws() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()  # 0.365
    assert run("p_less", logits, [[]]).isfinite().tolist() == [[True, False, False, False]]


def test_xtc_leaves_the_least_likely_of_the_top_choices_in_its_share_of_the_rows() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(4000, 1)
    kept = run("xtc:0.25,0.1", logits, [[]] * 4000).isfinite().tolist()
    hit = kept.count([False, False, True, True])
    assert hit + kept.count([True] * 4) == 4000
    assert 850 < hit < 1150
    assert run("xtc:1,0.4", logits[:1], [[]]).isfinite().all()  # one top choice is none


def test_masked_tokens_stay_masked_and_no_row_is_left_empty() -> None:
    @register_sampler("all")
    def all_(logits: torch.Tensor, _: Context) -> torch.Tensor:
        """allow every token"""
        return torch.zeros_like(logits)

    @register_sampler("none")
    def none(logits: torch.Tensor, _: Context) -> torch.Tensor:
        """allow no token"""
        return torch.full_like(logits, -math.inf)

    @register_sampler("bad")
    def bad(logits: torch.Tensor, _: Context) -> torch.Tensor:
        """in place"""
        return logits.fill_(math.nan)

    logits = torch.tensor([[1.0, -math.inf, 2.0]])
    assert run("all", logits, [[]]).tolist() == [[0.0, -math.inf, 0.0]]
    assert run("none", logits, [[]]).tolist() == logits.tolist()
    assert run("bad", logits, [[]]).tolist() == [[1.0, -math.inf, 2.0]]


def test_many_rows_are_shaped_in_parts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(120).remainder(7).view(40, 3).tolist()
    chains = [parse_chain(chain) for chain in CHAINS]
    which = torch.arange(40) % len(CHAINS)
    whole = apply_chains(logits, chains, which, context(tokens))
    monkeypatch.setattr("baco.sampling.sampler_chain.max_drawn_entries", lambda _: 150)
    assert torch.equal(apply_chains(logits, chains, which, context(tokens)), whole)
    assert torch.equal(whole[which == 0], logits[which == 0])


def test_a_sampler_that_fails_ends_only_the_answers_that_named_it(demo: Baco) -> None:
    @register_sampler("shape")
    def shape(logits: torch.Tensor, _: Context) -> torch.Tensor:
        """another shape"""
        return logits[:, :3]

    decoder = Decoder(demo.pair, IsolatingEngine(lambda: Engine(demo.pair)))
    for chain in ((), ("shape",)):
        decoder.submit(
            PROMPTS[0], router=demo.router("P:0.5"), samplers=chain, seed=1, max_tokens=5
        )
    done: dict[int, Completion] = {}
    while decoder.busy:
        done |= {c.prompt: c.completion for c in decoder.step() if c.completion is not None}
    errors = [done[ticket].error for ticket in sorted(done)]
    assert errors[0] is None
    assert errors[1] is not None and "sampler shape returned" in errors[1]


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        ("top_n_sigma", "top_n_sigma:1.0"),
        ("Top_N_Sigma: 2", "top_n_sigma:2.0"),
        ("xtc:threshold=0.2", "xtc:0.5,0.2"),
        ("xtc:0.1, threshold=0.2", "xtc:0.1,0.2"),
        ("p_less", "p_less"),
        ("no_repeat_ngram:4.0", "no_repeat_ngram:4"),
    ],
)
def test_a_spelling_is_kept_with_all_its_numbers(spelling: str, canonical: str) -> None:
    assert SamplingParams(samplers=(spelling,)).samplers == (canonical,)
    assert SamplingParams().updated({"samplers": canonical}).samplers == (canonical,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("nope:1",), "unknown sampler 'nope:1': use one of .*top_n_sigma"),
        (("xtc:2",), "xtc: probability is 2: give a number from 0 to 1"),
        (("xtc:0.1,0.2,0.3",), "'0.3' is one number too many .* as in xtc:0.5,0.1"),
        (("xtc:foo=1",), "xtc takes probability, threshold"),
        (("xtc:0.1,probability=0.2",), "'probability=0.2' is one number too many"),
        (("top_n_sigma:x",), "'x' is not a number"),
        (("no_repeat_ngram:2.5",), "size is 2.5: give a whole number of at least 1"),
        (("rhythm",), "needs period, as in rhythm:2"),
        (("p_less",) * 17, "17 samplers: name at most 16"),
        (5, "samplers is 5: give spellings"),
        ((5,), "sampler 5: give a spelling"),
    ],
)
def test_a_wrong_sampler_spelling_is_one_line(given: Any, message: str) -> None:
    with pytest.raises(BacoError, match=message):
        SamplingParams(samplers=given)


def test_an_invalid_registration_is_one_line() -> None:
    def good(logits: torch.Tensor, _: Context) -> torch.Tensor:
        return logits

    for name, function, ranges, message in (
        ("XTC", good, {}, "'XTC' is taken"),
        ("a-b", good, {}, "use letters, digits and _"),
        ("few", lambda logits: logits, {}, "give a function of"),
        ("more", lambda logits, context, *rest: logits, {}, "give a function of"),
        ("range", good, {"n": (0.0, 1.0)}, "ranges of those alone"),
    ):
        with pytest.raises(BacoError, match=message):
            register_sampler(name, **ranges)(function)  # type: ignore[arg-type]
    assert not {"few", "more", "range"} & samplers().keys()


def test_a_record_names_the_samplers_and_is_as_before_without_any(demo: Baco) -> None:
    from baco.outputs import params

    settings = {"n": 1, "system": None, "switch": "word"}
    assert "samplers" not in params(demo.pair, settings)
    named = params(demo.pair, settings | {"samplers": ("xtc",)})
    assert named["samplers"] == ("xtc:0.5,0.1",)
