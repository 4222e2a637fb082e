"""Recurrent models in llama.cpp: no drafts, and the answers of a naive loop."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from baco import Baco
from baco.engine.engine import Engine
from baco.models.known_pairs import find_pair
from tests.test_engine import reference, rules, tokens_and_sources, without_turn_cut
from tests_llamacpp.files import Alone, add_tokenizer

SIZE, WIDTH, INNER, STATE, RANK, KERNEL, LAYERS = 2048, 64, 128, 16, 4, 4, 2


def write_mamba(path: str, seed: int) -> None:
    """A Mamba model with random weights and the demo pair's tokenizer."""
    model = Path(find_pair("demo").aligned)
    generator = np.random.default_rng(seed)

    def drawn(*shape: int) -> NDArray[np.float32]:
        return (0.2 * generator.standard_normal(shape)).astype(np.float32)

    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(KERNEL)
    writer.add_ssm_inner_size(INNER)
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_time_step_rank(RANK)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(SIZE)
    add_tokenizer(writer, json.loads((model / "tokenizer.json").read_text()), SIZE)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template((model / "chat_template.jinja").read_text())
    writer.add_tensor("token_embd.weight", drawn(SIZE, WIDTH))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(LAYERS):
        for name, tensor in {
            "attn_norm.weight": np.ones(WIDTH, np.float32),
            "ssm_in.weight": drawn(2 * INNER, WIDTH),
            "ssm_conv1d.weight": drawn(INNER, KERNEL),
            "ssm_conv1d.bias": drawn(INNER),
            "ssm_x.weight": drawn(RANK + 2 * STATE, INNER),
            "ssm_dt.weight": drawn(INNER, RANK),
            "ssm_dt.bias": drawn(INNER),
            "ssm_a": -np.exp(drawn(INNER, STATE)),
            "ssm_d": np.ones(INNER, np.float32),
            "ssm_out.weight": drawn(WIDTH, INNER),
        }.items():
            writer.add_tensor(f"blk.{layer}.{name}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Reread(Alone):
    """It reads every text from its beginning, since its state cannot be rolled back."""

    def score(self, ids: Sequence[int]) -> list[Tensor]:
        self._read = []
        return super().score(ids)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("mamba")
    paths = {source: str(folder / f"{source}.gguf") for source in ("base", "aligned")}
    for seed, path in enumerate(paths.values()):
        write_mamba(path, seed)
    return paths


def test_answers_are_those_of_a_naive_loop_without_drafts(paths: dict[str, Any]) -> None:
    baco = without_turn_cut(Baco.load(**paths))
    assert not baco.pair.base.can_roll_back
    assert "without drafts" in baco.pair.base.path
    assert Engine(baco.pair)._proposer._planner is None
    models: dict[str, Any] = {source: Reread(path) for source, path in paths.items()}
    alone = replace(baco, pair=replace(baco.pair, **models))
    settings: dict[str, Any] = {"seed": 7, "temperature": 1.0, "max_tokens": 10}
    for router in ("P:0.5", "Rand:0.5", "P-Punc:0.6"):
        # More rows than a context has room for at first.
        for answer in baco.generate("Tell me a story", router=router, n=7, **settings)[::3]:
            rule = rules(baco.pair)[router]
            expected = reference(alone, "Tell me a story", rule, sample=answer.sample, **settings)
            assert tokens_and_sources(answer) == expected, router


def test_a_kept_state_changes_no_answer(paths: dict[str, Any]) -> None:
    prompt = " ".join(f"Tell me about place {number}." for number in range(30))
    baco = Baco.load(**paths)
    first, second = (
        baco.generate(prompt, router="P:0.5", n=2, seed=3, max_tokens=8) for _ in range(2)
    )
    assert list(map(tokens_and_sources, first)) == list(map(tokens_and_sources, second))
    assert baco.prefix_cache is not None
    assert baco.prefix_cache.hits["aligned"] > 64
