"""The memory limit, and the bytes of caches and step tensors, computed before any is allocated.

Sizes come from the models' configurations, once at load. No request can change them. Weights do not
count: they are loaded before any cache is allocated.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import psutil
import torch

from baco.engine.scoring import ENTRY_BYTES, scoring_chunk
from baco.engine.sequence import MAX_DRAFT_TOKENS
from baco.errors import BacoError
from baco.kv_cache.protocol import RowSize
from baco.kv_cache.slots import columns_for
from baco.models.model import PairModel
from baco.sampling.noise import max_drawn_entries
from baco.sampling.sampler import DRAW_BYTES
from baco.source import MODELS

# The share of free memory that caches may take by default.
SHARE = 0.6
# The share of free memory that kept prefixes may take, within that, where the user sets no limit.
KEPT_SHARE = 0.1
_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{end}": base**power
    for power, prefix in enumerate("kmgt", 1)
    for end, base in (("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*([a-z]*|%)", re.IGNORECASE)

# Bytes for each position and each token of the vocabulary: both models' logits, raw and in float32,
# what routers and masks compute of them, and what tokens are drawn from.
_ENTRY_BYTES = 32
# The same for token counts, where any row has penalties.
_PENALTY_BYTES = 32
# Tokens per row that are read between two steps, whatever the chunk: of prompts, and by a model
# that lags behind.
_CATCH_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Needs:
    """What is held at once.

    Attributes:
        rows: of the batch.
        columns: of each model's cache, at the rows' full length; 0 where a model reads none.
        prompts: bytes of the prompts that are held beside the rows.
        attended: tokens that a row of each model attends to, at most, shared prompts included.
        penalised: whether any row has penalties or samplers.
        scoring: bytes that a text takes while it is scored.
    """

    rows: int
    columns: Mapping[str, int]
    prompts: int
    attended: Mapping[str, int]
    penalised: bool = False
    scoring: int = 0


class Budget:
    """Compares what is needed with the memory limit.

    Args:
        limit: bytes.
        models: by name: ``base``, ``aligned``, ``draft``.
        vocabulary_size: tokens in the common vocabulary.
        joint: the rows of both models of the pair are in the same tables, each as wide as the
            widest of all.

    Attributes:
        chunk: tokens of a prompt that are read at once.
    """

    def __init__(
        self,
        limit: int,
        models: Mapping[str, PairModel],
        vocabulary_size: int,
        *,
        joint: bool = False,
    ) -> None:
        self.limit, self._joint = limit, joint
        self.chunk = max(model.prefill_chunk for model in models.values())
        self._models = dict(models)
        self._sizes: dict[str, RowSize] = {name: m.row_size for name, m in models.items()}
        self._vocabulary_size = vocabulary_size
        self._max_drawn = max_drawn_entries(models["aligned"].device.type)

    def tokens_between_steps(self, rows: int) -> int:
        """Tokens that may be read between two steps of this many rows."""
        return max(self.chunk, _CATCH_UP_TOKENS * rows)

    def prompt(self, name: str, tokens: int) -> int:
        """Bytes of a prompt in a model's cache."""
        return self._sizes[name].bytes(tokens)

    def text(self, name: str, tokens: int) -> int:
        """Bytes of a text that a model scores, and of the logits of a chunk of it."""
        model = self._models[name]
        logits = scoring_chunk(model) * model.logits_width * ENTRY_BYTES
        return self._sizes[name].bytes(tokens) + logits

    def step(self, needs: Needs, rows: int, positions: int) -> int:
        """Bytes of a step's own tensors, at most, where ``positions`` of each row are decided:
        logits, draws, masks, the forwards' own tensors, and copies of growing caches.
        """
        # A request can let models return hidden states behind their logits from now on.
        widths = [model.logits_width for model in self._models.values()]
        width = max(self._vocabulary_size, *widths)
        entries = rows * positions * width
        decided = entries * (_ENTRY_BYTES + (_PENALTY_BYTES if needs.penalised else 0))
        decided += DRAW_BYTES * min(entries, max(width, self._max_drawn))
        read = reread = 0
        largest = {"base": 0, "aligned": 0}
        for name, model in self._models.items():
            attended = columns_for(self._widest(needs.attended, name))
            decided += model.forward_size.bytes(rows, positions, attended)
            at_once = self.tokens_between_steps(rows) if model.prefills_in_chunks else attended
            read = max(read, model.forward_size.bytes(1, at_once, attended))
            size = self._sizes[name]
            # A recurrent state is saved before every token that may be rejected, or less often.
            decided += rows * size.fixed * (positions if positions > 1 else 0)
            largest[name] = size.largest_tensor(columns_for(self._widest(needs.columns, name)))
            if model.long_rope is not None and attended > model.long_rope.original_length:
                # A row that grows beyond it is read again, into a cache of its own.
                reread += size.bytes(model.long_rope.original_length + MAX_DRAFT_TOKENS)
        copied = max(*largest.values(), self._joint * (largest["base"] + largest["aligned"]))
        library = sum(model.library_bytes for model in self._models.values())
        return max(decided, read) + rows * copied + reread + library

    def _widest(self, columns: Mapping[str, int], name: str) -> int:
        """The columns of a model's rows, or of both models' where they are in the same tables."""
        if self._joint and name in MODELS:
            return max(columns[model] for model in MODELS)
        return columns[name]

    def total(
        self,
        needs: Needs,
        *,
        rows: int | None = None,
        positions: int = 1,
        allocated: Mapping[str, int] = MappingProxyType({}),
    ) -> int:
        """Bytes of everything.

        Args:
            needs: what is held.
            rows: in the place of ``needs.rows``.
            positions: of each row that a step decides.
            allocated: bytes of each model's cache as it is, which may be more than it needs.
        """
        rows = needs.rows if rows is None else rows
        return self.held(needs, rows, allocated) + self.step(needs, rows, positions)

    def held(self, needs: Needs, rows: int, allocated: Mapping[str, int]) -> int:
        """Bytes of everything that is held between two steps; arguments as for `total`."""
        caches = 0
        for name, size in self._sizes.items():
            planned = rows * size.bytes(columns_for(self._widest(needs.columns, name)))
            caches += max(planned, allocated.get(name, 0))
        return caches + needs.prompts + needs.scoring

    def rows(
        self, needs: Needs, most: int, allocated: Mapping[str, int] = MappingProxyType({})
    ) -> int:
        """How many rows fit, up to ``most`` or ``needs.rows``; -1 if not even none does."""
        most = max(most, needs.rows)
        return (
            bisect_right(
                range(most + 1),
                self.limit,
                key=lambda rows: self.total(needs, rows=rows, allocated=allocated),
            )
            - 1
        )

    def positions(self, needs: Needs, most: int, allocated: Mapping[str, int]) -> int:
        """How many positions of each row a step may decide: up to ``most``, at least 1."""
        return 1 + bisect_right(
            range(2, most + 1),
            self.limit,
            key=lambda count: self.total(needs, positions=count, allocated=allocated),
        )


