"""Models of a pair that share their weights are read in one forward, and answer as in two."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baco import Baco
from baco.engine.engine import Engine
from baco.engine.sequence import Request
from baco.engine.speculative.acceptance import AcceptanceStats
from baco.engine.speculative.cost_model import NO_DRAFT, Cost, DraftPlanner
from baco.kv_cache import shared_prefix as prefixes
from baco.kv_cache.batched import BatchedKVCache
from baco.kv_cache.protocol import finish
from baco.models.forward.adapted import AdaptedForward
from baco.models.joint import JointForward
from baco.models.pair import Pair
from tests.fuzzing import budget
from tests.live import LiveStorages, cache_tables, needed
from tests.pairs import PairFolder, save_adapter
from tests.test_engine import reference, rules, tokens_and_sources, without_turn_cut
from tests.test_shared_prefix import TEXT, request

ROUTERS = ("P:0.3", "H:2", "Rand:0.5", "P-Punc:0.5", "Base", "Aligned")
# The own forward; and that of transformers, which reads weights that were not laid out.
ARCHITECTURES = {"own": ("llama", True), "of transformers": ("qwen3", False)}
SHARED = ("two prompts", "adapter")
KINDS = tuple(product(ARCHITECTURES, SHARED))
Answers = list[tuple[list[int], list[str]]]


@pytest.fixture(scope="module")
def load(
    random_pair: Callable[..., PairFolder], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Baco]:
    loaded: dict[tuple[str, str], Baco] = {}

    def load(forward: str = "own", shared: str = "two prompts") -> Baco:
        if (forward, shared) in loaded:
            return loaded[forward, shared]
        architecture, packed = ARCHITECTURES[forward]
        folder = random_pair(architecture, noise=0.3)
        if shared == "adapter":
            models = save_adapter(folder, tmp_path_factory.mktemp("adapter"))
        else:
            models = {"base": str(folder.aligned), "aligned": str(folder.aligned)}
        baco = Baco.load(**models, dtype="float32", packed=packed)
        own = "BACo's own forward" if packed else "the forward of transformers"
        assert all(model.path.startswith(own) for model in (baco.pair.base, baco.pair.aligned))
        return loaded.setdefault((forward, shared), baco)

    return load


@pytest.fixture
def ledger() -> Iterator[LiveStorages]:
    with cache_tables() as log:
        yield log


def separate(pair: Pair) -> Pair:
    """The same pair with a forward for each model."""
    apart = replace(pair)
    apart.__dict__["joint"] = "told so by a test"
    return apart


def decode(pair: Pair, requests: list[Request], **options: Any) -> tuple[Answers, Engine]:
    """Requests that join one after the other, each a step after the one before."""
    engine = Engine(pair, **options)
    rows = []
    for each in requests:
        rows += engine.add(each)
        engine.step()
    while engine.busy:
        engine.step()
    return [(row.tokens, list(map(str, row.sources))) for row in rows], engine


@pytest.mark.parametrize(("forward", "shared"), KINDS)
@settings(max_examples=budget(10))
@given(
    asked=st.lists(
        st.tuples(
            st.integers(1, 200),
            st.sampled_from(ROUTERS),
            st.sampled_from((1, 2, 8)),
            st.integers(1, 20),
            st.sampled_from((0.0, 1.0)),
        ),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 2**40),
    rows=st.integers(1, 12),
    speculate=st.booleans(),
    saved=st.sampled_from((1, 2**40)),
)
def test_answers_are_those_of_two_forwards(
    load: Callable[..., Baco],
    forward: str,
    shared: str,
    asked: list[tuple[int, str, int, int, float]],
    seed: int,
    rows: int,
    speculate: bool,
    saved: int,
) -> None:
    baco = load(forward, shared)
    requests = [
        request(baco, length, router, n=n, max_tokens=most, temperature=warmth, seed=seed + index)
        for index, (length, router, n, most, warmth) in enumerate(asked)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "_MIN_SAVED", saved)  # prompts are shared, or copied
        answers, engine = decode(baco.pair, requests, max_rows=rows, speculate=speculate)
        expected, _ = decode(separate(baco.pair), requests, max_rows=rows, speculate=False)
    assert answers == expected
    assert engine._runner.caches["base"].cache is engine._runner.caches["aligned"].cache  # type: ignore[attr-defined]


@pytest.mark.parametrize(("forward", "shared"), KINDS)
def test_a_naive_loop_over_both_prompts_gives_the_same_answers(
    load: Callable[..., Baco], forward: str, shared: str
) -> None:
    baco = without_turn_cut(load(forward, shared))
    sources: set[str] = set()
    for spelling, rule in list(rules(baco.pair).items())[::3]:
        for temperature in (0.0, 1.0):
            options: dict[str, Any] = {"seed": 7, "temperature": temperature, "max_tokens": 10}
            answers = baco.generate(TEXT[:40], router=spelling, n=2, **options)
            expected = reference(baco, TEXT[:40], rule, sample=1, **options)
            assert tokens_and_sources(answers[1]) == expected, (spelling, temperature)
            sources |= set(map(str, answers[1].sources))
    assert sources == {"base", "aligned"}


def test_a_step_reads_the_weights_once(load: Callable[..., Baco]) -> None:
    baco = load()
    joint = baco.pair.joint
    assert isinstance(joint, JointForward)
    sizes: list[tuple[int, int]] = []

    def counted(tokens: Any, cache: Any, keep: int) -> Any:
        sizes.append((cache.plan.split, len(tokens)))
        return joint.forward(tokens, cache, keep)

    pair = replace(baco.pair)
    pair.__dict__["joint"] = replace(joint, forward=counted)
    bias = dict.fromkeys(pair.end_ids, -100.0)
    asked = [request(baco, 40, "P:0.3", n=3, seed=1, max_tokens=12, logit_bias=bias)]
    _, engine = decode(pair, asked, speculate=False)
    assert sizes == [(3, 6)] * 12
    prompt = {name: len(asked[0].ids(name)) - 1 for name in ("base", "aligned")}
    chunks = {name: math.ceil(length / 64) for name, length in prompt.items()}
    assert engine.stats.forwards == {name: count + 12 for name, count in chunks.items()}


def test_no_model_runs_ahead_of_the_other_where_one_forward_reads_both() -> None:
    plans = []
    for joint in (True, False):
        cost, overhead = Cost(1.0, 0.01), Cost(0.01, 0.001)
        planner = DraftPlanner({"base": cost, "aligned": cost}, overhead, 0.001, joint)
        room = {"base": 16, "aligned": 16}
        rows = [AcceptanceStats() for _ in range(2)]
        plans.append(planner.plan(rows, [0, 0], ["base", "aligned"], 0.3, room))
    assert plans[0] == NO_DRAFT
    assert plans[1].drafter == "aligned"


def test_memory_that_is_counted_is_what_both_models_take(
    load: Callable[..., Baco], ledger: LiveStorages
) -> None:
    baco = load()
    asked = [request(baco, length, "Rand:0.5", n=3, max_tokens=30) for length in (200, 8, 90)]
    limit = needed(Engine(baco.pair), asked[0], 4)
    ledger.peak = 0
    answers, engine = decode(baco.pair, asked, memory=limit, speculate=False)
    assert 0 < ledger.peak <= limit
    assert not ledger.alive  # an empty batch holds nothing
    assert answers == decode(separate(baco.pair), asked)[0]
    assert engine._runner.allocated_bytes() == {"base": 0, "aligned": 0}


def test_rows_that_left_take_no_room_in_longer_tables(load: Callable[..., Baco]) -> None:
    baco = load()
    engine = Engine(baco.pair)
    engine.add(request(baco, 8, "Rand:0.5", n=20, max_tokens=4))
    engine.add(request(baco, 8, "Rand:0.5", n=1, max_tokens=90))
    sizes = []
    while engine.busy:
        engine.step()
        cache = engine._runner.caches["base"]
        assert isinstance(cache, BatchedKVCache)
        sizes.append((cache.cache.rows, cache.cache.columns))
    assert max(rows for rows, columns in sizes if columns > 64) == 2


def test_damaged_logits_end_only_their_own_rows(random_pair: Callable[..., PairFolder]) -> None:
    model = str(random_pair("llama", noise=0.3).aligned)
    good, bad = "Plan a walk.", "Where is the Zoo of the town?"
    options: dict[str, Any] = {"dtype": "float32"}
    healthy, baco = (Baco.load(base=model, aligned=model, **options) for _ in range(2))
    assert not isinstance(baco.pair.joint, str)
    prompts = [baco.pair.renderer.render(prompt) for prompt in (good, bad)]
    token = min({*prompts[1].base_ids} - {*prompts[0].base_ids, *prompts[0].aligned_ids})
    embedding = baco.pair.base.model.get_input_embeddings()
    embed = embedding.forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = embed(ids)
        return hidden.masked_fill((ids == token)[..., None], math.nan)

    embedding.forward = forward
    sampling: dict[str, Any] = {"router": "P:0.5", "n": 3, "seed": 1, "max_tokens": 12}
    sampling["logit_bias"] = {token: -100.0}
    expected = healthy.generate(good, **sampling)
    for rows in (2, 256):
        baco.max_rows = rows
        first, broken, last = baco.generate_batch([good, bad, good], **sampling)
        assert [tokens_and_sources(one) for one in first] == [
            tokens_and_sources(one) for one in last
        ]
        assert [tokens_and_sources(one) for one in first] == [
            tokens_and_sources(one) for one in expected
        ]
        assert [one.finish_reason for one in broken] == ["error"] * 3


ADAPTERS: dict[str, dict[str, Any]] = {
    "all layers": {},
    "some layers": {"target_modules": ["k_proj", "down_proj"]},
    "other ranks and scales": {
        "rank_pattern": {"q_proj": 2, "gate_proj": 8},
        "alpha_pattern": {"v_proj": 32},
    },
    "scaled by the root of the rank": {"use_rslora": True, "lora_alpha": 3},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_own_forward_computes_what_peft_computes(
    random_pair: Callable[..., PairFolder], tmp_path: Path, kind: str
) -> None:
    models = save_adapter(random_pair("llama", noise=0.3), tmp_path, **ADAPTERS[kind])
    pair = Baco.load(**models, dtype="float32").pair
    ids = list(range(3, 40))
    for model in (pair.base, pair.aligned):
        cache = model.new_cache()
        cache.copy_prefix(finish(cache.prefill(ids[:-3])), 1)
        logits = model.to_common_vocab(cache.extend(torch.tensor([ids[-3:]]), [3], 3))[0]
        assert torch.allclose(logits, model.score(ids)[-3:], atol=1e-3)
    assert (pair.base.score(ids) - pair.aligned.score(ids)).abs().max() > 0.1
    assert isinstance(pair.joint, JointForward)
    assert isinstance(pair.joint.forward, AdaptedForward)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "normed weights": ({"use_dora": True}, "is not of plain low-rank products"),
    "biases": ({"lora_bias": True}, "is not of plain low-rank products"),
    "head of its own": ({"modules_to_save": ["lm_head"]}, "brings embeddings or layers"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "is not of plain low-rank"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_an_adapter_that_cannot_be_mixed_is_read_in_two_forwards(
    random_pair: Callable[..., PairFolder], tmp_path: Path, kind: str
) -> None:
    options, reason = OTHERS[kind]
    baco = Baco.load(
        **save_adapter(random_pair("llama", noise=0.3), tmp_path, **options), dtype="float32"
    )
    assert isinstance(baco.pair.joint, str)
    assert reason in baco.pair.joint
    assert reason in baco.pair.aligned.path
    assert all(one.error is None for one in baco.generate("Plan a walk.", n=2, max_tokens=4))


def test_an_adapter_of_the_head_is_mixed_by_peft(
    random_pair: Callable[..., PairFolder], tmp_path: Path
) -> None:
    options = {"target_modules": ["q_proj", "lm_head"]}
    baco = Baco.load(
        **save_adapter(random_pair("llama", noise=0.3), tmp_path, **options), dtype="float32"
    )
    assert "changes embeddings or the head" in baco.pair.aligned.path
    assert not isinstance(baco.pair.joint, str)
    asked = [request(baco, 40, "Rand:0.5", n=3, seed=1, max_tokens=12)]
    assert decode(baco.pair, asked)[0] == decode(separate(baco.pair), asked)[0]
