"""From the spelling that users type to a router.

A spelling is ``Name[-Name…][:argument,…]``. The names are at most one logit rule and any content
rules and overrides, in any order. An argument is one of

- the threshold γ, a number;
- a row of the ``Role`` table, ``role=source``;
- ``predict=base|aligned|either``: the model whose most likely next token is the predicted token;
- ``share=…``: the base share that the threshold adapts to hold;
- ``distinct=…``: the share of tokens that earlier samples do not have, which it adapts to hold;
- ``over=samples``: such a share is held over all samples of a prompt, not in each answer;
- ``siblings=…``: how far the threshold moves where earlier samples have gone the same way;
- the path of a rule's file, ``phrases=path`` or the path alone.

A combiner (:mod:`baco.routing.combiners`) is spelled in the same places, alone: ``Ensemble:0.3``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from baco.errors import BacoError
from baco.plugins import plugins, register_plugins
from baco.routing.adaptive import Adaptation, Over, at_share
from baco.routing.combiners import BUILT_IN_COMBINERS, Combination, combination, combiners
from baco.routing.router import ConstantRouter, LoadedFile, Router, RuleRouter
from baco.routing.rules import (
    BUILT_IN,
    COMBINATIONS,
    HIDDEN_STATES,
    RULES,
    STATE,
    STRUCTURE,
    AnyRule,
    ContentRule,
    LogitRule,
    Override,
    RuleFile,
    add_rule,
    logit_rule,
)
from baco.routing.signals import Predictor
from baco.source import Source
from baco.text.vocabulary import Role

CONSTANTS = {
    "Base": "the base model alone",
    "Aligned": "the aligned model alone",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the catalogue: a router's name, an example of its spelling, what it does."""

    name: str
    example: str
    sentence: str


def rules() -> dict[str, AnyRule]:
    """Every rule by name: built in, from installed packages, and registered by the user.

    Raises:
        BacoError: an entry point of an installed package cannot be loaded or is not a rule.
    """
    register_plugins(
        "routers",
        RULES,
        LogitRule | ContentRule | Override,
        add_rule,
        logit_rule,
        "a rule of baco.routing.rules or a function of (signals[, threshold])",
    )
    return RULES


def catalogue() -> list[Entry]:
    """Every router that listings show, registered ones included.

    Rules that need a file of the user's are left out: their examples name none that exists.
    """
    lines = []
    for rule in rules().values():
        if isinstance(rule, LogitRule) and rule.file is not None and rule.file.required:
            continue
        if not isinstance(rule, LogitRule):
            lines.append(Entry(rule.name, rule.example, rule.help))
        else:
            example = f"{rule.name}:{rule.example:g}" if rule.threshold else rule.name
            lines.append(Entry(rule.name, example, rule.help))
    lines += [_combination(example) for example in COMBINATIONS]
    return lines + [Entry(name, name, sentence) for name, sentence in CONSTANTS.items()]


def plain_catalogue() -> list[Entry]:
    """The routers of the catalogue that read the two distributions and coins alone: no state, no
    structure of the answer and no hidden states.
    """
    entries = []
    for entry in catalogue():
        named = () if entry.name in CONSTANTS else _rules_of(entry.name).rules
        reads = {name for rule in named for name in rule.reads}
        if not reads & (STATE | STRUCTURE | HIDDEN_STATES.keys()):
            entries.append(entry)
    return entries


@dataclass(slots=True)
class _Arguments:
    """What follows the colon of a spelling."""

    threshold: float | None = None
    adapt: dict[str, Any] = field(default_factory=dict)
    table: dict[str, Source] = field(default_factory=dict)
    predict: Predictor = "base"
    paths: dict[str, str] = field(default_factory=dict)


def _combination(example: str) -> Entry:
    named = _rules_of(example)
    logit, contents = named.logit, named.contents
    keeping = " and ".join(rule.name for rule in contents)
    verb = "keeps" if len(contents) == 1 else "keep"
    rest = "is base" if logit is None else f"goes by {logit.name}"
    return Entry(
        router_name(example), example, f"{keeping} {verb} words for aligned; the rest {rest}"
    )


