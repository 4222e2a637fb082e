"""Prompts are read once: what was read is kept, answers are the same, and requests come first."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baco import Baco, BacoError
from baco.cli import run
from baco.engine.engine import Engine
from baco.engine.isolation import IsolatingEngine
from baco.engine.scoring import Scoring
from baco.engine.sequence import Request, SequenceState
from baco.engine.verify import Verifier
from baco.kv_cache import batched
from baco.kv_cache import prefix_cache as module
from baco.kv_cache.batched import BatchedKVCache
from baco.kv_cache.prefix_cache import Kind, PrefixCache
from tests.fuzzing import budget
from tests.live import cache_tables, needed, step_bytes
from tests.pairs import PairFolder
from tests.test_long_rope import KINDS
from tests.tiny import save_tiny_pair

SMALL = 8  # tokens of a block, so that texts of some dozen tokens have several


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", SMALL)
        yield


# --- the tree of blocks ---------------------------------------------------------------------------

TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=30).map(tuple)
KIND = Kind("base")


def keep(
    cache: PrefixCache,
    ids: tuple[int, ...],
    limit: int = 10**6,
    *,
    prompt: int = 0,
    divisible: bool = True,
) -> None:
    """Keep a text whose blocks hold its ids, a byte each."""

    def copy(start: int, stop: int) -> tuple[int, ...]:
        return ids[start:stop]

    cache.keep(KIND, ids, copy, lambda tokens: tokens, limit, prompt=prompt, divisible=divisible)


def found(cache: PrefixCache, ids: tuple[int, ...], *, divisible: bool = True) -> tuple[int, ...]:
    match = cache.find(KIND, ids, divisible=divisible)
    together = tuple(token for block in match.blocks for token in block)
    assert len(together) - SMALL < match.tokens <= len(together)
    return together[: match.tokens]


def common(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]


@given(kept=st.lists(TEXTS, max_size=8), wanted=TEXTS)
def test_the_longest_common_prefix_with_any_kept_answer_is_found(
    kept: list[tuple[int, ...]], wanted: tuple[int, ...]
) -> None:
    cache = PrefixCache()
    for text in kept:
        keep(cache, text)
    prefixes = [common(text, wanted) for text in kept if len(text) >= SMALL]
    longest = max(prefixes, key=len, default=())
    assert found(cache, wanted) == (longest if len(longest) >= SMALL else ())


@given(kept=st.lists(st.tuples(TEXTS, st.integers(0, 30)), max_size=8), wanted=TEXTS)
def test_a_prefix_that_ends_inside_a_prompt_ends_between_two_blocks(
    kept: list[tuple[tuple[int, ...], int]], wanted: tuple[int, ...]
) -> None:
    cache = PrefixCache()
    for text, prompt in kept:
        keep(cache, text, prompt=prompt)
    prefix = found(cache, wanted)
    whole = [len(common(text, wanted)) // SMALL * SMALL for text, _ in kept]
    assert len(prefix) >= max(whole, default=0)
    beyond = [text for text, prompt in kept if prompt <= len(common(text, wanted))]
    assert len(prefix) % SMALL == 0 or prefix in {common(text, wanted) for text in beyond}


@given(kept=st.lists(TEXTS, max_size=8), wanted=TEXTS)
def test_a_state_is_found_by_texts_that_begin_with_all_of_its_text(
    kept: list[tuple[int, ...]], wanted: tuple[int, ...]
) -> None:
    cache = PrefixCache()
    for text in kept:
        keep(cache, text, divisible=False)
    whole = [text for text in kept if len(text) >= SMALL and wanted[: len(text)] == text]
    assert found(cache, wanted, divisible=False) == max(whole, key=len, default=())


@given(kept=st.lists(TEXTS, max_size=8))
def test_texts_with_a_common_prefix_hold_its_blocks_once(kept: list[tuple[int, ...]]) -> None:
    cache = PrefixCache()
    for text in kept:
        keep(cache, text)
    long = [text for text in kept if len(text) >= SMALL]
    starts = {text[:end] for text in long for end in range(SMALL, len(text) + 1, SMALL)}
    ends = {text for text in long if len(text) % SMALL}
    # The end of a text is held by a block that begins with it, if there is one.
    ends = {
        text
        for text in ends
        if not any(text != other and other[: len(text)] == text for other in starts | ends)
    }
    assert cache.bytes == SMALL * len(starts) + sum(len(text) % SMALL for text in ends)


@given(
    steps=st.lists(
        st.tuples(TEXTS, st.sampled_from(["keep", "find", "shrink"]), st.integers(0, 60)),
        max_size=20,
    )
)
def test_blocks_stay_within_the_limit_and_hold_the_texts_they_are_found_by(
    steps: list[tuple[tuple[int, ...], str, int]],
) -> None:
    cache = PrefixCache()
    for text, action, limit in steps:
        before = cache.bytes
        if action == "keep":
            keep(cache, text, limit)
            assert cache.bytes <= max(limit, before)
        elif action == "shrink":
            cache.shrink(limit)
            assert cache.bytes <= limit
        prefix = found(cache, text)
        assert text[: len(prefix)] == prefix
    cache.clear()
    assert cache.bytes == 0
    assert not cache._roots


def test_the_least_recently_used_text_goes_first_and_its_end_before_its_beginning() -> None:
    cache, texts = PrefixCache(), [(number,) * 3 * SMALL for number in range(4)]
    for text in texts[:3]:
        keep(cache, text, 9 * SMALL)
    assert found(cache, texts[0]) == texts[0]
    keep(cache, texts[3], 9 * SMALL)
    assert [len(found(cache, text)) for text in texts] == [3 * SMALL, 0, 3 * SMALL, 3 * SMALL]
    cache.shrink(8 * SMALL)
    assert len(found(cache, texts[0])) == 2 * SMALL


def test_a_text_that_is_larger_than_the_limit_drops_no_other() -> None:
    cache = PrefixCache()
    keep(cache, (1,) * SMALL, SMALL)
    keep(cache, (2,) * 3 * SMALL, 2 * SMALL, divisible=False)
    assert found(cache, (1,) * SMALL) == (1,) * SMALL


# --- answers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair_of(
    loaded_pair: Callable[..., Baco],
    random_pair: Callable[..., PairFolder],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Baco]:
    """Pairs whose caches differ: rows in one table, masked rows, rows of both models in the same
    tables, rows with two sets of rotary factors, and the state of each row for itself.
    """
    loaded: dict[str, Baco] = {}

    def load(kind: str) -> Baco:
        if kind in ("llama", "gemma2"):
            return loaded_pair(kind, noise=0.3)
        if kind == "one model" and kind not in loaded:
            model = str(random_pair("llama", noise=0.3).aligned)
            loaded[kind] = Baco.load(base=model, aligned=model, dtype="float32")
        if kind not in loaded:
            folder: Path = tmp_path_factory.mktemp(kind)
            changes = KINDS.get(kind, {}) | {"max_position_embeddings": 256}
            save_tiny_pair(folder, kind, **(changes if kind in KINDS else {}))
            loaded[kind] = Baco.load(str(folder), dtype="float32")
        return loaded[kind]

    return load


def text_of(parts: list[int]) -> tuple[int, ...]:
    """A prompt of some passages, so that prompts have passages in common."""
    passages = [tuple(5 + (11 * part + 7 * at) % 380 for at in range(13)) for part in range(4)]
    return tuple(token for part in parts for token in passages[part])


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Requests that come one after the other. Some continue an answer to an earlier one."""
    return [
        {
            "parts": draw(st.lists(st.integers(0, 3), min_size=1, max_size=5)),
            "continues": draw(st.none() | st.integers(0, 3)),
            "n": draw(st.integers(1, 3)),
            "max_tokens": draw(st.sampled_from([1, 5, 20])),
            "router": draw(st.sampled_from(["Rand:0.5", "P-Punc:0.5", "Base", "Aligned"])),
            "seed": draw(st.integers(0, 3)),
            "steps": draw(st.none() | st.integers(0, 6)),
            "cancelled": draw(st.booleans()),
            "scored": draw(st.booleans()),
        }
        for _ in range(draw(st.integers(2, 5)))
    ]


