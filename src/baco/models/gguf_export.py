"""A pair as two GGUF files, for llama.cpp: written by ``baco pair export --gguf``.

DIR/base.gguf, aligned.gguf    the models
DIR/baco.json                  the pair's own settings

Models of the plain Llama and Qwen architectures with byte-level BPE are written here; all others
need the converter of llama.cpp. Tensors are read one at a time, so a model need not fit in memory.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baco.errors import BacoError
from baco.files import user_path
from baco.models.gguf import is_gguf, require_gguf
from baco.models.known_pairs import KnownPair
from baco.models.loading import is_adapter, load_config, model_files
from baco.models.model import PairModel
from baco.models.pair import Pair
from baco.models.weightless import load_weightless_pair, save_merged
from baco.source import MODELS

# Number formats of matrices. The converter of llama.cpp writes the first four.
FORMATS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_CONVERTED = FORMATS[:4]
# Rows of these numbers are cut into blocks of 32 with a scale each. Embeddings and the output layer
# keep at least 8 bits, as in llama.cpp.
_EIGHT_BITS = ("token_embd", "output")
CONVERTER = "convert_hf_to_gguf.py"
# ``model_type`` → the architecture's name in GGUF files.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# How text is split before merges → the splitting's name in llama.cpp.
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}


def export_gguf(
    known: KnownPair,
    out: Path,
    *,
    format: str = "f16",
    converter: str | None = None,
    trust_remote_code: bool = False,
) -> Pair:
    """Write both models of a pair as GGUF files into a folder.

    The folder appears when both files are complete.

    Args:
        known: where the models are. An adapter is merged into a copy of the base model's weights.
        out: the folder, which must be empty or new.
        format: of matrices, one of :data:`FORMATS`; other tensors are float32.
        converter: ``convert_hf_to_gguf.py`` of llama.cpp, or the folder that it is in; None for
            the writer of this package.
        trust_remote_code: run the Python code that comes with a model.

    Returns:
        The pair, without its weights.

    Raises:
        BacoError: the folder is not empty, the models are no pair or cannot be read, or a model
            cannot be written as GGUF.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BacoError(f"{out} is not empty: export the pair to a new folder")
    if format not in FORMATS:
        raise BacoError(f"the format is {format!r}: give one of {', '.join(FORMATS)}")
    require_gguf("GGUF files are written with the package gguf")
    script = None if converter is None else _script(converter, format)
    pair = load_weightless_pair(
        known, dict.fromkeys(MODELS, "a GGUF file"), trust_remote_code=trust_remote_code
    )
    parent = out.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / "pair"
        folder.mkdir()
        for source, name in zip(MODELS, (known.base, known.aligned), strict=True):
            if is_gguf(name):
                raise BacoError(f"{name} is a GGUF file already: export a model of transformers")
            if source == "aligned" and is_adapter(name):
                place = Path(scratch) / "merged"
                save_merged(known, pair, place, trust_remote_code)
            else:
                place = model_files(name, trust_remote_code)
            target = folder / f"{source}.gguf"
            if script is not None:
                _convert(script, place, target, format)
            else:
                _write(place, pair.model(source), target, format)
        settings = json.dumps(known.settings, indent=2) + "\n"
        (folder / "baco.json").write_text(settings, encoding="utf-8")
        if out.exists():
            out.rmdir()
        folder.rename(out)
    return pair


def _script(given: str, format: str) -> Path:
    """The converter's path, checked."""
    path = user_path(given)
    path = path / CONVERTER if path.is_dir() else path
    if not path.is_file():
        raise BacoError(f"no converter at {path}: give {CONVERTER} of a llama.cpp checkout")
    if format not in _CONVERTED:
        raise BacoError(
            f"{CONVERTER} writes {', '.join(_CONVERTED)}: give one of these, then run "
            f"llama-quantize of llama.cpp for {format}"
        )
    return path


def _convert(script: Path, folder: Path, target: Path, format: str) -> None:
    """Run llama.cpp's converter on the folder of a model."""
    command = [sys.executable, str(script), str(folder), "--outfile", str(target)]
    command += ["--outtype", format]
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    if done.returncode or not target.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise BacoError(f"{script} cannot convert {folder}: {lines[-1].strip()[:300]}")


def _write(folder: Path, model: PairModel, target: Path, format: str) -> None:
    """Write the weights in a folder, and the rest of the model, as a GGUF file."""
    import gguf

    shape = _Shape.of(load_config(str(folder)), folder)
    splitting = _splitting(json.loads(model.tokenizer.backend_tokenizer.to_str()), folder)
    writer = gguf.GGUFWriter(target, shape.architecture, use_temp_file=True)
    try:
        shape.describe(writer)
        writer.add_name(folder.name)
        writer.add_file_type(int(_file_type(format)))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _describe_tokenizer(writer, model, splitting, shape.vocabulary)
        names = gguf.get_tensor_name_map(shape.gguf_architecture, shape.layers)
        for name, tensor in _tensors(folder):
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and shape.tied):
                continue
            called = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if called is None:
                raise BacoError(f"{folder} has a tensor that GGUF files have no name for: {name}")
            _add_tensor(writer, called, shape.permuted(name, tensor), format)
        if (factors := shape.rope_factors()) is not None:
            writer.add_tensor("rope_freqs.weight", factors)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


