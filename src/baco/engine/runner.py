"""Runs the models over the rows of a batch, and knows which tokens each has read.

A model whose logits were not needed for some steps lags behind. It reads what it missed in one
forward when it is needed again.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from baco.device import tensor_on
from baco.engine.batch import Batch
from baco.engine.draft import Draft, Logits, ModelOutput
from baco.engine.dual_stream import DualStream
from baco.engine.sequence import Request, SequenceState
from baco.engine.verify import Verifier
from baco.kv_cache.protocol import JointCache, KVCache
from baco.models.model import PairModel
from baco.routing.signals import Distribution
from baco.source import MODELS, Source

# The skip check is rarely worth its time below this share of steps in which one model sufficed.
_RARE = 0.1
# Weight of the newest step in that share, and its rise per step without a check: about every ten
# steps there is one again.
_EMA_WEIGHT, _RISE = 0.1, 0.001


@dataclass(slots=True)
class SkipStats:
    """How often one model's logits alone decided a step. When that is rare, the check is skipped.

    Attributes:
        share: of the steps, lately, by the model that ran first.
    """

    share: dict[Source, float] = field(default_factory=lambda: dict.fromkeys(MODELS, 0.5))

    def rarely_sufficient(self, model: Source) -> bool:
        """Whether the model's logits alone rarely decide a step."""
        return self.share[model] < _RARE

    def update(self, model: Source, sufficient: bool | None) -> None:
        """The model's logits decided a step or did not; None where that was not checked."""
        if sufficient is None:
            self.share[model] += _RISE
        else:
            self.share[model] += _EMA_WEIGHT * (sufficient - self.share[model])


