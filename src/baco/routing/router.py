"""What a router is, and the two kinds that a spelling can name.

A router picks the source of the next word. It is a pure function of both models' raw logits and the
vocabulary's roles, for a whole batch at once. It returns a bool per row, True for the base model:
w_t = 1 in P_BACo = w_t · P_base + (1 − w_t) · P_aligned. The rules are in
:mod:`baco.routing.rules`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from baco.routing.adaptive import Adaptation, moved
from baco.routing.learned import LearnedModel
from baco.routing.rules import (
    HIDDEN_STATES,
    STATE,
    STRUCTURE,
    AnyRule,
    ContentRule,
    LogitRule,
    Override,
)
from baco.routing.signals import Predictor, Signals
from baco.sampling.parameters import written
from baco.source import MODELS, Source
from baco.text.vocabulary import Role

BOTH: frozenset[Source] = frozenset(MODELS)


class Router(Protocol):
    """Picks a source at every word boundary. Any object with these members is a router."""

    @property
    def spelling(self) -> str:
        """How a user writes this router, its threshold included."""

    @property
    def only(self) -> Source | None:
        """The one source that this router ever picks, else None. The other model is not run."""

    @property
    def reads(self) -> frozenset[Source]:
        """The models whose logits it reads."""

    def __call__(self, signals: Signals) -> Tensor:
        """True where the base model writes the word: bool [N]."""


@dataclass(frozen=True, slots=True)
class ConstantRouter:
    """Always picks the same source: ``Base`` and ``Aligned``, the single models."""

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


def is_stateful(router: Router) -> bool:
    """Whether it reads the answers so far, ``signals.past``."""
    return bool(getattr(router, "stateful", False))


def reads_structure(router: Router) -> bool:
    """Whether it reads where free text is in structured answers, ``signals.in_text``. Such a router
    also picks the source of forced tokens.
    """
    return bool(getattr(router, "reads_structure", False))


def is_sibling_aware(router: Router) -> bool:
    """Whether it reads the lower-numbered samples of the same prompt, ``past.siblings``."""
    return bool(getattr(router, "sibling_aware", False))


def hidden_widths(router: Router) -> Mapping[Source, int | None]:
    """The models whose hidden states a router reads, and the width that these must have; None where
    any does.
    """
    widths: Mapping[Source, int | None] = getattr(router, "hidden_widths", {})
    return widths


def further_reads(router: Router) -> str | None:
    """What it reads beside the two distributions, coins and structures; None for nothing."""
    if is_stateful(router):
        return "the answer so far"
    return "hidden states" if hidden_widths(router) else None


def file_digests(router: Router) -> dict[str, dict[str, str]]:
    """What a manifest says beside a router's spelling: under ``router_files`` the SHA-256 of every
    file that it reads, by path; nothing where it reads none.
    """
    files: tuple[LoadedFile, ...] = getattr(router, "files", ())
    digests = {file.path: file.digest for file in files if file.path is not None}
    return {"router_files": digests} if digests else {}


@dataclass(frozen=True, slots=True)
class LoadedFile:
    """A file that a rule reads.

    Attributes:
        key: the name of the argument.
        path: as the user wrote it; None for the rule's default.
        content: what the rule is given.
        digest: SHA-256 of the file; empty for the default.
    """

    key: str
    path: str | None
    content: Any = field(repr=False)
    digest: str = ""


@dataclass(frozen=True, slots=True)
class RuleRouter:
    """Content rules first, then at most one logit rule: ``P-Punc-FC:0.4``, ``H:1.5``, ``Punc``.

    Attributes:
        logit: decides the words that no content rule locks to the aligned model. Without one, the
            base model writes them.
        contents: the content rules.
        threshold: γ of the logit rule.
        table: the table of ``Role``, from role to source. Alone, ``Role`` gives roles outside the
            table to the base model. Combined, its aligned roles are locked and the rest is left to
            the logit rule.
        predict: the model whose most likely next token is the predicted token.
        overrides: the rules that give words to the base model, whatever the others say. Without
            any other rule, the aligned model writes the rest.
        files: the files that the rules read.
        adaptation: what moves the threshold; None for a fixed one.
    """

    logit: LogitRule | None
    contents: tuple[ContentRule, ...] = ()
    threshold: float | None = None
    table: tuple[tuple[str, Source], ...] = ()
    predict: Predictor = "base"
    overrides: tuple[Override, ...] = ()
    files: tuple[LoadedFile, ...] = ()
    adaptation: Adaptation | None = None

    def __call__(self, signals: Signals) -> Tensor:
        if self.logit is None:
            rest = bool(self.contents)  # where only overrides are named, the rest is aligned
            base = torch.full(signals.base.shape[:1], rest, device=signals.base.device)
        else:
            file = self.logit.file
            content = None if file is None else self._content(file.key)
            base = self.logit(signals, self._gamma(signals), content)
        if roles := self._locked_roles():
            base = base & ~signals.predicted_in(roles, self.predict)
        for content in self.contents:
            if content.locks is not None:
                base = base & ~content.locks(signals, self.predict)
        for rule in self.overrides:
            base = base | rule.decide(signals, self._content(rule.file.key))
        return base

    def _gamma(self, signals: Signals) -> float | Tensor | None:
        """The threshold of every row: one for all, or [N]."""
        if self.logit is None or self.threshold is None or self.adaptation is None:
            return self.threshold
        return moved(self.threshold, self.logit.grid, self.adaptation.steps(signals.past))

    def _content(self, key: str) -> Any:
        return next(file.content for file in self.files if file.key == key)

    @property
    def stateful(self) -> bool:
        """Whether it reads the answers so far."""
        return bool(self.quantities & STATE)

    @property
    def reads_structure(self) -> bool:
        """Whether it reads where free text is in a structured answer."""
        return bool(self.quantities & STRUCTURE)

    @property
    def sibling_aware(self) -> bool:
        """Whether it reads the lower-numbered samples of the same prompt."""
        return self.adaptation is not None and self.adaptation.sibling_aware

    @property
    def hidden_widths(self) -> Mapping[Source, int | None]:
        """See :func:`hidden_widths`."""
        widths: dict[Source, int | None] = {
            HIDDEN_STATES[name]: None for name in HIDDEN_STATES.keys() & self.quantities
        }
        for file in self.files:
            if isinstance(file.content, LearnedModel):
                widths.update(file.content.hidden_widths)
        return widths

    def _locked_roles(self) -> tuple[Role, ...]:
        """The roles whose words the aligned model writes, whatever the logits are."""
        roles: list[Role] = []
        for rule in self.contents:
            if rule.name == "Role" and self.table:
                roles += [Role[role.upper()] for role, source in self.table if source == "aligned"]
            else:
                roles += rule.roles
        return tuple(dict.fromkeys(roles))

    @property
    def only(self) -> Source | None:
        return None

    @property
    def _predictors(self) -> frozenset[Source]:
        if not self.contents:
            return frozenset()
        return BOTH if self.predict == "either" else frozenset({self.predict})

    @property
    def reads(self) -> frozenset[Source]:
        tops = {
            model for model in MODELS for rule in self.overrides if f"top_{model}" in rule.reads
        }
        return self._predictors | (self.logit.models if self.logit else frozenset()) | tops

    @property
    def quantities(self) -> frozenset[str]:
        """The attributes of :class:`Signals` that it reads."""
        predictions = {f"top_{model}" for model in self._predictors}
        more = {name for content in self.contents for name in content.reads}
        more |= {name for rule in self.overrides for name in rule.reads}
        if self.adaptation is not None:
            more.add("past")
        return frozenset(self.logit.reads if self.logit else ()) | predictions | more

    @property
    def rules(self) -> tuple[AnyRule, ...]:
        """All its rules, the logit rule first."""
        return (*([self.logit] if self.logit else []), *self.contents, *self.overrides)

    @property
    def name(self) -> str:
        """The spelling without its arguments: ``P-Punc``."""
        return "-".join(rule.name for rule in self.rules)

    @property
    def spelling(self) -> str:
        arguments = [] if self.threshold is None else [written(self.threshold)]
        adapts = {} if self.adaptation is None else self.adaptation.arguments
        arguments += [f"{key}={value}" for key, value in adapts.items()]
        arguments += [f"{role}={source}" for role, source in self.table]
        arguments += [] if self.predict == "base" else [f"predict={self.predict}"]
        arguments += [f"{file.key}={file.path}" for file in self.files if file.path is not None]
        return self.name + (":" + ",".join(arguments) if arguments else "")
