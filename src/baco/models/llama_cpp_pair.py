"""Loading a pair of GGUF files, or one of them under two prompts, into llama.cpp."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from baco.errors import BacoError
from baco.models import gguf, hub
from baco.models.known_pairs import KnownPair
from baco.models.llama_cpp.library import installed, library
from baco.models.llama_cpp.weights import LlamaWeights
from baco.models.llama_cpp_model import LlamaCppModel
from baco.models.loading import check_memory, check_model, explain_errors, load_tokenizer
from baco.models.pair import Pair, check_vocabularies, make_known_pair

# Options of `load_llama_cpp_pair`; with any other one, GGUF files are de-quantised.
OPTIONS = frozenset(
    {
        "device",
        "base_template",
        "chat_template",
        "function_words",
        "trust_remote_code",
        "separate_tokenizers",
    }
)
# Options of `baco.Baco.load` that do not depend on what runs the pair.
_OF_ALL = frozenset(
    {"date", "enable_prefix_caching", "max_rows", "memory", "template_args", "thinking"}
)
# A tensor of models whose rotary factors depend on the size of a context of llama.cpp.
_LONG_ROPE = "rope_factors_long.weight"


def suits(known: KnownPair, options: Iterable[str]) -> bool:
    """Would llama.cpp be chosen for a pair by itself?

    Args:
        known: the pair.
        options: names of the options that were given for loading it.
    """
    names = (known.base, known.aligned)
    fit = (OPTIONS | _OF_ALL).issuperset(options)
    return all(map(gguf.is_gguf, names)) and fit and installed()


def load_llama_cpp_pair(
    known: KnownPair,
    *,
    device: str | None = None,
    base_template: str | None = None,
    chat_template: str | None = None,
    function_words: str | Iterable[str] | None = None,
    trust_remote_code: bool = False,  # noqa: ARG001
    separate_tokenizers: bool | None = None,
) -> Pair:
    """Load both models of a pair with their quantised weights as they are.

    Args:
        known: where the files are; one file twice is held once.
        device: ``cpu`` or ``gpu``; by default a GPU where the library was built for one.
        base_template, chat_template, function_words, separate_tokenizers: as for
            `baco.models.pair.load_pair`.
        trust_remote_code: a GGUF file has no code.

    Raises:
        BacoError: the library is missing, or a file cannot be loaded, or the models are no pair.
    """
    for name in (known.base, known.aligned):
        if not gguf.is_gguf(name):
            raise BacoError(
                f"{name} is no GGUF file: the llamacpp backend runs only these; use --backend local"
            )
    gpu = _on_gpu(device)
    with gguf.reading(known.base, known.aligned):
        for name in dict.fromkeys((known.base, known.aligned)):
            check_model(name)
            check_memory(name)
        tokenizers = {
            name: load_tokenizer(name) for name in dict.fromkeys((known.base, known.aligned))
        }
        base_tokenizer, aligned_tokenizer = tokenizers[known.base], tokenizers[known.aligned]
        if separate_tokenizers is False:
            check_vocabularies(base_tokenizer, aligned_tokenizer)
        base = _load(known.base, base_tokenizer, gpu)
        aligned = replace(base)
        if known.aligned != known.base:
            aligned = _load(known.aligned, aligned_tokenizer, gpu)
    return make_known_pair(
        known,
        base,
        aligned,
        base_template=base_template,
        chat_template=chat_template,
        function_words=function_words,
        separate_tokenizers=separate_tokenizers,
    )


def _on_gpu(device: Any) -> bool:
    has_gpu = bool(library().llama_supports_gpu_offload())
    if device not in (None, "cpu", "gpu"):
        raise BacoError(f"device is {device!r}: with llama.cpp give cpu or gpu")
    if device == "gpu" and not has_gpu:
        raise BacoError(
            "llama-cpp-python was built without a GPU here: give --device cpu, or install a build "
            "for CUDA, Metal or Vulkan"
        )
    return has_gpu if device is None else device == "gpu"


def _load(name: str, tokenizer: Any, gpu: bool) -> LlamaCppModel:
    with explain_errors("the model", name), hub.reading(gguf.located(name)[0]):
        path = gguf.local_path(name)
    if _has_long_rope(path):
        raise BacoError(
            f"{name} has rotary factors that depend on the size of llama.cpp's context (LongRoPE), "
            "so answers would depend on other requests: use --backend local"
        )
    return LlamaCppModel(name, LlamaWeights(path, gpu=gpu), tokenizer)


def _has_long_rope(path: Path) -> bool:
    from gguf import GGUFReader

    return any(tensor.name == _LONG_ROPE for tensor in GGUFReader(str(path)).tensors)
