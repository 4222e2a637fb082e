"""Probes what a server can do, once at the start, with a few small requests."""

import math
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from baco.backends.remote.client import MalformedError, RefusedError, Server
from baco.backends.remote.model import TOP_DRAFTED, TOP_PROBED, Ability, ask
from baco.backends.remote.wire import Names, ServerTokens
from baco.errors import BacoError, UpstreamError
from baco.models.pair import Pair

_TEXT = "Question: Where is the sea?\nAnswer:"
_GREEDY_TOKENS = 6
# The highest temperature that OpenAI and vLLM accept.
_HOT = 2.0
# A parameter counts as followed once hot draws differ this often without it and never with it: one
# difference could be chance.
_MIN_DIFFERENCES, _MAX_TRIES = 3, 8
# Numbers of most likely tokens to try, the largest first: servers refuse, or return fewer.
_TOPS = (TOP_PROBED, 200, TOP_DRAFTED, 5, 1)
# Fields that switch truncation off, because servers have defaults of their own. The first form is
# for llama.cpp: it truncates before the temperature and applies penalties of its own, unless a
# request lists samplers in another order. The third is for servers that disable top_k by -1, the
# last for servers that accept OpenAI's fields only.
_SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
_NO_TRUNCATION: tuple[Mapping[str, Any], ...] = (
    {**_SAMPLING, "samplers": ["temperature", "top_k", "top_p", "min_p"]},
    _SAMPLING,
    {**_SAMPLING, "top_k": -1},
    {"top_p": 1.0},
)
# Temperatures at which draws show whether a server truncates after the temperature, or before it.
_AFTER, _BEFORE = 2.0, 0.8
_MAX_DRAWS = 24
# The least difference of two log-probabilities that rounding does not hide.
_CLEAR = 0.05
# Errors of a server that cannot do what it is asked.
_UNABLE = (RefusedError, MalformedError)
_IDS: Mapping[str, Any] = {"return_token_ids": True, "return_tokens_as_token_ids": True}


async def probe(server: Server, pair: Pair, names: Names, model: str | None) -> Ability:
    """Find out what a server can do.

    Args:
        server: of one model of the pair.
        pair: the pair that the model belongs to.
        names: token ids by name.
        model: the name of its model; None where it has only one, or is a `baco serve`.

    Raises:
        UpstreamError: the server cannot be reached, or does not complete token ids.
        BacoError: it has no such model, or the model's vocabulary is another one.
    """
    name, context = await _model(server, model)
    raw = pair.renderer.raw(_TEXT)
    text = list(raw.base_ids if server.source == "base" else raw.aligned_ids)
    probes = _Probes(server, names, name, text)
    await probes.find_fields()
    await probes.find_top(names.size)
    greedy = await probes.complete(max_tokens=_GREEDY_TOKENS, temperature=0)
    if probes.returns_ids:
        _check_spelling(server, pair, names.size, greedy)
    obeys = frozenset([name async for name in probes.obeyed(greedy)])
    return Ability(
        model=name,
        context=context,
        fields=probes.fields,
        top=probes.top,
        returns_ids=probes.returns_ids,
        echo=await probes.echo(),
        scores_part=await probes.scores_part(),
        batches=await probes.batches(),
        raw=await probes.raw(greedy),
        obeys=obeys,
        truncates_first="min_p" in obeys and await probes.truncates_first(greedy),
    )


async def _model(server: Server, model: str | None) -> tuple[str, int | None]:
    """The name of the server's model, and its context window."""
    try:
        reply = await server.get("/models")
    except _UNABLE:
        if model is None:
            raise
        return model, None  # not every server lists its models
    data = reply.get("data") if isinstance(reply, dict) else None
    listed = data if isinstance(data, list) else []  # the server may be anything
    cards = {str(card["id"]): card for card in listed if isinstance(card, dict) and "id" in card}
    own = f"baco/{server.source}"  # of a baco serve, which has several
    if model is None:
        if len(cards) != 1 and own not in cards:
            raise BacoError(
                f"{server.called} has {len(cards)} models: name one with {server.source}_model "
                f"(--{server.source}-model)"
            )
        model = next(iter(cards)) if len(cards) == 1 else own
    card = cards.get(model, {})
    meta = card.get("meta")  # llama.cpp
    context = card.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else None)
    return model, context if type(context) is int and context > 0 else None


def _check_spelling(server: Server, pair: Pair, size: int, greedy: ServerTokens) -> None:
    ids = [token for token in greedy.tokens if token is not None]
    if len(ids) < len(greedy.tokens):
        raise BacoError(
            f"{server.called} writes tokens beyond the {size} of {pair.name}: its model is of "
            "another pair"
        )
    tokenizer = pair.tokenizer_of(server.source)
    expected = _comparable(tokenizer.decode(ids, skip_special_tokens=True))
    if greedy.text and (text := _comparable(greedy.text)) != expected:
        raise BacoError(
            f"{server.called} spells tokens {ids[:_GREEDY_TOKENS]} as {text[:40]!r}, the "
            f"pair {pair.name} as {expected[:40]!r}: its model is of another pair"
        )


def _comparable(text: str) -> str:
    """A text without what servers return differently: unfinished characters and outer spaces."""
    return text.replace("\ufffd", "").strip()


