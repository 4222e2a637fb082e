"""Samples many answers of one model at once, for training.

The engine of the package does the same for pairs. This sampler keeps training independent of the
engine, and draws tens of thousands of answers in a minute.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from baco.demo.model import Cache, TinyLlama


@torch.inference_mode()
def sample(
    model: TinyLlama,
    prompts: Sequence[list[int]],
    count: int,
    *,
    end: int,
    seed: int,
    min_p: float = 0.1,
    max_tokens: int = 96,
    rows: int = 768,
) -> list[list[list[int]]]:
    """`count` answers (token ids, without the end) to each prompt; unfinished ones are kept.

    Prompts of one length go through together, at most `rows` answers at a time, so nothing is
    padded.
    """
    answers: list[list[list[int]]] = [[] for _ in prompts]
    by_length = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    generator = torch.Generator().manual_seed(seed)
    for _, indices in sorted(by_length.items()):
        at_once = max(1, rows // count)
        for start in range(0, len(indices), at_once):
            group = indices[start : start + at_once]
            ids = torch.tensor([prompts[index] for index in group])
            drawn = _sample_group(model, ids, count, end, generator, min_p, max_tokens)
            for position, index in enumerate(group):
                answers[index] = drawn[position * count : (position + 1) * count]
    return answers


def _sample_group(
    model: TinyLlama,
    ids: Tensor,
    count: int,
    end: int,
    generator: torch.Generator,
    min_p: float,
    max_tokens: int,
) -> list[list[int]]:
    """`count` answers to each of ids [B, T], prompt by prompt; finished rows leave the batch."""
    cache = Cache.empty(model.shape, len(ids), ids.shape[1] + max_tokens)
    hidden = model(ids, cache)
    spread = torch.arange(len(ids)).repeat_interleave(count)
    cache, hidden = cache.rows(spread), hidden[spread, -1]
    row_of = torch.arange(len(spread))  # [rows still in the batch]
    answers: list[list[int]] = [[] for _ in spread]
    finished: set[int] = set()
    for _ in range(max_tokens):
        token = _draw(model.logits(hidden), min_p, generator)
        for row, drawn in zip(row_of.tolist(), token.tolist(), strict=True):
            if drawn == end:
                finished.add(row)
            elif row not in finished:
                answers[row].append(drawn)
        if len(finished) == len(answers):
            break
        active = torch.tensor([row not in finished for row in row_of.tolist()])
        if active.float().mean() < 0.8:  # removing rows copies the cache: not for every row
            cache, token, row_of = cache.rows(active.nonzero()[:, 0]), token[active], row_of[active]
        hidden = model(token[:, None], cache)[:, -1]
    return answers


def _draw(logits: Tensor, min_p: float, generator: torch.Generator) -> Tensor:
    """One token [B] from each row of logits [B, V], truncated by min-p."""
    top = logits.max(dim=-1, keepdim=True).values
    floor = top + torch.log(torch.tensor(max(min_p, 1e-30)))
    logits = logits.masked_fill(logits < floor, float("-inf"))
    return torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)[:, 0]


@torch.inference_mode()
def mean_log_probability(
    model: TinyLlama, prompts: Sequence[list[int]], answers: Sequence[list[int]], rows: int = 256
) -> list[float]:
    """Mean log-probability (nats a token) of each answer after its prompt."""
    scores = [0.0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i]))
    for start in range(0, len(order), rows):
        group = order[start : start + rows]
        width = max(len(prompts[i]) + len(answers[i]) for i in group)
        ids = torch.zeros(len(group), width, dtype=torch.long)
        in_answer = torch.zeros(len(group), width, dtype=torch.bool)
        for row, i in enumerate(group):
            whole = prompts[i] + answers[i]
            ids[row, : len(whole)] = torch.tensor(whole)
            in_answer[row, len(prompts[i]) : len(whole)] = True
        hidden = model(ids[:, :-1])
        logits = torch.log_softmax(model.logits(hidden), dim=-1)
        token = logits.gather(-1, ids[:, 1:, None])[..., 0]
        total = (token * in_answer[:, 1:]).sum(-1) / in_answer[:, 1:].sum(-1).clamp(min=1)
        for row, i in enumerate(group):
            scores[i] = float(total[row])
    return scores
