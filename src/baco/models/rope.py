"""Rotary embeddings whose factors depend on the length of a text: LongRoPE (Ding et al. 2024).

Such a model reads a text of up to its original length with short factors, and a longer text with
long factors from its first token on. `transformers` picks the factors for a whole batch by its
largest position; here every row gets the factors of its own length.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from baco.errors import BacoError
from baco.models.context import text_config

_KINDS = ("longrope", "su")  # the second is its name in older checkpoints


@dataclass(frozen=True, slots=True)
class LongRope:
    """The rotary embeddings of one model that have short and long factors.

    Attributes:
        original_length: a text of more tokens is read with the long factors.
        modules: the embeddings, called as ``module(x, position_ids) → (cos, sin)``; empty where
            their factors cannot be chosen row by row.
    """

    original_length: int
    modules: tuple[nn.Module, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """Those of a model; None where no factors depend on the length of a text."""
        lengths = set(_lengths(getattr(model, "config", None)))
        if not lengths:
            return None
        # The factors of layers that change at different lengths, and of custom code, cannot be
        # chosen.
        modules = [module for module in model.modules() if _has_long_factors(module)]
        return cls(min(lengths), tuple(modules) if len(lengths) == 1 else ())

    def is_long(self, length: int) -> bool:
        """Is a text of this many tokens read with the long factors?"""
        return length > self.original_length

    @contextmanager
    def per_row(self, long: Sequence[bool]) -> Iterator[None]:
        """In this block, row r of a batch is read with the long factors where ``long[r]`` is true,
        and with the short ones elsewhere, whatever the positions [B, T] of its tokens are.

        Raises:
            BacoError: some rows are long, others are not, and the model has one set of factors for
                a whole batch.
        """
        if not self.modules and any(long) and not all(long):
            raise BacoError(
                f"texts of more than {self.original_length} tokens need rotary factors of their "
                "own, and this model's code takes one set for a whole batch: give it the longer "
                "and the shorter prompts apart"
            )
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(self._chosen(module, long))
            yield

    @contextmanager
    def _chosen(self, module: nn.Module, long: Sequence[bool]) -> Iterator[None]:
        wrapped = module.__dict__.get("forward")  # set where another library replaced it
        forward = module.forward

        def short_factors(x: Tensor, positions: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
            # Positions beyond are padding.
            cos, sin = forward(x, positions.clamp(max=self.original_length - 1), **more)
            return cos, sin

        def long_factors(x: Tensor, positions: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
            beyond = torch.full_like(positions[:, :1], self.original_length)
            cos, sin = forward(x, torch.cat((positions, beyond), dim=1), **more)
            return cos[:, :-1], sin[:, :-1]

        def by_row(x: Tensor, position_ids: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
            if all(long):
                return long_factors(x, position_ids, **more)
            cos, sin = short_factors(x, position_ids, **more)
            if any(long):
                rows = torch.tensor(long, device=cos.device).nonzero()[:, 0]
                cos[rows], sin[rows] = long_factors(x, position_ids[rows], **more)
            return cos, sin

        module.forward = by_row
        try:
            yield
        finally:
            if wrapped is None:
                del module.forward
            else:
                module.forward = wrapped


def _has_long_factors(module: Any) -> bool:
    """Is it a rotary embedding of `transformers` with long factors?"""
    kinds = getattr(module, "rope_type", None)  # a dict where kinds of layers differ
    return any(kind in _KINDS for kind in (kinds.values() if isinstance(kinds, dict) else [kinds]))


def _lengths(config: Any) -> Iterator[int]:
    """The original lengths in a configuration, one per kind of layer with long factors."""
    if config is None:
        return
    text = text_config(config)
    ropes = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [rope for rope in ropes.values() if isinstance(rope, Mapping)]
    for rope in nested or [ropes]:
        if rope.get("rope_type", rope.get("type")) in _KINDS:
            length = rope.get("original_max_position_embeddings")
            yield int(length or text.original_max_position_embeddings)
