"""Every built-in routing rule. To add one, write a function here and nothing anywhere else.

There are three kinds. A *logit rule* reads the two distributions and decides which model writes the
word, usually by comparing a quantity with the threshold γ. A *content rule* locks a word to the
aligned model by the predicted token. An *override* gives words to the base model, whatever the
other rules say. A router combines at most one logit rule with any number of the others:
``P-Punc-FC:0.4``.

A rule carries everything known about it. The parser, calibration, diagnosis, sweeps, the server's
page and the backends read it here.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import Tensor

from baco.errors import BacoError
from baco.routing.learned import LearnedModel, load
from baco.routing.signals import Predictor, Signals
from baco.source import MODELS, Source
from baco.text.phrases import Phrases, load_phrases
from baco.text.vocabulary import Role

Side = Literal["below", "above"]

# The default of ``reads``: both models' logits, and so everything computed from them.
EVERYTHING = ("base", "aligned")

PROBABILITIES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PROBABILITY_SWEEP = (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.9)
NATS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


# What only some backends supply: a rule that reads one of these is stateful.
STATE = frozenset(("past",))
# What a rule reads of an answer's structure. Without a structure every backend supplies it.
STRUCTURE = frozenset(("in_text",))
# The last hidden states, which only the local backend supplies, by their models.
HIDDEN_STATES: dict[str, Source] = {"hidden_base": "base", "hidden_aligned": "aligned"}


@dataclass(frozen=True, slots=True)
class RuleFile:
    """The file that a rule reads, named by an argument: ``Slop:phrases.txt``.

    Attributes:
        key: the argument's name, for ``key=path``.
        load: path, or None for the default, → what the rule is given. It raises BacoError for a
            file that cannot be used.
        required: there is no default.
    """

    key: str
    load: Callable[[str | None], Any] = field(repr=False)
    required: bool = False


@dataclass(frozen=True, slots=True)
class LogitRule:
    """Decides by the two distributions which model writes the word.

    Attributes:
        name: one word; alone, it is a router's name.
        decide: ``(signals, γ)``, or ``(signals)`` without a threshold, → bool [N], True where the
            base model writes the word.
        help: one sentence.
        threshold: whether it takes γ.
        low, high: the range of γ, both ends allowed.
        grid: values of γ for calibration, from the lowest base share to the highest. Without a
            grid the rule cannot be calibrated.
        sweep: values of γ for sweeps and diagnosis; by default those of a probability.
        example: a value of γ.
        reads: the attributes of :class:`Signals` that it reads. Reading any other is an error.
        monotone: whether a higher entropy_base or a lower entropy_aligned never turns its decision
            from base to aligned. The remote backend can then decide it from bounds on entropies.
        compares: the one quantity that it compares with γ, and on which side of γ the base model
            writes; for explanations.
        page: for the server's page, one sentence with ``{gamma}`` or ``{percent}`` in it.
        file: the file that it reads; ``decide`` then takes what ``file.load`` returned as its last
            argument.
        default: γ where none is given; None where one must be.
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
    file: RuleFile | None = None
    default: float | None = None

    @property
    def models(self) -> frozenset[Source]:
        """The models whose logits it reads."""
        return frozenset(
            model for model in MODELS for name in self.reads if name.split("_")[-1] == model
        )

    def __call__(
        self, signals: Signals, gamma: float | Tensor | None, content: Any = None
    ) -> Tensor:
        """True where the base model writes the word: bool [N]. γ is one for all rows, or [N]."""
        everything = set(EVERYTHING) <= set(self.reads)
        readable: Any = signals if everything else _DeclaredSignals(signals, self)
        arguments = (gamma,) if self.threshold else ()
        return self.decide(readable, *arguments, *(() if self.file is None else (content,)))


@dataclass(frozen=True, slots=True)
class Override:
    """Gives words to the base model, whatever the other rules of the router say.

    Attributes:
        name: one word; alone, it is a router's name, and the aligned model writes all other words.
        decide: ``(signals, what file.load returned)`` → bool [N], True where the base model writes
            the word.
        help: one sentence.
        example: a spelling.
        reads: the attributes of :class:`Signals` that it reads.
        file: the file that it reads.
    """

    name: str
    decide: Callable[[Signals, Any], Tensor] = field(repr=False)
    help: str
    example: str
    reads: tuple[str, ...]
    file: RuleFile


@dataclass(frozen=True, slots=True)
class ContentRule:
    """Locks words to the aligned model by the predicted token.

    Attributes:
        name: one word; alone, it is a router's name.
        roles: the roles of the predicted token that it locks. For ``Role``, these hold where the
            user gives no table.
        help: one sentence.
        example: a spelling.
        page: what it locks, for the server's page: in the singular, and in the plural.
        locks: ``(signals, the model that predicts)`` → bool [N], True where it locks, whatever the
            role; None where roles say all.
        reads: the attributes of :class:`Signals` that ``locks`` reads beside the predicted token.
    """

    name: str
    roles: tuple[Role, ...]
    help: str
    example: str
    page: tuple[str, str]
    locks: Callable[[Signals, Predictor], Tensor] | None = field(default=None, repr=False)
    reads: tuple[str, ...] = ()


