"""Ends answers in `transformers`' loops where the base model opens its next turn.

This module finds the opening in the text; `baco.text.answer_text.AnswerText` decides whether it
ends the answer.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from baco.text.answer_text import AnswerText

# The last tokens of an answer that are searched at each step: more than an opening has, plus those
# that one step of assisted decoding adds.
_TAIL = 64


class NextTurn(StoppingCriteria):
    """Stops rows at an opening whose first character the base model wrote.

    Args:
        model: the `BacoForCausalLM` that routes the tokens.
        opening: of the base model's turns, such as ``Question:``.
        prompts: the input of ``generate``, int64 [B, T].
        mask: 0 for padding, [B, T].
        routing: further arguments of the model's ``forward``, for decoding without a cache.
        cache: the model's, which has the sources; None without one.
    """

    def __init__(
        self,
        model: Any,
        opening: str,
        prompts: Tensor,
        mask: Tensor,
        routing: dict[str, Any],
        cache: Any,
    ) -> None:
        self._model, self._opening = model, opening
        self._prompts, self._mask, self._routing, self._cache = prompts, mask, routing, cache

    def __call__(self, input_ids: Tensor, scores: Any, **unused: Any) -> Tensor:  # noqa: ARG002
        """Which rows of ``input_ids`` [B × k, T + answer] end here; each prompt has k rows."""
        width = self._prompts.shape[1]
        tails = input_ids[:, max(width, input_ids.shape[1] - _TAIL) :].tolist()
        texts = self._model.pair.tokenizer.batch_decode(tails, skip_special_tokens=True)
        ends = torch.zeros(len(texts), dtype=torch.bool, device=input_ids.device)
        rows = [row for row, text in enumerate(texts) if self._opening in text]
        if rows:
            by_base = self._by_base(input_ids, rows)
            for row, is_base in zip(rows, by_base, strict=True):
                begun = self._begun[row * len(self._prompts) // len(texts)]
                ends[row] = begun is not None and self._ends(begun, input_ids[row], is_base)
        return ends

    def _ends(self, begun: Sequence[int], ids: Tensor, by_base: list[bool]) -> bool:
        answer = AnswerText(self._model.pair.tokenizer, opening=self._opening)
        for token in begun:
            answer.push(token, "aligned")
        return any(
            answer.push(token, "base" if is_base else "aligned")[1]
            for token, is_base in zip(ids[self._prompts.shape[1] :].tolist(), by_base, strict=True)
        )

    @cached_property
    def _begun(self) -> list[Sequence[int] | None]:
        """The part of the answer in each prompt; None for raw text, which has no turns."""
        rows = [
            ids[kept.bool()].tolist() for ids, kept in zip(self._prompts, self._mask, strict=True)
        ]
        assert self._model.reader is not None
        prompts = self._model.reader.read(rows)
        return [
            None if prompt is None else row[prompt.start :]
            for row, prompt in zip(rows, prompts, strict=True)
        ]

    def _by_base(self, input_ids: Tensor, rows: list[int]) -> list[list[bool]]:
        """For each token of these rows' answers, whether the base model wrote it."""
        if self._cache is None:
            # All rows are run, since a random router's coins depend on the row.
            times = len(input_ids) // len(self._prompts)
            mask = torch.ones_like(input_ids)
            mask[:, : self._mask.shape[1]] = self._mask.repeat_interleave(times, dim=0)
            source = self._model.sources(input_ids, mask, **self._routing)[rows, :-1]
        else:
            source = torch.stack([self._cache.sources_of(input_ids[row, :-1], row) for row in rows])
        answers: list[list[bool]] = source[:, self._prompts.shape[1] - 1 :].tolist()
        return answers
