"""What completions APIs tell of a token, in the spellings of vLLM, SGLang, llama.cpp and OpenAI."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from baco.models.pair import Pair
from baco.text.answer_text import name_of

_NAMED = "token_id:"
_IMPOSSIBLE = -9999.0
# What rounding may make of the logarithm of a probability of 1.
_ROUNDED = 1e-2
_LONGEST = 40


class ShapeError(ValueError):
    """What came is no answer of a completions API; told in a few words."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of one next-token distribution.

    Attributes:
        known: token id → log-probability in nats, raw.
        cap: no other token is likelier than this; -inf where no other is left.
        measured: the numbers are a server's; else only which token is the most likely is known.
    """

    known: dict[int, float]
    cap: float
    measured: bool = True

    @classmethod
    def only(cls, token: int) -> "Row":
        """A row of which nothing but the most likely token is known."""
        return cls({token: 0.0}, -math.inf, measured=False)

    @property
    def clear(self) -> bool:
        """Is the most likely token among those that are known?"""
        return self.cap <= max(self.known.values())

    def best(self, count: int) -> dict[int, float]:
        """The most likely tokens."""
        order = sorted(self.known.items(), key=lambda pair: (-pair[1], pair[0]))
        return dict(order[:count])


@dataclass(slots=True)
class ServerTokens:
    """A stretch of tokens as a server tells it.

    Attributes:
        tokens: ids; None for one that is named by a text which no single token has.
        logprobs: of the tokens, raw, in nats; NaN where it is not told.
        rows: what they were drawn from; None where it is not told.
        ended: the server stopped by itself.
        text: of them all.
        numbered: the tokens came as ids, not as texts.
    """

    tokens: list[int | None] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rows: list[Row | None] = field(default_factory=list)
    ended: bool = False
    text: str = ""
    numbered: bool = False


class Names:
    """Token ids by the names that servers give them."""

    def __init__(self, pair: Pair) -> None:
        self._size = pair.vocabulary.size
        self._ids: dict[str, int | None] = {}
        for token in range(self._size):
            name = name_of(pair.spelling(token))
            # A name that two tokens share stands for neither.
            self._ids[name] = None if name in self._ids else token

    def id(self, name: str) -> int | None:
        """The id of a name; None where it is unknown, or no single token's."""
        if name.startswith(_NAMED):
            token = _numbered(name)
            return token if token < self._size else None
        return self._ids.get(name)

    def read_all(self, reply: Any, most: int) -> list[ServerTokens]:
        """The choices of a completion, in the order of the prompts.

        Args:
            reply: JSON as it came.
            most: how many most likely tokens were asked for at each position.

        Raises:
            ShapeError: it is no completion.
        """
        return [self.read(choice, most) for choice in _choices(reply)]

    def read(self, choice: dict[str, Any], most: int) -> ServerTokens:
        """A choice of a completion.

        Args:
            choice: as it came.
            most: how many most likely tokens were asked for at each position.

        Raises:
            ShapeError: it is none.
        """
        ended = choice.get("finish_reason") in ("stop", "eos", "eos_token")
        told = ServerTokens(ended=ended, text=_text(choice.get("text") or ""))
        logprobs = _object(choice.get("logprobs") or {})
        listed, content = choice.get("token_ids"), logprobs.get("content")
        ids = None if listed is None else [_token(one) for one in _list(listed)]
        told.numbered = bool(ids) or content is not None
        if content is not None:  # llama.cpp
            for entry in map(_object, _list(content)):
                self._take(told, _token(entry.get("id")), entry.get("logprob"), _pairs(entry), most)
        elif logprobs.get("tokens"):
            names = [_text(name) for name in _list(logprobs["tokens"])]
            told.numbered |= all(name.startswith(_NAMED) for name in names)
            own = ids if ids is not None and len(ids) == len(names) else map(self.id, names)
            values = _list(logprobs.get("token_logprobs"))
            tops = _list(logprobs.get("top_logprobs") or [None] * len(names))
            if not len(values) == len(tops) == len(names):
                raise ShapeError("tokens without their log-probabilities")
            for token, logprob, top in zip(own, values, tops, strict=True):
                self._take(told, token, logprob, _object(top or {}).items(), most)
        elif ids is not None:
            for token in ids:
                self._take(told, token, None, (), most)
        elif told.text or not told.ended:
            self._take(told, self.id(told.text), None, (), most)
        return told

    def _take(
        self,
        told: ServerTokens,
        token: int | None,
        logprob: Any,
        top: Iterable[tuple[str | int, Any]],
        most: int,
    ) -> None:
        nats = None if logprob is None else _nats(logprob)
        told.tokens.append(token if token is not None and token < self._size else None)
        told.logprobs.append(math.nan if nats is None else nats)
        told.rows.append(self._row(token, nats, [(one, _nats(value)) for one, value in top], most))

    def _row(
        self,
        token: int | None,
        logprob: float | None,
        top: list[tuple[str | int, float]],
        most: int,
    ) -> Row | None:
        if not top or logprob is None:
            return None
        ranked = sorted((value for _, value in top), reverse=True)
        # The token itself is told beside the most likely ones where it is none of them.
        cap = ranked[min(most, len(ranked)) - 1] if len(ranked) < self._size else -math.inf
        known: dict[int, float] = {}
        for name, value in top:
            id_ = name if isinstance(name, int) else self.id(name)
            if id_ is None or id_ >= self._size:
                # An id beyond the common vocabulary is never said; a name without an id may be.
                cap = cap if _beyond(name, self._size) else max(cap, value)
            else:
                known[id_] = value if value > _IMPOSSIBLE else -math.inf
        if token is not None and token < self._size:
            known.setdefault(token, logprob)
        return Row(known, cap) if known else None


def _pairs(entry: dict[str, Any]) -> list[tuple[str | int, Any]]:
    tops = map(_object, _list(entry.get("top_logprobs") or []))
    return [(_token(one.get("id")), one.get("logprob")) for one in tops]


def _beyond(name: str | int, size: int) -> bool:
    if isinstance(name, str):
        return name.startswith(_NAMED) and _numbered(name) >= size
    return name >= size


def _choices(reply: Any) -> list[dict[str, Any]]:
    """A reply's choices in the order of the prompts; llama.cpp answers several with a list."""
    if isinstance(reply, list):
        return [choice for one in reply for choice in _choices(_object(one))]
    found = [_object(choice) for choice in _list(_object(reply).get("choices"))]
    return sorted(found, key=lambda choice: _token(choice.get("index", 0)))


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


def _numbered(name: str) -> int:
    number = name.removeprefix(_NAMED)
    return _token(int(number) if number.isdecimal() and len(number) < 20 else number)


def _nats(value: Any) -> float:
    if not isinstance(value, int | float) or not value <= _ROUNDED or isinstance(value, bool):
        raise ShapeError(f"{_short(value)} where a log-probability belongs")
    return min(float(value), 0.0) if value > 10 * _IMPOSSIBLE else -math.inf


def _short(value: Any) -> str:
    """A value in so many letters that it fits a line."""
    told = json.dumps(value)
    return told if len(told) <= _LONGEST else f"{told[:_LONGEST]}…"
