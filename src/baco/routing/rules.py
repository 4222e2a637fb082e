"""Every built-in routing rule. To add one, write a function here and nothing anywhere else.

A rule is of one of two kinds. A *logit rule* decides from the two distributions which model writes
the word, most often by comparing a quantity with the threshold γ. A *content rule* keeps words for
the aligned model by what the predicted token is. A router has at most one logit rule and any number
of content rules: ``P-Punc-FC:0.4``.

A rule carries everything that is known about it. The parser, calibration, diagnosis, sweeps, the
server's page and the backends read it here.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import Tensor

from baco.errors import BacoError
from baco.routing.signals import Signals
from baco.source import MODELS, Source
from baco.text.vocabulary import Role, Vocabulary

Side = Literal["below", "above"]

# What a rule that does not say what it reads is taken to read: both models' whole rows.
EVERYTHING = ("base", "aligned")

PROBABILITIES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PROBABILITY_SWEEP = (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.9)
NATS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


@dataclass(frozen=True, slots=True)
class LogitRule:
    """Decides by the two distributions.

    Attributes:
        name: one word; the router's name where the rule stands alone.
        decide: ``(signals, γ)``, or ``(signals)`` without a threshold, → bool [B], True where the
            base model writes the word.
        help: one sentence.
        threshold: whether it takes γ.
        low, high: the range of γ, both ends allowed.
        grid: values of γ to calibrate at, from the lowest base share to the highest; without any it
            cannot be calibrated.
        sweep: values of γ for sweeps and diagnosis; by default those of a probability.
        example: a value of γ.
        reads: the attributes of :class:`Signals` that it looks at. Reading any other is an error.
        monotone: whether a higher entropy_base or a lower entropy_aligned never turns its decision
            from base to aligned. Two servers then decide it from bounds on the entropies.
        compares: the one quantity that it compares with γ, and where it lies when the base model
            writes; for explanations.
        page: for the server's page, one sentence with ``{gamma}`` or ``{percent}`` in it.
    """

    name: str
    decide: Callable[..., Tensor] = field(repr=False)
    help: str
    threshold: bool = True
    low: float = -math.inf
    high: float = math.inf
    grid: tuple[float, ...] = ()
    sweep: tuple[float, ...] = ()
    example: float = 0.5
    reads: tuple[str, ...] = EVERYTHING
    monotone: bool = False
    compares: tuple[str, Side] | None = None
    page: str = ""

    @property
    def models(self) -> frozenset[Source]:
        """The models whose rows it looks at."""
        return frozenset(
            model for model in MODELS for name in self.reads if name.split("_")[-1] == model
        )

    def __call__(self, signals: Signals, gamma: float | None) -> Tensor:
        """True where the base model writes the word: bool [B]."""
        seen: Any = signals if set(EVERYTHING) <= set(self.reads) else _Declared(signals, self)
        return self.decide(seen, gamma) if self.threshold else self.decide(seen)


@dataclass(frozen=True, slots=True)
class ContentRule:
    """Keeps words for the aligned model.

    Attributes:
        name: one word.
        roles: of the predicted tokens whose words it keeps; ``Role`` has a table instead.
        help: one sentence.
        example: how a user writes it.
        page: what it keeps, for the server's page: of one word, and of all.
    """

    name: str
    roles: tuple[Role, ...]
    help: str
    example: str
    page: tuple[str, str]

    def kept(self, vocabulary: Vocabulary) -> Tensor:
        """The predicted tokens whose words it keeps: bool [V]."""
        return vocabulary.in_roles(self.roles)


AnyRule = LogitRule | ContentRule
AnyRuleT = TypeVar("AnyRuleT", bound=AnyRule)
RULES: dict[str, AnyRule] = {}
BUILT_IN: frozenset[str] = frozenset()


class UndeclaredReadError(RuntimeError):
    """A rule looks at a quantity that its ``reads`` does not name."""


class _Declared:
    """Signals that show a rule only what it declares: a backend may have nothing else."""

    _ALWAYS = frozenset(("vocabulary", "tossed"))

    def __init__(self, signals: Signals, rule: LogitRule) -> None:
        self._signals, self._rule = signals, rule

    def __getattr__(self, name: str) -> Any:
        if name not in self._rule.reads and name not in self._ALWAYS:
            raise UndeclaredReadError(
                f"router rule {self._rule.name} reads {name} and declares "
                f"reads={self._rule.reads!r}: add it"
            )
        return getattr(self._signals, name)


def logit_rule(
    name: str,
    *,
    help: str = "",
    low: float = -math.inf,
    high: float = math.inf,
    grid: Sequence[float] = (),
    sweep: Sequence[float] = (),
    example: float = 0.5,
    reads: Sequence[str] = EVERYTHING,
    monotone: bool = False,
    compares: tuple[str, Side] | None = None,
    page: str = "",
) -> Callable[[Callable[..., Tensor]], LogitRule]:
    """Make a logit rule of a function, and know it by its name from now on.

    The function takes ``(signals, γ)``, or ``(signals)`` for a rule without γ. It returns bool [B],
    True where the base model writes the word. It must not keep state, nor loop over rows. The
    arguments are the attributes of :class:`LogitRule`; ``help`` is by default the first line of the
    function's docstring.

    Raises:
        BacoError: a name that is built in or cannot be typed, or a function of other arguments.
    """

    def register(decide: Callable[..., Tensor]) -> LogitRule:
        arguments = len(inspect.signature(decide).parameters)
        if arguments not in (1, 2):
            raise BacoError(
                f"router {name!r} takes {arguments} arguments: give (signals[, threshold])"
            )
        sentence = help or (inspect.getdoc(decide) or "a router of your own").splitlines()[0]
        rule = LogitRule(
            name,
            decide,
            sentence,
            arguments == 2,
            low,
            high,
            tuple(grid),
            tuple(sweep),
            example,
            tuple(reads),
            monotone,
            compares,
            page,
        )
        return add_rule(rule)

    return register


def add_rule(rule: AnyRuleT) -> AnyRuleT:
    """Know a rule by its name; one of the user's own replaces an earlier one of that name.

    Raises:
        BacoError: a name that is built in or cannot be typed.
    """
    if not rule.name.isidentifier():
        raise BacoError(f"router name {rule.name!r}: use one word of letters, digits and _")
    taken = {known.casefold() for known in (*BUILT_IN, "Base", "Aligned")}
    if rule.name.casefold() in taken:
        raise BacoError(f"router name {rule.name!r} is built in: choose another")
    RULES[rule.name] = rule
    return rule


@logit_rule(
    "P",
    low=0,
    high=1,
    grid=PROBABILITIES,
    sweep=PROBABILITY_SWEEP,
    example=0.3,
    reads=("max_base",),
    compares=("max_base", "below"),
    page="Base speaks where it is unsure: where its best guess has less than {percent}.",
)
def p(signals: Signals, gamma: float) -> Tensor:
    """base where max P_base < γ: the base model is unsure, so it has a choice"""
    return signals.max_base < gamma


@logit_rule(
    "H",
    low=0,
    grid=NATS[::-1],
    sweep=(0.5, 1.0, 1.6, 2.3, 2.8, 3.3, 4.0),
    example=1.5,
    reads=("entropy_base",),
    monotone=True,
    compares=("entropy_base", "above"),
    page="Base speaks where it sees many ways on: where its entropy is above {gamma} nats.",
)
def h(signals: Signals, gamma: float) -> Tensor:
    """base where the entropy of P_base is above γ nats"""
    return signals.entropy_base > gamma


@logit_rule(
    "Gap",
    grid=(*NATS[:0:-1], 0.0, -0.1, -0.25, -0.5, -1.0),
    sweep=(0.2, 0.7, 1.2, 1.8, 2.4, 2.9, 3.5),
    reads=("entropy_base", "entropy_aligned"),
    monotone=True,
    page=(
        "Base speaks where alignment took diversity away: where its entropy is more than {gamma} "
        "nats above the aligned model’s."
    ),
)
def gap(signals: Signals, gamma: float) -> Tensor:
    """base where H(P_base) − H(P_aligned) > γ: alignment took diversity away"""
    return signals.entropy_base - signals.entropy_aligned > gamma


@logit_rule(
    "Rand",
    low=0,
    high=1,
    grid=PROBABILITIES,
    sweep=(0.02, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
    reads=("coin",),
    page="Base speaks {percent} of the time, by chance, whatever the models think.",
)
def rand(signals: Signals, gamma: float) -> Tensor:
    """base with probability γ, whatever the models think"""
    return signals.tossed() < gamma


@logit_rule(
    "Nudging",
    low=0,
    high=1,
    grid=PROBABILITIES[::-1],
    sweep=PROBABILITY_SWEEP,
    example=0.3,
    reads=("max_base",),
    compares=("max_base", "above"),
    page=("Aligned speaks where base is unsure: where base’s best guess has less than {percent}."),
)
def nudging(signals: Signals, gamma: float) -> Tensor:
    """aligned where max P_base < γ, else base (Fei et al. 2024)"""
    return signals.max_base >= gamma


add_rule(
    ContentRule(
        "Punc",
        (Role.PUNCTUATION, Role.FORMAT),  # the end of text is a special token: its role is FORMAT
        "aligned for punctuation, format and end of text, else base",
        "Punc",
        ("punctuation, format or end of text", "punctuation, line breaks and the end of text"),
    )
)
add_rule(
    ContentRule(
        "FC",
        (Role.FUNCTION,),
        "aligned for function words, else base",
        "FC",
        ("a function word", "function words (the, of, and, …)"),
    )
)
# Its roles are those of the table that the user writes; these are the table where none is written.
add_rule(
    ContentRule(
        "Role",
        (Role.NUMBER, Role.NAME),
        "by a table from the predicted token's role to a source; roles not named go to base",
        "Role:number=aligned,name=aligned,opinion=base",
        ("of a role that Role keeps for aligned", "the roles that the table gives it"),
    )
)
# Combinations that are listed and swept beside the rules themselves; any other can be written too.
COMBINATIONS = ("P-Punc:0.4", "H-Punc:1.5", "P-FC:0.4", "H-FC:1.5", "P-Punc-FC:0.4", "Punc-FC")
BUILT_IN = frozenset(RULES)
