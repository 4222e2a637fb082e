"""GGUF files are models, also beside folders; damaged ones are refused in one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from baco import Baco
from baco.cli import run
from baco.errors import BacoError
from tests.pairs import CHAT_TEMPLATE, END, FIRST_SPECIAL, SIZE, TURN_END, train_tokenizer, wrapped

gguf = pytest.importorskip("gguf")

PROMPT = "Where should I go this summer?"
LAYERS = 2
TURN_END_ID = SIZE - 1
# Names of tensors in transformers and in GGUF files.
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}


def tiny_model(seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=TURN_END_ID,
    )
    return Qwen2ForCausalLM(config).eval()


def write_gguf(path: Path, model: Qwen2ForCausalLM, *, with_tokens: bool = True) -> None:
    """Write a GGUF file as llama.cpp's converter does, in float32."""
    config, tokenizer = model.config, json.loads(train_tokenizer().to_str())
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(SIZE)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    by_id = {id_: token for token, id_ in tokenizer["model"]["vocab"].items()}
    by_id |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    if with_tokens:
        writer.add_token_list([by_id[id_] for id_ in range(SIZE)])
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if i >= FIRST_SPECIAL else kinds.NORMAL for i in by_id])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(TURN_END_ID)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if stem in TOP:
            other = TOP[stem]
        else:
            _, _, layer, inner = stem.split(".", 3)
            other = f"blk.{layer}.{LAYER[inner]}"
        writer.add_tensor(f"{other}.{kind}", tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base.gguf``, ``aligned.gguf``, and the same models as folders."""
    folder = tmp_path_factory.mktemp("gguf")
    for seed, source in enumerate(("base", "aligned")):
        model = tiny_model(seed)
        write_gguf(folder / f"{source}.gguf", model)
        model.save_pretrained(folder / source)
        wrapped(train_tokenizer(), aligned=True).save_pretrained(folder / source)
    return folder


def answers(**models: Any) -> list[Any]:
    baco = Baco.load(**models, dtype="float32")
    settings: dict[str, Any] = {"router": "P:0.05", "n": 3, "seed": 1, "max_tokens": 16}
    return [(one.token_ids, one.sources, one.text) for one in baco.generate(PROMPT, **settings)]


def test_a_gguf_file_gives_the_answers_of_the_folder_it_was_converted_from(files: Path) -> None:
    folders = {source: str(files / source) for source in ("base", "aligned")}
    expected = answers(**folders)
    assert answers(**{source: f"{place}.gguf" for source, place in folders.items()}) == expected
    assert answers(base=folders["base"], aligned=folders["aligned"] + ".gguf") == expected


def test_weights_of_a_gguf_file_are_ordinary_ones_in_any_precision(files: Path) -> None:
    one = str(files / "base.gguf")
    baco = Baco.load(base=one, aligned=str(files / "aligned.gguf"), dtype="bfloat16")
    assert baco.pair.base.weights_format == "bfloat16 on cpu"
    assert baco.pair.base.can_roll_back
    plain = AutoModelForCausalLM.from_pretrained(files / "base", dtype=torch.float32)
    assert (
        Baco.load(base=one, aligned=one, dtype="float32").pair.base.embedding_rows
        == plain.vocab_size
    )


def test_a_model_under_two_prompts_is_held_once(files: Path) -> None:
    one = str(files / "aligned.gguf")
    baco = Baco.load(base=one, aligned=one, dtype="float32")
    assert baco.pair.base.model is baco.pair.aligned.model
    folder = str(files / "aligned")
    assert answers(base=one, aligned=one) == answers(base=folder, aligned=folder)


def test_damaged_files_are_one_line(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (files / "base.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    for content, message in (
        (whole[: len(whole) // 2], "is damaged or cut off"),
        (whole[:20], "is damaged or cut off"),
        (b"PK\x03\x04" + whole, "is not a GGUF file"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
    ):
        bad.write_bytes(content)
        command = ["generate", PROMPT, "--base", str(bad), "--aligned", str(files / "aligned.gguf")]
        assert run(command) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and str(bad) in error
        assert error.count("\n") == 0
    write_gguf(bad, tiny_model(0), with_tokens=False)
    assert run(["generate", PROMPT, "--base", str(bad), "--aligned", str(bad)]) == 2
    error = capsys.readouterr().err.strip()
    assert f"{bad} has no tokenizer (tokenizer.ggml.tokens): give a file" in error
    assert error.count("\n") == 0
    with pytest.raises(BacoError, match=r"no such GGUF file: .*none\.gguf"):
        Baco.load(base=str(tmp_path / "none.gguf"), aligned=str(files / "aligned.gguf"))
    with pytest.raises(BacoError, match="de-quantised"):
        Baco.load(base=str(files / "base.gguf"), aligned=str(files / "base.gguf"), quantize="int8")


def test_end_of_text_is_that_of_the_file(files: Path) -> None:
    one = str(files / "aligned.gguf")
    pair = Baco.load(base=one, aligned=one, dtype="float32").pair
    assert pair.aligned.end_ids == {TURN_END_ID}
    vocabulary = pair.aligned.tokenizer.get_vocab()
    assert {END, TURN_END} <= set(vocabulary)


def test_a_gguf_file_is_parsed_once_and_the_reader_is_left_as_it_was(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []

    class Counted(gguf.GGUFReader):  # type: ignore[misc,name-defined]
        def __init__(self, path: str, *rest: Any) -> None:
            parsed.append(Path(path).name)
            super().__init__(path, *rest)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    Baco.load(base=str(files / "base.gguf"), aligned=str(files / "aligned.gguf"), dtype="float32")
    assert sorted(parsed) == ["aligned.gguf", "base.gguf"]
    assert gguf.GGUFReader is Counted
