"""The decoding loop: schedule, propose, forward, verify, commit.

It works on token ids and knows nothing of text. Prompts are read once and shared by their samples.
Sequences join and leave at every step, each at its own length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from baco.engine.batch import Batch
from baco.engine.budget import KEPT_SHARE, Budget, cache_bytes
from baco.engine.commit import commit_tokens, end_damaged_rows
from baco.engine.draft import Draft, Logits
from baco.engine.kept_prefixes import KeptPrefixes
from baco.engine.runner import ModelRunner
from baco.engine.scheduler import MANY_CHUNKS, Scheduler
from baco.engine.scoring import Scoring
from baco.engine.sequence import Request, SequenceState
from baco.engine.speculative.cost_model import DraftPlanner
from baco.engine.speculative.proposer import Proposer
from baco.engine.verify import Choose, Verifier, VerifyResult, route
from baco.errors import BacoError
from baco.kv_cache.prefix_cache import PrefixCache
from baco.kv_cache.protocol import KVCache
from baco.models.model import PairModel
from baco.models.pair import Pair
from baco.routing.router import Router, hidden_widths
from baco.source import MODELS


class ScheduledEngine:
    """What engines share: a batch that a scheduler fills within the memory budget.

    Args:
        runner: of the models.
        batch: the sequences that run together.
        width: tokens of a row of logits.
        max_rows: sequences decoded at once; more wait.
        memory: limit for caches and the step's tensors, as
            :func:`baco.engine.budget.cache_bytes` reads it.
        chunks_per_step: chunks of prompts that are read between two steps.
        prefix_cache: keeps what the models have read of prompts and answers; None to keep nothing.
        joint: one forward reads both models' rows.
    """

    def __init__(
        self,
        runner: ModelRunner,
        batch: Batch,
        width: int,
        *,
        max_rows: int,
        memory: int | float | str | None,
        chunks_per_step: int,
        prefix_cache: PrefixCache | None,
        joint: bool = False,
    ) -> None:
        models = runner.models
        devices = {model.device for model in models.values()}
        kept_bytes = 0 if prefix_cache is None else prefix_cache.bytes
        limit = cache_bytes(memory, devices, kept_bytes)
        budget = Budget(limit, models, width, joint=joint)
        keep = limit if memory is not None else cache_bytes(KEPT_SHARE, devices, kept_bytes)
        kept = KeptPrefixes(runner, budget, prefix_cache, keep)
        most = min(model.max_rows for model in models.values()) // (2 if joint else 1)
        self._runner, self._batch, self._prefix_cache = runner, batch, prefix_cache
        self._scheduler = Scheduler(
            runner, batch, budget, kept, min(max_rows, most), chunks_per_step
        )

    def score(self, scoring: Scoring) -> None:
        """Queue a text to be scored; `Scoring.done` tells when it was.

        Raises:
            BacoError: memory cannot hold it.
        """
        self._scheduler.score(scoring)

    def stop_scoring(self, scoring: Scoring) -> None:
        """Drop a text that is no longer to be scored."""
        self._scheduler.drop_text(scoring)

    def stop(self, sequence: SequenceState, tokens: int) -> None:
        """End a sequence early and keep its first ``tokens`` tokens; it leaves the batch."""
        sequence.finish_reason = "stop"
        self._scheduler.drop(sequence)
        sequence.cut(tokens)

    def forget_prefixes(self) -> None:
        """Drop what is kept of earlier prompts and answers."""
        if self._prefix_cache is not None:
            self._prefix_cache.clear()

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return self._scheduler.busy

    @property
    def waiting(self) -> int:
        """Sequences that have no row yet."""
        return self._scheduler.waiting

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._batch)


class Engine(ScheduledEngine):
    """Decodes requests on one pair, each with its own router.

    Args:
        pair: the two models.
        max_rows: sequences decoded at once; more wait.
        memory: limit for caches and the step's tensors, as
            :func:`baco.engine.budget.cache_bytes` reads it.
        speculate: draft tokens where that pays. Answers are the same without.
        draft: a small model of the same vocabulary that drafts.
        choose: replaces routing, for methods that no router can express.
        chunks_per_step: chunks of prompts that are read between two steps: few where a client waits
            for the next token, many where all answers are wanted soon. Answers are the same.
        prefix_cache: keeps what the models have read of prompts and answers, for later requests to
            this engine and to others of the same pair; None to keep nothing. Answers are the same.
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
        chunks_per_step: int = MANY_CHUNKS,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        pair.check_one_tokenizer("this method")
        self.pair = pair
        device, vocabulary = pair.aligned.device, pair.vocabulary
        models = {"base": pair.base, "aligned": pair.aligned}
        if draft is not None and speculate:
            models["draft"] = draft
        batch = Batch(device, vocabulary.size, pair.tokens_with)
        self._verifier = Verifier(
            vocabulary.to(device), pair.banned.to(device), choose, tuple(sorted(pair.end_ids))
        )
        joint = None if isinstance(pair.joint, str) else pair.joint.new_cache()
        runner = ModelRunner(models, batch, self._verifier, joint)
        super().__init__(
            runner,
            batch,
            vocabulary.size,
            max_rows=max_rows,
            memory=memory,
            chunks_per_step=chunks_per_step,
            prefix_cache=prefix_cache,
            joint=joint is not None,
        )
        planner = None
        if speculate and runner.can_roll_back:
            sizes = {name: model.size for name, model in models.items()}
            planner = DraftPlanner.of(
                sizes, vocabulary.size, pair.aligned.kernels, joint=joint is not None
            )
        self._proposer = Proposer(runner, batch, self._verifier.banned, planner)
        self._retried: set[SequenceState] = set()  # rows run once more because of damaged logits
        self.stats = Stats(self._runner.caches)

    @torch.inference_mode()
    def step(self) -> list[SequenceState]:
        """Append tokens to every sequence in the batch, and return these sequences. A step appends
        at least one, except where a sequence ends its thinking.

        A bounded number of tokens of waiting prompts and texts is read first.
        """
        self._scheduler.schedule()  # admit within the memory budget, drop finished sequences
        if not self._batch.rows:
            return []
        positions = 1 if self._batch.sibling_aware else self._scheduler.max_positions
        draft = self._proposer.propose(positions)
        logits = self._runner.forward(draft)  # both models; one is skipped where it cannot matter
        result = self._verifier.verify(draft, logits)  # route, mask, sample, accept
        return self._commit(draft, logits, result)  # append tokens, roll back the caches

    def _commit(self, draft: Draft, logits: Logits, result: VerifyResult) -> list[SequenceState]:
        rows = list(self._batch.rows)
        lengths = [len(row.tokens) for row in rows]
        accepted, damage = commit_tokens(rows, draft.positions, result, self.pair.end_ids)
        self._retried = end_damaged_rows(rows, damage, self._runner, self._retried)
        if self._retried:
            self._proposer.pause()
        self._batch.advance(lengths)
        self._runner.roll_back()
        if damage:
            self._runner.clear(damage)
        self._proposer.update(draft, logits, lengths, accepted)
        self.stats.update(rows, lengths, draft.counts, accepted)
        return rows

    def add(self, request: Request) -> list[SequenceState]:
        """Queue the n samples of a request.

        Raises:
            BacoError: its prompt fits no context window, or memory cannot hold one answer; or it
                has a structure, and something else than routing chooses the sources; or its router
                reads hidden states that the models do not return.
        """
        if request.constraint is not None and self._verifier.choose is not route:
            kind = request.constraint.structure.kind
            raise BacoError(f"this method cannot hold answers to a {kind}: leave it out")
        self._keep_hidden_states(request.router)
        return self._scheduler.add(request, self._runner.prompt_room(request))

    def _keep_hidden_states(self, router: Router) -> None:
        """Let the models return the hidden states that a router reads."""
        for source, trained in hidden_widths(router).items():
            model = self.pair.model(source)
            with self.pair.lock:
                width = model.keep_hidden_states()
            if trained is not None and width != trained:
                raise BacoError(
                    f"{router.spelling} was trained on hidden states of width {trained} of its "
                    f"{source} model, and those of {model.name} have width {width}: train a router "
                    "on this pair"
                )


