"""A worker's requests as tables on the device: one slot per request."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from baco.backends.vllm.options import PairOptions
from baco.routing.router import Router
from baco.routing.word_boundaries import Switch
from baco.sampling.params import MAX_SEED
from baco.sampling.seeds import noise_seed
from baco.source import MODELS, Source
from baco.text.prompts import ids_digest


@dataclass(frozen=True, slots=True)
class _Place:
    """The slot of a request, and what the host needs to know of it."""

    slot: int
    offsets: dict[Source, int]
    rule: tuple[Router, Switch]


@dataclass
class RequestTable:
    """Every request from its first step to its last, preempted ones included.

    The model with the shorter prompt reads a request from ``offset`` on; its positions begin there.

    Attributes:
        width: tokens that a request may have, prompt and answer.
        device: of the tables.
        base_ids: the base model's prompts, int32 [S, width].
        base_length: how long they are, int64 [S].
        offset: tokens that each model does not read, int64 [S].
        prompt: tokens before the answer, int64 [S].
        previous_source: of the token at every position, bool [S, width + 1], True for the base.
        identity: the noise seed of the prompt and the sample, for coins, int64 [S, 2].
    """

    width: int
    device: Any
    base_ids: Tensor = field(init=False)
    base_length: Tensor = field(init=False)
    offset: dict[Source, Tensor] = field(init=False)
    prompt: Tensor = field(init=False)
    previous_source: Tensor = field(init=False)
    identity: Tensor = field(init=False)
    _places: dict[str, _Place] = field(default_factory=dict)
    _free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        def column(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(0, *shape, dtype=dtype, device=self.device)

        self.base_ids = column(self.width, dtype=torch.int32)
        self.base_length, self.prompt = column(), column()
        self.offset = {source: column() for source in MODELS}
        self.previous_source = column(self.width + 1, dtype=torch.bool)
        self.identity = column(2)

    def __contains__(self, request: str) -> bool:
        return request in self._places

    def add(
        self, request: str, prompt: list[int], options: PairOptions, seed: int | None = None
    ) -> None:
        """Add a request; ``prompt`` and ``seed`` are those that vLLM sees."""
        self.drop(request)
        if not self._free:
            self._grow()
        slot = self._free.pop()
        base = options.base_ids or tuple(prompt[options.fill :])
        offsets: dict[Source, int] = {"base": len(prompt) - len(base), "aligned": options.fill}
        self._places[request] = _Place(slot, offsets, (options.router, options.switch))
        ids = torch.tensor(base, dtype=torch.int32)
        self.base_ids[slot, : len(base)] = ids.to(self.device, non_blocking=True)
        self.base_length[slot] = len(base)
        self.prompt[slot] = len(prompt)
        # Before the first word the aligned model is active.
        self.previous_source[slot, len(prompt) - 1] = False
        for source, offset in offsets.items():
            self.offset[source][slot] = offset
        digest = options.digest or ids_digest(prompt[options.fill :])
        if options.seed is not None:
            seed = options.seed
        elif seed is None:  # every process that shares a model makes the same
            seed = int.from_bytes(hashlib.blake2b(request.encode(), digest_size=8).digest())
        coins = noise_seed(seed & MAX_SEED, digest)
        identity = torch.tensor([coins, options.sample])
        self.identity[slot] = identity.to(self.device, non_blocking=True)

    def drop(self, request: str) -> None:
        """Remove a request, if it is there."""
        place = self._places.pop(request, None)
        if place is not None:
            self._free.append(place.slot)

    def slots(self, requests: list[str]) -> list[int]:
        """The slots of some requests."""
        return [self._places[request].slot for request in requests]

    def offsets(self, requests: list[str], source: Source) -> list[int]:
        """The number of tokens of each request that a model skips."""
        return [self._places[request].offsets[source] for request in requests]

    def rules(self, requests: list[str]) -> tuple[list[tuple[Router, Switch]], list[int]]:
        """The distinct routers of some requests, and the index of each request's router."""
        of_requests = [self._places[request].rule for request in requests]
        rules = list(dict.fromkeys(of_requests))
        index = {rule: at for at, rule in enumerate(rules)}
        return rules, [index[rule] for rule in of_requests]

    def _grow(self) -> None:
        size, more = len(self.prompt), max(16, len(self.prompt))

        def longer(column: Tensor) -> Tensor:
            return torch.cat((column, column.new_zeros(more, *column.shape[1:])))

        self._change(longer)
        self._free += reversed(range(size, size + more))

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("base_ids", "base_length", "prompt", "previous_source", "identity"):
            setattr(self, name, change(getattr(self, name)))
        self.offset = {source: change(column) for source, column in self.offset.items()}
