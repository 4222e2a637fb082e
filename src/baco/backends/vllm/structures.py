"""Structured answers in vLLM: the scheduler's side computes masks by the automata of every backend,
the worker's side reads them.

A row of vLLM's bitmask has one more word here: the position's :class:`Place`, and whether its token
is forced. Where vLLM fills a row with -1, everything is allowed, in free text, and nothing forced.
Rows are routed after the masks have arrived, so routers and word boundaries see what is allowed;
vLLM's own libraries would compute other masks (of other white space, and without forced tokens) and
apply them to rows that are routed already.
"""

import logging
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.structured_output.backend_types import (
    StructuredOutputBackend,
    StructuredOutputGrammar,
)

from baco.backends.vllm.folder import read_pair
from baco.backends.vllm.options import PairOptions, structure_named
from baco.errors import BacoError
from baco.models.pair import Pair
from baco.routing.signals import Allowed
from baco.sampling.constraint import Automaton, Place, unpack

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

log = logging.getLogger("baco")

_WORD = 32  # tokens of a word of a mask
_FORCED = 4  # added to the place of a forced token


def use_automata(manager: "StructuredOutputManager", vllm_config: "VllmConfig") -> None:
    """Replace the library with which vLLM's manager compiles structures."""
    backend = _Structures(vllm_config)
    manager.backend = backend
    manager._create_grammar = backend.grammar_of


class _Structures(StructuredOutputBackend):
    """The pair's compiler, as vLLM calls it."""

    def __init__(self, vllm_config: "VllmConfig") -> None:
        self._model = vllm_config.model_config

    @cached_property
    def _pair(self) -> Pair:
        return read_pair(Path(self._model.model), self._model.trust_remote_code)

    def grammar_of(self, request: "Request") -> "_Grammar":
        """Compile the structure of a request; an error ends that request alone.

        Raises:
            BacoError: the structure cannot be used.
        """
        params = request.sampling_params
        structure = structure_named(params.structured_outputs)
        space = PairOptions.read(params.extra_args).joining_space
        assert structure is not None
        try:
            constraint = self._pair.structures.compile(structure, joining_space=space)
        except BacoError as error:
            log.error("request %s: %s", request.request_id, error)
            raise
        return _Grammar(constraint.begin(), self._pair.end_ids)

    def compile_grammar(self, *args: Any, **kwargs: Any) -> StructuredOutputGrammar:
        raise NotImplementedError  # `grammar_of` takes its place

    def allocate_token_bitmask(self, max_num_seqs: int) -> Tensor:
        words = -(-self._pair.vocabulary.size // _WORD)
        return torch.full((max_num_seqs, words + 1), -1, dtype=torch.int32)

    def destroy(self) -> None:
        pass


class _Grammar(StructuredOutputGrammar):
    """The automaton of one request, as vLLM calls it."""

    def __init__(self, automaton: Automaton, ends: frozenset[int]) -> None:
        self._automaton, self._ends = automaton, ends
        self._answer: list[int] = []
        self._error: str | None = None

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        if self._error is not None:
            log.error("request %s: %s", request_id, self._error)
            return False
        accepted = len(self.validate_tokens(tokens)) == len(tokens)
        if accepted:
            self._answer += tokens
        return accepted

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        if self.is_terminated():
            return []
        try:
            masks = self._automaton.masks(self._answer, tokens)
        except BacoError as error:
            self._error = str(error)
            return []
        for count, (token, mask) in enumerate(zip(tokens, masks, strict=False)):
            if token < 0 or not int(mask[token // _WORD]) >> token % _WORD & 1:
                return tokens[:count]
            if token in self._ends:
                return tokens[: count + 1]
        return tokens

    def rollback(self, num_tokens: int) -> None:
        del self._answer[len(self._answer) - num_tokens :]

    def fill_bitmask(self, bitmask: Tensor, batch_index: int) -> None:
        try:
            [mask], [place] = self._automaton.follow(self._answer, ())
        except BacoError as error:  # the request ends when its next token is refused
            self._error = str(error)
            bitmask[batch_index] = -1
            return
        bitmask[batch_index, :-1] = torch.from_numpy(mask)
        bitmask[batch_index, -1] = place + _FORCED * self._automaton.is_forced(mask)

    def is_terminated(self) -> bool:
        return bool(self._answer) and self._answer[-1] in self._ends

    def reset(self) -> None:
        self._answer.clear()


def allowed_at(
    grammar: "GrammarOutput | None",
    step: "SchedulerOutput",
    requests: list[str],
    size: int,
    device: torch.device,
) -> Allowed | None:
    """What the structures of a step's requests allow at its rows; None where no row has one.

    Args:
        grammar: the masks, those of a request adjacent.
        step: says how many rows each request has.
        requests: in the order of their rows.
        size: of the vocabulary.
        device: of the result.
    """
    if grammar is None:
        return None
    drafts = step.scheduled_spec_decode_tokens
    masks, first = {}, 0
    for request in grammar.structured_output_request_ids:
        last = first + 1 + len(drafts.get(request, ()))
        masks[request], first = grammar.grammar_bitmask[first:last], last
    at, rows = list[int](), 0
    for request in requests:
        count = 1 + len(drafts.get(request, ()))
        if request in masks:
            at += range(rows, rows + count)
        rows += count
    if not at:
        return None
    words = np.concatenate([masks[request] for request in requests if request in masks])
    packed = torch.from_numpy(words).to(device)
    index = torch.tensor(at, device=device)
    tokens, known = unpack(packed[:, :-1].contiguous(), size), packed[:, -1]

    def of_rows(structured: Tensor, other: bool) -> Tensor:
        whole = torch.full((rows,), other, device=device)
        whole[index] = structured
        return whole

    place = known % _FORCED
    return Allowed(
        index,
        tokens,
        of_rows(known >= _FORCED, False),
        of_rows(place != Place.STRUCTURE, True),
        of_rows(place == Place.BEGINNING, False),
        _ends_text,
    )


def _ends_text(position: int, token: int) -> bool:
    raise NotImplementedError  # routers that read it are refused with the request
