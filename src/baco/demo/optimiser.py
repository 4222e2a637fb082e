"""Muon for stacks of matrices, AdamW for the rest, one linear-decay schedule for both.

Muon: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". The one in
torch iterates in bfloat16, matrix by matrix, which is slow on a CPU without bfloat16; this
one works in float32 on whole stacks.
"""

import torch
from torch import Tensor

from baco.demo.model import TinyLlama

# Coefficients of the quintic iteration that drives all singular values towards one.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(stack: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly, of a stack [N, rows, columns]."""
    a, b, c = NEWTON_SCHULZ
    tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if tall else stack
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimiser:
    """Steps a `TinyLlama`; `rate` is Muon's peak learning rate, `fine` AdamW's.

    The rates rise over the first `warmup` of `steps` and fall linearly to a tenth.
    """

    def __init__(
        self, model: TinyLlama, steps: int, rate: float, fine: float, warmup: float = 0.03
    ) -> None:
        self.steps = steps
        self.warmup = max(1, round(warmup * steps))
        self.rate = rate
        shape = model.shape
        self.stacks = [  # every matrix of the stack is orthogonalised by itself
            (model.qkv, shape.hidden),
            (model.out, shape.hidden),
            (model.gate_up, shape.inner),
            (model.down, shape.hidden),
        ]
        self.momenta = [torch.zeros_like(p) for p, _ in self.stacks]
        matrices = {id(p) for p in model.matrices()}
        rest = [p for p in model.parameters() if id(p) not in matrices]
        self.adam = torch.optim.AdamW(
            rest, lr=fine, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.fine = fine
        self.done = 0

    def step(self) -> None:
        """Apply the gradients, then drop them."""
        progress = self.done / self.steps
        slope = min(1.0, (self.done + 1) / self.warmup) * (1.0 - 0.9 * progress)
        for group in self.adam.param_groups:
            group["lr"] = self.fine * slope
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            for (parameter, rows), momentum in zip(self.stacks, self.momenta, strict=True):
                gradient = parameter.grad
                if gradient is None:
                    continue
                momentum.lerp_(gradient, 0.05)
                nesterov = gradient.lerp(momentum, 0.95)
                columns = parameter.shape[-1]
                update = orthogonalise(nesterov.reshape(-1, rows, columns))
                scale = max(1.0, rows / columns) ** 0.5
                parameter.mul_(1.0 - 0.01 * self.rate * slope)
                parameter.add_(update.reshape(parameter.shape), alpha=-self.rate * slope * scale)
                parameter.grad = None
        self.done += 1
