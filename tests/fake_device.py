"""A stand-in for a GPU that counts how often the host waits for it.

Its tensors refuse to be combined with the host's. As on a GPU, the host waits until all work is
done in ``tolist``, ``item``, ``bool``, ``nonzero`` and copies to the host, and in copies to the
device without ``non_blocking``.
"""

from collections import Counter
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

# Stands for a device of its own in every place where the engine asks for one.
FAR = torch.device("meta")
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal")


class FakeDeviceTensor(Tensor):
    """A tensor on that device; ``near`` holds its values on the host."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "FakeDeviceTensor":
        tensor = Tensor._make_wrapper_subclass(
            cls, near.size(), near.stride(), near.storage_offset(), dtype=near.dtype, device=FAR
        )
        tensor.near = near
        return tensor

    def __init__(self, near: Tensor) -> None: ...

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        for value in tree_leaves((args, kwargs)):
            if (
                isinstance(value, Tensor)
                and not isinstance(value, FakeDeviceTensor)
                and value.dim() > 0
            ):
                raise RuntimeError(f"{name}: a tensor of the host meets one of the device")
        home = name == "_to_copy" and torch.device(kwargs.get("device", FAR)).type == "cpu"
        indices = args[1] if name.startswith("index") and len(args) > 1 else ()
        masks = any(
            isinstance(at, FakeDeviceTensor) and at.dtype == torch.bool
            for at in tree_leaves(indices)
        )
        if home or masks or name in _WAITS:
            Waits.seen[name] += 1
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        results = func(*tree_map(near, args), **tree_map(near, kwargs))
        if home or name == "_local_scalar_dense":
            return results
        if func._schema.is_mutable:  # in place
            return args[0]
        return tree_map(
            lambda value: FakeDeviceTensor(value) if isinstance(value, Tensor) else value, results
        )


def near(one: Any) -> Any:
    """The host's values of a far tensor; any other object unchanged."""
    return one.near if isinstance(one, FakeDeviceTensor) else one


class Waits(TorchFunctionMode):
    """Inside, FAR is a device; ``seen`` counts the operations that the host waited for."""

    seen: ClassVar[Counter[str]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist and isinstance(args[0], FakeDeviceTensor):
            self.seen["tolist"] += 1
            return args[0].near.tolist()
        if func is Tensor.__setitem__ and isinstance(args[0], FakeDeviceTensor):
            return args[0].near.__setitem__(*tree_map(near, args[1:]))
        if (
            func is Tensor.copy_
            and isinstance(args[0], FakeDeviceTensor)
            and not isinstance(args[1], FakeDeviceTensor)
        ):
            self.seen["copy_"] += not kwargs.get("non_blocking")
            args[0].near.copy_(args[1])
            return args[0]
        places = [*args[1:], kwargs.get("device")]
        goes = any(isinstance(place, str | torch.device) and place == FAR for place in places)
        if func is Tensor.to and goes and not isinstance(args[0], FakeDeviceTensor):
            self.seen["to"] += not kwargs.get("non_blocking")
            return FakeDeviceTensor(args[0].clone())
        if goes and func is not Tensor.to:
            self.seen["tensor"] += func is torch.tensor
            return FakeDeviceTensor(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)
