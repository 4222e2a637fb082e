"""One model as ``transformers`` loads it: tokenizer, weights in their place, adapter."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from baco.errors import BacoError
from baco.precision import by_half, chosen_dtype, quantization_config


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model goes, and in which numbers.

    Attributes:
        device: of all of it.
        dtype: asked for, or None for what suits the device.
        quantize: ``int8``, ``int4`` or None.
        options: handed to ``from_pretrained``; a ``device_map`` among them goes before ``device``.
    """

    device: torch.device
    dtype: str | torch.dtype | None = None
    quantize: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """BacoError for what cannot be, before anything is loaded."""
        chosen_dtype(self.dtype, self.device)
        if self.quantize is None:
            return
        if self.options.get("quantization_config") is not None:
            raise BacoError("give quantize or quantization_config, not both")
        quantization_config(self.quantize, self.device)

    def keywords(self, name: str) -> dict[str, Any]:
        """Keywords of ``from_pretrained`` for a model."""
        made = {"device_map": str(self.device), **self.options}
        if self.quantize is not None:
            made["quantization_config"] = quantization_config(self.quantize, self.device)
        # A checkpoint that is quantized already names the numbers beside its own.
        stored = self.dtype is None and _comes_quantized(name)
        return made | {"dtype": "auto" if stored else chosen_dtype(self.dtype, self.device)}


def placements(
    dtype: Any, device: Any, quantize: Any, options: dict[str, Any]
) -> dict[str, Placement]:
    """Where each half goes, from options that say it of both or of each; checked.

    Raises:
        BacoError: a device, format or half that there is not.
    """
    dtypes, devices = by_half("dtype", dtype), by_half("device", device)
    forms = by_half("quantize", quantize)
    made = {
        half: Placement(find_device(devices[half]), dtypes[half], forms[half], options)
        for half in dtypes
    }
    for placement in made.values():
        placement.check()
    return made


def find_device(name: str | None) -> torch.device:
    """The device of a name; None for the GPU where there is one, else the CPU.

    Raises:
        BacoError: it cannot be used here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BacoError(f"device {name!r} cannot be used here: {_line(error)}") from error
    return device


def check_folder(name: str) -> None:
    """A path that is meant as a folder must be one, with weights that fit in memory."""
    folder = Path(name)
    if not folder.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise BacoError(f"no such model folder: {name}; give a folder or a hub id")
        return
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = psutil.virtual_memory().available
    if size > free and not torch.cuda.is_available():
        raise BacoError(
            f"the weights in {name} take {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of "
            "memory are free: use a smaller model or a larger machine"
        )


def load_tokenizer(name: str, fallback: Any = None) -> Any:
    """A model's tokenizer, or ``fallback`` where it has none of its own.

    Raises:
        BacoError: neither.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if fallback is not None:
            return fallback
        raise BacoError(f"cannot load the tokenizer of {name}: {_line(error)}") from error


def load_model(name: str, placement: Placement) -> Any:
    """A causal LM in evaluation mode.

    Raises:
        BacoError: one that cannot be found or loaded.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(name, **placement.keywords(name))
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise BacoError(f"cannot load the model {name}: {_line(error)}") from error
    return model.eval()


def is_adapter(name: str) -> bool:
    """Is it a PEFT adapter, not a model?"""
    from transformers.utils import find_adapter_config_file

    try:
        return find_adapter_config_file(name) is not None
    except (OSError, ValueError):
        return False


def load_adapter(model: Any, name: str) -> Any:
    """A model with a PEFT adapter over it; the model's weights are held once.

    Where the adapter was trained with more tokens, the model's embeddings get their rows.

    Raises:
        BacoError: PEFT is not installed, or the adapter does not fit.
    """
    try:
        from peft import PeftModel, load_peft_weights
    except ImportError as error:
        raise BacoError(
            f"{name} is a PEFT adapter: install it with pip install 'baco[peft]'"
        ) from error
    try:
        rows = _embedded(load_peft_weights(name, device="cpu"), model)
        if rows > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(rows, mean_resizing=False)
        return PeftModel.from_pretrained(model, name).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BacoError(f"cannot put the adapter {name} over the base: {_line(error)}") from error


def _embedded(weights: Mapping[str, torch.Tensor], model: Any) -> int:
    """How many tokens an adapter has its own embeddings of a model for; 0 where it has none."""
    embedding = model.get_input_embeddings()
    path = next(path for path, module in model.named_modules() if module is embedding)
    own = [table for name, table in weights.items() if f".{path}." in name and table.dim() == 2]
    width = embedding.weight.shape[1]
    return max((len(table) for table in own if table.shape[1] == width), default=0)


def _comes_quantized(name: str) -> bool:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return False  # loading the model will say why
    return getattr(config, "quantization_config", None) is not None


def _line(error: BaseException) -> str:
    """The first line of another library's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
