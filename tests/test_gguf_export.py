"""A pair exported as GGUF files answers as its folders do; what cannot be written is refused."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config

from baco import Baco
from baco.cli import run
from baco.errors import BacoError
from baco.models.gguf_export import FORMATS, export_gguf
from baco.models.known_pairs import KnownPair, find_pair
from benchmarks.gguf_memory import WRITTEN, shape_of
from tests.pairs import SIZE, train_tokenizer, wrapped

gguf = pytest.importorskip("gguf")

PROMPT = "Recommend a summer destination"


def answers(baco: Baco, prompt: str = PROMPT) -> list[Any]:
    settings: dict[str, Any] = {"router": "P-Punc:0.4", "seed": 1, "max_tokens": 24}
    return [
        (answer.token_ids, answer.sources, answer.text)
        for temperature in (0, 1)
        for answer in baco.generate(prompt, temperature=temperature, **settings)
    ]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "demo"
    assert run(["pair", "export", str(folder), "--pair", "demo", "--gguf", "f32"]) == 0
    return folder


def test_the_exported_demo_pair_gives_the_same_answers(exported: Path, demo: Baco) -> None:
    names = sorted(path.name for path in exported.iterdir())
    assert names == ["aligned.gguf", "baco.json", "base.gguf"]
    again = Baco.load(str(exported), backend="local", dtype="float32")
    assert answers(again) == answers(demo)
    assert again.pair.end_ids == demo.pair.end_ids
    assert again.pair.defaults == demo.pair.defaults
    assert sorted(exported.parent.iterdir()) == [exported]


def model_folder(folder: Path, config: Any) -> Path:
    """A folder with a random model of a configuration and the tests' tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    wrapped(train_tokenizer(), aligned=True).save_pretrained(folder)
    return folder


SIZES: dict[str, Any] = {
    "vocab_size": SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": SIZE - 1,
}


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SIZES, tie_word_embeddings=False), Qwen3Config(**SIZES, head_dim=128)],
    ids=["llama", "qwen3"],
)
def test_other_architectures_keep_their_logits(tmp_path: Path, config: Any) -> None:
    folder = str(model_folder(tmp_path / "model", config))
    export_gguf(KnownPair("x", folder, folder), tmp_path / "out", format="f32")
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        logits = [
            AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **file)(ids).logits
            for place, file in ((folder, {}), (tmp_path / "out", {"gguf_file": "base.gguf"}))
        ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("format", FORMATS)
def test_matrices_are_within_the_rounding_of_their_format(tmp_path: Path, format: str) -> None:
    export_gguf(find_pair("demo"), tmp_path / "demo", format=format)
    reader = gguf.GGUFReader(tmp_path / "demo" / "base.gguf")
    stored = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
    }
    weights = load_file(Path(find_pair("demo").base) / "model.safetensors")
    exact = weights["model.layers.0.self_attn.v_proj.weight"].numpy()
    bits = {"f32": 24, "bf16": 8, "f16": 11}.get(format, int(format[1]) if format[0] == "q" else 0)
    error = np.abs(stored["blk.0.attn_v.weight"] - exact).max() / np.abs(exact).max()
    assert error <= 2.0 ** (1 - bits)
    if format in WRITTEN:
        size = sum(tensor.n_bytes for tensor in reader.tensors)
        assert shape_of(find_pair("demo").base).bytes(format) == size
    # Embeddings keep at least 8 bits.
    exact = weights["model.embed_tokens.weight"].numpy()
    assert np.abs(stored["token_embd.weight"] - exact).max() / np.abs(exact).max() < 2.0**-7


def test_rope_factors_are_those_of_llama_3(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(**SIZES, rope_parameters=rope)
    folder = str(model_folder(tmp_path / "model", config))
    export_gguf(KnownPair("x", folder, folder), tmp_path / "out", format="f32")
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out" / "base.gguf").tensors}
    model = LlamaForCausalLM(config)
    plain = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    expected = (plain / model.model.rotary_emb.inv_freq).numpy()
    np.testing.assert_allclose(tensors["rope_freqs.weight"], expected, rtol=1e-5)


def test_a_converter_is_run_on_each_model(tmp_path: Path) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import sys\nopen(sys.argv[3], 'w').write(' '.join(sys.argv[1:]))\n")
    out = tmp_path / "out"
    export_gguf(find_pair("demo"), out, format="q8_0", converter=str(tmp_path))
    for source in ("base", "aligned"):
        folder, *options = (out / f"{source}.gguf").read_text().split()
        assert Path(folder).name == source
        assert options[0] == "--outfile" and options[2:] == ["--outtype", "q8_0"]
    script.write_text("import sys\nsys.exit('Model Odd is not supported')\n")
    with pytest.raises(BacoError, match="Model Odd is not supported"):
        export_gguf(find_pair("demo"), tmp_path / "two", converter=str(script))
    assert not (tmp_path / "two").exists()


def test_what_cannot_be_written_is_one_line(
    tmp_path: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sliding = LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0})
    scaled = str(model_folder(tmp_path / "scaled", sliding))
    odd = str(model_folder(tmp_path / "odd", LlamaConfig(**SIZES)))
    file = next(Path(odd).glob("*.safetensors"))
    save_file(load_file(file) | {"model.extra.weight": torch.zeros(2)}, file, {"format": "pt"})
    gguf_pair = ["--base", str(exported / "base.gguf"), "--aligned", str(exported / "aligned.gguf")]
    for arguments, message in (
        (["--gguf", "q3_k"], "the format is 'q3_k': give one of f32, f16"),
        (["--gguf", "f16", "--copy"], "--copy is for folders of vLLM"),
        (["--gguf", "f16", "--converter", "/nowhere"], "no converter at /nowhere: give convert_hf"),
        (["--gguf", "q4_0", "--converter", sys.executable], "then run llama-quantize"),
        (["--gguf", "f16", *gguf_pair], "is a GGUF file already"),
        (["--gguf", "f16", "--model", scaled], "its positions are scaled by linear; give the conv"),
        (["--gguf", "f16", "--model", odd], "no name for: model.extra.weight"),
    ):
        assert run(["pair", "export", str(tmp_path / "out"), *arguments]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()
    assert run(["pair", "export", str(exported), "--pair", "demo", "--gguf", "f16"]) == 2
    assert "is not empty" in capsys.readouterr().err
