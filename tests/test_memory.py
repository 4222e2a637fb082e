"""Cached keys and values stay within the memory limit and take no more than the answers need."""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from baco import Baco, BacoError
from baco.cli import run
from baco.engine.budget import cache_bytes
from baco.engine.engine import Engine
from baco.engine.scoring import Scoring
from baco.engine.sequence import Request, SequenceState
from baco.kv_cache.batched import CPU_CHUNK, BatchedKVCache
from baco.kv_cache.protocol import finish
from baco.kv_cache.slots import ForwardPlan, columns_for
from baco.models.caches.per_row import PerRowKVCache, tensor_bytes
from baco.models.forward.packed_linear import weights
from baco.models.model import PairModel
from baco.models.pair import lay_out
from tests.fuzzing import budget
from tests.live import (
    LiveStorages,
    cache_tables,
    most_allocated,
    needed,
    record_positions,
    step_bytes,
)
from tests.pairs import ARCHITECTURES, PairFolder
from tests.test_architectures import PLAIN, ROLLED_BACK, SHAPE

CPU = torch.device("cpu")
PROMPT = "What do you recommend for a rainy day?"


@pytest.fixture
def live() -> Iterator[LiveStorages]:
    with cache_tables() as log:
        yield log


@pytest.fixture(scope="module")
def llama(loaded_pair: Callable[..., Baco]) -> Baco:
    return loaded_pair("llama", noise=0.3)


