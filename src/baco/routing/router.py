"""What a router is, and the routers that are made of rules.

A router is a pure function of the two rows of raw logits and the vocabulary's roles, for a whole
batch at once. It returns a bool per row, True where the base model writes the word (w_t = 1 in the
paper's equation 1). The rules themselves are in :mod:`baco.routing.rules`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from baco.routing.rules import ContentRule, LogitRule
from baco.routing.signals import Predictor, Signals
from baco.source import MODELS, Source
from baco.text.vocabulary import Role

BOTH: frozenset[Source] = frozenset(MODELS)


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
        logit: decides what content rules leave open; None: the base model writes it.
        contents: content rules, which keep words for the aligned model.
        threshold: γ of the logit rule.
        table: what ``Role`` does with each role it names. Standing alone it decides by the table
            (roles it does not name go to the base model); combined with a logit rule its aligned
            rows are kept and the rest is open.
        predict: the model whose most likely next token counts as the predicted one.
    """

    logit: LogitRule | None
    contents: tuple[ContentRule, ...] = ()
    threshold: float | None = None
    table: tuple[tuple[str, Source], ...] = ()
    predict: Predictor = "base"

    @property
    def only(self) -> Source | None:
        return None

    @property
    def reads(self) -> frozenset[Source]:
        models: frozenset[Source] = self.logit.models if self.logit else frozenset()
        if self.contents:
            models |= BOTH if self.predict == "either" else {self.predict}
        return models

    @property
    def quantities(self) -> frozenset[str]:
        """The attributes of :class:`Signals` that it looks at."""
        names = frozenset(self.logit.reads if self.logit else ())
        if self.contents:
            predictors = MODELS if self.predict == "either" else (self.predict,)
            names |= {f"top_{model}" for model in predictors}
        return names

    @property
    def family(self) -> str:
        """The spelling without its arguments: ``P-Punc``."""
        return "-".join(rule.name for rule in self.rules)

    @property
    def rules(self) -> tuple[LogitRule | ContentRule, ...]:
        """All of them, the logit rule first."""
        return (*([self.logit] if self.logit else []), *self.contents)

    @property
    def spelling(self) -> str:
        arguments = [] if self.threshold is None else [f"{self.threshold:g}"]
        arguments += [f"{role}={source}" for role, source in self.table]
        arguments += [] if self.predict == "base" else [f"predict={self.predict}"]
        return self.family + (":" + ",".join(arguments) if arguments else "")

    def _kept_roles(self) -> tuple[Role, ...]:
        """The roles whose words belong to the aligned model whatever the logits say."""
        roles: list[Role] = []
        for rule in self.contents:
            if rule.name == "Role" and self.table:
                roles += [Role[role.upper()] for role, source in self.table if source == "aligned"]
            else:
                roles += rule.roles
        return tuple(dict.fromkeys(roles))

    def __call__(self, signals: Signals) -> Tensor:
        if self.logit is None:
            base = torch.ones(signals.base.shape[:1], dtype=torch.bool, device=signals.base.device)
        else:
            base = self.logit(signals, self.threshold)
        if self.contents:
            kept = signals.vocabulary.in_roles(self._kept_roles())
            base = base & ~signals.predicted_in(kept, self.predict)
        return base
