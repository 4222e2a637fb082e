"""Recorded forwards give the logits of plain ones, for tables that stay, move or are new."""

import copy
import gc
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from baco import Baco
from baco.engine.engine import Engine
from baco.engine.isolation import IsolatingEngine
from baco.engine.sequence import Request
from baco.kv_cache.batched import BatchedKVCache
from baco.kv_cache.protocol import finish
from baco.models.forward.cuda_graphs import CudaGraphForward, GraphRecorder
from baco.models.forward.dense import DenseForward
from baco.models.forward.selection import ClampedForward
from tests.fake_cuda_graphs import CUDA, Cuda, FakeStream, Races, lean_of, recording
from tests.live import needed
from tests.test_engine import tokens_and_sources

PROMPT = "What do you recommend for a rainy day?"
ROUTERS = ("P-Punc:0.6", "H-FC:2", "Rand:0.5", "Aligned", "Nudging:0.5")


def endless(baco: Baco) -> dict[int, float]:
    return dict.fromkeys(baco.pair.end_ids, -100.0)


def forwards(baco: Baco, prompt: str, **settings: Any) -> int:
    """Forwards of both models for an answer, without those of its prompt."""
    decoder = baco.decoder()
    decoder.submit(prompt, **settings)
    while decoder.busy:
        decoder.step()
    assert isinstance(decoder.engine, IsolatingEngine)
    return sum(decoder.engine.stats.forwards.values()) - 2


@pytest.mark.parametrize("router", ROUTERS)
def test_answers_are_the_plain_ones_and_replayed(
    recorded: Baco, plain: Baco, cuda: Cuda, router: str
) -> None:
    for seed, n, tokens in ((0, 1, 110), (1, 1, 20), (2, 3, 40), (3, 9, 30)):
        settings: dict[str, Any] = {"n": n, "seed": seed, "max_tokens": tokens, "router": router}
        expected = plain.generate(PROMPT, **settings)
        assert [tokens_and_sources(c) for c in recorded.generate(PROMPT, **settings)] == [
            tokens_and_sources(c) for c in expected
        ]
    before = cuda.replays
    settings = {"n": 2, "seed": 5, "max_tokens": 60, "logit_bias": endless(plain)}
    count = forwards(recorded, PROMPT, router=recorded.router(router), **settings)
    assert cuda.replays - before > 0.6 * count


def test_rows_come_and_go_while_others_are_decoded(recorded: Baco, plain: Baco) -> None:
    prompts = [PROMPT, "sea " * 30, "Where should I go this summer?", "a", "The Old Man " * 9]
    answers = []
    for baco in (plain, recorded):
        decoder = replace(baco, max_rows=4).decoder()
        for seed, prompt in enumerate(prompts):
            decoder.submit(
                prompt,
                router=baco.router(ROUTERS[seed]),
                n=1 + seed % 3,
                seed=seed,
                max_tokens=10 + 12 * seed,
            )
        done = []
        while decoder.busy:
            done += [c.completion for c in decoder.step() if c.completion is not None]
        answers.append(sorted((tokens_and_sources(completion) for completion in done), key=str))
    assert answers[0] == answers[1]


def test_recordings_are_reused_for_the_next_answer(recorded: Baco, plain: Baco, cuda: Cuda) -> None:
    settings: dict[str, Any] = {"router": "P-Punc:0.6", "n": 2, "seed": 1, "max_tokens": 40}
    for _ in range(2):
        recorded.generate(PROMPT, **settings)
    before, replays = len(cuda.captured), cuda.replays
    assert [tokens_and_sources(c) for c in recorded.generate(PROMPT, **settings)] == [
        tokens_and_sources(c) for c in plain.generate(PROMPT, **settings)
    ]
    assert len(cuda.captured) == before
    assert cuda.replays > replays


