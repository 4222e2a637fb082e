"""The two-model loop that people write: both models at every token, each with its own KV cache.

Router and sampler are the shared ones, so its answers are the engine's. Nothing is drafted, no
model is skipped, no weights are packed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from baco.models.model import PairModel
from baco.models.pair import Pair
from baco.routing.router import Router
from baco.routing.word_boundaries import NO_TOKEN, select
from baco.sampling.noise import ROUTER, coin, noise_keys
from baco.sampling.params import SamplingParams
from baco.sampling.sampler import SamplingTensors, draw
from baco.sampling.seeds import noise_seed
from baco.source import MODELS
from baco.text.prompts import Prompt


@torch.inference_mode()
def decode(
    pair: Pair,
    prompt: Prompt,
    router: Router,
    params: SamplingParams,
    on_token: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """``n`` answers of exactly ``max_tokens`` tokens.

    Args:
        pair: the two models.
        prompt: as each model reads it; read once and shared by the answers.
        router: picks the source at every boundary.
        params: seeded, without penalties; end tokens do not end answers.
        on_token: called after every token.

    Returns:
        Tokens int64 [n, max_tokens], and their sources, bool, True for the base.
    """
    device = pair.aligned.device
    vocabulary, banned = pair.vocabulary.to(device), pair.banned.to(device)
    table = SamplingTensors.of([params] * params.n, device)
    sample = torch.arange(params.n, device=device)
    seed = torch.full_like(sample, noise_seed(params.seed or 0, prompt.digest))
    previous = torch.full_like(sample, NO_TOKEN)
    active = torch.zeros_like(sample, dtype=torch.bool)
    models = {"base": pair.base, "aligned": pair.aligned}
    caches = {name: DynamicCache() for name in MODELS}
    unread = {
        "base": _column(prompt.base_ids, device),
        "aligned": _column(prompt.aligned_ids, device),
    }
    tokens, sources = [], []
    for at in range(params.max_tokens):
        rows = {name: _read(models[name], unread[name], caches[name]) for name in MODELS}
        if at == 0:
            for name, cache in caches.items():
                cache.batch_repeat_interleave(params.n)
                rows[name] = rows[name].repeat(params.n, 1)
        keys = noise_keys(seed, sample, torch.full_like(sample, at))
        logits, active = select(
            rows["base"],
            rows["aligned"],
            previous,
            active,
            router=router,
            vocabulary=vocabulary,
            banned=banned,
            coin=coin(keys, ROUTER),
        )
        previous = draw(table.bias(logits), table, keys)
        unread = dict.fromkeys(MODELS, previous[:, None])
        tokens.append(previous)
        sources.append(active)
        on_token()
    return torch.stack(tokens, dim=1), torch.stack(sources, dim=1)


def _read(model: PairModel, tokens: Tensor, cache: Any) -> Tensor:
    """Raw logits after tokens [B, T], which are added to the cache: float32 [B, V]."""
    output = model.run(
        input_ids=tokens.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    return model.to_common_vocab(output.logits[:, -1])


def _column(ids: tuple[int, ...], device: Any) -> Tensor:
    return torch.tensor([ids], device=device)
