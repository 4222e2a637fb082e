"""A small random model of an architecture shows which cached forwards are right for it."""

from typing import Any

import pytest
import torch

from baco.models.forward.decoder_layers import fuse_layers
from baco.models.forward.selection import try_out
from baco.models.model import PairModel
from baco.models.pair import lay_out
from baco.models.trial import VOCABULARY, small_config, small_model
from tests import fuzzing
from tests.tiny import EVERY, tiny_config, tiny_model

A_FEW = (
    *("bamba", "bloom", "gemma2", "gemma3_text", "gpt2", "gpt_neo", "gptj", "llama", "llama4_text"),
    *("mamba", "minicpm3", "mistral", "olmo2", "opt", "phi3", "qwen3", "smollm3"),
)


def wrapped(model: Any, **changes: Any) -> PairModel:
    width = model.config.get_text_config(decoder=True).vocab_size
    return PairModel("tiny", model, None, vocab_size=width, **changes)


@pytest.mark.parametrize("architecture", A_FEW if fuzzing.times == 1 else EVERY)
def test_the_trial_on_a_small_model_agrees_with_that_on_the_model_itself(
    architecture: str,
) -> None:
    model = tiny_model(tiny_config(architecture))
    small = small_model(model)
    if small is None:
        pytest.skip(f"{architecture} has no smaller configuration")
    of_small = try_out(PairModel("small", small, None, vocab_size=VOCABULARY))
    if not of_small:
        pytest.skip(f"{architecture} takes another way only at its own size")
    of_model = try_out(wrapped(model))
    # What a longer text shows may be less.
    assert of_small.batched == of_model.batched
    assert of_small.per_row <= of_model.per_row


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_outlier_weights_in_bfloat16_keep_the_fast_forward(architecture: str) -> None:
    """Real weights have channels and tokens with far larger values than the others."""
    config = tiny_config(architecture, hidden_size=64, num_hidden_layers=4)
    model = tiny_model(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight[:, 3] *= 20
            if "embed" in name:
                weight[5:9] *= 100
    model.to(torch.bfloat16)
    fuse_layers(model)
    model = wrapped(model)
    assert model._forward is not None
    assert model.can_roll_back
    assert type(model._forward).__name__ == "ClampedForward"


def test_a_wrong_cached_forward_is_not_used_in_any_precision() -> None:
    model = tiny_model(tiny_config("bamba"))
    in_float32 = wrapped(model)._readings
    assert wrapped(model.to(torch.bfloat16))._readings == in_float32


def test_a_small_configuration_keeps_the_features_of_the_architecture() -> None:
    config = tiny_config(
        "gemma3_text",
        num_hidden_layers=6,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
        num_attention_heads=8,
        num_key_value_heads=2,
        sliding_window=512,
    )
    small = small_config(config)
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert small.num_hidden_layers == 2
    assert small.num_attention_heads / small.num_key_value_heads == 4
    assert small.sliding_window == 8
    assert config.sliding_window == 512  # the model's own is as it was


def test_an_architecture_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = list[Any]()

    def counted(model: Any) -> Any:
        tried.append(model)
        return small_model(model)

    monkeypatch.setattr("baco.models.forward.selection._TRIED", {})
    monkeypatch.setattr("baco.models.forward.selection.small_model", counted)
    for seed in (0, 1):
        assert wrapped(tiny_model(tiny_config("llama"), seed))._readings
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("architecture", "path"),
    [
        (
            "gpt2",
            "the forward of transformers, all rows at once (BACo's own does not fit: the model has "
            "no embed_tokens, layers, norm, rotary_emb)",
        ),
        ("gemma3_text", "BACo's own forward, all rows at once"),
        (
            "zaya",
            "its own cache, one row at a time and without drafts (rows of different lengths in one "
            "forward differ from each row alone)",
        ),
        (
            "mamba",
            "the forward of transformers, all rows at once, with a recurrent state for each row",
        ),
        ("llama", "BACo's own forward, all rows at once"),
    ],
)
def test_a_model_names_the_forward_that_it_uses(architecture: str, path: str) -> None:
    model = tiny_model(tiny_config(architecture))
    lay_out(model)
    assert wrapped(model).path == path
