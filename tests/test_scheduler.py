"""Running answers are not starved: between two steps there is a bounded amount of other work."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baco import Baco
from baco.decoder import Decoder, Scored
from baco.engine.engine import Engine
from baco.engine.isolation import IsolatingEngine
from baco.engine.scoring import Scoring
from baco.engine.sequence import Request, SequenceState
from baco.engine.verify import Verifier
from baco.kv_cache import batched as store
from baco.kv_cache.batched import BatchedKVCache
from baco.kv_cache.protocol import finish
from baco.kv_cache.slots import columns_for
from baco.models.forward.dense import attend
from baco.outputs import Chunk
from baco.serve.endpoints import _json
from baco.serve.engine_thread import MAX_ANSWERS_PER_STEP, EngineThread, Job
from baco.serve.formats import TextFormatter
from baco.serve.response_models import Provenance, TextChoice, TextReply, Usage
from baco.text.encoder import Encoder
from tests.fuzzing import budget
from tests.serving import WAIT, Served, connect, events, post_request, served, wait_for

PIECE = 8


@dataclass
class Watch:
    """Events of an engine: ("read", tokens) for prompts and texts, or ("step", rows)."""

    events: list[tuple[str, int]] = field(default_factory=list)

    def between_steps(self) -> list[list[int]]:
        """Tokens of each piece that was read between two steps."""
        spans: list[list[int]] = []
        for what, tokens in self.events:
            if what == "step":
                spans.append([])
            elif spans:
                spans[-1].append(tokens)
        return spans[:-1]


@contextmanager
def watched() -> Iterator[Watch]:
    """Inside, prompts are read in chunks of PIECE tokens and all events are recorded."""
    watch, read, verify = Watch(), BatchedKVCache._read_alone, Verifier.verify

    def read_alone(self: BatchedKVCache, cache: Any, start: int, ids: Any, *others: Any) -> Any:
        watch.events.append(("read", len(ids)))
        return read(self, cache, start, ids, *others)

    def watched_verify(self: Verifier, draft: Any, logits: Any) -> Any:
        watch.events.append(("step", len(draft.batch)))
        return verify(self, draft, logits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchedKVCache, "_read_alone", read_alone)
        patch.setattr(Verifier, "verify", watched_verify)
        patch.setattr(store, "CPU_CHUNK", PIECE)
        yield watch


def ids_of(tokens: int, start: int = 5) -> tuple[int, ...]:
    return tuple(5 + (start + index * 7) % 380 for index in range(tokens))


def request(baco: Baco, tokens: int, **sampling: Any) -> Request:
    ids = ids_of(tokens, tokens)
    never = dict.fromkeys(baco.pair.end_ids, -100.0)
    params = baco.pair.defaults.updated({"seed": 1, "logit_bias": never, **sampling})
    return Request(ids, ids, params, baco.router("Rand:0.5"), digest=bytes([tokens % 256]))


OTHERS: st.SearchStrategy[list[dict[str, Any]]] = st.lists(
    st.one_of(
        st.builds(dict, tokens=st.integers(1, 150), n=st.integers(1, 3)),
        st.builds(dict, scored=st.integers(2, 150), model=st.sampled_from(["base", "aligned"])),
    ),
    max_size=6,
)


@settings(max_examples=budget(12))
@given(others=OTHERS, rows=st.integers(1, 5))
def test_between_two_steps_a_bounded_number_of_tokens_is_read(
    loaded_pair: Callable[..., Baco], others: list[dict[str, Any]], rows: int
) -> None:
    baco = loaded_pair("llama", noise=0.3)
    with watched() as watch:
        engine = Engine(baco.pair, chunks_per_step=1)
        running = engine.add(request(baco, 4, n=rows, max_tokens=60))
        engine.step()
        texts, answers = add_all(engine, baco, others)
        while not all(answer.finish_reason for answer in running):
            engine.step()
        most = engine._scheduler.budget.tokens_between_steps(
            rows + sum(o.get("n", 0) for o in others)
        )
        assert all(sum(pieces) < most + PIECE for pieces in watch.between_steps())
        while engine.busy:
            engine.step()
    assert all(text.done and len(text.logprobs) == len(text.ids) for text in texts)
    assert all(answer.finish_reason for answer in answers)


def add_all(
    engine: Engine, baco: Baco, others: list[dict[str, Any]]
) -> tuple[list[Scoring], list[SequenceState]]:
    texts, answers = [], []
    for other in others:
        if "scored" in other:
            texts.append(Scoring(ids_of(other["scored"]), other["model"], 0, 2))
            engine.score(texts[-1])
        else:
            answers += engine.add(request(baco, other["tokens"], n=other["n"], max_tokens=3))
    return texts, answers


def test_one_chunk_of_a_long_text_is_read_between_two_steps(
    loaded_pair: Callable[..., Baco],
) -> None:
    baco = loaded_pair("llama", noise=0.3)
    with watched() as watch:
        engine = baco.decoder().engine
        assert isinstance(engine, IsolatingEngine)
        [running] = engine.add(request(baco, 4, max_tokens=60))
        engine.step()
        engine.add(request(baco, 200, max_tokens=1))
        engine.score(Scoring(ids_of(200), "base", 0, 2))
        while not running.finish_reason:
            engine.step()
    spans = watch.between_steps()
    assert {len(pieces) for pieces in spans} <= {0, 1}
    assert {piece for pieces in spans for piece in pieces} <= {PIECE, 199 % PIECE}
    assert sum(map(sum, spans)) > 100


def test_a_chunk_attends_only_to_tokens_that_have_been_read(
    loaded_pair: Callable[..., Baco], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache has room for the rest of the text, and attention to it would take as long."""
    model = loaded_pair("llama", noise=0.3).pair.base
    widths: list[int] = []

    def attended(query: Tensor, keys: Tensor, *others: Any) -> Tensor:
        widths.append(keys.shape[2])
        return attend(query, keys, *others)

    monkeypatch.setattr("baco.models.forward.dense.attend", attended)
    store = model.new_cache()
    assert isinstance(store, BatchedKVCache)
    store.chunk = 48
    with torch.inference_mode():
        finish(store.prefill(ids_of(240)))
    assert sorted(set(widths)) == [columns_for(48 * (piece + 1)) for piece in range(5)]