def request(
    baco: Baco, ids: tuple[int, ...], router: str, *, explain: bool = False, **sampling: Any
) -> Request:
    params = baco.pair.defaults.updated({"seed": 1, **sampling})
    digest = str(ids).encode()
    return Request(ids, ids, params, baco.router(router), explain=explain, digest=digest)


def run_out(engine: Engine) -> None:
    while engine.busy:
        engine.step()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "one model", "phi3", "bloom"])
@settings(max_examples=budget(6))
@given(asked=conversations(), speculate=st.booleans(), share=st.none() | st.floats(1.0, 3.0))
def test_answers_are_the_same_with_kept_prefixes(
    pair_of: Callable[[str], Baco],
    kind: str,
    asked: list[dict[str, Any]],
    speculate: bool,
    share: float | None,
) -> None:
    baco, cache = pair_of(kind), PrefixCache()
    make = partial(Engine, baco.pair, speculate=speculate)
    length = 60 if kind == "bloom" else 150
    engine = make(prefix_cache=cache)
    past: list[SequenceState] = []
    expected: list[tuple[Request, list[SequenceState]]] = []
    for one in asked:
        before = past[one["continues"] % len(past)] if past and one["continues"] else None
        start = (*before.request.base_ids, *before.tokens) if before else ()
        ids = (start + text_of(one["parts"]))[:length]
        sampling = {name: one[name] for name in ("n", "max_tokens", "seed")}
        new = request(baco, ids, one["router"], **sampling)
        if share is not None:
            # A new engine with the same kept prefixes, and hardly room for one row.
            run_out(engine)
            limit = max(200_000, needed(make(), new, 1))
            engine = make(prefix_cache=cache, memory=int(limit * share))
        samples = engine.add(new)
        if one["scored"]:
            text = Scoring(ids, "base", 0, 1)
            try:
                engine.score(text)
            except BacoError:  # it does not fit even alone
                text.done = True
        for _ in range(one["steps"] or 0):
            engine.step()
        if one["cancelled"]:
            engine.stop(samples[0], len(samples[0].tokens))
        elif one["steps"] is None:
            run_out(engine)
        past += samples[one["cancelled"] :]
        expected.append((new, samples[one["cancelled"] :]))
    run_out(engine)
    for new, samples in expected:
        alone = make()
        answers = {answer.sample: answer for answer in alone.add(new)}
        run_out(alone)
        for sample in samples:
            answer = answers[sample.sample]
            assert sample.tokens == answer.tokens
            assert sample.sources == answer.sources
            assert sample.finish_reason == answer.finish_reason
            torch.testing.assert_close(sample.logprobs, answer.logprobs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "one model", "phi3", "bloom"])