@dataclass(slots=True)
class Stats:
    """Running totals of an engine.

    Attributes:
        caches: the models' KV caches, which count their own forwards.
        steps: the number of steps that had rows to decode.
        tokens: generated, by source; tokens from both models are in neither.
        drafted, accepted: draft tokens, and those of them that were accepted.
    """

    caches: Mapping[str, KVCache]
    steps: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: {"base": 0, "aligned": 0})
    drafted: int = 0
    accepted: int = 0

    def resume(self, past: "Stats") -> None:
        """Start from another engine's totals; forwards are counted by the caches."""
        self.steps, self.tokens = past.steps, dict(past.tokens)
        self.drafted, self.accepted = past.drafted, past.accepted

    @property
    def forwards(self) -> dict[str, int]:
        """Forwards of each model, prompts included."""
        return {name: cache.forwards for name, cache in self.caches.items()}

    def update(
        self,
        rows: Sequence[SequenceState],
        lengths: Sequence[int],
        drafted: Sequence[int],
        accepted: Sequence[int],
    ) -> None:
        """Count one step; the rows had ``lengths`` tokens before it."""
        self.steps += 1
        self.drafted += sum(drafted)
        self.accepted += sum(accepted)
        for row, length in zip(rows, lengths, strict=True):
            new = row.sources[length:]
            for source in MODELS:
                self.tokens[source] += new.count(source)