def register_router(name: str, rule: Callable[..., Tensor] | type, **details: Any) -> None:
    """Register a rule of your own under a name that spellings can use.

    Args:
        name: one word of letters, digits and ``_``; not a built-in name.
        rule: a function ``(signals) → bool [N]`` or ``(signals, threshold) → bool [N]``, True where
            the base model writes the word; or a class whose instances are such functions.
        details: further arguments of ``baco.routing.rules.logit_rule``: ``help``, a sentence
            for ``baco routers``; ``low``, ``high`` and ``grid`` of γ; ``reads``; and others.

    Raises:
        BacoError: the name is built in or not a word, or the rule takes other arguments.
    """
    decide = rule() if isinstance(rule, type) else rule
    if not callable(decide):
        raise BacoError(f"router {name!r} is {rule!r}: give a function of (signals[, threshold])")
    if name.casefold() in {known.casefold() for known in combiners()}:
        raise BacoError(f"router name {name!r} is a combiner's: choose another")
    logit_rule(name, **details)(decide)


def router_name(spelling: str) -> str:
    """The part of a spelling before its arguments: ``P-Punc`` of ``P-Punc:0.4``.

    Parts match in any case and are returned in their canonical case. Unknown ones stay unchanged.
    """
    canonical = {name.casefold(): name for name in (*rules(), *combiners(), *CONSTANTS)}
    parts = spelling.partition(":")[0].strip().split("-")
    return "-".join(canonical.get(part.strip().casefold(), part) for part in parts)


def canonical_name(spelling: str) -> str:
    """A router's name in canonical case and order: ``P-Punc`` of ``punc-p:0.4``.

    Raises:
        BacoError: no such router.
    """
    if (name := router_name(spelling)) in CONSTANTS or name in combiners():
        return name
    return _rules_of(spelling).name


def logit_rule_of(spelling: str) -> LogitRule | None:
    """The logit rule of a spelling, with or without its arguments; None where it has none, as
    combiners have.

    Raises:
        BacoError: no such router.
    """
    name = router_name(spelling)
    return None if name in CONSTANTS or name in combiners() else _rules_of(spelling).logit


def needs_threshold(spelling: str) -> bool:
    """Whether this router takes a threshold γ.

    Raises:
        BacoError: no such router.
    """
    rule = logit_rule_of(spelling)
    return rule is not None and rule.threshold


def gives_threshold(spelling: str) -> bool:
    """Whether this router takes a threshold γ, and the spelling gives it.

    Raises:
        BacoError: no such router, or something that is no argument.
    """
    if not needs_threshold(spelling):
        return False
    return _arguments_of(spelling).threshold is not None


def lacks_threshold(spelling: str) -> bool:
    """Whether this router takes a threshold γ, and the spelling gives neither it nor a target.

    Raises:
        BacoError: no such router, or something that is no argument.
    """
    if not needs_threshold(spelling):
        return False
    arguments = _arguments_of(spelling)
    return arguments.threshold is None and not arguments.adapt


def router(spelling: str, threshold: float | None = None) -> Router:
    """Parse a spelling.

    Args:
        spelling: such as ``P-Punc:0.4``, ``Role:number=aligned,opinion=base``, ``Aligned``; or of
            a combiner, ``Ensemble:0.3``.
        threshold: γ where the spelling gives none.

    Raises:
        BacoError: no such router, or a threshold that is missing, not taken or out of range.
    """
    if not isinstance(spelling, str) or not spelling.strip():
        raise BacoError(
            f"router {spelling!r}: give a spelling such as P-Punc:0.4 (see 'baco routers')"
        )
    name = router_name(spelling)
    if (combiner := combiners().get(name)) is not None:
        return combination(combiner, spelling)
    if name in CONSTANTS:
        arguments = _arguments(spelling, ())
        if arguments.threshold is not None:
            raise BacoError(f"router {spelling!r}: {name} takes no threshold")
        if arguments.table or arguments.predict != "base" or arguments.adapt:
            raise BacoError(f"router {spelling!r}: {name} takes no arguments")
        return ConstantRouter("base" if name == "Base" else "aligned")
    named = _rules_of(spelling)
    rule_files = _files_of(named)
    arguments = _arguments(spelling, rule_files)
    given, table = arguments.threshold, tuple(arguments.table.items())
    if table and not any(rule.name == "Role" for rule in named.contents):
        raise BacoError(
            f"router {spelling!r}: role=source belongs to Role, as in Role:name=aligned"
        )
    adaptation = _adaptation(spelling, arguments.adapt, named.logit)
    if named.logit is None or not named.logit.threshold:
        if given is not None:
            raise BacoError(f"router {spelling!r}: {name} takes no threshold")
        gamma = None
    else:
        choices: tuple[float | None, ...] = (given, threshold, named.logit.default)
        if adaptation is not None and adaptation.distinct is not None:
            choices = (given, at_share(named.logit.grid, adaptation.distinct))
        elif adaptation is not None:
            choices = (*choices, named.logit.example)
        gamma = next((value for value in choices if value is not None), None)
        _check_threshold(spelling, gamma, named.logit)
    return replace(
        named,
        threshold=gamma,
        table=table,
        predict=arguments.predict,
        files=tuple(_load(file, arguments.paths.get(file.key)) for file in rule_files),
        adaptation=adaptation,
    )


