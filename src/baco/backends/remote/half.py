"""One half of a pair on its server: drafts spans, tells its rows along another's, draws again."""

import asyncio
import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from baco.backends.remote.client import MalformedError, Server
from baco.backends.remote.wire import Names, Row, ServerTokens, ShapeError
from baco.errors import UpstreamError
from baco.sampling.params import SamplingParams
from baco.source import Source

# Most likely tokens that are asked for where no entropy is in question: of what a half says, and of
# what it thinks of the other's tokens, where a server tells them of a whole prompt.
FEW = 20
FEWER = 5
# Texts up to here are read anew for their scores; longer ones as many short questions, which leave
# the reading to the server's prefix cache. vLLM does not use its cache for the scores of a prompt.
_SHORT = 128
# Draws until one may stand; each forbids what the last one said.
_MOST_DRAWS = 64
_NEVER = -100.0


@dataclass(frozen=True, slots=True)
class Ability:
    """What a server can do, as found out at the start.

    Attributes:
        model: the name of its model.
        context: its context window in tokens, if it tells.
        fields: what every request says beside its own, in this server's spelling.
        top: most likely tokens it tells at a position; 0: no log-probabilities at all.
        told: it tells the ids of what it says.
        echo: the least ``max_tokens`` with which it scores a prompt; None: it does not.
        part: it scores a part of a prompt (``echo_from``).
        several: it takes several prompts at once.
        raw: what it tells of a row does not change with the temperature.
        obeys: the parameters it was seen to follow: min_p, top_k, logit_bias.
    """

    model: str
    context: int | None
    fields: Mapping[str, Any]
    top: int
    told: bool
    echo: int | None
    part: bool
    several: bool
    raw: bool = True
    obeys: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Draws:
    """How tokens are drawn for one sample.

    Attributes:
        params: temperature, truncation and bias.
        sample: its number.
        noise_seed: of the prompt's draws.
    """

    params: SamplingParams
    sample: int
    noise_seed: int

    def seed(self, position: int, attempt: int = 0) -> int:
        """A seed for one call: prompts, samples, positions and attempts draw apart."""
        key = f"{self.noise_seed}/{self.sample}/{position}/{attempt}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest()) >> 1

    def fields(self, obeys: frozenset[str], forbidden: Sequence[int] = ()) -> dict[str, Any]:
        """Fields of a request."""
        params = self.params
        asked: dict[str, Any] = {"temperature": params.temperature}
        if params.temperature > 0:
            if params.top_p < 1:
                asked["top_p"] = params.top_p
            if params.top_k:
                asked["top_k"] = params.top_k
            if params.min_p:
                asked["min_p"] = params.min_p
        bias = dict(params.logit_bias)
        if "logit_bias" in obeys:
            bias |= dict.fromkeys(forbidden, _NEVER)
        if bias:
            asked["logit_bias"] = {str(token): value for token, value in bias.items()}
        return asked


