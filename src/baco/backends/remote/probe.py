"""What a server can do, found out once at the start by asking it little things."""

import math
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from baco.backends.remote.client import MalformedError, RefusedError, Server
from baco.backends.remote.half import FEW, Ability, ask
from baco.backends.remote.wire import Names, ServerTokens
from baco.errors import BacoError, UpstreamError
from baco.models.pair import Pair

_TEXT = "Question: Where is the sea?\nAnswer:"
_GREEDY = 6
# OpenAI and vLLM refuse more.
_HOT = 2.0
# So often must a server say something else under heat and not under a cut: once could be chance.
_ENOUGH, _MOST_TRIES = 3, 8
# How many most likely tokens are tried, most first: servers refuse, or tell fewer.
_TOPS = (2048, 200, FEW, 5, 1)
# What a request says in so many words, because servers have defaults of their own; the second is
# for those that write an open top_k otherwise, the last for those that know OpenAI's fields alone.
_OPEN: tuple[Mapping[str, Any], ...] = (
    {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
    {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    {"top_p": 1.0},
)
# What a question comes to where a server cannot answer it.
_UNABLE = (RefusedError, MalformedError)
_IDS: Mapping[str, Any] = {"return_token_ids": True, "return_tokens_as_token_ids": True}


async def probe(server: Server, pair: Pair, names: Names, model: str | None) -> Ability:
    """Find out what a server can do.

    Args:
        server: a half's.
        pair: whose half it is said to run.
        names: token ids by name.
        model: the name of its model; None where it has only one, or is a `baco serve`.

    Raises:
        UpstreamError: it cannot be reached, or does not complete token ids.
        BacoError: no such model, or it spells tokens in another way than the pair.
    """
    name, context = await _model(server, model)
    raw = pair.renderer.raw(_TEXT)
    text = list(raw.base_ids if server.half == "base" else raw.aligned_ids)
    asking = _Asking(server, names, name, text)
    await asking.open()
    await asking.count(pair.vocabulary.size)
    greedy = await asking.complete(max_tokens=_GREEDY, temperature=0)
    if asking.tells_ids:
        _check_spelling(server, pair, greedy)
    return Ability(
        model=name,
        context=context,
        fields=asking.fields,
        top=asking.top,
        told=asking.tells_ids,
        echo=await asking.echo(),
        part=await asking.part(),
        several=await asking.several(),
        raw=await asking.raw(greedy),
        obeys=frozenset([name async for name in asking.obeyed(greedy)]),
    )


async def _model(server: Server, model: str | None) -> tuple[str, int | None]:
    """The name of the model to ask for, and its context window."""
    try:
        listed = await server.get("/models")
    except _UNABLE:
        if model is None:
            raise
        return model, None  # not every server lists what it has
    found = listed.get("data") if isinstance(listed, dict) else None
    listed = found if isinstance(found, list) else []  # an address may be of anything
    cards = {str(card["id"]): card for card in listed if isinstance(card, dict) and "id" in card}
    own = f"baco/{server.half}"  # of a baco serve, which has many
    if model is None:
        if len(cards) != 1 and own not in cards:
            raise BacoError(
                f"{server.called} has {len(cards)} models: name one with {server.half}_model "
                f"(--{server.half}-model)"
            )
        model = next(iter(cards)) if len(cards) == 1 else own
    card = cards.get(model, {})
    meta = card.get("meta")  # llama.cpp
    told = card.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else None)
    return model, told if type(told) is int and told > 0 else None


def _check_spelling(server: Server, pair: Pair, greedy: ServerTokens) -> None:
    ids = [token for token in greedy.tokens if token is not None]
    if len(ids) < len(greedy.tokens):
        raise BacoError(
            f"{server.called} says tokens beyond the {pair.vocabulary.size} of {pair.name}: its "
            "model is of another pair"
        )
    spelled = _legible(pair.tokenizer.decode(ids, skip_special_tokens=True))
    if greedy.text and (said := _legible(greedy.text)) != spelled:
        raise BacoError(
            f"{server.called} spells tokens {ids[:_GREEDY]} as {said[:40]!r}, the "
            f"pair {pair.name} as {spelled[:40]!r}: its model is of another pair"
        )


def _legible(text: str) -> str:
    """A text without what servers spell differently: unfinished characters and outer spaces."""
    return text.replace("\ufffd", "").strip()


@dataclass
class _Asking:
    """Little questions to one server, each of which may be refused."""

    server: Server
    names: Names
    model: str
    text: list[int]
    fields: Mapping[str, Any] = field(default_factory=dict)
    top: int = 1
    tells_ids: bool = False

    async def complete(self, prompt: Any = None, **asked: Any) -> ServerTokens:
        """A completion of the text, or of a prompt."""
        return (await self.completions(prompt, **asked))[0]

    async def completions(self, prompt: Any = None, **asked: Any) -> list[ServerTokens]:
        body = {**self.fields, "model": self.model, "prompt": prompt or self.text} | asked
        if self.top and "logprobs" not in asked:
            body["logprobs"] = min(self.top, FEW)
        found = await ask(self.server, self.names, body)
        if not found:
            raise MalformedError(
                f"{self.server.called} answers without choices: is it completions?"
            )
        self.tells_ids = self.tells_ids or found[0].numbered
        return found

    async def tried(self, prompt: Any = None, **asked: Any) -> ServerTokens | None:
        """The same; None where it is refused, or what comes is of no use."""
        try:
            return await self.complete(prompt, **asked)
        except _UNABLE:
            return None

    async def open(self) -> None:
        """Find the fields that it takes; log-probabilities among them, if it has any."""
        refusal: UpstreamError | None = None
        for fields in _spellings():
            for top in (1, 0):
                self.fields, self.top = fields, top
                try:
                    told = await self.complete(max_tokens=1, temperature=0)
                except _UNABLE as error:
                    refusal = refusal or error
                    continue
                self.top = top if told.rows and told.rows[0] is not None else 0
                return
        assert refusal is not None
        raise refusal

    async def count(self, size: int) -> None:
        """Find how many most likely tokens it tells."""
        for most in _TOPS if self.top else ():
            told = await self.tried(max_tokens=1, temperature=0, logprobs=min(most, size))
            row = told.rows[0] if told and told.rows else None
            if row is not None:
                self.top = min(most, len(row.known), size)
                return

    async def echo(self) -> int | None:
        """The least ``max_tokens`` with which it scores a prompt."""
        for least in (0, 1) if self.top else ():
            told = await self.tried(max_tokens=least, temperature=0, echo=True)
            if told is None or len(told.tokens) < len(self.text):
                continue
            rows = told.rows[1 : len(self.text)]
            if told.tokens[: len(self.text)] == self.text and None not in rows:
                return least
        return None

    async def part(self) -> bool:
        """Does it score a part of a prompt?"""
        first = len(self.text) - 2
        told = await self.tried(max_tokens=0, temperature=0, echo=True, echo_from=first)
        return told is not None and told.tokens == self.text[first:]

    async def several(self) -> bool:
        """Does it take several prompts at once?"""
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
        told = await self.complete(max_tokens=1, temperature=2.0, seed=1)
        after = told.rows[0] if told.rows else None
        best = max(before.known, key=lambda token: before.known[token])
        known = math.nan if after is None else after.known.get(best, math.nan)
        return abs(known - before.known[best]) < 0.05

    async def obeyed(self, greedy: ServerTokens) -> AsyncIterator[str]:
        """The parameters that it follows, told by what it says under them."""
        said = greedy.tokens or [None]
        for name, least in (("min_p", 1.0), ("top_k", 1)):
            if name in self.fields and await self._cuts({name: least}, greedy):
                yield name
        other = next(token for token in self.text if token != said[0])
        bias = {str(other): 100}
        told = await self.tried(max_tokens=1, temperature=0, logit_bias=bias)
        if told is not None and told.tokens[:1] == [other]:
            yield "logit_bias"

    async def _cuts(self, cut: Mapping[str, Any], greedy: ServerTokens) -> bool:
        """Does a cut leave the likeliest token alone, where it would have said others without?"""
        others = 0
        for seed in range(_MOST_TRIES):
            hot = {"max_tokens": _GREEDY, "temperature": _HOT, "seed": seed}
            told = await self.tried(**hot, **cut)
            if told is None or told.tokens != greedy.tokens:
                return False
            told = await self.tried(**hot)
            others += told is not None and told.tokens != greedy.tokens
            if others == _ENOUGH:
                return True
        return False


def _spellings() -> Iterator[Mapping[str, Any]]:
    for ids in (_IDS, {}):
        for fields in _OPEN:
            yield {**fields, **ids}
