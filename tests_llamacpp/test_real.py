"""Real GGUF files: SmolLM2 135M in Q4_1, and Gemma 3 270M in Q4_K_M, which has sliding windows.

`python -m tests_real.fetch` gets them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_cpp import llama_cpp as library
from torch import Tensor

from baco import Baco
from baco.kv_cache.protocol import finish
from baco.models.llama_cpp_model import LlamaCppModel
from tests.test_engine import reference, rules, tokens_and_sources, without_turn_cut
from tests_llamacpp.files import Alone
from tests_real.fetch import path_of

PROMPT = "Recommend a summer destination and say why."
ROUTERS = ("P:0.5", "H-Punc:1", "Rand:0.5", "P-Punc:0.6", "Aligned")


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def path(request: pytest.FixtureRequest) -> str:
    file: Path = path_of(request.param)
    if not file.exists():
        pytest.skip(f"{file} is not there: python -m tests_real.fetch {request.param}")
    return str(file)


def template(path: str) -> str | None:
    """Gemma 3 270M comes without a chat template, and needs its first token."""
    return "{{ bos_token }}{{ messages[-1]['content'] }}" if "gemma" in path else None


@pytest.fixture(scope="module")
def baco(path: str) -> Baco:
    return without_turn_cut(Baco.load(base=path, aligned=path, chat_template=template(path)))


@pytest.fixture(scope="module")
def alone(baco: Baco, path: str) -> Baco:
    models: dict[str, Any] = {"base": Alone(path), "aligned": Alone(path)}
    return replace(baco, pair=replace(baco.pair, **models))


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """Kullback-Leibler divergence of rows of logits, in nats."""
    one, other = (logits.double().log_softmax(-1) for logits in (one, other))
    return (one.exp() * (one - other)).nansum(-1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_a_naive_loop(
    baco: Baco, alone: Baco, path: str, temperature: float
) -> None:
    settings: dict[str, Any] = {"seed": 7, "temperature": temperature, "max_tokens": 8}
    for router in ROUTERS:
        rule = rules(baco.pair)[router]
        # llama.cpp rounds Gemma's K-quants otherwise where a call has four tokens or more.
        for n in (1,) if "gemma" in path else (1, 8):
            answer = baco.generate(PROMPT, router=router, n=n, **settings)[n // 2]
            expected = reference(alone, PROMPT, rule, sample=answer.sample, **settings)
            assert tokens_and_sources(answer) == expected, router


def test_rows_of_one_call_differ_by_rounding_alone(baco: Baco, path: str) -> None:
    ids = list(baco.pair.renderer.render(PROMPT).aligned_ids)
    cache = baco.pair.aligned.new_cache()
    cache.copy_prefix(finish(cache.prefill(ids[:-1])), 8)
    rows = cache.extend(torch.tensor([ids[-1:]] * 8), [1] * 8, 1)[:, 0]
    assert (rows == rows[0]).all()
    (single,) = Alone(path).score(ids)
    if "gemma" in path:
        assert divergence(single, rows[0]) < 0.02
    else:
        assert torch.equal(rows[0], single)


def test_rows_beyond_a_sliding_window_can_be_rolled_back(baco: Baco, path: str) -> None:
    model = baco.pair.aligned
    assert isinstance(model, LlamaCppModel)
    words = " ".join(f"The {at}th day we went on to the next village." for at in range(99))
    text = [2, *baco.pair.tokenizer.encode(words, add_special_tokens=False)][:761]
    cache = model.new_cache()
    cache.copy_prefix(None, 1)
    cache.extend(torch.tensor([text[:500]]), [500], 1)
    # The row reads draft tokens one by one and rejects them all, in cells that the library may
    # take from tokens that have left the window by then.
    for start in range(500, 752, 4):
        for token in text[:4]:
            cache.extend(torch.tensor([[token]]), [1], 1)
        cache.roll_back([start])
        cache.extend(torch.tensor([text[start : start + 4]]), [4], 1)
    row = cache.extend(torch.tensor([[text[752]]]), [1], 1)[0]
    memory = library.llama_get_memory(cache.context._room.pointer)
    assert library.llama_memory_seq_pos_min(memory, cache.rows[0].ids[0]) == 0  # all is held
    (single,) = Alone(path).score(text[:753])
    assert divergence(single, row) < 0.02


def test_distributions_are_near_those_of_the_dequantised_weights(baco: Baco, path: str) -> None:
    plain = Baco.load(
        base=path, aligned=path, dtype="float32", backend="local", chat_template=template(path)
    )
    ids = plain.pair.renderer.render(PROMPT).aligned_ids
    ours, theirs = (one.pair.aligned.score(ids) for one in (baco, plain))
    assert divergence(theirs, ours).mean() < 0.03
    assert (ours.argmax(-1) == theirs.argmax(-1)).double().mean() > 0.8
