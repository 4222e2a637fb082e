"""Models with recurrent layers: a state for each row, saved where drafts may be rejected."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mamba2 import modeling_mamba2

from baco import Baco
from baco.kv_cache.protocol import finish
from baco.kv_cache.recurrent import RecurrentKVCache, RollBackCosts
from baco.models.forward import state_update
from baco.models.forward.state_update import fewer_passes
from baco.models.model import PairModel
from tests.fuzzing import budget
from tests.test_engine import reference, rules, without_turn_cut
from tests.test_long_rope import decoded
from tests.tiny import drafting, save_tiny_pair, tiny_config, tiny_model

# Gated delta rule and attention; a state that takes one token at a time; attention beside a state
# in one layer; convolutions alone.
KINDS = ("qwen3_next", "jamba", "falcon_h1", "lfm2")


@pytest.fixture(scope="module")
def models() -> Callable[[str], PairModel]:
    made: dict[str, PairModel] = {}

    def make(kind: str) -> PairModel:
        if kind not in made:
            model = tiny_model(tiny_config(kind))
            made[kind] = PairModel("tiny", model, None, vocab_size=model.config.vocab_size)
            assert made[kind].can_roll_back
        return made[kind]

    return make


# Whether states are saved before every draft token, or once before all of them.
WAYS = {"restored": True, "read again": False}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=budget(4))
@given(data=st.data())
@torch.inference_mode()
def test_a_cache_agrees_with_full_forwards_however_it_is_read_and_rolled_back(
    models: Callable[[str], PairModel], kind: str, way: str, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecurrentKVCache, "_saving_pays", lambda *_: WAYS[way])
        check_against_full_forwards(models(kind), way, data)


def check_against_full_forwards(model: PairModel, way: str, data: st.DataObject) -> None:
    cache = model.new_cache()
    token = st.integers(2, 390)
    texts: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 3))):
        length = data.draw(st.integers(0, 20))
        texts.append(data.draw(st.lists(token, min_size=length, max_size=length)))
        cache.copy_prefix(finish(cache.prefill(texts[-1])), 1)
    again: list[list[int]] = [[] for _ in texts]  # tokens that must be read once more
    for _ in range(data.draw(st.integers(1, 4))):
        new = [data.draw(st.lists(token, max_size=5)) for _ in texts]
        new[0] = new[0] or [7]
        new = [pending + more if more else [] for pending, more in zip(again, new, strict=True)]
        drafted = data.draw(st.integers(0, 4))
        span = max(map(len, new))
        keep = min(data.draw(st.integers(1, 4)), span)
        texts = [text + more for text, more in zip(texts, new, strict=True)]
        tokens = torch.tensor([[0] * (span - len(more)) + more for more in new])
        cache.expect_drafts(drafted)
        logits = model.to_common_vocab(cache.extend(tokens, [len(more) for more in new], keep))
        for row, (text, more) in enumerate(zip(texts, new, strict=True)):
            for back in range(1, 1 + min(len(more), keep)):
                expected = model.score(text[: len(text) - back + 1])[-1]
                assert torch.allclose(logits[row, -back], expected, atol=2e-3)
        removed = [
            data.draw(st.integers(0, max(0, min(len(more) - len(pending), drafted or 1))))
            for more, pending in zip(new, again, strict=True)
        ]
        kept = [len(text) - count for text, count in zip(texts, removed, strict=True)]
        cache.roll_back(kept)
        held = list(cache.lengths)
        if way == "restored":
            assert held == kept
        # Where nothing was saved, a row that lost its last token must read it again.
        lost = [texts[row][kept[row] :] if not drafted else [] for row in range(len(texts))]
        again = [
            texts[row][held[row] : kept[row]] + lost[row] if new[row] else again[row]
            for row in range(len(texts))
        ]
        order = data.draw(st.permutations(range(len(texts))))
        cache.drop(kept=order)
        texts, again = [texts[row][: held[row]] for row in order], [again[row] for row in order]
        assert cache.lengths == [len(text) for text in texts]


@torch.inference_mode()
def test_a_state_is_not_rolled_back_to_where_it_was_not_saved(
    models: Callable[[str], PairModel],
) -> None:
    cache = models("jamba").new_cache()
    assert isinstance(cache, RecurrentKVCache)
    cache.copy_prefix(finish(cache.prefill([5, 6, 7])), 1)
    cache.expect_drafts(0)
    cache.extend(torch.tensor([[8, 9]]), [2], 1)
    with pytest.raises(ValueError, match="only to where it was saved"):
        cache.roll_back([3])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Baco]:
    """A pair whose planner drafts, as if reading one more token cost little; loaded once."""
    loaded: dict[str, Baco] = {}

    def load(kind: str) -> Baco:
        if kind not in loaded:
            folder = save_tiny_pair(tmp_path_factory.mktemp(kind), kind, noise=0.2)
            loaded[kind] = drafting(without_turn_cut(Baco.load(str(folder), dtype="float32")))
        return loaded[kind]

    return load


# Temperatures, numbers of samples, and tokens.
SETTINGS = {
    "qwen3_next": [(0.0, 1, 12), (0.0, 8, 12), (1.0, 1, 12), (1.0, 8, 12)],
    "jamba": [(1.0, 8, 16)],
}
# Of the naive loop, by kind, prompt and sampling.
EXPECTED: dict[tuple[Any, ...], Any] = {}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", SETTINGS)
def test_drafts_are_rejected_and_answers_are_those_of_the_naive_loop(
    pairs: Callable[[str], Baco], monkeypatch: pytest.MonkeyPatch, kind: str, way: str
) -> None:
    baco = pairs(kind)
    held: list[tuple[list[int], list[int]]] = []
    roll_back = RecurrentKVCache.roll_back

    def observed(cache: RecurrentKVCache, lengths: Sequence[int]) -> None:
        kept = [min(pair) for pair in zip(cache.lengths, lengths, strict=True)]
        roll_back(cache, lengths)
        held.append((kept, cache.lengths))

    monkeypatch.setattr(RecurrentKVCache, "_saving_pays", lambda *_: WAYS[way])
    monkeypatch.setattr(RecurrentKVCache, "roll_back", observed)
    rule, prompts = rules(baco.pair)["Rand:0.5"], ["Plan a walk.", "Swim, then eat, and swim."]
    for temperature, n, length in SETTINGS[kind]:
        sampling: dict[str, Any] = {"seed": 5, "temperature": temperature, "max_tokens": length}
        answers, engine = decoded(baco, prompts, "Rand:0.5", speculate=True, n=n, **sampling)
        for prompt, samples in zip(prompts, answers, strict=True):
            for sample in {0, n - 1}:
                key = kind, prompt, temperature, sample
                if key not in EXPECTED:
                    EXPECTED[key] = reference(baco, prompt, rule, sample=sample, **sampling)
                assert samples[sample] == EXPECTED[key]
        assert engine.stats.drafted > engine.stats.accepted > 0
    # Where states are saved once, accepted tokens are lost with the rejected ones. Jamba reads the
    # last token before the drafts alone, and saves its states behind it.
    lost = any(now != kept for kept, now in held)
    assert lost == (way == "read again") or kind == "jamba"


@torch.inference_mode()
def test_the_way_to_roll_back_is_chosen_by_the_bytes_of_states_and_the_tokens_read_again(
    models: Callable[[str], PairModel],
) -> None:
    def tokens_lost(costs: RollBackCosts, removed: int, steps: int = 20) -> int:
        """How many accepted tokens a cache lost in its last step, in which 4 were drafted."""
        cache = models("qwen3_next").new_cache()
        assert isinstance(cache, RecurrentKVCache)
        cache._costs = costs
        cache.copy_prefix(finish(cache.prefill([5, 6, 7])), 2)
        for step in range(steps):
            (length, other), count = cache.lengths, 5
            taken = removed if step < steps - 1 else 2
            cache.expect_drafts(4)
            cache.extend(torch.tensor([[8, 9, 10, 11, 12]] * 2), [count] * 2, 1)
            kept = [length + count - taken, other + count - taken]
            cache.roll_back(kept)
        return sum(kept) - sum(cache.lengths)

    dear_copies, dear_tokens = RollBackCosts(1e-6, 1e-4, 0.0), RollBackCosts(1e-9, 1e-3, 1e-3)
    assert tokens_lost(dear_copies, removed=2) > 0
    assert tokens_lost(dear_tokens, removed=2) == 0
    # Where nothing was rejected lately, nothing is expected to be read again.
    assert tokens_lost(dear_tokens, removed=0, steps=150) > 0


@torch.inference_mode()
def test_a_row_takes_its_states_and_saved_copies_from_the_budget(
    models: Callable[[str], PairModel],
) -> None:
    model = models("falcon_h1")
    cache = model.new_cache()
    prefix = finish(cache.prefill([5, 6, 7]))
    states = sum(state.nbytes for state in prefix.cache.states())
    assert model.row_size.fixed == states > 0
    assert model.row_size.per_token > 0


def test_kept_prefixes_continue_recurrent_models(tmp_path: Path) -> None:
    folder = save_tiny_pair(tmp_path, "qwen3_next", context=256)
    baco = without_turn_cut(Baco.load(str(folder), dtype="float32"))
    sampling: dict[str, Any] = {"router": "Rand:0.5", "seed": 5, "max_tokens": 12}
    prompt = 2 * "Where should I go this summer, when the sea is warm and I have only little time? "
    first = baco.generate(prompt, **sampling)
    again = baco.generate(prompt, **sampling)
    assert [a.token_ids for a in first] == [a.token_ids for a in again]
    assert again[0].cached_tokens > 0


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("case", ["one step for each head", "one step for each number"])
@pytest.mark.parametrize("at_once", [True, False])
@torch.inference_mode()
def test_a_state_is_updated_as_transformers_updates_it(
    monkeypatch: pytest.MonkeyPatch, groups: int, case: str, at_once: bool
) -> None:
    monkeypatch.setattr(state_update, "_SMALL", 2**30 if at_once else 0)
    rows, heads, width, size = 3, 4, 8, 16
    torch.manual_seed(0)
    state = torch.randn(rows, heads, width, size)
    step = torch.randn(rows, heads, 1).expand(-1, -1, width)
    if case == "one step for each number":
        step = torch.randn(rows, heads, width)
    arguments = (
        torch.randn(rows, heads, width),
        step,
        (-torch.rand(heads))[:, None, None].expand(-1, width, size),
        torch.randn(rows, groups, size),
        torch.randn(rows, groups, size),
        torch.randn(heads)[:, None].expand(-1, width),
    )
    bias = torch.randn(heads)[:, None].expand(-1, width)

    def update(own: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = modeling_mamba2.mamba2_selective_state_update(
            own, *arguments, dt_bias=bias, dt_softplus=True
        )
        return output

    theirs, ours = state.clone(), state.clone()
    expected = update(theirs)
    original = modeling_mamba2.mamba2_selective_state_update
    with fewer_passes([tiny_model(tiny_config("mamba2")).backbone.layers[0].mixer]):
        assert modeling_mamba2.mamba2_selective_state_update is not original
        output = update(ours)
    assert modeling_mamba2.mamba2_selective_state_update is original
    assert torch.allclose(output, expected, atol=1e-5)
    assert torch.allclose(ours, theirs, atol=1e-5)


@torch.inference_mode()
def test_a_scan_in_short_chunks_reads_what_long_chunks_read() -> None:
    model = tiny_model(tiny_config("mamba2", chunk_size=256))
    mixers = [layer.mixer for layer in model.backbone.layers]
    ids = torch.arange(2, 42)[None]
    expected = model(ids).logits
    with fewer_passes(mixers):
        assert all(mixer.chunk_size < len(ids[0]) for mixer in mixers)
        logits = model(ids).logits
    assert all(mixer.chunk_size == 256 for mixer in mixers)
    assert torch.allclose(logits, expected, atol=1e-4)
