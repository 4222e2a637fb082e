"""Checks that the files of a model are complete.

Libraries accept some damage without an error, and for some damage they do not name the file. This
module knows file formats. It knows nothing of what a configuration means.
"""

import json
from pathlib import Path
from typing import Any

from baco.errors import BacoError, one_line

# Small JSON files that describe a tokenizer, a model or an adapter.
DESCRIPTIONS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
INDEX = "*.index.json"
WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin")
POINTER = b"version https://git-lfs.github.com/spec/"
_ADVICE = "mend it or fetch it again"


def check_files(folder: Path) -> None:
    """Refuse a model's folder with a damaged file.

    Descriptions are read; weights are checked against the sizes in their headers. Of a tokenizer's
    vocabulary only the beginning is read, since reading it all takes as long as loading it.

    Raises:
        BacoError: a file is incomplete, or a shard is missing.
    """
    for name in DESCRIPTIONS:
        if (folder / name).exists():
            read_json_object(folder / name)
    for path in sorted(folder.glob(INDEX)):
        _check_shards(path)
    for pattern in WEIGHTS:
        for path in sorted(folder.glob(pattern)):
            _check_weights(path)
    for name in VOCABULARIES:
        if (folder / name).exists():
            check_beginning(folder / name)


def has_tokenizer(folder: Path) -> bool:
    """Does a model's folder have a file with a vocabulary?"""
    return any((folder / name).exists() for name in VOCABULARIES)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        BacoError: the file holds something else, or cannot be read.
    """
    check_beginning(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BacoError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BacoError(f"{path} is not JSON ({one_line(error)}): {_ADVICE}") from error
    if not isinstance(value, dict):
        raise BacoError(f"{path} holds no JSON object: {_ADVICE}")
    return value


def check_beginning(path: Path) -> None:
    """Refuse a file that is empty, or that is a pointer to its contents."""
    try:
        with path.open("rb") as file:
            beginning = file.read(len(POINTER))
    except OSError as error:
        raise BacoError(f"cannot read {path}: {error.strerror}") from error
    if not beginning:
        raise BacoError(f"{path} is empty: fetch it again")
    if beginning == POINTER:
        raise BacoError(
            f"{path} is a pointer of Git LFS, not the file itself: run 'git lfs pull' in "
            f"{path.parent}, or download the model again"
        )


def _check_weights(path: Path) -> None:
    check_beginning(path)
    if path.suffix != ".safetensors":
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise BacoError(
            f"{path} is damaged or cut off ({one_line(error)}): fetch it again"
        ) from error


def _check_shards(path: Path) -> None:
    """Refuse a sharded model with a missing file."""
    shards = read_json_object(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise BacoError(f"{path} has no weight_map from tensors to files: {_ADVICE}")
    names = set(shards.values())
    missing = sorted(name for name in names if not (path.parent / name).is_file())
    if missing:
        raise BacoError(
            f"{path.parent} has no {missing[0]}, which {path.name} names "
            f"({len(missing)} of {len(names)} files are missing): fetch it again"
        )
