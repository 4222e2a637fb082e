"""Presets of `baco sweep`: named sizes of its grid, and the paper's whole evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

from baco.errors import BacoError
from baco.evaluation.methods.method import Preset as Size


@dataclass(frozen=True, slots=True)
class Preset:
    """What a sweep runs where the user names nothing else.

    Attributes:
        size: of the methods' grids.
        pairs, tasks: names, one of each at least.
        methods, routers: names; none of both for all methods.
    """

    size: Size
    pairs: tuple[str, ...] = ("demo",)
    tasks: tuple[str, ...] = ("demo",)
    methods: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()

    def tasks_with(self, named: Sequence[str] | None) -> list[str]:
        """The tasks, those that a user names in their place.

        A ``NAME=PLACE`` of a task of the preset says where its rows are, and leaves the others.
        """
        places = dict(spelling.split("=", 1) for spelling in named or () if "=" in spelling)
        if named and len(places) == len(named) and places.keys() <= set(self.tasks):
            return [f"{task}={places[task]}" if task in places else task for task in self.tasks]
        return list(named or self.tasks)


PRESETS = {
    "full": Preset("full"),
    "quick": Preset("quick"),
    # arXiv 2511.05650, section 5. Its thresholds, temperatures and prompts are not published, so
    # those of the full grid stand for them. Judge routing takes part where a judge is named.
    "paper": Preset(
        "full",
        ("llama-3-8b", "olmo-2-7b"),
        ("noveltybench-curated", "wildchat", "narrative-discourse"),
        ("base", "aligned", "prompting", "ensemble"),
        ("Nudging", "Rand", "P", "FC", "P-Punc", "H-Punc", "P-FC"),
    ),
}


def preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        BacoError: there is none.
    """
    if name not in PRESETS:
        *others, last = PRESETS
        raise BacoError(f"preset is {name!r}: use {', '.join(others)} or {last}")
    return PRESETS[name]
