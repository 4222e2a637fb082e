"""Speculative decoding changes only how often the models run."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baco import Baco
from baco.decoder import Decoder
from baco.engine.engine import Engine
from baco.engine.isolation import IsolatingEngine
from baco.engine.speculative.acceptance import AcceptanceStats
from baco.engine.speculative.cost_model import NO_DRAFT, Cost, DraftPlanner, Plan
from baco.engine.speculative.ngram import NgramTable
from baco.engine.speculative.self_draft import SelfDraft
from baco.source import Source
from tests.fuzzing import budget
from tests.pairs import ARCHITECTURES

PROMPTS = ["What do you recommend for a rainy day?", "Plan a walk.", "Where should I go?"]
ROUTERS = ("P:0.5", "H:1.5", "P-Punc:0.7", "P-FC:0.6", "Gap:0", "Rand:0.5", "Nudging:0.5", "Punc")
Drawn = list[tuple[list[int], list[str]]]  # tokens and sources of each sample


@pytest.fixture(scope="module")
def pairs(loaded_pair: Callable[..., Baco]) -> Callable[[str], Baco]:
    return partial(loaded_pair, noise=0.1)


def answers(decoder: Decoder) -> dict[int, Drawn]:
    """Tokens and sources of every sample, by ticket."""
    samples: dict[int, dict[int, Any]] = {}
    for chunk in chunks(decoder):
        if chunk.completion is not None:
            drawn = (list(chunk.completion.token_ids), list(chunk.completion.sources))
            samples.setdefault(chunk.prompt, {})[chunk.sample] = drawn
    return {ticket: [row[index] for index in sorted(row)] for ticket, row in samples.items()}


def decode(baco: Baco, routers: list[str], *, speculate: bool, **sampling: Any) -> dict[int, Drawn]:
    decoder = Decoder(baco.pair, Engine(baco.pair, speculate=speculate))
    for prompt, router in zip(PROMPTS, routers, strict=True):
        decoder.submit(prompt, router=baco.router(router), **sampling)
    return answers(decoder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=budget(12))
@given(
    routers=st.lists(st.sampled_from(ROUTERS), min_size=3, max_size=3),
    seed=st.integers(0, 2**40),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
)
def test_answers_are_the_same_with_and_without_drafts(
    pairs: Callable[[str], Baco],
    architecture: str,
    routers: list[str],
    seed: int,
    temperature: float,
) -> None:
    sampling = {"n": 2, "seed": seed, "temperature": temperature, "max_tokens": 24}
    baco = pairs(architecture)
    drafted = decode(baco, routers, speculate=True, **sampling)
    assert drafted == decode(baco, routers, speculate=False, **sampling)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bonus_tokens_change_no_answer_whether_accepted_or_not(
    pairs: Callable[[str], Baco], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted: list[bool] = []
    monkeypatch.setattr(AcceptanceStats, "update_bonus", lambda _, right: accepted.append(right))
    monkeypatch.setattr(DraftPlanner, "plan", lambda *_: Plan("aligned", 2))
    monkeypatch.setattr(DraftPlanner, "next_token_pays", lambda _, run, __: len(run.tokens) < 2)
    monkeypatch.setattr(DraftPlanner, "bonus_pays", lambda *_: True)
    baco = pairs(architecture)

    def decoded(*, speculate: bool) -> list[float]:
        logprobs: dict[tuple[int, int], list[float]] = {}
        for seed in range(8):
            decoder = Decoder(baco.pair, Engine(baco.pair, speculate=speculate))
            sampling: dict[str, Any] = {"n": 1 + seed % 2, "seed": seed, "max_tokens": 32}
            decoder.submit(PROMPTS[0], router=baco.router("Rand:0.3"), **sampling)
            for chunk in chunks(decoder):
                if chunk.completion is not None:
                    logprobs[seed, chunk.sample] = list(chunk.completion.logprobs)
        return [value for key in sorted(logprobs) for value in logprobs[key]]

    assert decoded(speculate=True) == pytest.approx(decoded(speculate=False), abs=1e-3)
    assert set(accepted) == {True, False}


def test_penalties_and_biases_count_draft_tokens(pairs: Callable[[str], Baco]) -> None:
    sampling: dict[str, Any] = {
        "n": 3,
        "seed": 5,
        "max_tokens": 32,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "logit_bias": {40: 2.0, 41: -100.0},
    }
    routers = ["P:0.5", "Rand:0.5", "P-Punc:0.7"]
    baco = pairs("llama")
    drafted = decode(baco, routers, speculate=True, **sampling)
    assert drafted == decode(baco, routers, speculate=False, **sampling)
    assert not any(41 in tokens for rows in drafted.values() for tokens, _ in rows)


def test_requests_of_different_routers_share_a_batch_and_answer_as_alone(demo: Baco) -> None:
    spellings = ["P-Punc:0.4", "Aligned", "Base"]
    together = decode(demo, spellings, speculate=True, n=2, seed=3)
    for at, spelling in enumerate(spellings):
        alone = demo.generate(PROMPTS[at], router=spelling, n=2, seed=3)
        assert together[at] == [(list(c.token_ids), list(c.sources)) for c in alone]


def test_drafts_save_steps_and_half_of_them_are_accepted(demo: Baco) -> None:
    decoder = demo.decoder()
    for seed in range(3):
        decoder.submit(
            "Recommend a summer destination", router=demo.router("P-Punc:0.15"), n=4, seed=seed
        )
    longest = max(len(tokens) for rows in answers(decoder).values() for tokens, _ in rows)
    assert isinstance(decoder.engine, IsolatingEngine)
    stats = decoder.engine.stats
    assert stats.steps < 0.6 * longest
    assert stats.accepted > 0.5 * stats.drafted > 0


def test_bonus_tokens_save_forwards_of_the_drafter(
    demo: Baco, monkeypatch: pytest.MonkeyPatch
) -> None:
    def aligned_forwards() -> tuple[int, list[Drawn]]:
        decoder = demo.decoder()
        drawn: list[Drawn] = []
        for seed in range(4):
            decoder.submit("Tell me a story", router=demo.router("P-Punc:0.4"), seed=seed)
            drawn += answers(decoder).values()
        assert isinstance(decoder.engine, IsolatingEngine)
        return decoder.engine.stats.forwards["aligned"], drawn

    with_bonus, drawn = aligned_forwards()
    monkeypatch.setattr(DraftPlanner, "bonus_pays", lambda *_: False)
    without_bonus, same = aligned_forwards()
    assert drawn == same
    assert with_bonus < 0.95 * without_bonus


def test_a_model_that_cannot_matter_does_not_run(demo: Baco) -> None:
    decoder = demo.decoder()
    decoder.submit(PROMPTS[0], router=demo.router("Aligned"), n=2, seed=1)
    answers(decoder)
    assert isinstance(decoder.engine, IsolatingEngine)
    assert decoder.engine.stats.forwards["base"] == 0


def test_a_model_runs_only_if_its_logits_are_needed(demo: Baco) -> None:
    engine = Engine(demo.pair, speculate=False)
    decoder = Decoder(demo.pair, engine)
    for seed in range(4):
        decoder.submit(PROMPTS[0], router=demo.router("P:0.6"), seed=seed)
        answers(decoder)
    forwards = engine.stats.forwards["aligned"] - 4  # without the prompts
    assert engine.stats.tokens["base"] > 0.2 * engine.stats.steps
    assert forwards < 0.95 * engine.stats.steps


def chunks(decoder: Decoder) -> Iterator[Any]:
    while decoder.busy:
        yield from decoder.step()


def test_explain_records_the_routers_signals(demo: Baco) -> None:
    decoder = demo.decoder()
    decoder.submit(PROMPTS[0], router=demo.router("P:0.4"), seed=1, explain=True)
    tokens = [token for chunk in chunks(decoder) for token in chunk.tokens]
    assert {token.source for token in tokens} == {"base", "aligned"}
    before = None
    for token in tokens:
        assert token.why is not None
        own = token.why.base_logprob if token.source == "base" else token.why.aligned_logprob
        assert own == pytest.approx(token.logprob, abs=1e-4)
        assert token.why.wanted == ("base" if token.why.max_base < 0.4 else "aligned")
        assert token.source == (token.why.wanted if token.why.asked else before)
        before = token.source


def test_a_cancelled_request_changes_no_other_answer(demo: Baco) -> None:
    decoder = demo.decoder()
    first = decoder.submit(PROMPTS[0], router=demo.router("P-Punc:0.4"), n=3, seed=1)
    second = decoder.submit(PROMPTS[1], router=demo.router("P-Punc:0.4"), n=2, seed=1)
    decoder.step()
    decoder.cancel(first)
    alone = demo.generate(PROMPTS[1], router="P-Punc:0.4", n=2, seed=1)
    assert answers(decoder) == {second: [(list(c.token_ids), list(c.sources)) for c in alone]}
    assert decoder.running == decoder.waiting == 0


def test_ngrams_draft_the_tokens_that_followed_before() -> None:
    table = NgramTable()
    table.add([1, 2, 3, 4, 5], 5)
    silent = lambda ahead, token: 0.0  # noqa: E731
    assert table.draft([9, 2, 3], 8, silent, 1.0) == [4, 5]
    assert table.draft([9, 9], 8, silent, 1.0) == []
    table.add([2, 3, 7], 3)
    table.add([2, 3, 7], 3)
    assert table.draft([9, 2, 3], 1, silent, 0.0) == [7]
    assert table.draft([9, 2, 3], 1, lambda ahead, token: 5.0 * (token == 4), 1.0) == [4]


def test_the_planner_drafts_only_if_it_pays() -> None:
    costs = {"base": Cost(1.0, 0.05), "aligned": Cost(1.0, 0.05)}
    planner = DraftPlanner(costs, Cost(0.1, 0.0), 0.05)
    high, low = AcceptanceStats(0.9), AcceptanceStats(0.02)
    for stats, rate in ((high, 0.95), (low, 0.05)):
        stats.by_drafter = dict.fromkeys(stats.by_drafter, rate)
    both: tuple[Source, ...] = ("base", "aligned")
    room = {"base": 100, "aligned": 100}
    assert planner.plan([low], [4], both, 0.1, room).num_tokens == 0
    assert planner.plan([high], [8], both, 0.1, room).num_tokens > 3
    ahead = planner.plan([high], [0], both, 0.9, room)
    assert (ahead.drafter, ahead.num_tokens > 2) == ("base", True)
    # Forced tokens are always accepted. Those of one row do not pay beside many other rows.
    assert planner.plan([low], [0], both, 0.1, room, [6]) == Plan(None, 6)
    assert planner.plan([low] * 9, [0] * 9, both, 0.1, room, [6] * 9) == Plan(None, 6)
    assert planner.plan([low] * 64, [0] * 64, both, 0.1, room, [6] + [0] * 63) == NO_DRAFT
    assert planner.plan([high] * 9, [0] * 9, both, 0.1, room, [2] + [0] * 8).drafter == "aligned"
    # Where one of the two has room for no more than two drafts, no more are made.
    assert planner.plan([high], [0], both, 0.9, room | {"aligned": 2}).num_tokens == 2


@pytest.mark.parametrize(("rows", "every"), [(1, 1), (16, 5)])
def test_planning_pauses_longer_with_more_rows_when_no_draft_pays(
    demo: Baco, monkeypatch: pytest.MonkeyPatch, rows: int, every: int
) -> None:
    planned: list[int] = []

    def plan(_: DraftPlanner, stats: list[AcceptanceStats], *__: Any) -> Plan:
        planned.append(len(stats))
        return NO_DRAFT

    monkeypatch.setattr(DraftPlanner, "plan", plan)
    decoder = demo.decoder()
    endless = dict.fromkeys(demo.pair.end_ids, -100.0)
    router = demo.router("P-Punc:0.4")
    decoder.submit(PROMPTS[0], router=router, n=rows, seed=1, max_tokens=30, logit_bias=endless)
    answers(decoder)
    assert planned == [rows] * (30 // every)


def test_self_drafting_stops_at_low_confidence() -> None:
    costs = {"base": Cost(1.0, 0.05), "aligned": Cost(1.0, 0.05)}
    planner = DraftPlanner(costs, Cost(0.1, 0.0), 0.05)
    models: tuple[Source, ...] = ("base", "aligned")

    def run(acceptance: list[float], expected_tokens: float, tokens: int) -> SelfDraft:
        draft = SelfDraft("aligned", [AcceptanceStats() for _ in acceptance], True)
        draft.acceptance, draft.expected_tokens = acceptance, expected_tokens
        draft.tokens = [torch.empty(0)] * tokens
        return draft

    assert planner.next_token_pays(run([0.99], 1.99, 2), models)
    assert not planner.next_token_pays(run([0.3], 1.99, 2), models)
    assert planner.next_token_pays(run([0.99, 0.9, 0.3], 3.0, 1), models)
    # A bonus token pays where all draft tokens are likely to be accepted.
    assert planner.bonus_pays(run([0.9], 1.9, 2), "base")
    assert not planner.bonus_pays(run([0.1], 1.9, 2), "base")
    assert not planner.bonus_pays(run([0.9] * 8, 15.0, 2), "base")


def test_acceptance_is_tracked_per_confidence_bucket() -> None:
    stats = AcceptanceStats()
    for _ in range(40):
        stats.update_self_draft(
            "aligned", 1, 3, [0.999, 0.3, 0.999]
        )  # what follows a miss says nothing
    assert stats.probability("aligned", 0.999) > 0.95
    assert stats.probability("aligned", 0.3) < 0.1
    assert stats.probability("base", 0.3) == AcceptanceStats().probability("base", 0.3)
