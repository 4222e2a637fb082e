"""In which numbers weights are held: bfloat16 where it is native, 8 or 4 bits where asked for.

Knows devices and number formats; it knows nothing of models.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from baco.errors import BacoError
from baco.source import MODELS

QUANTIZE = ("int8", "int4")
# Weights that share a scale in 4 bits; small, so that small models have whole groups too.
INT4_GROUP = 32


def native_bfloat16(device: torch.device) -> bool:
    """Does a device multiply bfloat16 matrices itself, not by way of float32?"""
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return bool(native and torch.backends.mkldnn.is_available())
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return device.type == "xpu" and torch.xpu.is_bf16_supported()


def chosen_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The number format to hold weights in: the one asked for; bfloat16 where it is native, else
    float32, for None and ``auto``.

    Raises:
        BacoError: a name that is no format weights can be held in.
    """
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if native_bfloat16(device) else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise BacoError(f"dtype {dtype!r}: use auto, float32, bfloat16 or float16")
    return found


def by_half(option: str, value: Any) -> dict[str, Any]:
    """What an option says of each half: one value for both, or ``base=VALUE,aligned=VALUE``.

    Args:
        option: its name, for the error.
        value: the one value, such a text, or a mapping from half to value; a half that is left out
            gets None.

    Raises:
        BacoError: a half that there is not.
    """
    if isinstance(value, str) and "=" in value:
        pairs = [part.partition("=") for part in value.split(",")]
        value = {half.strip(): told.strip() or None for half, _, told in pairs}
    if not isinstance(value, Mapping):
        return dict.fromkeys(MODELS, value)
    for half in value:
        if half not in MODELS:
            raise BacoError(
                f"{option} names {half!r}: give one value, or base=… and aligned=… as in "
                f"base=VALUE,aligned=VALUE"
            )
    return {half: value.get(half) for half in MODELS}


@contextmanager
def without_torchao() -> Iterator[None]:
    """Spare libraries the import of torchao, which takes longer than all other imports together.

    Where it is installed, ``transformers`` imports it with all model code for a function that saves
    quantised weights, and PEFT for a class that tells them. Where torchao has not been imported, no
    weights are quantised by it, so a stand-in does in this block. Quantised weights import it.
    """
    if "torchao" in sys.modules:
        yield
        return

    def saved(*arguments: Any) -> Any:
        # The stand-in has long left sys.modules: this imports torchao.
        return import_module(_SAVING).flatten_tensor_state_dict(*arguments)

    stand_ins: dict[str, dict[str, Any]] = {
        _SAVING: {"flatten_tensor_state_dict": saved},
        "torchao.utils": {"TorchAOBaseTensor": type("TorchAOBaseTensor", (), {})},
    }
    for name, members in stand_ins.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(members)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


_SAVING = "torchao.prototype.safetensors.safetensors_support"


def quantization_config(quantize: str, device: torch.device) -> Any:
    """What ``transformers`` takes to hold a model's linear layers in 8 or 4 bits, by torchao.

    Weights alone are held so; sums are taken in the model's dtype. In 4 bits, layers whose inputs
    are no whole number of groups stay as they are.

    Raises:
        BacoError: no such form, torchao is not installed, or has no kernel for the device.
    """
    if quantize not in QUANTIZE:
        raise BacoError(f"quantize is {quantize!r}: use {' or '.join(QUANTIZE)}, or leave it out")
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        if quantize == "int8":
            return TorchAoConfig(Int8WeightOnlyConfig())
        if device.type == "cpu":
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

            return TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=INT4_GROUP))
    except ImportError as error:
        raise BacoError(
            f"{quantize} weights are made by torchao: install it with "
            "pip install 'baco[quantization]'"
        ) from error
    if device.type != "cuda":
        raise BacoError(f"int4 weights have kernels for cpu and cuda, not {device.type}: use int8")
    return TorchAoConfig(
        Int4WeightOnlyConfig(group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d")
    )