def test_prompts_and_texts_take_turns(loaded_pair: Callable[..., Baco]) -> None:
    """With a long prompt, short ones and a text, none waits until another has been read."""
    baco = loaded_pair("llama", noise=0.3)
    with watched():
        engine = Engine(baco.pair, chunks_per_step=1)
        engine.add(request(baco, 4, max_tokens=200))
        engine.step()
        [long] = engine.add(request(baco, 220, max_tokens=2))
        text = Scoring(ids_of(40), "base", 0, 1)
        engine.score(text)
        short = [engine.add(request(baco, 6, max_tokens=2))[0] for _ in range(3)]
        while not (text.done and all(one.finish_reason for one in short)):
            engine.step()
            assert not long.tokens
        while not long.finish_reason:
            engine.step()


def test_chunks_of_a_prompt_do_not_depend_on_other_requests(
    loaded_pair: Callable[..., Baco],
) -> None:
    baco = loaded_pair("llama", noise=0.3)
    long_request = request(baco, 120, n=2, max_tokens=12)
    answers = []
    busy: list[dict[str, Any]] = [{"tokens": 90, "n": 2}, {"scored": 70, "model": "aligned"}]
    for others in ([], busy):
        with watched():
            engine = Engine(baco.pair, chunks_per_step=1)
            add_all(engine, baco, others)
            answers.append(engine.add(long_request))
            while engine.busy:
                engine.step()
    alone, together = ([(a.tokens, a.sources, a.logprobs) for a in each] for each in answers)
    assert alone == together


