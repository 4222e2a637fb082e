"""What llama.cpp holds of texts: shared prompts, kept prefixes, room that grows, one decode."""

from pathlib import Path
from typing import Any

import pytest
import torch

from baco import Baco
from baco.engine.engine import Engine
from baco.errors import BacoError
from baco.kv_cache.protocol import finish
from baco.models.llama_cpp.context import LlamaContext
from baco.models.llama_cpp_model import LlamaCppModel
from baco.sampling.params import SamplingParams
from tests.test_engine import request_of
from tests_llamacpp.files import write_demo

PROMPT = "Recommend a summer destination"
LONG = " ".join(f"Tell me about place {number}." for number in range(24))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def baco(paths: dict[str, Any]) -> Baco:
    return Baco.load(**paths)


@pytest.fixture
def model(baco: Baco) -> LlamaCppModel:
    assert isinstance(baco.pair.aligned, LlamaCppModel)
    return baco.pair.aligned


def texts(baco: Baco, prompt: Any, **settings: Any) -> list[tuple[Any, ...]]:
    asked: dict[str, Any] = {"router": "P-Punc:0.4", "n": 4, "seed": 3, "max_tokens": 24}
    answers = baco.generate(prompt, **asked | settings)
    return [(one.token_ids, one.sources) for one in answers]


def test_a_prefix_that_is_kept_changes_no_answer(baco: Baco, paths: dict[str, Any]) -> None:
    forgetful = Baco.load(**paths, enable_prefix_caching=False)
    first = baco.generate(LONG, n=1, seed=1, router="P-Punc:0.4", max_tokens=40)[0]
    turns = [
        {"role": "user", "content": LONG},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": PROMPT},
    ]
    assert texts(baco, turns) == texts(forgetful, turns)
    assert texts(baco, turns) == texts(forgetful, turns)
    assert baco.prefix_cache is not None
    assert all(baco.prefix_cache.hits[name] > 64 for name in ("base", "aligned"))


def test_a_context_that_grows_takes_its_rows_along(model: LlamaCppModel) -> None:
    ids = list(range(300, 420))
    idle = model.model.take_idle()  # of an earlier test
    if idle is not None:
        idle.free()
    cache = model.new_cache()
    cache.copy_prefix(finish(cache.prefill(ids, 2)), 2)
    rows = [[7, 8, 9] * 40, [9, 7] * 60]
    sizes = set()
    for at in range(0, 120, 8):
        tokens = torch.tensor([row[at : at + 8] for row in rows])
        grown = cache.extend(tokens, [8, 8], 8).clone()
        sizes.add(cache.context.cells)
    assert len(sizes) > 1
    for row, logits in zip(rows, grown, strict=True):
        expected = model.score([*ids, *row])[-8:]
        assert torch.allclose(logits, expected, atol=2e-2)
    cache.context.renew()
    cache.roll_back([120 + 119] * 2)
    again = cache.extend(torch.tensor([[row[-1]] for row in rows]), [1, 1], 1)
    assert torch.allclose(again[:, 0], grown[:, -1], atol=2e-2)


def test_rows_share_the_cells_of_their_prompt_and_free_them(model: LlamaCppModel) -> None:
    cache = model.new_cache()
    cache.copy_prefix(finish(cache.prefill(list(range(200)), 8)), 8)
    for _ in range(4):
        cache.extend(torch.full((8, 1), 5), [1] * 8, 1)
    assert cache.context.cells == 256  # 200 + 8 × 4
    cache.drop(kept=[7, 2])
    assert cache.lengths == [204, 204]
    cache.drop(kept=[])
    cache.context.reserve(250)
    assert cache.context.cells == 256


def test_logits_are_views_where_all_rows_read_alike(model: LlamaCppModel) -> None:
    cache = model.new_cache()
    cache.copy_prefix(finish(cache.prefill([3, 4, 5])), 2)
    first = cache.extend(torch.tensor([[6], [7]]), [1, 1], 1)
    second = cache.extend(torch.tensor([[8], [9]]), [1, 1], 1)
    assert first.data_ptr() == second.data_ptr()
    uneven = cache.extend(torch.tensor([[1, 2], [0, 2]]), [2, 1], 2)
    assert uneven.data_ptr() != second.data_ptr()
    assert not uneven[1, 0].any()


