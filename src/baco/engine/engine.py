"""The loop: draft, read with both halves, route and draw, commit.

It works on token ids; it knows nothing of text. Prompts are read once and shared by their samples;
sequences join and leave at every step, each at its own length.
"""

from collections.abc import Mapping
from functools import partial

import torch

from baco.device import tensor_on
from baco.engine.batch import Batch
from baco.engine.budget import Budget
from baco.engine.commit import append
from baco.engine.dual_stream import Beside
from baco.engine.metrics import Stats
from baco.engine.runner import Reader
from baco.engine.scheduler import MANY_PIECES, Scheduler
from baco.engine.scoring import Scoring
from baco.engine.sequence import Request, Sequence
from baco.engine.skip_stats import Enough
from baco.engine.speculative.cost_model import priced
from baco.engine.speculative.proposer import Draft, Drafter
from baco.engine.verify import Choose, Law, Round, Verdict, route, settled
from baco.kv_cache.memory_limit import cache_bytes
from baco.models.model import Half
from baco.models.pair import Pair
from baco.routing.signals import Signals
from baco.source import MODELS, Source


class Engine:
    """Decodes requests on one pair, each with its own router.

    Args:
        pair: the two halves.
        max_rows: sequences decoded at once; more wait.
        memory: that cached keys and values may take, as :func:`baco.kv_cache.memory_limit.cache_bytes` reads it.
        speculate: draft tokens where that pays; the answers are the same without.
        draft: a small model of the same vocabulary that drafts.
        choose: what a token is drawn from, and whose it is, where it is not for routers to say.
        pieces: of prompts that are read between two steps: few where somebody waits for the next
            token, many where all answers are wanted soon. Answers are the same.
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
        pieces: int = MANY_PIECES,
    ) -> None:
        self.pair = pair
        self._device = pair.aligned.device
        self._apart = pair.base.device != self._device
        self._law = Law(pair.vocabulary.to(self._device), pair.banned.to(self._device), choose)
        self._batch = Batch(self._device, pair.vocabulary.size)
        halves = {"base": pair.base, "aligned": pair.aligned}
        if draft is not None and speculate:
            halves["draft"] = draft
        self._reader = Reader(halves, self._batch)
        # Plain forwards keep the host busy: one device would wait for the second's operations.
        together = self._device.type == "cuda" and not self._apart and self._reader.stays(MODELS)
        self._beside = Beside(self._device) if together else None
        self._enough = Enough()
        drafts = speculate and self._reader.rewinds
        sizes = {name: half.size for name, half in halves.items()}
        planner = priced(sizes, pair.vocabulary.size, self._device.type) if drafts else None
        self._drafter = Drafter(self._reader, self._batch, self._law.banned, planner)
        held = cache_bytes(memory, {half.device for half in halves.values()})
        piece = max(half.piece for half in halves.values())
        budget = Budget(held, halves, pair.vocabulary.size, piece)
        self._scheduler = Scheduler(self._reader, self._batch, budget, max_rows, pieces)
        self._doubted: set[Sequence] = set()  # rows that met damaged logits in the last step
        self.stats = Stats(self._reader.stores)

    def add(self, request: Request) -> list[Sequence]:
        """Queue the n samples of a request.

        Raises:
            BacoError: its prompt fits no context window, or memory cannot hold one answer.
        """
        return self._scheduler.add(request, self._room(request))

    def score(self, scoring: Scoring) -> None:
        """Queue a text to be scored; `Scoring.done` says when it was.

        Raises:
            BacoError: memory cannot hold it.
        """
        self._scheduler.score(scoring)

    @property
    def busy(self) -> bool:
        """Is there anything left to do?"""
        return self._scheduler.busy

    @property
    def waiting(self) -> int:
        """Sequences that have no row yet."""
        return self._scheduler.waiting

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._batch)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Append one or more tokens to every sequence in the batch; the sequences that got any.

        Before that, a bounded number of tokens of waiting prompts and texts are read.
        """
        self._scheduler.schedule()
        if not self._batch.rows:
            return []
        self._reader.catch_up(self._scheduler.budget.read_at_once(len(self._batch)))
        draft = self._drafter.draft(self._scheduler.positions)
        round_ = Round(self._batch, draft.positions, draft.decided)
        verdict = self._law.judge(round_, self._read(draft, round_))
        return self._commit(draft, round_, verdict)

    def stop(self, sequence: Sequence, tokens: int) -> None:
        """End a sequence early and keep its first ``tokens`` tokens; it leaves the batch."""
        sequence.finish_reason = "stop"
        self._scheduler.drop(sequence)
        sequence.cut(tokens)

    def stop_scoring(self, scoring: Scoring) -> None:
        """Give a text up."""
        self._scheduler.drop_text(scoring)

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
        needed = {half: self._reader.halves[half] for half in MODELS if request.needs(half)}
        for name, half in needed.items():
            half.check_prompt(name, request.ids(name))
        return min(half.context - len(request.ids(name)) for name, half in needed.items())
