"""Whole words: at which positions the router is asked, and what the model it names may say.

Pure functions on tensors, shared by every backend. :func:`select` decides one position of every
row. Its three parts stand alone for who knows more positions than one: what can be said of a
position before it is known which half spoke last (:class:`BoundaryState`), the source that follows
from that (:func:`resolve_source`), and the row of logits that is left (:func:`mask_logits`).
Drawing a token from that row is another matter.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from baco.routing.router import Router
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
    """Pick the source of the next token of every row, and the row of logits it is drawn from.

    A position is a boundary if it is the first, if the previous token ended a word, or if the
    active source's most likely next token is a word start. At a boundary the router is asked;
    elsewhere the active source goes on. Where the router names the other source in the middle of
    unfinished text, that source may say only word starts, so that every word has one source.

    Args:
        logits_base, logits_aligned: raw logits on the common vocabulary, float [B, V]. For a router
            that only ever names one model, the other row may be the same tensor: it is not read.
        previous: the answer's last token, int64 [B]; NOTHING at the first position.
        active: which model spoke it, bool [B], True for the base; not read at the first position.
        router: asked for all rows at once.
        vocabulary: word starts and word ends, on the logits' device.
        banned: bool [V], the tokens the base model may never say (special ones but end of text).
        coin: uniforms in (0, 1), float [B], for routers that toss one.
        switch: ``token`` turns boundaries off: the router is asked at every token.

    Returns:
        (logits [B, V], source bool [B]): -inf stands where the source may not speak.
    """
    signals = Signals(logits_base, logits_aligned, vocabulary, coin)
    boundary_state = BoundaryState.of(signals, previous, [(router, switch)])
    source, masked = resolve_source(boundary_state, active)
    return mask_logits(logits_base, logits_aligned, source, masked, vocabulary, banned), source


@dataclass(frozen=True, slots=True)
class BoundaryState:
    """Positions [...] as they stand, whichever half spoke last.

    Attributes:
        wanted: the router names the base, bool.
        loose: the source may change here whatever the halves predict, and to any token: the first
            position, the end of a word, or no boundaries at all; bool.
        begins_base, begins_aligned: that half's most likely next token is a word start, bool.
    """

    wanted: Tensor
    free: Tensor
    begins_base: Tensor
    begins_aligned: Tensor

    @classmethod
    def of(
        cls,
        signals: Signals,
        previous: Tensor,
        rules: Sequence[tuple[Router, Switch]],
        rule: Tensor | None = None,
        *,
        ask: bool = True,
    ) -> "BoundaryState":
        """Ask the routers about N positions at once.

        Args:
            signals: both halves' rows, [N, V].
            previous: the token before each position, int64 [N]; NOTHING before the first.
            rules: the routers that are asked, each once for all rows, and where they may switch.
            rule: which of them is asked at each position, int64 [N]; None where there is but one.
            ask: without it nobody is asked, and ``wanted`` says nothing.
        """
        vocabulary = signals.vocabulary
        free = (previous == NO_TOKEN) | vocabulary.ends_word[previous.clamp_min(0)]
        wanted = torch.zeros_like(free)
        unbound = free
        for index, (router, switch) in enumerate(rules):
            mine = None if rule is None else rule == index
            if ask:
                says = router(signals)
                wanted = says if mine is None else says.where(mine, wanted)
            if router.only is not None or switch == "token":
                unbound = torch.ones_like(free) if mine is None else unbound | mine
        if all(router.only is not None or switch == "token" for router, switch in rules):
            begins_base = begins_aligned = unbound
        else:
            begins_base = vocabulary.word_start[signals.top_base]
            begins_aligned = vocabulary.word_start[signals.top_aligned]
        return cls(wanted, unbound, begins_base, begins_aligned)

    def boundary(self, active: Tensor) -> Tensor:
        """Is the router asked, where ``active`` spoke last? → bool [...]."""
        return self.free | torch.where(active, self.begins_base, self.begins_aligned)

    def map(self, change: Callable[[Tensor], Tensor]) -> "BoundaryState":
        """The same change made to every column: another shape, or some of the positions."""
        columns = (self.wanted, self.free, self.begins_base, self.begins_aligned)
        return BoundaryState(*(change(column) for column in columns))


def resolve_source(boundary_state: BoundaryState, active: Tensor) -> tuple[Tensor, Tensor]:
    """The source of every position, where ``active`` (bool, True for the base) spoke last.

    Returns:
        (source, masked), both bool: a masked source may say only word starts.
    """
    source = torch.where(boundary_state.boundary(active), boundary_state.wanted, active)
    return source, (source != active) & ~boundary_state.free


def mask_logits(
    logits_base: Tensor,
    logits_aligned: Tensor,
    source: Tensor,
    masked: Tensor,
    vocabulary: Vocabulary,
    banned: Tensor | None = None,
) -> Tensor:
    """The rows of logits [N, V] that tokens are drawn from, -inf where the source may not speak."""
    if source.device.type == "cpu":
        # Which rows it is about is known without waiting: the others are spared the look.
        of_base, bound = source.nonzero()[:, 0], masked.nonzero()[:, 0]
        logits = logits_aligned.clone()
        if len(of_base):
            own = logits_base[of_base]
            logits[of_base] = own if banned is None else own.masked_fill_(banned, -math.inf)
        if len(bound):
            logits[bound] = logits[bound].masked_fill_(~vocabulary.word_start, -math.inf)
        return logits
    logits = torch.where(source[:, None], logits_base, logits_aligned)
    if banned is not None:
        logits = logits.masked_fill_(source[:, None] & banned, -math.inf)
    return logits.masked_fill_(masked[:, None] & ~vocabulary.word_start, -math.inf)
