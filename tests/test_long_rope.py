"""LongRoPE: a text is read with the factors of its own length, whatever is in the same batch.

The reference is one full forward over each text, as in the naive loop.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baco import Baco, BacoError, as_transformers
from baco.decoder import Decoder
from baco.engine.engine import Engine
from baco.kv_cache.batched import BatchedKVCache
from baco.kv_cache.protocol import finish
from baco.models.caches.long_rope import LongRopeKVCache
from tests.fuzzing import budget
from tests.test_engine import reference, rules, tokens_and_sources, without_turn_cut
from tests.test_transformers import answers, encoded
from tests.tiny import drafting, save_tiny_pair

ORIGINAL, TOKENS = 36, 16
# As the two models read them: 16 and 24 tokens, 27 and 34, 67 and 74. So one answer stays below
# the original length for the base alone, one crosses it in both, and one begins beyond it.
PROMPTS = [
    "Plan a walk.",
    "Where should I go, when the sea is warm?",
    "Where should I go this summer, when the sea is warm and I have only little time, "
    "and no money, but a dog?",
]


def longrope(original: int = ORIGINAL, **more: float) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [3.0, 5.0, 7.0, 9.0],
        "original_max_position_embeddings": original,
        **more,
    }


KINDS: dict[str, dict[str, Any]] = {
    "phi3": {"original_max_position_embeddings": ORIGINAL, "rope_parameters": longrope()},
    "phimoe": {"rope_parameters": longrope(short_mscale=1.1, long_mscale=1.3)},
    "llama": {"rope_parameters": longrope()},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Baco]:
    """A pair of an architecture with LongRoPE, loaded once."""
    loaded: dict[str, Baco] = {}

    def load(kind: str) -> Baco:
        if kind not in loaded:
            folder = save_tiny_pair(
                tmp_path_factory.mktemp(kind), kind, **KINDS[kind], max_position_embeddings=128
            )
            loaded[kind] = drafting(without_turn_cut(Baco.load(str(folder), dtype="float32")))
        return loaded[kind]

    return load


def decoded(
    baco: Baco, prompts: list[str], router: str, *, speculate: bool, **sampling: Any
) -> tuple[list[list[Any]], Engine]:
    """Tokens and sources of every sample of prompts that are decoded together."""
    engine = Engine(baco.pair, speculate=speculate)
    decoder = Decoder(baco.pair, engine)
    for prompt in prompts:
        decoder.submit(prompt, router=baco.router(router), **sampling)
    answers: list[dict[int, Any]] = [{} for _ in prompts]
    while decoder.busy:
        for chunk in decoder.step():
            if chunk.completion is not None:
                answers[chunk.prompt][chunk.sample] = tokens_and_sources(chunk.completion)
    return [[each[sample] for sample in sorted(each)] for each in answers], engine


@pytest.mark.parametrize(("kind", "temperature"), [("phi3", 1.0), ("phimoe", 0.0), ("llama", 0.0)])
def test_every_row_is_read_with_the_factors_of_its_own_length(
    pairs: Callable[[str], Baco], kind: str, temperature: float
) -> None:
    baco = pairs(kind)
    settings: dict[str, Any] = {"seed": 5, "temperature": temperature, "max_tokens": TOKENS}
    rule = rules(baco.pair)["Rand:0.5"]
    expected = [[reference(baco, prompt, rule, sample=0, **settings)] for prompt in PROMPTS]
    for speculate in (True, False):
        together, engine = decoded(baco, PROMPTS, "Rand:0.5", speculate=speculate, **settings)
        assert together == expected
        assert bool(engine.stats.accepted) == speculate
        for prompt, right in zip(PROMPTS, expected, strict=True):
            alone, _ = decoded(baco, [prompt], "Rand:0.5", speculate=speculate, **settings)
            assert alone == [right]


@pytest.mark.parametrize("speculate", [True, False])
def test_a_row_is_read_again_once_when_it_grows_beyond_the_original_length(
    pairs: Callable[[str], Baco], speculate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    again: list[int] = []
    replace = BatchedKVCache.replace

    def counted(self: BatchedKVCache, row: int, prefix: Any) -> None:
        again.append(prefix.length)
        replace(self, row, prefix)

    monkeypatch.setattr(BatchedKVCache, "replace", counted)
    baco = pairs("phi3")
    never = dict.fromkeys(baco.pair.end_ids, -100.0)
    # With these seeds drafts that cross the original length are rejected, if there are such.
    for seed in (2, 4, 11):
        settings: dict[str, Any] = {"seed": seed, "max_tokens": 30, "logit_bias": never}
        decoded(baco, PROMPTS[:2], "Rand:0.1", speculate=speculate, **settings)
        assert again == [ORIGINAL] * 4  # each of the two texts, by each of the two models
        again.clear()
        decoded(baco, PROMPTS[2:], "Rand:0.1", speculate=speculate, **settings)
        assert again == []  # it is long from the start


@settings(max_examples=budget(15))
@given(data=st.data())
@torch.inference_mode()
def test_a_cache_agrees_with_full_forwards_however_it_is_read_and_rolled_back(
    pairs: Callable[[str], Baco], data: st.DataObject
) -> None:
    model = pairs("phi3").pair.base
    store = model.new_cache()
    assert isinstance(store, LongRopeKVCache)
    token = st.integers(2, 390)
    texts: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 3))):
        length = data.draw(st.integers(0, ORIGINAL + 6))
        texts.append(data.draw(st.lists(token, min_size=length, max_size=length)))
        store.copy_prefix(finish(store.prefill(texts[-1])), 1)
    for _ in range(data.draw(st.integers(1, 4))):
        new = [data.draw(st.lists(token, max_size=8)) for _ in texts]
        new[0] = new[0] or [7]
        keep = data.draw(st.integers(1, 4))
        texts = [text + more for text, more in zip(texts, new, strict=True)]
        span = max(map(len, new))
        tokens = torch.tensor([[0] * (span - len(more)) + more for more in new])
        logits = model.to_common_vocab(
            store.extend(tokens, [len(more) for more in new], min(keep, span))
        )
        for row, (text, more) in enumerate(zip(texts, new, strict=True)):
            for back in range(1, 1 + min(len(more), keep)):
                expected = model.score(text[: len(text) - back + 1])[-1]
                assert torch.allclose(logits[row, -back], expected, atol=1e-4)
        kept = [data.draw(st.integers(max(0, len(text) - 6), len(text))) for text in texts]
        store.roll_back(kept)
        order = data.draw(st.permutations(range(len(texts))))
        store.drop(kept=order)
        texts = [texts[row][: kept[row]] for row in order]
        assert store.lengths == [len(text) for text in texts]


def test_factors_that_cannot_be_chosen_row_by_row_are_taken_on_a_slower_path_that_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Two kinds of layers that change their factors at different lengths.
    layers = {"full_attention": longrope(), "sliding_attention": longrope(28)}
    folder = save_tiny_pair(tmp_path, "gemma3_text", rope_parameters=layers)
    baco = without_turn_cut(Baco.load(str(folder), dtype="float32"))
    settings: dict[str, Any] = {"seed": 5, "temperature": 1.0, "max_tokens": TOKENS}
    together, _ = decoded(baco, PROMPTS[:2], "Rand:0.5", speculate=True, **settings)
    rule = rules(baco.pair)["Rand:0.5"]
    for prompt, (answer,) in zip(PROMPTS[:2], together, strict=True):
        assert answer == reference(baco, prompt, rule, sample=0, **settings)
    slow = [record.message for record in caplog.records if "reads the whole text" in record.message]
    assert len(slow) == 2
    assert all("other rotary factors beyond 28 tokens" in text for text in slow)


def test_dynamic_factors_stay_as_they_are_within_the_context(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    baco = without_turn_cut(
        Baco.load(str(save_tiny_pair(tmp_path, "llama", rope_parameters=rope)), dtype="float32")
    )
    never = dict.fromkeys(baco.pair.end_ids, -100.0)
    settings: dict[str, Any] = {"router": "Rand:0.5", "seed": 5, "max_tokens": 1_000}
    for prompt in PROMPTS[:2]:
        (answer,) = baco.generate(prompt, logit_bias=never, **settings)
        rendered = baco.pair.renderer.render(prompt)
        text = [*rendered.aligned_ids, *answer.token_ids]
        assert answer.finish_reason == "length"
        assert len(text) == baco.pair.aligned.context
        rows = baco.pair.aligned.score(text[:-1]).log_softmax(-1)[len(rendered.aligned_ids) - 1 :]
        for row, token, source, logprob in zip(
            rows, answer.token_ids, answer.sources, answer.logprobs, strict=True
        ):
            if source == "aligned":
                assert float(row[token]) == pytest.approx(logprob, abs=1e-4)


def test_the_transformers_object_reads_every_row_with_the_factors_of_its_own_length(
    pairs: Callable[[str], Baco],
) -> None:
    baco = pairs("phi3")
    model = as_transformers(baco, "Gap:0")
    batch = encoded(baco, *([{"role": "user", "content": prompt}] for prompt in PROMPTS))
    settings: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False}
    output = model.generate(**batch, **settings)
    sources: set[str] = set()
    for row, prompt in zip(answers(baco, output, batch["input_ids"]), PROMPTS, strict=True):
        (expected,) = baco.generate(prompt, router="Gap:0", temperature=0, max_tokens=TOKENS)
        assert row == list(expected.token_ids)
        sources |= set(map(str, expected.sources))
    assert sources == {"base", "aligned"}
    # Beams change rows; with one model the cache changes nothing but the time that they take.
    alone = as_transformers(baco, "Base")
    beams = [
        alone.generate(**batch, **settings, num_beams=3, use_cache=cached)
        for cached in (True, False)
    ]
    assert beams[0].equal(beams[1])


def test_the_transformers_object_refuses_mixed_lengths_without_factors_per_row(
    pairs: Callable[[str], Baco],
) -> None:
    baco = pairs("phi3")
    rope = baco.pair.aligned.long_rope
    assert rope is not None
    apart = replace(baco.pair, aligned=replace(baco.pair.aligned))
    apart.aligned.__dict__["long_rope"] = replace(rope, modules=())
    model = as_transformers(replace(baco, pair=apart), "Gap:0")
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    for chat in chats:
        model.generate(**encoded(baco, chat), max_new_tokens=2, do_sample=False)
    with pytest.raises(BacoError, match=r"more than 36 tokens .* prompts apart"):
        model.generate(**encoded(baco, *chats), max_new_tokens=2, do_sample=False)
