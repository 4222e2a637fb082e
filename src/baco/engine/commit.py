"""From a verdict's tensors to the sequences' lists: the one place where a round waits for them."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from baco.engine.sequence import SequenceState, Why
from baco.engine.verify import Positions, VerifyResult


def append(
    rows: Sequence[SequenceState],
    positions: Positions,
    result: VerifyResult,
    ends: Collection[int],
    matters: Callable[[SequenceState, int], bool],
) -> tuple[list[int], dict[int, tuple[int, int]]]:
    """Append what stands to every row, up to its end token, its limit or damaged logits.

    Args:
        rows, positions, verdict: of the round.
        ends: tokens that end an answer.
        matters: does damage matter to a row, by what `VerifyResult.damaged` has there?

    Returns:
        How many drafts of each row stood, and by row the first position with damaged logits, and
        what `VerifyResult.damaged` has there.
    """
    most = positions.most
    told = torch.cat(
        (
            result.logprob.view(torch.int32).long(),  # bit by bit: one table, one wait
            result.token,
            result.source.long(),
            result.damaged,
            result.committed[:, None],
            result.accepted[:, None],
        ),
        dim=1,
    ).cpu()
    logprobs = told[:, :most].int().view(torch.float32).tolist()
    packed = told[:, most:].tolist()
    first = [0]
    for count in positions.counts:
        first.append(first[-1] + count)
    tops = _tops(rows, positions, result)
    whys = _whys(positions, result) if any(row.request.explain for row in rows) else None
    accepted, damage = list[int](), dict[int, tuple[int, int]]()
    for at, (row, numbers) in enumerate(zip(rows, packed, strict=True)):
        committed, right = numbers[-2:]
        for ahead, whose in enumerate(numbers[2 * most : 2 * most + positions.counts[at]]):
            if whose and matters(row, whose):
                damage[at] = ahead, whose
                committed, right = min(committed, ahead), min(right, ahead)
                break
        accepted.append(right)
        for ahead in range(committed):
            token = numbers[ahead]
            row.tokens.append(token)
            row.sources.append("base" if numbers[most + ahead] else "aligned")
            row.logprobs.append(logprobs[at][ahead])
            wanted = row.request.params.logprobs
            if tops is not None and wanted:
                row.top_logprobs.append(dict(tops[first[at] + ahead][:wanted]))
            if whys is not None and row.request.explain:
                row.why.append(whys[first[at] + ahead])
            if token in ends:
                row.finish_reason = "stop"
            elif len(row.tokens) >= row.limit:
                row.finish_reason = "length"
            if row.finish_reason is not None:
                break
    return accepted, damage


def _tops(
    rows: Sequence[SequenceState], positions: Positions, result: VerifyResult
) -> list[list[tuple[int, float]]] | None:
    """The most likely tokens of the source at every position, as many as any row wants."""
    wanted = max((row.request.params.logprobs or 0 for row in rows), default=0)
    if not wanted:
        return None
    source = result.source[positions.row, positions.ahead]
    raw = torch.where(source[:, None], result.signals.base, result.signals.aligned)
    top = raw.log_softmax(dim=-1).topk(min(wanted, raw.shape[-1]), dim=-1)
    each = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [list(zip(ids, values, strict=True)) for ids, values in each]


def _whys(positions: Positions, result: VerifyResult) -> list[Why]:
    """What the router saw at every position."""
    at = (positions.row, positions.ahead)
    token = result.token[at]
    signals, boundary_state = result.signals, result.boundary_state

    def logprob(logits: Tensor) -> list[float]:
        told: list[float] = logits.log_softmax(dim=-1).gather(1, token[:, None])[:, 0].tolist()
        return told

    columns = zip(
        logprob(signals.base),
        logprob(signals.aligned),
        signals.max_base.tolist(),
        signals.entropy_base.tolist(),
        signals.top_base.tolist(),
        boundary_state.is_boundary(result.previous_source).tolist(),
        ("base" if wanted else "aligned" for wanted in boundary_state.router_choice.tolist()),
        strict=True,
    )
    return [Why(*column) for column in columns]
