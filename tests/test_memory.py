"""Cached keys and values stay within the memory they were given, and within what answers need."""

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baco import Baco, BacoError
from baco.cli import run
from baco.engine.cache import Plan, columns_for
from baco.engine.engine import Engine
from baco.engine.sequence import Request, Sequence
from baco.engine.store import PREFILL_PIECE, SlotStore
from baco.memory import cache_bytes
from baco.packing import weights
from tests.pairs import PairFolder

CPU = torch.device("cpu")
PROMPT = "What do you recommend for a rainy day?"


class Ledger:
    """Bytes of cache tensors that are alive, and the most there ever were."""

    def __init__(self) -> None:
        self.alive: dict[int, int] = {}
        self.peak = 0

    def enter(self, tensor: torch.Tensor) -> None:
        key = id(tensor)
        self.alive[key] = tensor.numel() * tensor.element_size()
        weakref.finalize(tensor, self.alive.pop, key)
        self.peak = max(self.peak, sum(self.alive.values()))


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """Every tensor of a cache is made by ``new_zeros``; what has four dimensions is one."""
    found, make = Ledger(), torch.Tensor.new_zeros

    def new_zeros(self: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        made = make(self, *size, **options)
        if made.dim() == 4:
            found.enter(made)
        return made

    monkeypatch.setattr(torch.Tensor, "new_zeros", new_zeros)
    return found


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
    for seed, half in enumerate(("base", "aligned")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / half)
        AutoTokenizer.from_pretrained(getattr(tokens, half)).save_pretrained(folder / half)
    return Baco.load(str(folder), dtype="float32")


def request(baco: Baco, prompt: str = PROMPT, **sampling: Any) -> Request:
    rendered = baco.pair.renderer.render(prompt)
    params = baco.pair.defaults.updated({"seed": 1, **sampling})
    return Request(
        rendered.base_ids,
        rendered.aligned_ids,
        params,
        baco.router("Rand:0.5"),
        digest=rendered.digest,
    )


@torch.inference_mode()
def per_token(engine: Engine) -> dict[str, int]:
    """Bytes that a token of a row takes in each half."""
    found = {}
    for name, half in engine._reader.halves.items():
        store = half.store()
        found[name] = store.bytes_per_token(store.prefill([1, 2]))
    return found


def finish(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def test_a_setting_is_bytes_a_size_or_a_share() -> None:
    assert cache_bytes(1000, [CPU]) == cache_bytes("1000", [CPU]) == cache_bytes("1kB", [CPU])
    assert cache_bytes("2GiB", [CPU]) == cache_bytes(" 2 gib", [CPU]) == 2 * 2**30
    assert cache_bytes("1.5MB", [CPU]) == 1_500_000
    share = cache_bytes("50%", [CPU])
    for setting in (0.5, "0.5"):
        assert cache_bytes(setting, [CPU]) == pytest.approx(share, rel=0.2)
    assert cache_bytes(None, [CPU]) == pytest.approx(1.2 * share, rel=0.2)


@pytest.mark.parametrize(
    "setting", ["much", "2 parsecs", "-1", "0", "0%", "120%", 0, 1.5, -3, True]
)
def test_a_setting_that_is_none_is_refused_before_anything_is_loaded(setting: Any) -> None:
    with pytest.raises(BacoError, match="give bytes, a size as in 2GiB, or a share"):
        Baco.load("demo", memory=setting)


def test_the_command_line_takes_the_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", PROMPT, "--memory", "a lot"]) == 2
    assert "memory is 'a lot'" in capsys.readouterr().err
    assert run(["generate", PROMPT, "--memory", "10kB"]) == 2
    assert "raise memory" in capsys.readouterr().err.replace("\n", " ")
    assert run(["generate", PROMPT, "--memory", "64MiB", "--max-tokens", "4"]) == 0


def test_a_prompt_is_read_once_for_all_its_samples_and_memory_is_what_they_need(
    deep: Baco, ledger: Ledger
) -> None:
    engine = Engine(deep.pair)
    each = per_token(engine)
    asked = request(deep, "sea " * 1990, n=32, max_tokens=240)
    tokens = {name: len(asked.ids(name)) for name in each}
    assert min(tokens.values()) >= 1990
    ledger.peak = 0
    sequences = engine.add(asked)
    with torch.inference_mode():
        engine._admit()
    pieces = {name: math.ceil((count - 1) / PREFILL_PIECE) for name, count in tokens.items()}
    assert engine.stats.forwards == pieces
    finish(engine)
    said = sum(len(sequence.tokens) for sequence in sequences)
    needed = sum(each[name] * (tokens[name] + said) for name in each)
    halves = (deep.pair.base, deep.pair.aligned)
    held = sum(stored for half in halves for *_, stored in weights(half.model))
    assert needed > 8 * 2**20
    assert ledger.peak + held <= 1.1 * (needed + held)


def test_an_empty_batch_holds_no_memory(llama: Baco, ledger: Ledger) -> None:
    engine = Engine(llama.pair)
    for sequence in engine.add(request(llama, n=4, max_tokens=40)):
        engine.step()
        engine.stop(sequence, len(sequence.tokens))
    finish(engine)
    assert ledger.peak > 0
    assert not ledger.alive


def test_sequences_beyond_memory_wait_in_order(llama: Baco, ledger: Ledger) -> None:
    room = Engine(llama.pair, memory="1GiB")
    one = room.add(request(llama, max_tokens=40))
    room.step()
    row, prompt = room._bytes(one), room._prompts(one[0].request)
    memory = prompt + 3 * row
    del room, one
    engine = Engine(llama.pair, memory=memory)
    ledger.peak = 0
    asked = [request(llama, n=n, max_tokens=40, seed=n) for n in (2, 3, 1, 2)]
    sequences = [sequence for each in asked for sequence in engine.add(each)]
    joined: list[Sequence] = []
    while engine.busy:
        joined += [s for s in engine.step() if s not in joined]
        assert engine.running <= 3
    assert joined == sequences
    grown = 3 * row // 8  # of two halves' two layers' keys and values, one is copied at a time
    assert ledger.peak <= memory + grown
    generous = Engine(llama.pair, memory="1GiB")
    free = [sequence for each in asked for sequence in generous.add(each)]
    finish(generous)
    assert [s.tokens for s in sequences] == [s.tokens for s in free]


def test_many_short_answers_and_then_a_long_one_take_no_more_than_either(llama: Baco) -> None:
    engine = Engine(llama.pair)
    engine.add(request(llama, n=40, max_tokens=4))
    engine.add(request(llama, n=2, max_tokens=100))
    held: dict[str, list[tuple[int, int]]] = {"base": [], "aligned": []}
    while engine.busy:
        engine.step()
        for name, sizes in held.items():
            store = engine._reader.stores[name]
            assert isinstance(store, SlotStore)
            sizes.append((store.cache.rows, store.cache.columns))
    for sizes in held.values():
        assert max(columns for rows, columns in sizes if rows == 42) == 48
        assert max(rows for rows, columns in sizes if columns > 48) == 2
        assert sizes[-1] == (0, 0)


@given(columns=st.integers(1, 100_000), more=st.integers(0, 100))
def test_room_for_columns_lies_idle_to_an_eighth_at_most(columns: int, more: int) -> None:
    made = columns_for(columns)
    assert columns <= made <= max(columns + 15, columns * 9 / 8)
    assert columns_for(columns + more) >= made


def test_growing_column_by_column_copies_each_column_a_few_times() -> None:
    made = sorted({columns_for(columns) for columns in range(1, 10_000)})
    assert sum(made[:-1]) <= 16 * made[-1]


@given(
    rows=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 200)), min_size=1, max_size=5),
    padding=st.integers(0, 20),
)
def test_padding_takes_one_column_behind_all_rows_and_no_row_looks_there(
    rows: list[tuple[int, int]], padding: int
) -> None:
    lengths, counts = (list(column) for column in zip(*rows, strict=True))
    span = max(counts) + padding
    plan = Plan.of(lengths, counts, span)
    longest = max(length + count for length, count in rows)
    assert plan.width <= longest + 1
    for (length, count), columns in zip(rows, plan.columns.tolist(), strict=True):
        assert columns[span - count :] == list(range(length, length + count))
        assert set(columns[: span - count]) <= {longest}


def test_an_answer_that_memory_cannot_hold_is_refused_with_both_figures(llama: Baco) -> None:
    engine = Engine(llama.pair, memory=1000)
    engine.add(request(llama))
    with pytest.raises(BacoError, match=r"need \d+\.\d MiB of cache and memory is 0\.0 MiB"):
        engine.step()


def test_memory_reaches_the_engine_that_decodes(llama: Baco) -> None:
    from dataclasses import replace

    (answer,) = replace(llama, memory=1000).generate(PROMPT, router="P:0.5")
    assert answer.finish_reason == "error"
    assert answer.error is not None
    assert "raise memory" in answer.error
