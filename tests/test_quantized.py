"""Weights in 8 and 4 bits, for either model, take less memory and give nearly the same logits."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from baco import Baco, BacoError
from baco.calibration.agreement import answer_logits
from baco.cli import run
from baco.decoder import Decoder
from baco.engine.engine import Engine
from baco.models.forward.packed_linear import weights
from baco.models.loading import Placement
from baco.models.model import PairModel
from tests.pairs import PairFolder

PROMPT = "Recommend a summer destination"
IDS = list(range(5, 40))
CPU = torch.device("cpu")


def stored(model: PairModel) -> int:
    """Bytes of a model's weights."""
    return sum(stored for *_, stored in weights(model.model))


def kinds(model: PairModel) -> set[str]:
    return {type(weight.data).__name__ for weight in model.model.parameters()}


# Of the demo pair's weights a sixth are the embedding, which stays as it is.
@pytest.mark.parametrize(
    ("quantize", "size", "off", "same"), [("int8", 0.40, 0.1, 0.95), ("int4", 0.50, 1.0, 0.8)]
)
def test_quantised_weights_take_less_memory_and_give_nearly_the_same_logits(
    demo: Baco, quantize: str, size: float, off: float, same: float
) -> None:
    [answer] = demo.generate(PROMPT, router="Aligned", seed=1)
    prompt = demo.pair.renderer.render(PROMPT)
    small = Baco.load("demo", quantize=quantize)
    for model in ("base", "aligned"):
        quantised_model, whole = getattr(small.pair, model), getattr(demo.pair, model)
        assert stored(quantised_model) < size * stored(whole)
        assert "bits a weight" in quantised_model.weights_format
        ids = getattr(prompt, f"{model}_ids")
        exact, quantised = (
            answer_logits(loaded, ids, answer.token_ids) for loaded in (whole, quantised_model)
        )
        can_win = exact > exact.amax(dim=-1, keepdim=True) - 10
        assert (exact - quantised)[can_win].abs().mean() < off
        assert (exact.argmax(-1) == quantised.argmax(-1)).float().mean() > same
    [answer] = small.generate(PROMPT, router="P-Punc:0.4", seed=1)
    assert answer.finish_reason == "stop"
    assert set(answer.sources) == {"base", "aligned"}


@pytest.mark.parametrize("quantize", ["base=int8", {"base": "int8"}])
def test_one_model_alone_may_be_quantised(demo: Baco, quantize: Any) -> None:
    pair = Baco.load("demo", quantize=quantize, packed=False).pair
    assert kinds(pair.base) == {"Tensor", "Int8Tensor"}
    assert kinds(pair.aligned) == {"Tensor"}
    assert stored(pair.base) < 0.4 * stored(pair.aligned)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_drafts_change_no_token_of_a_quantised_pair(quantize: str) -> None:
    pair = Baco.load("demo", quantize=quantize).pair
    all_answers = []
    for speculate in (True, False):
        decoder = Decoder(pair, Engine(pair, speculate=speculate))
        router = Baco(pair).router("P-Punc:0.4")
        decoder.submit(PROMPT, router=router, n=3, seed=2, max_tokens=32)
        answers = {}
        while decoder.busy:
            for chunk in decoder.step():
                if chunk.completion is not None:
                    completion = chunk.completion
                    answers[chunk.sample] = (completion.token_ids, completion.sources)
        all_answers.append(answers)
    assert all_answers[0] == all_answers[1]


def test_a_checkpoint_that_is_quantised_already_loads_as_it_is(
    random_pair: Callable[..., PairFolder], tmp_path: Path
) -> None:
    folder = random_pair("llama")
    keywords = Placement(CPU, "float32", "int8").keywords(str(folder.aligned))
    quantised = AutoModelForCausalLM.from_pretrained(folder.aligned, **keywords)
    quantised.save_pretrained(tmp_path)
    whole = Baco.load(base=str(folder.base), aligned=str(folder.aligned), dtype="float32").pair
    whole.tokenizer.save_pretrained(tmp_path)
    baco = Baco.load(base=str(folder.base), aligned=str(tmp_path))
    assert "Int8Tensor" in kinds(baco.pair.aligned)
    assert baco.pair.aligned.model.dtype == torch.float32
    with torch.inference_mode():
        expected = quantised(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(baco.pair.aligned.score(IDS), expected)
    assert baco.generate("Plan a walk.", router="Rand:0.5", max_tokens=8)[0].token_ids


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_without_the_extra_the_error_names_the_package_to_install(
    quantize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(BacoError, match=r"pip install 'baco\[quantization\]'"):
        Baco.load("demo", quantize=quantize)


def test_invalid_quantisation_is_refused_before_loading(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["generate", PROMPT, "--quantize", "int3"]) == 2
    assert "quantize is 'int3': use int8 or int4" in capsys.readouterr().err
    with pytest.raises(BacoError, match="not both"):
        Baco.load("demo", quantize="int8", quantization_config=object())


def test_the_command_line_quantises(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", PROMPT, "--quantize", "aligned=int8", "--max-tokens", "4", "--json"]
    assert run(arguments) == 0
    assert "bits a weight" in capsys.readouterr().out