def test_tables_are_allocated_once_and_within_the_counted_memory(
    recorded: Baco, cuda: Cuda
) -> None:
    engine = Engine(recorded.pair, memory="1GiB")
    prompt = recorded.pair.renderer.render(PROMPT)
    params = recorded.pair.defaults.updated({"n": 3, "seed": 1, "max_tokens": 150})
    request = Request(
        prompt.base_ids,
        prompt.aligned_ids,
        params,
        recorded.router("Rand:0.5"),
        digest=prompt.digest,
    )
    engine.add(request)
    engine.step()
    sizes = {name: 3 * store.cache.columns for name, store in stores(engine).items()}
    memory = needed(engine, request, 3)
    engine = Engine(recorded.pair, memory=memory)
    engine.add(request)
    seen, before = set(), cuda.replays
    while engine.busy:
        engine.step()
        for name, store in stores(engine).items():
            tables = [layer.keys.data_ptr() for layer in store.cache.layers]
            seen.add((name, store.cache.rows, store.cache.columns, *tables))
            assert store.cache.columns * store.cache.rows <= sizes[name]
    assert len(seen) == 2
    assert cuda.replays > before + 50


def stores(engine: Engine) -> dict[str, BatchedKVCache]:
    caches = {}
    for name, store in engine._runner.caches.items():
        assert isinstance(store, BatchedKVCache)
        caches[name] = store
    return caches


def one(plain: Baco, cuda: Cuda) -> tuple[DenseForward, CudaGraphForward]:
    lean = lean_of(plain.pair.base)
    return lean, CudaGraphForward(lean, GraphRecorder(CUDA, cuda))