def test_a_model_that_lags_behind_catches_up_in_bounded_forwards(
    loaded_pair: Callable[..., Baco],
) -> None:
    """A router that never reads the aligned model lets it lag by a bounded number of tokens."""
    baco = loaded_pair("llama", noise=0.3)
    ids = ids_of(10)
    never = dict.fromkeys(baco.pair.end_ids, -100.0)
    params = baco.pair.defaults.updated({"seed": 1, "max_tokens": 120, "logit_bias": never})
    with watched():
        engine = Engine(baco.pair, speculate=False, chunks_per_step=1)
        [answer] = engine.add(Request(ids, ids, params, baco.router("P:1.0"), digest=b""))
        spans = []
        reads = engine._runner.caches["aligned"].extend

        def read(tokens: Any, counts: Any, keep: int) -> Any:
            spans.append(tokens.shape[1])
            return reads(tokens, counts, keep)

        engine._runner.caches["aligned"].extend = read  # type: ignore[method-assign]
        while engine.busy:
            engine.step()
            for length in engine._runner.caches["aligned"].lengths:
                assert 10 + len(answer.tokens) - length <= PIECE + 2
    assert set(answer.sources) == {"base"}
    assert spans
    assert max(spans) <= PIECE + 2


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo2", "gemma2"])
@pytest.mark.parametrize("first", [0, 1, 7, 30])
def test_scores_read_in_chunks_are_those_of_one_forward(
    loaded_pair: Callable[..., Baco], architecture: str, first: int
) -> None:
    baco = loaded_pair(architecture, noise=0.3)
    ids = ids_of(31)
    for name in ("base", "aligned"):
        expected = getattr(baco.pair, name).score(ids).log_softmax(dim=-1)
        with watched():
            engine = Engine(baco.pair, chunks_per_step=1)
            text = Scoring(ids, name, first, 3)
            engine.score(text)
            while engine.busy:
                engine.step()
        assert len(text.logprobs) == len(text.tops) == len(ids) - first
        for at, (logprob, top) in enumerate(zip(text.logprobs, text.tops, strict=True), first):
            if at == 0:
                assert (logprob, top) == (None, None)
                continue
            assert logprob == pytest.approx(float(expected[at - 1, ids[at]]), abs=1e-3)
            assert top is not None
            assert list(top.values()) == pytest.approx(
                expected[at - 1].topk(3).values.tolist(), abs=1e-3
            )


def test_a_text_that_cannot_be_scored_fails_alone(
    loaded_pair: Callable[..., Baco], monkeypatch: pytest.MonkeyPatch
) -> None:
    baco = loaded_pair("llama", noise=0.3)
    decoder = baco.decoder()
    decoder.submit_text("The sea", router=baco.router("Rand:0.5"), seed=1, max_tokens=5)
    bad = decoder.submit_scoring(Scoring((7, 8, 10**6), "base", 0, 1))
    good = decoder.submit_scoring(Scoring((7, 8, 9), "base", 0, 1))
    scored, answered = dict[int, Scored](), 0
    while decoder.busy:
        answered += sum(chunk.completion is not None for chunk in decoder.step())
        scored |= {one.prompt: one for one in decoder.scored()}
    assert answered == 1
    assert "RuntimeError" in str(scored[bad].error)
    assert scored[good].done
    assert scored[good].error is None


def test_a_text_is_scored_although_another_request_breaks_steps(
    loaded_pair: Callable[..., Baco], monkeypatch: pytest.MonkeyPatch
) -> None:
    baco = loaded_pair("llama", noise=0.3)
    verify = Verifier.verify

    def watched_verify(self: Verifier, draft: Any, logits: Any) -> Any:
        if any(len(row.tokens) >= 2 for row in draft.batch.rows):
            raise RuntimeError("broken")
        return verify(self, draft, logits)

    monkeypatch.setattr(Verifier, "verify", watched_verify)
    with watched():
        decoder = baco.decoder()
        decoder.submit_text("The sea", router=baco.router("Rand:0.5"), seed=1, max_tokens=50)
        ticket = decoder.submit_scoring(Scoring(ids_of(100), "base", 0, 1))
        scores: list[Scored] = []
        while decoder.busy:
            decoder.step()
            scores += decoder.scored()
    assert {scored.prompt for scored in scores} == {ticket}
    assert sum(len(scored.logprobs) for scored in scores) == 100
    assert [scored.done for scored in scores][-1]


# --- the engine thread ----------------------------------------------------------------------------


class Noted(Decoder):
    """A decoder that records its steps."""

    events: list[str]

    def step(self) -> list[Chunk]:
        self.events.append("step")
        return super().step()


