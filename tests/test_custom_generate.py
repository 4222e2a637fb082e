"""``model.generate(custom_generate=...)`` of transformers decodes with a model and its base."""

import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from baco import Baco, BacoError, as_transformers
from baco.integrations.transformers.custom_generate import custom_generate_folder
from baco.models.known_pairs import demo_folder
from baco.models.loading import Placement, load_model

BASE, ALIGNED = (str(demo_folder() / source) for source in ("base", "aligned"))
CONVERSATION = [{"role": "user", "content": "Recommend a summer destination"}]
CUSTOM: dict[str, Any] = {
    "custom_generate": custom_generate_folder(),
    "trust_remote_code": True,
    "max_new_tokens": 24,
}


@pytest.fixture(autouse=True)
def own_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Keep the copies of code that transformers makes apart from the user's own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", tmp_path / "modules")
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture
def model() -> Any:
    """The demo pair's aligned model, as a user loads it."""
    return AutoModelForCausalLM.from_pretrained(ALIGNED, dtype="float32")


def prompt() -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(ALIGNED)
    batch = tokenizer.apply_chat_template(
        CONVERSATION, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("router", ["Base", "Aligned", "P-Punc:0.4", "H-FC:1.0"])
def test_greedy_answers_and_sources_are_those_of_baco(model: Any, demo: Baco, router: str) -> None:
    batch = prompt()
    result = model.generate(
        **batch, **CUSTOM, base_model=BASE, router=router, do_sample=False,
        return_dict_in_generate=True,
    )  # fmt: skip
    [expected] = demo.generate(CONVERSATION, router=router, temperature=0, max_tokens=24)
    start, count = batch["input_ids"].shape[1], len(expected.token_ids)
    assert result.sequences[0, start : start + count].tolist() == list(expected.token_ids)
    by_base = result.past_key_values.source[0, start - 1 : start - 1 + count].tolist()
    assert by_base == [source == "base" for source in expected.sources]


def test_seeded_samples_are_those_of_as_transformers(model: Any, demo: Baco) -> None:
    sampling: dict[str, Any] = {"do_sample": True, "min_p": 0.1, "num_return_sequences": 4}
    torch.manual_seed(3)
    answers = model.generate(
        **prompt(), **CUSTOM, **sampling, base_model=Path(BASE), router="P-Punc:0.4"
    )
    torch.manual_seed(3)
    expected = as_transformers(demo, "P-Punc:0.4").generate(
        **prompt(), **sampling, max_new_tokens=24
    )
    assert answers.tolist() == expected.tolist()


def test_the_default_router_is_the_calibrated_one_of_a_pair_with_a_short_name(
    model: Any, demo: Baco
) -> None:
    answers = model.generate(**prompt(), **CUSTOM, base_model=BASE, do_sample=False)
    expected = as_transformers(demo).generate(**prompt(), do_sample=False, max_new_tokens=24)
    assert answers.tolist() == expected.tolist()


def test_a_base_model_is_loaded_once_and_freed_with_the_model(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(name: str, placement: Placement) -> Any:
        loaded.append(name)
        return load_model(name, placement)

    monkeypatch.setattr("baco.integrations.transformers.custom_generate.load_model", load)
    for router in ("P:0.2", "P:0.6"):
        model.generate(**prompt(), **CUSTOM, base_model=BASE, router=router)
    assert loaded == [BASE]
    names = set(model.state_dict())
    assert names == set(AutoModelForCausalLM.from_pretrained(ALIGNED).state_dict())
    assert not copy.deepcopy(model)._baco_pairs


def test_a_loaded_base_model_and_given_tokenizers_are_used(demo: Baco) -> None:
    """The models' names lead nowhere, as those of models that were made in memory."""
    models = {
        source: AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        for source, folder in (("base", BASE), ("aligned", ALIGNED))
    }
    for loaded in models.values():
        loaded.config._name_or_path = loaded.name_or_path = ""
    with pytest.raises(BacoError, match=r"no tokenizer beside it: give generate\(\) tokenizer="):
        models["aligned"].generate(**prompt(), **CUSTOM, base_model=models["base"])
    answers = models["aligned"].generate(
        **prompt(), **CUSTOM, base_model=models["base"], router="P:0.4", do_sample=False,
        tokenizer=demo.pair.tokenizer, base_tokenizer=demo.pair.base.tokenizer,
    )  # fmt: skip
    expected = as_transformers(demo, "P:0.4").generate(
        **prompt(), do_sample=False, max_new_tokens=24
    )
    assert answers.tolist() == expected.tolist()


def test_the_models_generation_config_and_mode_are_its_own(model: Any) -> None:
    model.generation_config.max_new_tokens = 5
    model.train()
    arguments = {name: value for name, value in CUSTOM.items() if name != "max_new_tokens"}
    answers = model.generate(**prompt(), **arguments, base_model=BASE, router="P:0.4")
    assert answers.shape[1] <= prompt()["input_ids"].shape[1] + 5
    assert model.training


def test_bad_arguments_are_refused_in_one_line(model: Any, random_pair: Any) -> None:
    for arguments, message in (
        ({}, "no base model: give generate"),
        ({"base_model": BASE, "router": "Pun:0.4"}, "unknown router"),
        ({"base_model": "/nowhere"}, "no such model folder: /nowhere"),
        ({"base_model": str(random_pair("llama").base)}, "needs one tokenizer"),
        ({"base_model": BASE, "router": "Ensemble:0.3"}, "not the combiner"),
    ):
        with pytest.raises(BacoError, match=message) as refused:
            model.generate(**prompt(), **CUSTOM, **arguments)
        assert "\n" not in str(refused.value)


def test_the_example_of_the_model_card_runs(capsys: pytest.CaptureFixture) -> None:
    card = (Path(custom_generate_folder()) / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    for name, folder in (
        ("Qwen/Qwen2.5-0.5B-Instruct", ALIGNED),
        ("Qwen/Qwen2.5-0.5B", BASE),
        ("PATH OR ID OF THIS REPOSITORY", custom_generate_folder()),
    ):
        assert name in code
        code = code.replace(name, folder)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert len(capsys.readouterr().out.splitlines()) >= 4