@torch.inference_mode()
def test_no_graph_is_replayed_on_tables_that_have_moved(plain: Baco, cuda: Cuda) -> None:
    lean, forward = one(plain, cuda)
    both = [forward.new_cache(forward), BatchedKVCache(lean)]
    for store in both:
        store.copy_prefix(None, 2)
    ids = torch.randint(5, 390, (300, 2, 1), generator=torch.Generator().manual_seed(1))
    pools = set()
    for at, tokens in enumerate(ids):
        if at % 50 == 0:  # for more rows, or more columns
            both[0].cache.preallocate(2 + at // 100, 128 + at)
        logits, expected = (store.extend(tokens, [1, 1], 1) for store in both)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        for store in both:
            store.roll_back([min(length, 100 + at // 3) for length in store.lengths])
        pools.add(cuda.captured[-1][1] if cuda.captured else 0)
    assert len(pools) > 4
    assert cuda.replays > 250


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("span", [1, 2, 5, 7, 16, 40])
@torch.inference_mode()
def test_logits_are_the_plain_forwards_for_any_rows_tokens_and_lengths(
    plain: Baco, cuda: Cuda, rows: int, span: int
) -> None:
    lean, forward = one(plain, cuda)
    ids = torch.randint(5, 390, (rows, span), generator=torch.Generator().manual_seed(3))
    counts = [max(1, span - row) for row in range(rows)]
    for length in (1, 30, 130):
        prefix = finish(BatchedKVCache(lean).prefill(list(range(7, 7 + length))))
        stays, moves = forward.new_cache(forward), BatchedKVCache(lean)
        stays.cache.preallocate(8, 250)
        for store in (stays, moves):
            store.copy_prefix(prefix, rows)
        for keep in (1, min(counts), min(counts)):
            logits, expected = (store.extend(ids, counts, keep) for store in (stays, moves))
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
            for store in (stays, moves):
                store.roll_back([length] * rows)
        del stays, store
    assert cuda.replays == (0 if span > 16 else 2 + 3 + 2)  # what is new is read plainly


@torch.inference_mode()
def test_no_padding_is_added_where_no_column_is_left_for_it(plain: Baco, cuda: Cuda) -> None:
    lean, forward = one(plain, cuda)
    prefix = finish(BatchedKVCache(lean).prefill(list(range(7, 66))))  # 59 of 64 columns
    both = [forward.new_cache(forward), BatchedKVCache(lean)]
    both[0].cache.preallocate(3, 64)
    for store in both:
        store.copy_prefix(prefix, 3)
    for start in (70, 170, 270):
        ids = torch.arange(start, start + 15).view(3, 5)
        logits, expected = (store.extend(ids, [5, 5, 5], 5) for store in both)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        for store in both:
            store.roll_back([59, 59, 59])
    assert cuda.replays == 2
    assert (both[0].cache.rows, both[0].cache.columns) == (3, 64)


@pytest.mark.parametrize(("most", "replays"), [(18, 2), (17, 0)])
@torch.inference_mode()
def test_rows_are_rounded_up_to_the_tables_and_many_tokens_are_read_plainly(
    plain: Baco, cuda: Cuda, monkeypatch: pytest.MonkeyPatch, most: int, replays: int
) -> None:
    monkeypatch.setattr("baco.models.forward.cuda_graphs._MAX_TOKENS", most)
    lean, forward = one(plain, cuda)
    both = [forward.new_cache(forward), BatchedKVCache(lean)]
    both[0].cache.preallocate(3, 128)
    for store in both:
        store.copy_prefix(None, 3)
    for start in (70, 170, 270):  # 3 rows of 5 tokens as 3 of 6
        ids = torch.arange(start, start + 15).view(3, 5)
        logits, expected = (store.extend(ids, [5, 5, 5], 6) for store in both)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert cuda.replays == replays


@torch.inference_mode()
def test_padding_writes_only_to_free_rows_and_to_columns_behind_a_row(
    plain: Baco, cuda: Cuda
) -> None:
    _, forward = one(plain, cuda)
    store = forward.new_cache(forward)
    store.cache.preallocate(4, 64)
    store.copy_prefix(finish(store.prefill([5, 6, 7])), 3)
    tables = store.cache.tables(2, torch.empty(0))
    for _ in range(3):  # 3 rows of 5 tokens as 4 of 6
        before = [table.clone() for side in tables for table in side]
        store.extend(torch.arange(9, 24).view(3, 5), [5, 4, 5], 1)
        after = [table for side in tables for table in side]
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[:3, :, :3], new[:3, :, :3])
            assert torch.equal(old[:, :, 10:], new[:, :, 10:])
        store.roll_back([3, 3, 3])
    assert cuda.replays == 2


@torch.inference_mode()
def test_logits_that_were_handed_out_stay_as_they_are(plain: Baco, cuda: Cuda) -> None:
    _, forward = one(plain, cuda)
    store = forward.new_cache(forward)
    store.cache.preallocate(1, 64)
    store.copy_prefix(None, 1)
    handed: list[tuple[Tensor, Tensor]] = []
    for token in range(5, 15):
        logits = store.extend(torch.tensor([[token]]), [1], 1)
        handed.append((logits, logits.clone()))
    assert cuda.replays == 9
    assert all(torch.equal(logits, then) for logits, then in handed)


@torch.inference_mode()
def test_steps_on_two_streams_are_ordered(plain: Baco, cuda: Cuda) -> None:
    _, forward = one(plain, cuda)
    store, side = forward.new_cache(forward), FakeStream()
    store.cache.preallocate(1, 64)
    store.copy_prefix(None, 1)
    with Races(cuda) as races:
        for token in range(5, 15):
            with cuda.stream(side if token % 2 else cuda.main):
                store.extend(torch.tensor([[token]]), [1], 1)
    assert cuda.replays == 9
    assert races.unordered == []


@torch.inference_mode()
def test_recordings_are_few_and_go_together(
    plain: Baco, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baco.models.forward.cuda_graphs._MAX_SHAPES", 3)
    _, forward = one(plain, cuda)
    store = forward.new_cache(forward)
    store.cache.preallocate(1, 128)
    store.copy_prefix(None, 1)
    for span in (1, 2, 3, 4):
        for _ in range(3):
            store.extend(torch.full((1, span), 7), [span], 1)
    assert [pool for _, pool, *_ in cuda.captured] == [1, 1, 1, 2]
    assert cuda.synchronized == 1  # before the first three are dropped
    assert len(forward._steps) == 1


@torch.inference_mode()
def test_a_graph_is_captured_on_a_stream_of_its_own_after_it_was_run_there(
    plain: Baco, cuda: Cuda
) -> None:
    ran: list[tuple[bool, bool]] = []
    recorder = GraphRecorder(CUDA, cuda)
    event = cuda.main.clock[cuda.main] = 7

    def step() -> None:
        stream = cuda.current_stream()
        assert stream.clock[cuda.main] == event  # after everything submitted before
        ran.append((stream is cuda.main, cuda.capturing))

    recorder.record(step)
    assert ran == [(False, False), (False, False), (False, True)]
    (_, pool, stream, mode), other = cuda.captured[0], GraphRecorder(CUDA, cuda)
    assert mode == "thread_local"
    assert (pool, stream) == (recorder._pool, recorder._stream)
    assert (other._pool, other._stream) != (pool, stream)
    assert other._stream is not stream


@torch.inference_mode()
def test_when_recording_fails_forwards_are_plain_and_one_warning_is_logged(
    plain: Baco, cuda: Cuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base, aligned = (recording(model, cuda) for model in (plain.pair.base, plain.pair.aligned))
    baco = replace(plain, pair=replace(plain.pair, base=base, aligned=aligned))

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(GraphRecorder, "record", full)
    settings: dict[str, Any] = {"router": "Aligned", "n": 2, "seed": 1, "max_tokens": 30}
    for _ in range(2):
        assert [tokens_and_sources(c) for c in baco.generate(PROMPT, **settings)] == [
            tokens_and_sources(c) for c in plain.generate(PROMPT, **settings)
        ]
    assert [r.getMessage() for r in caplog.records] == [
        "forwards are no longer recorded as CUDA graphs: CUDA out of memory."
    ]


def test_a_recording_with_other_logits_is_refused_at_load(
    plain: Baco, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    lean = copy.copy(lean_of(plain.pair.base))
    read = lean.read

    def read_amiss(*args: Any, **more: Any) -> Tensor:
        logits = read(*args, **more)
        return logits.roll(1, -1) if cuda.capturing else logits

    monkeypatch.setattr(lean, "read", read_amiss)
    with pytest.raises(RuntimeError, match="returns other logits"):
        CudaGraphForward(lean, GraphRecorder(CUDA, cuda)).warm_up()
    broken = CudaGraphForward(lean, GraphRecorder(CUDA, cuda))
    monkeypatch.setattr(GraphRecorder, "record", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.warm_up()


def test_tables_of_only_one_ended_engine_are_kept(recorded: Baco) -> None:
    settings: dict[str, Any] = {"router": "Aligned", "n": 1, "seed": 1, "max_tokens": 8}
    decoders = [recorded.decoder() for _ in range(2)]
    for decoder in decoders:
        decoder.submit(PROMPT, **{**settings, "router": recorded.router("Aligned")})
        while decoder.busy:
            decoder.step()
    isolated = [cast(IsolatingEngine, decoder.engine).engine for decoder in decoders]
    engines = [engine for engine in isolated if isinstance(engine, Engine)]
    caches = [stores(engine)["aligned"].cache for engine in engines]
    del engines, isolated
    assert caches[0] is not caches[1]
    kept = caches[1]
    del decoders[0], decoder, caches[0]
    del decoders, caches
    gc.collect()
    forward = recorded.pair.aligned._forward
    assert isinstance(forward, ClampedForward)
    assert isinstance(forward.forward, CudaGraphForward)
    assert list(forward.forward._spare) == [kept]
