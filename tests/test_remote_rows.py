"""The most likely tokens that servers return, and bounds for the rest of a row."""

import asyncio
import math
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from baco import Baco
from baco.backends.remote.client import Patience, _retry_after
from baco.backends.remote.model import Draws, RemoteModel
from baco.backends.remote.table import Table
from baco.backends.remote.view import AnswerRules, DraftSpan, NextSource, RoutingView
from baco.backends.remote.wire import Names, Row
from baco.engine.sequence import Request
from baco.routing.rules import gap
from baco.routing.signals import Distribution, Signals
from baco.sampling.params import SamplingParams
from baco.text.vocabulary import Vocabulary
from tests.remoting import remote
from tests.serving import PROMPT, served

SIZE = 24


def vocabulary(size: int = SIZE) -> Vocabulary:
    no = torch.zeros(size, dtype=torch.bool)
    return Vocabulary(size, torch.zeros(size, dtype=torch.int8), ~no, no, no)


def top_row(row: torch.Tensor, most: int) -> Row:
    """A row of log-probabilities of which a server returns the ``most`` most likely tokens."""
    top = row.topk(most)
    known = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Row(known, min(known.values()) if most < len(row) else -math.inf)


def narrow(row: torch.Tensor, known: dict[int, float]) -> torch.Tensor:
    """The row with the rest of its probability on as few unknown tokens as can hold it."""
    rest, least = row.exp(), math.exp(min(known.values()))
    rest[list(known)] = 0
    left = float(rest.sum())
    filled = torch.zeros_like(row)
    for token in range(SIZE):
        if token not in known:
            filled[token] = min(least, max(0.0, left))
            left -= least
    filled[list(known)] = row[list(known)].exp()
    return filled.log()


def wide(row: torch.Tensor, known: dict[int, float]) -> torch.Tensor:
    """The row with the rest of its probability spread evenly over all unknown tokens."""
    unknown = [token for token in range(SIZE) if token not in known]
    filled = row.clone()
    if unknown:
        filled[unknown] = (row[unknown].exp().sum() / len(unknown)).log()
    return filled


ROWS = st.lists(st.floats(-12, 4), min_size=SIZE, max_size=SIZE)


@given(ROWS, ROWS, st.integers(1, SIZE))
def test_entropies_and_their_differences_lie_between_their_bounds(
    base: list[float], aligned: list[float], most: int
) -> None:
    rows = torch.tensor([base, aligned], dtype=torch.float64).log_softmax(-1)
    base_row, aligned_row = (top_row(row, most) for row in rows)
    bounds = [row.entropy_bounds(SIZE) for row in (base_row, aligned_row)]
    for at, (low, high) in enumerate(bounds):
        real = float(Distribution(rows[at : at + 1]).entropy)
        assert low - 1e-9 <= real <= high + 1e-9
        # Both bounds are reached, so no closer ones are right.
        known = (base_row, aligned_row)[at].known
        for bound, filled in ((low, narrow(rows[at], known)), (high, wide(rows[at], known))):
            assert float(Distribution(filled[None]).entropy) == pytest.approx(bound, abs=2e-4)


@given(ROWS, ROWS, st.integers(1, SIZE), st.floats(-3, 3))
def test_a_difference_of_entropies_is_decided_as_from_whole_rows_or_left_open(
    base: list[float], aligned: list[float], most: int, gamma: float
) -> None:
    rows = torch.tensor([base, aligned], dtype=torch.float64).log_softmax(-1)
    (low, high), (low_aligned, high_aligned) = (
        top_row(row, most).entropy_bounds(SIZE) for row in rows
    )
    # At both ends of what is known of the two.
    ends = [
        Signals(
            Distribution(rows[:1], entropy=torch.tensor([entropy_base])),
            Distribution(rows[1:], entropy=torch.tensor([entropy_aligned])),
            vocabulary(),
        )
        for entropy_base, entropy_aligned in ((low, high_aligned), (high, low_aligned))
    ]
    decisions = {bool(gap(signals, gamma)) for signals in ends}
    whole = bool(gap(Signals(rows[:1], rows[1:], vocabulary()), gamma))
    assert whole in decisions or abs(low - high_aligned - gamma) < 1e-6


def test_a_whole_row_has_exact_bounds() -> None:
    row = torch.randn(SIZE, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    banned = torch.zeros(SIZE, dtype=torch.bool)
    known = top_row(row, SIZE)
    low, high = known.entropy_bounds(SIZE)
    assert low == high == pytest.approx(float(Distribution(row[None]).entropy))
    table = Table(vocabulary(), banned, [known], [known], {0}, whole=True)
    assert torch.equal(table.filled()[0][0], row)


SAID = [1341, 654]
TOPS = [{1341: -0.5, 633: -1.5}, {589: -0.2, 16: -2.0}]


def vllm(name: Any) -> dict[str, Any]:
    # What was said stands beside the most likely ones where it is none of them.
    tops = [TOPS[0], {654: -4.0} | TOPS[1]]
    return {
        "text": "",
        "logprobs": {
            "tokens": [name(token) for token in SAID],
            "token_logprobs": [-0.5, -4.0],
            "top_logprobs": [{name(t): value for t, value in top.items()} for top in tops],
        },
        "finish_reason": "length",
    }


def llama_cpp() -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "token": "?", "bytes": [63], "logprob": logprob}

    content = [
        entry(token, logprob) | {"top_logprobs": [entry(t, value) for t, value in top.items()]}
        for token, logprob, top in zip(SAID, [-0.5, -4.0], TOPS, strict=True)
    ]
    return {"text": "", "logprobs": {"content": content}, "finish_reason": "length"}