class RemoteModel:
    """A half on its server.

    Args:
        name: which half.
        server: where it is.
        names: token ids by name.
        ability: what the server can do.
        ends: the tokens that end its texts.
        rows: tokens it has an embedding for; it reads others as an end of text.
    """

    def __init__(
        self,
        name: Source,
        server: Server,
        names: Names,
        ability: Ability,
        ends: Collection[int],
        rows: int,
    ) -> None:
        self.name, self.server, self.ability = name, server, ability
        self._names, self._ends, self._rows = names, frozenset(ends), rows
        # Where it does not say which token ended a text.
        self._end = min(ends, default=0)

    async def draft(
        self, text: Sequence[int], length: int, draws: Draws, position: int, top: int
    ) -> ServerTokens:
        """Go on with a text for up to ``length`` tokens, which end with its end of text.

        Args:
            text: prompt and answer so far.
            length: tokens at most.
            draws: how they are drawn.
            position: of the first in the answer.
            top: most likely tokens to tell at each.

        Raises:
            UpstreamError: the server fails, or does not say which tokens it said.
        """
        if not self.ability.told and not self.ability.top:
            length = 1  # a longer text could have been spelled in other tokens
        asked = draws.fields(self.ability.obeys) | {"seed": draws.seed(position)}
        (told,) = await self._complete(self._legible(text), length, asked, top)
        listed = bool(told.tokens) and told.tokens[-1] in self._ends
        if told.ended and len(told.tokens) < length and not listed:
            told.tokens.append(self._end)
            told.logprobs.append(math.nan)
            told.rows.append(None)
        if not told.tokens:
            raise UpstreamError(f"{self.server.called} goes on with nothing and does not end")
        await self._complete_rows(text, told, draws, top)
        return told

    async def rows(self, text: Sequence[int], span: Sequence[int], top: int) -> list[Row]:
        """Its rows at each token of a span that follows a text; errors as for `draft`."""
        short = self.ability.part or len(text) + len(span) <= _SHORT
        if self.ability.echo is not None and (short or not self.ability.several):
            return await self._scored(self._legible([*text, *span]), len(span), top)
        texts = [self._legible([*text, *span[:at]]) for at in range(len(span))]
        return await self._next(texts, top)

    async def draw(
        self,
        text: Sequence[int],
        row: Row,
        may_say: Callable[[int], bool],
        draws: Draws,
        position: int,
        top: int,
    ) -> tuple[int, Row]:
        """One token of those it may say, from its row renormalised on them.

        What may not be said is drawn again: what stands in the end is distributed as if the rest
        had never been there. Forbidding what is known to be likely only makes that quick.

        Raises:
            UpstreamError: the server fails, or says nothing that may stand.
        """
        forbidden = [token for token in row.known if not may_say(token)]
        if draws.params.temperature > 0 and draws.params.min_p:
            forbidden = await self._above_best(text, may_say, draws, position, forbidden)
        for attempt in range(1, _MOST_DRAWS + 1):
            asked = draws.fields(self.ability.obeys, forbidden)
            asked["seed"] = draws.seed(position, attempt)
            (told,) = await self._complete(self._legible(text), 1, asked, top)
            token = told.tokens[0] if told.tokens else self._end
            if token is not None and may_say(token):
                return token, (told.rows[0] if told.rows else None) or row
            if token is None or (token in forbidden and draws.params.temperature == 0):
                break
            if token not in forbidden:
                forbidden.append(token)
        raise UpstreamError(
            f"{self.server.called} says nothing that may begin a word after "
            f"{attempt} draws: it cannot be told to (logit_bias)"
        )

    async def _above_best(
        self,
        text: Sequence[int],
        may_say: Callable[[int], bool],
        draws: Draws,
        position: int,
        forbidden: list[int],
    ) -> list[int]:
        """What may not be said and is likelier than all that may: min_p counts from the latter."""
        cold = replace(draws, params=draws.params.updated({"temperature": 0}))
        forbidden = list(forbidden)
        for _ in range(_MOST_DRAWS):
            asked = cold.fields(self.ability.obeys, forbidden)
            asked["seed"] = cold.seed(position)
            (told,) = await self._complete(self._legible(text), 1, asked, 0)
            token = told.tokens[0] if told.tokens else self._end
            if token is None or token in forbidden or may_say(token):
                break
            forbidden.append(token)
        return forbidden

    async def _complete_rows(
        self, text: Sequence[int], told: ServerTokens, draws: Draws, top: int
    ) -> None:
        """See that every token of a draft has an id and a row; what comes after the first without
        an id is dropped.
        """
        if None in told.tokens:
            known = told.tokens.index(None)
            if known == 0:
                raise UpstreamError(
                    f"{self.server.called} said a token by a text that is no single token's "
                    f"({told.text[:20]!r}): it has to tell token ids"
                )
            del told.tokens[known:], told.logprobs[known:], told.rows[known:]
            told.ended = False
        if None not in told.rows:
            return
        tokens = [token for token in told.tokens if token is not None]
        if self.ability.top == 0 and draws.params.temperature == 0 and not draws.params.logit_bias:
            told.rows = [Row.only(token) for token in tokens]
            return
        missing = told.rows.index(None)
        told.rows[missing:] = await self.rows([*text, *tokens[:missing]], tokens[missing:], top)

    async def _scored(self, text: list[int], last: int, top: int) -> list[Row]:
        """Its rows at the last tokens of a text, read once."""
        least = self.ability.echo
        assert least is not None
        asked: dict[str, Any] = {"temperature": 0, "echo": True}
        first = len(text) - last
        if self.ability.part:
            asked["echo_from"] = first
        (told,) = await self._complete(text, least, asked, top)
        start = 0 if self.ability.part else first
        rows = told.rows[start : start + last]
        found = [row for row in rows if row is not None]
        if len(found) != last or told.tokens[start : start + last] != text[first:]:
            raise UpstreamError(f"{self.server.called} told {len(found)} of {last} scores")
        return found

    async def _next(self, texts: list[list[int]], top: int) -> list[Row]:
        """Its row after each of some texts."""
        asked = {"temperature": 0}
        if self.ability.several or len(texts) == 1:
            told = await self._complete(texts if len(texts) > 1 else texts[0], 1, asked, top)
        else:
            calls = [self._complete(text, 1, asked, top) for text in texts]
            told = [one for (one,) in await asyncio.gather(*calls)]
        found = []
        for one in told:
            row = one.rows[0] if one.rows else None
            if row is None:
                token = one.tokens[0] if one.tokens else self._end
                if token is None or self.ability.top:
                    raise UpstreamError(
                        f"{self.server.called} does not tell what it says at the end of a text"
                    )
                row = Row.only(token)
            found.append(row)
        return found

    async def _complete(
        self,
        prompt: list[int] | list[list[int]],
        length: int,
        asked: Mapping[str, Any],
        top: int,
    ) -> list[ServerTokens]:
        """A completion of each prompt."""
        body = {**self.ability.fields, "model": self.ability.model, "prompt": prompt, **asked}
        body["max_tokens"] = length
        most = min(top, self.ability.top)
        if most:
            body["logprobs"] = most
        told = await ask(self.server, self._names, body)
        count = len(prompt) if isinstance(prompt[0], list) else 1
        if len(told) != count:
            raise UpstreamError(f"{self.server.called} answered {len(told)} of {count} prompts")
        return told

    def _legible(self, text: Sequence[int]) -> list[int]:
        return [token if token < self._rows else self._end for token in text]


async def ask(server: Server, names: Names, body: Mapping[str, Any]) -> list[ServerTokens]:
    """Completions, in the order of the prompts.

    Raises:
        MalformedError: what came is none; other errors as for `Server.post`.
    """
    reply = await server.post("/completions", body)
    try:
        return names.read_all(reply, body.get("logprobs", 0))
    except ShapeError as error:
        raise MalformedError(f"{server.called} answers what is no completion: {error}") from error
