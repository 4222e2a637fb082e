"""Memory of pairs of GGUF files: both files' weights by format, and both KV caches.

    python -m benchmarks.gguf_memory [FOLDER]

Sizes are computed from the models' published shapes and the bytes of each format's blocks in the
package gguf. With the folder of a model of transformers, the formulas are compared with files that
`baco pair export --gguf` writes of it, and with the cache that llama.cpp fills (llama-cpp-python).
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf

from baco.models.gguf_export import export_gguf
from baco.models.known_pairs import KnownPair
from baco.models.loading import load_config
from benchmarks import launch

# Formats of the table. Q4_K_M is a mixture that llama-quantize makes; BACo writes the others.
TABLE = ("q4_0", "q4_k_m", "q8_0", "f16")
WRITTEN = ("q4_0", "q8_0", "f16")
# llama.cpp's caches are float16.
_CACHE_BYTES = 2
_ANSWERS, _TOKENS = 8, 1000


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes.

    Attributes:
        layers: their number.
        hidden, inner: the width of a layer, and inside its MLP.
        heads, key_value_heads: of attention.
        head: numbers in a head.
        vocabulary: rows of the embedding.
        tied: the output layer is the embedding.
        biases: whether queries, keys and values have biases.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    key_value_heads: int
    head: int
    vocabulary: int
    tied: bool
    biases: bool = False

    def tensors(self) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        """Name, layer and shape of every tensor."""
        queries, keys = self.heads * self.head, self.key_value_heads * self.head
        yield "token_embd", 0, (self.vocabulary, self.hidden)
        if not self.tied:
            yield "output", 0, (self.vocabulary, self.hidden)
        yield "output_norm", 0, (self.hidden,)
        for layer in range(self.layers):
            for name in ("attn_norm", "ffn_norm"):
                yield name, layer, (self.hidden,)
            for name, rows in (("attn_q", queries), ("attn_k", keys), ("attn_v", keys)):
                yield name, layer, (rows, self.hidden)
                if self.biases:
                    yield f"{name}_bias", layer, (rows,)
            yield "attn_output", layer, (self.hidden, queries)
            yield "ffn_gate", layer, (self.inner, self.hidden)
            yield "ffn_up", layer, (self.inner, self.hidden)
            yield "ffn_down", layer, (self.hidden, self.inner)

    def bytes(self, format: str) -> int:
        """Bytes of the weights in a format."""
        total = 0
        for name, layer, sizes in self.tensors():
            kind = self._kind(name, layer, sizes, format)
            numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            count = sizes[0] * (sizes[1] if len(sizes) > 1 else 1)
            total += count // numbers * size
        return total

    def _kind(self, name: str, layer: int, sizes: tuple[int, ...], format: str) -> str:
        """The number format of a tensor."""
        if len(sizes) < 2:
            return "F32"
        ends = name == "output" or (name == "token_embd" and self.tied)
        if format == "q4_k_m":
            more = self._more_bits(layer) and name in ("attn_v", "ffn_down")
            return "Q6_K" if ends or more else "Q4_K"
        if format == "q4_0" and name in ("output", "token_embd"):
            return "Q8_0"
        return format.upper() if sizes[1] % 32 == 0 else "F16"

    def _more_bits(self, layer: int) -> bool:
        """Does Q4_K_M keep 6 bits in this layer? The first and last eighth, and every third."""
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2

    @property
    def cache(self) -> int:
        """Bytes of the KV cache for a token."""
        return 2 * self.layers * self.key_value_heads * self.head * _CACHE_BYTES


PAIRS = {
    "Llama 3.2 1B": Shape(16, 2048, 8192, 32, 8, 64, 128_256, tied=True),
    "Qwen2.5 1.5B": Shape(28, 1536, 8960, 12, 2, 128, 151_936, tied=True, biases=True),
    "Llama 3.2 3B": Shape(28, 3072, 8192, 24, 8, 128, 128_256, tied=True),
    "Qwen2.5 7B": Shape(28, 3584, 18_944, 28, 4, 128, 152_064, tied=False, biases=True),
    "Llama 3.1 8B": Shape(32, 4096, 14_336, 32, 8, 128, 128_256, tied=False),
    "Qwen2.5 14B": Shape(48, 5120, 13_824, 40, 8, 128, 152_064, tied=False, biases=True),
}


def print_table() -> None:
    """Print the memory of each pair: gigabytes of two files by format, and of caches."""
    formats = " | ".join(format.upper() for format in TABLE)
    print(f"| pair | {formats} | caches per token | of {_ANSWERS} answers of {_TOKENS:,} tokens |")
    print("|---|" + "---|" * (len(TABLE) + 2))
    for name, shape in PAIRS.items():
        weights = " | ".join(f"{2 * shape.bytes(format) / 1e9:.1f} GB" for format in TABLE)
        caches = 2 * shape.cache
        answers = caches * _ANSWERS * _TOKENS / 1e9
        print(f"| {name} | {weights} | {caches / 1024:.0f} KiB | {answers:.1f} GB |")


def shape_of(folder: str) -> Shape:
    """The shape of a model of the Llama family in a folder."""
    config = load_config(folder)
    heads = config.num_attention_heads
    return Shape(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        heads,
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        config.vocab_size,
        bool(config.tie_word_embeddings),
        config.model_type == "qwen2",
    )


def compare(folder: str) -> None:
    """Print computed and measured bytes of a model's files, and of its cache."""
    shape = shape_of(folder)
    print("| | computed | measured |\n|---|---|---|")
    for format in WRITTEN:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "pair"
            export_gguf(KnownPair("model", folder, folder), out, format=format)
            tensors = gguf.GGUFReader(out / "base.gguf").tensors
            measured = sum(int(tensor.n_bytes) for tensor in tensors)
            print(f"| weights, {format} | {shape.bytes(format):,} | {measured:,} |", flush=True)
            if format == "q8_0":
                cache = measured_cache(out / "base.gguf")
                print(f"| cache per token | {shape.cache:,} | {cache:,.0f} |")


def measured_cache(file: Path) -> float:
    """Bytes that llama.cpp saves of its cache for one more token."""
    from llama_cpp import llama_cpp as library

    model = library.llama_model_load_from_file(
        str(file).encode(), library.llama_model_default_params()
    )
    options = library.llama_context_default_params()
    options.n_ctx, options.n_seq_max = 512, 1
    context = library.llama_init_from_model(model, options)
    sizes = []
    for _ in range(2):
        tokens = (library.llama_token * 128)(*[1] * 128)
        library.llama_decode(context, library.llama_batch_get_one(tokens, 128))
        sizes.append(library.llama_state_seq_get_size(context, 0))
    library.llama_free(context)
    library.llama_model_free(model)
    return float(sizes[1] - sizes[0]) / 128


def main() -> None:
    """Print the table, or the comparison for a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", help="of a model, to compare the formulas with")
    folder = parser.parse_args().folder
    if folder:
        compare(folder)
    else:
        print_table()


if __name__ == "__main__":
    launch(main)
