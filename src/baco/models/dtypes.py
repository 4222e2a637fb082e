"""The number format of weights: bfloat16 where it is native, 8 or 4 bits on request.

It knows devices and number formats. It knows nothing of models.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from baco.errors import BacoError
from baco.source import MODELS, Source

QUANTIZE = ("int8", "int4")
# Weights that share a scale in 4 bits; few, so that the layers of small models have whole groups.
INT4_GROUP = 32


def native_bfloat16(device: torch.device) -> bool:
    """Does a device multiply bfloat16 matrices itself, without converting them to float32?"""
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
    """The number format of weights: ``dtype``, or for None and ``auto`` bfloat16 where it is native
    and else float32.

    Raises:
        BacoError: weights cannot be held in a format of that name.
    """
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if native_bfloat16(device) else torch.float32
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in (torch.float32, torch.bfloat16, torch.float16):
        raise BacoError(f"dtype {dtype!r}: use auto, float32, bfloat16 or float16")
    return chosen


def by_source(option: str, value: Any) -> dict[Source, Any]:
    """An option's value for each model: one for both, or ``base=VALUE,aligned=VALUE``.

    Args:
        option: its name, for the error.
        value: one value, a text of that form, or a mapping from source to value. A model that is
            left out gets None.

    Raises:
        BacoError: a source other than base and aligned.
    """
    if isinstance(value, str) and "=" in value:
        parts = [part.partition("=") for part in value.split(",")]
        value = {source.strip(): text.strip() or None for source, _, text in parts}
    if not isinstance(value, Mapping):
        return dict.fromkeys(MODELS, value)
    for source in value:
        if source not in MODELS:
            raise BacoError(
                f"{option} names {source!r}: give one value, or base=… and aligned=… as in "
                f"base=VALUE,aligned=VALUE"
            )
    return {source: value.get(source) for source in MODELS}


@contextmanager
def without_torchao() -> Iterator[None]:
    """Keep libraries from importing torchao, which takes longer than all other imports together.

    Where torchao is installed, ``transformers`` imports it with all model code for a function that
    saves quantised weights, and PEFT for a class that recognises them. As long as torchao has not
    been imported, no weights are quantised with it, so a stub is enough in this block. Loading
    quantised weights imports torchao.
    """
    if "torchao" in sys.modules:
        yield
        return

    def saved(*arguments: Any) -> Any:
        # The stub is no longer in sys.modules, so this imports torchao.
        return import_module(_SAVING).flatten_tensor_state_dict(*arguments)

    stubs: dict[str, dict[str, Any]] = {
        _SAVING: {"flatten_tensor_state_dict": saved},
        "torchao.utils": {"TorchAOBaseTensor": type("TorchAOBaseTensor", (), {})},
    }
    for name, members in stubs.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(members)
    try:
        yield
    finally:
        for name in stubs:
            del sys.modules[name]


_SAVING = "torchao.prototype.safetensors.safetensors_support"


def quantization_config(quantize: str, device: torch.device) -> Any:
    """The configuration with which ``transformers`` holds linear layers in 8 or 4 bits (torchao).

    Only weights are quantised; sums are taken in the model's dtype. In 4 bits, layers whose number
    of inputs is not a multiple of the group size stay as they are.

    Raises:
        BacoError: the format is unknown, torchao is not installed, or it has no kernel for the
            device.
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