@dataclass
class _Probes:
    """Small requests to one server, each of which may be refused."""

    server: Server
    names: Names
    model: str
    text: list[int]
    fields: Mapping[str, Any] = field(default_factory=dict)
    top: int = 1
    returns_ids: bool = False

    async def complete(self, prompt: Any = None, **fields: Any) -> ServerTokens:
        """A completion of the text, or of a prompt."""
        return (await self.completions(prompt, **fields))[0]

    async def completions(self, prompt: Any = None, **fields: Any) -> list[ServerTokens]:
        body = {**self.fields, "model": self.model, "prompt": prompt or self.text} | fields
        if self.top and "logprobs" not in fields:
            body["logprobs"] = min(self.top, TOP_DRAFTED)
        choices = await ask(self.server, self.names, body)
        if not choices:
            raise MalformedError(
                f"{self.server.called} answers without choices: is it a completions API?"
            )
        self.returns_ids = self.returns_ids or choices[0].has_ids
        return choices

    async def attempt(self, prompt: Any = None, **fields: Any) -> ServerTokens | None:
        """As `complete`; None where the server refuses or answers with something else."""
        try:
            return await self.complete(prompt, **fields)
        except _UNABLE:
            return None

    async def find_fields(self) -> None:
        """Find the fields that it accepts, and whether it returns log-probabilities."""
        refusal: UpstreamError | None = None
        for fields in _field_sets():
            for top in (1, 0):
                self.fields, self.top = fields, top
                try:
                    reply = await self.complete(max_tokens=1, temperature=0)
                except _UNABLE as error:
                    refusal = error  # of the fewest fields in the end, so not about one of them
                    continue
                self.top = top if reply.rows and reply.rows[0] is not None else 0
                return
        assert refusal is not None
        raise refusal

    async def find_top(self, size: int) -> None:
        """Find how many most likely tokens it returns."""
        for most in _TOPS if self.top else ():
            reply = await self.attempt(max_tokens=1, temperature=0, logprobs=min(most, size))
            row = reply.rows[0] if reply and reply.rows else None
            if row is not None:
                self.top = min(most, len(row.known), size)
                return

    async def echo(self) -> int | None:
        """The least ``max_tokens`` with which it scores a prompt."""
        for least in (0, 1) if self.top else ():
            reply = await self.attempt(max_tokens=least, temperature=0, echo=True)
            if reply is None or len(reply.tokens) < len(self.text):
                continue
            rows = reply.rows[1 : len(self.text)]
            if reply.tokens[: len(self.text)] == self.text and None not in rows:
                return least
        return None

    async def scores_part(self) -> bool:
        """Can it score only the end of a prompt?"""
        first = len(self.text) - 2
        reply = await self.attempt(max_tokens=0, temperature=0, echo=True, echo_from=first)
        return reply is not None and reply.tokens == self.text[first:]

    async def batches(self) -> bool:
        """Does it accept several prompts in one request?"""
        prompts = [self.text, self.text[:-1]]
        try:
            return len(await self.completions(prompts, max_tokens=1, temperature=0)) == 2
        except _UNABLE:
            return False

    async def raw(self, greedy: ServerTokens) -> bool:
        """Does a row stay the same at another temperature?"""
        before = greedy.rows[0] if greedy.rows else None
        if before is None:
            return True
        reply = await self.complete(max_tokens=1, temperature=_HOT, seed=1)
        after = reply.rows[0] if reply.rows else None
        known = math.nan if after is None else after.known.get(before.top, math.nan)
        return abs(known - before.known[before.top]) < _CLEAR

    async def obeyed(self, greedy: ServerTokens) -> AsyncIterator[str]:
        """The parameters that it follows, judged by the tokens it writes with them."""
        first = (greedy.tokens or [None])[0]
        for name, least in (("min_p", 1.0), ("top_k", 1)):
            if name in self.fields and await self._truncates({name: least}, greedy):
                yield name
        other = next(token for token in self.text if token != first)
        bias = {str(other): 100}
        reply = await self.attempt(max_tokens=1, temperature=0, logit_bias=bias)
        if reply is not None and reply.tokens[:1] == [other]:
            yield "logit_bias"

    async def truncates_first(self, greedy: ServerTokens) -> bool:
        """Does it truncate before it applies the temperature? Draws at the position whose two most
        likely tokens are closest show it.
        """
        gaps = {
            at: best[0] - best[1]
            for at, row in enumerate(greedy.rows)
            if row is not None and len(best := [*row.best(2).values()]) == 2
        }
        clear = {at: gap for at, gap in gaps.items() if gap > _CLEAR}
        if not clear:
            return False
        at = min(clear, key=lambda at: clear[at])
        prompt, likeliest, gap = [*self.text, *greedy.tokens[:at]], greedy.tokens[at], clear[at]
        # min_p lies between the limits of the two orders: at the higher temperature the second
        # token survives only if truncation comes last, at the lower one only if it comes first.
        after = {"temperature": _AFTER, "min_p": math.exp(-gap * (1 + 1 / _AFTER) / 2)}
        before = {"temperature": _BEFORE, "min_p": math.exp(-gap * (1 + 1 / _BEFORE) / 2)}
        for seed in range(_MAX_DRAWS):
            for fields in (after, before):
                reply = await self.attempt(prompt, max_tokens=1, seed=seed, **fields)
                if reply is None:
                    return False
                if reply.tokens[:1] != [likeliest]:
                    return fields is before
        return False

    async def _truncates(self, fields: Mapping[str, Any], greedy: ServerTokens) -> bool:
        """Do these fields leave only the most likely tokens where hot draws differ without them?"""
        differences = 0
        for seed in range(_MAX_TRIES):
            hot = {"max_tokens": _GREEDY_TOKENS, "temperature": _HOT, "seed": seed}
            reply = await self.attempt(**hot, **fields)
            if reply is None or reply.tokens != greedy.tokens:
                return False
            reply = await self.attempt(**hot)
            differences += reply is not None and reply.tokens != greedy.tokens
            if differences == _MIN_DIFFERENCES:
                return True
        return False


def _field_sets() -> Iterator[Mapping[str, Any]]:
    for ids in (_IDS, {}):
        for fields in _NO_TRUNCATION:
            yield {**fields, **ids}
