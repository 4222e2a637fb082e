"""Packed weights are the same numbers, held once."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from baco import Baco
from baco.models.forward import packed_linear
from baco.models.forward.packed_linear import (
    PackedEmbedding,
    PackedLinear,
    mkl_is_slow,
    pack,
    rounded,
    weights,
)
from tests.pairs import PairFolder


class Tied(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 32)
        self.inner = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32, bias=False))
        self.head = nn.Linear(32, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.inner(self.embed(ids)))
        return logits


def test_the_dtype_of_a_packed_weight_is_read_without_unpacking_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, packed = Tied(4_000), Tied(4_000)
    packed.load_state_dict(plain.state_dict())
    pack(packed)
    assert isinstance(packed.head, PackedLinear)
    unpacked = torch.Tensor.to_dense
    monkeypatch.setattr(torch.Tensor, "to_dense", lambda _: pytest.fail("it was unpacked"))
    weight = packed.head.weight
    assert (weight.dtype, weight.device) == (torch.float32, torch.device("cpu"))
    assert weight.shape == plain.head.weight.shape
    monkeypatch.setattr(torch.Tensor, "to_dense", unpacked)
    assert torch.equal(weight[:2] + 0, plain.head.weight[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_packed_model_gives_the_logits_of_the_plain_one(dtype: torch.dtype) -> None:
    plain = Tied(50).to(dtype)
    packed = copy.deepcopy(plain)
    pack(packed)
    assert isinstance(packed.inner[0], PackedLinear)
    for shape in ((1, 1), (2, 3)):
        ids = torch.arange(shape[0] * shape[1]).reshape(shape)
        torch.testing.assert_close(packed(ids), plain(ids), rtol=2e-2, atol=2e-2)
    expected = plain.inner[0].weight
    assert isinstance(expected, torch.Tensor)
    assert torch.equal(packed.inner[0].weight, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_any_number_of_rows_is_padded_to_a_few_sizes(dtype: torch.dtype) -> None:
    plain = nn.Linear(1024, 512).to(dtype)
    packed = PackedLinear(plain)
    for size in (0, 1, 17, 33, 65, 100):
        rows = torch.randn(size, 1, 1024).to(dtype)
        torch.testing.assert_close(packed(rows), plain(rows), rtol=2e-2, atol=2e-2)
    sizes = {size: rounded(size) for size in range(1, 1025)}
    assert all(size <= filled <= size * 9 / 8 for size, filled in sizes.items())
    assert len(set(sizes.values())) == 16 + 8 * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_held_once_but_small_ones_and_counted(dtype: torch.dtype) -> None:
    model = Tied(500).to(dtype)
    before = list(weights(model))
    small = 2 * 32 * 64 * dtype.itemsize
    pack(model)
    assert sum(p.numel() for p in model.parameters()) == 64  # the bias
    after = list(weights(model))
    assert sum(size for _, size, _ in after) == sum(size for _, size, _ in before)
    twice = small if dtype == torch.float32 and mkl_is_slow() else 0
    assert sum(stored for *_, stored in after) == sum(stored for *_, stored in before) + twice
    samples = {tuple(sample.tolist()) for sample, _, _ in before}
    assert {tuple(sample.tolist()) for sample, _, _ in after} == samples


@pytest.mark.parametrize("slow", [False, True])
@torch.inference_mode()
def test_a_small_layer_computes_the_same_for_few_rows_and_for_many(
    slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_linear, "mkl_is_slow", lambda: slow)
    plain = nn.Linear(192, 576, bias=False)
    packed = PackedLinear(plain)
    assert packed.layouts == 1 + slow
    for size in (1, 4, 5, 40):
        rows = torch.randn(size, 192)
        torch.testing.assert_close(packed(rows), plain(rows), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed(rows[None]), plain(rows)[None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [50, 500, 70_000])
@torch.inference_mode()
def test_tied_embeddings_are_looked_up_in_the_packed_weights(
    words: int, dtype: torch.dtype
) -> None:
    model = Tied(words).to(dtype)
    plain = model.embed.weight.clone()
    pack(model)
    assert isinstance(model.embed, PackedEmbedding)
    assert model.embed.num_embeddings == words
    ids = torch.tensor([[0, words - 1], [7, words // 2]])
    assert torch.equal(model.embed(ids), plain[ids])


def test_the_embedding_stays_plain_if_packing_does_not_reorder_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def beyond(shape: torch.Size, _: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(shape[0]) + shape.numel() * 64, torch.arange(shape[1])

    monkeypatch.setattr("baco.models.forward.packed_linear._places", beyond)
    model = Tied(500)
    pack(model)
    assert type(model.embed) is nn.Embedding


def test_an_embedding_with_more_to_it_is_left_as_it_is() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 2

    model = Tied(500)
    model.embed = Scaled(500, 32)
    model.head.weight = model.embed.weight
    pack(model)
    assert type(model.embed) is Scaled
    assert type(model.head) is nn.Linear


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo2", "gemma2"])
def test_a_pairs_fingerprint_does_not_depend_on_how_its_weights_are_laid_out(
    random_pair: Callable[..., PairFolder], architecture: str
) -> None:
    folder = random_pair(architecture, noise=0.3)
    folders: dict[str, Any] = {"base": str(folder.base), "aligned": str(folder.aligned)}
    packed, plain = (
        Baco.load(**folders, dtype="float32", packed=packed).pair for packed in (True, False)
    )
    assert packed.fingerprint == plain.fingerprint
    with torch.no_grad():
        plain.aligned.model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    assert packed.fingerprint != replace(plain).fingerprint  # computed once per Pair


def test_the_demo_pairs_fingerprint_does_not_depend_on_its_layout(demo: Baco) -> None:
    """Its output layer is also its embedding, which packing may copy."""
    assert demo.pair.fingerprint == Baco.load("demo", packed=False).pair.fingerprint
