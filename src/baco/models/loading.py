"""Loading one model with ``transformers``: configuration, tokenizer, weights, adapter."""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from baco.errors import OUT_OF_MEMORY, BacoError, one_line
from baco.models import hub
from baco.models.dtypes import by_source, chosen_dtype, quantization_config, without_torchao
from baco.models.files import check_files, has_tokenizer, read_json_object
from baco.models.gguf import check_gguf, dequantized, is_gguf, located
from baco.source import MODELS, Source


@dataclass(frozen=True, slots=True)
class Placement:
    """The device and number format to load a model with.

    Attributes:
        device: of the whole model.
        dtype: of the weights; None for what suits the device.
        quantize: ``int8``, ``int4`` or None.
        trust_remote_code: run the Python code that comes with the model.
        options: passed to ``from_pretrained``; a ``device_map`` among them overrides ``device``.
    """

    device: torch.device
    dtype: str | torch.dtype | None = None
    quantize: str | None = None
    trust_remote_code: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise BacoError for impossible settings, before anything is loaded."""
        chosen_dtype(self.dtype, self.device)
        if self.quantize is None:
            return
        if self.options.get("quantization_config") is not None:
            raise BacoError("give quantize or quantization_config, not both")
        quantization_config(self.quantize, self.device)

    def keywords(self, name: str) -> dict[str, Any]:
        """Keywords of ``from_pretrained`` for a model."""
        keywords = {
            "device_map": str(self.device),
            # Without it transformers asks on standard input.
            "trust_remote_code": self.trust_remote_code,
            **self.options,
        }
        if is_gguf(name):
            keywords |= dequantized(keywords)
        if self.quantize is not None:
            if is_gguf(name):
                raise BacoError(
                    f"{name} is de-quantised as it is loaded: leave quantize out, or give a model "
                    "of transformers"
                )
            keywords["quantization_config"] = quantization_config(self.quantize, self.device)
        # A checkpoint that is quantized already names the format of its other numbers.
        stored = (
            self.dtype is None
            and not is_gguf(name)
            and _comes_quantized(load_config(name, trust_remote_code=self.trust_remote_code))
        )
        return keywords | {"dtype": "auto" if stored else chosen_dtype(self.dtype, self.device)}


def placements(
    dtype: Any,
    device: Any,
    quantize: Any,
    options: dict[str, Any],
    *,
    trust_remote_code: bool = False,
) -> dict[Source, Placement]:
    """The placement of each model, from options with one value for both or one for each; checked.

    Raises:
        BacoError: a device or format that does not exist, or a value for something else than base
            and aligned.
    """
    dtypes, devices = by_source("dtype", dtype), by_source("device", device)
    formats = by_source("quantize", quantize)
    placed = {
        source: Placement(
            find_device(devices[source]),
            dtypes[source],
            formats[source],
            trust_remote_code,
            options,
        )
        for source in MODELS
    }
    for placement in placed.values():
        placement.check()
    return placed


def find_device(name: str | None) -> torch.device:
    """The device of this name; without a name the GPU where there is one, else the CPU.

    Raises:
        BacoError: it cannot be used here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BacoError(f"device {name!r} cannot be used here: {one_line(error)}") from error
    return device


def check_model(name: str) -> None:
    """Refuse a model that does not exist or whose files are damaged, before anything is loaded.

    Args:
        name: folder or hub id; for the latter, files in the cache of the hub are checked.

    Raises:
        BacoError: the folder does not exist, the hub does not answer, or a file is damaged.
    """
    if not name.strip():
        raise BacoError("the name of a model is empty: give a folder or a hub id")
    if is_gguf(name):
        check_gguf(name)
        return
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not Path(name).exists() and is_path:
        raise BacoError(f"no such model folder: {name}; give a folder or a hub id")
    hub.local_files_only(name)
    folder = hub.model_folder(name)
    if folder is not None:
        check_files(folder)
    described = [Path(name) / file for file in ("config.json", "adapter_config.json")]
    if Path(name).is_dir() and not any(file.exists() for file in described):
        raise BacoError(f"{name} has no config.json: give the folder of a model")