def test_every_servers_spelling_is_read_alike(demo: Baco) -> None:
    names = Names(demo.pair)
    spelled = [demo.pair.spelling(token).decode() for token in (1341, 654, 633, 589, 16)]
    texts = dict(zip((1341, 654, 633, 589, 16), spelled, strict=True))
    spellings = [vllm(lambda token: f"token_id:{token}"), vllm(texts.__getitem__), llama_cpp()]
    for choice in spellings:
        reading = names.read(choice, 2)
        assert reading.tokens == SAID
        assert reading.logprobs == [-0.5, -4.0]
        assert reading.rows[0] == Row(TOPS[0], -1.5)
        # The cap is that of the two most likely; the token that was drawn is known below it.
        assert reading.rows[1] == Row({654: -4.0} | TOPS[1], -2.0)
        assert not reading.ended


def test_probability_of_an_ambiguous_token_name_stays_open(demo: Baco) -> None:
    choice = vllm(lambda token: "�" if token in (589, 654) else f"token_id:{token}")
    reading = Names(demo.pair).read(choice | {"finish_reason": "stop"}, 2)
    assert reading.tokens == [1341, None]
    row = reading.rows[1]
    assert row is not None
    assert (row.known, row.cap) == ({16: -2.0}, -0.2)
    assert reading.ended


def test_pauses_grow_and_retry_after_takes_precedence() -> None:
    patience = Patience()
    for attempt, middle in ((1, 0.25), (3, 1.0), (9, 8.0), (5000, 8.0)):
        pauses = {patience.pause_after(attempt, None) for _ in range(50)}
        assert len(pauses) > 1
        assert all(middle / 2 <= pause <= middle * 1.5 for pause in pauses)
    assert patience.pause_after(1, 5.0) == 5.0
    assert patience.pause_after(1, 5000.0) == patience.max_retry_after


def test_retry_after_may_be_seconds_or_a_date() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(hours=10), usegmt=True)
    for value, expected in (("3", 3.0), (later, 36_000.0), ("soon", None), ("", None)):
        seconds = _retry_after(httpx.Response(429, headers={"retry-after": value}))
        assert seconds == (None if expected is None else pytest.approx(expected, rel=0.05))


def span(pair: Any, tokens: list[int], rows: list[Row]) -> DraftSpan:
    return DraftSpan("base", tokens, rows, rows, tokens[0], "aligned", NextSource("base", True), 1)


def test_masked_tokens_are_not_drawn_and_do_not_count_for_min_p(demo: Baco) -> None:
    words, banned = demo.pair.vocabulary, demo.pair.banned
    start = int(words.word_start.nonzero()[-1])
    inside = int((~words.word_start).nonzero()[0])
    special = int(banned.nonzero()[0])
    masked, free = NextSource("base", True), NextSource("base", False)
    for min_p in (0.0, 0.1):
        params = SamplingParams(seed=1, min_p=min_p, logit_bias=((start, 0.0),))
        rules = AnswerRules(
            demo.pair, Request((1,), (1,), params, demo.router("Rand:0.5"), digest=b""), 0
        )
        assert rules.may_write(start, masked)
        assert rules.may_write(inside, free)
        assert not rules.may_write(inside, masked)
        assert not rules.may_write(special, free)
        assert rules.may_write(special, NextSource("aligned", False))

        likelier = [Row({one: -0.5, start: -1.2}, -3.0) for one in (inside, special)]
        for row in likelier:
            # It was drawn from a row cut off below a token that may not be said.
            pen = masked if inside in row.known else free
            assert RoutingView(rules, span(demo.pair, [start], [row])).is_allowed(0, pen) == (
                min_p == 0
            )
        best = Row({start: -0.5, inside: -1.2}, -3.0)
        assert RoutingView(rules, span(demo.pair, [start], [best])).is_allowed(0, masked)
        assert not RoutingView(rules, span(demo.pair, [inside], [best])).is_allowed(0, masked)


@pytest.mark.parametrize("min_p", [0.0, 0.6])
def test_a_second_draw_follows_the_distribution_of_the_rest_of_the_row(
    demo: Baco, min_p: float
) -> None:
    """Even where masked tokens are likelier than all that the server returns."""
    text = list(demo.pair.renderer.render(PROMPT).base_ids)
    row = demo.pair.base.score(text)[-1].log_softmax(-1).masked_fill(demo.pair.banned, -math.inf)
    order = row.argsort(descending=True).tolist()
    refused = {*order[:20], *order[21:24:2]}
    exact = row.clone()
    exact[list(refused)] = -math.inf
    if min_p:
        exact[exact < exact.max() + math.log(min_p)] = -math.inf
    chance = exact.softmax(-1)
    draws = Draws(SamplingParams(min_p=min_p), 0, noise_seed=5)
    known = top_row(row, 20)

    async def drawn(model: RemoteModel) -> list[int]:
        is_allowed = refused.isdisjoint
        tasks = [
            model.draw(text, known, lambda token: is_allowed((token,)), draws, at, 20)
            for at in range(250)
        ]
        return [token for token, _ in await asyncio.gather(*tasks)]

    with served(demo) as server, remote(server.url) as remote_pair:
        backend: Any = remote_pair.backend
        tokens = backend._await(drawn(backend.models["base"]))
    kept = [token for token in range(len(row)) if chance[token] * len(tokens) >= 5]
    counts = [tokens.count(token) for token in kept]
    expected = [float(chance[token]) * len(tokens) for token in kept]
    counts.append(len(tokens) - sum(counts))
    expected.append(len(tokens) - sum(expected))
    if expected[-1] < 0.5:  # min_p leaves few tokens, and these are all of them
        assert counts.pop() == 0
        expected.pop()
        expected = [count * sum(counts) / sum(expected) for count in expected]
    assert chisquare(counts, expected).pvalue > 0.001
