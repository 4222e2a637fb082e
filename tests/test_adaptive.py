"""Thresholds that adapt to the answer so far hold a base share, and answers can be repeated."""

from statistics import mean, pstdev
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baco import Baco, BacoError, SamplingParams, register_router, router
from baco.decoder import Decoder
from baco.engine.engine import Engine
from baco.engine.sequence import Request, SequenceState
from baco.routing.adaptive import moved
from baco.routing.rules import NATS, PROBABILITIES, RULES
from benchmarks.adaptive import fresh_tokens
from benchmarks.broken_grammar import held_out_questions
from tests.fuzzing import budget

PROMPTS = ["Tell me a short story about an animal", "Give me a cosy dinner idea", "Plan a walk."]
Answers = list[list[tuple[Any, ...]]]


def decode(baco: Baco, routers: list[str], n: int = 2, **options: Any) -> Answers:
    """Tokens and sources of the answers to each prompt, sample by sample."""
    sampling = {"n": n, "max_tokens": 24, "seed": 5, **options.pop("sampling", {})}
    engine = options.pop("engine", None) or Engine(baco.pair, **options)
    decoder = Decoder(baco.pair, engine)
    tickets = [
        decoder.submit(prompt, router=baco.router(spelling), **sampling)
        for prompt, spelling in zip(PROMPTS, routers, strict=False)
    ]
    done: dict[Any, dict[int, tuple[Any, ...]]] = {ticket: {} for ticket in tickets}
    while decoder.busy:
        for chunk in decoder.step():
            if chunk.completion is not None:
                drawn = (tuple(chunk.completion.token_ids), tuple(chunk.completion.sources))
                done[chunk.prompt][chunk.sample] = drawn
    return [[done[ticket][sample] for sample in sorted(done[ticket])] for ticket in tickets]


@given(st.sampled_from([PROBABILITIES, NATS, NATS[::-1]]), st.floats(0, 12), st.floats(-40, 40))
def test_a_threshold_moves_along_its_grid_and_stays_within_it(
    grid: tuple[float, ...], start: float, step: float
) -> None:
    gamma = grid[0] + (grid[-1] - grid[0]) * start / 12
    still, there, further = moved(gamma, grid, torch.tensor([0.0, step, step + 1])).tolist()
    assert still == pytest.approx(gamma, abs=1e-5)
    assert min(grid) <= there <= max(grid)
    assert (further - there) * (grid[-1] - grid[0]) >= -1e-6


def test_one_step_leads_from_one_threshold_of_the_grid_to_the_next() -> None:
    assert moved(0.3, PROBABILITIES, torch.tensor([1.0, -1.0, 1.5])).tolist() == pytest.approx(
        [0.4, 0.2, 0.45]
    )
    assert moved(1.5, NATS[::-1], torch.tensor([1.0, -1.0])).tolist() == pytest.approx([1.0, 2.0])


