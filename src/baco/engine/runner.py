"""Both halves' caches under the rows of a batch: which tokens each half has read, and still has to.

A half may lag behind: what it was not needed for it reads later, in one forward.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from baco.device import tensor_on
from baco.engine.batch import Batch
from baco.engine.sequence import Request, SequenceState
from baco.kv_cache.protocol import KVCache
from baco.models.model import PairModel
from baco.source import Source

if TYPE_CHECKING:
    from baco.engine.speculative.proposer import Draft


class ModelRunner:
    """The halves of a pair, and a draft model if there is one, reading the rows of a batch.

    Attributes:
        halves: by name: ``base``, ``aligned``, ``draft``.
        stores: their caches; row r of each is row r of the batch.
    """

    def __init__(self, halves: Mapping[str, PairModel], batch: Batch) -> None:
        self.halves = dict(halves)
        self.stores: dict[str, KVCache] = {name: half.new_cache() for name, half in halves.items()}
        self._batch = batch

    @property
    def can_roll_back(self) -> bool:
        """Can every half forget again what it read?"""
        return all(store.can_roll_back for store in self.stores.values())

    def needed(self) -> list[Source]:
        """The halves that any row needs."""
        return self._batch.needed

    def reading(self, request: Request) -> Generator[int, None, dict[str, Any]]:
        """Read a request's prompt with every model that needs it, once for all its samples: yields
        how many tokens each piece had, and returns what can be admitted.
        """
        prefixes = {}
        for name in self.reads(request):
            # The last token is read in the first step, as every later token is.
            ids = request.ids(name)[:-1]
            prefixes[name] = yield from self.stores[name].prefill(ids, request.params.n)
        return prefixes

    def to_read(self, request: Request) -> int:
        """Tokens that this reads, of all models together."""
        return sum(len(request.ids(name)) - 1 for name in self.reads(request))

    def reads(self, request: Request) -> list[str]:
        """The models that read a request's prompt. A draft model whose context window is too short
        for it drafts nothing for it.
        """
        return [
            name
            for name, model in self.halves.items()
            if request.needs(name) and len(request.ids(name)) <= model.context
        ]

    def catch_up(self, most: int) -> None:
        """Let models read on that were not needed for a while and have more than ``most`` tokens
        left, so that no step has to read very many.
        """
        for name, store in self.stores.items():
            context = self.halves[name].context
            left = [
                self._pending(name, row, store.lengths[at])[:-1]
                if len(row.request.ids(name)) + len(row.tokens) <= context
                else []
                for at, row in enumerate(self._batch.rows)
            ]
            counts = [len(tokens) for tokens in left]
            if sum(counts) > most:
                nothing = torch.empty(len(left), 0, dtype=torch.int64)
                tokens = _flush_right(left, nothing, [0] * len(left), max(counts))
                store.extend(tokens, counts, 1)

    def held(self) -> dict[str, int]:
        """Bytes of each model's tables, where they may have room for more than their rows need."""
        return {name: store.allocated_bytes() for name, store in self.stores.items()}

    def shrink(self, columns: Mapping[str, int]) -> None:
        """Give back what tables hold beyond their rows, each of so many columns at most."""
        for name, store in self.stores.items():
            store.shrink(columns[name])

    def copied(self, name: str, request: Request) -> int:
        """Tokens of a request's prompt that a half copies for each of its samples: all or none."""
        tokens = len(request.ids(name))
        return 0 if self.stores[name].shares_prefix(tokens - 1, request.params.n) else tokens

    def static_shapes(self, halves: Iterable[str]) -> bool:
        """Do these halves' tables stay where they are while rows are decoded?"""
        return all(self.stores[half].static_shapes for half in halves)

    def preallocate(self, rows: int, columns: Mapping[str, int]) -> None:
        """Make room in one go, for so many rows of so many columns of each half, where tables are
        to stay where they are.
        """
        for name, store in self.stores.items():
            store.preallocate(rows, columns[name])

    def admit(self, prefixes: Mapping[str, Any], count: int) -> None:
        """Append ``count`` rows behind a prompt."""
        for name, store in self.stores.items():
            store.copy_prefix(prefixes.get(name), count)

    def reorder(self, order: Sequence[int]) -> None:
        """Keep the rows ``order``, in that order."""
        for store in self.stores.values():
            store.drop(kept=order)

    def roll_back(self) -> None:
        """Forget what was drafted and did not stand: all but the rows' last tokens stay."""
        for name in self.stores:
            self._keep(name, -1)

    def forget(self, name: str) -> None:
        """Let a half forget what was drafted; all tokens of the rows stay."""
        self._keep(name, 0)

    def clean(self, rows: Sequence[int]) -> None:
        """Clear what damaged logits left in some rows: 0 × NaN in a masked column is NaN again.

        Of a row that goes on all is cleared but what it has read; of one that has ended, all.
        """
        ended = [row for row in rows if self._batch.rows[row].finish_reason is not None]
        for store in self.stores.values():
            store.clear([row for row in rows if row not in ended], ended)

    def _keep(self, name: str, more: int) -> None:
        """Let a half forget all but the rows' tokens, and so many ``more``."""
        rows = self._batch.rows
        kept = [len(row.request.ids(name)) + len(row.tokens) + more for row in rows]
        self.stores[name].roll_back(kept)

    def room(self, name: str) -> int:
        """How many tokens a model can read beyond those of every row: up to the end of its context
        window, and in each row with one set of rotary factors.
        """
        model = self.halves[name]
        rows = (row for row in self._batch.rows if row.request.needs(name))
        lengths = [len(row.request.ids(name)) + len(row.tokens) for row in rows]
        ends = [model.context - length for length in lengths]
        if model.long_rope is not None:
            changes = (model.long_rope.original_length - length for length in lengths)
            ends += [change for change in changes if change >= 0]
        return min(ends, default=model.context)

    def order(self, draft: "Draft") -> tuple[Source, Source | None]:
        """Which half is read first, and which only if the first does not decide the round.

        First comes the half that has run ahead, else the one that spoke last in most rows.
        """
        rows, needed = self._batch.rows, self.needed()
        if len(needed) == 1:
            return needed[0], None
        previous_source = sum(bool(row.sources) and row.sources[-1] == "aligned" for row in rows)
        aligned_spoke = 2 * previous_source > len(rows)
        if draft.runner == "aligned" or (draft.runner != "base" and aligned_spoke):
            return "aligned", "base"
        return "base", "aligned"

    def rows(self, name: Source, draft: "Draft") -> Tensor:
        """A half's rows of logits at the positions of a draft: float32 [N, V]."""
        if draft.runner == name:
            assert draft.rows is not None
            return draft.rows
        positions, on = draft.positions, draft.read_last_draft
        counts = [count - 1 + on for count in positions.counts]
        logits = self.read(name, positions.drafted, counts, positions.most + on)
        if on:
            draft.bonus_logits, logits = logits[:, -1], logits[:, :-1]
        return positions.flat(logits)

    def read(self, name: str, drafted: Tensor, counts: Sequence[int], keep: int) -> Tensor:
        """Read what a half has not read of every row, and the row's first drafts after that.

        Args:
            name: the half.
            drafted: int64 [B, K or more].
            counts: how many of them to read of each row.
            keep: of how many last tokens the logits are wanted.

        Returns:
            Raw logits on the common vocabulary, float32 [B, keep, V], on the rows' device.
        """
        half, store = self.halves[name], self.stores[name]
        rows = self._batch.rows
        pending = [self._pending(name, row, store.lengths[at]) for at, row in enumerate(rows)]
        each = zip(counts, rows, strict=True)
        more = [count if row.request.needs(name) else 0 for count, row in each]
        lengths = [len(own) + count for own, count in zip(pending, more, strict=True)]
        tokens = _flush_right(pending, drafted, more, max(lengths))
        return half.fit(store.extend(tokens, lengths, keep)).to(self._batch.device)

    def _pending(self, name: str, row: SequenceState, length: int) -> list[int]:
        if not row.request.needs(name):
            return []
        prompt = row.request.ids(name)
        if length >= len(prompt):
            return row.tokens[length - len(prompt) :]
        return [*prompt[length:], *row.tokens]


def _flush_right(
    pending: Sequence[Sequence[int]], drafted: Tensor, counts: Sequence[int], span: int
) -> Tensor:
    """Rows of ``pending`` tokens and their first drafts, padded on the left: [B, span].

    Rows are padded with a token that they read anyway: what another one says may be damaged.
    """
    most = max(counts)
    if most == 0:
        own = [_fill(row, span - len(row)) + list(row) for row in pending]
        return torch.tensor(own, dtype=torch.int64)
    if all(count == most for count in counts):
        head = [_fill(row, span - most - len(row)) + list(row) for row in pending]
        before = tensor_on(drafted.device, head, torch.int64)
        return torch.cat((before, drafted[:, :most]), dim=1)
    each = list(zip(pending, counts, strict=True))
    head = [[*_fill(row, span - count - len(row)), *row, *([0] * count)] for row, count in each]
    before = tensor_on(drafted.device, head, torch.int64)
    at = (
        torch.arange(span, device=drafted.device)
        - span
        + tensor_on(drafted.device, counts)[:, None]
    )
    return torch.where(at < 0, before, drafted.gather(1, at.clamp_min(0)))


def _fill(row: Sequence[int], count: int) -> list[int]:
    return list(row[:1] or [0]) * count