class ModelRunner:
    """Runs the models of a pair, and a draft model if there is one, over the rows of a batch.

    Attributes:
        models: by name: ``base``, ``aligned``, ``draft``.
        caches: their KV caches; row r of each is row r of the batch.

    Args:
        joint: the cache of both models of the pair, where one forward reads the rows of both.
    """

    def __init__(
        self,
        models: Mapping[str, PairModel],
        batch: Batch,
        verifier: Verifier,
        joint: JointCache | None = None,
    ) -> None:
        self.models = dict(models)
        self.caches: dict[str, KVCache] = {}
        if joint is not None:
            self.caches |= {"base": joint.first, "aligned": joint.second}
        for name, model in models.items():
            if name not in self.caches:
                self.caches[name] = model.new_cache()
        self._joint = joint
        self._batch, self._verifier = batch, verifier
        self._skips = SkipStats()
        devices = {models[name].device for name in MODELS}
        self._two_devices = len(devices) > 1
        # Without CUDA graphs the host is busy launching kernels, and a second stream only waits.
        concurrent = batch.device.type == "cuda" and not self._two_devices
        concurrent = concurrent and self.has_static_shapes(MODELS)
        self._dual_stream = DualStream(batch.device) if concurrent else None

    # --- a step -----------------------------------------------------------------------------------

    def forward(self, draft: Draft) -> Logits:
        """Run both models at the positions of a draft, or one where the other cannot matter.

        That check is skipped where both are wanted, where it rarely succeeds, where one forward
        reads the rows of both, and on two devices, where both forwards run concurrently.
        """
        first, second = self._order(draft)
        if second is None:
            return self._logits(draft, first)
        if self._joint is not None and draft.drafter not in MODELS:
            return self._joint_logits(draft, self._joint)
        both = self._two_devices or self._verifier.wants_both(self._batch)
        if not both and self._skips.rarely_sufficient(first):
            self._skips.update(first, None)
            both = True
        if both and self._dual_stream is not None and draft.drafter not in MODELS:
            # Compiled models return no hidden states.
            forwards = (partial(self._read_logits, draft, model) for model in (first, second))
            outputs = map(ModelOutput, self._dual_stream.run(*forwards))
            one, other = (_split(draft, *own) for own in zip((first, second), outputs, strict=True))
            return _merged(one, other)
        result = self._logits(draft, first)
        if not both:
            sufficient = self._verifier.one_suffices(draft, first, result)
            self._skips.update(first, sufficient)
            if sufficient:
                return result
        return _merged(result, self._logits(draft, second))

    def _order(self, draft: Draft) -> tuple[Source, Source | None]:
        """The model that runs first, and the one that can be skipped if the first decides all.

        First is the model that drafted, else the source of the last token in most rows.
        """
        needed = self._batch.needed
        if len(needed) == 1:
            return needed[0], None
        if draft.drafter in MODELS:
            first = draft.drafter
        else:
            rows = self._batch.rows
            aligned = sum(bool(row.sources) and row.sources[-1] == "aligned" for row in rows)
            first = "aligned" if 2 * aligned > len(rows) else "base"
        return first, "base" if first == "aligned" else "aligned"

    def _logits(self, draft: Draft, model: Source) -> Logits:
        """One model's logits at the positions, as the drafter left them or from a forward."""
        if draft.drafter == model:
            assert draft.logits is not None
            return Logits({model: draft.logits})
        return _split(draft, model, self._read_draft(draft, model))

    def _joint_logits(self, draft: Draft, joint: JointCache) -> Logits:
        """Both models' logits at the positions, from one forward."""
        positions = draft.positions
        counts = [count - 1 for count in positions.counts]
        outputs = self.read_both(joint, positions.draft_tokens, counts, positions.most)
        base, aligned = (_split(draft, *own) for own in zip(MODELS, outputs, strict=True))
        return _merged(base, aligned)

    def _read_draft(self, draft: Draft, model: Source) -> ModelOutput:
        positions, bonus = draft.positions, int(draft.wants_bonus)
        counts = [count - 1 + bonus for count in positions.counts]
        return self.read(model, positions.draft_tokens, counts, positions.most + bonus)

    def _read_logits(self, draft: Draft, model: Source) -> Tensor:
        return self._read_draft(draft, model).logits

    def read(
        self, name: str, draft_tokens: Tensor, counts: Sequence[int], keep: int
    ) -> ModelOutput:
        """Let a model read what it has not read of every row, and the row's first draft tokens.

        Args:
            name: of the model.
            draft_tokens: int64 [B, K or more].
            counts: how many of them to read of each row.
            keep: K, how many last tokens of each row to return logits for.

        Returns:
            What the model computes there, on the batch's device.
        """
        unread, drafted = self._to_read(name, counts)
        lengths = list(map(_num_to_read, unread, drafted))
        tokens = _flush_right(unread, draft_tokens, drafted, max(lengths))
        self.caches[name].expect_drafts(max(drafted))
        logits = self.caches[name].extend(tokens, lengths, keep)
        # The rows with the most positions may be rows that this model does not read.
        missing = keep - logits.shape[1]
        if missing > 0:
            logits = torch.nn.functional.pad(logits, (0, 0, missing, 0))
        return self._output(name, logits)

    def read_both(
        self, joint: JointCache, draft_tokens: Tensor, counts: Sequence[int], keep: int
    ) -> tuple[ModelOutput, ModelOutput]:
        """As `read`, with both models of the pair in one forward."""
        (base, base_drafted), (aligned, aligned_drafted) = (
            self._to_read(model, counts) for model in MODELS
        )
        base_lengths = list(map(_num_to_read, base, base_drafted))
        aligned_lengths = list(map(_num_to_read, aligned, aligned_drafted))
        span = max(*base_lengths, *aligned_lengths)
        tokens = (
            _flush_right(base, draft_tokens, base_drafted, span),
            _flush_right(aligned, draft_tokens, aligned_drafted, span),
        )
        logits = joint.extend(tokens, (base_lengths, aligned_lengths), keep)
        return self._output("base", logits[0]), self._output("aligned", logits[1])

    def read_rows(self, name: str, unread: Sequence[Sequence[int]]) -> Tensor:
        """Let a model read some tokens of every row.

        Args:
            name: of the model.
            unread: the tokens; empty for a row that reads nothing.

        Returns:
            Raw logits after the last token of each row, float32 [B, V], on the batch's device;
            undefined for a row that read nothing.
        """
        counts = [len(tokens) for tokens in unread]
        none = torch.empty(len(unread), 0, dtype=torch.int64)
        tokens = _flush_right(unread, none, [0] * len(unread), max(counts))
        return self._to_batch(name, self.caches[name].extend(tokens, counts, 1)[:, -1])

    def _to_read(self, name: str, counts: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        """What a model reads of every row: the tokens that it has not read, and how many of
        ``counts`` draft tokens.
        """
        rows, lengths = self._batch.rows, self.caches[name].lengths
        unread = [self._unread(name, row, lengths[at]) for at, row in enumerate(rows)]
        pairs = zip(counts, rows, strict=True)
        return unread, [count if row.needs(name) else 0 for count, row in pairs]

    def _output(self, name: str, logits: Tensor) -> ModelOutput:
        """From what a cache returned, [B, K, width]."""
        if name not in self._batch.read_hidden_states:
            return ModelOutput(self._to_batch(name, logits))
        hidden_states = self.models[name].hidden_states(logits).to(self._batch.device)
        return ModelOutput(self._to_batch(name, logits), hidden_states)

    def _to_batch(self, name: str, logits: Tensor) -> Tensor:
        """A model's logits on the common vocabulary, on the batch's device."""
        return self.models[name].to_common_vocab(logits).to(self._batch.device)

    def _unread(self, name: str, row: SequenceState, length: int) -> list[int]:
        """The tokens of a row that a model has still to read, where it has read ``length``."""
        if not row.needs(name):
            return []
        prompt, tokens = row.request.ids(name), row.tokens_of(name)
        if length >= len(prompt):
            return tokens[length - len(prompt) :]
        return [*prompt[length:], *tokens]

    def catch_up(self, most: int) -> None:
        """Let models that lag behind by more than ``most`` tokens read these, so that no step reads
        very many.
        """
        rows = self._batch.rows
        for name, cache in self.caches.items():
            behind = [
                _length(row, name) - length
                for row, length in zip(rows, cache.lengths, strict=True)
                if row.needs(name)
            ]
            if sum(behind) - len(behind) <= most:
                continue
            context = self.models[name].context
            unread = [
                self._unread(name, row, cache.lengths[at])[:-1]
                if _length(row, name) <= context
                else []
                for at, row in enumerate(rows)
            ]
            counts = [len(tokens) for tokens in unread]
            if sum(counts) > most:
                no_drafts = torch.empty(len(unread), 0, dtype=torch.int64)
                tokens = _flush_right(unread, no_drafts, [0] * len(unread), max(counts))
                cache.expect_drafts(0)
                cache.extend(tokens, counts, 1)

    def draft_room(self, name: str) -> int:
        """How many draft tokens a model can read of every row: up to the end of its context window,
        and in each row with one set of rotary factors.
        """
        model = self.models[name]
        lengths = [_length(row, name) for row in self._batch.rows if row.needs(name)]
        ends = [model.context - length for length in lengths]
        if model.long_rope is not None:
            changes = (model.long_rope.original_length - length for length in lengths)
            ends += [change for change in changes if change >= 0]
        return min(ends, default=model.context)

    # --- the caches -------------------------------------------------------------------------------

    @property
    def can_roll_back(self) -> bool:
        """Whether every cache can be rolled back. Without that, nothing can be drafted."""
        return all(cache.can_roll_back for cache in self.caches.values())

    def roll_back(self) -> None:
        """Remove rejected draft tokens from all caches, and the last token of each row, which the
        next step reads.
        """
        for name in self.caches:
            self._truncate(name, -1)

    def forget_draft(self, name: str) -> None:
        """Remove draft tokens from one cache; all tokens of the rows stay."""
        self._truncate(name, 0)

    def _truncate(self, name: str, extra: int) -> None:
        lengths = [_length(row, name) + extra for row in self._batch.rows]
        self.caches[name].roll_back(lengths)

    def clear(self, rows: Iterable[int]) -> None:
        """Overwrite what damaged logits left in the caches of some rows: a masked column with NaN
        would still spread, since 0 × NaN is NaN. Of rows that have ended, everything is cleared.
        """
        ended = [row for row in rows if self._batch.rows[row].finish_reason is not None]
        for cache in self.caches.values():
            cache.clear([row for row in rows if row not in ended], ended)

    def admit(self, prefixes: Mapping[str, Any], count: int) -> None:
        """Append ``count`` rows that continue a prompt."""
        for name, cache in self.caches.items():
            cache.copy_prefix(prefixes.get(name), count)

    def reorder(self, order: Sequence[int]) -> None:
        """Keep the rows ``order``, in that order."""
        for cache in self.caches.values():
            cache.drop(kept=order)

    # --- prompts and memory -----------------------------------------------------------------------

    def readers(self, request: Request) -> list[str]:
        """The models that read a request's prompt. A draft model with a context window too short
        for it does not, and drafts nothing.
        """
        return [
            name
            for name, model in self.models.items()
            if request.needs(name) and len(request.ids(name)) <= model.context
        ]

    def prompt_room(self, request: Request) -> dict[Source, int]:
        """How many tokens fit behind a request's prompt in each model that needs it.

        Raises:
            BacoError: the prompt fits no context window, or has tokens without an embedding.
        """
        rooms = dict[Source, int]()
        for name in MODELS:
            if request.needs(name):
                self.models[name].check_prompt(name, request.ids(name))
                rooms[name] = self.models[name].context - len(request.ids(name))
        return rooms

    def tokens_to_prefill(self, request: Request) -> int:
        """How many tokens :meth:`prefill` reads at most, of all models together."""
        return sum(len(request.ids(name)) - 1 for name in self.readers(request))

    def prefill(
        self, request: Request, begun: Mapping[str, Any]
    ) -> Generator[int, None, dict[str, Any]]:
        """Read a request's prompt with every model that needs it, once for all samples.

        Args:
            request: with the prompt.
            begun: by model, what is cached of the prompt already, if anything.

        Yields:
            The number of tokens of each chunk.

        Returns:
            What :meth:`admit` takes.
        """
        prefixes = {}
        for name in self.readers(request):
            # The first step reads the last token, like every later token.
            ids, cache = request.ids(name)[:-1], self.caches[name]
            prefixes[name] = yield from cache.prefill(ids, request.params.n, begun=begun.get(name))
        return prefixes

    def copied_tokens(self, name: str, request: Request) -> int:
        """Tokens of the prompt that a model's cache copies for each sample: all, or none where the
        samples share it.
        """
        tokens = len(request.ids(name))
        return 0 if self.caches[name].shares_prefix(tokens - 1, request.params.n) else tokens

    def allocated_bytes(self) -> dict[str, int]:
        """Bytes of each model's cache, which can have room for more than its rows need."""
        return {name: cache.allocated_bytes() for name, cache in self.caches.items()}

    def shrink(self, columns: Mapping[str, int]) -> None:
        """Shrink the caches to their rows, with at most ``columns`` columns each."""
        for name, cache in self.caches.items():
            cache.shrink(columns[name])

    def has_static_shapes(self, names: Iterable[str]) -> bool:
        """Whether these models' caches stay at their addresses while rows are decoded."""
        return all(self.caches[name].static_shapes for name in names)

    def preallocate(self, rows: int, columns: Mapping[str, int]) -> None:
        """Make room for rows of ``columns`` columns at once, in caches that stay at their
        addresses.
        """
        for name, cache in self.caches.items():
            cache.preallocate(rows, columns[name])


def _length(row: SequenceState, name: str) -> int:
    """The tokens of a row as a model reads it, prompt included."""
    return len(row.request.ids(name)) + len(row.tokens_of(name))


def _split(draft: Draft, model: Source, output: ModelOutput) -> Logits:
    """From what a forward returned for the last Q or Q + 1 tokens to what is at the positions."""
    (logits, hidden_states), flatten = output, draft.positions.flatten
    bonus = None
    if draft.wants_bonus:
        bonus, logits = logits[:, -1], logits[:, :-1]
        hidden_states = None if hidden_states is None else hidden_states[:, :-1]
    read = None if hidden_states is None else flatten(hidden_states)
    return Logits({model: Distribution(flatten(logits), hidden_states=read)}, bonus)


def _merged(one: Logits, other: Logits) -> Logits:
    bonus = other.bonus if one.bonus is None else one.bonus
    return Logits({**one.of, **other.of}, bonus)


def _flush_right(
    unread: Sequence[Sequence[int]], draft_tokens: Tensor, counts: Sequence[int], span: int
) -> Tensor:
    """Unread tokens of each row and its first draft tokens, padded on the left: int64 [B, span].

    Rows are padded with a token that they read anyway. Another one could have damaged logits.
    """
    most = max(counts)
    if most == 0:
        rows = [_padding(row, span - len(row)) + list(row) for row in unread]
        return torch.tensor(rows, dtype=torch.int64)
    device = draft_tokens.device
    if all(count == most for count in counts):
        rows = [_padding(row, span - most - len(row)) + list(row) for row in unread]
        before = tensor_on(device, rows, torch.int64)
        return torch.cat((before, draft_tokens[:, :most]), dim=1)
    pairs = zip(unread, counts, strict=True)
    rows = [[*_padding(row, span - n - len(row)), *row, *([0] * n)] for row, n in pairs]
    before = tensor_on(device, rows, torch.int64)
    offset = torch.arange(span, device=device) - span + tensor_on(device, counts)[:, None]
    return torch.where(offset < 0, before, draft_tokens.gather(1, offset.clamp_min(0)))


def _num_to_read(unread: Sequence[int], drafted: int) -> int:
    return len(unread) + drafted


def _padding(row: Sequence[int], count: int) -> list[int]:
    return list(row[:1] or [0]) * count
