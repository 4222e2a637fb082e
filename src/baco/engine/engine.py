"""The loop: draft, read with both halves, route and draw, commit.

It works on token ids; it knows nothing of text. Prompts are read once and shared by their samples;
sequences join and leave at every step, each at its own length.
"""

from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from baco.engine.batch import Batch
from baco.engine.beside import Beside
from baco.engine.cache import columns_for
from baco.engine.drafter import Draft, Drafter
from baco.engine.enough import Enough
from baco.engine.reader import Reader
from baco.engine.sequence import Request, Sequence
from baco.engine.speculation import MOST_AHEAD, priced
from baco.engine.stats import Stats
from baco.engine.store import PREFILL_PIECE
from baco.engine.tell import append
from baco.engine.verdict import Choose, Law, Round, Verdict, route, settled
from baco.errors import BacoError
from baco.half import Half
from baco.memory import cache_bytes
from baco.pair import Pair
from baco.routing.rules import HALVES, Source
from baco.routing.signals import Signals
from baco.transfer import tensor_on

# Columns that a row may take beyond its tokens: what is drafted after its last, and padding.
SPARE = MOST_AHEAD + 1


@dataclass(slots=True)
class _Waiting:
    """A request of which some samples are not yet in the batch, and its prompt once read."""

    sequences: deque[Sequence]
    prefixes: dict[str, Any] | None = None


