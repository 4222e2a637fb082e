"""Words are whole: where the router decides, and which tokens the source may write there.

A position is a *boundary* if it is the first, if the previous token ended a word, or if the active
source's most likely next token is a word start. At a boundary the router decides. Elsewhere the
active source, the one that wrote the previous token, continues. Where the router picks the other
source and the previous token did not itself end a word, that source may write only word starts. So
every word has exactly one source.

Where the structure of an answer forces a token, the active source continues too, unless the router
keeps the structure for the aligned model. A position where a free text of the structure begins is a
boundary like the first of an answer. The most likely tokens are those that the structure allows, so
where the source may write only word starts, there is one that is allowed.

Everything here is a pure function on tensors and shared by every backend. :func:`select` does all
of it for one position per row. Drafts need its three parts: :class:`BoundaryState` (all that is
known of a position before its active source is), :func:`resolve_source` and :func:`mask_logits`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from baco.routing.router import Router, reads_structure
from baco.routing.signals import Signals
from baco.text.vocabulary import Vocabulary

Switch = Literal["word", "token"]
# ``previous`` at the first position of an answer.
NO_TOKEN = -1


def select(
    logits_base: Tensor,
    logits_aligned: Tensor,
    previous: Tensor,
    active: Tensor,
    *,
    router: Router,
    vocabulary: Vocabulary,
    banned: Tensor | None = None,
    coin: Tensor | None = None,
    switch: Switch = "word",
) -> tuple[Tensor, Tensor]:
    """Pick the source of the next token of every row, and the logits that it is drawn from.

    Args:
        logits_base, logits_aligned: raw logits on the common vocabulary, float [B, V]. For a router
            that only ever picks one model, pass that model's logits twice.
        previous: the answer's last token, int64 [B]; ``NO_TOKEN`` at the first position.
        active: the source of that token, bool [B], True for the base model. Its value at the first
            position does not matter.
        router: picks the source at boundaries.
        vocabulary: word starts and word ends, on the logits' device.
        banned: tokens that the base model may never write, bool [V]: special tokens other than end
            of text.
        coin: uniforms in (0, 1), float [B], for random routers.
        switch: ``token`` makes every position a boundary and masks nothing.

    Returns:
        The logits [B, V], -inf for tokens that the source may not write, and the source, bool [B].
    """
    signals = Signals(logits_base, logits_aligned, vocabulary, coin)
    state = BoundaryState.of(signals, previous, [(router, switch)])
    source, word_starts_only = resolve_source(state, active)
    logits = mask_logits(signals, source, word_starts_only, banned)
    return logits, source


@dataclass(frozen=True, slots=True)
class BoundaryState:
    """What is known of positions, each of shape [...], whichever model is active there.

    Attributes:
        router_choice: the router's source, bool, True for the base model.
        free: a boundary where nothing is masked: the first position, the end of a word, or any
            position of a router without word boundaries; bool.
        base_starts_word, aligned_starts_word: whether that model's most likely next token is a
            word start, bool.
    """

    router_choice: Tensor
    free: Tensor
    base_starts_word: Tensor
    aligned_starts_word: Tensor

    @classmethod
    def of(
        cls,
        signals: Signals,
        previous: Tensor,
        routers: Sequence[tuple[Router, Switch]],
        index: Tensor | None = None,
        *,
        route: bool = True,
    ) -> "BoundaryState":
        """The state of N positions.

        Args:
            signals: both models' distributions there.
            previous: the token before each position, int64 [N]; ``NO_TOKEN`` before the first.
            routers: the routers, and where each may switch the source. Each runs once for all rows.
            index: which of them each position uses, int64 [N]; None where there is only one.
            route: run the routers; without, ``router_choice`` has no meaning.
        """
        vocabulary = signals.vocabulary
        free = (previous == NO_TOKEN) | vocabulary.ends_word[previous.clamp_min(0)]
        forced = None if signals.allowed is None else signals.allowed.forced.clone()
        choice = torch.zeros_like(free)
        for number, (router, _) in enumerate(routers):
            if forced is not None and reads_structure(router):
                forced &= torch.zeros_like(forced) if index is None else index != number
        if signals.allowed is not None and forced is not None:
            free = (free | signals.allowed.begins | signals.allowed.forced) & ~forced
        for number, (router, switch) in enumerate(routers):
            uses = None if index is None else index == number
            if route:
                picks = router(signals)
                choice = picks if uses is None else torch.where(uses, picks, choice)
            if not _has_boundaries(router, switch):
                is_open = torch.ones_like(free)
                if forced is not None and router.only is None:
                    is_open = ~forced
                free = is_open if uses is None else torch.where(uses, is_open, free)
        if any(_has_boundaries(router, switch) for router, switch in routers):
            base_starts_word = vocabulary.word_start[signals.top_base]
            aligned_starts_word = vocabulary.word_start[signals.top_aligned]
            if forced is not None:
                base_starts_word, aligned_starts_word = (
                    base_starts_word & ~forced,
                    aligned_starts_word & ~forced,
                )
        else:
            base_starts_word = aligned_starts_word = free
        return cls(choice, free, base_starts_word, aligned_starts_word)

    def is_boundary(self, active: Tensor) -> Tensor:
        """Whether the router decides, given the active source: bool [...] → bool [...]."""
        return self.free | torch.where(active, self.base_starts_word, self.aligned_starts_word)

    def map(self, change: Callable[[Tensor], Tensor]) -> "BoundaryState":
        """Apply one change to every attribute: another shape, or some of the positions."""
        attributes = (
            self.router_choice,
            self.free,
            self.base_starts_word,
            self.aligned_starts_word,
        )
        return BoundaryState(*map(change, attributes))


def _has_boundaries(router: Router, switch: Switch) -> bool:
    # A router that only ever picks one model has nothing to keep whole.
    return switch == "word" and router.only is None


def resolve_source(state: BoundaryState, active: Tensor) -> tuple[Tensor, Tensor]:
    """The source of every position, given the active one (bool [...], True for the base model).

    Returns:
        The source, and whether it may write only word starts there; both bool [...].
    """
    source = torch.where(state.is_boundary(active), state.router_choice, active)
    return source, (source != active) & ~state.free


def mask_logits(
    signals: Signals,
    source: Tensor,
    word_starts_only: Tensor,
    banned: Tensor | None = None,
) -> Tensor:
    """The source's logits [N, V], a copy, with -inf for tokens that it may not write."""
    word_start = signals.vocabulary.word_start
    if source.device.type == "cpu":
        # Which rows need a mask is known at once here: do not touch the others.
        base_rows, masked_rows = source.nonzero()[:, 0], word_starts_only.nonzero()[:, 0]
        logits = signals.aligned.clone()
        if len(base_rows):
            base = signals.base[base_rows]
            logits[base_rows] = base if banned is None else base.masked_fill_(banned, -math.inf)
        if len(masked_rows):
            logits[masked_rows] = logits[masked_rows].masked_fill_(~word_start, -math.inf)
        return logits
    logits = torch.where(source[:, None], signals.base, signals.aligned)
    if banned is not None:
        logits = logits.masked_fill_(source[:, None] & banned, -math.inf)
    return logits.masked_fill_(word_starts_only[:, None] & ~word_start, -math.inf)