def check_memory(name: str) -> None:
    """Refuse weights on this machine that do not fit into this machine's memory."""
    files = [Path(name)] if is_gguf(name) else Path(name).glob("*.safetensors")
    size = sum(file.stat().st_size for file in files if file.is_file())
    free = psutil.virtual_memory().available
    if size > free and not torch.cuda.is_available():
        raise BacoError(
            f"the weights in {name} take {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of "
            "memory are free: use a smaller model or a larger machine"
        )


class UntrustedCodeError(BacoError):
    """A model comes with Python code that the user has not allowed to run."""


@contextmanager
def explain_errors(what: str, name: str) -> Iterator[None]:
    """Turn any error that a library raises while it reads a model's files into one line.

    Args:
        what: the part of the model that is read, for the message, as in ``the tokenizer of``.
        name: folder or hub id.

    Raises:
        BacoError: in place of every error except those that end a process or report too little
            memory.
    """
    try:
        yield
    except (BacoError, KeyboardInterrupt, GeneratorExit, MemoryError):
        raise
    # Damaged files cause errors of all kinds in libraries. A panic in Rust and the exit that a
    # model's own code may call are BaseExceptions.
    except BaseException as error:
        if isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)):
            raise
        if "trust_remote_code" in str(error):
            raise UntrustedCodeError(
                f"{what} {name} comes with Python code of its own, which runs only if you trust "
                "it: give --trust-remote-code (in Python: trust_remote_code=True), or use another "
                "model"
            ) from error
        raise BacoError(f"cannot load {what} {name}: {_reason(name, error)}") from error


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """`explain_errors` for a block that may download files from the hub."""
    with explain_errors(what, name), hub.reading(located(name)[0]):
        yield


def _reason(name: str, error: BaseException) -> str:
    """The cause of a model's loading error, and what to do."""
    if "does not recognize this architecture" not in str(error):
        here = is_gguf(name) or hub.model_folder(name)
        advice = "; mend its files or fetch them again" if here else ""
        return one_line(error) + advice
    import transformers

    kind = re.search(r"model type `(.*?)`", str(error))
    named = f" {kind[1]!r}" if kind else ""
    return (
        f"transformers {transformers.__version__} does not know the architecture{named} that its "
        "config.json names; upgrade transformers, or use another model"
    )


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """A model's configuration.

    Raises:
        BacoError: it cannot be found or read.
    """
    from transformers import AutoConfig

    with _loading("the configuration of", name):
        place, keywords = located(name)
        return AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **keywords)


def load_tokenizer(name: str, fallback: Any = None, *, trust_remote_code: bool = False) -> Any:
    """A model's tokenizer, or ``fallback`` where it has none.

    Raises:
        BacoError: there is neither.
    """
    from transformers import AutoTokenizer

    try:
        with _loading("the tokenizer of", name):
            place, keywords = located(name)
            return AutoTokenizer.from_pretrained(
                place, trust_remote_code=trust_remote_code, **keywords
            )
    except UntrustedCodeError:
        raise
    except BacoError as error:
        folder = None if is_gguf(name) else hub.model_folder(name)
        if folder is None or not has_tokenizer(folder):
            if fallback is not None:
                return fallback
            if folder is not None:
                raise BacoError(
                    f"{folder} has no tokenizer: fetch its tokenizer.json, or tokenizer.model, too"
                ) from error
        elif (folder / "tokenizer.json").exists():
            read_json_object(folder / "tokenizer.json")  # a better message if it is not JSON
        raise


def import_model_code() -> None:
    """Import the part of ``transformers`` that loads models."""
    with without_torchao():
        import transformers.modeling_utils  # noqa: F401


