"""A KV cache of models with recurrent layers: a state for each row, beside keys and values.

A state has no columns, so nothing can be cut off it. It is saved before tokens that may be
rejected, and rolling back restores it. Either it is saved before every such token, or once before
all of them; then accepted tokens before a rejected one are read again, by the next forward.
"""

from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from baco.kv_cache.batched import BatchedKVCache, Forward
from baco.kv_cache.protocol import RowSize, finish
from baco.kv_cache.slots import Prefix, SlotCache, SlotLayer

# Of layers that keep nothing; older versions of transformers leave them out.
_EMPTY_LAYER = getattr(cache_utils, "DummyLayer", DynamicLayer)
# The states of all recurrent layers, each [rows, ...], in a fixed order.
States = list[Tensor]
# Weight of the newest drafts in what is remembered of earlier ones, and what is assumed before any:
# tokens of a row that must be read again.
_EMA_WEIGHT, _INITIAL_AGAIN = 0.1, 1.0


@dataclass(frozen=True, slots=True)
class RollBackCosts:
    """Estimated seconds of both ways to roll back, only to compare them.

    Attributes:
        byte: copying a byte of states.
        token: reading one more token of a row.
        column: reading one more token of every row in recurrent layers, which read one after the
            other.
    """

    byte: float
    token: float
    column: float


class _HybridLayer(LinearAttentionLayer, SlotLayer):  # type: ignore[misc]
    """A layer with both: attention and a recurrence side by side."""

    is_compileable = False

    def __init__(self, cache: Any, number_of_states: int) -> None:
        SlotLayer.__init__(self, cache)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *tables: Any, **states: Any) -> None:
        if tables:
            SlotLayer.lazy_initialization(self, *tables)
        else:
            LinearAttentionLayer.lazy_initialization(self, **states)


class HybridCache(SlotCache):
    """A `SlotCache` in which some layers have recurrent states.

    Args:
        rows, columns: as in `SlotCache`.
        config: of the model that writes text.
    """

    def __init__(self, rows: int, columns: int, config: Any) -> None:
        super().__init__(rows, columns)
        self.layer_class_to_replicate = None
        own = ref(self)
        for layer in DynamicCache(config=config).layers:
            states = getattr(layer, "number_of_states", 0)
            if states and isinstance(layer, DynamicLayer):
                self.layers.append(_HybridLayer(own, states))
            else:
                self.layers.append(SlotLayer(own) if isinstance(layer, DynamicLayer) else layer)
        self.save_at: Collection[int] = ()  # columns of a forward before which states are saved
        self._saved: dict[int, dict[int, States]] = {}  # by column and layer

    @property
    def slot_layers(self) -> list[Any]:
        return [layer for layer in self.layers if isinstance(layer, SlotLayer)]

    def layer(self, index: int) -> Any:
        return self.slot_layers[index]

    @property
    def state_layers(self) -> dict[int, Any]:
        """The recurrent layers, by number."""
        numbered = enumerate(self.layers)
        return {at: own for at, own in numbered if isinstance(own, LinearAttentionCacheLayerMixin)}

    def states(self) -> States:
        """The states of all layers; none where nothing was read."""
        return [state for layer in self.state_layers.values() for state in states_of(layer)]

    def set_states(self, states: States, like: "HybridCache") -> None:
        """Replace the states of all layers by others, in the order of those of ``like``."""
        remaining = iter(states)
        for own, other in zip(self.state_layers.values(), like.state_layers.values(), strict=True):
            set_states(own, [next(remaining) for _ in states_of(other)], other)

    def save(self, column: int, index: int) -> None:
        """Save the states of layer ``index`` before it reads a column."""
        copies = [state.clone() for state in states_of(self.layers[index])]
        self._saved.setdefault(column, {})[index] = copies

    def take_saved(self, column: int) -> States:
        """What was saved of all layers before a column was read, no longer held here."""
        layers = self._saved.pop(column)
        return [state for index in self.state_layers for state in layers[index]]


def has_states(config: Any) -> bool:
    """Does a model of this configuration keep recurrent states that a `HybridCache` can hold?"""
    try:
        layers = DynamicCache(config=config).layers
    except Exception:  # a configuration that transformers has no cache for
        return False
    known = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, _EMPTY_LAYER)
    recurrent = [isinstance(layer, LinearAttentionLayer) for layer in layers]
    plain = (type(layer) in known for layer in layers)
    return any(recurrent) and all(map(max, plain, recurrent))


def states_of(layer: Any) -> States:
    """The states of a layer that it has."""
    tables = (layer.conv_states, layer.recurrent_states)
    return [state for table in tables for state in table.values() if state is not None]


def set_states(layer: Any, states: States, like: Any) -> None:
    """Replace a layer's states by others, in the order of those of ``like``."""
    remaining = iter(states)
    layer.dtype, layer.device = like.dtype, like.device
    layer.conv_kernel_size = dict(like.conv_kernel_size)
    for name in ("conv", "recurrent"):
        table, initialized = f"{name}_states", f"is_{name}_states_initialized"
        for at, state in getattr(like, table).items():
            getattr(layer, table)[at] = None if state is None else next(remaining)
            getattr(layer, initialized)[at] = state is not None
    layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)


