"""Which items a rater sees, in which order and on which side. A function of the plan and a number.

Prompts are crossed with raters: every rater judges every prompt, one pair of methods on it as sets
and one as single answers. If the plan gives a rater fewer prompts, groups of as many raters as
there are pairs share theirs, and the next group has the prompts that follow. The pairs rotate over
prompts and raters like the rows of a Latin square, so that each rater sees all pairs equally often,
and each prompt has all pairs equally often over the raters: a balanced incomplete block design with
blocks of two methods. Left and right alternate within a rater for each pair, and the next rater
with the same pairs sees them the other way round. Whether sets or single answers come first
alternates between raters.

Orders come from SHA-256 of seed, number and id, so that they are the same on all machines.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

from baco.study.plan import Item, Plan, Unit

UNITS: tuple[Unit, Unit] = ("set", "answer")


@dataclass(frozen=True, slots=True)
class Screen:
    """One item as one rater sees it.

    Attributes:
        position: in the rater's schedule, from 0; training items have -1, -2, … with the last one
            first.
        block: of the screens between two pauses, from 0; -1 for training.
        item: what is judged.
        swapped: whether the item's second stimulus is left.
    """

    position: int
    block: int
    item: Item
    swapped: bool

    @property
    def left(self) -> str:
        """Id of the left stimulus."""
        return self.item.second if self.swapped else self.item.first

    @property
    def right(self) -> str:
        """Id of the right stimulus."""
        return self.item.first if self.swapped else self.item.second


def method_pairs(plan: Plan) -> list[tuple[str, str]]:
    """All pairs of methods, in the plan's order."""
    return list(combinations(plan.methods, 2))


def schedule(plan: Plan, number: int) -> list[Screen]:
    """The screens of a rater, without the training.

    Args:
        plan: of the study.
        number: of the rater, from 0.
    """
    pairs = len(method_pairs(plan))
    # A second term lets every order of units meet both orders of sides.
    answers_first = (number // pairs // 2 + number) % 2
    screens: list[Screen] = []
    for unit in UNITS[::-1] if answers_first else UNITS:
        placed = _comparisons(plan, unit, number)
        checks = [item for item in plan.items if item.kind == "check" and item.unit == unit]
        for item in sorted(checks, key=lambda item: _mark(plan.seed, number, item.id)):
            swapped = _mark(plan.seed, number, "side", item.id) % 2 == 1
            # Not the first of a unit, which shows raters what its items look like.
            place = 1 + _mark(plan.seed, number, "place", item.id) % max(1, len(placed))
            placed.insert(place, (item, swapped))
        first_block = screens[-1].block + 1 if screens else 0
        sizes = _block_sizes(len(placed), plan.block)
        blocks = [block for block, size in enumerate(sizes) for _ in range(size)]
        for (item, swapped), block in zip(placed, blocks, strict=True):
            screens.append(Screen(len(screens), first_block + block, item, swapped))
    return screens


def training(plan: Plan) -> list[Screen]:
    """The training screens, the same for every rater."""
    items = [item for item in plan.items if item.kind == "training"]
    return [
        Screen(index - len(items), -1, item, _mark(plan.seed, "training", item.id) % 2 == 1)
        for index, item in enumerate(items)
    ]


def _comparisons(plan: Plan, unit: Unit, number: int) -> list[tuple[Item, bool]]:
    """A rater's comparisons of one unit, in random order, each with whether it is swapped."""
    pairs = method_pairs(plan)
    by_prompt: dict[str, dict[tuple[str, str], Item]] = {}
    for item in plan.items:
        if item.kind == "comparison" and item.unit == unit:
            methods = (plan.stimulus[item.first].method, plan.stimulus[item.second].method)
            by_prompt.setdefault(item.prompt, {})[methods] = item
    prompts = sorted(by_prompt, key=lambda prompt: _mark(plan.seed, unit, prompt))
    here = min(plan.prompts_per_rater or len(prompts), len(prompts))
    first = number // len(pairs) * here  # of this group of raters, counted over all groups
    placed: list[tuple[Item, bool]] = []
    for count in range(first, first + here):
        turn, place = divmod(count, len(prompts))
        # Not the pair that the rater judges on this prompt in the other unit.
        pair = (place + number + UNITS.index(unit)) % len(pairs)
        swapped = (place // len(pairs) + turn + pair) % 2 == 1
        placed.append((by_prompt[prompts[place]][pairs[pair]], swapped))
    return sorted(placed, key=lambda entry: _mark(plan.seed, number, entry[0].id))


def _block_sizes(screens: int, most: int) -> list[int]:
    """Sizes of blocks that differ by at most one."""
    blocks = -(-screens // most)
    return [screens // blocks + (block < screens % blocks) for block in range(blocks)]


def _mark(*parts: object) -> int:
    """A pseudorandom number that depends on these parts alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8])


def texts_shown(plan: Plan) -> Iterable[str]:
    """SHA-256 of every text that a rater may see."""
    yield from (prompt.text for prompt in plan.prompts)
    for stimulus in plan.stimuli:
        yield from stimulus.texts
