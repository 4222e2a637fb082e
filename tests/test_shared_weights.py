"""A base model and a PEFT adapter over it are a pair on one set of weights."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from baco import Baco, BacoError
from baco.models.forward.packed_linear import weights
from tests.pairs import ARCHITECTURES, PairFolder
from tests.test_engine import reference, rules, tokens_and_sources, without_turn_cut

PROMPTS = ["What do you recommend for a rainy day?", "Plan a walk."]
IDS = list(range(1, 24))


@pytest.fixture(scope="module")
def folders(
    random_pair: Callable[..., PairFolder], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    saved: dict[str, dict[str, Any]] = {}

    def save(architecture: str) -> dict[str, Any]:
        if architecture not in saved:
            folder = tmp_path_factory.mktemp("adapter")
            saved[architecture] = save_adapter(random_pair(architecture), folder)
        return saved[architecture]

    return save


def save_adapter(pair: PairFolder, folder: Path, **options: Any) -> dict[str, Any]:
    """An adapter over a pair's base, with its aligned tokenizer; where that has more tokens than
    the base has embeddings, the adapter brings them.
    """
    tokenizer = AutoTokenizer.from_pretrained(pair.aligned)
    model = AutoModelForCausalLM.from_pretrained(pair.base)
    lora: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    torch.manual_seed(0)
    if model.get_input_embeddings().num_embeddings < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
        lora["modules_to_save"] = ["embed_tokens", "lm_head"]
    adapted = get_peft_model(model, LoraConfig(**lora | options, init_lora_weights=False))
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"base": str(pair.base), "aligned": str(folder)}


def storages(*models: Any) -> dict[int, int]:
    """Bytes of every storage that holds weights of the models, each once."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_the_base_weights_are_held_once(folders: Callable[[str], dict[str, Any]]) -> None:
    options = folders("llama")
    alone = storages(AutoModelForCausalLM.from_pretrained(options["base"]))
    adapter = sum(
        weight.numel() * weight.element_size()
        for name, weight in PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(options["base"]), options["aligned"]
        ).named_parameters()
        if "lora_" in name
    )
    pair = Baco.load(**options, dtype="float32", packed=False).pair
    together = storages(pair.base.model, pair.aligned.model)
    assert sum(together.values()) == sum(alone.values()) + adapter
    assert 0 < adapter < 0.5 * sum(alone.values())
    packed = Baco.load(**options, dtype="float32").pair
    assert packed.base.model is packed.aligned.model
    plain = AutoModelForCausalLM.from_pretrained(options["base"])
    size = sum(size for _, size, _ in weights(packed.base.model))
    assert size == sum(size for _, size, _ in weights(plain)) + adapter // 4  # bytes a number


def test_each_model_gives_the_logits_of_the_model_loaded_alone(
    folders: Callable[[str], dict[str, Any]],
) -> None:
    options = folders("llama")
    pair = Baco.load(**options, dtype="float32", packed=False).pair
    base = AutoModelForCausalLM.from_pretrained(options["base"]).eval()
    with torch.inference_mode():
        own = base(torch.tensor([IDS])).logits[0, :, : pair.vocabulary.size]
        adapted = PeftModel.from_pretrained(base, options["aligned"]).eval()
        other = adapted(torch.tensor([IDS])).logits[0, :, : pair.vocabulary.size]
    for _ in range(2):  # each model leaves the model as the other wants it
        assert torch.equal(pair.base.score(IDS), own)
        assert torch.equal(pair.aligned.score(IDS), other)
    assert (own - other).abs().max() > 0.1


def test_several_threads_decode_with_one_pair(folders: Callable[[str], dict[str, Any]]) -> None:
    options = folders("llama") | {"dtype": "float32", "packed": False}
    prompts = [f"{prompt} ({number})" for prompt in PROMPTS for number in range(4)]

    def decode(baco: Baco, prompt: str) -> list[tuple[int, ...]]:
        answers = baco.generate(prompt, router="Rand:0.5", n=2, seed=1, max_tokens=12)
        return [answer.token_ids for answer in answers]

    baco = Baco.load(**options)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(partial(decode, baco), prompts))
    finally:
        sys.setswitchinterval(interval)
    assert answers == [decode(baco, prompt) for prompt in prompts]


