"""Error rates, coverage and power of a human evaluation, from simulated studies.

    python -m benchmarks.study [--studies 300] [--only coverage errors …] [--plan FOLDER]

Whole studies are simulated from a plan whose answers were made once: schedules, answers, attention
checks, exclusions and the planned analysis. Seeds are fixed, so two runs print the same figures.
Prints Markdown tables; the figures in docs/study-analysis.md come from here. Four minutes on one
core.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import krippendorff
import numpy as np

from baco.evaluation.indicators import Floats
from baco.study.analysis import ContrastResult, planned_contrasts
from baco.study.clustering import Clusters, bootstrap_interval, mean
from baco.study.comparisons import comparisons
from baco.study.exclusions import exclude
from baco.study.inter_rater import agreement, krippendorff_alpha
from baco.study.plan import Plan, read_plan
from baco.study.power import StudySimulator, contrast_p_values, planned_power
from baco.study.schedule import schedule
from baco.study.simulation import Layout, Population, balanced_layout, draw, simulated_answers
from baco.study.store import Judgment, as_judgments
from benchmarks import launch

NULL = Population(effect=0.5)
SPREADS = ((0.0, 0.0), (0.6, 1.5), (1.2, 0.5))


def table(heads: Sequence[str], rows: Iterator[Sequence[object]]) -> None:
    """Print rows as a Markdown table, each when it is ready."""
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)
    print()


def values_of(
    layout: Layout,
    population: Population,
    difference: float,
    studies: int,
    seed: int,
    form: str = "preference",
) -> Floats:
    """Treatment minus control of every judgment, [studies, N]."""
    drawn = draw(
        layout, np.array([difference, 0.0]), form, population,  # type: ignore[arg-type]
        np.random.default_rng(seed), studies,
    )  # fmt: skip
    return np.where(layout.left == 0, drawn.difference, -drawn.difference)


def coverage(_: Plan, studies: int) -> None:
    """How often intervals of 95% contain the true win rate, by kind of interval."""
    designs = [(4, 1), (6, 1), (4, 3), (6, 3), (12, 3), (24, 3), (42, 3)]

    def rows() -> Iterator[Sequence[object]]:
        for raters, pairs in designs:
            for rater_spread, prompt_spread in SPREADS:
                population = Population(0.65, rater_spread, prompt_spread)
                layout = balanced_layout(raters, 39, pairs)
                values = values_of(layout, population, population.difference(), 4 * studies, raters)
                clusters = Clusters(layout.rater, layout.prompt)
                every = np.arange(values.shape[1])
                drawn = np.array(
                    [
                        bootstrap_interval(row, clusters, 400, seed)
                        for seed, row in enumerate(values)
                    ]
                ).T
                true = population.effect - 0.5
                shares = [
                    f"{np.mean((low <= true) & (true <= high)):.1%} ({np.mean(high - low):.2f})"
                    for low, high in (
                        mean(values, clusters).interval(),
                        drawn,
                        mean(values, Clusters(every, every)).interval(),
                    )
                ]
                yield raters, 39 // pairs, f"{rater_spread:g}, {prompt_spread:g}", *shares

    print(f"### Coverage of 95% intervals in {4 * studies} studies, and their mean width\n")
    heads = ("raters", "judgments of each", "spread of raters, prompts")
    table((*heads, "clustered t", "two-way bootstrap", "no clusters"), rows())


def of_contrasts(plan: Plan) -> Plan:
    """The plan with the questions of its contrasts alone, and without bootstrap: twice as fast."""
    asked = {contrast.question for contrast in plan.contrasts}
    questions = tuple(question for question in plan.questions if question.id in asked)
    analysis = dataclasses.replace(plan.analysis, resamples=1)
    return dataclasses.replace(plan, questions=questions, analysis=analysis)


def whole_studies(
    plan: Plan,
    population: Population,
    studies: int,
    change: Callable[[Judgment], Judgment] | None = None,
) -> Iterator[tuple[list[ContrastResult], list[Judgment], set[str]]]:
    """Analysed studies: planned contrasts, all judgments, excluded raters."""
    schedules = [schedule(plan, number) for number in range(plan.raters)]
    for seed in range(studies):
        generator = np.random.default_rng(seed)
        judgments = [
            judgment
            for given in simulated_answers(plan, schedules, population, generator)
            for answer in given
            for judgment in as_judgments(plan, answer, "simulated")
        ]
        if change is not None:
            judgments = [change(judgment) for judgment in judgments]
        kept, exclusions = exclude(plan, judgments)
        tables = {q.id: comparisons(plan, q, kept) for q in plan.questions}
        excluded = {e.rater for e in exclusions if e.item is None}
        yield planned_contrasts(plan, tables), judgments, excluded


def errors(plan: Plan, studies: int) -> None:
    """How often something is found where there is nothing, in whole studies."""
    plan = of_contrasts(plan)
    superiority = [i for i, c in enumerate(plan.contrasts) if c.test == "superiority"]
    populations = {
        "no effect": NULL,
        "and all prefer the left side (1 in log odds)": dataclasses.replace(NULL, side=1.0),
        "and 20% of raters do not read": dataclasses.replace(NULL, lazy=0.2),
        "and raters differ more (1.2)": dataclasses.replace(NULL, rater_spread=1.2),
    }

    def rows() -> Iterator[Sequence[object]]:
        for name, population in populations.items():
            single, family, estimates = [], [], []
            for contrasts, _, _ in whole_studies(plan, population, studies):
                chosen = [contrasts[i] for i in superiority]
                single += [
                    c.p_value is not None and c.p_value < plan.analysis.alpha for c in chosen
                ]
                family.append(
                    any(c.adjusted is not None and c.adjusted < plan.analysis.alpha for c in chosen)
                )
                estimates += [c.estimate.value for c in chosen if c.estimate is not None]
            center, error = np.mean(estimates), np.std(estimates) / len(estimates) ** 0.5
            yield (
                name,
                f"{np.mean(single):.1%}",
                f"{np.mean(family):.1%}",
                f"{center:.1%} ± {error:.1%}",
            )

    print(f"### False positives in {studies} whole studies without an effect, two-sided, α = 5%\n")
    table(
        ("population", "single contrast", "any contrast, after Holm", "mean win rate ± error"),
        rows(),
    )
    margin = next(c for c in plan.contrasts if c.test == "equivalence")
    layout = balanced_layout(plan.raters, 39, 3)
    population = Population()
    differences = np.linspace(0, 2.5, 26)
    centers = [values_of(layout, population, d, 4000, 0, "rating").mean() for d in differences]
    at_margin = float(np.interp(margin.margin or 0, centers, differences))
    p = contrast_p_values(
        margin, layout, values_of(layout, population, at_margin, 4000, 1, "rating")
    )
    print(
        "Equivalence claimed where the true difference is the margin, in 4000 studies: "
        f"{np.mean(p < plan.analysis.alpha):.1%}.\n"
    )


def power(plan: Plan, studies: int) -> None:
    """Whether whole studies support the contrasts as often as the plan's power says."""

    plan = of_contrasts(plan)

    def rows() -> Iterator[Sequence[object]]:
        for effect in (0.6, 0.65, 0.7):
            population = Population(effect=effect)
            planned = planned_power(plan, population, excluded=0.0, studies=2000, search=False)
            supported = np.array(
                [
                    [c.supported(plan.analysis.alpha) for c in contrasts]
                    for contrasts, _, _ in whole_studies(plan, population, studies)
                ]
            ).mean(0)
            for p, reached in zip(planned, supported, strict=True):
                error = (reached * (1 - reached) / studies) ** 0.5
                yield (
                    f"{effect:.0%}",
                    p.contrast.id,
                    f"{p.power:.1%}",
                    f"{reached:.1%} ± {error:.1%}",
                )

    print(f"### Planned power, and the share of {studies} whole studies that support a contrast\n")
    table(("win rate", "contrast", "planned", "reached ± error"), rows())


