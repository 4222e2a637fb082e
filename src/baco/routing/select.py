"""Whole words: at which positions the router is asked, and what the model it names may say.

One pure function on tensors, shared by every backend. Drawing a token from the row it returns is
another matter.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from baco.routing.routers import Router
from baco.routing.signals import Signals
from baco.vocabulary import Vocabulary

Switch = Literal["word", "token"]
# ``previous`` at the first position of an answer.
NOTHING = -1


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
    wanted = router(signals)
    if router.only is not None or switch == "token":
        source = wanted
        masked = torch.zeros_like(source)
    else:
        ended = (previous == NOTHING) | vocabulary.ends_word[previous.clamp_min(0)]
        own = torch.where(active, signals.top_base, signals.top_aligned)
        boundary = ended | vocabulary.word_start[own]
        source = torch.where(boundary, wanted, active)
        masked = (source != active) & ~ended
    logits = torch.where(source[:, None], logits_base, logits_aligned)
    silent = masked[:, None] & ~vocabulary.word_start
    if banned is not None:
        silent = silent | (source[:, None] & banned)
    return logits.masked_fill(silent, -math.inf), source