AnyRule = LogitRule | ContentRule | Override
AnyRuleT = TypeVar("AnyRuleT", bound=AnyRule)
RULES: dict[str, AnyRule] = {}
BUILT_IN: frozenset[str] = frozenset()


class UndeclaredReadError(RuntimeError):
    """A rule reads a quantity that its ``reads`` does not name."""


class _DeclaredSignals:
    """Only the signals that a rule declares. A backend may be unable to compute any other."""

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
    name: str, *, help: str = "", **attributes: Any
) -> Callable[[Callable[..., Tensor]], LogitRule]:
    """Register a function as a logit rule.

    The function takes ``(signals, γ)``, or ``(signals)`` for a rule without γ. It returns bool [N],
    True where the base model writes the word. It must keep no state and must not loop over rows.

    Args:
        name: one word of letters, digits and ``_``.
        help: one sentence; by default the first line of the function's docstring.
        attributes: ``low``, ``high``, ``grid``, ``sweep``, ``example``, ``reads``, ``monotone``,
            ``compares`` and ``page`` of :class:`LogitRule`.

    Raises:
        BacoError: the name is built in or not a word, or the function takes other arguments.
    """

    def register(decide: Callable[..., Tensor]) -> LogitRule:
        arguments = len(inspect.signature(decide).parameters)
        if arguments not in (1, 2):
            raise BacoError(
                f"router {name!r} takes {arguments} arguments: give (signals[, threshold])"
            )
        sentence = help or (inspect.getdoc(decide) or "a router of your own").splitlines()[0]
        for key in ("grid", "sweep", "reads"):
            if key in attributes:
                attributes[key] = tuple(attributes[key])
        return add_rule(LogitRule(name, decide, sentence, arguments == 2, **attributes))

    return register


def add_rule(rule: AnyRuleT) -> AnyRuleT:
    """Register a rule by its name. It replaces an earlier one that is not built in.

    Raises:
        BacoError: the name is built in or not a word, or the grid neither rises nor falls.
    """
    if not rule.name.isidentifier():
        raise BacoError(f"router name {rule.name!r}: use one word of letters, digits and _")
    reserved = {name.casefold() for name in (*BUILT_IN, "Base", "Aligned")}
    if rule.name.casefold() in reserved:
        raise BacoError(f"router name {rule.name!r} is built in: choose another")
    if isinstance(rule, LogitRule):
        rising = sorted(set(rule.grid))
        if list(rule.grid) not in (rising, rising[::-1]):
            raise BacoError(
                f"router {rule.name!r}: its grid {rule.grid} has to rise, or to fall, from each "
                "value to the next"
            )
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


def learned(signals: Signals, gamma: float, model: LearnedModel) -> Tensor:
    """base where a learned model gives it a probability above γ"""
    return model.probability(model.read(signals)) > gamma


add_rule(
    LogitRule(
        "Learned",
        learned,
        "base where a model that 'baco router train' made gives it a probability above γ "
        "(default 0.5)",
        low=0,
        high=1,
        grid=PROBABILITIES[::-1],
        sweep=PROBABILITY_SWEEP,
        page="Base speaks where a learned model gives it more than {percent}.",
        file=RuleFile("model", load, required=True),
        default=0.5,
    )
)
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
add_rule(
    ContentRule(
        "Struct",
        (),
        "aligned for the structure of an answer under a schema, regex, choice or grammar: "
        "keys, quotes, numbers, enum values; base for the free text",
        "Struct",
        (
            "part of the structure",
            "the structure of the answer (keys, quotes, numbers, enum values)",
        ),
        locks=Signals.in_structure,
        reads=("in_text",),
    )
)
# A user's table replaces these roles.
add_rule(
    ContentRule(
        "Role",
        (Role.NUMBER, Role.NAME),
        "by a table from the predicted token's role to a source; roles not named go to base",
        "Role:number=aligned,name=aligned,opinion=base",
        ("of a role that Role keeps for aligned", "the roles that the table gives it"),
    )
)


def slop(signals: Signals, phrases: Phrases) -> Tensor:
    """base where the aligned model is about to begin a listed phrase"""
    openings = phrases.openings(signals.vocabulary)
    return openings.begun(signals.top_aligned, signals.past.tail)


add_rule(
    Override(
        "Slop",
        slop,
        "base where the aligned model is about to begin an overused phrase (a list, or a file of "
        "your own), else aligned",
        "Slop",
        ("top_aligned", "past"),
        RuleFile("phrases", load_phrases),
    )
)
# Combinations that listings and sweeps add to the single rules. Users can write any other.
COMBINATIONS = (
    *("P-Punc:0.4", "H-Punc:1.5", "P-FC:0.4", "H-FC:1.5", "P-Punc-FC:0.4", "Punc-FC"),
    "P-Struct:0.4",
)
BUILT_IN = frozenset(RULES)
