"""Compiled forwards give the logits of plain ones and are compiled at load, not while decoding."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from baco import Baco
from baco.cli import run
from baco.kv_cache.batched import BatchedKVCache
from baco.kv_cache.protocol import finish
from baco.models.forward.compiled import CompiledForward
from baco.models.forward.dense import DenseForward
from baco.models.pair import lay_out
from tests.pairs import PairFolder
from tests.test_engine import tokens_and_sources

PROMPT = "What do you recommend for a rainy day?"
ROUTERS = ("P-Punc:0.4", "H-FC:1.5", "Rand:0.5", "Aligned", "Nudging:0.5")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler is here")


@pytest.fixture(scope="module")
def compiled() -> Baco:
    return Baco.load("demo", dtype="float32", compile=True)


@pytest.fixture(scope="module")
def plain() -> Baco:
    return Baco.load("demo", dtype="float32")


def functions() -> int:
    """Number of functions compiled so far."""
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("router", ROUTERS)
def test_answers_have_the_same_tokens_and_compile_nothing(
    compiled: Baco, plain: Baco, router: str
) -> None:
    before = functions()
    assert before > 0
    for seed, n in ((0, 1), (1, 1), (2, 3), (3, 9)):
        settings: dict[str, Any] = {"router": router, "n": n, "seed": seed, "max_tokens": 48}
        expected = plain.generate(PROMPT, **settings)
        assert [tokens_and_sources(c) for c in compiled.generate(PROMPT, **settings)] == [
            tokens_and_sources(c) for c in expected
        ]
    assert functions() == before


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("span", [1, 2, 7, 40])
@torch.inference_mode()
def test_logits_are_the_plain_forwards_for_any_rows_tokens_and_lengths(
    compiled: Baco, plain: Baco, rows: int, span: int
) -> None:
    ids = torch.randint(5, 1000, (rows, span), generator=torch.Generator().manual_seed(3))
    for length in (1, 2, 30, 130):
        logits = []
        for baco in (compiled, plain):
            cache = baco.pair.base.new_cache()
            cache.copy_prefix(finish(cache.prefill(list(range(7, 7 + length)))), rows)
            logits.append(cache.extend(ids, [max(1, span - row) for row in range(rows)], 1))
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_grouped_query_attention_and_bfloat16_compile_too(
    random_pair: Callable[..., PairFolder],
) -> None:
    folder = random_pair("qwen3", noise=0.1)
    model = AutoModelForCausalLM.from_pretrained(folder.base, dtype=torch.bfloat16)
    lay_out(model)
    lean = DenseForward.of(model)
    assert lean is not None
    logits = []
    for forward in (lean, CompiledForward(lean)):
        cache = BatchedKVCache(forward)
        cache.copy_prefix(finish(BatchedKVCache(lean).prefill([3, 4, 5, 6])), 2)
        logits.append(cache.extend(torch.tensor([[5, 6, 7], [8, 9, 10]]), [3, 2], 2).float())
    # Compiled code rounds less often, so single numbers differ more than most.
    difference = (logits[0] - logits[1]).square().mean().sqrt()
    assert difference < 0.02 * logits[0].std()


def test_without_a_compiler_there_is_one_warning_and_answers_are_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, plain: Baco
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise RuntimeError("no working C++ compiler found\nlook here, and there")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: missing)
    baco = Baco.load("demo", dtype="float32", compile=True)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith("not compiled: no working C++ compiler found (")
    settings: dict[str, Any] = {"router": "P-Punc:0.4", "seed": 1, "max_tokens": 12}
    assert tokens_and_sources(baco.generate(PROMPT, **settings)[0]) == tokens_and_sources(
        plain.generate(PROMPT, **settings)[0]
    )


def test_a_model_with_transformers_own_forward_is_not_compiled(
    random_pair: Callable[..., PairFolder], caplog: pytest.LogCaptureFixture
) -> None:
    folder = random_pair("starcoder2")
    Baco.load(base=str(folder.base), aligned=str(folder.aligned), compile=True)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "not compiled: Starcoder2ForCausalLM runs as it is in transformers" in messages[0]


def test_the_command_line_notes_that_it_compiles(
    compiled: Baco, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", PROMPT, "--compile", "--max-tokens", "8", "--seed", "1"]) == 0
    assert capsys.readouterr().err.count("compiling") == 2


def test_a_thread_that_did_not_load_may_hold_as_many_functions(compiled: Baco) -> None:
    settings: dict[str, Any] = {"router": "P-Punc:0.4", "seed": 1, "max_tokens": 8}

    def limit() -> int:
        compiled.generate(PROMPT, **settings)
        return torch._dynamo.config.recompile_limit

    with ThreadPoolExecutor(1) as other:
        assert other.submit(limit).result() >= 64
