"""A pair in one folder that a vLLM server reads as one model: written by ``baco pair export``.

DIR/config.json, generation_config.json, tokenizer…   the files that vLLM reads of a model
DIR/base/, DIR/aligned/                               the models as they are, linked or copied;
                                                      aligned is a link to base where they are one
DIR/baco.json, calibration.json                       the pair's own settings
"""

import json
import shutil
from pathlib import Path
from typing import Any

from baco.backends.vllm.plugin import ARCHITECTURE
from baco.calibration.store import Calibration
from baco.errors import BacoError
from baco.models.files import read_json_object
from baco.models.forward.adapted import LINEARS
from baco.models.known_pairs import KnownPair
from baco.models.loading import is_adapter, model_files, reading_adapter
from baco.models.pair import Pair
from baco.models.weightless import load_weightless_pair, save_merged
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
        known: where the models are. An adapter that is more than low-rank products over the layers
            of a decoder is merged into a copy of the base model's weights.
        out: the folder.
        copy: copy the models' files instead of linking to them.
        function_words: a word list instead of the English one.
        trust_remote_code: run the Python code that comes with a model.

    Returns:
        The pair, without its weights.

    Raises:
        BacoError: the folder is not empty, or the models are no pair or cannot be read.
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
    base = model_files(known.base, trust_remote_code)
    _link_or_copy(base, out / "base", copy)
    if is_adapter(known.aligned) and not _is_low_rank(known.aligned):
        save_merged(known, pair, out / "aligned", trust_remote_code)
    elif (aligned := model_files(known.aligned, trust_remote_code)) == base:
        (out / "aligned").symlink_to("base", target_is_directory=True)
    else:
        _link_or_copy(aligned, out / "aligned", copy)
    pair.tokenizer.save_pretrained(out)
    _write(out / "config.json", _config(pair, known.dtype))
    _write(out / "generation_config.json", {"eos_token_id": sorted(pair.end_ids)})
    settings = known.settings
    if function_words is not None:
        settings["function_words"] = function_words
    _write(out / "baco.json", settings)
    calibration = Calibration.load(pair)
    if calibration is not None:
        calibration.save(pair, out / "calibration.json")
    return pair


def _is_low_rank(name: str) -> bool:
    """Is an adapter nothing but low-rank products of one rank and one scale, over the linear layers
    of a decoder? Read off its files.

    Raises:
        BacoError: PEFT is not installed, or the files cannot be read.
    """
    with reading_adapter(name):
        from peft import LoraConfig, PeftConfig, load_peft_weights

        config = PeftConfig.from_pretrained(name)
        weights = load_peft_weights(name, device="cpu")
    if not isinstance(config, LoraConfig) or config.alpha_pattern or config.layer_replication:
        return False
    for tensor, weight in weights.items():
        layer, _, product = tensor.removesuffix(".weight").rpartition(".")
        if product not in ("lora_A", "lora_B") or layer.rpartition(".")[2] not in LINEARS:
            return False  # a bias, a magnitude (DoRA), an embedding, a whole layer
        if weight.shape[0 if product == "lora_A" else 1] != config.r:
            return False
    return True


def is_one_model(folder: Path) -> bool:
    """Are both models of a pair's folder the same files?"""
    base, aligned = (folder / source for source in MODELS)
    return base.resolve() == aligned.resolve()


def has_adapter(folder: Path) -> bool:
    """Is the aligned model of a pair's folder an adapter over the base model?"""
    return (folder / "aligned" / "adapter_config.json").is_file()


def _config(pair: Pair, dtype: str | None) -> dict[str, Any]:
    """The base's configuration with the common vocabulary and the shorter context window."""
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


def _link_or_copy(source: Path, target: Path, copy: bool) -> None:
    if copy:
        shutil.copytree(source, target)
    else:
        target.symlink_to(source, target_is_directory=True)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_pair(folder: Path, trust_remote_code: bool = False) -> Pair:
    """The pair of a folder that `export_pair` wrote, without its weights."""
    settings = read_json_object(folder / "baco.json")
    return load_weightless_pair(
        KnownPair.in_folder(folder),
        dict.fromkeys(MODELS, "vLLM"),
        function_words=settings.get("function_words"),
        trust_remote_code=trust_remote_code,
    )
