"""The report's text: whether the best router beats its rivals, and how the run was made."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from baco.evaluation.indicators import Comparison
from baco.evaluation.inference import FEW_PROMPTS
from baco.evaluation.metrics import names
from baco.evaluation.report.ranking import ANY, Ranking
from baco.evaluation.report.results import Sections, outcome, reference
from baco.evaluation.report.tables import number, written
from baco.evaluation.store import Run

DEFINITIONS = (
    "A point is a setting's mean over prompts of one diversity and one quality metric; all metrics "
    "are oriented so that higher is better.",
    "Sub-space: one diversity with one quality metric. In each, both are min-max normalised over "
    "all points of all methods in the run, task by task.",
    "Coverage: the area that a method's own points dominate, with (0, 0) as reference.",
    "Coverage at k settings: the mean Coverage of all subsets of k of a method's settings, k being "
    "the fewest of any method with 5 or more; a union of more rectangles never gets smaller, so "
    "methods with unequal numbers of settings are compared at k. Normalised once, over all points.",
    "Best of k settings: likewise the mean, over all subsets of k settings, of the best setting's "
    "figure in a metric that holds diversity and quality at once.",
    "Dominance: a method's share of the points on the joint Pareto front of all methods.",
    "Lexical and semantic are means over their sub-spaces, overall is the mean of these two; over "
    "several tasks, the mean of the tasks.",
    "Intervals of Coverage: 95%, from 2000 bootstrap resamples of prompts, the same for all "
    "methods, the normalisation done anew in each; percentiles are expanded for the number of "
    "prompts.",
    "Intervals of Dominance: bounds that hold with 95% at least. They count which settings are "
    "surely on the front and which can be, from simultaneous bounds of all differences between "
    "settings; a bootstrap of a front is too narrow.",
    "p: two-sided, from the same resamples; below 20 prompts from all sign flips of the prompts' "
    "contributions, which cannot give less than 2 / 2^N with N prompts.",
    "Chosen on other prompts: the best router of each half of the prompts, tested on the other "
    "half.",
)
# The rivals of the paper's claim: base, aligned at every temperature and in any way, Nudging.
CLAIMED = ("base" + ANY, "aligned, temperature", "aligned" + ANY, "Nudging")


@dataclass(frozen=True, slots=True)
class Summary:
    """Whether the best router beats its rivals on one pair, in sentences.

    Attributes:
        pair: its name.
        first: the answer in a sentence.
        lines: one for each rival.
        notes: caveats.
        warning: of few prompts, if any.
    """

    pair: str
    first: str
    lines: Sequence[str]
    notes: Sequence[str]
    warning: str | None = None


def summarise(ranking: Ranking) -> Summary:
    """The summary of one pair."""
    best = ranking.best("BACo")
    missing = _missing(ranking)
    warning = _few_prompts(ranking)
    if best is None:
        first = "No router was run, so there is nothing to say of BACo."
        return Summary(ranking.pair, first, (), (missing,) if missing else ())
    if missing:
        return Summary(ranking.pair, missing, (), ())
    own = ranking.estimate("coverage", best, ranking.part)
    rivals = [rival for rival in ranking.rivals if ranking.compare(rival, ranking.part)]
    if own is None or not rivals:
        first = f"No rival was run beside {best}, the best router: nothing to compare it with."
        return Summary(ranking.pair, first, (), tuple(_notes(ranking, best, rivals)), warning)
    claimed = [rival for rival in CLAIMED if rival in rivals]
    won = [rival for rival in claimed if _beaten(ranking, rival)]
    fair = {r: _at_k(ranking, r) for r in claimed}
    compared = [r for r in claimed if fair[r] is not None]
    also = [r for r in compared if outcome(fair[r]) == "better"]
    score = f"{best}, the best router, has a Coverage ({ranking.part}) of {written(own, 'figure')}"
    if claimed and len(won) == len(claimed):
        answer = "Yes" if also == compared else "In part"
        first = f"{answer}. {score} and beats {_quoted(claimed)}."
    elif won:
        rest = [rival for rival in claimed if rival not in won]
        first = f"In part. {score}; it beats {_quoted(won)}, but not {_quoted(rest)}."
    elif claimed:
        first = f"No. {score}, and beats none of {_quoted(claimed)}."
    else:
        first = f"{score}; base, aligned and Nudging were not run."
    fair_own = ranking.estimate("coverage_at_k", best, ranking.part)
    if fair_own is not None and compared:
        rest = [rival for rival in compared if rival not in also]
        beaten = f"beats {_quoted(also)}" if also else "beats none of them"
        but = f", but not {_quoted(rest)}" if also and rest else ""
        first += (
            f" At {ranking.k} settings of each method its Coverage is "
            f"{written(fair_own, 'figure')} and {beaten}{but}."
        )
    lines = [_line(ranking, rival) for rival in rivals]
    return Summary(ranking.pair, first, lines, tuple(_notes(ranking, best, rivals)), warning)


def _beaten(ranking: Ranking, rival: str) -> bool:
    """Whether the best router is better, and stays so where it was chosen on other prompts."""
    if outcome(ranking.compare(rival, ranking.part)) != "better":
        return False
    tested = ranking.tested_on_unseen_prompts(rival)
    return tested is None or outcome(tested) == "better"


def _few_prompts(ranking: Ranking) -> str | None:
    """A warning below 20 prompts, where intervals and p-values say little."""
    count = ranking.prompts
    if count >= FEW_PROMPTS:
        return None
    least = 2.0 / 2**count
    return (
        f"Only {count} prompts: intervals are rough, and no p-value can be below {least:.3g}. Use "
        f"{FEW_PROMPTS} prompts or more."
    )


def _at_k(ranking: Ranking, rival: str) -> Comparison | None:
    return ranking.compare(rival, ranking.part, indicator="coverage_at_k")


def _line(ranking: Ranking, rival: str) -> str:
    lead = ranking.compare(rival, ranking.part)
    other = ranking.estimate("coverage", rival, ranking.part)
    assert lead is not None
    assert other is not None
    parts = [
        f"{part} {number(lead_in_part.difference, 'signed')}"
        for part in ("lexical", "semantic")
        if part != ranking.part and (lead_in_part := ranking.compare(rival, part)) is not None
    ]
    split = f" ({', '.join(parts)})" if parts else ""
    fair = _at_k(ranking, rival)
    at_k = f"; at {ranking.k} settings each {_difference(fair)}" if fair is not None else ""
    return f"against {rival} ({number(other.value, 'figure')}): {_difference(lead)}{split}{at_k}."


def _difference(lead: Comparison) -> str:
    words = {"better": "better", "worse": "worse", "open": "no difference is shown"}
    low, high = number(lead.low, "signed"), number(lead.high, "signed")
    by = f"{number(lead.difference, 'signed')} [{low}, {high}]"
    return f"{by}, p {_p(lead.p_value)}, {words[outcome(lead)]}"


def _missing(ranking: Ranking) -> str | None:
    """The reason why there is no Coverage at all, if there is none."""
    if ranking.alone.spaces:
        return None
    return (
        "There is no Coverage: no diversity metric together with a quality metric has scores on "
        "every task; 'baco score RUN' adds metrics."
    )


def _notes(ranking: Ranking, best: str, rivals: Sequence[str]) -> Iterator[str]:
    warning = _few_prompts(ranking)
    if warning is not None:
        yield warning
    ahead = [name for name in ranking.ranked() if ranking.coverage(name) > ranking.coverage(best)]
    if ahead:
        yield f"Ahead of every router: {_quoted(ahead)}."
    if _is_coin(best):
        yield from _beside_the_coin(ranking, best, rivals)
    pooled = [rival for rival in rivals if rival in ranking.pooled.methods]
    unseen = {rival: ranking.tested_on_unseen_prompts(rival) for rival in pooled}
    if any(unseen.values()):
        listed = "; ".join(
            f"{rival} {_difference(lead)}" for rival, lead in unseen.items() if lead is not None
        )
        yield (
            "The best of many routers looks a little better than it is. Chosen on one half of the "
            f"prompts and tested on the other half, and the other way round, it leads: {listed}."
        )


def _is_coin(router: str) -> bool:
    return "Rand" in router.partition(",")[0].split("-")


def _beside_the_coin(ranking: Ranking, best: str, rivals: Sequence[str]) -> Iterator[str]:
    """A note that the best router is a coin, with the best one that reads the models."""
    looking = next((name for name in _covering(ranking) if not _is_coin(name)), None)
    note = f"{best} tosses a coin: it looks at neither model."
    if looking is None:
        yield note
        return
    score = number(ranking.coverage(looking), "figure")
    leads = [
        f"against {rival} {_difference(lead)}"
        for rival in rivals
        if rival in CLAIMED and (lead := ranking.compare(rival, ranking.part, looking))
    ]
    yield f"{note} The best that looks is {looking}, {score}: {'; '.join(leads)}."


def _covering(ranking: Ranking) -> list[str]:
    """The routers that have a Coverage, the best first."""
    ranked = ranking.ranked("BACo")
    return [name for name in ranked if ranking.estimate("coverage", name, ranking.part)]


def order_of_routers(ranking: Ranking) -> list[str]:
    """The order of the routers, and how much of it is the paper's."""
    ranked = _covering(ranking)
    if not ranked:
        return []
    order = ", ".join(f"{name} {number(ranking.coverage(name), 'figure')}" for name in ranked)
    lines = [f"On {ranking.pair}, in order of Coverage ({ranking.part}): {order}."]
    paper = reference("routers").figures
    both = [name for name in ranked if name in paper]
    pairs = list(combinations(both, 2))
    if pairs:
        overall = {name: paper[name].coverage.get("overall", 0.0) for name in both}
        alike = sum(overall[a] > overall[b] for a, b in pairs)
        theirs = sorted(both, key=lambda name: -overall[name])
        lines.append(
            f"The paper's order of these on NoveltyBench is {', '.join(theirs)}: {alike} of the "
            f"{len(pairs)} pairs of routers stand the same way round here."
        )
    return lines


