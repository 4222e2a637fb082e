"""Samples of a long prompt share its keys and values, and give the answers of copies."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from baco import Baco
from baco.engine.engine import Engine
from baco.engine.sequence import Request
from baco.kv_cache import shared_prefix as prefixes
from baco.kv_cache.batched import BatchedKVCache
from baco.kv_cache.shared_prefix import PrefixPart, attend_with_prefixes
from tests.fuzzing import budget
from tests.live import needed

ROUTERS = ("P-Punc:0.5", "H:1.5", "Rand:0.5", "Punc", "Base", "Aligned")
TEXT = "The summer is long and the sea is warm, so we walk along the shore of Lisbon. " * 8
Answers = list[tuple[list[int], list[str]]]


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the number of saved tokens from which a prompt is shared."""
    return lambda tokens: monkeypatch.setattr(prefixes, "_MIN_SAVED", tokens)


def decode(baco: Baco, requests: list[Request], **engine: Any) -> tuple[Answers, Engine]:
    """Decode requests that join one by one, each a step after the one before."""
    created = Engine(baco.pair, **engine)
    rows = []
    for request in requests:
        rows += created.add(request)
        created.step()
    while created.busy:
        created.step()
    return [(row.tokens, list(map(str, row.sources))) for row in rows], created


def stores(engine: Engine) -> list[BatchedKVCache]:
    caches = [
        store for store in engine._runner.caches.values() if isinstance(store, BatchedKVCache)
    ]
    assert len(caches) == 2
    return caches


def request(baco: Baco, length: int, router: str, **sampling: Any) -> Request:
    prompt = baco.pair.renderer.render(TEXT[:length])
    params = baco.pair.defaults.updated(sampling)
    return Request(
        prompt.base_ids, prompt.aligned_ids, params, baco.router(router), digest=prompt.digest
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo2", "gemma2"])
@settings(max_examples=budget(10))
@given(
    prompts=st.lists(
        st.tuples(
            st.integers(1, 300), st.sampled_from(ROUTERS), st.integers(1, 4), st.integers(1, 20)
        ),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 2**40),
    rows=st.integers(1, 8),
    speculate=st.booleans(),
)
def test_answers_equal_those_of_copied_prompts(
    loaded_pair: Callable[..., Baco],
    architecture: str,
    prompts: list[tuple[int, str, int, int]],
    seed: int,
    rows: int,
    speculate: bool,
) -> None:
    baco = loaded_pair(architecture, noise=0.3)
    requests = [
        request(baco, length, router, n=n, max_tokens=tokens, seed=seed + index)
        for index, (length, router, n, tokens) in enumerate(prompts)
    ]
    decoded = []
    for saved in (1, 2**40):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prefixes, "_MIN_SAVED", saved)
            decoded.append(decode(baco, requests, max_rows=rows, speculate=speculate)[0])
    assert decoded[0] == decoded[1]


@given(
    own=st.integers(1, 20),
    shared=st.lists(st.integers(1, 40), max_size=3),
    span=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_attention_over_two_parts_equals_attention_over_both_at_once(
    own: int, shared: list[int], span: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)

    def some(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draw)

    rows, heads, width = 2 * len(shared) + 1, 2, 8
    query, keys, values = some(rows, heads, span, width), *some(2, rows, heads, own, width)
    mask = torch.zeros(rows, 1, span, own)
    behind = []
    expected = F.scaled_dot_product_attention(query, keys, values, scale=0.3)
    for index, tokens in enumerate(shared):
        mine = torch.tensor([index, rows - 2 - index])
        before = some(2, heads, tokens, width)
        hidden = some(2 * span, tokens) < 0
        part_mask = torch.zeros(hidden.shape).masked_fill(hidden, -1e30)
        behind.append(PrefixPart(mine, before[0], before[1], part_mask))
        visible = torch.cat((~hidden, torch.ones(2 * span, own, dtype=torch.bool)), dim=1)
        whole_keys, whole_values = (
            torch.cat((part.expand(2, -1, -1, -1), table[mine]), dim=2)
            for part, table in zip(before, (keys, values), strict=True)
        )
        expected[mine] = F.scaled_dot_product_attention(
            query[mine], whole_keys, whole_values, visible.view(2, 1, span, -1), scale=0.3
        )
    attended = attend_with_prefixes(query, keys, values, mask, 0.3, behind)
    torch.testing.assert_close(attended, expected, rtol=1e-4, atol=1e-5)


def test_a_prompt_is_copied_if_that_costs_less(
    loaded_pair: Callable[..., Baco], saved: Callable[[int], None]
) -> None:
    baco = loaded_pair("llama", noise=0.3)
    long_request = request(baco, 300, "Rand:0.5", n=4, max_tokens=30, seed=1)
    before = 3 * (len(long_request.base_ids) - 1)
    for least, together in ((before, True), (before + 1, False)):
        saved(least)
        engine = Engine(baco.pair)
        engine.add(long_request)
        while not engine.running:
            engine.step()
        (store, _) = stores(engine)
        assert (store.cache.columns < len(long_request.base_ids)) is together


def held(engine: Engine) -> int:
    """Bytes of all keys and values: of rows, and of the prompts that they share."""
    caches = {id(store.cache): store.cache for store in stores(engine)}
    for store in stores(engine):
        caches |= {id(prefix.cache): prefix.cache for prefix in store._shared if prefix}
    layers = [layer for cache in caches.values() for layer in cache.layers]
    return sum(table.nbytes for layer in layers for table in (layer.keys, layer.values))


def test_more_samples_fit_into_the_same_memory(
    loaded_pair: Callable[..., Baco], saved: Callable[[int], None]
) -> None:
    baco = loaded_pair("llama", noise=0.3)
    long_request = request(baco, 500, "Rand:0.5", n=12, max_tokens=8, seed=1)
    saved(2**40)
    memory = needed(Engine(baco.pair), long_request, 3)
    running = []
    for least in (2**40, 1):
        saved(least)
        engine = Engine(baco.pair, memory=memory)
        engine.add(long_request)
        while not engine.running:
            engine.step()
        running.append(engine.running)
        assert held(engine) <= memory
    assert running[0] == 3
    assert running[1] > 5


def test_shared_prompts_count_while_any_of_their_samples_runs(
    loaded_pair: Callable[..., Baco], saved: Callable[[int], None]
) -> None:
    baco = loaded_pair("llama", noise=0.3)
    first, second = (
        request(baco, 400, "Rand:0.5", n=2, max_tokens=40, seed=seed) for seed in (1, 2)
    )
    saved(1)
    memory = needed(Engine(baco.pair), first, 3)
    engine = Engine(baco.pair, memory=memory)
    rows = [*engine.add(first), *engine.add(second)]
    while engine.busy:
        engine.step()
        assert held(engine) <= memory
    assert all(row.finish_reason for row in rows)
