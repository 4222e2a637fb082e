"""The plain statement: does the best router beat its halves and Nudging, and by how much?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from baco.evaluation.indicators import Comparison
from baco.evaluation.report.paper import reference
from baco.evaluation.report.ranking import ANY, Standing
from baco.evaluation.report.tables import number, written

# The claim of the paper, in order: its own halves, the aligned one at every temperature, Nudging.
CLAIMED = ("base" + ANY, "aligned, temperature", "aligned" + ANY, "Nudging")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a run says about one pair.

    Attributes:
        pair: its name.
        first: the answer in a sentence.
        lines: one a rival.
        notes: what to keep in mind.
    """

    pair: str
    first: str
    lines: Sequence[str]
    notes: Sequence[str]


def verdict(standing: Standing) -> Verdict:
    """The statement for one pair, in sentences."""
    best = standing.best("BACo")
    missing = _missing(standing)
    if best is None:
        first = "No router was run, so there is nothing to say of BACo."
        return Verdict(standing.pair, first, (), (missing,) if missing else ())
    if missing:
        return Verdict(standing.pair, missing, (), ())
    own = standing.estimate("coverage", best, standing.part)
    rivals = [rival for rival in standing.rivals if standing.compare(rival, standing.part)]
    if own is None or not rivals:
        first = f"No rival was run beside {best}, the best router: nothing to compare it with."
        return Verdict(standing.pair, first, (), tuple(_notes(standing, best, rivals)))
    told = {rival: standing.compare(rival, standing.part) for rival in rivals}
    asked = [rival for rival in CLAIMED if rival in told]
    won = [rival for rival in asked if _outcome(told[rival]) == "beats"]
    score = f"{best}, the best router, has a Coverage ({standing.part}) of {written(own, 'figure')}"
    if asked and len(won) == len(asked):
        first = f"Yes. {score} and beats {_listed(asked)}."
    elif won:
        rest = [rival for rival in asked if rival not in won]
        first = f"In part. {score}; it beats {_listed(won)}, but not {_listed(rest)}."
    elif asked:
        first = f"No. {score}, and beats none of {_listed(asked)}."
    else:
        first = f"{score}; base, aligned and Nudging were not run."
    lines = [_line(standing, rival) for rival in rivals]
    return Verdict(standing.pair, first, lines, tuple(_notes(standing, best, rivals)))


def _line(standing: Standing, rival: str) -> str:
    found = standing.compare(rival, standing.part)
    other = standing.estimate("coverage", rival, standing.part)
    assert found is not None
    assert other is not None
    parts = [
        f"{part} {number(one.difference, 'signed')}"
        for part in ("lexical", "semantic")
        if part != standing.part and (one := standing.compare(rival, part)) is not None
    ]
    split = f" ({', '.join(parts)})" if parts else ""
    return f"against {rival} ({number(other.value, 'figure')}): {_difference(found)}{split}."


def _difference(found: Comparison) -> str:
    outcome = {"beats": "better", "loses": "worse", "open": "no difference can be told"}
    low, high = number(found.low, "signed"), number(found.high, "signed")
    by = f"{number(found.difference, 'signed')} [{low}, {high}]"
    return f"{by}, p {_p(found.p_value)}, {outcome[_outcome(found)]}"


def _missing(standing: Standing) -> str | None:
    """Why there is no Coverage at all, where that is so."""
    if standing.alone.spaces:
        return None
    return (
        "No Coverage can be told: no diversity metric together with a quality metric has scores on "
        "every task; 'baco score RUN' adds metrics."
    )


def _notes(standing: Standing, best: str, rivals: Sequence[str]) -> Iterator[str]:
    ahead = [
        name for name in standing.ranked() if standing.coverage(name) > standing.coverage(best)
    ]
    if ahead:
        yield f"Ahead of every router: {_listed(ahead)}."
    if _is_coin(best):
        yield from _beside_the_coin(standing, best, rivals)
    pooled = [rival for rival in rivals if rival in standing.pooled.methods]
    unseen = {rival: standing.on_unseen_prompts(rival) for rival in pooled}
    if any(unseen.values()):
        told = "; ".join(
            f"{rival} {' and '.join(number(lead, 'signed') for lead in leads)}"
            for rival, leads in unseen.items()
            if leads
        )
        yield (
            "The best of many routers looks a little better than it is. Chosen on one half of the "
            f"prompts and measured on the other half, and the other way round, it leads: {told}."
        )


def _is_coin(router: str) -> bool:
    return "Rand" in router.split("-")


def _beside_the_coin(standing: Standing, best: str, rivals: Sequence[str]) -> Iterator[str]:
    """That the best router is a coin, and how the best one that looks at the models fares."""
    looking = next((name for name in standing.ranked("BACo") if not _is_coin(name)), None)
    told = f"{best} tosses a coin: it looks at neither model."
    if looking is None:
        yield told
        return
    score = number(standing.coverage(looking), "figure")
    leads = [
        f"against {rival} {_difference(found)}"
        for rival in rivals
        if rival in CLAIMED and (found := standing.compare(rival, standing.part, looking))
    ]
    yield f"{told} The best that looks is {looking}, {score}: {'; '.join(leads)}."


def ranking(standing: Standing) -> list[str]:
    """How the routers rank, and how far that is the paper's order."""
    ranked = standing.ranked("BACo")
    if not ranked:
        return []
    order = ", ".join(f"{name} {number(standing.coverage(name), 'figure')}" for name in ranked)
    lines = [f"On {standing.pair}, in order of Coverage ({standing.part}): {order}."]
    paper = reference("routers").figures
    both = [name for name in ranked if name in paper]
    pairs = list(combinations(both, 2))
    if pairs:
        alike = sum((paper[a].coverage or 0) > (paper[b].coverage or 0) for a, b in pairs)
        theirs = sorted(both, key=lambda name: -(paper[name].coverage or 0))
        lines.append(
            f"The paper's order of these on NoveltyBench is {', '.join(theirs)}: {alike} of the "
            f"{len(pairs)} pairs of routers stand the same way round here."
        )
    return lines


def _outcome(found: Comparison | None) -> str:
    if found is None or found.low <= 0 <= found.high:
        return "open"
    return "beats" if found.low > 0 else "loses"


def _p(value: float) -> str:
    told = number(value, "p")
    return told if told.startswith("<") else f"= {told}"


def _listed(names: Sequence[str]) -> str:
    quoted = [f"“{name}”" if "," in name else name for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
