"""The sequences that are decoded together, as tensors with a row for each and no holes."""

from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baco.device import tensor_on
from baco.engine.sequence import MAX_DRAFT_TOKENS, Request, SequenceState
from baco.errors import BacoError, Failure
from baco.routing.combiners import Combination
from baco.routing.router import Router, hidden_widths, is_sibling_aware, is_stateful
from baco.routing.signals import Allowed
from baco.routing.word_boundaries import NO_TOKEN, Switch
from baco.sampling.constraint import Mask, Place, unpack
from baco.sampling.noise import noise_keys
from baco.sampling.params import SamplingParams
from baco.sampling.repetition import dry_penalties, in_window
from baco.sampling.sampler import SamplingTensors
from baco.sampling.sampler_chain import Chain, Context, apply_chains, parse_chain
from baco.source import MODELS, Source

# Token counts shrink when their tables have room for more than this many times the rows.
_MAX_IDLE_RATIO = 4
# Noise keys are computed for this many positions of every row at once.
_KEY_SPAN = 64


class Batch:
    """What a step reads of every row, on the device where tokens are drawn.

    Attributes:
        rows: the sequences, in the order of the tensors.
        routers: the routers of the rows, and where each may switch the source; without repeats.
        router_index: which of them each row uses, int64 [B].
        stateful: whether any of them reads the answers so far.
        sibling_aware: whether any of them reads earlier samples. Then every row gets one token a
            step, so that no sample is ahead of an earlier one.
        read_hidden_states: the models whose hidden states any of them reads.
        sampling: the rows' sampling parameters.
        chains: the samplers that the rows name; without repeats.
        chain_index: which of them each row uses, int64 [B].
        combinations: those of the routers that are combiners, by their index.
        requests: of the rows, without repeats.
        needed: the models of the pair that any row needs for its next token.
        thinking: the rows that have not begun their answers, bool [B]; None where all have.
        structured: whether the answer of any row has a structure.
    """

    def __init__(
        self,
        device: Any,
        vocabulary_size: int,
        tokens_with: Callable[[tuple[str, ...]], Sequence[int]] = lambda _: (),
    ) -> None:
        """Create an empty batch.

        Args:
            device: where tokens are drawn.
            vocabulary_size: V.
            tokens_with: returns the tokens that contain any of some texts.
        """
        self.device, self._vocabulary_size = device, vocabulary_size
        self._tokens_with = tokens_with
        self._breaks: dict[tuple[str, ...], NDArray[np.bool_]] = {}
        self._offsets = torch.arange(MAX_DRAFT_TOKENS + 1, device=device)
        self.rows: list[SequenceState] = []
        self._counts: TokenCounts | None = None  # where any row has penalties
        self._set([])

    def __len__(self) -> int:
        return len(self.rows)

    def admit(self, sequences: list[SequenceState]) -> None:
        """Append rows."""
        # Where the tokenizers differ, each model has ids of its own, which may change.
        counted = [row.request for row in sequences if not row.request.shares_text]
        if self._counts is None and any(request.params.penalises for request in counted):
            self._counts = TokenCounts(self.device, self._vocabulary_size)
            self._counts.admit(0, self.rows)
        if self._counts is not None:
            self._counts.admit(len(self.rows), sequences)
        self._set([*self.rows, *sequences])

    def reorder(self, order: Sequence[int]) -> None:
        """Keep the rows ``order``, in that order."""
        self._set([self.rows[row] for row in order])
        if not self.sampling.any_penalty:
            self._counts = None
        elif self._counts is not None:
            self._counts.reorder(order)

    def _set(self, rows: list[SequenceState]) -> None:
        self.rows = rows
        params = [row.request.params for row in rows]
        self.sampling = SamplingTensors.of(params, self.device)
        named = list(dict.fromkeys(p.samplers for p in params))
        self.chains: list[Chain] = [parse_chain(spellings) for spellings in named]
        chains = [named.index(p.samplers) for p in params]
        self.chain_index = tensor_on(self.device, chains, torch.int64)
        self.reads_history = any(p.reads_history for p in params)
        self.structured = any(row.request.constraint is not None for row in rows)
        noise = [(row.request.noise_seed, row.sample) for row in rows]
        self._noise = tensor_on(self.device, noise, torch.int64).view(-1, 2)
        self.requests = list(dict.fromkeys(row.request for row in rows))
        self._set_routers()
        self._row = torch.arange(len(rows), device=self.device)[:, None]
        # The noise keys of a span of positions, and where the span begins in each row.
        self._span_keys = torch.empty(0)
        self._span_start = [-_KEY_SPAN] * len(rows)
        self._keys: Tensor | None = None

    def _set_routers(self) -> None:
        answering = [row.phase == "answer" for row in self.rows]
        self._num_answering = sum(answering)
        self.thinking: Tensor | None = None
        if not all(answering):
            self.thinking = ~tensor_on(self.device, answering, torch.bool)
        self.needed: list[Source] = [
            model for model in MODELS if any(row.needs(model) for row in self.rows)
        ]
        routers = [(row.router, row.request.switch) for row in self.rows]
        self.routers: list[tuple[Router, Switch]] = list(dict.fromkeys(routers))
        self.combinations = {
            number: router
            for number, (router, _) in enumerate(self.routers)
            if isinstance(router, Combination)
        }
        self.stateful = any(is_stateful(router) for router, _ in self.routers)
        self.sibling_aware = any(is_sibling_aware(router) for router, _ in self.routers)
        self.read_hidden_states = {
            model for router, _ in self.routers for model in hidden_widths(router)
        }
        index = [self.routers.index(router) for router in routers]
        self.router_index = tensor_on(self.device, index)

    def last_tokens(self) -> Tensor:
        """The last token of each answer, int64 [B]; ``NO_TOKEN`` where it has none."""
        last = [
            row.tokens[-1] if len(row.tokens) > row.num_thinking else NO_TOKEN for row in self.rows
        ]
        return tensor_on(self.device, last, torch.int64)

    def last_sources(self) -> Tensor:
        """The source of that token, bool [B], True for the base model."""
        base = [bool(row.sources) and row.sources[-1] == "base" for row in self.rows]
        return tensor_on(self.device, base, torch.bool)

    def noise_keys(self) -> Tensor:
        """The noise keys of each row's next positions, as many as a step can decide: int64
        [B, MAX_DRAFT_TOKENS + 1, 2].
        """
        if self._keys is None:
            lengths = [len(row.tokens) for row in self.rows]
            used = [now - start for now, start in zip(lengths, self._span_start, strict=True)]
            if not used or max(used) + len(self._offsets) > _KEY_SPAN:
                self._span_start, used = lengths, [0] * len(lengths)
                start = tensor_on(self.device, [[length] for length in lengths])
                seed, sample = self._noise[:, :1], self._noise[:, 1:]
                span = torch.arange(_KEY_SPAN, device=self.device)
                self._span_keys = noise_keys(seed, sample, start + span)
            next_position = tensor_on(self.device, used)[:, None]
            self._keys = self._span_keys[self._row, next_position + self._offsets]
        return self._keys

    def allowed(
        self, drafted: Sequence[Sequence[int]], *, last_only: bool = False
    ) -> Allowed | None:
        """What the structures of the answers allow after them and after each draft token.

        Args:
            drafted: draft tokens of each row.
            last_only: only after the last draft token of each row.

        Returns:
            For the positions of all rows, row by row; None where anything goes. A row whose
            structure cannot be followed gets an ``error``.
        """
        at, masks, forced = list[int](), list[Mask](), list[bool]()
        places, positions = list[Place](), list[tuple[int, int]]()
        for index, (row, tokens) in enumerate(zip(self.rows, drafted, strict=True)):
            constraint, automaton = row.request.constraint, row.automaton
            count = 1 if last_only else len(tokens) + 1
            positions += [(index, end) for end in range(len(tokens) + 1)][-count:]
            if constraint is None:
                forced += [False] * count
                places += [Place.INSIDE] * count
                continue
            at += range(len(forced), len(forced) + count)
            own, own_places = [constraint.before] * count, [Place.INSIDE] * count
            own_forced = [False] * count
            if automaton is not None:
                try:
                    masks_of, places_of = automaton.follow(row.answer, tokens)
                    own, own_places = masks_of[-count:], places_of[-count:]
                    own_forced = [automaton.is_forced(mask) for mask in own]
                except BacoError as error:
                    # The step gives it no token, and ends it.
                    row.error = Failure("structure", str(error))
            masks += own
            forced += own_forced
            places += own_places
        if not masks:
            return None

        def ends_text(position: int, token: int) -> bool:
            index, end = positions[position]
            row = self.rows[index]
            return row.automaton is not None and row.automaton.ends_text(
                row.answer, drafted[index][:end], token
            )

        return Allowed(
            tensor_on(self.device, at, torch.int64),
            unpack(torch.from_numpy(np.stack(masks)).to(self.device), self._vocabulary_size),
            tensor_on(self.device, forced, torch.bool),
            tensor_on(self.device, [place is not Place.STRUCTURE for place in places], torch.bool),
            tensor_on(self.device, [place is Place.BEGINNING for place in places], torch.bool),
            ends_text,
        )

    def token_counts(
        self, row: Tensor, source: Tensor, draft_tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What penalties depend on, at N positions.

        Args:
            row: of each position, int64 [N].
            source: there, bool [N], True for the base model.
            draft_tokens: between the answer so far and the position, int64 [N, K]; the vocabulary's
                size where there are fewer.

        Returns:
            Whether the source's prompt has each token, bool [N, V], and how often the answer has
            it, int32 [N, V].
        """
        assert self._counts is not None
        base, aligned = (self._counts.in_prompt[model][row] for model in MODELS)
        in_prompt = torch.where(source[:, None], base, aligned)
        in_answer = torch.nn.functional.pad(self._counts.in_answer[row], (0, 1))
        ones = torch.ones_like(draft_tokens, dtype=in_answer.dtype)
        in_answer.scatter_add_(1, draft_tokens, ones)
        return in_prompt, in_answer[:, :-1]

    def count_in_windows(
        self,
        counts: tuple[Tensor, Tensor],
        row: Tensor,
        source: Tensor,
        drafted: Sequence[Sequence[int]],
    ) -> None:
        """Replace the counts at the positions of rows whose penalties have a window, in place.

        Args:
            counts: what `token_counts` returned.
            row, source: as for `token_counts`.
            drafted: the draft tokens before each position.
        """
        in_prompt, in_answer = counts
        for at, params, prompt, answer in self._histories(row, source, drafted):
            if params.penalises and params.repetition_window:
                prompt, answer = in_window(prompt, answer, params.repetition_window)  # noqa: PLW2901
                in_prompt[at] = False
                in_prompt[at].index_fill_(
                    0, tensor_on(self.device, list(prompt), torch.int64), True
                )
                tokens = tensor_on(self.device, answer, torch.int64)
                in_answer[at] = 0
                in_answer[at].index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.int32))

    def run_dry(
        self, logits: Tensor, row: Tensor, source: Tensor, drafted: Sequence[Sequence[int]]
    ) -> None:
        """Subtract DRY's penalties from logits [N, V] in place; arguments as for
        `count_in_windows`.
        """
        for at, params, prompt, answer in self._histories(row, source, drafted):
            if params.dry_multiplier:
                history = np.array([*prompt, *answer], dtype=np.int64)
                penalties = dry_penalties(history, self._breaks_of(params.dry_breakers), params)
                for token, penalty in penalties.items():
                    logits[at, token] -= penalty

    def _histories(
        self, row: Tensor, source: Tensor, drafted: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, SamplingParams, tuple[int, ...], list[int]]]:
        """Of every position: its index, the row's parameters, its source's prompt, its answer."""
        positions = zip(row.tolist(), source.tolist(), drafted, strict=True)
        for at, (index, is_base, after) in enumerate(positions):
            sequence = self.rows[index]
            request = sequence.request
            if request.params.reads_history:
                prompt = request.ids("base" if is_base else "aligned")
                yield at, request.params, prompt, [*sequence.tokens, *after]

    def _breaks_of(self, breakers: tuple[str, ...]) -> NDArray[np.bool_]:
        """The tokens that break a sequence, bool [V]."""
        if breakers not in self._breaks:
            breaks = np.zeros(self._vocabulary_size, dtype=np.bool_)
            breaks[list(self._tokens_with(breakers))] = True
            self._breaks = {**dict(list(self._breaks.items())[-15:]), breakers: breaks}
        return self._breaks[breakers]

    def run_samplers(
        self,
        logits: Tensor,
        row: Tensor | None,
        keys: Tensor,
        drafted: Callable[[], Sequence[Sequence[int]]],
        is_base: Tensor | bool,
    ) -> Tensor:
        """Run the rows' samplers at N positions.

        Args:
            logits: float32 [N, V], left as they are.
            row: of each position, int64 [N]; None for one position of each row.
            keys: noise keys of the positions, int64 [N, 2].
            drafted: returns the draft tokens before each position; called only if a sampler reads
                tokens.
            is_base: where the base model writes, bool [N]; or whether it writes everywhere.

        Returns:
            float32 [N, V].
        """
        if not any(self.chains):
            return logits

        def tokens() -> Tensor:
            rows = self.rows if row is None else [self.rows[index] for index in row.tolist()]
            answers = [
                [*sequence.tokens, *after] for sequence, after in zip(rows, drafted(), strict=True)
            ]
            return padded_tokens(answers, self.device)

        if isinstance(is_base, bool):
            is_base = torch.full((len(logits),), is_base, device=self.device)
        index = self.chain_index if row is None else self.chain_index[row]
        return apply_chains(logits, self.chains, index, Context(tokens, keys, is_base))

    def advance(self, lengths: Sequence[int]) -> None:
        """Take note of the tokens that the rows got since they had ``lengths`` tokens."""
        if self.sibling_aware:
            aware = [is_sibling_aware(row.request.router) for row in self.rows]
            for row, length in compress(zip(self.rows, lengths, strict=True), aware):
                row.note_endings(length)
            for row in compress(self.rows, aware):
                row.count_tokens()
        self._keys = None
        if self._num_answering != sum(row.phase == "answer" for row in self.rows):
            self._set_routers()
        if self._counts is not None:
            self._counts.add(0, self.rows, lengths)


def padded_tokens(answers: Sequence[Sequence[int]], device: Any) -> Tensor:
    """The tokens of each answer in the last columns of its row, ``NO_TOKEN`` before: int64 [N, T].

    T is the length of the longest one.
    """
    longest = max(map(len, answers), default=0)
    padded = [[NO_TOKEN] * (longest - len(answer)) + [*answer] for answer in answers]
    return tensor_on(device, padded, torch.int64).view(len(answers), longest)


class TokenCounts:
    """The token counts that penalties depend on, in tables with a row for each row of the batch.

    Rows are counted when they join and as they grow, never again. Rows without penalties are not
    counted, since nothing reads their counts.

    Attributes:
        in_answer: how often the answer has each token, int32 [B or more, V].
        in_prompt: by model, whether the prompt has each token, bool [B or more, V].
    """

    def __init__(self, device: Any, vocabulary_size: int) -> None:
        self.device, self._size = device, vocabulary_size
        self.in_answer = torch.zeros(0, self._size, dtype=torch.int32, device=device)
        self.in_prompt = {
            model: torch.zeros(0, self._size, dtype=torch.bool, device=device) for model in MODELS
        }

    def admit(self, first: int, rows: Sequence[SequenceState]) -> None:
        """Count rows that join as row ``first`` and those after it."""
        if first + len(rows) > len(self.in_answer):
            self._resize(max(first + len(rows), len(self.in_answer) * 5 // 4))
        first_row: dict[Request, int] = {}
        for at, row in enumerate(rows, first):
            self.in_answer[at] = 0
            counted = first_row.setdefault(row.request, at)
            for model, table in self.in_prompt.items():
                if counted != at:
                    table[at] = table[counted]
                    continue
                table[at] = False
                if row.request.params.penalises:
                    ids = tensor_on(self.device, list(row.request.ids(model)), torch.int64)
                    table[at].index_fill_(0, ids, True)
        self.add(first, rows, [0] * len(rows))

    def add(self, first: int, rows: Sequence[SequenceState], lengths: Sequence[int]) -> None:
        """Count the tokens of rows, from row ``first`` on, beyond their first ``lengths``."""
        places = [
            at * self._size + token
            for at, (row, length) in enumerate(zip(rows, lengths, strict=True), first)
            if row.request.params.penalises
            for token in row.tokens[length:]
        ]
        index = tensor_on(self.device, places, torch.int64)
        self.in_answer.view(-1).scatter_add_(0, index, torch.ones_like(index, dtype=torch.int32))

    def reorder(self, order: Sequence[int]) -> None:
        """Keep the rows ``order``, in that order."""
        moved = [(new, old) for new, old in enumerate(order) if new != old]
        if moved:
            new, old = (list(column) for column in zip(*moved, strict=True))
            for table in (self.in_answer, *self.in_prompt.values()):
                table[new] = table[old]
        if len(order) * _MAX_IDLE_RATIO < len(self.in_answer):
            self._resize(len(order))

    def _resize(self, rows: int) -> None:
        def resized(table: Tensor) -> Tensor:
            copy = table.new_zeros(rows, self._size)
            copy[: len(table)] = table[:rows]
            return copy

        self.in_answer = resized(self.in_answer)
        self.in_prompt = {model: resized(table) for model, table in self.in_prompt.items()}
