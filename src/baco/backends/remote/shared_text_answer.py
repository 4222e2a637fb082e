"""One answer from two servers whose models have different tokenizers and share its text.

The active source drafts a span in its own ids. At every word boundary of the span the router
decides; where it reads the other model, that model's rows after these beginnings of the text are
requested in one call. Tokens are kept up to the first boundary where the router picks the other
source, which drafts next. The rules are those of `baco.engine.shared_text_engine`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from baco.backends.remote.answer import (
    MAX_SINGLE,
    MAX_SPAN,
    Totals,
    Update,
    tokens_per_cost,
)
from baco.backends.remote.model import TOP_DRAFTED, Draws, RemoteModel
from baco.backends.remote.table import Table
from baco.backends.remote.view import OTHER, NextSource, needed_quantity
from baco.backends.remote.wire import Row, ServerTokens
from baco.engine.sequence import SequenceState, Why
from baco.engine.speculative.acceptance import AcceptanceStats
from baco.errors import BacoError
from baco.models.pair import Pair
from baco.routing.signals import Distribution, Signals
from baco.routing.two_vocabularies import is_boundary
from baco.sampling.noise import ROUTER, coin, noise_keys
from baco.source import MODELS, Source
from baco.text.shared_text import EncodingStats, OwnTokens, SharedText, is_open


@dataclass(frozen=True, slots=True)
class _Boundary:
    """The other model at a word boundary of a span.

    Attributes:
        row: its row there.
        own: its ids of the text up to there.
    """

    row: Row
    own: OwnTokens


class SharedTextAnswer:
    """Decodes one sequence.

    Args:
        sequence: the request and sample; this class appends nothing to it.
        models: on both servers.
        pair: both vocabularies.
        totals: of the engine, to be updated.
    """

    def __init__(
        self,
        sequence: SequenceState,
        models: Mapping[Source, RemoteModel],
        pair: Pair,
        totals: Totals,
    ) -> None:
        assert pair.own_vocabularies is not None
        self._sequence, self._models, self._pair = sequence, models, pair
        self._own, self._totals = pair.own_vocabularies, totals
        request = sequence.request
        self._router = request.router
        self._draws = Draws(request.params, sequence.sample, request.noise_seed)
        self._acceptance = AcceptanceStats()
        self._text = SharedText(
            {source: OwnTokens(pair.own_vocabularies[source].tokenizer) for source in MODELS}
        )
        self._stats = EncodingStats()
        self._count = 0  # tokens so far
        self._active: Source | None = None
        self._next: NextSource | None = None
        self._top = max(TOP_DRAFTED, request.params.logprobs or 0)

    async def step(self) -> Update:
        """Draft the next span and accept its tokens up to a change of the source; errors as for
        :meth:`Answer.step`.
        """
        if self._active is None and self._next is None:
            self._next = NextSource(await self._first_source(), masked=False)
        source = self._next.source if self._next is not None else self._active
        assert source is not None
        own, model = self._text.own[source], self._models[source]
        own.read(bytes(self._text.data), self._stats)
        length, position = self._plan(source), self._count
        draft = await model.draft(self._ids(source), length, self._draws, position, self._top)
        update = Update(self._sequence)
        accepted = await self._accept(source, draft, update)
        if self._router.only is None:
            self._acceptance.update_self_draft(source, accepted, len(draft.tokens), ())
        self._totals.count_span(len(draft.tokens), accepted)
        return update

    def _ids(self, source: Source, own: OwnTokens | None = None) -> list[int]:
        """Prompt and answer in the ids of a model."""
        ids = (own or self._text.own[source]).ids
        return [*self._sequence.request.ids(source), *ids]

    def _plan(self, source: Source) -> int:
        """The length of the span with the most expected tokens per cost."""
        room = self._sequence.limit - self._count
        if self._router.only is not None:
            return min(MAX_SINGLE, room)
        rate = self._acceptance.by_drafter[source]
        lengths = range(1, min(MAX_SPAN, room) + 1)
        return max(lengths, key=lambda length: tokens_per_cost(rate, length))

    # --- accept -----------------------------------------------------------------------------------

    async def _accept(self, source: Source, draft: ServerTokens, update: Update) -> int:
        """Append the tokens of a draft up to the first boundary where the source changes.

        Returns:
            How many of them were accepted.
        """
        tokens = [token for token in draft.tokens if token is not None]
        rows = [row for row in draft.rows if row is not None]
        begun, self._next = self._next, None
        boundaries = await self._boundaries(source, tokens, rows, begun is not None)
        for at, (token, row) in enumerate(zip(tokens, rows, strict=True)):
            known: dict[Source, Row] = {source: row}
            routed = begun if at == 0 and begun is not None else NextSource(source, masked=False)
            asked = at in boundaries
            if asked:
                other = boundaries[at]
                ids = {source: self._ids(source)}
                if other is not None:
                    known[OTHER[source]] = other.row
                    self._text.own[OTHER[source]] = other.own
                    ids[OTHER[source]] = self._ids(OTHER[source])
                if await self._route(known, ids) != source:
                    self._next = NextSource(OTHER[source], masked=True)
                    return at
            asked = asked or (begun is not None and at == 0)
            if not self._is_allowed(token, row, routed):
                await self._redraw(routed, row, known, asked, update)
                return at
            self._append(source, token, row, known, asked, update)
            if update.finish_reason is not None:
                return at + 1
        return len(tokens)

    async def _boundaries(
        self, source: Source, tokens: list[int], rows: list[Row], begun: bool
    ) -> dict[int, _Boundary | None]:
        """The places of a draft where the router decides, with the other model where it is read."""
        if self._router.only is not None:
            return {}
        own, places, data = self._own[source], list[tuple[int, bytes]](), bytes(self._text.data)
        for at, (token, row) in enumerate(zip(tokens, rows, strict=True)):
            row.check_top()
            starts_word = bool(own.vocabulary.word_start[row.top])
            is_first = at == 0 and begun
            if not is_first and is_boundary(
                first=False, text_is_open=is_open(data[-4:]), starts_word=starts_word
            ):
                places.append((at, data))
            data += own.tokenizer.data[token]
        if self._router.reads <= {source} or not places:
            return {at: None for at, _ in places}
        other, texts = OTHER[source], list[OwnTokens]()
        reader = self._text.own[other]
        for _, text in places:
            reader = reader.copy()
            reader.read(text, self._stats)
            texts.append(reader)
        found = await self._models[other].next_rows(
            [self._ids(other, reader) for reader in texts], self._top
        )
        return {
            at: _Boundary(row, reader)
            for (at, _), row, reader in zip(places, found, texts, strict=True)
        }

    async def _redraw(
        self,
        routed: NextSource,
        row: Row,
        known: Mapping[Source, Row],
        asked: bool,
        update: Update,
    ) -> None:
        """Append a token that the source may write, in place of the one that it drafted."""
        source = routed.source
        token, own_row = await self._models[source].draw(
            self._ids(source),
            row,
            lambda token: self._may_write(token, routed),
            self._draws,
            self._count,
            self._top,
        )
        self._append(source, token, own_row, known, asked, update)

    def _may_write(self, token: int, routed: NextSource) -> bool:
        own = self._own[routed.source]
        if routed.source == "base" and bool(own.banned[token]):
            return False
        return not routed.masked or bool(own.vocabulary.word_start[token])

    def _is_allowed(self, token: int, row: Row, routed: NextSource) -> bool:
        """May the source write its draft token?"""
        if not self._may_write(token, routed):
            return False
        params = self._sequence.request.params
        unrestricted = routed.source == "aligned" and not routed.masked
        if params.temperature == 0 or params.min_p == 0 or unrestricted:
            return True
        # min_p is a share of the most likely token's probability: that token must be allowed too.
        return row.has_top and self._may_write(row.top, routed)

    def _append(
        self,
        source: Source,
        token: int,
        row: Row,
        known: Mapping[Source, Row],
        asked: bool,
        update: Update,
    ) -> None:
        request, logprob = self._sequence.request, row.logprob(token)
        self._text.append(source, token)
        self._count, self._active = self._count + 1, source
        self._totals.tokens[source] += 1
        update.tokens.append(token)
        update.sources.append(source)
        update.logprobs.append(logprob)
        if request.params.logprobs:
            update.tops.append(row.best(request.params.logprobs))
        if request.explain:
            update.whys.append(_why(source, logprob, known.get("base"), asked))
        context = self._models[source].ability.context or math.inf
        room = min(self._pair.model(source).context, context) - len(request.ids(source))
        if token in self._own[source].end_ids:
            update.finish_reason = "stop"
        elif self._count >= self._sequence.limit or len(self._text.own[source].ids) >= room:
            update.finish_reason = "length"

    # --- route ------------------------------------------------------------------------------------

    async def _first_source(self) -> Source:
        """The source of the first token."""
        if self._router.only is not None:
            return self._router.only
        rows: dict[Source, Row] = {}
        for source in self._router.reads:
            (rows[source],) = await self._models[source].next_rows([self._ids(source)], self._top)
        return await self._route(rows, {source: self._ids(source) for source in rows})

    async def _route(self, rows: dict[Source, Row], ids: Mapping[Source, list[int]]) -> Source:
        """What the router picks; more tokens of a row are requested where it is undecided.

        Args:
            rows: by model, at the next position.
            ids: what the model read before it.

        Raises:
            BacoError: the router depends on probabilities that the servers do not return.
        """
        tops = dict.fromkeys(rows, self._top)
        while True:
            signals = self._signals(rows)
            choices = {bool(self._router(one)[0]) for one in signals}
            if len(choices) == 1:
                return "base" if choices.pop() else "aligned"
            for source in self._router.reads:
                more = self._models[source].larger_top(tops[source])
                row = None if more is None else await self._models[source].row(ids[source], more)
                if more is None or row is None:
                    low, high = rows[source].entropy_bounds(self._own[source].vocabulary.size)
                    raise BacoError(
                        f"{self._router.spelling} cannot be decided: the tokens that the "
                        f"{source} server returns leave the entropy anywhere from {low:.2f} to "
                        f"{high:.2f} nats; let it return more (vLLM and baco serve: "
                        "--max-logprobs), or use a P router"
                    )
                tops[source], rows[source] = more, row

    def _signals(self, rows: Mapping[Source, Row]) -> list[Signals]:
        """The rows as the router sees them; where it reads an entropy, at both bounds of it."""
        request, unread = self._sequence.request, Distribution(torch.zeros(1, 1))
        tables = {
            source: Table(own.vocabulary, own.banned, [row], [row], row.known)
            for source, row in rows.items()
            if source in self._router.reads
            for own in [self._own[source]]
        }
        bounds: tuple[int, ...] = (0, 1) if needed_quantity(self._router) == "entropy" else (0,)
        words = {
            source: tables[source].words if source in tables else self._own[source].vocabulary
            for source in MODELS
        }
        key = (request.noise_seed, self._sequence.sample, self._text.position)
        coins = coin(noise_keys(*(torch.tensor([part]) for part in key)), ROUTER)
        only = next(iter(tables)) if len(tables) == 1 else "base"
        signals = []
        for bound in bounds:
            of = dict[Source, Distribution]()
            for source, table in tables.items():
                filled, _ = table.filled()
                size = self._own[source].vocabulary.size
                entropy = torch.tensor([rows[source].entropy_bounds(size)[bound]])
                of[source] = Distribution(
                    filled, torch.zeros(1), entropy if len(bounds) == 2 else None
                )
            signals.append(
                Signals(
                    of.get("base", unread), of.get("aligned", unread), words[only], coins, words
                )
            )
        return signals


def _why(source: Source, logprob: float, base: Row | None, asked: bool) -> Why:
    """Why a token has its source; NaN for numbers that are not known."""
    nan = math.nan
    return Why(
        base_logprob=logprob if source == "base" else nan,
        aligned_logprob=logprob if source == "aligned" else nan,
        max_base=math.exp(max(base.known.values())) if base and base.measured else nan,
        entropy_base=nan,
        predicted=-1 if base is None else base.top,
        asked=asked,
        wanted=source,
    )