def checks(plan: Plan, studies: int) -> None:
    """How many raters who do not read are excluded, and how many who read."""

    def slow(judgment: Judgment) -> Judgment:
        return dataclasses.replace(judgment, seconds=max(judgment.seconds, 30.0))

    def rows() -> Iterator[Sequence[object]]:
        for name, population, change in (
            ("do not read", Population(lazy=1.0), None),
            ("do not read, but take their time", Population(lazy=1.0), slow),
            ("read, and fail 3% of the checks", Population(), None),
            ("read, and fail 10% of the checks", Population(slips=0.1), None),
        ):
            shares = [
                len(excluded) / plan.raters
                for _, _, excluded in whole_studies(
                    plan, population, max(10, studies // 10), change
                )
            ]
            yield name, f"{np.mean(shares):.1%}"

    print("### Raters excluded by the plan's rules\n")
    table(("raters who", "excluded"), rows())


def reference(_: Plan, studies: int) -> None:
    """Krippendorff's alpha beside the reference library, and the coverage of its interval."""
    largest = 0.0

    def ratings_of(layout: Layout, population: Population, seed: int) -> Floats:
        values = values_of(layout, population, 0.0, 1, seed)[0]
        ratings = np.full((int(layout.prompt.max()) + 1, int(layout.rater.max()) + 1), np.nan)
        ratings[layout.prompt, layout.rater] = 2 * values + 1
        return ratings

    def rows() -> Iterator[Sequence[object]]:
        nonlocal largest
        for raters in (8, 12, 24):
            for spreads in SPREADS[1:]:
                population = Population(0.5, *spreads)
                crowd = ratings_of(balanced_layout(400, 400, 1), population, 10_000)
                true = krippendorff_alpha((crowd[..., None] == np.arange(3)).sum(1).astype(float))
                layout = balanced_layout(raters, 39, 1)
                inside, widths = [], []
                for seed in range(studies):
                    ratings = ratings_of(layout, population, seed)
                    agreed = agreement(ratings, np.arange(39), 3)
                    assert agreed is not None
                    assert agreed.alpha is not None
                    theirs = krippendorff.alpha(
                        reliability_data=ratings.T, level_of_measurement="ordinal"
                    )
                    largest = max(largest, abs(theirs - agreed.alpha.value))
                    inside.append(agreed.alpha.low <= true <= agreed.alpha.high)
                    widths.append(agreed.alpha.high - agreed.alpha.low)
                spread = f"{spreads[0]:g}, {spreads[1]:g}"
                yield (
                    raters,
                    spread,
                    f"{true:.3f}",
                    f"{np.mean(inside):.1%}",
                    f"{np.mean(widths):.2f}",
                )

    print("### Krippendorff's alpha of preferences: coverage of its 95% interval\n")
    table(("raters", "spread of raters, prompts", "alpha", "coverage", "mean width"), rows())
    print(f"Largest difference from the krippendorff package: {largest:.1e}.\n")


def sizes(plan: Plan, _: int) -> None:
    """Power by numbers of raters and prompts, for the table in the docs."""
    numbers = (24, 36, 48, 72, 96)

    def rows() -> Iterator[Sequence[object]]:
        for effect in (0.6, 0.65):
            for prompts, per_rater in ((24, 24), (36, 24), (60, 24), (96, 24), (96, 18)):
                each = dataclasses.replace(plan, prompts_per_rater=per_rater)
                simulator = StudySimulator(each, Population(effect=effect), 0.1, 1000, 0)
                cells = [
                    " / ".join(f"{share:.0%}" for share in simulator.power(raters, prompts)[0])
                    for raters in numbers
                ]
                yield f"{effect:.0%}", prompts, per_rater, *cells

    print("### Power by size: " + " / ".join(c.id for c in plan.contrasts) + "\n")
    heads = ("win rate", "prompts", "of each rater", *(f"{n} raters" for n in numbers))
    table(heads, rows())


PARTS = {
    "coverage": coverage,
    "errors": errors,
    "power": power,
    "checks": checks,
    "reference": reference,
    "sizes": sizes,
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--studies", type=int, default=300)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--plan", type=Path, default=Path("docs/results/study-demo"))
    arguments = parser.parse_args()
    plan = read_plan(arguments.plan / "plan.json")
    print(f"plan {plan.hash}: {plan.raters} raters\n")
    for name in arguments.only:
        PARTS[name](plan, arguments.studies)


if __name__ == "__main__":
    launch(main)