@dataclass(frozen=True)
class _Shape:
    """The sizes of a plain decoder, and how its file differs from its folder.

    Attributes:
        architecture: its name in GGUF files.
        config: of ``transformers``.
        layers: number of layers.
        vocabulary: rows of the embedding.
        heads, key_value_heads: of attention.
        head_size: numbers in a head.
        tied: the output layer is the embedding.
    """

    architecture: str
    config: Any
    layers: int
    vocabulary: int
    heads: int
    key_value_heads: int
    head_size: int
    tied: bool

    @classmethod
    def of(cls, config: Any, folder: Path) -> "_Shape":
        """The shape of a model, from its configuration.

        Raises:
            BacoError: this module cannot write its architecture.
        """
        kind = config.model_type
        if kind not in _ARCHITECTURES or config.hidden_act != "silu" or _slides(config):
            raise _needs_converter(folder, f"its architecture is {kind}")
        rope = config.rope_parameters or {}
        if rope.get("rope_type", "default") not in ("default", "llama3"):
            raise _needs_converter(folder, f"its positions are scaled by {rope['rope_type']}")
        heads = config.num_attention_heads
        return cls(
            _ARCHITECTURES[kind],
            config,
            config.num_hidden_layers,
            config.vocab_size,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            bool(config.tie_word_embeddings),
        )

    @property
    def gguf_architecture(self) -> Any:
        """Its number in the package ``gguf``."""
        import gguf

        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        return numbers[self.architecture]

    def describe(self, writer: Any) -> None:
        """Write its sizes."""
        config = self.config
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(self.layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.key_value_heads)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_rope_dimension_count(self.head_size)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(self.vocabulary)

    def permuted(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor with rows in the order that its architecture has in GGUF files: Llama's rotary
        embedding turns neighbouring numbers there, and numbers half a head apart in transformers.
        """
        heads = {"q_proj": self.heads, "k_proj": self.key_value_heads}.get(name.split(".")[-2])
        if self.architecture != "llama" or heads is None:
            return tensor
        rows = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
        return rows.swapaxes(1, 2).reshape(tensor.shape)

    def rope_factors(self) -> np.ndarray[Any, Any] | None:
        """Divisors of the rotary frequencies: float32 [head_size / 2]; None where there are none.
        The formula is that of Llama 3.1.
        """
        rope = self.config.rope_parameters
        if rope.get("rope_type", "default") != "llama3":
            return None
        factor, original = rope["factor"], rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        factors = []
        for at in range(0, self.head_size, 2):
            wavelength = 2 * math.pi * rope["rope_theta"] ** (at / self.head_size)
            smooth = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
            factors.append(1 / ((1 - smooth) / factor + smooth))
        return np.array(factors, np.float32)


def _slides(config: Any) -> bool:
    """Does any layer see only a window of the text?"""
    kinds = getattr(config, "layer_types", None) or ()
    windowed = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    return any(kind != "full_attention" for kind in kinds) or bool(windowed and not kinds)


def _splitting(tokenizer: Mapping[str, Any], folder: Path) -> str:
    """What llama.cpp calls the way in which a tokenizer splits text before merges."""
    if tokenizer["model"]["type"] == "BPE" and not tokenizer["model"].get("byte_fallback"):
        first, *others = _parts(tokenizer["pre_tokenizer"])
        if not others and first == _GPT2:
            return "gpt-2"
        if first == _DIGITS and others == [_GPT2]:
            return "smollm"
        pattern = first.get("pattern", {}).get("Regex")
        if pattern in _SPLITS and others == [_GPT2 | {"use_regex": False}]:
            return _SPLITS[pattern]
    raise _needs_converter(folder, "llama.cpp has another name for its tokenizer")


def _parts(splitter: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without settings that change offsets only."""
    if splitter is None:
        return [{}]
    steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def _needs_converter(folder: Path, reason: str) -> BacoError:
    return BacoError(
        f"cannot write {folder} as GGUF: {reason}; give the converter of llama.cpp: "
        f"--converter llama.cpp/{CONVERTER}"
    )


def _describe_tokenizer(writer: Any, model: PairModel, splitting: str, size: int) -> None:
    """Write tokens, merges, special tokens and the chat template."""
    import gguf

    tokenizer = model.tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    texts = {token: text for text, token in content["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    for added in content["added_tokens"]:
        texts[added["id"]] = added["content"]
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        kinds[added["id"]] = special
    merges = content["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list([texts.get(token, f"[PAD{token}]") for token in range(size)])
    writer.add_token_types([kinds.get(token, gguf.TokenType.UNUSED) for token in range(size)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    # A file has one key for the end of a text and one for the end of a turn.
    ends = sorted(model.end_ids, key=lambda token: (token != tokenizer.eos_token_id, token))
    ids = {"eos": ends[:1], "eot": ends[1:2]}
    ids |= {name: [getattr(tokenizer, f"{name}_token_id")] for name in ("bos", "pad", "unk")}
    for name, tokens in ids.items():
        for token in tokens:
            if token is not None:
                getattr(writer, f"add_{name}_token_id")(token)
    begins = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model by name, one at a time."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                yield name, tensors.get_tensor(name)


def _add_tensor(writer: Any, name: str, tensor: Tensor, format: str) -> None:
    """Add a tensor: matrices in a format, or float16 where their rows do not divide into its
    blocks; all others in float32.
    """
    import gguf

    numbers = tensor.to(torch.float32).numpy()
    if numbers.ndim < 2 or format == "f32":
        writer.add_tensor(name, numbers)
        return
    if name.partition(".")[0] in _EIGHT_BITS and format not in _CONVERTED:
        format = "q8_0"
    kind = gguf.GGMLQuantizationType[format.upper()]
    if numbers.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16
    writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)


def _file_type(format: str) -> Any:
    """The number of the file's most common format."""
    import gguf

    names = {"f32": "ALL_F32"}
    return gguf.LlamaFileType[names.get(format, f"MOSTLY_{format.upper()}")]
