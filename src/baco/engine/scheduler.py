"""What is done next: prompts are read, rows join as far as memory goes, ended rows leave.

Between two steps of running rows it reads a bounded number of tokens, whatever is waiting. Requests
are served in their order, but a short prompt does not wait until a long one has been read.
"""

import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from baco.engine.batch import Batch
from baco.engine.budget import Budget, Needs
from baco.engine.runner import ModelRunner
from baco.engine.scoring import Scoring, score
from baco.engine.sequence import Request, SequenceState
from baco.engine.speculative.cost_model import MAX_DRAFT_TOKENS
from baco.errors import BacoError, failure

log = logging.getLogger("baco")

# Columns that a row may take beyond its tokens: what is drafted after its last, and padding.
SPARE = MAX_DRAFT_TOKENS + 1
# Pieces of prompts and texts that are read between two steps, half as many where they are long: few
# where a client waits for the next token of a row, many where all answers are wanted soon.
FEW_PIECES, MANY_PIECES = 2, 32
# Requests behind the first among which a short prompt is looked for.
_LOOKED_AT = 64


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request of which some samples have no row yet.

    Attributes:
        number: requests and texts are numbered as they come.
        request: what is asked.
        sequences: those samples.
        unread: tokens of its prompt that are still to be read, of all models together.
        reading: of its prompt, once that was begun.
        prefixes: its prompt as each model has read it.
    """

    number: int
    request: Request
    sequences: deque[SequenceState]
    unread: int
    reading: Generator[int, None, dict[str, Any]] | None = None
    prefixes: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What a request needs of each model that reads it.

    Attributes:
        columns: of a row, at its full length.
        seen: tokens that a row looks at, a shared prompt included.
        prompt: bytes of the prompt, beside its rows.
        shared: bytes of it as long as rows attend to it where it lies.
    """

    columns: dict[str, int]
    seen: dict[str, int]
    prompt: int
    shared: int


@dataclass(slots=True, eq=False)
class _Text:
    """A text to be scored."""

    number: int
    scoring: Scoring
    reading: Generator[int, None, None] | None = None