@settings(max_examples=budget(3))
@given(
    rules=st.lists(
        st.sampled_from(["P:share=0.3", "P-Punc:0.4,share=0.15", "H:share=0.4", "Rand:share=0.5"]),
        min_size=3,
        max_size=3,
    ),
    seed=st.integers(0, 2**40),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_answers_do_not_depend_on_drafts_the_batch_or_other_routers(
    demo: Baco, rules: list[str], seed: int, temperature: float
) -> None:
    sampling = {"seed": seed, "temperature": temperature}
    expected = decode(demo, rules, speculate=False, sampling=sampling)
    assert decode(demo, rules, speculate=True, sampling=sampling) == expected
    assert decode(demo, rules, speculate=True, max_rows=1, sampling=sampling) == expected
    more = decode(demo, ["Aligned", rules[1]], n=4, sampling=sampling)
    assert more[1][:2] == expected[1]


def test_answers_are_the_same_where_memory_holds_few_of_them_at_a_time(demo: Baco) -> None:
    rules = ["P:share=0.3", "H:share=0.3", "P-Punc-FC:share=0.2"]
    expected = decode(demo, rules, n=16)
    engine = Engine(demo.pair, memory="4MiB")
    assert decode(demo, rules, n=16, engine=engine) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sample_depends_on_earlier_samples_alone(demo: Baco, temperature: float) -> None:
    rules = ["P-Punc:0.3,siblings=3", "H:distinct=0.6", "P:0.3,share=0.3,over=samples"]
    sampling = {"seed": 7, "temperature": temperature, "max_tokens": 16}
    expected = decode(demo, rules, n=4, speculate=False, sampling=sampling)
    assert decode(demo, rules, n=4, sampling=sampling) == expected
    assert decode(demo, rules, n=4, max_rows=3, sampling=sampling) == expected
    fewer = decode(demo, rules, n=2, max_rows=1, sampling=sampling)
    assert fewer == [samples[:2] for samples in expected]


@pytest.mark.parametrize(
    "rule", ["P:0.3,siblings=4", "Rand:0.2,siblings=2", "P:distinct=0.6,over=samples"]
)
def test_compared_samples_are_the_same_one_at_a_time_and_where_others_are_drafted(
    demo: Baco, rule: str
) -> None:
    sampling = {"seed": 0, "max_tokens": 32}
    expected = decode(demo, [rule], n=4, speculate=False, sampling=sampling)
    assert decode(demo, [rule], n=4, sampling=sampling) == expected
    assert decode(demo, [rule], n=4, max_rows=1, sampling=sampling) == expected


def test_stopped_samples_still_count_where_few_run_at_a_time(demo: Baco) -> None:
    sampling = {"seed": 7, "stop": ["."]}
    expected = decode(demo, ["P:0.3,siblings=4"], n=6, sampling=sampling)
    assert decode(demo, ["P:0.3,siblings=4"], n=6, max_rows=1, sampling=sampling) == expected


def test_samples_that_go_the_same_way_get_more_base_words(demo: Baco) -> None:
    plain = decode(demo, ["P-Punc:0.1"], n=8, sampling={"temperature": 0.0})[0]
    assert len(set(plain)) == 1
    apart = decode(demo, ["P-Punc:0.1,siblings=3"], n=8, sampling={"temperature": 0.0})[0]
    assert apart[0] == plain[0]
    assert len(set(apart)) > 2
    shares = [sources.count("base") / len(sources) for _, sources in apart]
    assert mean(shares[1:]) > shares[0]
    assert decode(demo, ["P-Punc:0.1,siblings=0"], n=8, sampling={"temperature": 0.0})[0] == plain


def test_the_base_share_of_an_answer_is_near_its_target(demo: Baco) -> None:
    for share in (0.1, 0.3):
        answers = demo.generate_batch(PROMPTS, router=f"P:0.3,share={share}", n=8, seed=1)
        shares = [answer.base_share or 0.0 for samples in answers for answer in samples]
        assert mean(shares) == pytest.approx(share, abs=0.06)
        assert pstdev(shares) < 0.06
    coins = demo.generate_batch(PROMPTS, router="Rand:0.3", n=8, seed=1)
    assert pstdev(a.base_share or 0.0 for samples in coins for a in samples) > 0.06


@settings(max_examples=budget(30), deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=9), min_size=1, max_size=5))
def test_counts_of_earlier_samples_are_those_of_their_first_tokens(
    demo: Baco, answers: list[list[int]]
) -> None:
    request = Request(
        (1,), (1,), SamplingParams(n=len(answers)), demo.router("P:0.3"), digest=bytes(16)
    )
    samples = [SequenceState(request, sample, 9) for sample in range(len(answers))]
    for number, (sample, tokens) in enumerate(zip(samples, answers, strict=True)):
        sample.earlier = samples[:number]
        sample.tokens = tokens
        sample.sources = ["base" if token else "aligned" for token in tokens]
        sample.note_endings(0)
        sample.count_tokens()
    length = len(answers[-1])
    cut = [tokens[:length] for tokens in answers]
    fresh = fresh_tokens(cut)
    assert samples[-1].sibling_counts[2:] == (
        fresh[-1] if len(answers) > 1 else length,
        sum(map(len, cut)),
        sum(token > 0 for tokens in cut for token in tokens),
        sum(map(len, cut[1:])),
        sum(fresh),
    )


def test_answers_hold_a_target_of_fresh_tokens_roughly(demo: Baco) -> None:
    def fresh_share(rule: str) -> float:
        questions = [question.text for question in held_out_questions()[::23]]
        prompts = demo.generate_batch(questions, router=rule, n=5, seed=1)
        shares = []
        for samples in prompts:
            counts = fresh_tokens([answer.token_ids for answer in samples])
            shares += [c / len(a.token_ids) for c, a in zip(counts[1:], samples[1:], strict=True)]
        return mean(shares)

    rules = ["P:distinct=0.3", "P:distinct=0.5,over=samples", "P:distinct=0.7"]
    few, half, many = map(fresh_share, rules)
    assert few == pytest.approx(0.3, abs=0.2)
    assert half == pytest.approx(0.5, abs=0.2)
    assert many == pytest.approx(0.7, abs=0.2)
    assert few + 0.1 < half < many - 0.1


