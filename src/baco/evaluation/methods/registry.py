"""Methods by name, and the settings of the methods and routers that a user names."""

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from baco.errors import BacoError
from baco.evaluation.methods.answer_file import AnswersOfFile
from baco.evaluation.methods.contrastive import Contrastive
from baco.evaluation.methods.ensemble import Ensemble
from baco.evaluation.methods.judge import Judge
from baco.evaluation.methods.method import FAMILIES, Answer, Draw, Grid, Method
from baco.evaluation.methods.mixing import Mixing
from baco.evaluation.methods.nudging import AuthorsNudging
from baco.evaluation.methods.prompting import Paraphrase, Regeneration, SystemPrompt
from baco.evaluation.methods.routed import Routed
from baco.evaluation.methods.single import Single
from baco.evaluation.methods.string_seed import StringSeed
from baco.evaluation.methods.truncation import Truncation
from baco.evaluation.methods.unformatted import Unformatted
from baco.evaluation.methods.verbalized import Verbalized
from baco.evaluation.methods.verbalized_forms import (
    VerbalizedReasoning,
    VerbalizedTail,
    VerbalizedTurns,
)
from baco.evaluation.records import Prompt, Setting
from baco.plugins import plugins
from baco.routing.parser import router as parse
from baco.routing.two_vocabularies import reads_one_model

if TYPE_CHECKING:
    from baco.api import Baco

MethodT = TypeVar("MethodT", bound=Method)
_METHODS: dict[str, Method] = {}


def register_method(method: MethodT) -> MethodT:
    """Register a method under its name.

    Raises:
        BacoError: a name that is taken, or an unknown family.
    """
    if method.name in _METHODS or method.name == ALL:
        raise BacoError(f"method name {method.name!r} is taken: choose another")
    if method.family not in FAMILIES:
        raise BacoError(
            f"method {method.name!r} is of family {method.family!r}: use one of "
            f"{', '.join(FAMILIES)}"
        )
    _METHODS[method.name] = method
    return method


ALL = "all"
JUDGE = "judge"  # takes part only where a judge is given
# Methods published after the paper; they are not among 'all'.
RIVALS = (
    "truncation",
    "contrastive",
    "plain-prompt",
    "minimal-prompt",
    "string-seed",
    "verbalized-tail",
    "verbalized-cot",
    "verbalized-multi",
    "nudging-authors",
)
_ROUTED = Routed()
_FILES = AnswersOfFile()  # named by a file, so it is in no list
for _method in (
    Single("base"),
    Single("aligned"),
    _ROUTED,
    Mixing(),
    Ensemble(),
    Paraphrase(),
    Regeneration(),
    Verbalized(),
    SystemPrompt(),
    Judge(),
    Truncation(),
    Contrastive(),
    Unformatted("plain"),
    Unformatted("minimal"),
    StringSeed(),
    VerbalizedTail(),
    VerbalizedReasoning(),
    VerbalizedTurns(),
    AuthorsNudging(),
):
    register_method(_method)


def methods() -> Mapping[str, Method]:
    """Every method by its name; those of installed packages and the user's own included.

    Raises:
        BacoError: an installed package's method cannot be loaded.
    """
    for name, part in plugins("methods").items():
        if name not in _METHODS:
            method = part() if isinstance(part, type) else part
            if method.name != name:
                raise BacoError(
                    f"entry point {name!r} in baco.methods is a method of name {method.name!r}: "
                    "give both one name"
                )
            register_method(method)
    return _METHODS


def groups() -> Mapping[str, tuple[str, ...]]:
    """Names that stand for several methods."""
    families: dict[str, list[str]] = {}
    for name, method in methods().items():
        families.setdefault(method.family, []).append(name)
    every = tuple(name for name in methods() if name != JUDGE and name not in RIVALS)
    prompting = tuple(name for name in families["prompting"] if name not in RIVALS)
    return {ALL: every, "prompting": prompting, "rivals": RIVALS}


def select_settings(
    names: Sequence[str], routers: Sequence[str], grid: Grid, judge: Judge | None = None
) -> list[Setting]:
    """The settings of the methods and routers that a user names, each once, in a fixed order.

    Args:
        names: methods, groups of them, or files of answers; without names and routers, all methods.
        routers: spellings; one without its threshold is swept.
        grid: its size.
        judge: the external judge; it takes part where it is given.

    Raises:
        BacoError: no such method or router.
    """
    files = [name for name in names if _FILES.names(name)]
    chosen = [method for name in names if name not in files for method in _named(name)]
    if not names and not routers:
        chosen = list(groups()[ALL])
    if judge is not None:
        chosen.append(JUDGE)
    settings: list[Setting] = []
    for name, method in methods().items():
        if name in chosen:
            settings += (judge if name == JUDGE and judge is not None else method).settings(grid)
        if name == Routed.name:
            settings += [s for spelling in routers for s in _ROUTED.of(spelling, grid)]
    for name in dict.fromkeys(files):
        setting = _FILES.setting(name)
        if any(known.method == setting.method for known in settings):
            raise BacoError(f"{name}: another method is named {setting.method!r}; rename the file")
        settings.append(setting)
    return list({(setting.method, setting.label): setting for setting in settings}.values())


def _named(name: str) -> tuple[str, ...]:
    if name in groups():
        return groups()[name]
    if name in methods():
        return (name,)
    known = [*methods(), *groups()]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
    raise BacoError(
        f"unknown method {name!r}: use {', '.join(near)}; a single router is named by --router"
    )


def needs_one_tokenizer(setting: Setting) -> bool:
    """Whether a setting cannot be run on a pair with different tokenizers, since it compares or
    mixes the two models' distributions.
    """
    kind = setting.options["kind"]
    if kind == Routed.name:
        return not reads_one_model(parse(setting.options["router"]))
    return kind != _FILES.name and getattr(methods()[kind], "needs_one_tokenizer", False)


def answer(
    baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
) -> list[list[Answer]]:
    """`draw.n` samples of every prompt, by the setting's method."""
    kind = setting.options["kind"]
    method = _FILES if kind == _FILES.name else methods()[kind]
    rows = method.answer(baco, setting, prompts, draw)
    assert all(len(row) == draw.n for row in rows), f"{setting.label} gave other than n samples"
    return rows
