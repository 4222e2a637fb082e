"""What recurrent layers of ``transformers`` compute, with fewer passes over memory on a CPU.

Without its kernels for GPUs, ``transformers`` makes several tensors of the size of the states at
every token, and pads a short text to a chunk of some hundred tokens.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baco.models.forward.own_positions import replaced

# The function of a Python module that updates Mamba 2's states by one token.
_MAMBA_2 = "mamba2_selective_state_update"
# Tokens of a chunk in a scan. The scan's time and memory grow with the square of a chunk's length,
# and any length gives the same sums.
_CHUNK = 16
# Bytes of states up to which all rows are updated at once. Beyond, one group of heads of a row
# after the other is read and written while it is in a processor's own cache.
_SMALL = 2**19


@contextmanager
def fewer_passes(modules: Sequence[nn.Module]) -> Iterator[None]:
    """In this block, recurrent modules on a CPU compute their states as this module does."""
    with ExitStack() as stack:
        codes = {
            type(module).__module__: sys.modules[type(module).__module__] for module in modules
        }
        for code in codes.values():
            original = getattr(code, _MAMBA_2, None)
            if original is not None:
                stack.enter_context(replaced(code, _MAMBA_2, _mamba_2(original)))
        for module in modules:
            chunk = getattr(module, "chunk_size", None)
            if isinstance(chunk, int) and chunk > _CHUNK:
                stack.enter_context(replaced(module, "chunk_size", _CHUNK))
        yield


def _mamba_2(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The update of Mamba 2's states by one token; ``original`` where arguments are of other forms.

    Each head has one decay and one time step, which ``transformers`` expands to all numbers of a
    state.
    """

    def update(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,  # noqa: N803
        B: Tensor,  # noqa: N803
        C: Tensor,  # noqa: N803
        D: Tensor | None = None,  # noqa: N803
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        expanded = A.dim() == dt.dim() == 3 and A.stride()[1:] == (0, 0) and dt.stride(2) == 0
        if dt_bias is not None:
            expanded = expanded and dt_bias.dim() == 2 and dt_bias.stride(1) == 0
        if not expanded or state.dtype != torch.float32 or not state.is_contiguous():
            return original(state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z, **kwargs)
        step = dt[..., 0]  # [B, heads]
        if dt_bias is not None:
            step = step + dt_bias[:, 0].to(step.dtype)
        if dt_softplus:
            step = F.softplus(step)
        decay = torch.exp(step.float() * A[:, 0, 0].float())
        scaled = step.float()[..., None] * hidden_states.float()
        # Heads of a group share B and C.
        parts, (width, size) = B.shape[0] * B.shape[1], state.shape[2:]
        blocks = state.view(parts, -1, width, size)
        decay, scaled = decay.view(parts, -1, 1, 1), scaled.view(parts, -1, width, 1)
        inputs = B.float().reshape(parts, 1, 1, size)
        outputs = C.float().reshape(parts, size, 1)
        if state.nbytes <= _SMALL:
            blocks.mul_(decay).addcmul_(scaled, inputs)
            output = torch.bmm(blocks.view(parts, -1, size), outputs)
        else:
            output = torch.empty(parts, scaled.numel() // parts, 1)
            for numbers, factor, x, b, c, y in zip(
                blocks, decay, scaled, inputs, outputs[..., 0], output[..., 0], strict=True
            ):
                numbers.mul_(factor).addcmul_(x, b)
                torch.mv(numbers.view(-1, size), c, out=y)
        output = output.view_as(hidden_states)
        if D is not None:
            output = output + hidden_states * D
        if z is not None:
            output = output * F.silu(z)
        return output.to(hidden_states.dtype)

    return update
