"""What completions APIs tell of a token, in the spellings of vLLM, SGLang, llama.cpp and OpenAI."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from baco.pair import Pair
from baco.text import name_of

_NAMED = "token_id:"
_IMPOSSIBLE = -9999.0


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
class Told:
    """A stretch of tokens as a server tells it.

    Attributes:
        tokens: ids; None for one that is named by a text which no single token has.
        logprobs: of the tokens, raw, in nats; NaN where it is not told.
        rows: what they were drawn from; None where it is not told.
        ended: the server stopped by itself.
        text: of them all.
    """

    tokens: list[int | None] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rows: list[Row | None] = field(default_factory=list)
    ended: bool = False
    text: str = ""


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
            token = int(name.removeprefix(_NAMED))
            return token if token < self._size else None
        return self._ids.get(name)

    def read(self, choice: dict[str, Any], most: int) -> Told:
        """A choice of a completion.

        Args:
            choice: as it came.
            most: how many most likely tokens were asked for at each position.
        """
        ended = choice.get("finish_reason") in ("stop", "eos", "eos_token")
        told = Told(ended=ended, text=choice.get("text") or "")
        logprobs = choice.get("logprobs") or {}
        ids = choice.get("token_ids")
        if logprobs.get("content") is not None:  # llama.cpp
            for entry in logprobs["content"]:
                self._take(told, entry["id"], entry["logprob"], _pairs(entry), most)
        elif logprobs.get("tokens"):
            names = logprobs["tokens"]
            own = ids if ids is not None and len(ids) == len(names) else map(self.id, names)
            tops = logprobs.get("top_logprobs") or [None] * len(names)
            columns = zip(own, logprobs["token_logprobs"], tops, strict=True)
            for token, logprob, top in columns:
                self._take(told, token, logprob, (top or {}).items(), most)
        elif ids is not None:
            for token in ids:
                self._take(told, token, None, (), most)
        elif told.text or not told.ended:
            self._take(told, self.id(told.text), None, (), most)
        return told

    def _take(
        self,
        told: Told,
        token: int | None,
        logprob: float | None,
        top: Iterable[tuple[str | int, float]],
        most: int,
    ) -> None:
        told.tokens.append(token if token is not None and token < self._size else None)
        told.logprobs.append(math.nan if logprob is None else logprob)
        told.rows.append(self._row(token, logprob, list(top), most))

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


def _pairs(entry: dict[str, Any]) -> list[tuple[str | int, float]]:
    return [(one["id"], one["logprob"]) for one in entry.get("top_logprobs") or ()]


def _beyond(name: str | int, size: int) -> bool:
    if isinstance(name, str):
        if not name.startswith(_NAMED):
            return False
        name = int(name.removeprefix(_NAMED))
    return name >= size