ADAPTERS: dict[str, dict[str, Any]] = {
    "embeddings of its own": {},
    "embeddings as they were, with more rows": {"modules_to_save": None},
    "some tokens trained": {"modules_to_save": None, "trainable_token_indices": [398, 399]},
    "low rank over embeddings": {
        "modules_to_save": None,
        "target_modules": ["q_proj", "embed_tokens", "lm_head"],
    },
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_may_add_tokens_that_the_base_model_does_not_have(
    random_pair: Callable[..., PairFolder], tmp_path: Path, kind: str
) -> None:
    paths = save_adapter(random_pair("olmo2"), tmp_path, **ADAPTERS[kind])
    ids = [*IDS[:5], 398, 7, 399, 9]
    base = AutoModelForCausalLM.from_pretrained(paths["base"]).eval()
    read = torch.tensor([[397 if token >= 398 else token for token in ids]])  # as its end of text
    with torch.inference_mode():
        own = base(read).logits[0]
        base.resize_token_embeddings(400, mean_resizing=False)
        adapted = PeftModel.from_pretrained(base, paths["aligned"]).eval()
        other = adapted(torch.tensor([ids])).logits[0]
    baco = Baco.load(**paths, dtype="float32", packed=False)
    pair = baco.pair
    assert (pair.base.embedding_rows, pair.aligned.embedding_rows) == (398, 400)
    assert torch.allclose(pair.base.score(ids)[:, :398], own, atol=1e-5)
    assert bool(pair.base.score(ids)[:, 398:].isneginf().all())
    assert torch.allclose(pair.aligned.score(ids), other, atol=1e-5)
    answers = [
        each.generate(PROMPTS[0], router="Rand:0.5", n=2, seed=3, max_tokens=12)
        for each in (baco, Baco.load(**paths, dtype="float32"))
    ]
    assert [tokens_and_sources(answer) for answer in answers[0]] == [
        tokens_and_sources(answer) for answer in answers[1]
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_pair_is_decoded_as_by_the_naive_loop(
    folders: Callable[[str], dict[str, Any]], architecture: str
) -> None:
    baco = without_turn_cut(Baco.load(**folders(architecture), dtype="float32"))
    sources: set[str] = set()
    for spelling, rule in list(rules(baco.pair).items())[::2]:
        for temperature in (0.0, 1.0):
            settings: dict[str, Any] = {"seed": 7, "temperature": temperature, "max_tokens": 10}
            answers = baco.generate_batch(PROMPTS, router=spelling, n=2, **settings)
            for prompt, samples in zip(PROMPTS, answers, strict=True):
                expected = reference(baco, prompt, rule, sample=1, **settings)
                assert tokens_and_sources(samples[1]) == expected, (spelling, temperature)
                sources |= set(map(str, samples[1].sources))
    assert sources == {"base", "aligned"}


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_the_base_weights_under_an_adapter_may_be_quantised(
    folders: Callable[[str], dict[str, Any]], quantize: str
) -> None:
    options = folders("llama")
    whole = Baco.load(**options, dtype="float32").pair
    baco = Baco.load(**options, dtype="float32", quantize=quantize)
    assert baco.pair.base.model is baco.pair.aligned.model
    assert sum(s for *_, s in weights(baco.pair.base.model)) < 0.9 * sum(
        s for *_, s in weights(whole.base.model)
    )
    assert not torch.allclose(baco.pair.base.score(IDS), baco.pair.aligned.score(IDS), atol=0.1)
    [answer] = baco.generate(PROMPTS[0], router="Rand:0.5", seed=1, max_tokens=16)
    assert set(answer.sources) == {"base", "aligned"}


@pytest.mark.parametrize("option", ["dtype", "quantize"])
def test_models_with_shared_weights_have_one_dtype_and_quantisation(
    folders: Callable[[str], dict[str, Any]], option: str
) -> None:
    different = {"dtype": "base=bfloat16,aligned=float32", "quantize": "base=int8"}
    options: dict[str, Any] = folders("llama") | {option: different[option]}
    with pytest.raises(BacoError, match="over the base model's own weights: give one"):
        Baco.load(**options)


def test_without_peft_the_error_names_the_package_to_install(
    folders: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BacoError, match=r"install it with pip install 'baco\[peft\]'"):
        Baco.load(**folders("llama"))


def test_one_model_under_two_prompts_is_named_once(
    random_pair: Callable[..., PairFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    from baco.cli import run

    model = str(random_pair("llama").aligned)
    question = ["generate", "Hi", "-s", "1", "--max-tokens", "4"]
    assert run([*question, "--model", model]) == 0
    answer = capsys.readouterr().out
    assert answer
    assert run([*question, "--base", model, "--aligned", model]) == 0
    assert capsys.readouterr().out == answer
    assert run([*question, "--model", model, "--aligned", model]) == 2
    assert "give --model alone" in capsys.readouterr().err
