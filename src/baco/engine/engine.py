"""The loop: forward both halves, route, draw, emit.

It works on token ids; it knows nothing of text. Prompts are read once and shared by their samples;
a sequence that ends leaves the batch at once and a waiting one takes its place, in order.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from baco.drawing import draw, penalise
from baco.engine.batch import Batch
from baco.engine.cache import Store
from baco.engine.sequence import Request, Sequence
from baco.errors import BacoError
from baco.half import Half
from baco.pair import Pair
from baco.routing.select import select

# The part of free memory that cached keys and values may take.
MEMORY_SHARE = 0.6


@dataclass(slots=True)
class _Waiting:
    """A request of which some samples are not yet in the batch, and its prompt once read."""

    sequences: deque[Sequence]
    prefixes: list[Any] | None = None


class Engine:
    """Decodes requests on one pair, each with its own router.

    Args:
        pair: the two halves.
        max_rows: sequences decoded at once; more wait.
        memory: bytes that cached keys and values may take; by default most of what is free.
    """

    def __init__(
        self,
        pair: Pair,
        *,
        max_rows: int = 256,
        memory: int | None = None,
    ) -> None:
        self.pair = pair
        self.max_rows = max_rows
        self._halves: dict[str, Half] = {"base": pair.base, "aligned": pair.aligned}
        self._stores: dict[str, Store] = {n: half.store() for n, half in self._halves.items()}
        self._device = pair.aligned.device
        self._batch = Batch(self._device, pair.vocabulary.size)
        self._vocabulary = pair.vocabulary.to(self._device)
        self._banned = pair.banned.to(self._device)
        self._memory = memory if memory is not None else _free_memory(self._device)
        self._waiting: deque[_Waiting] = deque()

    def add(self, request: Request) -> list[Sequence]:
        """Queue the n samples of a request; BacoError where its prompt fits no context window."""
        room = self._room(request)
        sequences = [
            Sequence(request, sample, min(request.params.max_tokens, room))
            for sample in range(request.params.n)
        ]
        self._waiting.append(_Waiting(deque(sequences)))
        return sequences

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or len(self._batch) > 0

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Append one token to every sequence in the batch; the sequences that got one."""
        self._admit()
        if not self._batch.rows:
            return []
        logits_base, logits_aligned = self._forward()
        keys = self._batch.keys()
        logits, source = self._select(logits_base, logits_aligned, keys)
        if self._batch.draws.any_penalty:
            logits = penalise(logits, *self._batch.seen(source), self._batch.draws)
        if self._batch.draws.logit_bias is not None:
            logits = logits + self._batch.draws.logit_bias
        token = draw(logits, self._batch.draws, keys)
        self._batch.advance(token, source)
        return self._emit(token, source, torch.where(source[:, None], logits_base, logits_aligned))

    def _select(self, base: Tensor, aligned: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        rules = [(row.request.router, row.request.switch) for row in self._batch.rows]
        logits, source = torch.empty(0), torch.empty(0)
        for index, (router, switch) in enumerate(dict.fromkeys(rules)):
            found = select(
                base,
                aligned,
                self._batch.previous,
                self._batch.active,
                router=router,
                vocabulary=self._vocabulary,
                banned=self._banned,
                coin=self._batch.coin(keys),
                switch=switch,
            )
            if index == 0:
                logits, source = found
            else:
                mine = torch.tensor([rule == (router, switch) for rule in rules])
                logits = found[0].where(mine[:, None].to(logits.device), logits)
                source = found[1].where(mine.to(source.device), source)
        return logits, source

    @property
    def waiting(self) -> int:
        """Sequences that have no row yet."""
        return sum(len(head.sequences) for head in self._waiting)

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._batch)

    def stop(self, sequence: Sequence, tokens: int) -> None:
        """End a sequence early and keep its first ``tokens`` tokens; it leaves the batch."""
        sequence.finish_reason = "stop"
        for column in (sequence.tokens, sequence.sources, sequence.logprobs):
            del column[tokens:]
        del sequence.top_logprobs[tokens:]

    def _room(self, request: Request) -> int:
        lengths = {"base": len(request.base_ids), "aligned": len(request.aligned_ids)}
        for name, half in self._halves.items():
            if lengths[name] >= half.context:
                raise BacoError(
                    f"prompt of {lengths[name]} tokens, as the {name} model reads it: its context "
                    f"window is {half.context}; shorten the prompt"
                )
        return min(half.context - lengths[name] for name, half in self._halves.items())

    def _admit(self) -> None:
        """Drop ended rows, then fill up from the queue, in order, as far as memory goes."""
        self._compact()
        while self._waiting and len(self._batch) < self.max_rows:
            head = self._waiting[0]
            while head.sequences and head.sequences[0].finish_reason:
                head.sequences.popleft()
            if not head.sequences:
                self._waiting.popleft()
                continue
            head.prefixes = head.prefixes or self._prefill(head.sequences[0].request)
            count = min(self._affordable(head), self.max_rows - len(self._batch))
            if count <= 0:
                return
            batch = [head.sequences.popleft() for _ in range(min(count, len(head.sequences)))]
            for store, prefix in zip(self._stores.values(), head.prefixes, strict=True):
                store.admit(prefix, len(batch))
            self._batch.admit(batch)

    def _prefill(self, request: Request) -> list[Any]:
        # All but the last token: that one is read in the first step, as every later token is.
        prompts = {"base": request.base_ids, "aligned": request.aligned_ids}
        return [store.prefill(prompts[name][:-1]) for name, store in self._stores.items()]

    def _affordable(self, head: _Waiting) -> int:
        """How many more rows like the head's next one memory has room for, at their longest."""
        assert head.prefixes is not None
        stores = list(zip(self._stores.values(), head.prefixes, strict=True))
        per_token = sum(store.bytes_per_token(prefix) for store, prefix in stores)
        if per_token == 0:
            return self.max_rows
        row = _longest(head.sequences[0]) * per_token
        widest = max([_longest(s) for s in self._batch.rows] + [_longest(head.sequences[0])])
        rows = self._memory // (widest * per_token)
        if rows < 1:
            raise BacoError(
                f"one answer may need {row / 2**30:.1f} GiB of cache and "
                f"{self._memory / 2**30:.1f} GiB are left: lower max_tokens or shorten the prompt"
            )
        return rows - len(self._batch)

    def _compact(self) -> None:
        rows = self._batch.rows
        alive = [index for index, row in enumerate(rows) if row.finish_reason is None]
        if len(alive) == len(rows):
            return
        # Rows from the end fill the holes, so that few are copied.
        order = [index for index in alive if index < len(alive)]
        tail = iter(index for index in alive if index >= len(alive))
        filled = set(order)
        order = [i if i in filled else next(tail) for i in range(len(alive))]
        for store in self._stores.values():
            store.reorder(order)
        self._batch.reorder(order)

    def _forward(self) -> tuple[Tensor, Tensor]:
        rows = []
        for name, half in self._halves.items():
            tokens = [
                row.tokens[-1] if row.tokens else getattr(row.request, f"{name}_ids")[-1]
                for row in self._batch.rows
            ]
            logits = self._stores[name].step(torch.tensor(tokens, dtype=torch.int64))
            rows.append(half.fit(logits).to(self._device))
        return rows[0], rows[-1]

    def _emit(self, token: Tensor, source: Tensor, raw: Tensor) -> list[Sequence]:
        logp = raw.gather(1, token[:, None])[:, 0] - raw.logsumexp(dim=-1)
        wanted = max((row.request.params.logprobs or 0 for row in self._batch.rows), default=0)
        top = raw.log_softmax(dim=-1).topk(wanted, dim=-1) if wanted else None
        told = zip(self._batch.rows, token.tolist(), source.tolist(), logp.tolist(), strict=True)
        for index, (row, said, base, logprob) in enumerate(told):
            row.tokens.append(said)
            row.sources.append("base" if base else "aligned")
            row.logprobs.append(logprob)
            if top is not None:
                count = row.request.params.logprobs or 0
                ids, values = top.indices[index, :count], top.values[index, :count]
                row.top_logprobs.append(dict(zip(ids.tolist(), values.tolist(), strict=True)))
            if said in self.pair.end_ids:
                row.finish_reason = "stop"
            elif len(row.tokens) >= row.limit:
                row.finish_reason = "length"
        return list(self._batch.rows)


def _longest(sequence: Sequence) -> int:
    """Columns a row may come to need: the longer prompt and the whole answer."""
    request = sequence.request
    return max(len(request.base_ids), len(request.aligned_ids)) + sequence.limit


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE)
    return int(psutil.virtual_memory().available * MEMORY_SHARE)
