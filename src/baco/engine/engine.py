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
from baco.engine.dual_stream import DualStream
from baco.engine.metrics import Stats
from baco.engine.runner import ModelRunner
from baco.engine.scheduler import MANY_PIECES, Scheduler
from baco.engine.scoring import Scoring
from baco.engine.sequence import Request, SequenceState
from baco.engine.skip_stats import SkipStats
from baco.engine.speculative.cost_model import priced
from baco.engine.speculative.proposer import Draft, Proposer
from baco.engine.verify import Choose, Verifier, VerifyBatch, VerifyResult, route, settled
from baco.kv_cache.memory_limit import cache_bytes
from baco.models.model import PairModel
from baco.models.pair import Pair
from baco.routing.signals import Distribution, Signals
from baco.source import MODELS, Source


class Engine:
    """Decodes requests on one pair, each with its own router.

    Args:
        pair: the two halves.
        max_rows: sequences decoded at once; more wait.
        memory: that cached keys and values may take, as
            :func:`baco.kv_cache.memory_limit.cache_bytes` reads it.
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
        draft: PairModel | None = None,
        choose: Choose = route,
        pieces: int = MANY_PIECES,
    ) -> None:
        self.pair = pair
        self._device = pair.aligned.device
        self._apart = pair.base.device != self._device
        self._verifier = Verifier(
            pair.vocabulary.to(self._device), pair.banned.to(self._device), choose
        )
        self._batch = Batch(self._device, pair.vocabulary.size)
        halves = {"base": pair.base, "aligned": pair.aligned}
        if draft is not None and speculate:
            halves["draft"] = draft
        self._runner = ModelRunner(halves, self._batch)
        # Plain forwards keep the host busy: one device would wait for the second's operations.
        together = (
            self._device.type == "cuda" and not self._apart and self._runner.static_shapes(MODELS)
        )
        self._dual_stream = DualStream(self._device) if together else None
        self._skip_stats = SkipStats()
        drafts = speculate and self._runner.can_roll_back
        sizes = {name: half.size for name, half in halves.items()}
        planner = priced(sizes, pair.vocabulary.size, self._device.type) if drafts else None
        self._proposer = Proposer(self._runner, self._batch, self._verifier.banned, planner)
        held = cache_bytes(memory, {half.device for half in halves.values()})
        piece = max(half.prefill_chunk for half in halves.values())
        budget = Budget(held, halves, pair.vocabulary.size, piece)
        self._scheduler = Scheduler(self._runner, self._batch, budget, max_rows, pieces)
        self._doubted: set[SequenceState] = set()  # rows that met damaged logits in the last step
        self.stats = Stats(self._runner.stores)

    def add(self, request: Request) -> list[SequenceState]:
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
    def step(self) -> list[SequenceState]:
        """Append one or more tokens to every sequence in the batch; the sequences that got any.

        Before that, a bounded number of tokens of waiting prompts and texts are read.
        """
        self._scheduler.schedule()
        if not self._batch.rows:
            return []
        self._runner.catch_up(self._scheduler.budget.read_at_once(len(self._batch)))
        draft = self._proposer.draft(self._scheduler.positions)
        verify_batch = VerifyBatch(self._batch, draft.positions, draft.decided)
        result = self._verifier.verify(verify_batch, self._read(draft, verify_batch))
        return self._commit(draft, verify_batch, result)

    def stop(self, sequence: SequenceState, tokens: int) -> None:
        """End a sequence early and keep its first ``tokens`` tokens; it leaves the batch."""
        sequence.finish_reason = "stop"
        self._scheduler.drop(sequence)
        sequence.cut(tokens)

    def stop_scoring(self, scoring: Scoring) -> None:
        """Give a text up."""
        self._scheduler.drop_text(scoring)

    def _read(self, draft: Draft, verify_batch: VerifyBatch) -> Signals:
        """Both halves' rows at the positions of a draft. A half that cannot matter is not read, and
        the other's rows take its place. Nobody asks whether it matters where it nearly always does,
        nor on two devices: these work at once, and neither waits to hear of the other's rows.
        """
        first, second = self._runner.order(draft)
        verify_batch.read.append(first)
        both = self._apart or self._all_told or self._skip_stats.rarely_sufficient(first)
        if second is not None and both and self._dual_stream:
            one, other = (partial(self._runner.rows, half, draft) for half in (first, second))
            rows, others = self._dual_stream.both(one, other)
            verify_batch.read.append(second)
            return self._verifier.look(
                verify_batch, {first: Distribution(rows), second: Distribution(others)}
            )
        known = Distribution(self._runner.rows(first, draft), draft.partition)
        signals = self._verifier.look(verify_batch, {"base": known, "aligned": known})
        if second is None or (not both and self._suffices(first, verify_batch, signals)):
            return signals
        verify_batch.read.append(second)
        rest = Distribution(self._runner.rows(second, draft))
        return self._verifier.look(verify_batch, {first: known, second: rest})

    @property
    def _all_told(self) -> bool:
        """Are both halves' rows wanted, whatever they are?"""
        explained = any(row.request.explain for row in self._batch.rows)
        return self._verifier.choose is not route or explained

    def _suffices(self, half: Source, verify_batch: VerifyBatch, signals: Signals) -> bool:
        """Do one half's rows decide the whole round?"""
        requests = [row.request for row in self._batch.rows]
        alone = [request.router.reads <= {half} for request in requests]
        told = tensor_on(self._device, alone)
        boundary_state = self._verifier.stand(verify_batch, signals, ask=any(alone))
        enough = settled(boundary_state, verify_batch, half, told)
        self._skip_stats.saw(half, enough)
        return enough

    def _commit(
        self, draft: Draft, verify_batch: VerifyBatch, result: VerifyResult
    ) -> list[SequenceState]:
        """Append what stands, make the caches forget the rest, and remember how drafts fared."""
        rows = list(self._batch.rows)
        before = [len(row.tokens) for row in rows]
        matters = partial(self._matters, verify_batch)
        accepted, damage = append(rows, draft.positions, result, self.pair.end_ids, matters)
        if damage or self._doubted:
            self._doubt(verify_batch, damage)
        self._batch.advance(before)
        self._runner.roll_back()
        if damage:
            self._runner.clean(list(damage))
        self._proposer.learn(draft, before, accepted)
        self.stats.count(rows, before, draft.decided, accepted)
        return rows

    def _matters(self, verify_batch: VerifyBatch, row: SequenceState, whose: int) -> bool:
        """Do damaged logits matter to a row, or are they those of a half that it does not need?"""
        return any(row.request.needs(half) for half in verify_batch.damaged(whose))

    def _doubt(self, verify_batch: VerifyBatch, damage: Mapping[int, tuple[int, int]]) -> None:
        """End rows whose next position has damaged logits.

        Where a cache can be rolled back, their logits are read once more before that, without
        drafts: the keys of a draft that overflows reach the positions before it, though masked.
        """
        doubted = set()
        for at, (ahead, whose) in damage.items():
            row = self._batch.rows[at]
            if ahead or row.finish_reason is not None:
                continue
            if self._runner.can_roll_back and row not in self._doubted:
                doubted.add(row)
                continue
            half = next(one for one in verify_batch.damaged(whose) if row.request.needs(one))
            row.finish_reason, row.error = "error", self._runner.halves[half].damage
        self._doubted = doubted
        if doubted:
            self._proposer.pause()

    def _room(self, request: Request) -> int:
        needed = {half: self._runner.halves[half] for half in MODELS if request.needs(half)}
        for name, half in needed.items():
            half.check_prompt(name, request.ids(name))
        return min(half.context - len(request.ids(name)) for name, half in needed.items())