def test_a_second_turn_reads_its_new_text_alone(pair_of: Callable[[str], Baco], kind: str) -> None:
    baco, cache = pair_of(kind), PrefixCache()
    # With explanations no model lags behind.
    first = request(baco, text_of([0, 1]), "Rand:0.5", max_tokens=20, explain=True)
    one = Engine(baco.pair, prefix_cache=cache)
    [answer] = one.add(first)
    run_out(one)
    turn = (*first.base_ids, *answer.tokens, *text_of([2]))
    two = Engine(baco.pair, prefix_cache=cache)
    read = count_reads(two)
    [second] = two.add(request(baco, turn, "Rand:0.5", max_tokens=4))
    two.step()
    # The last token of the answer was not read yet; the last one of the prompt is read by the step.
    assert read == {"base": 13, "aligned": 13}
    assert second.cached_tokens == len(turn) - 1 - 13
    run_out(two)


def count_reads(engine: Engine) -> dict[str, int]:
    """Tokens of prompts that each model reads from now on."""
    read = dict.fromkeys(engine._runner.caches, 0)
    for name, cache in engine._runner.caches.items():
        prefill = cache.prefill

        def counted(*args: Any, name: str = name, prefill: Any = prefill, **options: Any) -> Any:
            steps = prefill(*args, **options)
            while True:
                try:
                    read[name] += (tokens := next(steps))
                except StopIteration as end:
                    return end.value
                yield tokens

        cache.prefill = counted  # type: ignore[method-assign]
    return read


