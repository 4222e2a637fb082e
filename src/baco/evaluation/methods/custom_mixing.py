"""Decoding for methods that are neither routers nor combiners, such as a judge that reads the text.

Both models read every token, and the method chooses the row that the token is drawn from. Batches,
caches, draws and ends of answers are the engine's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from baco.decoder import Decoder
from baco.engine.engine import Engine
from baco.engine.verify import Choose
from baco.evaluation.records import Prompt
from baco.outputs import Completion, check_whole
from baco.routing.router import BOTH
from baco.routing.signals import Signals
from baco.source import Source

if TYPE_CHECKING:
    from baco.api import Baco


@dataclass(frozen=True, slots=True)
class NoRouter:
    """Takes the place of a router: both models read, and it picks neither."""

    spelling: str
    only: Source | None = None
    reads: frozenset[Source] = BOTH

    def __call__(self, signals: Signals) -> Tensor:
        return torch.zeros_like(signals.top_base, dtype=torch.bool)


def decode(
    baco: "Baco",
    prompts: Sequence[Prompt],
    sampling: Mapping[str, Any],
    spelling: str,
    choose: Choose,
) -> list[list[Completion]]:
    """The n samples of every prompt, every token drawn from the row that `choose` returns.

    Args:
        baco: the pair, its most rows at once and its memory limit.
        prompts: ``request.index`` of the engine's rows is an index into them.
        sampling: fields of :class:`baco.SamplingParams`, n and seed too.
        spelling: the router's name in the samples.
        choose: see :data:`baco.engine.verify.Choose`.

    Raises:
        BacoError: a prompt that does not fit the context window, or an answer that ended with an
        error.
    """
    engine = Engine(
        baco.pair,
        max_rows=baco.max_rows,
        memory=baco.memory,
        speculate=False,
        choose=choose,
        prefix_cache=baco.prefix_cache,
    )
    decoder = Decoder(baco.pair, engine)
    params = baco.pair.defaults.updated(sampling)
    for prompt in prompts:
        decoder.submit(prompt.messages, params, router=NoRouter(spelling))
    done: list[list[Completion]] = [[] for _ in prompts]
    while decoder.busy:
        for chunk in decoder.step():
            if chunk.completion is not None:
                check_whole([chunk.completion])
                done[chunk.prompt].append(chunk.completion)
    return [sorted(samples, key=lambda completion: completion.sample) for samples in done]