def _load(file: RuleFile, path: str | None) -> LoadedFile:
    if path is None:
        return LoadedFile(file.key, None, _default_content(file))
    content = file.load(path)
    return LoadedFile(file.key, path, content, sha256(Path(path).read_bytes()).hexdigest())


@cache
def _default_content(file: RuleFile) -> Any:
    return file.load(None)


def named_files(spelling: str) -> tuple[str, ...]:
    """The paths of files that a spelling names. They are not opened.

    Raises:
        BacoError: no such router, or something that is no argument.
    """
    name = router_name(spelling)
    if name in CONSTANTS or name in combiners() or ":" not in spelling:
        return ()
    return tuple(_arguments_of(spelling).paths.values())


def portable(router: Router) -> bool:
    """Whether another process can parse its spelling: all its rules are built in or installed."""
    if isinstance(router, ConstantRouter):
        return True
    if isinstance(router, Combination):
        return router.combiner.name in BUILT_IN_COMBINERS | plugins("combiners").keys()
    installed = BUILT_IN | plugins("routers").keys()
    return isinstance(router, RuleRouter) and {rule.name for rule in router.rules} <= installed


def _rules_of(spelling: str) -> RuleRouter:
    """The rules that a spelling combines, without its arguments."""
    known = rules()
    parts = router_name(spelling).split("-")
    for part in parts:
        if part in CONSTANTS and len(parts) > 1:
            raise BacoError(f"router {spelling!r}: {part} stands alone, it cannot be combined")
        if part in combiners():
            raise BacoError(
                f"router {spelling!r}: the combiner {part} stands alone, as in "
                f"{combiners()[part].example}"
            )
        if part not in known:
            raise BacoError(
                f"unknown router {spelling!r}: {part!r} is none of "
                f"{', '.join([*known, *combiners(), *CONSTANTS])} (see 'baco routers' and "
                "'baco combiners')"
            )
    named = [known[part] for part in parts]
    logits = [rule for rule in named if isinstance(rule, LogitRule)]
    contents = tuple(rule for rule in named if isinstance(rule, ContentRule))
    overrides = tuple(rule for rule in named if isinstance(rule, Override))
    if len(logits) > 1 or len(set(parts)) != len(parts):
        raise BacoError(
            f"router {spelling!r}: combine at most one of {rule_names(LogitRule)} with "
            f"content rules ({rule_names(ContentRule)}) and overrides ({rule_names(Override)}), "
            "each once, such as P-Punc-FC:0.4"
        )
    return RuleRouter(logits[0] if logits else None, contents, overrides=overrides)


def _files_of(named: RuleRouter) -> list[RuleFile]:
    """The files that rules read."""
    rules = [rule for rule in named.rules if not isinstance(rule, ContentRule)]
    return [rule.file for rule in rules if rule.file is not None]


def rule_names(kind: type[AnyRule]) -> str:
    """The names of all rules of a kind, as a sentence lists them."""
    return ", ".join(name for name, rule in RULES.items() if isinstance(rule, kind))


def _arguments_of(spelling: str) -> _Arguments:
    """The arguments of a spelling of rules."""
    return _arguments(spelling, _files_of(_rules_of(spelling)))


def _arguments(spelling: str, files: Sequence[RuleFile]) -> _Arguments:
    """Read the arguments of a spelling whose rules read these files."""
    arguments = _Arguments()
    keys = [file.key for file in files]
    _, colon, text = spelling.partition(":")
    for argument in text.split(",") if colon else ():
        key, equals, written = (part.strip() for part in argument.partition("="))
        key, value = key.lower(), written.lower()
        if equals and key in keys and written and key not in arguments.paths:
            arguments.paths[key] = written
        elif equals and key in _ADAPT and key not in arguments.adapt:
            arguments.adapt[key] = _ADAPT[key](spelling, value)
        elif key == "predict" and value in get_args(Predictor):
            arguments.predict = value  # type: ignore[assignment]
        elif equals and key.upper() in Role.__members__ and value in get_args(Source):
            arguments.table[key] = value  # type: ignore[assignment]
        elif len(keys) == 1 and not arguments.paths and _is_path(argument):
            arguments.paths[keys[0]] = argument.strip()
        elif not equals:
            arguments.threshold = _threshold(spelling, key, arguments.threshold)
        else:
            raise BacoError(
                f"router {spelling!r}: {argument.strip()!r} is not an argument: give a threshold, "
                f"role=base|aligned (roles: {', '.join(r.name.lower() for r in Role)}), "
                "predict=base|aligned|either, share=0.2, distinct=0.5, over=samples, siblings=1"
                + "".join(f" or {key}=PATH" for key in keys)
            )
    return arguments


