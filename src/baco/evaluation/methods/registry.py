"""Methods by name, and the settings that a user's choice of them comes to."""

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from baco.errors import BacoError
from baco.evaluation.methods.ensemble import Ensemble
from baco.evaluation.methods.judge import Judge
from baco.evaluation.methods.mixing import Mixing
from baco.evaluation.methods.prompting import Paraphrase, Regeneration, SystemPrompt
from baco.evaluation.methods.protocol import Answer, Draw, Grid, Method
from baco.evaluation.methods.routed import Routed
from baco.evaluation.methods.single import Single
from baco.evaluation.methods.verbalized import Verbalized
from baco.evaluation.records import Prompt, Setting

if TYPE_CHECKING:
    from baco import Baco

_ROUTED = Routed()
METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
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
    )
}
GROUPS: Mapping[str, tuple[str, ...]] = {
    "all": tuple(name for name in METHODS if name != "judge"),
    "prompting": ("paraphrase", "regeneration", "verbalized", "system-prompt"),
}


def select_settings(
    methods: Sequence[str], routers: Sequence[str], grid: Grid, judge: Judge | None = None
) -> list[Setting]:
    """The settings of the methods and routers that a user names, each once, in design order.

    Args:
        methods: names of ``METHODS`` or ``GROUPS``; with no routers either, all.
        routers: spellings; one without its threshold is swept.
        grid: how many points.
        judge: where the judge is; it takes part by itself where that is said.

    Raises:
        BacoError: no such method or router.
    """
    names = [name for asked in methods for name in _named(asked)]
    if not methods and not routers:
        names = list(GROUPS["all"])
    if judge is not None:
        names.append("judge")
    found: list[Setting] = []
    for name in METHODS:
        if name == Routed.name and name not in names:
            found += [s for spelling in routers for s in _ROUTED.of(spelling, grid)]
        if name in names:
            method = judge if name == "judge" and judge is not None else METHODS[name]
            found += method.settings(grid)
            if name == Routed.name:
                found += [s for spelling in routers for s in _ROUTED.of(spelling, grid)]
    return list({(setting.method, setting.label): setting for setting in found}.values())


def _named(asked: str) -> tuple[str, ...]:
    if asked in GROUPS:
        return GROUPS[asked]
    if asked in METHODS:
        return (asked,)
    known = [*METHODS, *GROUPS]
    near = difflib.get_close_matches(asked, known, n=3, cutoff=0.5) or known
    raise BacoError(
        f"unknown method {asked!r}: use {', '.join(near)}; a single router is named by --router"
    )


def answer(
    baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
) -> list[list[Answer]]:
    """What the setting's method says: `draw.n` samples of every prompt."""
    rows = METHODS[setting.options["kind"]].answer(baco, setting, prompts, draw)
    assert all(len(row) == draw.n for row in rows), f"{setting.label} gave other than n samples"
    return rows
