"""Which model speaks at the rows of logits of one step: the shared rules, asked on the device."""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from baco.backends.vllm.table import RequestTable
from baco.engine.draft import Positions
from baco.engine.verify import resolve_sources
from baco.routing.router import Router
from baco.routing.signals import Signals
from baco.routing.word_boundaries import NO_TOKEN, BoundaryState, Switch, mask_logits
from baco.sampling.noise import ROUTER, coin, noise_keys
from baco.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class RoutingTables:
    """What every row is routed by, on the device.

    Attributes:
        vocabulary: word starts, word ends, roles.
        banned: tokens the base may never say, bool [V].
        unknown: ids that the base half does not have, bool [V].
    """

    vocabulary: Vocabulary
    banned: Tensor
    unknown: Tensor


@dataclass
class Rows:
    """The rows of logits of one step, N requests and R rows, those of a request one after another.

    Attributes:
        law: what they are routed by.
        table: the requests.
        slot: of each request in the table, int64 [N].
        rules, rule: the routers, each once, and which each request goes by, int64 [N].
        layout: how many rows each request has.
        heads: each request's first row, int64 [N].
        token, position: the token before each row and where it stands, int64 [R].
        settled: requests whose next token is known already, bool [N]: what is drawn is thrown away.
        source: once routed, who speaks at each row, bool [R], True for the base.
    """

    law: RoutingTables
    table: RequestTable
    slot: Tensor
    rules: list[tuple[Router, Switch]]
    rule: Tensor
    layout: Positions
    heads: Tensor
    token: Tensor
    position: Tensor
    settled: Tensor
    source: Tensor | None = field(default=None)

    def route(self, base: Tensor, aligned: Tensor) -> Tensor:
        """The rows to draw from, float32 [R, V], by both halves' raw ones; remembers who spoke."""
        table, layout = self.table, self.layout
        base = base.masked_fill_(self.law.unknown, -torch.inf)
        # NaN where either row is damaged, else 0: whatever is drawn there has no log-probability.
        damage = base.amax(dim=-1) * 0 + aligned.amax(dim=-1) * 0
        slot = self.slot[layout.row]
        first = self.position == table.prompt[slot] - 1
        previous = torch.where(first, NO_TOKEN, self.token)
        signals = Signals(base, aligned, self.law.vocabulary, partial(self._toss, slot))
        rule = self.rule[layout.row] if len(self.rules) > 1 else None
        boundary_state = BoundaryState.of(signals, previous, self.rules, rule)
        active = table.previous_source[self.slot, self.position[self.heads]]
        _, source, masked = resolve_sources(layout, boundary_state, active)
        self._remember(slot, source)
        self.source = source
        left = mask_logits(signals, source, masked, self.law.banned)
        return left.add_(damage[:, None])

    def _remember(self, slot: Tensor, source: Tensor) -> None:
        at = (slot, self.position + 1)
        known = self.settled[self.layout.row]
        self.table.previous_source[at] = torch.where(known, self.table.previous_source[at], source)

    def _toss(self, slot: Tensor) -> Tensor:
        seed, sample = self.table.identity[slot].unbind(1)
        keys = noise_keys(seed, sample, self.position + 1 - self.table.prompt[slot])
        return coin(keys, ROUTER)
