"""A model of the pair on its server: it drafts spans, scores those of the other, and redraws."""

import asyncio
import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from baco.backends.remote.client import MalformedError, RefusedError, Server
from baco.backends.remote.wire import Names, Row, ServerTokens, ShapeError
from baco.errors import UpstreamError
from baco.sampling.params import SamplingParams
from baco.source import Source

# Most likely tokens requested at draft tokens, and, where the router reads no entropy, at tokens
# that the server scores as part of a prompt.
TOP_DRAFTED = 20
TOP_SCORED = 5
# As many are requested next where these do not bound an entropy well enough to decide by it.
TOP_MORE = 200
# The most that are requested at the start, to find out what a server returns.
TOP_PROBED = 2048
# Texts of up to this many tokens are scored as a whole; longer ones by one short request per token,
# which the server's prefix cache serves. vLLM does not use this cache for the scores of a prompt.
_MAX_SCORED = 128
# Draws until one is allowed; each forbids the token that the last one drew.
_MAX_DRAWS = 64
_FORBID = -100.0


@dataclass(frozen=True, slots=True)
class Ability:
    """What a server can do, as probed at the start.

    Attributes:
        model: the name of its model.
        context: its context window in tokens, if it returns one.
        fields: sent with every request, in this server's spelling.
        top: most likely tokens that it returns at a position; 0: no log-probabilities at all.
        returns_ids: it returns the ids of the tokens that it writes.
        echo: the least ``max_tokens`` with which it scores a prompt; None: it scores none.
        scores_part: it can score only the end of a prompt (``echo_from``).
        batches: it accepts several prompts in one request.
        raw: its log-probabilities do not change with the temperature.
        obeys: the parameters that had an effect: min_p, top_k, logit_bias.
        truncates_first: it truncates before it applies the temperature.
    """

    model: str
    context: int | None
    fields: Mapping[str, Any]
    top: int
    returns_ids: bool
    echo: int | None
    scores_part: bool
    batches: bool
    raw: bool = True
    obeys: frozenset[str] = frozenset()
    truncates_first: bool = False


@dataclass(frozen=True, slots=True)
class Draws:
    """The sampling parameters and seeds of one sample.

    Attributes:
        params: temperature, truncation and bias.
        sample: its number.
        noise_seed: of the prompt's draws.
    """

    params: SamplingParams
    sample: int
    noise_seed: int

    def seed(self, position: int, attempt: int = 0) -> int:
        """A seed for one call; prompts, samples, positions and attempts have different ones."""
        key = f"{self.noise_seed}/{self.sample}/{position}/{attempt}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest()) >> 1

    def fields(self, obeys: frozenset[str], forbidden: Sequence[int] = ()) -> dict[str, Any]:
        """Sampling fields of a request."""
        params = self.params
        fields: dict[str, Any] = {"temperature": params.temperature}
        if params.temperature > 0:
            if params.top_p < 1:
                fields["top_p"] = params.top_p
            if params.top_k:
                fields["top_k"] = params.top_k
            if params.min_p:
                fields["min_p"] = params.min_p
        bias = dict(params.logit_bias)
        if "logit_bias" in obeys:
            bias |= dict.fromkeys(forbidden, _FORBID)
        if bias:
            fields["logit_bias"] = {str(token): value for token, value in bias.items()}
        return fields