def test_between_two_steps_a_bounded_number_of_requests_is_accepted(demo: Baco) -> None:
    events: list[str] = []

    def make() -> Decoder:
        decoder = Noted(demo.pair, demo.decoder().engine)
        decoder.events = events
        return decoder

    engine_thread, results = EngineThread(make, max_open=1000), SimpleQueue[Any]()
    cancel_job = engine_thread._cancel_job

    def cancelled(job: Job) -> None:
        events.append("cancel")
        cancel_job(job)

    engine_thread._cancel_job = cancelled  # type: ignore[method-assign]
    never = dict.fromkeys(demo.pair.end_ids, -100.0)

    def submit(decoder: Decoder, **sampling: Any) -> int:
        events.append("submit")
        router = demo.router("P-Punc:0.4")
        return decoder.submit("Hello", router=router, seed=1, logit_bias=never, **sampling)

    running = Job(lambda decoder: submit(decoder, max_tokens=200), results.put)
    engine_thread.submit([running])
    results.get(timeout=WAIT)
    many = [
        Job(lambda decoder: submit(decoder, n=4, max_tokens=1), lambda _: None, answers=4)
        for _ in range(100)
    ]
    engine_thread.submit(many)
    for job in many[50:]:
        engine_thread.cancel(job)
    while not (isinstance(chunk := results.get(timeout=WAIT), Chunk) and chunk.finish_reason):
        pass
    wait_for(lambda: engine_thread.open == 0)
    engine_thread.close()
    events = events[events.index("step") :]
    spans = "".join("s" if event == "step" else "x" for event in events).split("s")
    assert max(map(len, spans[:-1])) <= MAX_ANSWERS_PER_STEP // 4
    assert sum(map(len, spans)) >= 100


def test_prompts_are_prepared_in_threads_and_long_ones_do_not_delay_short_ones(demo: Baco) -> None:
    engine_thread, results = EngineThread(demo.decoder, max_open=10), SimpleQueue[Any]()
    begun, go = threading.Event(), threading.Event()

    def long(going_on: Callable[[], None]) -> None:
        begun.set()
        assert go.wait(WAIT)
        going_on()

    def submit(decoder: Decoder) -> int:
        router = demo.router("P-Punc:0.4")
        return decoder.submit("Hello", router=router, seed=1, max_tokens=2)

    held = Job(submit, results.put, long, size=10**6)
    engine_thread.submit([held])
    assert begun.wait(WAIT)
    names: list[str] = []
    short = Job(
        submit, results.put, lambda _: names.append(threading.current_thread().name), size=10
    )
    engine_thread.submit([short])
    while not (isinstance(chunk := results.get(timeout=WAIT), Chunk) and chunk.finish_reason):
        pass
    assert "short" in names[0]
    engine_thread.cancel(held)
    wait_for(lambda: engine_thread.open == 0)
    go.set()  # it was cancelled, so it delivers nothing
    engine_thread.close()
    assert results.empty()


def test_an_error_with_a_prompt_reaches_its_caller_alone(demo: Baco) -> None:
    engine_thread, results = EngineThread(demo.decoder, max_open=10), SimpleQueue[Any]()

    def bad(_: Callable[[], None]) -> None:
        raise ValueError("no such prompt")

    engine_thread.submit([Job(lambda _: 0, results.put, bad)])
    assert str(results.get(timeout=WAIT)) == "no such prompt"
    wait_for(lambda: engine_thread.open == 0)
    engine_thread.close()