def _p(value: float) -> str:
    text = number(value, "p")
    return text if text.startswith("<") else f"= {text}"


def _quoted(names: Sequence[str]) -> str:
    return _listed([f"“{name}”" if "," in name else name for name in names])


def content(
    run: Run, rankings: Sequence[Ranking], tables: Sections, summaries: Sequence[Summary]
) -> dict[str, Any]:
    """The text and tables of the page and of Markdown, by the names of the page's template."""
    first = rankings[0]
    n, prompts = run.config["n"], sum(len(task.prompts) for task in first.scores)
    pairs = _listed([ranking.pair for ranking in rankings])
    names = _listed([task.task for task in first.scores])
    verified = _listed([task.task for task in first.verified])
    settings = max(len(task.keys) for task in first.scores)
    lead = (
        f"{len(first.families)} methods at {settings} settings on {names}: {prompts} "
        f"prompts × {n} samples each."
    )
    if verified:
        lead += f" Accuracy on {verified}, which is kept out of Coverage."
    return {
        "title": f"BACo evaluation: {pairs}",
        "lead": lead,
        "summaries": summaries,
        "ranking": [line for ranking in rankings for line in order_of_routers(ranking)],
        "headline": tables.headline,
        "acceptable": tables.acceptable,
        "routers": tables.routers,
        "methods": tables.methods,
        "parts": tables.parts,
        "accuracy": tables.accuracy,
        "points": tables.points,
        "prompts_said": f"the {prompts} prompts" if len(first.scores) == 1 else "a task's prompts",
        "samples_said": "Methods that mix the models' distributions have no source to show.",
        "command": _command(run),
        "facts": _facts(run, rankings),
        "definitions": DEFINITIONS,
        "left_out": _left_out(run, rankings),
        "configuration": json.dumps(run.config, indent=2, ensure_ascii=False),
    }


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def _command(run: Run) -> str:
    """The commands that made run and report; a run begun from Python has only a configuration."""
    typed = run.config["made"].get("command") or "# begun from Python; its configuration is below"
    return f"{typed}\n{shlex.join(['baco', 'report', str(run.path)])}"


