"""Sequences of tokens that llama.cpp has read, in cells that they can share: `LlamaContext`.

llama.cpp allocates all cells when a context is made. So a context that becomes too small is
replaced by a larger one, which takes over its state.
"""

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from baco.errors import BacoError
from baco.models.llama_cpp.library import forget_errors, library, reason
from baco.models.llama_cpp.weights import MAX_IDLE_BYTES, LlamaWeights, Room

# The most sequences of a context; a limit of the library.
MAX_SEQUENCES = 256
# Sequences that a new context has room for.
_MIN_SEQUENCES = 4
# The library rounds the number of cells up to this.
_CELL_STEP = 256
# Tokens of one call of the library. Its own tensors are sized for fewer tokens, see `chunk`.
_MAX_TOKENS = 2048
CPU_CHUNK, GPU_CHUNK = 64, 512
# Bytes for each pair of a token that is read and a cell: the mask of attention, twice.
_MASK_BYTES = 6


class SharedCells:
    """Cells that several sequences refer to."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens


class LlamaSequence:
    """Tokens at positions from 0 on. Its cells are free once no sequence refers to them.

    Attributes:
        ids: of the library: one, and a second one that holds the same cells where the model has
            sliding windows. The library reuses cells that have left the window, though a sequence
            that is rolled back needs them again; it never reuses cells of two sequences.
        length: its number of tokens.
        shared: its first cells, if it shares them.
        is_row: it is a row of a batch, for which cells are reserved.
    """

    def __init__(self, context: "LlamaContext", *, is_row: bool = False) -> None:
        self.ids, self.length, self.is_row = context.take_ids(), 0, is_row
        self.shared: SharedCells | None = None
        self.free = weakref.finalize(self, context.released.append, self.ids)
        self.free.atexit = False

    @property
    def own(self) -> int:
        """The number of cells that it does not share."""
        return max(0, self.length - (self.shared.tokens if self.shared else 0))


class LlamaContext:
    """A context of llama.cpp that grows with its sequences.

    Args:
        weights: the model.

    Attributes:
        chunk: tokens that the library's own tensors are sized for.
        reserved: cells reserved for the rows of each cache.
        released: ids of sequences that were dropped, to be freed by the thread that decodes.
    """

    def __init__(self, weights: LlamaWeights) -> None:
        self.weights = weights
        self.chunk = GPU_CHUNK if weights.on_gpu else CPU_CHUNK
        self.reserved: dict[Any, int] = {}
        self.released: list[tuple[int, ...]] = []
        self._room = weights.take_idle() or Room(None, 0, 0)
        self._clear()
        self._ids = list(range(MAX_SEQUENCES - 1, -1, -1))
        self._live: weakref.WeakSet[LlamaSequence] = weakref.WeakSet()
        # The room outlives this object: it is given back to the weights, or freed.
        self._end = weakref.finalize(self, _give_back, weights, self._room)
        self._end.atexit = False

    @property
    def cells(self) -> int:
        """The number of tokens that there is room for."""
        return self._room.cells

    # --- sequences --------------------------------------------------------------------------------

    def new_sequence(self, *, is_row: bool = False) -> LlamaSequence:
        """An empty sequence.

        Raises:
            BacoError: the library has no more.
        """
        sequence = LlamaSequence(self, is_row=is_row)
        self._live.add(sequence)
        return sequence

    def take_ids(self) -> tuple[int, ...]:
        """Ids for a new sequence."""
        self._free_released()
        count = 2 if self.weights.window else 1
        if len(self._ids) < count:
            raise BacoError(
                f"llama.cpp holds no more than {MAX_SEQUENCES} sequences at once: decode fewer "
                "answers at once (max_rows)"
            )
        ids = tuple(self._ids.pop() for _ in range(count))
        if max(ids) >= self._room.sequences:
            self._open(self.cells, max(_MIN_SEQUENCES, 1 << max(ids).bit_length()))
        return ids

    def copy(self, source: LlamaSequence, target: LlamaSequence, start: int, stop: int) -> None:
        """Let an empty sequence refer to some cells of another, as they are."""
        memory = self._memory()
        for id_ in target.ids:
            library().llama_memory_seq_cp(memory, source.ids[0], id_, start, stop)

    def share(self, source: LlamaSequence, target: LlamaSequence) -> None:
        """Let an empty sequence continue another, whose cells both share from now on."""
        if source.shared is None or source.own:
            source.shared = SharedCells(source.length)
        self.copy(source, target, 0, source.length)
        target.shared, target.length = source.shared, source.length

    def cut(self, sequence: LlamaSequence, length: int) -> None:
        """Remove the tokens of a sequence beyond its first ``length``."""
        if length < sequence.length:
            self._remove(sequence.ids, length)
            sequence.length = length

    def save(self, sequence: LlamaSequence, start: int, stop: int) -> NDArray[np.uint8]:
        """A copy of what was read of some tokens of a sequence; `load` continues with it."""
        part = sequence
        if (start, stop) != (0, sequence.length):
            part = self.new_sequence()
            self.copy(sequence, part, start, stop)
        size = library().llama_state_seq_get_size(self._room.pointer, part.ids[0])
        data = np.empty(size, dtype=np.uint8)
        library().llama_state_seq_get_data(self._room.pointer, _bytes_of(data), size, part.ids[0])
        if part is not sequence:
            part.free()
        return data

    def load(self, sequence: LlamaSequence, data: NDArray[np.uint8]) -> None:
        """Append what `save` returned. Room for it must be reserved."""
        part = self.new_sequence()
        functions, pointer = library(), self._room.pointer
        forget_errors()
        if not functions.llama_state_seq_set_data(pointer, _bytes_of(data), len(data), part.ids[0]):
            raise BacoError(f"llama.cpp cannot take over a kept prefix: {reason()}")
        for id_ in sequence.ids:
            functions.llama_memory_seq_cp(self._memory(), part.ids[0], id_, -1, -1)
        last = functions.llama_memory_seq_pos_max(self._memory(), sequence.ids[0])
        sequence.length = int(last) + 1
        part.free()
        self._free_released()

    # --- reading ----------------------------------------------------------------------------------

    def read(
        self, reads: Sequence[tuple[LlamaSequence, Sequence[int], int]]
    ) -> NDArray[np.float32]:
        """Read tokens of some sequences, in as few calls of the library as possible.

        Args:
            reads: sequences without repeats, the tokens to append, and the number of last tokens
                whose logits are wanted.

        Returns:
            These logits in order, [N, vocabulary]. They are overwritten by the next call.

        Raises:
            BacoError: the library fails, or there is no memory.
        """
        total = sum(len(ids) for _, ids, _ in reads)
        self.reserve(total, {id(s): len(ids) for s, ids, _ in reads if s.is_row})
        token, position, sequence, wanted = (np.empty(total, np.int32) for _ in range(4))
        start = 0
        for target, ids, keep in reads:
            stop = start + len(ids)
            token[start:stop] = ids
            position[start:stop] = np.arange(target.length, target.length + len(ids))
            sequence[start:stop] = target.ids[0]
            wanted[start:stop] = np.arange(len(ids)) >= len(ids) - keep
            start = stop
        logits = self._decode(token, position, sequence, wanted.astype(np.int8))
        for target, ids, _ in reads:
            before, target.length = target.length, target.length + len(ids)
            own, *guards = target.ids
            for guard in guards:
                library().llama_memory_seq_cp(self._memory(), own, guard, before, target.length)
        return logits

    def _decode(
        self,
        token: NDArray[np.int32],
        position: NDArray[np.int32],
        sequence: NDArray[np.int32],
        wanted: NDArray[np.int8],
    ) -> NDArray[np.float32]:
        functions, pointer = library(), self._room.pointer
        threads = torch.get_num_threads()
        functions.llama_set_n_threads(pointer, threads, threads)
        parts = []
        for start in range(0, len(token), _MAX_TOKENS):
            part = slice(start, start + _MAX_TOKENS)
            batch, arrays = _batch(token[part], position[part], sequence[part], wanted[part])
            forget_errors()
            code = functions.llama_decode(pointer, batch)
            del arrays
            if code:
                raise BacoError(f"llama.cpp cannot read {len(token)} tokens: {reason()}")
            outputs = int(wanted[part].sum())
            if outputs:
                parts.append(self._logits(outputs, copied=len(token) > _MAX_TOKENS))
        if len(parts) == 1:
            return parts[0]
        empty = np.empty((0, self.weights.vocabulary_size), np.float32)
        return np.concatenate(parts) if parts else empty

    def _logits(self, rows: int, *, copied: bool) -> NDArray[np.float32]:
        address = library().llama_get_logits(self._room.pointer)
        address = ctypes.cast(address, ctypes.c_void_p).value
        assert address is not None
        width = self.weights.vocabulary_size
        buffer = (ctypes.c_float * (rows * width)).from_address(address)
        logits: NDArray[np.float32] = np.ctypeslib.as_array(buffer).reshape(rows, width)
        return logits.copy() if copied else logits

    # --- room -------------------------------------------------------------------------------------

    def reserve(self, tokens: int, rows: dict[int, int] | None = None) -> None:
        """Make room for more tokens beside what rows have reserved.

        Args:
            tokens: of all sequences.
            rows: those of them that rows will append, by the identity of the row.
        """
        self._free_released()
        needed = self._needed() + tokens
        if rows:  # they use what they have reserved, as far as that goes
            left = sum(self.reserved.values()) - self._own_of_rows()
            needed -= min(sum(rows.values()), max(0, left))
        if needed > self.cells:
            self._open(needed, self._room.sequences)

    def shrink(self) -> None:
        """Give back cells that no sequence needs or has reserved."""
        self._free_released()
        needed = self._needed()
        if _rounded(needed) < self.cells:
            self._open(needed, self._room.sequences)

    def forget_if_idle(self) -> None:
        """Free a large context that holds nothing: an idle server keeps no tables."""
        self._free_released()
        if not self._needed() and self.cells * self.weights.cell_bytes > MAX_IDLE_BYTES:
            self._open(0, self._room.sequences)

    def renew(self) -> None:
        """Copy what sequences hold into new memory, so that nothing else is left of what was read
        before.
        """
        self._free_released()
        self._open(self.cells, self._room.sequences)

    def _needed(self) -> int:
        """Cells that sequences refer to or have reserved."""
        live = self._live_sequences()
        others = sum(sequence.own for sequence in live if not sequence.is_row)
        shared = {sequence.shared for sequence in live if sequence.shared is not None}
        rows = max(self._own_of_rows(), sum(self.reserved.values()))
        return others + rows + sum(cells.tokens for cells in shared)

    def _own_of_rows(self) -> int:
        return sum(sequence.own for sequence in self._live_sequences() if sequence.is_row)

    def _live_sequences(self) -> list[LlamaSequence]:
        return [sequence for sequence in self._live if sequence.free.alive]

    def _open(self, cells: int, sequences: int) -> None:
        """Replace the context by one of another size that takes over its state.

        Raises:
            BacoError: there is no memory for it.
        """
        functions, old = library(), self._room
        cells, before, state = _rounded(cells), (old.cells, old.sequences), None
        if old.pointer and any(sequence.length for sequence in self._live_sequences()):
            size = functions.llama_state_get_size(old.pointer)
            state = np.empty(size, dtype=np.uint8)
            functions.llama_state_get_data(old.pointer, _bytes_of(state), size)
        old.free()
        old.cells, old.sequences = cells, sequences
        if not cells:
            return
        forget_errors()
        pointer = self._new_pointer(cells, sequences)
        if not pointer:
            why = reason()
            old.cells, old.sequences = before
            old.pointer = self._new_pointer(*before) if old.cells else None
            if old.pointer and state is not None:
                functions.llama_state_set_data(old.pointer, _bytes_of(state), len(state))
            raise BacoError(
                f"there is no memory for {cells} tokens of {self.weights.path.name} ({why}): lower "
                "max_tokens or max_rows, shorten the prompt, or set a lower --memory"
            )
        old.pointer = pointer
        if state is not None:
            functions.llama_state_set_data(pointer, _bytes_of(state), len(state))

    def _new_pointer(self, cells: int, sequences: int) -> Any:
        functions = library()
        params = functions.llama_context_default_params()
        params.n_ctx, params.n_seq_max = cells, sequences
        params.n_batch, params.n_ubatch = _MAX_TOKENS, self.chunk
        # All sequences use one pool of cells, so that they can share some. Windows keep all
        # tokens: without that a row could not be rolled back.
        params.kv_unified = params.swa_full = True
        params.offload_kqv = params.op_offload = self.weights.on_gpu
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.no_perf = True
        return functions.llama_init_from_model(self.weights.pointer, params)

    def _clear(self) -> None:
        if self._room.pointer:
            library().llama_memory_clear(self._memory(), False)

    def _memory(self) -> Any:
        return library().llama_get_memory(self._room.pointer)

    def _free_released(self) -> None:
        while self.released:
            ids = self.released.pop()
            self._remove(ids, 0)
            self._ids += reversed(ids)

    def _remove(self, ids: Sequence[int], start: int) -> None:
        if not self._room.pointer:
            return
        memory = self._memory()
        for id_ in ids:
            if not library().llama_memory_seq_rm(memory, id_, start, -1):
                raise ValueError("llama.cpp cannot roll this sequence back")


def mask_bytes(chunk: int) -> int:
    """Bytes of the library's own tensors for each cell, where it reads ``chunk`` tokens at once."""
    return _MASK_BYTES * chunk


def _give_back(weights: LlamaWeights, room: Room) -> None:
    weights.keep_idle(room, room.cells * weights.cell_bytes)


def _rounded(cells: int) -> int:
    return -(-cells // _CELL_STEP) * _CELL_STEP


def _bytes_of(array: NDArray[np.uint8]) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _batch(
    token: NDArray[np.int32],
    position: NDArray[np.int32],
    sequence: NDArray[np.int32],
    wanted: NDArray[np.int8],
) -> tuple[Any, list[Any]]:
    """A batch of the library with one sequence for each token, and the arrays that it points to."""
    functions, count = library(), len(token)
    ones = np.ones(count, np.int32)
    addresses = sequence.ctypes.data + 4 * np.arange(count, dtype=np.uint64)
    number = ctypes.POINTER(ctypes.c_int32)
    batch = functions.llama_batch(
        n_tokens=count,
        token=token.ctypes.data_as(number),
        embd=None,
        pos=position.ctypes.data_as(number),
        n_seq_id=ones.ctypes.data_as(number),
        seq_id=addresses.ctypes.data_as(ctypes.POINTER(number)),
        logits=wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
    )
    return batch, [token, position, sequence, wanted, ones, addresses]
