"""A pair in one folder that a vLLM server takes for one model: written by ``baco pair export``.

DIR/config.json, generation_config.json, tokenizer…   what vLLM reads of a model
DIR/base/, DIR/aligned/                               the halves as they are, linked or copied
DIR/baco.json, calibration.json                       what BACo knows of the pair
"""

import json
import shutil
from pathlib import Path
from typing import Any

from baco.backends.vllm.plugin import ARCHITECTURE
from baco.calibration.store import Calibration
from baco.errors import BacoError, one_line
from baco.models import hub
from baco.models.known_pairs import KnownPair
from baco.models.loading import Placement, find_device, is_adapter, load_adapter, load_model
from baco.models.pair import Pair
from baco.models.weightless import load_weightless_pair
from baco.source import MODELS


def export_pair(
    known: KnownPair,
    out: Path,
    *,
    copy: bool = False,
    function_words: list[str] | None = None,
    trust_remote_code: bool = False,
) -> Pair:
    """Write a pair to the folder ``out``, which must be empty or new.

    Args:
        known: where the halves are. An adapter is put into the base model's weights for it.
        out: the folder.
        copy: the halves' files, in place of linking to where they are.
        function_words: a word list in place of the English one.
        trust_remote_code: run the Python code that comes with a model.

    Returns:
        The pair, without its weights.

    Raises:
        BacoError: a folder that is taken, halves that do not fit or cannot be read.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BacoError(f"{out} is not empty: export the pair to a new folder")
    pair = load_weightless_pair(
        known,
        dict.fromkeys(MODELS, "vLLM"),
        function_words=function_words,
        trust_remote_code=trust_remote_code,
    )
    out.mkdir(parents=True, exist_ok=True)
    for half, name in (("base", known.base), ("aligned", known.aligned)):
        if half == "aligned" and is_adapter(name):
            _merge(known, pair, out / half, trust_remote_code)
        else:
            _place(_folder(name, trust_remote_code), out / half, copy)
    pair.tokenizer.save_pretrained(out)
    _write(out / "config.json", _config(pair, known.dtype))
    _write(out / "generation_config.json", {"eos_token_id": sorted(pair.end_ids)})
    told: dict[str, Any] = {"name": known.name}
    for key, value in (("chat_options", known.chat_options), ("sampling", known.sampling)):
        if value:
            told[key] = dict(value)
    if function_words is not None:
        told["function_words"] = function_words
    if known.dtype:
        told["dtype"] = known.dtype
    _write(out / "baco.json", told)
    dial = Calibration.load(pair)
    if dial is not None:
        dial.save(pair, out / "calibration.json")
    return pair


def _config(pair: Pair, dtype: str | None) -> dict[str, Any]:
    """The base's configuration, on the common vocabulary and with the shorter context window."""
    config: dict[str, Any] = pair.base.model.config.to_dict()
    config["architectures"] = [ARCHITECTURE]
    config["vocab_size"] = pair.vocabulary.size
    context = min(pair.base.context, pair.aligned.context)
    if "max_position_embeddings" in config:
        config["max_position_embeddings"] = context
    config["eos_token_id"] = sorted(pair.end_ids)
    if dtype:
        config["dtype"] = dtype
    return config


def _folder(name: str, trust_remote_code: bool) -> Path:
    """Where a model's files are; from the hub where it is no folder."""
    folder = Path(name)
    if folder.is_dir():
        return folder.resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        kinds = ["*.json", "*.safetensors", "*.model", *(["*.py"] if trust_remote_code else [])]
        with hub.reading(name):
            return Path(snapshot_download(name, allow_patterns=kinds))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BacoError(f"cannot fetch the model {name}: {one_line(error)}") from error


def _place(source: Path, target: Path, copy: bool) -> None:
    if not any(source.glob("*.safetensors")):
        raise BacoError(f"{source} has no *.safetensors: save the model in that format first")
    if copy:
        shutil.copytree(source, target)
    else:
        target.symlink_to(source, target_is_directory=True)


def _merge(known: KnownPair, pair: Pair, target: Path, trust_remote_code: bool) -> None:
    """Write the base model with the adapter in its weights."""
    placement = Placement(find_device("cpu"), known.dtype, trust_remote_code=trust_remote_code)
    model = load_model(known.base, placement)
    merged = load_adapter(model, known.aligned).merge_and_unload()
    merged.save_pretrained(target)
    pair.aligned.tokenizer.save_pretrained(target)


def _write(file: Path, told: dict[str, Any]) -> None:
    file.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def read_pair(folder: Path, trust_remote_code: bool = False) -> Pair:
    """The pair of a folder that `export_pair` wrote, without its weights."""
    told = json.loads((folder / "baco.json").read_text(encoding="utf-8"))
    return load_weightless_pair(
        KnownPair.in_folder(folder),
        dict.fromkeys(MODELS, "vLLM"),
        function_words=told.get("function_words"),
        trust_remote_code=trust_remote_code,
    )
