"""The source of each row of logits of one step, by the shared rules, computed on the device."""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from baco.backends.vllm.table import RequestTable
from baco.engine.draft import Positions
from baco.engine.verify import resolve_sources
from baco.routing.combiners import BASE, Combination
from baco.routing.router import Router
from baco.routing.signals import Allowed, Signals
from baco.routing.word_boundaries import NO_TOKEN, BoundaryState, Switch, mask_logits
from baco.sampling.noise import ROUTER, coin, noise_keys
from baco.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class RoutingTables:
    """The vocabulary tables that rows are routed by, on the device.

    Attributes:
        vocabulary: word starts, word ends, roles.
        banned: tokens that are never drawn from the base model, bool [V].
        unknown: ids that the base model does not have, bool [V].
        ends: the end tokens of both models.
    """

    vocabulary: Vocabulary
    banned: Tensor
    unknown: Tensor
    ends: tuple[int, ...]


@dataclass
class Rows:
    """The rows of logits of one step: N requests and R rows, those of a request adjacent.

    Attributes:
        tables: what they are routed by.
        requests: what the worker knows of them.
        slot: of each request in the table, int64 [N].
        rules, rule: the distinct routers, and the index of each request's router, int64 [N].
        layout: the number of rows of each request.
        heads: each request's first row, int64 [N].
        token, position: the token before each row and its position, int64 [R].
        settled: requests whose next token is known already, bool [N]: the draw is discarded.
        structured: whether a request has a structure. Then the rows are held until the masks are
            known, and routed by `route_held`.
        source: of each row once routed, int64 [R]: ``BASE``, ``ALIGNED`` or ``MIXED``.
        held: both models' raw rows, until they are routed.
    """

    tables: RoutingTables
    requests: RequestTable
    slot: Tensor
    rules: list[tuple[Router, Switch]]
    rule: Tensor
    layout: Positions
    heads: Tensor
    token: Tensor
    position: Tensor
    settled: Tensor
    structured: bool = False
    source: Tensor | None = field(default=None)
    held: tuple[Tensor, Tensor] | None = field(default=None)

    def of(self, base: Tensor, aligned: Tensor) -> Tensor:
        """The rows to draw from, float32 [R, V], from both models' raw rows. Where they are held,
        rows of that shape.
        """
        if not self.structured:
            return self.route(base, aligned)
        self.held = (base, aligned)
        return aligned

    def route_held(self, allowed: Allowed | None) -> Tensor:
        """The rows to draw from, of held ones."""
        assert self.held is not None
        (base, aligned), self.held = self.held, None
        return self.route(base, aligned, allowed)

    def route(self, base: Tensor, aligned: Tensor, allowed: Allowed | None = None) -> Tensor:
        """The rows to draw from, float32 [R, V], from both models' raw rows. Notes the sources.

        Args:
            base, aligned: the raw rows.
            allowed: what the structures of the answers allow; None where anything goes.
        """
        requests, layout = self.requests, self.layout
        base = base.masked_fill_(self.tables.unknown, -torch.inf)
        # NaN where either row is damaged, else 0: a token drawn there has no log-probability.
        damage = base.amax(dim=-1) * 0 + aligned.amax(dim=-1) * 0
        slot = self.slot[layout.row]
        first = self.position == requests.prompt[slot] - 1
        previous = torch.where(first, NO_TOKEN, self.token)
        coins = partial(self._toss, slot)
        signals = Signals(base, aligned, self.tables.vocabulary, coins, allowed=allowed)
        rule = self.rule[layout.row] if len(self.rules) > 1 else None
        boundary_state = BoundaryState.of(signals, previous, self.rules, rule)
        active = requests.previous_source[self.slot, self.position[self.heads]]
        _, source, masked = resolve_sources(layout, boundary_state, active)
        left = mask_logits(signals, source, masked, self.tables.banned)
        self.source = source.long()
        self._combine(signals, left)
        if allowed is not None:
            left = allowed.mask(left)
        self._remember(slot, self.source == BASE)
        return left.add_(damage[:, None])

    def _combine(self, signals: Signals, logits: Tensor) -> None:
        """Put the rows that combiners make, and their sources, into the place of routed ones."""
        assert self.source is not None
        rule = self.rule[self.layout.row]
        for number, (router, _) in enumerate(self.rules):
            if isinstance(router, Combination):
                index = (rule == number).nonzero()[:, 0]
                rows = router.next_rows(signals, index, self.tables.banned, self.tables.ends)
                logits[index], self.source[index] = rows.logits, rows.source

    def _remember(self, slot: Tensor, source: Tensor) -> None:
        at = (slot, self.position + 1)
        known = self.settled[self.layout.row]
        previous = self.requests.previous_source
        previous[at] = torch.where(known, previous[at], source)

    def _toss(self, slot: Tensor) -> Tensor:
        seed, sample = self.requests.identity[slot].unbind(1)
        keys = noise_keys(seed, sample, self.position + 1 - self.requests.prompt[slot])
        return coin(keys, ROUTER)
