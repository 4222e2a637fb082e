"""How many bytes caches and a step may take, computed before any of them is made.

Sizes are the models' own, found once; what is asked for later cannot change them.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType

from baco.engine.scoring import ENTRY_BYTES, piece_of
from baco.engine.speculative.cost_model import MAX_DRAFT_TOKENS
from baco.kv_cache.protocol import RowSize
from baco.kv_cache.slots import columns_for
from baco.models.model import PairModel
from baco.sampling.sampler import DRAW_BYTES, most_drawn

# For each position and each token of the vocabulary: logits of both models, as they come and in
# float32, what routers and masks make of them, and what is drawn from.
_ENTRY = 32
# The same where penalties count what was said.
_PENALTY = 32
# Tokens that are read beside the positions to decide, for each row: of prompts, and what a model
# that was not needed for a while has yet to read.
READ_ON = 4


@dataclass(frozen=True, slots=True)
class Needs:
    """What is to be held at once.

    Attributes:
        rows: of the batch.
        columns: of each model's table, at the rows' full length; 0 where a model reads none.
        prompts: bytes of the prompts that are held beside the rows.
        seen: tokens that a row of a model looks at, at most, shared prompts included.
        penalised: does any row have penalties?
        scored: bytes that texts to be scored take.
    """

    rows: int
    columns: Mapping[str, int]
    prompts: int
    seen: Mapping[str, int]
    penalised: bool = False
    scored: int = 0


class Budget:
    """Computes what is needed, against what there is.

    Args:
        memory: bytes that there are.
        models: by name: base, aligned, draft.
        vocabulary: tokens in it.
        piece: tokens of a prompt that are read at once.
    """

    def __init__(
        self, memory: int, models: Mapping[str, PairModel], vocabulary: int, piece: int
    ) -> None:
        self.memory, self.piece = memory, piece
        self.sizes: dict[str, RowSize] = {name: half.row_size for name, half in models.items()}
        self._models = dict(models)
        self._width = max(vocabulary, *(half.rows_of_logits for half in models.values()))
        self._drawn = max(self._width, most_drawn(models["aligned"].device.type))

    def read_at_once(self, rows: int) -> int:
        """Tokens that may be read beside a step of so many rows."""
        return max(self.piece, READ_ON * rows)

    def prompt(self, name: str, tokens: int) -> int:
        """Bytes of a prompt that a model has read."""
        return self.sizes[name].bytes(tokens)

    def text(self, name: str, tokens: int) -> int:
        """Bytes of a text that a model scores, and of the logits of a piece of it."""
        half = self._models[name]
        logits = piece_of(half) * half.rows_of_logits * ENTRY_BYTES
        return self.sizes[name].bytes(tokens) + logits

    def tables(self, needs: Needs, rows: int, held: Mapping[str, int]) -> int:
        """Bytes of so many rows of all models at their full length, or of what is held now."""
        taken = 0
        for name, size in self.sizes.items():
            planned = rows * size.bytes(columns_for(needs.columns[name]))
            taken += max(planned, held.get(name, 0))
        return taken

    def step(self, needs: Needs, rows: int, positions: int) -> int:
        """Bytes that a step's own tensors take at most, where so many positions of each row are
        decided: logits, draws, masks, what forwards work on, and what growing tables copy.
        """
        entries = rows * positions * self._width
        decided = entries * (_ENTRY + (_PENALTY if needs.penalised else 0))
        decided += DRAW_BYTES * min(entries, self._drawn)
        read = copied = again = 0
        for name, half in self._models.items():
            seen = columns_for(needs.seen[name])
            decided += half.forward_size.bytes(rows, positions, seen)
            at_once = self.read_at_once(rows) if half.reads_in_pieces else seen
            read = max(read, half.forward_size.bytes(1, at_once, seen))
            copied = max(copied, self.sizes[name].largest_tensor(columns_for(needs.columns[name])))
            if half.long_rope is not None and seen > half.long_rope.original_length:
                # A row that grows beyond it is read again, into tables of its own.
                again += self.sizes[name].bytes(half.long_rope.original_length + MAX_DRAFT_TOKENS)
        return max(decided, read) + rows * copied + again

    def total(
        self,
        needs: Needs,
        *,
        rows: int | None = None,
        positions: int = 1,
        held: Mapping[str, int] = MappingProxyType({}),
    ) -> int:
        """Bytes of everything, with so many rows in the place of those that ``needs`` has.

        ``held`` are bytes of the tables as they are, which may be larger than they need be.
        """
        rows = needs.rows if rows is None else rows
        tables = self.tables(needs, rows, held)
        return tables + needs.prompts + needs.scored + self.step(needs, rows, positions)

    def rows(self, needs: Needs, most: int, held: Mapping[str, int] = MappingProxyType({})) -> int:
        """How many rows fit, ``most`` or as many as there are; -1 where not even none does."""
        most = max(most, needs.rows)
        return (
            bisect_right(
                range(most + 1),
                self.memory,
                key=lambda rows: self.total(needs, rows=rows, held=held),
            )
            - 1
        )

    def positions(self, needs: Needs, most: int, held: Mapping[str, int]) -> int:
        """How many positions of each row a step may decide: ``most``, or as many as fit."""
        taken = (self.total(needs, positions=n, held=held) for n in range(2, most + 1))
        return 1 + sum(1 for _ in takewhile(lambda one: one <= self.memory, taken))
