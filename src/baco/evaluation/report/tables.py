"""A table and its three forms: cells of the page, Markdown and CSV.

The page and Markdown show rounded figures. CSV has six digits, and an interval in two columns.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from baco.evaluation.indicators import Estimate

Form = Literal[
    "text", "figure", "signed", "short", "round", "percent", "signed percent", "p", "count"
]
ABSENT = "–"

Cell = str | float | Estimate | None


@dataclass(frozen=True, slots=True)
class Column:
    """A column's heading and how its figures are written.

    ``figure`` 0.123, ``signed`` +0.123, ``short`` 12.3, ``round`` 12, ``percent`` 12.3%,
    ``signed percent`` +12.3%, ``p`` < 0.001, ``count`` as it is.
    """

    name: str
    form: Form = "text"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under columns.

    Attributes:
        name: stem of its files.
        title: its subject.
        caption: how to read it, with units.
        columns, rows: the first cell of a row is its heading.
        marked: indices of highlighted rows.
    """

    name: str
    title: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    marked: frozenset[int] = frozenset()

    def shown(self) -> list[list[str]]:
        """The text of every cell."""
        forms = [column.form for column in self.columns]
        return [
            [written(cell, form) for cell, form in zip(row, forms, strict=True)]
            for row in self.rows
        ]

    def markdown(self) -> str:
        """Title, caption and a table, marked rows in bold."""
        heads = [_escaped(column.name) for column in self.columns]
        rule = ["---" if column.form == "text" else "---:" for column in self.columns]
        lines = [heads, rule]
        for index, row in enumerate(self.shown()):
            cells = [_escaped(cell) for cell in row]
            lines.append([f"**{cells[0]}**", *cells[1:]] if index in self.marked else cells)
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        return f"### {self.title}\n\n{self.caption}\n\n{table}\n"

    def csv(self) -> str:
        """One row a line under a heading; `NAME low` and `NAME high` follow an estimate."""
        wide = [
            any(isinstance(row[index], Estimate) for row in self.rows)
            for index in range(len(self.columns))
        ]
        heads: list[str] = []
        for column, is_wide in zip(self.columns, wide, strict=True):
            heads += [column.name]
            heads += [f"{column.name} low", f"{column.name} high"] if is_wide else []
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(heads)
        for row in self.rows:
            fields: list[str] = []
            for cell, is_wide in zip(row, wide, strict=True):
                fields += _fields(cell, is_wide)
            writer.writerow(fields)
        return out.getvalue()


@dataclass(frozen=True, slots=True)
class Section:
    """A section that another part of BACo adds to the report of a run.

    Attributes:
        name: its id in the page.
        title: its heading.
        short: its name in the page's navigation.
        paragraphs: of text.
        tables: of figures.
    """

    name: str
    title: str
    short: str
    paragraphs: Sequence[str]
    tables: Sequence[Table]


def written(cell: Cell, form: Form) -> str:
    """The text of a cell: `0.516 [0.463, 0.567]`, `32.7%`, `< 0.001`, `–` for None."""
    if cell is None:
        return ABSENT
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Estimate):
        low, high = number(cell.low, form), number(cell.high, form)
        return f"{number(cell.value, form)} [{low}, {high}]"
    return number(cell, form)


def number(value: float, form: Form) -> str:
    """A figure as its column writes it, with a true minus."""
    if form == "p":
        return "< 0.001" if value < 0.001 else f"{value:.3f}"
    spec = {
        "signed": "+.3f", "short": ".1f", "round": ".0f", "percent": ".1%",
        "signed percent": "+.1%", "count": "g",
    }.get(form, ".3f")  # fmt: skip
    return format(value, spec).replace("-", "\N{MINUS SIGN}")


def _fields(cell: Cell, wide: bool) -> list[str]:
    if isinstance(cell, Estimate):
        return [_full(cell.value), _full(cell.low), _full(cell.high)]
    plain = "" if cell is None else cell if isinstance(cell, str) else _full(cell)
    return [plain, "", ""] if wide else [plain]


def _full(value: float) -> str:
    return f"{value:.6g}"


def _escaped(text: str) -> str:
    # Prompts and labels can hold any text: a bar or a line break would end the cell.
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split()) or " "