def test_rows_of_a_batch_share_the_system_prompt(loaded_pair: Callable[..., Baco]) -> None:
    baco = loaded_pair("llama", noise=0.3)
    engine = Engine(baco.pair, prefix_cache=PrefixCache())
    read, system = count_reads(engine), text_of([0, 1, 2, 3, 0, 1])
    for number in range(4):
        engine.add(request(baco, (*system, 7 + number, 9), "Rand:0.5", max_tokens=3))
    run_out(engine)
    beyond = len(system) % SMALL + 1
    assert read == dict.fromkeys(("base", "aligned"), len(system) + 1 + 3 * beyond)


def test_prompts_that_continue_no_answer_are_read_to_the_same_bits(
    random_pair: Callable[..., PairFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batched, "CPU_CHUNK", SMALL)
    folder = random_pair("llama", noise=0.3)
    baco = Baco.load(base=str(folder.base), aligned=str(folder.aligned), dtype="bfloat16")
    cache, system = PrefixCache(), text_of([0, 1, 2, 3, 0, 1])
    for number in range(6):
        asked = request(baco, (*system, *range(7 + number, 12)), "Rand:0.5", max_tokens=8)
        logprobs = []
        for kept in (cache, None):
            engine = Engine(baco.pair, prefix_cache=kept, speculate=False)
            [answer] = engine.add(asked)
            run_out(engine)
            logprobs.append(answer.logprobs)
        assert logprobs[0] == logprobs[1]
    assert cache.hits["base"] == 5 * 72


def test_an_answer_with_an_error_is_not_kept(loaded_pair: Callable[..., Baco]) -> None:
    baco, cache = loaded_pair("llama", noise=0.3), PrefixCache()
    engine = Engine(baco.pair, prefix_cache=cache)
    asked = request(baco, text_of([0]), "Rand:0.5", max_tokens=20)
    [answer] = engine.add(asked)
    while len(answer.tokens) < 16:
        engine.step()
    before = cache.bytes
    answer.finish_reason = "error"
    run_out(engine)
    assert cache.bytes == before


# --- memory ---------------------------------------------------------------------------------------


def kept_tensors(cache: PrefixCache) -> list[torch.Tensor]:
    return [tensor for block in cache._order for layer in block.content for tensor in layer]


@pytest.mark.parametrize("kind", ["llama", "one model"])
@settings(max_examples=budget(6))
@given(asked=conversations(), share=st.floats(1.0, 2.5), speculate=st.booleans())
def test_kept_prefixes_stay_within_the_memory_limit(
    pair_of: Callable[[str], Baco],
    kind: str,
    asked: list[dict[str, Any]],
    share: float,
    speculate: bool,
) -> None:
    baco, cache = pair_of(kind), PrefixCache()
    make = partial(Engine, baco.pair, speculate=speculate)
    requests = [
        request(baco, text_of(one["parts"]), one["router"], n=one["n"], max_tokens=20)
        for one in asked
    ]
    limit = int(share * max([150_000, *(needed(make(), each, 1) for each in requests)]))
    with cache_tables() as ledger:
        engine = make(prefix_cache=cache, memory=limit)
        with audited(engine, cache, ledger, limit):
            for one, each in zip(asked, requests, strict=True):
                answers = engine.add(each)
                for _ in range(one["steps"] or 0):
                    checked_step(engine, cache, ledger, limit)
                if one["cancelled"]:
                    engine.stop(answers[0], len(answers[0].tokens))
            while engine.busy:
                checked_step(engine, cache, ledger, limit)


@contextmanager
def audited(engine: Engine, cache: PrefixCache, ledger: Any, limit: int) -> Iterator[None]:
    """Inside, everything is within the limit whenever a prompt is read or a block is copied."""
    read, copy = BatchedKVCache._read_alone, BatchedKVCache.copy_block

    def read_alone(self: BatchedKVCache, *args: Any) -> torch.Tensor:
        assert ledger.now + cache.bytes + step_bytes(engine, 1) <= limit
        return read(self, *args)

    def copy_block(self: BatchedKVCache, *args: Any) -> Any:
        block = copy(self, *args)
        copied = sum(tensor.nbytes for layer in block for tensor in layer)
        assert ledger.now + cache.bytes + copied <= limit
        return block

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchedKVCache, "_read_alone", read_alone)
        patch.setattr(BatchedKVCache, "copy_block", copy_block)
        yield


