"""Replies of completions APIs, in the forms of vLLM, SGLang, llama.cpp and OpenAI."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from baco.errors import BacoError
from baco.models.pair import Pair
from baco.source import Source
from baco.text.answer_text import name_of

_ID_PREFIX = "token_id:"
_IMPOSSIBLE = -9999.0
# The greatest logarithm of a probability of 1 after rounding.
_MAX_LOGPROB = 1e-2
_MAX_SHOWN = 40
# Nats by which bounds of an entropy are widened: servers round each log-probability.
_ROUNDING = 1e-4


class ShapeError(ValueError):
    """A reply is not one of a completions API; the message is a few words."""


@dataclass(frozen=True, slots=True)
class Row:
    """The known part of one next-token distribution.

    Attributes:
        known: token id → log-probability in nats, raw.
        cap: an upper bound for all other tokens; -inf where there are none.
        measured: the server returned numbers; else only the most likely token is known.
    """

    known: dict[int, float]
    cap: float
    measured: bool = True

    @classmethod
    def only(cls, token: int) -> "Row":
        """A row of which only the most likely token is known."""
        return cls({token: 0.0}, -math.inf, measured=False)

    @property
    def is_whole(self) -> bool:
        """Are all tokens known?"""
        return self.cap == -math.inf

    @property
    def has_top(self) -> bool:
        """Is the most likely token among the known ones?"""
        return self.cap <= max(self.known.values())

    @property
    def top(self) -> int:
        """The most likely of the known tokens; of equally likely ones the smallest id."""
        return max(self.known, key=lambda token: (self.known[token], -token))

    def logprob(self, token: int) -> float:
        """Log-probability of a token, in nats; NaN where the server returns none."""
        return self.known.get(token, math.nan) if self.measured else math.nan

    def check_top(self) -> None:
        """Raise BacoError where the most likely token may be an unknown one."""
        if not self.has_top:
            raise BacoError(
                "a server names its most likely token by a text that no single token has: it has "
                "to return token ids"
            )

    def rest(self, size: int) -> float:
        """The probability of all other tokens of a vocabulary of this size: at most what they can
        have, despite rounding.
        """
        if self.is_whole:
            return 0.0
        room = (size - len(self.known)) * math.exp(self.cap)
        return min(max(0.0, 1.0 - math.fsum(map(math.exp, self.known.values()))), room)

    def entropy_bounds(self, size: int) -> tuple[float, float]:
        """The least and the greatest entropy that the row can have, in nats.

        The entropy is least where as few of the other tokens as possible hold the rest, each as
        likely as it can be, and greatest where all of them are equally likely. Where tokens are
        missing, the bounds leave room for rounding.
        """
        probabilities = [math.exp(value) for value in self.known.values()]
        rest = self.rest(size)
        total = math.fsum((*probabilities, rest))
        known = math.fsum(map(_surprise, (p / total for p in probabilities)))
        if not rest:
            return known, known
        rest, most = rest / total, math.exp(self.cap) / total
        full = math.floor(rest / most)
        others = size - len(self.known)
        low = known + full * _surprise(most) + _surprise(max(0.0, rest - full * most))
        high = known + others * _surprise(rest / others)
        return max(0.0, low - _ROUNDING), max(low, high) + _ROUNDING

    def best(self, count: int) -> dict[int, float]:
        """The most likely tokens."""
        order = sorted(self.known.items(), key=lambda pair: (-pair[1], pair[0]))
        return dict(order[:count])


@dataclass(slots=True)
class ServerTokens:
    """Consecutive tokens from a server.

    Attributes:
        tokens: ids; None for a token named by a text that no single token has.
        logprobs: of the tokens, raw, in nats; NaN where the server returned none.
        rows: the rows that they were drawn from; None where the server returned none.
        ended: the server stopped by itself.
        text: of all tokens.
        has_ids: the tokens were named by ids, not by texts.
    """

    tokens: list[int | None] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rows: list[Row | None] = field(default_factory=list)
    ended: bool = False
    text: str = ""
    has_ids: bool = False


class Names:
    """Token ids by the names that servers use.

    Args:
        pair: the two models.
        source: the model whose ids they are, where the tokenizers differ.

    Attributes:
        size: of the vocabulary.
    """

    def __init__(self, pair: Pair, source: Source = "aligned") -> None:
        self.size = pair.vocabulary_of(source).size
        self._ids: dict[str, int | None] = {}
        for token in range(self.size):
            name = name_of(pair.spelling(token, source))
            # A name that two tokens share means neither.
            self._ids[name] = None if name in self._ids else token

    def id(self, name: str) -> int | None:
        """The id of a name; None where it is unknown or shared."""
        if name.startswith(_ID_PREFIX):
            token = _id_of(name)
            return token if token < self.size else None
        return self._ids.get(name)

    def read_all(self, reply: Any, top: int) -> list[ServerTokens]:
        """The choices of a completion, in the order of the prompts.

        Args:
            reply: JSON as it came.
            top: the number of most likely tokens that was requested at each position.

        Raises:
            ShapeError: the reply is not a completion.
        """
        return [self.read(choice, top) for choice in _choices(reply)]

    def read(self, choice: dict[str, Any], top: int) -> ServerTokens:
        """A choice of a completion.

        Args:
            choice: JSON as it came.
            top: the number of most likely tokens that was requested at each position.

        Raises:
            ShapeError: it is not a choice.
        """
        ended = choice.get("finish_reason") in ("stop", "eos", "eos_token")
        result = ServerTokens(ended=ended, text=_text(choice.get("text") or ""))
        logprobs = _object(choice.get("logprobs") or {})
        listed, content = choice.get("token_ids"), logprobs.get("content")
        ids = None if listed is None else [_token(token) for token in _list(listed)]
        result.has_ids = bool(ids) or content is not None
        if content is not None:  # llama.cpp
            for entry in map(_object, _list(content)):
                token, logprob = _token(entry.get("id")), entry.get("logprob")
                self._append(result, token, logprob, _pairs(entry), top)
        elif logprobs.get("tokens"):
            names = [_text(name) for name in _list(logprobs["tokens"])]
            result.has_ids |= all(name.startswith(_ID_PREFIX) for name in names)
            tokens = ids if ids is not None and len(ids) == len(names) else map(self.id, names)
            values = _list(logprobs.get("token_logprobs"))
            tops = _list(logprobs.get("top_logprobs") or [None] * len(names))
            if not len(values) == len(tops) == len(names):
                raise ShapeError("tokens without their log-probabilities")
            for named, logprob, pairs in zip(tokens, values, tops, strict=True):
                self._append(result, named, logprob, _object(pairs or {}).items(), top)
        elif ids is not None:
            for token in ids:
                self._append(result, token, None, (), top)
        elif result.text or not result.ended:
            self._append(result, self.id(result.text), None, (), top)
        return result

    def _append(
        self,
        result: ServerTokens,
        token: int | None,
        logprob: Any,
        pairs: Iterable[tuple[str | int, Any]],
        top: int,
    ) -> None:
        nats = None if logprob is None else _nats(logprob)
        known = token is not None and token < self.size
        result.tokens.append(token if known else None)
        result.logprobs.append(math.nan if nats is None else nats)
        values = [(name, _nats(value)) for name, value in pairs]
        result.rows.append(self._row(token, nats, values, top))

    def _row(
        self,
        token: int | None,
        logprob: float | None,
        pairs: list[tuple[str | int, float]],
        top: int,
    ) -> Row | None:
        if not pairs or logprob is None:
            return None
        ranked = sorted((value for _, value in pairs), reverse=True)
        # Servers add the token itself to the most likely ones where it is none of them.
        cap = ranked[min(top, len(ranked)) - 1] if len(ranked) < self.size else -math.inf
        known: dict[int, float] = {}
        for name, value in pairs:
            id_ = name if isinstance(name, int) else self.id(name)
            if id_ is None or id_ >= self.size:
                # An id beyond the common vocabulary is never written; a text without an id may be.
                cap = cap if _is_beyond(name, self.size) else max(cap, value)
            else:
                known[id_] = value if value > _IMPOSSIBLE else -math.inf
        if token is not None and token < self.size:
            known.setdefault(token, logprob)
        return Row(known, cap) if known else None


def _surprise(probability: float) -> float:
    """−p ln p, the share of one token in an entropy."""
    return -probability * math.log(probability) if probability > 0 else 0.0


def _pairs(entry: dict[str, Any]) -> list[tuple[str | int, Any]]:
    tops = map(_object, _list(entry.get("top_logprobs") or []))
    return [(_token(top.get("id")), top.get("logprob")) for top in tops]


def _is_beyond(name: str | int, size: int) -> bool:
    if isinstance(name, str):
        return name.startswith(_ID_PREFIX) and _id_of(name) >= size
    return name >= size


def _choices(reply: Any) -> list[dict[str, Any]]:
    """A reply's choices in the order of the prompts; llama.cpp may answer with a list of them."""
    if isinstance(reply, list):
        return [choice for part in reply for choice in _choices(_object(part))]
    choices = [_object(choice) for choice in _list(_object(reply).get("choices"))]
    return sorted(choices, key=lambda choice: _token(choice.get("index", 0)))


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ShapeError(f"{_short(value)} where an object belongs")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ShapeError(f"{_short(value)} where a list belongs")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ShapeError(f"{_short(value)} where a text belongs")
    return value


def _token(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ShapeError(f"{_short(value)} where a whole number belongs")
    return value


def _id_of(name: str) -> int:
    number = name.removeprefix(_ID_PREFIX)
    return _token(int(number) if number.isdecimal() and len(number) < 20 else number)


def _nats(value: Any) -> float:
    if not isinstance(value, int | float) or not value <= _MAX_LOGPROB or isinstance(value, bool):
        raise ShapeError(f"{_short(value)} where a log-probability belongs")
    return min(float(value), 0.0) if value > 10 * _IMPOSSIBLE else -math.inf


def _short(value: Any) -> str:
    """A value as JSON, cut to fit into a line."""
    text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