def _facts(run: Run, rankings: Sequence[Ranking]) -> list[tuple[str, str]]:
    """The settings that samples and scores depend on, and versions and machine."""
    config, provenance = run.config, run.config["made"]
    sampling = ", ".join(f"{name} {value}" for name, value in config["sampling"].items())
    versions = ", ".join(
        f"{name} {provenance[name]}"
        for name in ("baco", "python", "torch", "transformers", "numpy")
        if name in provenance
    )
    facts = [
        ("pairs", ", ".join(ranking.pair for ranking in rankings)),
        ("tasks", ", ".join(f"{t['name']} ({t['prompts']} prompts)" for t in config["tasks"])),
        ("samples per prompt", str(config["n"])),
        ("decoding seed", str(config["seed"])),
        ("sampling, unless a setting says otherwise", sampling or "the pair's own"),
        ("metrics", ", ".join(_metrics(run))),
        ("versions", versions),
        ("git revision", str(provenance.get("git") or "not from a checkout")),
        ("machine", str(provenance.get("machine", ""))),
    ]
    return [(name, value) for name, value in facts if value]


def _metrics(run: Run) -> list[str]:
    known = run.metrics()
    return [name for name in names() if name in known] + [n for n in known if n not in names()]


def _left_out(run: Run, rankings: Sequence[Ranking]) -> list[tuple[str, str]]:
    """Metrics and settings that are in no figure, and why."""
    reasons = list(run.unavailable().items())
    for ranking in rankings:
        for task in ranking.every:
            where = f"{ranking.pair}, {task.task}"
            reasons += [
                (name, f"not scored on {where}, so its sub-spaces are left out there")
                for name in names()
                if name in run.metrics() and name not in task.measured.metrics
            ]
            if task.missing:
                listed = ", ".join(task.missing)
                reasons.append((where, f"not complete yet, left out whole: {listed}"))
    return reasons