# --- the server -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(demo: Baco) -> Iterator[Served]:
    with served(demo) as running:
        yield running


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Each call of a tokenizer: its thread, and the number of characters."""
    recorded: list[tuple[str, int]] = []
    call = Encoder._call

    def called(self: Encoder, text: str, *, special: bool) -> list[int]:
        recorded.append((threading.current_thread().name, len(text)))
        return call(self, text, special=special)

    monkeypatch.setattr(Encoder, "_call", called)
    return recorded


@pytest.mark.parametrize(
    "body",
    [
        {"n": 16, "return_token_ids": True, "max_tokens": 2},
        {"model": "baco/base", "echo": True, "logprobs": 2, "max_tokens": 0},
    ],
    ids=["answers", "echo"],
)
def test_a_prompt_is_tokenised_once_and_away_from_the_event_loop_and_the_decoder(
    server: Served, calls: list[tuple[str, int]], body: dict[str, Any]
) -> None:
    prompt = "We walk along the shore. " * 15
    with server.client as client:
        reply = client.post("/v1/completions", json={"prompt": prompt} | body)
    assert reply.status_code == 200
    assert {name.rpartition("_")[0] for name, _ in calls} == {"baco-short-prompts"}
    models = 1 if "echo" in body else 2
    assert sum(characters for _, characters in calls) == models * len(prompt)


def test_a_prompt_too_long_for_the_context_is_not_tokenised(
    server: Served, calls: list[tuple[str, int]]
) -> None:
    for body in ({"n": 16, "return_token_ids": True}, {"n": 1}):
        with server.client as client:
            reply = client.post("/v1/completions", json={"prompt": "sea " * 225_000} | body)
        assert reply.status_code == 400
        assert (
            "the aligned model's context window is 512 tokens" in reply.json()["error"]["message"]
        )
    with server.client as client:
        messages = [{"role": "user", "content": "sea " * 225_000}]
        reply = client.post("/v1/chat/completions", json={"messages": messages})
    assert reply.status_code == 400
    assert not calls


def test_conversations_are_rendered_away_from_the_event_loop_and_the_decoder(
    server: Served, monkeypatch: pytest.MonkeyPatch, demo: Baco
) -> None:
    names: list[str] = []
    renderer = type(demo.pair.renderer)
    render = renderer.render

    def rendered(self: Any, *args: Any, **options: Any) -> Any:
        names.append(threading.current_thread().name)
        return render(self, *args, **options)

    monkeypatch.setattr(renderer, "render", rendered)
    assert server.ask(seed=1, max_tokens=2).status_code == 200
    assert [name.rpartition("_")[0] for name in names] == ["baco-short-prompts"]


def test_ids_of_a_prompt_come_with_every_choice_streamed_or_whole(server: Served) -> None:
    body = {"prompt": ["The sea", "A lake"], "n": 2, "seed": 1, "max_tokens": 3}
    body |= {"return_token_ids": True, "router": "P-Punc:0.4"}
    with server.client as client:
        whole = client.post("/v1/completions", json=body).json()["choices"]
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as got:
            pieces = [choice for event in events(got) for choice in event["choices"]]
    prompt_ids = [choice["prompt_token_ids"] for choice in whole]
    assert prompt_ids[0] == prompt_ids[1] != prompt_ids[2] == prompt_ids[3]
    for index, ids in enumerate(prompt_ids):
        own = [piece for piece in pieces if piece["index"] == index]
        assert own[0]["prompt_token_ids"] == ids
        assert not any("prompt_token_ids" in piece for piece in own[1:])


def test_work_on_a_prompt_ends_when_its_client_is_gone(
    server: Served, calls: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its long prompt is dropped between two pieces."""
    first, go = threading.Event(), threading.Event()
    call = Encoder._call

    def slow(self: Encoder, text: str, *, special: bool) -> list[int]:
        first.set()
        assert go.wait(WAIT)
        return call(self, text, special=special)

    monkeypatch.setattr(Encoder, "longest", property(lambda _: None))
    monkeypatch.setattr(Encoder, "_call", slow)
    prompt = "We walk along the shore. " * 8_000
    with connect(server.url, post_request("/v1/completions", {"prompt": prompt})):
        assert first.wait(WAIT)
    wait_for(lambda: server.engine_thread.open == 0)
    go.set()
    wait_for(lambda: calls)
    assert server.ask(seed=1, max_tokens=2).status_code == 200
    assert sum(characters for _, characters in calls) < len(prompt) / 4


def test_a_reply_serialised_by_choice_equals_one_serialised_at_once() -> None:
    shape = TextFormatter('"choices":[] \\ "', True)
    usage = Usage.of(1, 2)
    choices = [
        TextChoice(
            index=index,
            text='"choices":[]',
            logprobs=None,
            finish_reason="stop",
            baco=Provenance(sources=[], base_share=0, switches=0),
        )
        for index in range(3)
    ]
    written = asyncio.run(_json(shape, choices, usage))
    once = TextReply(**shape._head, choices=choices, usage=usage).model_dump_json()
    assert bytes(written.body).decode() == once
