"""Commits a step: appends the verified tokens to the sequences, and ends them where they end.

This is the one place where a step waits for the device.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from baco.engine.draft import Positions
from baco.engine.runner import ModelRunner
from baco.engine.sequence import SequenceState, Why
from baco.engine.verify import VerifyResult, damaged_models
from baco.errors import Failure
from baco.source import Source

# The first position of a row with damaged logits, and the model whose logits they are.
Damage = tuple[int, Source]


def commit_tokens(
    rows: Sequence[SequenceState],
    positions: Positions,
    result: VerifyResult,
    end_ids: Collection[int],
) -> tuple[list[int], dict[int, Damage]]:
    """Append its committed tokens to every row, up to an end token, the row's limit or damage.

    A row with an error gets no token and ends.

    A row that ends its thinking keeps none of the tokens that follow in the same step: no router
    decided them.

    Args:
        rows, positions, result: of the step.
        end_ids: tokens that end an answer.

    Returns:
        How many draft tokens of each row were accepted, and the damage by row. Damaged logits of a
        model that the row does not need are ignored.
    """
    most = positions.most
    packed = torch.cat(
        (
            result.logprob.view(torch.int32).long(),  # bit by bit: one table, one wait
            result.token,
            result.source.long(),
            result.damaged,
            result.num_committed[:, None],
            result.num_accepted[:, None],
        ),
        dim=1,
    ).cpu()
    logprobs = packed[:, :most].int().view(torch.float32).tolist()
    numbers = packed[:, most:].tolist()
    mixed = None if result.choice.mixed is None else result.choice.mixed.tolist()
    first = [0]  # each row's first position
    for count in positions.counts:
        first.append(first[-1] + count)
    tops = _top_logprobs(rows, result)
    whys = _whys(positions, result) if any(row.request.explain for row in rows) else None
    accepted, damage = list[int](), dict[int, Damage]()
    for at, (row, values) in enumerate(zip(rows, numbers, strict=True)):
        tokens, sources, damaged = (values[i * most : (i + 1) * most] for i in range(3))
        num_committed, num_accepted = values[-2:]
        if any(damaged):
            row_damage = _first_damage(row, damaged[: positions.counts[at]])
            if row_damage is not None:
                damage[at] = row_damage
                num_committed = min(num_committed, row_damage[0])
                num_accepted = min(num_accepted, row_damage[0])
        if row.error is not None:  # its structure cannot be followed
            row.finish_reason, num_committed, num_accepted = "error", 0, 0
        accepted.append(num_accepted)
        num_top = row.request.params.logprobs
        for offset in range(num_committed):
            if row.phase != "answer" and not row.think(tokens[offset]):
                accepted[-1] = min(num_accepted, offset)
                break
            row.tokens.append(tokens[offset])
            from_both = mixed is not None and mixed[first[at] + offset]
            row.sources.append(None if from_both else "base" if sources[offset] else "aligned")
            row.logprobs.append(logprobs[at][offset])
            if tops is not None and num_top:
                row.top_logprobs.append(dict(tops[first[at] + offset][:num_top]))
            if whys is not None and row.request.explain:
                row.why.append(whys[first[at] + offset])
            if tokens[offset] in end_ids:
                row.finish_reason = "stop"
            elif len(row.tokens) >= row.limit:
                row.finish_reason = "length"
            if row.finish_reason is not None:
                break
    return accepted, damage


def _first_damage(row: SequenceState, damaged: Sequence[int]) -> Damage | None:
    for offset, bits in enumerate(damaged):
        for model in damaged_models(bits):
            if row.needs(model):
                return offset, model
    return None


def end_damaged_rows(
    rows: Sequence[SequenceState],
    damage: dict[int, Damage],
    runner: ModelRunner,
    retried: Collection[SequenceState],
) -> set[SequenceState]:
    """End rows whose next token has damaged logits, in an error that names the model.

    Where caches can be rolled back, a row is first run once more without a draft: the keys of a
    draft token that overflows reach the positions before it, though masked.

    Args:
        retried: rows that were run once more in this step.

    Returns:
        The rows to run once more.
    """
    retry = set()
    for at, (offset, model) in damage.items():
        row = rows[at]
        if offset or row.finish_reason is not None:
            continue
        if runner.can_roll_back and row not in retried:
            retry.add(row)
        else:
            message = runner.models[model].damage_message
            row.finish_reason, row.error = "error", Failure("process", message)
    return retry


def _top_logprobs(
    rows: Sequence[SequenceState], result: VerifyResult
) -> list[list[tuple[int, float]]] | None:
    """The most likely tokens of the source at every position, as many as any row wants."""
    most = max((row.request.params.logprobs or 0 for row in rows), default=0)
    if not most:
        return None
    choice = result.choice
    raw = torch.where(choice.source[:, None], result.signals.base, result.signals.aligned)
    if choice.mixed is not None and choice.combined is not None:
        raw = torch.where(choice.mixed[:, None], choice.combined, raw)
    top = raw.log_softmax(dim=-1).topk(min(most, raw.shape[-1]), dim=-1)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [list(zip(ids, values, strict=True)) for ids, values in pairs]


def _whys(positions: Positions, result: VerifyResult) -> list[Why]:
    """What the router read at every position."""
    token = result.token[positions.row, positions.offset]
    signals, choice = result.signals, result.choice

    def logprob(logits: Tensor) -> list[float]:
        values: list[float] = logits.log_softmax(dim=-1).gather(1, token[:, None])[:, 0].tolist()
        return values

    mixed = torch.zeros_like(choice.active) if choice.mixed is None else choice.mixed
    wanted: list[Source | None] = [
        None if from_both else "base" if base else "aligned"
        for base, from_both in zip(
            choice.boundary_state.router_choice.tolist(), mixed.tolist(), strict=True
        )
    ]
    columns = zip(
        logprob(signals.base),
        logprob(signals.aligned),
        signals.max_base.tolist(),
        signals.entropy_base.tolist(),
        signals.top_base.tolist(),
        (choice.boundary_state.is_boundary(choice.active) & ~mixed).tolist(),
        wanted,
        strict=True,
    )
    return [Why(*column) for column in columns]
