"""Which family a method belongs to, and how it looks in every plot.

The paper's headline table has one row a family. Base and aligned have the project's two colours
(Okabe and Ito 2008, safe for colour-blind readers); no method is known by its colour alone:
members of a family differ in shape, and every curve is in a table too.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from baco.evaluation.methods import methods
from baco.evaluation.methods.method import Family

TITLES: dict[Family, str] = {
    "base": "base alone",
    "aligned": "aligned alone",
    "Nudging": "Nudging",
    "prompting": "prompting",
    "ensemble": "ensemble",
    "mixing": "mixing whole answers",
    "BACo": "BACo",
    "other": "other methods",
}

# On white paper and on a dark screen: the same hues, lighter where the ground is dark.
LIGHT: dict[Family, str] = {
    "base": "#D55E00",
    "aligned": "#0072B2",
    "Nudging": "#B0508A",
    "prompting": "#7A5CB8",
    "ensemble": "#7F6A3F",
    "mixing": "#B88700",
    "BACo": "#00825E",
    "other": "#5A6470",
}
DARK: dict[Family, str] = {
    "base": "#F28A3C",
    "aligned": "#56A9DE",
    "Nudging": "#E08CC0",
    "prompting": "#B49BE8",
    "ensemble": "#BFA878",
    "mixing": "#E8BF4A",
    "BACo": "#35C79B",
    "other": "#A9B4C0",
}
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")


@dataclass(frozen=True, slots=True)
class Look:
    """A method's family, its colour on light and on dark ground, and its shape."""

    family: Family
    light: str
    dark: str
    shape: str


def family(method: str, kind: str) -> Family:
    """The family of a run's method, made by a method of name ``kind`` (`baco.evaluation.methods`).

    Nudging is a rule for picking the source like any other, and a family of its own: it is a rival.
    A method of a package that is no longer installed is an ``other``.
    """
    if method == "Nudging":
        return "Nudging"
    known = methods().get(kind)
    return known.family if known is not None else "other"


def looks(families: Mapping[str, Family]) -> dict[str, Look]:
    """A look for every method, from the methods' families; members of one differ in shape."""
    seen: dict[Family, int] = {}
    found = {}
    for method, its in families.items():
        place = seen[its] = seen.get(its, -1) + 1
        found[method] = Look(its, LIGHT[its], DARK[its], SHAPES[place % len(SHAPES)])
    return found
