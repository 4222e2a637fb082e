"""Parameters are checked; draws are replayable and follow the truncated distribution."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from baco import BacoError, SamplingParams
from baco.sampling.noise import GUMBEL_MAX, GUMBEL_MIN, gumbel, noise_keys, uniform
from baco.sampling.sampler import SamplingTensors, draw, draw_with_all_noise, penalise, truncate
from tests import naive_decoding as naive

SEEDS = st.integers(0, 2**63 - 1)


def key(seed: int, sample: int = 0, position: int = 0) -> torch.Tensor:
    return noise_keys(torch.tensor(seed), torch.tensor(sample), torch.tensor(position))


@given(SEEDS, st.integers(0, 2**20), st.integers(0, 2**17), st.integers(0, 2**18))
def test_a_uniform_is_the_same_pure_function_as_in_plain_integers(
    seed: int, sample: int, position: int, token: int
) -> None:
    mine = uniform(key(seed, sample, position), torch.tensor(token))
    assert float(mine) == naive.uniform(seed, sample, position, token)


def test_uniforms_are_uniform_and_each_argument_matters() -> None:
    tokens = torch.arange(20_000)
    for keys in (key(0), key(1), key(2**40), key(0, 1), key(0, 0, 1)):
        assert kstest(uniform(keys, tokens).numpy(), "uniform").pvalue > 0.001
    several = (key(0), key(1), key(2**40), key(0, 1), key(0, 0, 1))
    drawn = [uniform(keys, tokens) for keys in several]
    correlations = torch.corrcoef(torch.stack(drawn)) - torch.eye(5)
    assert correlations.abs().max() < 0.04


def test_noise_stays_within_the_bounds_that_the_draw_relies_on() -> None:
    # The hash reaches its extremes rarely; the bounds are those of the least and largest uniform.
    for odd, bound in ((1, GUMBEL_MIN), (2**24 - 1, GUMBEL_MAX)):
        u = torch.tensor(odd * 2.0**-24)
        assert 0 < float(u) < 1
        assert float(-(-u.log()).log()) == pytest.approx(bound, rel=1e-6)
    noise = gumbel(key(5), torch.arange(200_000))
    assert noise.min() >= GUMBEL_MIN and noise.max() <= GUMBEL_MAX


def table(*params: SamplingParams) -> SamplingTensors:
    return SamplingTensors.of(list(params), torch.device("cpu"))


@given(
    st.lists(st.floats(-20, 20), min_size=5, max_size=40),
    SEEDS,
    st.sampled_from([0.3, 1.0, 4.0]),
)
def test_skipping_tokens_that_cannot_win_changes_no_draw(
    logits: list[float], seed: int, temperature: float
) -> None:
    row = torch.tensor([logits])
    scores = row / temperature + gumbel(key(seed), torch.arange(len(logits)))
    drawn = draw(row, table(SamplingParams(temperature=temperature)), key(seed)[None])
    assert int(drawn) == int(scores.argmax())


def test_a_token_with_the_greatest_noise_wins_from_as_far_below_as_it_can() -> None:
    keys, token = key(1, 0, 4), 1034  # its noise is the greatest there is
    noise = gumbel(keys, torch.arange(token + 1))
    assert float(noise[token]) == pytest.approx(GUMBEL_MAX)
    lead = float(noise[0] - noise[token])
    for margin, winner in ((0.004, token), (-0.004, 0)):
        row = torch.full((1, token + 1), -40.0)
        row[0, 0], row[0, token] = 0.0, lead + margin
        drawn = draw(row, table(SamplingParams(temperature=1.0)), keys[None])
        assert int(drawn) == winner


def test_temperature_0_is_the_plain_argmax_beside_random_rows() -> None:
    row = torch.tensor([[0.0, 0.1, 0.0]]).repeat(200, 1)
    params = [SamplingParams(temperature=0.0), SamplingParams(temperature=1.0)] * 100
    keys = torch.stack([key(1, sample) for sample in range(200)])
    drawn = draw(row, table(*params), keys)
    assert set(drawn[::2].tolist()) == {1}
    assert set(drawn[1::2].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.1}])
@pytest.mark.parametrize("temperature", [1e-29, 1e-38, 1e-40, 5e-324])
def test_the_lowest_temperatures_take_the_most_likely_token(
    temperature: float, truncation: dict[str, Any]
) -> None:
    params = table(SamplingParams(temperature=temperature, **truncation))
    row, keys = torch.tensor([[1e4, 0.1, 2e4, -3.0, 1.9e4]]), key(1)[None]
    assert draw(row.clone(), params, keys).tolist() == [2]
    assert draw_with_all_noise(row, row.argmax(dim=-1), params, keys).tolist() == [2]


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -math.inf])
    n = 20_000
    keys = noise_keys(torch.full((n,), 9), torch.arange(n), torch.zeros(n, dtype=torch.int64))
    drawn = draw(logits.expand(n, 5), table(*[SamplingParams(temperature=0.8)] * n), keys)
    counts = torch.bincount(drawn, minlength=5)
    assert counts[4] == 0
    expected = (logits[:4] / 0.8).softmax(0) * n
    assert chisquare(counts[:4].numpy(), expected.numpy(), sum_check=False).pvalue > 0.001


# Hundredths stay apart in float32; of equal logits, sorting alone says which one is left out.
@given(
    st.lists(st.integers(-800, 800), min_size=4, max_size=30, unique=True),
    st.integers(0, 12),
    st.sampled_from([1.0, 0.95, 0.5, 0.05]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_truncation_keeps_the_tokens_that_transformers_keeps(
    hundredths: list[int], top_k: int, top_p: float, min_p: float
) -> None:
    row = torch.tensor([hundredths]) / 100
    expected = row
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)
    other = SamplingParams(top_k=1, top_p=0.5, min_p=0.9)
    mine = truncate(
        torch.cat([row, row]), table(SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p), other)
    )[0]
    kept = (mine > -math.inf) ^ (expected[0] > -math.inf)
    # Only a probability that stands on the edge of top_p or min_p up to rounding may differ.
    assert kept.sum() <= (top_p < 1) + (min_p > 0)
    if top_p == 1 and min_p == 0:
        assert torch.equal(mine, expected[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n is 0: give a whole number from 1"),
        ({"n": 1.5}, "n is 1.5"),
        ({"n": 10**9}, "n is 1000000000"),
        ({"seed": -1}, "seed is -1"),
        ({"temperature": -0.1}, "temperature is -0.1: give a number from 0 to 100"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"stop": [""]}, "stop is"),
        ({"stop": 3}, "stop is 3"),
        ({"stop": ["a", "\ud83d"]}, "stop holds half a surrogate pair"),
        ({"logprobs": 65_537}, "logprobs is 65537"),
        ({"temprature": 1}, "unknown sampling parameter 'temprature'"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BacoError, match=message):
        SamplingParams().updated(changes)


def test_a_random_seed_is_drawn_only_if_none_is_given() -> None:
    assert SamplingParams(seed=0).seeded().seed == 0
    assert len({SamplingParams().seeded().seed for _ in range(20)}) > 15


def test_stop_may_be_one_string() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]


def penalised(counts: list[int], prompted: list[bool], **penalties: float) -> list[float]:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    settings = table(SamplingParams(**penalties))  # type: ignore[arg-type]
    changed = penalise(logits, torch.tensor([prompted]), torch.tensor([counts]), settings)
    return changed[0].tolist()


def test_a_repetition_penalty_lowers_seen_tokens_on_both_sides_of_zero() -> None:
    seen = [True, True, False, False]
    assert penalised([0] * 4, seen, repetition_penalty=2) == [1.0, -4.0, 2.0, -2.0]
    assert penalised([0, 0, 1, 3], [False] * 4, repetition_penalty=2) == [2.0, -2.0, 1.0, -4.0]


def test_presence_and_frequency_penalties_count_the_answer_alone() -> None:
    prompted = [True] * 4
    assert penalised([0, 1, 2, 0], prompted, presence_penalty=0.5) == [2.0, -2.5, 1.5, -2.0]
    assert penalised([0, 1, 2, 0], prompted, frequency_penalty=0.5) == [2.0, -2.5, 1.0, -2.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"presence_penalty": 3}, "presence_penalty is 3"),
        ({"frequency_penalty": -2.5}, "frequency_penalty is -2.5"),
        ({"logit_bias": "word"}, "logit_bias is 'word'"),
        ({"logit_bias": {"5": 1.0}}, "token id of logit_bias is '5'"),
        ({"logit_bias": {5: 101}}, "logit_bias of token 5 is 101"),
    ],
)
def test_penalties_and_biases_out_of_range_are_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(BacoError, match=message):
        SamplingParams(**values)