class Scheduler:
    """Decides before each step which rows are in the batch, and reads what waits.

    Args:
        reader: reads prompts, and holds the rows' caches.
        batch: the rows.
        budget: what memory has room for.
        max_rows: sequences decoded at once; more wait.
        pieces: of prompts and texts that are read between two steps of a few rows.

    Attributes:
        positions: how many positions of each row the next step may decide.
    """

    def __init__(
        self, reader: ModelRunner, batch: Batch, budget: Budget, max_rows: int, pieces: int
    ) -> None:
        self._runner, self._batch, self.budget = reader, batch, budget
        self._max_rows, self._pieces = max_rows, pieces
        self._numbers = count()
        self._waiting: dict[int, _Waiting] = {}  # by number, in order
        self._held: dict[int, _Waiting] = {}  # those of them whose prompts take memory
        self._texts: deque[_Text] = deque()  # only the first is being read
        self._sizes: dict[Request, _Sizes] = {}  # of requests that were looked at lately
        self._turn = 0
        self._stuck = False  # nothing can be done until something changes
        self.positions = 1

    def add(self, request: Request, room: int) -> list[SequenceState]:
        """Queue the samples of a request, each of ``room`` tokens at most.

        Raises:
            BacoError: memory cannot hold one of them, even alone.
        """
        limit = min(request.params.max_tokens, room)
        answers = [SequenceState(request, sample, limit) for sample in range(request.params.n)]
        self._check_alone("one answer", self._needs(answers[:1], answers[:1]))
        number, unread = next(self._numbers), self._runner.to_read(request)
        self._waiting[number] = _Waiting(number, request, deque(answers), unread)
        self._stuck = False
        return answers

    def score(self, scoring: Scoring) -> None:
        """Queue a text.

        Raises:
            BacoError: memory cannot hold it, even alone.
        """
        self._check_alone("scoring the text", self._needs([], [], scoring))
        self._texts.append(_Text(next(self._numbers), scoring))
        self._stuck = False

    def _check_alone(self, what: str, needs: Needs) -> None:
        taken, memory = self.budget.total(needs), self.budget.memory
        if taken > memory:
            raise BacoError(
                f"{what} may need {taken / 2**20:.1f} MiB of cache and memory is "
                f"{memory / 2**20:.1f} MiB: lower max_tokens, shorten the prompt or raise memory"
            )

    def drop(self, answer: SequenceState) -> None:
        """Forget a sample that was given up, if it has no row yet."""
        if answer.tokens:
            return
        for waiting in self._waiting.values():
            if waiting.request is answer.request and answer in waiting.sequences:
                waiting.sequences.remove(answer)
                self._leave(waiting)
                return

    def drop_text(self, scoring: Scoring) -> None:
        """Forget a text that is not to be scored any more."""
        self._texts = deque(text for text in self._texts if text.scoring is not scoring)
        self._stuck = False

    def _leave(self, waiting: _Waiting) -> None:
        """Forget a request of which no sample is left."""
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
        """Is anything left to do?"""
        return bool(self._waiting) or bool(self._texts) or len(self._batch) > 0

    def schedule(self) -> None:
        """Let ended rows leave, read on, and let rows join whose prompts were read."""
        left = self._compact()
        if self._stuck and not left:
            return
        going, read = len(self._batch) > 0, 0
        pieces = self._pieces if going else MANY_PIECES
        most = max(pieces * self.budget.piece, self.budget.read_at_once(len(self._batch)))
        self._admit()
        while read < most:
            one = self._next()
            self._stuck = one is None
            if one is None:
                break
            short = self._short(one)
            read += self._read_on(one)
            self._admit()
            # A piece of a long text takes longer, since its tokens look at more. Where no row waits
            # for a step, other requests can be taken up meanwhile.
            if not short and (not going or read >= most // 2):
                break
        needs = self._needs(self._batch.rows, self._prompts(), self._text())
        self.positions = self.budget.positions(needs, MAX_DRAFT_TOKENS + 1, self._runner.held())

    def _read_on(self, one: "_Waiting | _Text") -> int:
        """Read the next piece of a prompt or a text; how many tokens that were."""
        if isinstance(one, _Text):
            if one.reading is None:
                name = one.scoring.half
                half, store = self._runner.halves[name], self._runner.stores[name]
                one.reading = score(half, store, one.scoring)
            try:
                read = next(one.reading, 0)
            except Exception as error:
                # It is read into a cache of its own: rows and other requests are as they were.
                log.error("a text could not be scored: %r", error, exc_info=error)
                one.scoring.error, one.scoring.done, read = failure(error), True, 1
            if one.scoring.done:
                self._texts.popleft()
            return read
        if one.reading is None:
            one.reading = self._runner.reading(one.request)
            self._held[one.number] = one
        read = 0
        try:
            read = next(one.reading)
            one.unread -= read
            if not one.unread:
                next(one.reading)
        except StopIteration as end:
            one.prefixes, one.unread = end.value, 0
        return read

    def _next(self) -> "_Waiting | _Text | None":
        """What is read on: the first prompt, short ones behind a long one, and texts take turns."""
        lanes = (self._first_prompt, self._short_prompt, self._first_text)
        for turn in range(self._turn + 1, self._turn + 1 + len(lanes)):
            one = lanes[turn % len(lanes)]()
            if one is not None:
                self._turn = turn % len(lanes)
                return one
        return None

    def _unread(self) -> Iterator[_Waiting]:
        return (waiting for waiting in self._waiting.values() if waiting.prefixes is None)

    def _first_prompt(self) -> _Waiting | None:
        first = next(self._unread(), None)
        return first if first is not None and self._may_begin(first) else None

    def _short_prompt(self) -> _Waiting | None:
        """The first short prompt behind a long one that is being read."""
        unread = list(islice(self._unread(), _LOOKED_AT))
        if not unread or unread[0].reading is None or self._short(unread[0]):
            return None
        short = next((one for one in unread[1:] if self._short(one)), None)
        return short if short is not None and self._may_begin(short) else None

    def _first_text(self) -> _Text | None:
        text = self._texts[0] if self._texts else None
        return text if text is not None and (text.reading or self._fits(text)) else None

    def _short(self, one: "_Waiting | _Text") -> bool:
        return isinstance(one, _Waiting) and one.unread <= 2 * self.budget.piece

    def _may_begin(self, waiting: _Waiting) -> bool:
        """Is there room for a prompt and one row behind it, or was that taken before?"""
        if waiting.reading is not None:
            return True
        if len(self._batch) >= self._max_rows or self._blocks(waiting):
            return False
        return self._affordable(waiting) > 0

    def _admit(self) -> None:
        """Let samples join in order, as far as memory goes."""
        while len(self._batch) < self._max_rows:
            first = next((one for one in self._held.values() if one.prefixes is not None), None)
            if first is None or (self._batch.rows and self._blocks(first)):
                return
            most = self._affordable(first)
            if most < 1:
                return
            most = min(most, self._max_rows - len(self._batch))
            new = min(most, len(first.sequences))
            answers = [first.sequences.popleft() for _ in range(new)]
            rows = [*self._batch.rows, *answers]
            # Where tables stay where they are, for twice as many where memory has it.
            held = min(len(self._batch) + most, 1 << (len(rows) - 1).bit_length())
            self._runner.preallocate(held, self._columns(rows))
            assert first.prefixes is not None
            self._runner.admit(first.prefixes, new)
            self._batch.admit(answers)
            self._leave(first)

    def _affordable(self, waiting: _Waiting) -> int:
        """How many rows like a request's next one memory has room for beside the batch's, and
        beside one for every other prompt that is held; each at its longest.
        """
        others = [one for one in self._held.values() if one is not waiting]
        next_ones = [one.sequences[0] for one in (*others, waiting)]
        needs = self._needs([*self._batch.rows, *next_ones], next_ones, self._text())
        return self._room(needs) - needs.rows + 1

    def _blocks(self, waiting: _Waiting) -> bool:
        """Does a text that came before a request wait for memory?"""
        text = self._texts[0] if self._texts else None
        if text is None or text.reading is not None or text.number > waiting.number:
            return False
        return not self._fits(text)

    def _fits(self, text: _Text) -> bool:
        """Is there room for a text, beside the batch and a row for every prompt that is held?"""
        next_ones = list(self._prompts())
        needs = self._needs([*self._batch.rows, *next_ones], next_ones, text.scoring)
        return self._room(needs) >= needs.rows

    def _room(self, needs: Needs) -> int:
        """How many rows fit, where tables are as ``needs`` says."""
        fitting = self.budget.rows(needs, self._max_rows, self._runner.held())
        if fitting < needs.rows <= self.budget.rows(needs, self._max_rows):
            # What more rows, or longer ones, have left behind makes room.
            self._runner.shrink(self._columns(self._batch.rows))
            fitting = self.budget.rows(needs, self._max_rows, self._runner.held())
        return fitting

    def _needs(
        self,
        rows: list[SequenceState],
        prompts: Iterable[SequenceState],
        text: Scoring | None = None,
    ) -> Needs:
        """What rows, the prompts of some samples beside them, and a text need.

        Prompts that rows share are held as long as any of these rows is there.
        """
        running = {row.request: self._sizes_of(row) for row in rows}
        beside = [(row.request, self._sizes_of(row)) for row in prompts]
        held = {request for request, _ in beside}
        taken = sum(sizes.prompt for _, sizes in beside)
        taken += sum(sizes.shared for request, sizes in running.items() if request not in held)
        columns = {
            name: max((sizes.columns.get(name, 0) for sizes in running.values()), default=0)
            for name in self._runner.stores
        }
        seen = {
            name: max((sizes.seen.get(name, 1) for sizes in running.values()), default=1)
            for name in self._runner.stores
        }
        scored = 0
        if text is not None:
            scored = self.budget.text(text.half, len(text.ids))
            seen[text.half] = max(seen[text.half], len(text.ids))
        penalised = any(request.params.penalises for request in running)
        return Needs(len(rows), columns, taken, seen, penalised, scored)

    def _sizes_of(self, row: SequenceState) -> _Sizes:
        request = row.request
        if request not in self._sizes:
            if len(self._sizes) > 4 * self._max_rows:
                self._sizes.clear()
            reader, budget = self._runner, self.budget
            names = reader.reads(request)
            lengths = {name: len(request.ids(name)) for name in names}
            own = {name: reader.copied(name, request) for name in names}
            prompts = {name: budget.prompt(name, length) for name, length in lengths.items()}
            self._sizes[request] = _Sizes(
                {name: own[name] + row.limit + SPARE for name in names},
                {name: lengths[name] + row.limit + SPARE for name in names},
                sum(prompts.values()),
                sum(bytes_ for name, bytes_ in prompts.items() if not own[name]),
            )
        return self._sizes[request]

    def _columns(self, rows: list[SequenceState]) -> dict[str, int]:
        """Columns of each model's table for some rows at their full length; 0 where it reads none
        of them.
        """
        return dict(self._needs(rows, ()).columns)

    def _prompts(self) -> Iterator[SequenceState]:
        """The next sample of each prompt that is held beside the rows."""
        return (one.sequences[0] for one in self._held.values())

    def _text(self) -> Scoring | None:
        """The text that is being read."""
        begun = self._texts and self._texts[0].reading is not None
        return self._texts[0].scoring if begun else None

    def _compact(self) -> bool:
        """Let ended rows leave; did any?"""
        rows = self._batch.rows
        alive = [index for index, row in enumerate(rows) if row.finish_reason is None]
        if len(alive) == len(rows):
            return False
        # Rows from the end fill the holes, so that few are copied.
        order = [index for index in alive if index < len(alive)]
        tail = iter(index for index in alive if index >= len(alive))
        filled = set(order)
        order = [i if i in filled else next(tail) for i in range(len(alive))]
        self._runner.reorder(order)
        self._batch.reorder(order)
        return True
