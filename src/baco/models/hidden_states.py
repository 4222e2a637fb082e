"""The last hidden states of a model, returned behind its logits.

They are what the model's head reads: the output of the last layer, normed. Every forward of a model
calls its head, whatever reads the rows, so all of them return hidden states in one way.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class HeadWithHiddenStates:
    """The forward of a head that returns its logits [..., V] followed by what it read [..., D].

    What a model does to its logits (a divisor, a soft cap) it then does to both.

    Attributes:
        vocabulary, width: V and D; 0 before the first call.
    """

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self.forward = forward
        self.vocabulary = self.width = 0

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logits = self.forward(hidden_states, *args, **kwargs)
        self.vocabulary, self.width = logits.shape[-1], hidden_states.shape[-1]
        return torch.cat((logits, hidden_states.to(logits.device)), dim=-1)
