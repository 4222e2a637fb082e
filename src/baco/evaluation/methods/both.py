"""A loop over both halves for methods that need more than a router sees: mixed logits, the text.

Like the engine it works on rows of many lengths at once and drops those that end; unlike the
engine it takes a whole batch in and gives it back finished.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from baco.drawing import DrawTable, draw
from baco.errors import BacoError
from baco.evaluation.methods.protocol import Answer
from baco.evaluation.records import Prompt, Source
from baco.noise import noise_keys
from baco.sampling import SamplingParams
from baco.text import AnswerText

if TYPE_CHECKING:
    from baco import Baco
    from baco.pair import Pair

MEMORY_SHARE = 0.5  # of what is free, for cached keys and values


@dataclass(slots=True, eq=False)
class Row:
    """One sample while it grows."""

    prompt: Prompt
    index: int
    sample: int
    limit: int
    last: tuple[int, int]  # last token of the prompt, as base and aligned read it
    text: AnswerText
    tokens: list[int] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    finish_reason: str | None = None


# (base's raw logits [B, V], aligned's, the rows) → logits to draw from [B, V], True for base [B]
Step = Callable[[Tensor, Tensor, Sequence[Row]], tuple[Tensor, Tensor]]


@torch.inference_mode()
def decode(
    baco: "Baco", prompts: Sequence[Prompt], params: SamplingParams, step: Step
) -> list[list[Row]]:
    """The n finished rows of every prompt.

    Args:
        baco: the pair, and how many rows go at once.
        prompts: the questions.
        params: seeded; no repetition penalty.
        step: mixes or picks, called at every token.

    Raises:
        BacoError: a prompt that does not fit the context window, or penalties.
    """
    if params.penalises or params.logit_bias:
        raise BacoError("penalties and biases go with routers only: leave this method out")
    waiting = [(index, sample) for index in range(len(prompts)) for sample in range(params.n)]
    done: list[list[Row]] = [[] for _ in prompts]
    while waiting:
        batch = _Batch(baco.pair, prompts, params)
        count = batch.admit(waiting[: baco.max_rows])
        del waiting[:count]
        while batch.rows:
            for row in batch.advance(step):
                done[row.index].append(row)
    for rows in done:
        rows.sort(key=lambda row: row.sample)
    return done


class _Batch:
    """Rows that are decoded together."""

    def __init__(self, pair: "Pair", prompts: Sequence[Prompt], params: SamplingParams) -> None:
        self.pair, self.prompts, self.params = pair, prompts, params
        self.rows: list[Row] = []
        self._stores = (pair.base.store(), pair.aligned.store())
        self._device = pair.aligned.device

    def admit(self, wanted: Sequence[tuple[int, int]]) -> int:
        """Take in as many of the (prompt, sample) as memory has room for; how many that were."""
        room = None
        for index in dict.fromkeys(index for index, _ in wanted):
            samples = [sample for i, sample in wanted if i == index]
            rendered = self.pair.renderer.render(self.prompts[index].messages)
            ids = (rendered.base_ids, rendered.aligned_ids)
            limit = self._limit(ids)
            prefixes = [s.prefill(i[:-1]) for s, i in zip(self._stores, ids, strict=True)]
            if room is None:
                room = self._room(prefixes, max(map(len, ids)) + limit)
            samples = samples[: room - len(self.rows)]
            for store, prefix in zip(self._stores, prefixes, strict=True):
                if samples:
                    store.admit(prefix, len(samples))
            for sample in samples:
                text = AnswerText(
                    self.pair.tokenizer, self.params.stop, self.pair.renderer.turn_opening
                )
                last = (ids[0][-1], ids[1][-1])
                self.rows.append(Row(self.prompts[index], index, sample, limit, last, text))
            if len(self.rows) >= room:
                break
        return len(self.rows)

    def _limit(self, ids: tuple[Sequence[int], Sequence[int]]) -> int:
        halves = (self.pair.base, self.pair.aligned)
        left = min(half.context - len(i) for half, i in zip(halves, ids, strict=True))
        if left < 1:
            raise BacoError(f"prompt of {max(map(len, ids))} tokens: no room for an answer is left")
        return min(self.params.max_tokens, left)

    def _room(self, prefixes: Sequence[Any], longest: int) -> int:
        """How many rows of the longest kind the memory holds, at least one."""
        pairs = zip(self._stores, prefixes, strict=True)
        per_token = sum(store.bytes_per_token(prefix) for store, prefix in pairs)
        if self._device.type == "cuda":
            free = torch.cuda.mem_get_info(self._device)[0]
        else:
            free = psutil.virtual_memory().available
        return max(1, int(free * MEMORY_SHARE) // max(1, per_token * longest))

    def advance(self, step: Step) -> list[Row]:
        """One token for every row; the rows that ended, which leave."""
        halves = (self.pair.base, self.pair.aligned)
        read = [
            torch.tensor([[row.tokens[-1] if row.tokens else row.last[i]] for row in self.rows])
            for i in range(2)
        ]
        logits = [
            half.fit(store.read(tokens, [1] * len(self.rows), 1)[:, 0]).to(self._device)
            for half, store, tokens in zip(halves, self._stores, read, strict=True)
        ]
        mixed, source = step(logits[0], logits[1], self.rows)
        table = DrawTable.of([self.params] * len(self.rows), self._device)
        said = draw(mixed, table, self._keys())
        for row, token, base in zip(self.rows, said.tolist(), source.tolist(), strict=True):
            self._append(row, token, "base" if base else "aligned")
        ended = [row for row in self.rows if row.finish_reason is not None]
        if ended:
            alive = [i for i, row in enumerate(self.rows) if row.finish_reason is None]
            self.rows = [self.rows[i] for i in alive]
            if alive:
                for store in self._stores:
                    store.reorder(alive)
        return ended

    def _keys(self) -> Tensor:
        assert self.params.seed is not None
        told = [(self.params.seed, row.sample, len(row.tokens)) for row in self.rows]
        columns = torch.tensor(told, device=self._device)
        return noise_keys(columns[:, 0], columns[:, 1], columns[:, 2])

    def _append(self, row: Row, token: int, source: Source) -> None:
        row.tokens.append(token)
        row.sources.append(source)
        _, stopped = row.text.push(token, source)
        if stopped:
            row.finish_reason = "stop"
            del row.tokens[row.text.tokens :], row.sources[row.text.tokens :]
        elif token in self.pair.end_ids or len(row.tokens) >= row.limit:
            row.finish_reason = "stop" if token in self.pair.end_ids else "length"
            row.text.close()


def finished(row: Row, *, sourced: bool) -> Answer:
    """A finished row as an answer, with its sources where it has any."""
    assert row.finish_reason is not None
    if not sourced:
        return Answer(row.text.text, len(row.tokens), row.finish_reason)
    pieces: list[tuple[str, Source]] = []
    for piece in row.text.pieces:
        if pieces and pieces[-1][1] == piece.source:
            pieces[-1] = (pieces[-1][0] + piece.text, piece.source)
        else:
            pieces.append((piece.text, piece.source))
    share = row.sources.count("base") / len(row.sources) if row.sources else 0.0
    switches = sum(a != b for a, b in zip(row.sources, row.sources[1:], strict=False))
    return Answer(row.text.text, len(row.tokens), row.finish_reason, tuple(pieces), share, switches)