def cache_bytes(
    memory: int | float | str | None, devices: Iterable[torch.device], freed: int = 0
) -> int:
    """A memory limit in bytes.

    Args:
        memory: a whole number of bytes; a number and a unit, as in ``"2GiB"``; a share of the
            memory that is free now, above 0 and up to 1, as a number or as in ``"40%"``; None for
            the default share.
        devices: where the caches are. A share refers to the device with the least free memory.
        freed: bytes that count as free, since they are given back where caches need them.

    Raises:
        BacoError: the limit is none of these.
    """
    limit = SHARE if memory is None else _parse(memory) if isinstance(memory, str) else memory
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
        raise _invalid(memory)
    if isinstance(limit, int):
        return limit
    if limit > 1:
        raise _invalid(memory)
    return int((min(free_bytes(device) for device in devices) + freed) * limit)


def _parse(text: str) -> int | float:
    """Bytes as an integer, or a share as a float."""
    match = _SIZE.fullmatch(text.strip())
    unit = match[2].lower() if match else ""
    if match is None or (unit != "%" and unit not in _UNITS):
        raise _invalid(text)
    number = float(match[1])
    if unit == "%":
        return number / 100
    return number if not unit and "." in match[1] else int(number * _UNITS[unit])


def _invalid(memory: Any) -> BacoError:
    return BacoError(
        f"memory is {memory!r}: give bytes, a size as in 2GiB, or a share of free memory as in 40%"
    )


def free_bytes(device: torch.device) -> int:
    """Free memory of a device; that of the machine for devices that share its memory."""
    if device.type == "cuda":
        # Memory that torch has reserved and does not use is free too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available