class RemoteModel:
    """A model of the pair on its server.

    Args:
        source: base or aligned.
        server: the server that runs it.
        names: token ids by name.
        ability: of the server.
        ends: the tokens that end its texts.
        rows: of its embedding; ids beyond are replaced by its end of text.
    """

    def __init__(
        self,
        source: Source,
        server: Server,
        names: Names,
        ability: Ability,
        ends: Collection[int],
        rows: int,
    ) -> None:
        self.source, self.server, self.ability = source, server, ability
        self._names, self._ends, self._rows = names, frozenset(ends), rows
        # Whether it returns the whole vocabulary is tried when that is first needed.
        self._max_top = ability.top if ability.top < TOP_PROBED else names.size
        # For servers that do not return the token that ended a text.
        self._end = min(ends, default=0)

    async def draft(
        self, text: Sequence[int], length: int, draws: Draws, position: int, top: int
    ) -> ServerTokens:
        """Continue a text by up to ``length`` tokens, or to its end-of-text token.

        Args:
            text: prompt and answer so far.
            length: tokens at most.
            draws: the sampling parameters and seeds.
            position: of the first token in the answer.
            top: most likely tokens to return at each.

        Raises:
            UpstreamError: the server fails, or does not return which tokens it wrote.
        """
        if not self.ability.returns_ids and not self.ability.top:
            length = 1  # the tokens of a longer text would be ambiguous
        fields = draws.fields(self.ability.obeys) | {"seed": draws.seed(position)}
        (draft,) = await self._complete(self._replace_unknown_ids(text), length, fields, top)
        listed = bool(draft.tokens) and draft.tokens[-1] in self._ends
        if draft.ended and len(draft.tokens) < length and not listed:
            draft.tokens.append(self._end)
            draft.logprobs.append(math.nan)
            draft.rows.append(None)
        if not draft.tokens:
            raise UpstreamError(f"{self.server.called} returns no token and does not end the text")
        await self._complete_rows(text, draft, draws, top)
        return draft

    async def rows(self, text: Sequence[int], span: Sequence[int], top: int) -> list[Row]:
        """Its rows at each token of a span after a text; errors as for `draft`."""
        short = self.ability.scores_part or len(text) + len(span) <= _MAX_SCORED
        if self.ability.echo is not None and (short or not self.ability.batches):
            return await self._scored(self._replace_unknown_ids([*text, *span]), len(span), top)
        texts = [[*text, *span[:at]] for at in range(len(span))]
        return await self.next_rows(texts, top)

    def larger_top(self, top: int) -> int | None:
        """The number of most likely tokens to request after ``top`` of them; None: it returns no
        more.
        """
        tops = (TOP_MORE, self.ability.top, self._max_top)
        return next((more for more in tops if top < more <= self._max_top), None)

    async def row(self, text: Sequence[int], top: int) -> Row | None:
        """Its row after a text, with ``top`` tokens; None where it refuses to return that many.

        Raises:
            UpstreamError: the server fails.
        """
        try:
            (row,) = await self.next_rows([text], top)
        except RefusedError:
            if top <= self.ability.top:
                raise
            self._max_top = self.ability.top
            return None
        return row

    async def draw(
        self,
        text: Sequence[int],
        row: Row,
        may_write: Callable[[int], bool],
        draws: Draws,
        position: int,
        top: int,
    ) -> tuple[int, Row]:
        """Draw one of the allowed tokens from the row renormalised on them.

        A token that is not allowed is drawn again, so the result is distributed as if the others
        did not exist. Forbidding likely tokens only saves draws.

        Raises:
            UpstreamError: the server fails, or writes no allowed token.
        """
        forbidden = [token for token in row.known if not may_write(token)]
        if draws.params.temperature > 0 and draws.params.min_p:
            forbidden = await self._above_best(text, may_write, draws, position, forbidden)
        for attempt in range(1, _MAX_DRAWS + 1):
            fields = draws.fields(self.ability.obeys, forbidden)
            fields["seed"] = draws.seed(position, attempt)
            (draft,) = await self._complete(self._replace_unknown_ids(text), 1, fields, top)
            token = draft.tokens[0] if draft.tokens else self._end
            if token is not None and may_write(token):
                return token, (draft.rows[0] if draft.rows else None) or row
            if token is None or (token in forbidden and draws.params.temperature == 0):
                break
            if token not in forbidden:
                forbidden.append(token)
        raise UpstreamError(
            f"{self.server.called} returns nothing that may begin a word after {attempt} draws: it "
            "does not follow logit_bias"
        )

    async def _above_best(
        self,
        text: Sequence[int],
        may_write: Callable[[int], bool],
        draws: Draws,
        position: int,
        forbidden: list[int],
    ) -> list[int]:
        """The forbidden tokens that are likelier than all allowed ones, which min_p refers to."""
        cold = replace(draws, params=draws.params.updated({"temperature": 0}))
        forbidden = list(forbidden)
        for _ in range(_MAX_DRAWS):
            fields = cold.fields(self.ability.obeys, forbidden)
            fields["seed"] = cold.seed(position)
            (draft,) = await self._complete(self._replace_unknown_ids(text), 1, fields, 0)
            token = draft.tokens[0] if draft.tokens else self._end
            if token is None or token in forbidden or may_write(token):
                break
            forbidden.append(token)
        return forbidden

    async def _complete_rows(
        self, text: Sequence[int], draft: ServerTokens, draws: Draws, top: int
    ) -> None:
        """Get a row for every token of a draft; the first token without an id and those after it
        are dropped.
        """
        if None in draft.tokens:
            known = draft.tokens.index(None)
            if known == 0:
                raise UpstreamError(
                    f"{self.server.called} names a token by a text that no single token has "
                    f"({draft.text[:20]!r}): it has to return token ids"
                )
            del draft.tokens[known:], draft.logprobs[known:], draft.rows[known:]
            draft.ended = False
        if None not in draft.rows:
            return
        tokens = [token for token in draft.tokens if token is not None]
        if self.ability.top == 0 and draws.params.temperature == 0 and not draws.params.logit_bias:
            draft.rows = [Row.only(token) for token in tokens]
            return
        missing = draft.rows.index(None)
        draft.rows[missing:] = await self.rows([*text, *tokens[:missing]], tokens[missing:], top)

    async def _scored(self, text: list[int], last: int, top: int) -> list[Row]:
        """Its rows at the last tokens of a text, in one request."""
        least = self.ability.echo
        assert least is not None
        fields: dict[str, Any] = {"temperature": 0, "echo": True}
        first = len(text) - last
        if self.ability.scores_part:
            fields["echo_from"] = first
        (draft,) = await self._complete(text, least, fields, top)
        start = 0 if self.ability.scores_part else first
        rows = draft.rows[start : start + last]
        scored = [row for row in rows if row is not None]
        if len(scored) != last or draft.tokens[start : start + last] != text[first:]:
            raise UpstreamError(f"{self.server.called} returned {len(scored)} of {last} scores")
        return scored

    async def next_rows(self, texts: Sequence[Sequence[int]], top: int) -> list[Row]:
        """Its row after each of some texts; errors as for `draft`."""
        fields = {"temperature": 0}
        prompts = [self._replace_unknown_ids(text) for text in texts]
        if self.ability.batches or len(prompts) == 1:
            whole = prompts if len(prompts) > 1 else prompts[0]
            replies = await self._complete(whole, 1, fields, top)
        else:
            calls = [self._complete(prompt, 1, fields, top) for prompt in prompts]
            replies = [reply for (reply,) in await asyncio.gather(*calls)]
        rows = []
        for reply in replies:
            row = reply.rows[0] if reply.rows else None
            if row is None:
                token = reply.tokens[0] if reply.tokens else self._end
                if token is None or self.ability.top:
                    raise UpstreamError(
                        f"{self.server.called} does not return the token that follows a text"
                    )
                row = Row.only(token)
            rows.append(row)
        return rows

    async def _complete(
        self,
        prompt: list[int] | list[list[int]],
        length: int,
        fields: Mapping[str, Any],
        top: int,
    ) -> list[ServerTokens]:
        """A completion of each prompt."""
        body = {**self.ability.fields, "model": self.ability.model, "prompt": prompt, **fields}
        body["max_tokens"] = length
        top = min(top, self._max_top)
        if top:
            body["logprobs"] = top
        replies = await ask(self.server, self._names, body)
        count = len(prompt) if isinstance(prompt[0], list) else 1
        if len(replies) != count:
            raise UpstreamError(f"{self.server.called} answered {len(replies)} of {count} prompts")
        return replies

    def _replace_unknown_ids(self, text: Sequence[int]) -> list[int]:
        return [token if token < self._rows else self._end for token in text]


async def ask(server: Server, names: Names, body: Mapping[str, Any]) -> list[ServerTokens]:
    """Completions, in the order of the prompts.

    Raises:
        MalformedError: the reply is not a completion; other errors as for `Server.post`.
    """
    reply = await server.post("/completions", body)
    try:
        return names.read_all(reply, body.get("logprobs", 0))
    except ShapeError as error:
        raise MalformedError(f"{server.called} answered without a completion: {error}") from error