def _is_path(argument: str) -> bool:
    """Whether an argument of a rule with a file is the path of this file: not a number."""
    try:
        float(argument)
    except ValueError:
        key, equals, _ = argument.partition("=")
        return bool(argument.strip()) and not (equals and key.strip().isidentifier())
    return False


def _number(text: str) -> float:
    """The number that a text spells; NaN for anything else."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _threshold(spelling: str, text: str, earlier: float | None) -> float:
    number = _number(text)
    if math.isnan(number) or earlier is not None:
        raise BacoError(f"router {spelling!r}: give one number after the colon, such as P-Punc:0.4")
    return number


def _target(key: str, what: str, example: float) -> Callable[[str, str], float]:
    """What reads the share that a threshold holds from a spelling and the value in it."""

    def read(spelling: str, text: str) -> float:
        share = _number(text)
        if not 0 <= share <= 1:
            raise BacoError(
                f"router {spelling!r}: {key}={text}: give {what}, from 0 to 1, such as "
                f"{key}={example:g}"
            )
        return share

    return read


def _over(spelling: str, text: str) -> str:
    if text not in get_args(Over):
        raise BacoError(f"router {spelling!r}: over={text}: give answer or samples")
    return text


def _siblings(spelling: str, text: str) -> float:
    steps = _number(text)
    if not 0 <= steps <= 100:
        raise BacoError(
            f"router {spelling!r}: siblings={text}: give the steps along the rule's grid, from 0 "
            "to 100, such as siblings=1"
        )
    return steps


# The arguments that move a threshold, and what reads their values.
_ADAPT: dict[str, Callable[[str, str], Any]] = {
    "share": _target("share", "the base share to hold", 0.2),
    "distinct": _target("distinct", "the share of tokens that earlier samples do not have", 0.5),
    "siblings": _siblings,
    "over": _over,
}


def _adaptation(
    spelling: str, arguments: dict[str, Any], rule: LogitRule | None
) -> Adaptation | None:
    """What moves the threshold of a rule, by the arguments of a spelling; None where nothing."""
    for key, value in arguments.items():
        written = value if isinstance(value, str) else f"{value:g}"
        _check_adapts(spelling, f"{key}={written}", rule)
    if "share" in arguments and "distinct" in arguments:
        raise BacoError(
            f"router {spelling!r}: one threshold holds one target: give share= or distinct="
        )
    if "over" in arguments and not {"share", "distinct"} & arguments.keys():
        raise BacoError(
            f"router {spelling!r}: over={arguments['over']} says what a target is held over: give "
            "share= or distinct= with it, such as P-Punc:share=0.2,over=samples"
        )
    return Adaptation(**arguments) if arguments else None


def _check_adapts(spelling: str, argument: str, rule: LogitRule | None) -> None:
    if rule is None or not rule.threshold:
        raise BacoError(
            f"router {spelling!r}: {argument} adapts a threshold, and this router has none: "
            "use it with P, H or another rule that takes one, such as P-Punc:share=0.2"
        )
    if len(rule.grid) < 2:
        raise BacoError(
            f"router {spelling!r}: {argument} moves the threshold along the grid of the rule "
            f"{rule.name}, which names none: give it one, as in "
            "register_router(…, grid=(0, 0.5, 1))"
        )


def _check_threshold(spelling: str, gamma: float | None, rule: LogitRule) -> None:
    if gamma is None:
        raise BacoError(
            f"router {spelling!r} needs a threshold, such as "
            f"{router_name(spelling)}:{rule.example:g}"
        )
    if not rule.low <= gamma <= rule.high or math.isinf(gamma):
        low, high = rule.low, rule.high
        bounds = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        raise BacoError(f"router {spelling!r}: threshold {gamma:g}, expected a number {bounds}")
