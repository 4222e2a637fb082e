"""Prefixes of prompts and answers that outlive their rows, so that later prompts are read in part.

Requests never wait for memory that kept prefixes take: the scheduler shrinks them first.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from baco.engine.budget import Budget
from baco.engine.runner import ModelRunner
from baco.engine.sequence import Request, SequenceState
from baco.kv_cache.prefix_cache import Kind, PrefixCache


class KeptPrefixes:
    """Copies what models have read between an engine's caches and a `PrefixCache`.

    Models that read every prompt whole take no part.

    Args:
        runner: has the caches.
        budget: knows the size of their rows.
        cache: holds the copies; None to keep none.
        limit: bytes of all copies.
    """

    def __init__(
        self, runner: ModelRunner, budget: Budget, cache: PrefixCache | None, limit: int
    ) -> None:
        self._runner, self._budget = runner, budget
        self._cache, self._limit = PrefixCache() if cache is None else cache, limit
        models = runner.models.items() if cache is not None else ()
        self._names = {name for name, model in models if model.prefills_in_chunks}

    @property
    def bytes(self) -> int:
        """Bytes of all copies, those of other engines with the same cache included."""
        return self._cache.bytes

    @property
    def keeps(self) -> bool:
        """Whether any model's prefixes are kept."""
        return bool(self._names)

    def matching_tokens(self, request: Request) -> int:
        """How many tokens of a request's prompt need not be read, of all models together."""
        return sum(
            self._cache.matching_tokens(kind, ids, divisible=self._divisible(name))
            for name, kind, ids in self._texts(request)
        )

    def use(self, request: Request) -> None:
        """Let the prefixes of a request's prompt be dropped last."""
        for name, kind, ids in self._texts(request):
            self._cache.use(kind, ids, divisible=self._divisible(name))

    def load(self, request: Request) -> dict[str, tuple[int, Any]]:
        """The kept prefixes of a request's prompt.

        Returns:
            For each model that has one, its tokens, and the prefix as `ModelRunner.prefill` takes
            it.
        """
        loaded = {}
        for name, kind, ids in self._texts(request):
            match = self._cache.find(kind, ids, divisible=self._divisible(name))
            if match.tokens:
                cache = self._runner.caches[name]
                begun = cache.load_blocks(match.blocks, match.tokens, len(ids))
                loaded[name] = match.tokens, begun
        return loaded

    def keep_prompt(self, request: Request, prefixes: Mapping[str, Any], room: int) -> None:
        """Keep a prompt that was read.

        Args:
            request: of the prompt.
            prefixes: the prompt, as `ModelRunner.prefill` returned it.
            room: bytes that all copies may take.
        """
        for name, kind, ids in self._texts(request):
            self._keep(name, kind, ids, prefixes[name], room, prompt=len(ids))

    def keep_row(self, row: int, sequence: SequenceState, room: int) -> None:
        """Keep the prompt and the answer of a row that has ended, as far as models have read them.

        Args:
            row: its number in the caches.
            sequence: the row's.
            room: bytes that all copies may take.
        """
        if sequence.finish_reason == "error":
            return
        for name in self._names:
            prompt = sequence.request.ids(name)
            ids = (*prompt, *sequence.tokens_of(name))[: self._runner.caches[name].lengths[row]]
            kind = self._kind(name, sequence.request, len(ids))
            self._keep(name, kind, ids, row, room, prompt=len(prompt) - 1)

    def shrink(self, room: int) -> None:
        """Drop the least recently used copies, until all of them take at most ``room`` bytes."""
        self._cache.shrink(min(room, self._limit))

    def _keep(
        self, name: str, kind: Kind, ids: tuple[int, ...], source: Any, room: int, *, prompt: int
    ) -> None:
        cache = self._runner.caches[name]
        self._cache.keep(
            kind,
            ids,
            lambda start, stop: cache.copy_block(source, start, stop),
            lambda tokens: self._budget.prompt(name, tokens),
            min(room, self._limit),
            prompt=prompt,
            divisible=self._divisible(name),
        )

    def _texts(self, request: Request) -> Iterable[tuple[str, Kind, tuple[int, ...]]]:
        """What each model reads of a request's prompt before the first step."""
        for name in self._runner.readers(request):
            if name in self._names:
                ids = request.ids(name)[:-1]
                yield name, self._kind(name, request, len(ids)), ids

    def _kind(self, name: str, request: Request, tokens: int) -> Kind:
        variant = self._runner.caches[name].prefix_variant(tokens)
        return Kind(name, variant, request.cache_salt)

    def _divisible(self, name: str) -> bool:
        return self._runner.caches[name].can_cut