def test_the_first_sample_has_none_to_differ_from(demo: Baco) -> None:
    plain = decode(demo, ["P:0.6"] * 3)
    for rule in ("P:0.6,distinct=0.1", "P:0.6,distinct=0.1,over=samples"):
        held = decode(demo, [rule] * 3)
        assert [samples[0] for samples in held] == [samples[0] for samples in plain]
        assert [samples[1] for samples in held] != [samples[1] for samples in plain]


def test_the_base_share_of_a_prompts_samples_together_is_near_its_target(demo: Baco) -> None:
    answers = demo.generate_batch(PROMPTS, router="P:share=0.1,over=samples", n=8, seed=1)
    for samples in answers:
        sources = [source for answer in samples for source in answer.sources or ()]
        assert sources.count("base") / len(sources) == pytest.approx(0.1, abs=0.06)


def test_a_rule_of_a_user_reads_the_answer_so_far(demo: Baco) -> None:
    def turns(signals: Any) -> torch.Tensor:
        """base until it has written a third of the answer"""
        past = signals.past
        few: torch.Tensor = past.num_base * 3 <= past.length
        return few

    register_router("Turns", turns, reads=("past",))
    try:
        fixed = decode(demo, ["Turns", "Turns-Punc", "P:0.4"], speculate=False)
        assert decode(demo, ["Turns", "Turns-Punc", "P:0.4"]) == fixed
        for _, sources in fixed[0]:
            assert 0.25 < sources.count("base") / len(sources) < 0.55
    finally:
        del RULES["Turns"]


@pytest.mark.parametrize(
    ("spelling", "error"),
    [
        ("P:share=2", "give the base share to hold, from 0 to 1"),
        ("P:share=much", "give the base share to hold, from 0 to 1"),
        ("Punc:share=0.2", "adapts a threshold, and this router has none"),
        ("Slop:share=0.2", "adapts a threshold, and this router has none"),
        ("Base:share=0.2", "takes no arguments"),
        ("P:share=0.2,share=0.3", "is not an argument"),
        ("P:siblings=-1", "give the steps along the rule's grid, from 0 to 100"),
        ("P:siblings=many", "give the steps along the rule's grid, from 0 to 100"),
        ("P:distinct=2", "give the share of tokens that earlier samples do not have"),
        ("P:distinct=0.5,share=0.2", "one threshold holds one target"),
        ("P:share=0.2,over=all", "over=all: give answer or samples"),
        ("P:0.3,over=samples", "give share= or distinct= with it"),
        ("Punc:distinct=0.5", "distinct=0.5 adapts a threshold, and this router has none"),
        ("Punc:siblings=1", "siblings=1 adapts a threshold, and this router has none"),
    ],
)
def test_a_bad_share_is_refused_in_one_line(spelling: str, error: str) -> None:
    with pytest.raises(BacoError, match=error) as caught:
        router(spelling)
    assert "\n" not in str(caught.value)


def test_a_rule_without_a_grid_cannot_hold_a_share() -> None:
    register_router("Bare", lambda signals, gamma: signals.max_base < gamma, reads=("max_base",))
    try:
        with pytest.raises(BacoError, match="moves the threshold along the grid of the rule Bare"):
            router("Bare:0.3,share=0.2")
    finally:
        del RULES["Bare"]


def test_a_spelling_with_a_share_is_read_back() -> None:
    for spelling in (
        "P-Punc:0.4,share=0.2,siblings=1",
        "H:1.5,share=0.25",
        "P-Slop:0.3,share=0.1",
        "P:0.4,distinct=0.5",
        "P-Punc:0,distinct=0.5,siblings=1,over=samples",
    ):
        assert router(router(spelling).spelling) == router(spelling)
        assert router(spelling).spelling == spelling
    assert router("P:share=0.2").spelling == "P:0.3,share=0.2"
    assert router("H:distinct=0.5").spelling == "H:1,distinct=0.5"
    assert router("P:distinct=1").spelling == "P:1,distinct=1"
    assert router("P:distinct=0.3").spelling == "P:0.18,distinct=0.3"