def load_model(name: str, placement: Placement) -> Any:
    """A causal LM in evaluation mode.

    Raises:
        BacoError: it cannot be found or loaded, or its weights do not match its configuration.
    """
    from transformers import AutoModelForCausalLM

    import_model_code()
    with _loading("the model", name):
        # Mismatched sizes are reported below: transformers would log a table of them.
        place, keywords = located(name)
        model, report = AutoModelForCausalLM.from_pretrained(
            place,
            **keywords,
            **placement.keywords(name),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _check_weights(name, model, report)
    return model.eval()


def _check_weights(name: str, model: Any, report: dict[str, Any]) -> None:
    """Refuse a model that ``transformers`` completed with random weights."""
    if report["mismatched_keys"]:
        tensor, stored, expected = min(report["mismatched_keys"])
        raise BacoError(
            f"cannot load the model {name}: its weights and its config.json do not belong "
            f"together: {tensor} is {_shape(stored)} in the file and {_shape(expected)} by the "
            "configuration; fetch both again"
        )
    # A quantised checkpoint stores its tensors under other names.
    if report["missing_keys"] and not _comes_quantized(model.config):
        missing = sorted(report["missing_keys"])
        raise BacoError(
            f"cannot load the model {name}: its files lack {len(missing)} of the tensors that its "
            f"config.json asks for, such as {missing[0]}; fetch them again"
        )


def _shape(sizes: Any) -> str:
    return "×".join(map(str, sizes))


def model_files(name: str, trust_remote_code: bool = False) -> Path:
    """The folder of a model with weights in safetensors, downloaded from the hub if needed.

    Raises:
        BacoError: it cannot be fetched, or its weights are in another format.
    """
    folder = Path(name).resolve() if Path(name).is_dir() else _download(name, trust_remote_code)
    if not any(folder.glob("*.safetensors")):
        raise BacoError(f"{folder} has no *.safetensors: save the model in that format first")
    return folder


def _download(name: str, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", *(["*.py"] if trust_remote_code else [])]
        with hub.reading(name):
            return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BacoError(f"cannot fetch the model {name}: {one_line(error)}") from error


def is_adapter(name: str) -> bool:
    """Is it a PEFT adapter and not a model?"""
    from transformers.utils import find_adapter_config_file

    if is_gguf(name):
        return False

    with hub.reading(name):
        try:
            return find_adapter_config_file(name) is not None
        except (OSError, ValueError):
            return False  # loading the model reports the cause


@contextmanager
def reading_adapter(name: str) -> Iterator[None]:
    """In this block, what PEFT raises, or that it is not installed, becomes a `BacoError`."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise BacoError(
            f"{name} is a PEFT adapter: install it with pip install 'baco[peft]'"
        ) from error
    with _loading("the adapter", name), without_torchao(), warnings.catch_warnings():
        # PEFT fills a missing tensor with random numbers.
        warnings.filterwarnings("error", "Found missing adapter keys")
        yield


def load_adapter(model: Any, name: str) -> Any:
    """A model with a PEFT adapter over it; the model's weights are held once.

    Where the adapter was trained with more tokens, the model's embedding is extended by their rows.

    Raises:
        BacoError: PEFT is not installed, or the adapter does not fit the model.
    """
    with reading_adapter(name):
        from peft import PeftModel, load_peft_weights

        try:
            rows = _embedding_rows(load_peft_weights(name, device="cpu"), model)
            if rows > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(rows, mean_resizing=False)
            return PeftModel.from_pretrained(model, name).eval()
        except UserWarning as error:
            raise BacoError(
                f"cannot load the adapter {name}: its files lack some of the tensors that its "
                "adapter_config.json asks for; fetch them again"
            ) from error


def _embedding_rows(weights: Mapping[str, torch.Tensor], model: Any) -> int:
    """Rows of the embedding that an adapter brings for a model; 0 where it brings none."""
    embedding = model.get_input_embeddings()
    path = next(path for path, module in model.named_modules() if module is embedding)
    tables = [table for name, table in weights.items() if f".{path}." in name and table.dim() == 2]
    width = embedding.weight.shape[1]
    return max((len(table) for table in tables if table.shape[1] == width), default=0)


def _comes_quantized(config: Any) -> bool:
    return getattr(config, "quantization_config", None) is not None