def markdown(content: Mapping[str, Any], tables: Sections, stems: Sequence[str]) -> str:
    """The report as Markdown: the text of `content`, every table, links to the plots."""
    return "\n".join(_lines(content, tables, stems)) + "\n"


def _lines(content: Mapping[str, Any], tables: Sections, stems: Sequence[str]) -> Iterator[str]:
    yield f"# {content['title']}\n\n{content['lead']}\n"
    yield "## Does BACo beat its own two models?\n"
    for summary in content["summaries"]:
        yield f"**{summary.pair}.** {summary.first}\n"
        yield from (f"- {line}" for line in summary.lines)
        yield "\n" + "\n\n".join(summary.notes) + "\n"
    yield from (table.markdown() for table in tables.headline)
    if content["acceptable"]:
        yield "## Diversity among acceptable answers\n"
        yield from (table.markdown() for table in tables.acceptable)
    yield "## Plots\n"
    yield from (f"![{stem}](plots/{stem}.svg)\n" for stem in stems)
    if content["ranking"]:
        yield "## Which router?\n"
    yield from (f"{line}\n" for line in content["ranking"])
    yield from (table.markdown() for table in tables.routers)
    rest = {
        "Every method": [table for _, of_pair in tables.methods for table in of_pair],
        "Tasks and categories": tables.parts,
        "Accuracy, where answers can be verified": tables.accuracy,
        "Operating points": tables.points,
    }
    for title, section in rest.items():
        if section:
            yield f"## {title}\n"
            yield from (table.markdown() for table in section)
    for added in content["added"]:
        yield f"## {added.title}\n"
        yield from (f"{paragraph}\n" for paragraph in added.paragraphs)
        yield from (table.markdown() for table in added.tables)
    yield f"## How it was made\n\n```sh\n{content['command']}\n```\n"
    yield from (f"- {name}: {value}" for name, value in content["facts"])
    yield "\n### Definitions\n"
    yield from (f"- {line}" for line in content["definitions"])
    if content["left_out"]:
        yield "\n### Left out, and why\n"
        yield from (f"- {name}: {why}" for name, why in content["left_out"])
