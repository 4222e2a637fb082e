"""All tables of a report, by the section they stand in."""

from collections.abc import Sequence
from dataclasses import dataclass

from baco.evaluation.report import results
from baco.evaluation.report.ranking import Standing
from baco.evaluation.report.tables import Table


@dataclass(frozen=True, slots=True)
class Sections:
    """Tables by section; those of methods by pair."""

    headline: list[Table]
    routers: list[Table]
    methods: list[tuple[str, list[Table]]]
    parts: list[Table]
    accuracy: list[Table]
    points: list[Table]

    @property
    def all(self) -> list[Table]:
        """Every table, in the order of the sections."""
        return [
            *self.headline,
            *self.routers,
            *(table for _, tables in self.methods for table in tables),
            *self.parts,
            *self.accuracy,
            *self.points,
        ]


def sections(standings: Sequence[Standing]) -> Sections:
    """The tables of all pairs."""
    overview = results.across(standings)
    each = [(one, found) for one in standings for found in one.every]
    return Sections(
        headline=_present(
            [overview, *(t(one) for one in standings for t in (results.headline, results.against))]
        ),
        routers=_present([results.routers(one) for one in standings]),
        methods=[
            (
                one.pair,
                _present(
                    [
                        results.methods(one),
                        *(results.subspaces(one, indicator) for indicator in results.INDICATORS),
                    ]
                ),
            )
            for one in standings
        ],
        parts=_present(
            [
                *(results.tasks(one) for one in standings),
                *(results.categories(one, f) for one in standings for f in one.findings),
            ]
        ),
        accuracy=_present([results.accuracy(one, found) for one, found in each]),
        points=[results.points(one, found) for one, found in each],
    )


def _present(tables: Sequence[Table | None]) -> list[Table]:
    return [table for table in tables if table is not None]