class Engine:
    """Decodes requests on one pair, each with its own router.

    Args:
        pair: the two halves.
        max_rows: sequences decoded at once; more wait.
        memory: that cached keys and values may take, as :func:`baco.memory.cache_bytes` reads it.
        speculate: draft tokens where that pays; the answers are the same without.
        draft: a small model of the same vocabulary that drafts.
        choose: what a token is drawn from, and whose it is, where it is not for routers to say.
    """

    def __init__(
        self,
        pair: Pair,
        *,
        max_rows: int = 256,
        memory: int | float | str | None = None,
        speculate: bool = True,
        draft: Half | None = None,
        choose: Choose = route,
    ) -> None:
        self.pair, self.max_rows = pair, max_rows
        self._device = pair.aligned.device
        self._apart = pair.base.device != self._device
        self._law = Law(pair.vocabulary.to(self._device), pair.banned.to(self._device), choose)
        self._batch = Batch(self._device, pair.vocabulary.size)
        halves = {"base": pair.base, "aligned": pair.aligned}
        if draft is not None and speculate:
            halves["draft"] = draft
        self._reader = Reader(halves, self._batch)
        # Plain forwards keep the host busy: one device would wait for the second's operations.
        together = self._device.type == "cuda" and not self._apart and self._reader.stays(HALVES)
        self._beside = Beside(self._device) if together else None
        self._enough = Enough()
        drafts = speculate and self._reader.rewinds
        sizes = {name: half.size for name, half in halves.items()}
        planner = priced(sizes, pair.vocabulary.size, self._device.type) if drafts else None
        self._drafter = Drafter(self._reader, self._batch, self._law.banned, planner)
        self._memory = cache_bytes(memory, {half.device for half in halves.values()})
        self._token_bytes: dict[str, int] = {}  # of each half's cache, once a prompt was read
        self._waiting: deque[_Waiting] = deque()
        self._doubted: set[Sequence] = set()  # rows that met damaged logits in the last step
        self.stats = Stats(self._reader.stores)

    def add(self, request: Request) -> list[Sequence]:
        """Queue the n samples of a request; BacoError where its prompt fits no context window."""
        room = self._room(request)
        sequences = [
            Sequence(request, sample, min(request.params.max_tokens, room))
            for sample in range(request.params.n)
        ]
        self._waiting.append(_Waiting(deque(sequences)))
        return sequences

    @property
    def busy(self) -> bool:
        """Is there anything left to decode?"""
        return bool(self._waiting) or len(self._batch) > 0

    @property
    def waiting(self) -> int:
        """Sequences that have no row yet."""
        return sum(len(head.sequences) for head in self._waiting)

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._batch)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Append one or more tokens to every sequence in the batch; the sequences that got any."""
        self._admit()
        if not self._batch.rows:
            return []
        draft = self._drafter.draft()
        round_ = Round(self._batch, draft.positions, draft.decided)
        verdict = self._law.judge(round_, self._read(draft, round_))
        return self._commit(draft, round_, verdict)

    def stop(self, sequence: Sequence, tokens: int) -> None:
        """End a sequence early and keep its first ``tokens`` tokens; it leaves the batch."""
        sequence.finish_reason = "stop"
        sequence.cut(tokens)
        for head in self._waiting:
            with suppress(ValueError):
                head.sequences.remove(sequence)

    def _read(self, draft: Draft, round_: Round) -> Signals:
        """Both halves' rows at the positions of a draft. A half that cannot matter is not read, and
        the other's rows take its place. Nobody asks whether it matters where it nearly always does,
        nor on two devices: these work at once, and neither waits to hear of the other's rows.
        """
        first, second = self._reader.order(draft)
        round_.read.append(first)
        both = self._apart or self._all_told or self._enough.seldom(first)
        if second is not None and both and self._beside:
            one, other = (partial(self._reader.rows, half, draft) for half in (first, second))
            rows, others = self._beside.both(one, other)
            round_.read.append(second)
            return self._law.look(round_, rows, rows).heard(**{second: others})
        rows = self._reader.rows(first, draft)
        signals = self._law.look(round_, rows, rows)
        if draft.partition is not None:
            signals.known(first, draft.partition)
        if second is None or (not both and self._suffices(first, round_, signals)):
            return signals
        round_.read.append(second)
        return signals.heard(**{second: self._reader.rows(second, draft)})

    @property
    def _all_told(self) -> bool:
        """Are both halves' rows wanted, whatever they are?"""
        explained = any(row.request.explain for row in self._batch.rows)
        return self._law.choose is not route or explained

    def _suffices(self, half: Source, round_: Round, signals: Signals) -> bool:
        """Do one half's rows decide the whole round?"""
        requests = [row.request for row in self._batch.rows]
        alone = [request.router.reads <= {half} for request in requests]
        told = tensor_on(self._device, alone)
        standing = self._law.stand(round_, signals, ask=any(alone))
        enough = settled(standing, round_, half, told)
        self._enough.saw(half, enough)
        return enough

    def _commit(self, draft: Draft, round_: Round, verdict: Verdict) -> list[Sequence]:
        """Append what stands, make the caches forget the rest, and remember how drafts fared."""
        rows = list(self._batch.rows)
        before = [len(row.tokens) for row in rows]
        matters = partial(self._matters, round_)
        agreed, damage = append(rows, draft.positions, verdict, self.pair.end_ids, matters)
        if damage or self._doubted:
            self._doubt(round_, damage)
        self._batch.hear(before)
        self._reader.rewind()
        if damage:
            self._reader.clean(list(damage))
        self._drafter.learn(draft, before, agreed)
        self.stats.count(rows, before, draft.decided, agreed)
        return rows

    def _matters(self, round_: Round, row: Sequence, whose: int) -> bool:
        """Do damaged logits matter to a row, or are they those of a half that it does not need?"""
        return any(row.request.needs(half) for half in round_.damaged(whose))

    def _doubt(self, round_: Round, damage: Mapping[int, tuple[int, int]]) -> None:
        """End rows whose next position has damaged logits.

        Where a cache can be rolled back, their logits are read once more before that, without
        drafts: the keys of a draft that overflows reach the positions before it, though masked.
        """
        doubted = set()
        for at, (ahead, whose) in damage.items():
            row = self._batch.rows[at]
            if ahead or row.finish_reason is not None:
                continue
            if self._reader.rewinds and row not in self._doubted:
                doubted.add(row)
                continue
            half = next(one for one in round_.damaged(whose) if row.request.needs(one))
            row.finish_reason, row.error = "error", self._reader.halves[half].damage
        self._doubted = doubted
        if doubted:
            self._drafter.pause()

    def _room(self, request: Request) -> int:
        needed = {half: self._reader.halves[half] for half in HALVES if request.needs(half)}
        for name, half in needed.items():
            half.check_prompt(name, request.ids(name))
        return min(half.context - len(request.ids(name)) for name, half in needed.items())

    def _admit(self) -> None:
        """Drop ended rows, then fill up from the queue, in order, as far as memory goes."""
        self._compact()
        going, read = len(self._batch), 0
        while self._waiting and len(self._batch) < self.max_rows:
            head = self._waiting[0]
            if not head.sequences:
                self._waiting.popleft()
                continue
            if head.prefixes is None:
                if self._batch.rows and self._affordable(head) < 1:
                    return
                if going and read >= PREFILL_PIECE:
                    return  # who is being answered does not wait for many new prompts at once
                head.prefixes = self._prefill(head.sequences[0].request)
                read += len(head.sequences[0].request.aligned_ids)
            count = min(self._affordable(head), self.max_rows - len(self._batch))
            if count < 1:
                return
            most = len(self._batch) + count
            joined = [head.sequences.popleft() for _ in range(min(count, len(head.sequences)))]
            self._hold([*self._batch.rows, *joined], most)
            self._reader.admit(head.prefixes, len(joined))
            self._batch.admit(joined)

    def _prefill(self, request: Request) -> dict[str, Any]:
        prefixes = self._reader.prefill(request)
        for name, prefix in prefixes.items():
            self._token_bytes[name] = self._reader.stores[name].bytes_per_token(prefix)
        return prefixes

    def _hold(self, rows: list[Sequence], most: int) -> None:
        """Make room for rows at their longest, and for twice as many where memory has it."""
        columns = {name: self._longest(rows, name) + SPARE for name in self._reader.stores}
        self._reader.hold(min(most, 1 << (len(rows) - 1).bit_length()), columns)

    def _affordable(self, head: _Waiting) -> int:
        """How many rows like the head's next one memory has room for beside the batch's, each at
        its longest; as many as there may be where a row's size is not known.
        """
        prompt = self._prompts(head.sequences[0].request)
        row = self._bytes([*self._batch.rows, head.sequences[0]])
        rows = (self._memory - prompt) // row if row else self.max_rows
        if rows < 1 and not self._batch.rows:
            raise BacoError(
                f"one answer may need {(prompt + row) / 2**20:.1f} MiB of cache and memory is "
                f"{self._memory / 2**20:.1f} MiB: lower max_tokens, shorten the prompt or raise "
                "memory"
            )
        return rows - len(self._batch)

    def _bytes(self, rows: list[Sequence]) -> int:
        """What a row of the caches takes where the longest of some rows has its full length."""
        taken = 0
        for name, each in self._token_bytes.items():
            longest = self._longest(rows, name)
            taken += each * columns_for(longest + SPARE) if longest else 0
        return taken

    def _longest(self, rows: list[Sequence], name: str) -> int:
        """Columns of the longest of some rows at its full length in a half's cache; 0 where it
        reads none of them.
        """
        needed = (row for row in rows if row.request.needs(name))
        own = (self._reader.copied(name, row.request) + row.limit for row in needed)
        return max(own, default=0)

    def _prompts(self, head: Request) -> int:
        """What prompts take beside rows: the head's until all its samples run, shared ones while
        any of theirs does.
        """
        running = {id(row.request): row.request for row in self._batch.rows}
        return sum(
            each * len(request.ids(name))
            for request in ({id(head): head} | running).values()
            for name, each in self._token_bytes.items()
            if request.needs(name) and (request is head or not self._reader.copied(name, request))
        )

    def _compact(self) -> None:
        rows = self._batch.rows
        alive = [index for index, row in enumerate(rows) if row.finish_reason is None]
        if len(alive) == len(rows):
            return
        # Rows from the end fill the holes, so that few are copied.
        order = [index for index in alive if index < len(alive)]
        tail = iter(index for index in alive if index >= len(alive))
        filled = set(order)
        order = [i if i in filled else next(tail) for i in range(len(alive))]
        self._reader.reorder(order)
        self._batch.reorder(order)
