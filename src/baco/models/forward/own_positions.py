"""Parts of ``transformers`` models that compute positions of their own, once for a whole batch.

In a forward over rows of different lengths they are given the positions of each row. An
architecture that needs this is added here; the trials decide whether it is then read right.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from baco.kv_cache.slots import ForwardPlan

_ALIBI = "build_alibi_tensor"


@dataclass(frozen=True, slots=True)
class OwnPositions:
    """Such parts of one model.

    Attributes:
        alibi: the Python module whose function makes ALiBi's biases from a mask [B, columns], as
            for Bloom and Falcon; None for a model without ALiBi.
        windows: attention modules with a table of causal masks, ``bias``, and the number of tokens
            in their windows (GPT-Neo).
        scaled: attention modules that scale queries by the logarithm of their positions (Llama 4).
    """

    alibi: Any
    windows: tuple[tuple[nn.Module, int], ...]
    scaled: tuple[Any, ...]

    @classmethod
    def of(cls, model: Any) -> Self:
        """Those of a model, without an adapter."""
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        code = sys.modules.get(type(decoder).__module__)
        modules = list(decoder.modules())
        return cls(
            code if hasattr(code, _ALIBI) else None,
            tuple((module, window) for module in modules if (window := _window(module))),
            tuple(module for module in modules if _scales_queries(module)),
        )

    @contextmanager
    def per_row(self, plan: ForwardPlan, device: Any) -> Iterator[None]:
        """In this block, these parts read the rows of a plan."""
        position = plan.columns.to(device)  # [B, T]
        with ExitStack() as stack:
            if self.alibi is not None:
                original = getattr(self.alibi, _ALIBI)
                stack.enter_context(replaced(self.alibi, _ALIBI, _of_columns(original)))
            if self.windows:
                column = torch.arange(plan.width, device=device)
                behind = position[:, None, :, None] - column  # [B, 1, T, columns]
                for module, window in self.windows:
                    mask = (behind >= 0) & (behind < window)
                    stack.enter_context(replaced(module, "bias", _Table(mask)))
            for module in self.scaled:
                steps = torch.floor((position.float() + 1) / module.floor_scale)
                scale = torch.log1p(steps) * module.attn_scale + 1
                forward = _scaled(module.q_proj.forward, scale[..., None])
                stack.enter_context(replaced(module.q_proj, "forward", forward))
                stack.enter_context(replaced(module, "attn_temperature_tuning", False))
            yield


class _Table:
    """Stands in for a table of masks: every index returns the same mask."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask

    def __getitem__(self, index: Any) -> Tensor:
        return self._mask


def _of_columns(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """ALiBi's biases for masks [B, 1, T, columns], in which a column is a position.

    A bias may be counted from any position, since a constant for each query changes no softmax.
    """

    def call(mask: Tensor, *args: Any, **options: Any) -> Tensor:
        if mask.dim() == 4:
            mask = torch.ones(len(mask), mask.shape[-1], dtype=torch.long, device=mask.device)
        return build(mask, *args, **options)

    return call


def _scaled(forward: Callable[[Tensor], Tensor], scale: Tensor) -> Callable[[Tensor], Tensor]:
    def call(hidden_states: Tensor) -> Tensor:
        queries = forward(hidden_states)
        return (queries * scale).to(queries.dtype)

    return call


def _window(module: nn.Module) -> int:
    """Tokens in the window of an attention module's table of masks; 0 where it has none."""
    table = dict(module.named_buffers(recurse=False)).get("bias")
    if table is None or table.dtype != torch.bool or table.dim() != 4:
        return 0
    if table.shape[-1] != table.shape[-2] or bool(table[..., -1, 0].all()):
        return 0
    return int(table[0, 0, -1].sum())


def _scales_queries(module: Any) -> bool:
    tuned = getattr(module, "attn_temperature_tuning", False)
    return bool(tuned) and not getattr(module, "use_rope", True) and hasattr(module, "q_proj")


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """In this block, an attribute of an object has another value."""
    own = owner.__dict__
    before, had = own.get(name), name in own
    own[name] = value
    try:
        yield
    finally:
        if had:
            own[name] = before
        else:
            del own[name]
