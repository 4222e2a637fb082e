"""The demo pair as GGUF files, and llama.cpp without BACo: one sequence, one token at a time."""

import ctypes
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from llama_cpp import llama_cpp as library
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor

from baco.models.known_pairs import find_pair

# Names of tensors in transformers and in GGUF files.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}
# Only rows of a multiple of this are quantised.
_BLOCK = 32


def write_demo(folder: Path, kind: str = "F32") -> dict[str, str]:
    """Write both models of the demo pair as llama.cpp's converter does; returns their paths.

    Args:
        folder: of the files.
        kind: number format of the matrices, such as ``Q8_0``.
    """
    known = find_pair("demo")
    paths = {}
    for source, place in (("base", known.base), ("aligned", known.aligned)):
        paths[source] = str(folder / f"{source}-{kind}.gguf")
        _write(Path(place), paths[source], gguf.GGMLQuantizationType[kind])
    return paths


def _write(model: Path, path: str, kind: gguf.GGMLQuantizationType) -> None:
    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    heads = config["num_attention_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    add_tokenizer(writer, tokenizer, config["vocab_size"])
    generation = json.loads((model / "generation_config.json").read_text())
    writer.add_eos_token_id(generation["eos_token_id"])
    writer.add_add_bos_token(False)
    template = model / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text())
    for name, tensor in load_file(model / "model.safetensors").items():
        stem, _, end = name.rpartition(".")
        if stem in NAMES:
            other = NAMES[stem]
        else:
            _, _, layer, inner = stem.split(".", 3)
            other = f"blk.{layer}.{NAMES[inner]}"
        rotated = ".q_proj." in name or ".k_proj." in name
        values = (_interleaved(tensor, heads) if rotated else tensor).astype(np.float32)
        if values.ndim == 1 or values.shape[-1] % _BLOCK:
            writer.add_tensor(f"{other}.{end}", values)
        else:
            raw = gguf.quants.quantize(values, kind)
            writer.add_tensor(f"{other}.{end}", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any, tokenizer: dict[str, Any], size: int) -> None:
    """Write a byte-level BPE, from the content of its tokenizer.json."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    by_id = {id_: token for token, id_ in tokenizer["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    by_id |= special
    writer.add_token_list([by_id.get(id_, f"[unused {id_}]") for id_ in range(size)])
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if i in special else kinds.NORMAL for i in range(size)])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])


def _interleaved(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """llama.cpp rotates neighbouring entries of a head, transformers its two halves."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


class Alone:
    """One model of llama.cpp that reads one text: its beginning at once, then token by token."""

    def __init__(self, path: str, context: int = 1024) -> None:
        params = library.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = library.llama_model_load_from_file(path.encode(), params)
        options = library.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.swa_full = context, 1, True
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self._context = library.llama_init_from_model(self._model, options)
        assert self._context
        weakref.finalize(self, _free, self._context, self._model)
        vocab = library.llama_model_get_vocab(self._model)
        self._width = library.llama_vocab_n_tokens(vocab)
        self._read: list[int] = []

    def score(self, ids: Sequence[int]) -> list[Tensor]:
        """The logits after the last of some tokens, in a list."""
        pairs = enumerate(zip(self._read, ids[:-1], strict=False))
        common = min(len(self._read), len(ids) - 1)
        common = next((at for at, (a, b) in pairs if a != b), common)
        memory = library.llama_get_memory(self._context)
        assert library.llama_memory_seq_rm(memory, 0, common, -1)
        # A prompt in one call, all other tokens one by one.
        parts = [list(ids[:-1])] if common == 0 and len(ids) > 1 else []
        parts += [[token] for token in ids[sum(map(len, parts)) or common :]]
        for part in parts:
            tokens = (ctypes.c_int32 * len(part))(*part)
            batch = library.llama_batch_get_one(tokens, len(part))
            assert library.llama_decode(self._context, batch) == 0
        self._read = list(ids)
        row = np.ctypeslib.as_array(library.llama_get_logits_ith(self._context, -1), (self._width,))
        return [torch.from_numpy(row.copy())]


def _free(context: Any, model: Any) -> None:
    library.llama_free(context)
    library.llama_model_free(model)