@pytest.fixture(scope="module")
def deep(random_pair: Callable[..., PairFolder], tmp_path_factory: pytest.TempPathFactory) -> Baco:
    """A pair of twelve layers and a context window of 4,096 tokens."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("deep")
    tokens = random_pair("llama", noise=0.3)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    for seed, model in enumerate(("base", "aligned")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / model)
        AutoTokenizer.from_pretrained(getattr(tokens, model)).save_pretrained(folder / model)
    return Baco.load(str(folder), dtype="float32")


def request(baco: Baco, prompt: str = PROMPT, explain: bool = False, **sampling: Any) -> Request:
    rendered = baco.pair.renderer.render(prompt)
    params = baco.pair.defaults.updated({"seed": 1, **sampling})
    return Request(
        rendered.base_ids,
        rendered.aligned_ids,
        params,
        baco.router("Rand:0.5"),
        explain=explain,
        digest=rendered.digest,
    )


def run_out(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def test_a_setting_is_bytes_a_size_or_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_bytes(1000, [CPU]) == cache_bytes("1000", [CPU]) == cache_bytes("1kB", [CPU])
    assert cache_bytes("2GiB", [CPU]) == cache_bytes(" 2 gib", [CPU]) == 2 * 2**30
    assert cache_bytes("1.5MB", [CPU]) == 1_500_000
    # Of what is free, which other programs change.
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    for setting in (0.5, "0.5", "50%"):
        assert cache_bytes(setting, [CPU]) == 5000
    assert cache_bytes(None, [CPU]) == 6000


@pytest.mark.parametrize(
    "setting", ["much", "2 parsecs", "-1", "0", "0%", "120%", 0, 1.5, -3, math.nan, True]
)
def test_an_invalid_memory_limit_is_refused_before_loading(setting: Any) -> None:
    with pytest.raises(BacoError, match="give bytes, a size as in 2GiB, or a share"):
        Baco.load("demo", memory=setting)


def test_the_command_line_takes_the_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", PROMPT, "--memory", "a lot"]) == 2
    assert "memory is 'a lot'" in capsys.readouterr().err
    assert run(["generate", PROMPT, "--memory", "10kB"]) == 2
    assert "raise memory" in capsys.readouterr().err.replace("\n", " ")
    assert run(["generate", PROMPT, "--memory", "64MiB", "--max-tokens", "4"]) == 0


def test_a_prompt_is_read_once_for_all_samples_and_memory_fits_their_need(
    deep: Baco, live: LiveStorages
) -> None:
    engine = Engine(deep.pair)
    each = {name: model.row_size.per_token for name, model in engine._runner.models.items()}
    long_request = request(deep, "sea " * 1990, n=32, max_tokens=240)
    tokens = {name: len(long_request.ids(name)) for name in each}
    assert min(tokens.values()) >= 1990
    live.peak = 0
    sequences = engine.add(long_request)
    pieces = {name: math.ceil((count - 1) / CPU_CHUNK) for name, count in tokens.items()}
    with torch.inference_mode():
        while not engine.running:
            engine._scheduler.schedule()
    assert engine.running == 32
    assert engine.stats.forwards == pieces
    run_out(engine)
    generated = sum(len(sequence.tokens) for sequence in sequences)
    needed = sum(each[name] * (tokens[name] + generated) for name in each)
    models = (deep.pair.base, deep.pair.aligned)
    held = sum(stored for model in models for *_, stored in weights(model.model))
    assert needed > 8 * 2**20
    assert live.peak + held <= 1.1 * (needed + held)


def test_an_empty_batch_holds_no_memory(llama: Baco, live: LiveStorages) -> None:
    engine = Engine(llama.pair)
    for sequence in engine.add(request(llama, n=4, max_tokens=40)):
        engine.step()
        engine.stop(sequence, len(sequence.tokens))
    run_out(engine)
    assert live.peak > 0
    assert not live.alive


def test_sequences_beyond_memory_wait_in_order(llama: Baco, live: LiveStorages) -> None:
    memory = needed(Engine(llama.pair), request(llama, max_tokens=40), 3)
    engine = Engine(llama.pair, memory=memory)
    live.peak = 0
    requests = [request(llama, n=n, max_tokens=40, seed=n) for n in (2, 3, 1, 2)]
    sequences = [sequence for each in requests for sequence in engine.add(each)]
    joined: list[SequenceState] = []
    while engine.busy:
        joined += [s for s in engine.step() if s not in joined]
        assert engine.running <= 3
    assert joined == sequences
    assert live.peak <= memory
    generous = Engine(llama.pair, memory="1GiB")
    free = [sequence for each in requests for sequence in generous.add(each)]
    run_out(generous)
    assert [s.tokens for s in sequences] == [s.tokens for s in free]


def test_a_long_answer_after_many_short_ones_takes_no_more_than_either(llama: Baco) -> None:
    engine = Engine(llama.pair)
    engine.add(request(llama, n=40, max_tokens=4))
    engine.add(request(llama, n=2, max_tokens=100))
    held: dict[str, list[tuple[int, int]]] = {"base": [], "aligned": []}
    while engine.busy:
        engine.step()
        for name, sizes in held.items():
            store = engine._runner.caches[name]
            assert isinstance(store, BatchedKVCache)
            sizes.append((store.cache.rows, store.cache.columns))
    for sizes in held.values():
        assert max(columns for rows, columns in sizes if rows == 42) == 48
        assert max(rows for rows, columns in sizes if columns > 48) == 2
        assert sizes[-1] == (0, 0)


@given(columns=st.integers(1, 100_000), more=st.integers(0, 100))
def test_at_most_an_eighth_of_the_columns_is_unused(columns: int, more: int) -> None:
    allocated = columns_for(columns)
    assert columns <= allocated <= max(columns + 15, columns * 9 / 8)
    assert columns_for(columns + more) >= allocated


def test_growing_column_by_column_copies_each_column_a_few_times() -> None:
    sizes = sorted({columns_for(columns) for columns in range(1, 10_000)})
    assert sum(sizes[:-1]) <= 16 * sizes[-1]


@given(
    rows=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 200)), min_size=1, max_size=5),
    padding=st.integers(0, 20),
)
def test_padding_takes_one_column_that_no_row_attends_to(
    rows: list[tuple[int, int]], padding: int
) -> None:
    lengths, counts = (list(column) for column in zip(*rows, strict=True))
    span = max(counts) + padding
    plan = ForwardPlan.of(lengths, counts, span)
    longest = max(length + count for length, count in rows)
    assert plan.width <= longest + 1
    for (length, count), columns in zip(rows, plan.columns.tolist(), strict=True):
        assert columns[span - count :] == list(range(length, length + count))
        assert set(columns[: span - count]) <= {longest}


def test_an_answer_that_memory_cannot_hold_is_refused_with_both_figures(llama: Baco) -> None:
    engine = Engine(llama.pair, memory=1000)
    with pytest.raises(BacoError, match=r"need \d+\.\d MiB of cache and memory is 0\.0 MiB"):
        engine.add(request(llama))


def test_an_answer_that_memory_cannot_hold_hurts_no_other(llama: Baco) -> None:
    small, large = request(llama, max_tokens=4), request(llama, max_tokens=200)
    engine = Engine(llama.pair, memory=needed(Engine(llama.pair), small, 1))
    [answer] = engine.add(small)
    with pytest.raises(BacoError, match="raise memory"):
        engine.add(large)
    run_out(engine)
    assert answer.finish_reason


def test_memory_reaches_the_engine_that_decodes(llama: Baco) -> None:
    from dataclasses import replace

    with pytest.raises(BacoError, match="raise memory"):
        replace(llama, memory=1000).generate(PROMPT, router="P:0.5")


def ids_of(tokens: int) -> tuple[int, ...]:
    """Ids of some text of ``tokens`` tokens."""
    return tuple(5 + index * 7 % 380 for index in range(tokens))


def raw_request(baco: Baco, tokens: int, router: str, **sampling: Any) -> Request:
    ids = ids_of(tokens)
    params = baco.pair.defaults.updated({"seed": 1, **sampling})
    return Request(ids, ids, params, baco.router(router), digest=b"")


def test_prompts_of_one_token_keep_the_limit(llama: Baco) -> None:
    long, one = request(llama, n=128, max_tokens=40), raw_request(llama, 1, "P:0.5", max_tokens=2)
    engine = Engine(llama.pair, memory=needed(Engine(llama.pair), long, 3))
    engine.add(one)
    engine.step()
    engine.add(long)
    most = 0
    for _ in range(8):
        engine.step()
        most = max(most, engine.running)
    assert most == 3


SIZED = {**ROLLED_BACK, **PLAIN} | {
    "latent attention": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 16,
        },
    ),
    "odd heads": ("Llama", {"head_dim": 10, "num_key_value_heads": 4}),
    "shared keys": (
        "Gemma3nText",
        {
            "head_dim": 8,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 16,
            "vocab_size_per_layer_input": 400,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "intermediate_size": [64] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
            "altup_num_inputs": 2,
        },
    ),
}


@pytest.fixture
def make_model(
    random_pair: Callable[..., PairFolder],
) -> Callable[[str, dict[str, Any]], PairModel]:
    """A model of an architecture, with random weights."""
    tokenizer = AutoTokenizer.from_pretrained(random_pair("llama").base)

    def make(name: str, changes: dict[str, Any]) -> PairModel:
        config = getattr(transformers, f"{name}Config")(**{**SHAPE, **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        lay_out(model)
        return PairModel(name, model, tokenizer).with_common_vocab(
            400, torch.zeros(400, dtype=torch.bool)
        )

    return make


@pytest.mark.parametrize("case", [*SIZED, *ARCHITECTURES])
def test_the_size_of_a_row_is_that_of_its_tensors(
    make_model: Callable[..., PairModel], loaded_pair: Callable[..., Baco], case: str
) -> None:
    model = make_model(*SIZED[case]) if case in SIZED else loaded_pair(case, noise=0.3).pair.base
    size, ids = model.row_size, ids_of(120)
    with torch.inference_mode(), cache_tables() as live:
        for tokens in (1, 2, 60, 100):
            store = model.new_cache()
            store.copy_prefix(finish(store.prefill(ids[:tokens], 1)), 2)
            for token in ids[tokens : tokens + 5]:
                store.extend(torch.tensor([[token]] * 2), [1, 1], 1)
            tables, layers = [], []
            if isinstance(store, BatchedKVCache):
                assert store.allocated_bytes() == live.now == 2 * size.bytes(store.cache.columns)
                layers = [layer for layer in store.cache.layers if layer.is_initialized]
                tables = [table for layer in layers for table in (layer.keys, layer.values)]
                largest = size.largest_tensor(store.cache.columns)
                assert max(table.nbytes for table in tables) == 2 * largest
            else:
                assert isinstance(store, PerRowKVCache)
                row = tensor_bytes(store.states[0])
                assert sum(row) <= size.bytes(tokens + 5) <= 2 * sum(row) + 2 * size.per_token
                assert max(row) <= size.largest_tensor(tokens + 5)
            del store, tables, layers


LENGTHS = st.one_of(st.just(1), st.integers(1, 12), st.integers(100, 180))
ROUTERS = ("Rand:0.5", "P-Punc:0.5", "Base", "Aligned")
ANSWERS: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    tokens=LENGTHS,
    router=st.sampled_from(ROUTERS),
    n=st.integers(1, 5),
    max_tokens=st.sampled_from([1, 3, 12, 70]),
    top_p=st.sampled_from([1.0, 0.9]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
)
SCORED: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict, tokens=st.integers(2, 200), model=st.sampled_from(["base", "aligned"])
)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "starcoder2"])
@settings(max_examples=budget(15))
@given(
    work=st.lists(st.tuples(st.integers(0, 3), st.one_of(ANSWERS, SCORED)), min_size=1, max_size=4),
    share=st.just(1.0) | st.floats(1.0, 3.0),
    speculate=st.booleans(),
    drafted=st.booleans(),
    stopped=st.integers(0, 5),
)
def test_caches_and_the_step_never_exceed_the_limit_under_any_requests(
    loaded_pair: Callable[..., Baco],
    architecture: str,
    work: list[tuple[int, dict[str, Any]]],
    share: float,
    speculate: bool,
    drafted: bool,
    stopped: int,
) -> None:
    baco = loaded_pair(architecture, noise=0.3)
    draft = baco.pair.aligned if drafted else None
    make = partial(Engine, baco.pair, speculate=speculate, draft=draft)
    requests = [(wait, raw_request(baco, **fields)) for wait, fields in work if "router" in fields]
    alone = [needed(make(), fields, 1) for _, fields in requests]
    limit = int(max([200_000, *alone]) * share)
    with cache_tables() as live:
        engine = make(memory=limit)
        answers: list[SequenceState] = []
        texts: list[Scoring] = []
        for wait, fields in work:
            for _ in range(wait):
                checked_step(engine, live, limit)
            if "router" in fields:
                answers += engine.add(raw_request(baco, **fields))
            else:
                text = Scoring(ids_of(fields["tokens"]), fields["model"], 0, 2)
                with suppress(BacoError):  # it does not fit even alone
                    engine.score(text)
                    texts.append(text)
        for answer in answers[stopped::3]:
            engine.stop(answer, len(answer.tokens))
        while engine.busy:
            checked_step(engine, live, limit)
    assert all(answer.finish_reason for answer in answers)
    assert all(text.done for text in texts)


def checked_step(engine: Engine, live: LiveStorages, limit: int) -> None:
    live.peak = live.now
    engine.step()
    assert live.peak <= limit
    if engine.running:
        assert live.now + step_bytes(engine) <= limit


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"top_p": 0.9, "top_k": 50},
        {"temperature": 2.0, "min_p": 0.0},
        {"presence_penalty": 0.5, "repetition_penalty": 1.2},
        {"logprobs": 5},
    ],
    ids=lambda sampling: "-".join(sampling) or "plain",
)
@pytest.mark.parametrize("pair", ["demo", "qwen3", "gemma2", "starcoder2"])
def test_a_step_allocates_no_more_than_was_counted_for_it(
    demo: Baco, loaded_pair: Callable[..., Baco], pair: str, sampling: dict[str, Any]
) -> None:
    baco = demo if pair == "demo" else loaded_pair(pair, noise=0.3)
    large_request = request(baco, "sea " * 70, n=12, max_tokens=24, explain=True, **sampling)
    engine = Engine(baco.pair)
    engine.add(large_request)
    while not engine.running:
        assert most_allocated(engine.step) <= needed(engine, large_request, 12)
    positions = record_positions(engine)
    for _ in range(4):
        allocated = most_allocated(engine.step)
        assert allocated <= step_bytes(engine, positions[-1])