def test_one_model_under_two_prompts_is_held_once_and_read_by_one_call(
    paths: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Baco.load(base=paths["aligned"], aligned=paths["aligned"])
    apart = Baco.load(base=paths["aligned"], aligned=paths["aligned"])
    assert one.pair.base.model is one.pair.aligned.model
    apart.pair.__dict__["joint"] = "compared with it"
    assert texts(one, PROMPT) == texts(apart, PROMPT)
    calls = list[int]()
    read = LlamaContext.read

    def counted(context: LlamaContext, reads: Any) -> Any:
        calls.append(len(reads))
        return read(context, reads)

    monkeypatch.setattr(LlamaContext, "read", counted)
    engine = Engine(one.pair, speculate=False)
    never = tuple((end, -99.0) for end in one.pair.end_ids)
    params = SamplingParams(n=2, max_tokens=8, seed=1, logit_bias=never)
    engine.add(request_of(one.pair.renderer.render(PROMPT), params, one.router("P-Punc:0.4")))
    while engine.busy:
        engine.step()
    assert calls[-8:] == [4] * 8  # two rows under both prompts, in every step


def test_more_answers_than_the_library_has_sequences_wait_for_their_turn(baco: Baco) -> None:
    answers = texts(baco, "Hello", n=260, max_tokens=2)
    assert len(answers) == 260
    assert answers[:4] == texts(baco, "Hello", n=4, max_tokens=2)


def test_answers_wait_where_the_memory_limit_is_low(baco: Baco, paths: dict[str, Any]) -> None:
    small = Baco.load(**paths, memory="12MiB")
    assert texts(small, PROMPT, n=12) == texts(baco, PROMPT, n=12)
    cache = small.pair.aligned.new_cache()
    assert cache.allocated_bytes() < 12 * 2**20
    with pytest.raises(BacoError, match=r"memory is 0\.1 MiB"):
        Baco.load(**paths, memory="100KiB").generate(PROMPT, router="P:0.3")


def test_contexts_keep_the_memory_limit_while_they_grow(
    baco: Baco, paths: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 32 * 2**20
    small = Baco.load(**paths, memory=limit)
    per_token = small.pair.aligned.row_size.per_token
    open_context, held, peaks = LlamaContext._open, dict[LlamaContext, int](), list[int]()

    def counted(context: LlamaContext, cells: int, sequences: int) -> None:
        used = sum(one.length for one in context._live if one.free.alive)
        copied = min(used, context.cells) * per_token  # the state, beside the new context
        open_context(context, cells, sequences)
        held[context] = context.cells * per_token
        peaks.append(sum(held.values()) + copied)

    monkeypatch.setattr(LlamaContext, "_open", counted)
    prompts = [LONG, PROMPT, "Tell me a story about a sailor"]
    settings: dict[str, Any] = {"router": "P-Punc:0.4", "n": 16, "seed": 3, "max_tokens": 24}
    answers = small.generate_batch(prompts, **settings)
    assert limit / 4 < max(peaks) <= limit
    others = baco.generate_batch(prompts, **settings)
    pairs = [pair for two in zip(answers, others, strict=True) for pair in zip(*two, strict=True)]
    same = sum(one.token_ids == other.token_ids for one, other in pairs)
    assert same >= 0.9 * len(pairs)  # but for two tokens that are as likely, up to rounding


def test_what_a_damaged_row_leaves_reaches_no_other_row(
    tmp_path: Path, baco: Baco, paths: dict[str, Any]
) -> None:
    import gguf

    # The keys and values of a token whose embedding is NaN are NaN. Embeddings are also the last
    # matrix, so every row of logits has one NaN, at this token.
    broken, token = tmp_path / "broken.gguf", baco.pair.tokenizer.encode(" Oslo")[0]
    broken.write_bytes(Path(paths["aligned"]).read_bytes())
    reader = gguf.GGUFReader(broken, "r+")
    (embedding,) = (tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    embedding.data[token] = float("nan")
    reader.data.flush()
    damaged = Baco.load(base=paths["base"], aligned=str(broken))
    answer = damaged.generate("Hello", n=1, seed=1, router="Aligned", max_tokens=4)[0]
    assert answer.error is not None
    assert "NaN" in answer.error and "llama.cpp" in answer.error
    cache = damaged.pair.aligned.new_cache()
    cache.copy_prefix(finish(cache.prefill([300, 301])), 2)
    logits = cache.extend(torch.tensor([[token], [302]]), [1, 1], 1)
    assert logits[0].isnan().all()
    assert logits[1].isnan().sum() == 1
    cache.clear([1], [0])
    cache.drop(kept=[1])
    cache.copy_prefix(finish(cache.prefill([300, 301, 302])), 1)
    logits = cache.extend(torch.tensor([[303], [303]]), [1, 1], 1)
    assert (logits.isnan().sum(dim=-1) == 1).all()


def test_a_context_that_the_machine_cannot_hold_ends_its_answers_in_one_line(
    paths: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    baco = Baco.load(**paths)
    open_context = LlamaContext._new_pointer

    def refused(context: LlamaContext, cells: int, sequences: int) -> Any:
        return None if cells > 512 else open_context(context, cells, sequences)

    monkeypatch.setattr(LlamaContext, "_new_pointer", refused)
    fits = texts(baco, PROMPT, n=2)
    for answer in baco.generate(PROMPT, n=8, seed=3, router="P-Punc:0.4", max_tokens=200):
        assert answer.error is not None
        assert "there is no memory for" in answer.error and "\n" not in answer.error
        assert "lower max_tokens or max_rows" in answer.error
    assert texts(baco, PROMPT, n=2) == fits