class RecurrentKVCache:
    """A `BatchedKVCache` for attention layers, and a state for each row and recurrent layer.

    Args:
        forward: of the model. Before the columns ``save_at`` of its `HybridCache` it saves the
            states of every recurrent layer there.
        config: of the model that writes text.
        chunk: tokens of a prompt that are read at once; None to read prompts whole, where a state
            can be continued by one token only.
        costs: of the model.
    """

    can_roll_back, can_cut, static_shapes = True, False, False

    def __init__(
        self, forward: Forward, config: Any, chunk: int | None, costs: RollBackCosts
    ) -> None:
        def new_cache(rows: int, columns: int) -> HybridCache:
            return HybridCache(rows, columns, config)

        self._rows = BatchedKVCache(forward, new_cache=new_cache, chunk=chunk or 2**30)
        self._whole, self._costs = chunk is None, costs
        # Tokens to read again if states are saved once: the mean over rows, and the most of a row.
        self._again = self._most_again = _INITIAL_AGAIN
        self._saved: list[tuple[list[int], States]] = []  # lengths of the rows, and their states
        self._drafted: int | None = None
        self._last: list[tuple[Tensor, Tensor] | None] = []  # each row's last token, and its logits
        self._ahead = set[int]()  # rows whose states are one token ahead
        self._example: HybridCache | None = None  # after one token

    @property
    def lengths(self) -> list[int]:
        return [length - (row in self._ahead) for row, length in enumerate(self._rows.lengths)]

    @property
    def forwards(self) -> int:
        return self._rows.forwards

    @property
    def tokens(self) -> int:
        return self._rows.tokens

    @property
    def _cache(self) -> HybridCache:
        cache = self._rows.cache
        assert isinstance(cache, HybridCache)
        return cache

    def prefill(
        self, ids: Sequence[int], samples: int = 1, *, begun: Prefix | None = None
    ) -> Generator[int, None, Prefix]:
        return (yield from self._rows.prefill(ids, samples, begun=begun))

    def copy_prefix(self, prefix: Prefix | None, count: int) -> None:
        rows, before = len(self._last), self._cache.states()
        self._rows.copy_prefix(prefix, count)
        self._last += [None] * count
        like, states = self._states_after(prefix)
        states = [state.expand(count, *state.shape[1:]) for state in states]
        if rows:
            states = [torch.cat(pair) for pair in zip(before, states, strict=True)]
        else:
            states = [state.clone() for state in states]
        self._cache.set_states(states, like)

    def _states_after(self, prefix: Prefix | None) -> tuple[HybridCache, States]:
        """The states after a prompt, and the cache whose order they have."""
        if prefix is not None and prefix.length:
            assert isinstance(prefix.cache, HybridCache)
            return prefix.cache, prefix.cache.states()
        if self._example is None:
            example = finish(self._rows.prefill([0])).cache
            assert isinstance(example, HybridCache)
            self._example = example
        return self._example, [torch.zeros_like(state) for state in self._example.states()]

    def shares_prefix(self, tokens: int, samples: int) -> bool:  # noqa: ARG002
        return False

    def prefix_variant(self, tokens: int) -> int:  # noqa: ARG002
        return 0

    def copy_block(self, source: Prefix | int, start: int, stop: int) -> Any:
        length = self.lengths[source] if isinstance(source, int) else source.length
        if (start, stop) != (0, length) or source in self._ahead:
            return None
        cache = self._cache if isinstance(source, int) else source.cache
        assert isinstance(cache, HybridCache)
        row = source if isinstance(source, int) else 0
        states = [state[row : row + 1].clone() for state in cache.states()]
        return self._rows.copy_block(source, start, stop), states

    def load_blocks(self, blocks: Sequence[Any], tokens: int, room: int) -> Prefix:
        ((attention, states),) = blocks
        prefix = self._rows.load_blocks([attention] if attention else [], tokens, room)
        assert isinstance(prefix.cache, HybridCache)
        like, _ = self._states_after(None)
        prefix.cache.set_states([state.clone() for state in states], like)
        return prefix

    def expect_drafts(self, tokens: int) -> None:
        self._drafted = tokens

    def extend(self, tokens: Tensor, counts: Sequence[int], keep: int) -> Tensor:
        # A row that is one token ahead has read the first of its tokens.
        again = {row: count for row in self._ahead if (count := counts[row])}
        self._ahead -= again.keys()
        unread = [count - (row in again) for row, count in enumerate(counts)]
        logits = self._extend(tokens, unread, keep) if any(unread) else None
        for row, count in again.items():
            last = self._last[row]
            assert last is not None
            if int(last[0]) != int(tokens[row, -count]):
                raise ValueError("a recurrent state has read another token in this place")
            if logits is None:
                width = max(len(kept[1]) for kept in self._last if kept is not None)
                logits = last[1].new_zeros(len(counts), keep, width)
            if count <= keep:
                logits[row, -count, : len(last[1])] = last[1]
        assert logits is not None
        newest = zip(tokens[:, -1], logits[:, -1].clone(), strict=True)
        self._last = [
            new if count else old
            for new, count, old in zip(newest, counts, self._last, strict=True)
        ]
        return logits

    def _extend(self, tokens: Tensor, counts: Sequence[int], keep: int) -> Tensor:
        """Read tokens, and save the states before those that may be removed again."""
        before, span = list(self._rows.lengths), max(counts)
        cache = self._cache
        cache.save_at = self._columns_to_save(span)
        self._drafted = None
        logits = self._rows.extend(tokens[:, -span:], counts, min(keep, span))
        for column in cache.save_at:
            pairs = zip(before, counts, strict=True)
            lengths = [length + max(0, count - (span - column)) for length, count in pairs]
            self._saved.append((lengths, cache.take_saved(column)))
        missing = keep - logits.shape[1]
        return torch.nn.functional.pad(logits, (0, 0, missing, 0)) if missing > 0 else logits

    def _columns_to_save(self, span: int) -> Sequence[int]:
        """The columns of the next forward before which states are saved."""
        drafted = span if self._drafted is None else min(self._drafted, span)
        if not drafted or self._drafted is None or self._saving_pays(drafted):
            return range(span - drafted, span)
        if self._saved:
            return ()
        # The last token before the drafts is read with them, at once, where that is possible.
        first = span - drafted
        return (0 if first == 1 and not self._whole else first,)

    def _saving_pays(self, drafted: int) -> bool:
        """Whether it takes no longer to save the states before each of the next ``drafted`` tokens
        than to save them once and to read tokens again.
        """
        copies = drafted - (not self._saved)
        copied = copies * sum(state.nbytes for state in self._cache.states())
        rows, costs = len(self._last), self._costs
        again = costs.token * rows * self._again + costs.column * self._most_again
        return costs.byte * copied <= again

    def roll_back(self, lengths: Sequence[int]) -> None:
        pairs = zip(self.lengths, lengths, strict=True)
        behind = {row: kept for row, (now, kept) in enumerate(pairs) if kept < now}
        restored = self._restore(behind)
        self._saved.clear()
        true_lengths = self._rows.lengths
        ahead = behind.keys() - restored.keys()
        for row in ahead:
            right = behind[row] == true_lengths[row] - 1 and self._last[row] is not None
            if not right or row in self._ahead:
                raise ValueError("a recurrent state is rolled back only to where it was saved")
        self._ahead |= ahead
        self._rows.roll_back(
            [
                true_lengths[row] if row in self._ahead else restored.get(row, kept)
                for row, kept in enumerate(lengths)
            ]
        )

    def _restore(self, behind: dict[int, int]) -> dict[int, int]:
        """Restore the states of rows where they were last saved up to the lengths ``behind``.

        Returns:
            The length of each row that was restored; others were not saved.
        """
        restored, again = dict[int, int](), dict.fromkeys(range(len(self._last)), 0)
        for saved_lengths, saved in reversed(self._saved):
            rows = [
                row
                for row, kept in behind.items()
                if row not in restored and saved_lengths[row] <= kept
            ]
            if rows:
                for state, old in zip(self._cache.states(), saved, strict=True):
                    state[rows] = old[rows]
                restored |= {row: saved_lengths[row] for row in rows}
        if self._saved and again:
            first, _ = self._saved[0]
            again |= {row: max(0, kept - first[row]) for row, kept in behind.items()}
            mean = sum(again.values()) / len(again)
            self._again += _EMA_WEIGHT * (mean - self._again)
            self._most_again += _EMA_WEIGHT * (max(again.values()) - self._most_again)
        return restored

    def drop(self, *, kept: Sequence[int]) -> None:
        like, states = self._cache, self._cache.states()
        self._saved.clear()
        self._rows.drop(kept=kept)
        if kept and list(kept) != list(range(len(self._last))):
            self._cache.set_states([state[list(kept)] for state in states], like)
        self._last = [self._last[row] for row in kept]
        self._ahead = {new for new, old in enumerate(kept) if old in self._ahead}

    def score(self, ids: Sequence[int], chunk: int) -> Iterator[Tensor]:
        return self._rows.score(ids, len(ids) if self._whole else chunk)

    def clear(self, running: Sequence[int], ended: Sequence[int]) -> None:
        self._rows.clear(running, ended)
        for state in self._cache.states():
            state[list(ended)] = 0

    def row_size(self) -> RowSize:
        cache = finish(self._rows.prefill([1, 2])).cache
        assert isinstance(cache, HybridCache)
        states = [state.nbytes for state in cache.states()]
        layers = cache.initialized()
        tables = [table for layer in layers for table in (layer.keys, layer.values)]
        per_token = [t.shape[1] * t.shape[3] * t.element_size() for t in tables]
        return RowSize(sum(states), sum(per_token), max(states), max(per_token, default=0))

    def allocated_bytes(self) -> int:
        return self._rows.allocated_bytes()

    def preallocate(self, rows: int, columns: int) -> None:
        """The tables move."""

    def shrink(self, columns: int) -> None:
        self._rows.shrink(columns)
