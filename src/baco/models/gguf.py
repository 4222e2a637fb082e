"""GGUF files: a quantised model, its tokenizer and its chat template in one file.

They are named by a path, ``model.gguf``, or by ``REPOSITORY:FILE.gguf`` on the hub.
llama.cpp runs them as they are (`baco.models.llama_cpp_pair`). ``transformers`` reads them with the
package ``gguf``: weights are then de-quantised as they are loaded, so they take as much memory as
in any other format.
"""

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from baco.errors import BacoError, one_line
from baco.files import user_path
from baco.models.files import check_beginning

SUFFIX = ".gguf"
MAGIC = b"GGUF"
_TOKENS = "tokenizer.ggml.tokens"
# Held while the reader of the package ``gguf`` is replaced.
_lock = threading.RLock()


def is_gguf(name: str) -> bool:
    """Is this the name of a GGUF file?"""
    return name.lower().endswith(SUFFIX)


def located(name: str) -> tuple[str, dict[str, str]]:
    """Arguments of ``from_pretrained`` for a model: its folder or hub id, and keywords."""
    if not is_gguf(name):
        return name, {}
    repository, file = _on_the_hub(name)
    if repository:
        return repository, {"gguf_file": file}
    path = user_path(name)
    return str(path.parent), {"gguf_file": path.name}


def _on_the_hub(name: str) -> tuple[str, str]:
    """Repository and file; both are empty for a file on this machine."""
    repository, _, file = name.rpartition(":")
    is_hub = repository.count("/") == 1 and not repository.startswith((".", "/", "~"))
    return (repository, file) if is_hub and not Path(name).exists() else ("", "")


def local_path(name: str) -> Path:
    """The path of a GGUF file, which is downloaded where it is on the hub."""
    repository, file = _on_the_hub(name)
    if not repository:
        return user_path(name)
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, file))


def require_gguf(what: str) -> None:
    """Refuse where the package ``gguf`` is missing; ``what`` needs it, in a few words."""
    if importlib.util.find_spec("gguf") is None:
        raise BacoError(f"{what}: install its reader with pip install 'baco[gguf]'")


def check_gguf(name: str) -> None:
    """Refuse a GGUF file that cannot be loaded, before anything is loaded.

    Args:
        name: of the model; a file on the hub is not checked.

    Raises:
        BacoError: the package is missing, or the file is missing, incomplete, or no GGUF file, or
            it has no tokenizer.
    """
    require_gguf(f"{name} is a GGUF file")
    if _on_the_hub(name)[0]:
        return
    path = user_path(name)
    if not path.is_file():
        raise BacoError(f"no such GGUF file: {name}; give a file or REPOSITORY:FILE.gguf")
    check_beginning(path)
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic != MAGIC:
        raise BacoError(f"{path} is not a GGUF file: it does not begin with {MAGIC.decode()}")
    from gguf import GGUFReader

    try:
        fields = GGUFReader(str(path)).fields  # it finds every tensor in the file, too
    except Exception as error:  # it indexes beyond the end of the file
        raise BacoError(
            f"{path} is damaged or cut off ({one_line(error)}): fetch it again"
        ) from error
    if _TOKENS not in fields:
        raise BacoError(
            f"{path} has no tokenizer ({_TOKENS}): give a file that was converted with its "
            "vocabulary"
        )


def dequantized(keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords of ``from_pretrained`` that de-quantise the weights."""
    if keywords.get("quantization_config"):
        return {}
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}  # older versions always de-quantise
    return {"quantization_config": GgufConfig(dequantize=True)}


@contextmanager
def reading(*names: str) -> Iterator[None]:
    """In this block, each GGUF file is parsed once, and without a progress bar.

    Parsing takes seconds, since a file holds its vocabulary as separate texts. ``transformers``
    parses it three times, for the configuration, the tokenizer and the weights, and makes the map
    of tensor names again for every module.
    """
    if not any(is_gguf(name) for name in names) or importlib.util.find_spec("gguf") is None:
        yield
        return
    import gguf
    import transformers.modeling_gguf_pytorch_utils as module

    with _lock, ExitStack() as restored:
        for owner, name, value in (
            (gguf, "GGUFReader", cache(gguf.GGUFReader)),
            (gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
            (module, "tqdm", partial(module.tqdm, disable=True)),
        ):
            restored.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield
