"""Continuous batching: chunked prefill, admission within the memory limit, dropping of ended rows.

Between two steps it reads a bounded number of tokens, whatever is waiting. Requests are served in
order, but a short prompt does not wait until a long one has been read.
"""

import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from baco.engine.batch import Batch
from baco.engine.budget import Budget, Needs
from baco.engine.kept_prefixes import KeptPrefixes
from baco.engine.runner import ModelRunner
from baco.engine.scoring import Scoring, score
from baco.engine.sequence import MAX_DRAFT_TOKENS, Request, SequenceState
from baco.errors import BacoError, failure_message
from baco.routing.router import is_sibling_aware
from baco.source import Source

log = logging.getLogger("baco")

# Columns that a row may take beyond its tokens: draft tokens after its last one, and padding.
SPARE_COLUMNS = MAX_DRAFT_TOKENS + 1
# Chunks of prompts and texts that are read between two steps, half as many where they are long: few
# where a client waits for the next token, many where all answers are wanted soon.
FEW_CHUNKS, MANY_CHUNKS = 2, 32
# Copying this many tokens of a kept prefix counts as reading one.
_COPIED_PER_READ = 32
# Requests behind the first among which a short prompt is looked for.
_LOOKAHEAD = 64


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request of which some samples have no row yet.

    Attributes:
        number: requests and texts are numbered in the order they come.
        request: the request.
        sequences: these samples.
        unread: tokens of its prompt that are still to be read, of all models together.
        prefill: the prefill of its prompt, once begun.
        prefixes: its prompt in each model's cache, once read.
    """

    number: int
    request: Request
    sequences: deque[SequenceState]
    unread: int
    prefill: Generator[int, None, dict[str, Any]] | None = None
    prefixes: dict[str, Any] | None = None


@dataclass(slots=True, eq=False)
class _Text:
    """A text to be scored."""

    number: int
    scoring: Scoring
    scores: Generator[int, None, None] | None = None  # once begun


@dataclass(frozen=True, slots=True)
class _RequestSize:
    """What a row of a request needs.

    Attributes:
        columns: of each model's cache, at the row's full length.
        attended: tokens that the row attends to in each model, a shared prompt included.
        prompt: bytes of the prompt, beside its rows.
        shared: bytes of the prompt that are held as long as rows share it.
    """

    columns: dict[str, int]
    attended: dict[str, int]
    prompt: int
    shared: int


class Scheduler:
    """Decides before each step which rows are in the batch, and reads what waits.

    Args:
        runner: reads prompts, and holds the rows' caches.
        batch: the rows.
        budget: the memory limit.
        kept: prefixes of earlier prompts and answers.
        max_rows: sequences decoded at once; more wait.
        chunks_per_step: chunks of prompts and texts that are read between two steps of a few rows.

    Attributes:
        max_positions: how many positions of each row the next step may decide.
    """

    def __init__(
        self,
        runner: ModelRunner,
        batch: Batch,
        budget: Budget,
        kept: KeptPrefixes,
        max_rows: int,
        chunks_per_step: int,
    ) -> None:
        self._runner, self._batch, self.budget, self._kept = runner, batch, budget, kept
        self._max_rows, self._chunks_per_step = max_rows, chunks_per_step
        self._numbers = count()
        self._waiting: dict[int, _Waiting] = {}  # by number, in order
        self._held: dict[int, _Waiting] = {}  # those whose prompts take memory
        self._texts: deque[_Text] = deque()  # only the first is being read
        self._sizes: dict[Request, _RequestSize] = {}  # a cache
        self._turn = 0
        self._stuck = False  # nothing can be read until something changes
        self.max_positions = 1

    # --- the queues -------------------------------------------------------------------------------

    def add(self, request: Request, room: Mapping[Source, int]) -> list[SequenceState]:
        """Queue the samples of a request.

        Args:
            request: the request.
            room: how many tokens of each sample fit into each model's context window.

        Raises:
            BacoError: memory cannot hold one of them, even alone; or it thinks, and its router
                compares samples.
        """
        thinks = request.thinking is not None
        limit = min(request.params.max_tokens, room["aligned"] if thinks else min(room.values()))
        answer_limit = room.get("base") if thinks else None
        sequences = [
            SequenceState(request, sample, limit, answer_limit)
            for sample in range(request.params.n)
        ]
        if is_sibling_aware(request.router):
            if thinks:
                raise BacoError(
                    f"{request.router.spelling} compares samples position by position, which "
                    "thinking shifts: turn it off (--no-thinking), or leave out siblings=, "
                    "distinct= and over="
                )
            for sequence in sequences:
                sequence.earlier = sequences[: sequence.sample]
                sequence.note_endings(0)
        self._check_fits_alone("one answer", self._needs(sequences[:1], sequences[:1]))
        number, unread = next(self._numbers), self._runner.tokens_to_prefill(request)
        unread -= self._kept.matching_tokens(request)
        self._waiting[number] = _Waiting(number, request, deque(sequences), unread)
        self._stuck = False
        return sequences

    def score(self, scoring: Scoring) -> None:
        """Queue a text.

        Raises:
            BacoError: memory cannot hold it, even alone.
        """
        self._check_fits_alone("scoring the text", self._needs([], [], scoring))
        self._texts.append(_Text(next(self._numbers), scoring))
        self._stuck = False

    def _check_fits_alone(self, what: str, needs: Needs) -> None:
        total, limit = self.budget.total(needs), self.budget.limit
        if total > limit:
            raise BacoError(
                f"{what} may need {total / 2**20:.1f} MiB of cache and memory is "
                f"{limit / 2**20:.1f} MiB: lower max_tokens, shorten the prompt or raise memory"
            )

    def drop(self, sequence: SequenceState) -> None:
        """Forget a sample that was stopped, if it has no row yet."""
        if sequence.tokens:
            return
        for waiting in self._waiting.values():
            if waiting.request is sequence.request and sequence in waiting.sequences:
                waiting.sequences.remove(sequence)
                self._drop_if_empty(waiting)
                return

    def drop_text(self, scoring: Scoring) -> None:
        """Forget a text that is no longer to be scored."""
        self._texts = deque(text for text in self._texts if text.scoring is not scoring)
        self._stuck = False

    def _drop_if_empty(self, waiting: _Waiting) -> None:
        self._stuck = False
        if not waiting.sequences:
            del self._waiting[waiting.number]
            self._held.pop(waiting.number, None)

    @property
    def waiting(self) -> int:
        """Sequences that have no row yet."""
        return sum(len(waiting.sequences) for waiting in self._waiting.values())

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._waiting) or bool(self._texts) or len(self._batch) > 0

    # --- before a step ----------------------------------------------------------------------------

    def schedule(self) -> None:
        """Drop ended rows, read a bounded number of tokens, and admit rows with a read prompt."""
        dropped = self._drop_ended_rows()
        if dropped or not self._stuck:
            self._read_and_admit()
            needs = self._needs(self._batch.rows, self._next_samples(), self._text())
            allocated = self._runner.allocated_bytes()
            self.max_positions = self.budget.positions(needs, MAX_DRAFT_TOKENS + 1, allocated)
            step = self.budget.total(needs, positions=self.max_positions, allocated=allocated)
            self._kept.shrink(self.budget.limit - step)
        if self._batch.rows:
            self._runner.catch_up(self.budget.tokens_between_steps(len(self._batch)))

    def _read_and_admit(self) -> None:
        running, read = len(self._batch) > 0, 0
        chunks = self._chunks_per_step if running else MANY_CHUNKS
        most = max(chunks * self.budget.chunk, self.budget.tokens_between_steps(len(self._batch)))
        self._admit()
        while read < most:
            item = self._next_to_read()
            self._stuck = item is None
            if item is None:
                break
            short = self._is_short(item)
            read += self._read_text(item) if isinstance(item, _Text) else self._read_prompt(item)
            self._admit()
            # A chunk of a long text takes longer, since its tokens attend to more. Where no row
            # waits for a step, new requests can be accepted meanwhile.
            if not short and (not running or read >= most // 2):
                break

    def _read_prompt(self, waiting: _Waiting) -> int:
        """Read the next chunk of a prompt; returns its tokens."""
        read = 0
        if waiting.prefill is None:
            waiting.prefill, read = self._begin(waiting)
        try:
            if waiting.unread:
                tokens = next(waiting.prefill)
                waiting.unread -= tokens
                read += tokens
            if not waiting.unread:
                next(waiting.prefill)
        except StopIteration as end:
            waiting.prefixes, waiting.unread = end.value, 0
            if self._kept.keeps:
                self._kept.keep_prompt(waiting.request, end.value, self._room_to_keep())
        return read

    def _begin(self, waiting: _Waiting) -> tuple[Generator[int, None, dict[str, Any]], int]:
        """Begin a prompt with what is kept of it; returns its prefill, and the time that copying
        took, in tokens that could have been read.
        """
        request = waiting.request
        self._held[waiting.number] = waiting
        self._kept.use(request)
        self._make_room()
        loaded = self._kept.load(request)
        copied = sum(tokens for tokens, _ in loaded.values())
        waiting.unread = self._runner.tokens_to_prefill(request) - copied
        for sequence in waiting.sequences:
            sequence.cached_tokens = loaded["aligned"][0] if "aligned" in loaded else 0
        begun = {name: prefix for name, (_, prefix) in loaded.items()}
        return self._runner.prefill(request, begun), copied // _COPIED_PER_READ

    def _read_text(self, text: _Text) -> int:
        """Score the next chunk of a text; returns its tokens."""
        scoring = text.scoring
        if text.scores is None:
            model, cache = self._runner.models[scoring.model], self._runner.caches[scoring.model]
            text.scores = score(model, cache, scoring)
            self._make_room()
        try:
            read = next(text.scores, 0)
        except Exception as error:
            # It is read beside the rows, so rows and other requests are not affected.
            log.error("a text could not be scored: %r", error, exc_info=error)
            scoring.error, scoring.done, read = failure_message(error), True, 1
        if scoring.done:
            self._texts.popleft()
        return read

    def _next_to_read(self) -> "_Waiting | _Text | None":
        """The first prompt, short prompts behind a long one, and texts take turns."""
        lanes = (self._first_prompt, self._short_prompt, self._first_text)
        for turn in range(self._turn + 1, self._turn + 1 + len(lanes)):
            item = lanes[turn % len(lanes)]()
            if item is not None:
                self._turn = turn % len(lanes)
                return item
        return None

    def _unread(self) -> Iterator[_Waiting]:
        return (waiting for waiting in self._waiting.values() if waiting.prefixes is None)

    def _first_prompt(self) -> _Waiting | None:
        first = next(self._unread(), None)
        return first if first is not None and self._may_begin(first) else None

    def _short_prompt(self) -> _Waiting | None:
        """The first short prompt behind a long one that is being read."""
        unread = list(islice(self._unread(), _LOOKAHEAD))
        if not unread or unread[0].prefill is None or self._is_short(unread[0]):
            return None
        short = next((waiting for waiting in unread[1:] if self._is_short(waiting)), None)
        return short if short is not None and self._may_begin(short) else None

    def _first_text(self) -> _Text | None:
        text = self._texts[0] if self._texts else None
        return text if text is not None and (text.scores or self._fits(text)) else None

    def _is_short(self, item: "_Waiting | _Text") -> bool:
        return isinstance(item, _Waiting) and item.unread <= 2 * self.budget.chunk

    def _may_begin(self, waiting: _Waiting) -> bool:
        """Whether there is room for a prompt and one row, or reading it has begun."""
        if waiting.prefill is not None:
            return True
        if len(self._batch) >= self._max_rows or self._text_comes_first(waiting):
            return False
        return self._affordable_rows(waiting) > 0

    def _admit(self) -> None:
        """Give rows to samples in order, within the memory limit."""
        while len(self._batch) < self._max_rows:
            first = next((held for held in self._held.values() if held.prefixes is not None), None)
            if first is None or (self._batch.rows and self._text_comes_first(first)):
                return
            most = min(self._affordable_rows(first), self._max_rows - len(self._batch))
            if most < 1:
                return
            new = min(most, len(first.sequences))
            sequences = [first.sequences.popleft() for _ in range(new)]
            rows = [*self._batch.rows, *sequences]
            # Static caches get room for up to twice the rows, where memory allows.
            reserved = min(len(self._batch) + most, 1 << (len(rows) - 1).bit_length())
            self._make_room(sequences, reserved)
            self._runner.preallocate(reserved, self._needs(rows, ()).columns)
            assert first.prefixes is not None
            self._runner.admit(first.prefixes, new)
            self._batch.admit(sequences)
            self._drop_if_empty(first)

    def _drop_ended_rows(self) -> bool:
        """Drop rows that have ended; returns whether there were any."""
        rows = self._batch.rows
        running = [index for index, row in enumerate(rows) if row.finish_reason is None]
        if len(running) == len(rows):
            return False
        # Rows from the end fill the gaps, so that few rows are copied.
        stay = {index for index in running if index < len(running)}
        movers = iter(index for index in running if index >= len(running))
        order = [i if i in stay else next(movers) for i in range(len(running))]
        if self._kept.keeps:
            room = self._room_to_keep([rows[index] for index in running])
            for index, row in enumerate(rows):
                if row.finish_reason is not None:
                    self._kept.keep_row(index, row, room)
        self._runner.reorder(order)
        self._batch.reorder(order)
        return True

    # --- memory -----------------------------------------------------------------------------------

    def _affordable_rows(self, waiting: _Waiting) -> int:
        """How many more rows of a request fit beside the batch and one row for every other prompt
        that is held, each at its full length.
        """
        others = [other for other in self._held.values() if other is not waiting]
        next_samples = [held.sequences[0] for held in (*others, waiting)]
        needs = self._needs([*self._batch.rows, *next_samples], next_samples, self._text())
        return self._fitting_rows(needs) - needs.rows + 1

    def _text_comes_first(self, waiting: _Waiting) -> bool:
        """Whether a text that came before a request waits for memory."""
        text = self._texts[0] if self._texts else None
        if text is None or text.scores is not None or text.number > waiting.number:
            return False
        return not self._fits(text)

    def _fits(self, text: _Text) -> bool:
        """Whether a text fits beside the batch and one row for every prompt that is held."""
        next_samples = list(self._next_samples())
        needs = self._needs([*self._batch.rows, *next_samples], next_samples, text.scoring)
        return self._fitting_rows(needs) >= needs.rows

    def _fitting_rows(self, needs: Needs) -> int:
        """How many rows fit, each as long as ``needs`` says."""
        fitting = self.budget.rows(needs, self._max_rows, self._runner.allocated_bytes())
        if fitting < needs.rows <= self.budget.rows(needs, self._max_rows):
            # Caches that grew for more rows, or longer ones, take the room.
            self._runner.shrink(self._needs(self._batch.rows, ()).columns)
            fitting = self.budget.rows(needs, self._max_rows, self._runner.allocated_bytes())
        return fitting

    def _make_room(self, joining: Sequence[SequenceState] = (), reserved: int = 0) -> None:
        """Shrink kept prefixes to the memory that nothing else needs.

        Args:
            joining: rows that are about to join the batch; the prompt of the first is still held.
            reserved: rows that static caches will have room for.
        """
        if self._kept.bytes:
            self._kept.shrink(self._room_beside(self._batch.rows, joining, reserved))

    def _room_to_keep(self, running: list[SequenceState] | None = None) -> int:
        """Bytes that kept prefixes may take between two steps.

        Args:
            running: rows that stay in the batch; by default all.
        """
        rows = self._batch.rows
        room = self._room_beside(rows if running is None else running)
        if running is not None:
            # Rows that have ended are still held, but no step is running.
            needs = self._needs(rows, self._next_samples(), self._text())
            held = self.budget.held(needs, needs.rows, self._runner.allocated_bytes())
            room = min(room, self.budget.limit - held)
        return room

    def _room_beside(
        self,
        rows: list[SequenceState],
        joining: Sequence[SequenceState] = (),
        reserved: int = 0,
    ) -> int:
        """Bytes beside rows, one further row for every prompt that is held, and a step of them.

        Args:
            rows: of the batch.
            joining: as for `_make_room`.
            reserved: as for `_make_room`.
        """
        next_samples = list(self._next_samples())
        held = {sample.request for sample in next_samples}
        last = [sample for sample in joining[:1] if sample.request not in held]
        planned = [*rows, *joining, *next_samples]
        needs = self._needs(planned, [*next_samples, *last], self._text())
        allocated = self._runner.allocated_bytes()
        static = any(cache.static_shapes for cache in self._runner.caches.values())
        most = max(needs.rows, reserved) if static else needs.rows
        return self.budget.limit - self.budget.total(needs, rows=most, allocated=allocated)

    def _needs(
        self,
        rows: list[SequenceState],
        prompts: Iterable[SequenceState],
        text: Scoring | None = None,
    ) -> Needs:
        """What rows, the prompts of some samples beside them, and a text need.

        A prompt that rows share is held as long as any of these rows exists.
        """
        running = {row.request: self._size_of(row) for row in rows}
        beside = [(row.request, self._size_of(row)) for row in prompts]
        held = {request for request, _ in beside}
        prompt_bytes = sum(size.prompt for _, size in beside)
        prompt_bytes += sum(size.shared for request, size in running.items() if request not in held)
        names, sizes = self._runner.caches, running.values()
        columns = {n: max((s.columns.get(n, 0) for s in sizes), default=0) for n in names}
        attended = {n: max((s.attended.get(n, 1) for s in sizes), default=1) for n in names}
        scoring = 0
        if text is not None:
            scoring = self.budget.text(text.model, len(text.ids))
            attended[text.model] = max(attended[text.model], len(text.ids))
        penalised = any(request.params.penalises or request.params.samplers for request in running)
        return Needs(len(rows), columns, prompt_bytes, attended, penalised, scoring)

    def _size_of(self, row: SequenceState) -> _RequestSize:
        request = row.request
        if request not in self._sizes:
            if len(self._sizes) > 4 * self._max_rows:
                self._sizes.clear()
            names = self._runner.readers(request)
            lengths = {name: len(request.ids(name)) for name in names}
            copied = {name: self._runner.copied_tokens(name, request) for name in names}
            prompts = {name: self.budget.prompt(name, length) for name, length in lengths.items()}
            self._sizes[request] = _RequestSize(
                {name: copied[name] + row.most_ids + SPARE_COLUMNS for name in names},
                {name: lengths[name] + row.most_ids + SPARE_COLUMNS for name in names},
                sum(prompts.values()),
                sum(size for name, size in prompts.items() if not copied[name]),
            )
        return self._sizes[request]

    def _next_samples(self) -> Iterator[SequenceState]:
        """The next sample of each prompt that is held beside the rows."""
        held = self._held.values()
        return (waiting.sequences[0] for waiting in held if waiting.sequences)

    def _text(self) -> Scoring | None:
        """The text that is being read."""
        begun = self._texts and self._texts[0].scores is not None
        return self._texts[0].scoring if begun else None
