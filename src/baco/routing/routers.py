"""The routers: rules of a few lines that pick the source of a word.

A router is a pure function of the two rows of raw logits and the vocabulary's roles, for a whole
batch at once. It returns a bool per row, True where the base model is to speak (w_t = 1 in the
paper's equation 1). Rules are of two kinds. A *logit rule* compares a figure with the threshold γ.
A *content rule* locks words to the aligned model by what the predicted token is; what it leaves
open goes to the logit rule it is combined with, or to the base model where it stands alone.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from baco.routing.signals import Predictor, Signals
from baco.vocabulary import Role

Source = Literal["base", "aligned"]
HALVES: tuple[Source, ...] = ("base", "aligned")
BOTH: frozenset[Source] = frozenset(HALVES)

ALIGNED_ROLES: Mapping[str, Source] = {"number": "aligned", "name": "aligned"}


class Router(Protocol):
    """What the decoder asks at every boundary. Any object with these members will do."""

    @property
    def spelling(self) -> str:
        """How a user writes this router, its threshold included."""

    @property
    def only(self) -> Source | None:
        """The one model this router ever names, or None: then the other is not even run."""

    @property
    def reads(self) -> frozenset[Source]:
        """The models whose rows it looks at, and has to wait for."""

    def __call__(self, signals: Signals) -> Tensor:
        """True where the base model is to speak: bool [B]."""


@dataclass(frozen=True, slots=True)
class LogitRule:
    """A figure compared with γ.

    Attributes:
        decide: (signals, γ) → bool [B], True where the base model is to speak.
        low, high: the range of γ, both ends allowed.
        reads: the models whose rows the figure is made of.
    """

    decide: Callable[[Signals, float], Tensor]
    low: float
    high: float
    reads: frozenset[Source] = frozenset(("base",))


LOGIT_RULES: Mapping[str, LogitRule] = {
    "P": LogitRule(lambda s, gamma: s.max_base < gamma, 0.0, 1.0),
    "H": LogitRule(lambda s, gamma: s.entropy_base > gamma, 0.0, math.inf),
    "Gap": LogitRule(
        lambda s, gamma: s.entropy_base - s.entropy_aligned > gamma, -math.inf, math.inf, BOTH
    ),
    "Rand": LogitRule(lambda s, gamma: s.tossed() < gamma, 0.0, 1.0, frozenset()),
    "Nudging": LogitRule(lambda s, gamma: s.max_base >= gamma, 0.0, 1.0),
}

CONTENT_ROLES: Mapping[str, tuple[Role, ...]] = {
    # End of text is a special token, so its role is FORMAT.
    "Punc": (Role.PUNCTUATION, Role.FORMAT),
    "FC": (Role.FUNCTION,),
}


def in_roles(signals: Signals, roles: tuple[Role, ...], predict: Predictor) -> Tensor:
    """Is the predicted token of one of these roles? → bool [B]."""
    return signals.predicted_in(signals.vocabulary.in_roles(roles), predict)


@dataclass(frozen=True, slots=True)
class Constant:
    """Always the same model: the two single models as special cases."""

    source: Source

    @property
    def spelling(self) -> str:
        return self.source.capitalize()

    @property
    def only(self) -> Source:
        return self.source

    @property
    def reads(self) -> frozenset[Source]:
        return frozenset()

    def __call__(self, signals: Signals) -> Tensor:
        return torch.full(signals.base.shape[:1], self.source == "base", device=signals.base.device)


@dataclass(frozen=True, slots=True)
class Rule:
    """Content rules first, then at most one logit rule: ``P-Punc-FC:0.4``, ``H:1.5``, ``Punc``.

    Attributes:
        logit: a name of LOGIT_RULES, or None: then the base model takes what is left open.
        contents: names of CONTENT_ROLES, and ``Role``.
        threshold: γ of the logit rule.
        table: what ``Role`` does with each role it names. Standing alone it decides by the table
            (roles it does not name go to the base model); combined with a logit rule its aligned
            rows lock and the rest is open.
        predict: whose most likely next token counts as the predicted one.
    """

    logit: str | None
    contents: tuple[str, ...] = ()
    threshold: float | None = None
    table: tuple[tuple[str, Source], ...] = ()
    predict: Predictor = "base"

    @property
    def only(self) -> Source | None:
        return None

    @property
    def reads(self) -> frozenset[Source]:
        found = LOGIT_RULES[self.logit].reads if self.logit else frozenset()
        if self.contents:
            found |= BOTH if self.predict == "either" else {self.predict}
        return found

    @property
    def family(self) -> str:
        """The spelling without its arguments: ``P-Punc``."""
        return "-".join(([self.logit] if self.logit else []) + list(self.contents))

    @property
    def spelling(self) -> str:
        arguments = [] if self.threshold is None else [f"{self.threshold:g}"]
        arguments += [f"{role}={source}" for role, source in self.table]
        arguments += [] if self.predict == "base" else [f"predict={self.predict}"]
        return self.family + (":" + ",".join(arguments) if arguments else "")

    def locked_roles(self) -> tuple[Role, ...]:
        """The roles whose words belong to the aligned model whatever the logits say."""
        roles = [role for name in self.contents for role in CONTENT_ROLES.get(name, ())]
        if "Role" in self.contents:
            rows = dict(self.table or ALIGNED_ROLES.items())
            roles += [Role[name.upper()] for name, source in rows.items() if source == "aligned"]
        return tuple(dict.fromkeys(roles))

    def __call__(self, signals: Signals) -> Tensor:
        if self.logit is None:
            base = torch.ones(signals.base.shape[:1], dtype=torch.bool, device=signals.base.device)
        else:
            assert self.threshold is not None, "the registry gives every logit rule a threshold"
            base = LOGIT_RULES[self.logit].decide(signals, self.threshold)
        if self.contents:
            base = base & ~in_roles(signals, self.locked_roles(), self.predict)
        return base


@dataclass(frozen=True, slots=True)
class Custom:
    """A user's own rule by its registered name: ``decide(signals, γ)`` or ``decide(signals)``."""

    name: str
    decide: Callable[..., Tensor]
    threshold: float | None = None

    @property
    def only(self) -> Source | None:
        return None

    @property
    def reads(self) -> frozenset[Source]:
        return BOTH

    @property
    def spelling(self) -> str:
        return self.name if self.threshold is None else f"{self.name}:{self.threshold:g}"

    def __call__(self, signals: Signals) -> Tensor:
        if self.threshold is None:
            return self.decide(signals)
        return self.decide(signals, self.threshold)