@pytest.mark.parametrize("kind", ["llama", "one model"])
def test_rows_that_end_together_are_kept_only_where_they_fit_beside_one_another(
    pair_of: Callable[[str], Baco], kind: str
) -> None:
    baco, cache = pair_of(kind), PrefixCache()
    asked = [
        request(baco, tuple(5 + (number + at * 7) % 380 for at in range(230)), "Rand:0.5", n=1)
        for number in range(5)
    ]
    asked = [replace(each, params=each.params.updated({"max_tokens": 4})) for each in asked]
    limit = needed(Engine(baco.pair), asked[0], 4)
    with cache_tables() as ledger:
        engine = Engine(baco.pair, memory=limit, prefix_cache=cache)
        with audited(engine, cache, ledger, limit):
            for _ in range(2):
                for each in asked:
                    engine.add(each)
                while engine.busy:
                    checked_step(engine, cache, ledger, limit)
    assert cache.bytes


def checked_step(engine: Engine, cache: PrefixCache, ledger: Any, limit: int) -> None:
    engine.step()
    tensors = kept_tensors(cache)
    assert cache.bytes == sum(tensor.nbytes for tensor in tensors)
    assert cache.bytes == sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    held = ledger.now + cache.bytes
    assert held <= limit
    if engine.running:
        assert held + step_bytes(engine) <= limit


def test_no_request_waits_for_memory_that_kept_prefixes_take(
    loaded_pair: Callable[..., Baco],
) -> None:
    baco = loaded_pair("llama", noise=0.3)
    asked = request(baco, text_of([0, 1, 2]), "Rand:0.5", n=4, max_tokens=20)
    memory = needed(Engine(baco.pair), asked, 4)
    running = []
    for cache in (None, PrefixCache()):
        engine = Engine(baco.pair, memory=memory, prefix_cache=cache)
        for part in range(4):
            engine.add(request(baco, text_of([part] * 4), "Rand:0.5", max_tokens=8))
            run_out(engine)
        assert cache is None or cache.bytes > memory / 20
        engine.add(asked)
        engine.step()
        running.append(engine.running)
        run_out(engine)
    assert running == [4, 4]


# --- front ends -----------------------------------------------------------------------------------

QUESTION = {"role": "user", "content": "Where should I go this summer, when the sea is warm?"}
SETTINGS: dict[str, Any] = {"router": "Rand:0.5", "seed": 3, "n": 2, "max_tokens": 12}


def test_calls_of_one_object_share_kept_prefixes(loaded_pair: Callable[..., Baco]) -> None:
    pair = loaded_pair("llama", noise=0.3).pair
    keeps, rereads = Baco(pair), Baco(pair, enable_prefix_caching=False)
    first = keeps.generate([QUESTION], **SETTINGS)
    history = [QUESTION, {"role": "assistant", "content": first[1].text}, QUESTION]
    whole = len(pair.renderer.render([QUESTION]).aligned_ids)
    turns = [each.generate(history, **SETTINGS) for each in (keeps, rereads)]
    assert [a.token_ids for a in turns[0]] == [a.token_ids for a in turns[1]]
    assert [a.cached_tokens >= whole - 1 for a in turns[0]] == [True, True]
    assert [a.cached_tokens for a in turns[1]] == [0, 0]
    keeps.reset_prefix_cache()
    assert keeps.generate(history, **SETTINGS)[0].cached_tokens == 0


def test_the_command_line_turns_it_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> PrefixCache:
        raise BacoError("prefixes would be kept")

    monkeypatch.setattr("baco.api.PrefixCache", refused)
    asked = ["generate", "Hello", "--max-tokens", "2", "-s", "1"]
    assert run([*asked, "--no-enable-prefix-caching"]) == 0
    assert run(asked) == 2
    assert "prefixes would be kept" in capsys.readouterr().err


def test_nothing_stays_kept_when_a_step_fails(
    loaded_pair: Callable[..., Baco], monkeypatch: pytest.MonkeyPatch
) -> None:
    baco, cache = loaded_pair("llama", noise=0.3), PrefixCache()
    engine = IsolatingEngine(partial(Engine, baco.pair, prefix_cache=cache))
    [answer] = engine.add(request(baco, text_of([0, 1]), "Rand:0.5", max_tokens=20))
    engine.step()
    assert cache.bytes

    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(Verifier, "verify", broken)
    engine.step()
    assert answer.error
    assert not cache.bytes
