"""``baco generate --compare``: base, aligned and BACo next to each other, on the same seed."""

import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from baco.cli.answers import distinct, share
from baco.cli.console import coloured, err, legend, out, show
from baco.cli.svg import command_line, draw_svg
from baco.source import MIXED

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.outputs import Completion
    from baco.text.prompts import Conversation

# Narrower columns are hard to read: the answers are then shown one below the other.
COLUMN_WIDTH = 28


def show_comparison(
    baco: "Baco",
    prompt: "Conversation",
    routers: Sequence[Any],
    settings: dict[str, Any],
    svg: Path | None,
) -> None:
    """Draw the answers of every router and show them; also as an SVG file if ``svg`` is given.

    Raises:
        BacoError: answers broke off; their beginnings are shown.
    """
    from baco.outputs import check_whole

    columns: list[tuple[str, list[Completion]]] = []
    try:
        for router in routers:
            columns.append((router.spelling, []))
            _draw(baco, prompt, router, settings, columns[-1][1])
    except KeyboardInterrupt:
        _show([column for column in columns if column[1]])
        raise
    _show(columns)
    if svg is not None:
        assert isinstance(prompt, str)  # only a command's answers are drawn
        spelling = columns[-1][0]
        command = command_line(prompt, baco.pair.name, spelling, settings, compare=True)
        draw_svg(svg, command, _table(columns))
    check_whole([completion for _, completions in columns for completion in completions])


def _draw(
    baco: "Baco",
    prompt: "Conversation",
    router: Any,
    settings: dict[str, Any],
    into: "list[Completion]",
) -> None:
    n = settings["n"]
    with err().status(f"{router.spelling}: 0 of {n} answers") as status:
        for chunk in baco.stream(prompt, router=router, **settings):
            if chunk.completion is not None:
                into.append(chunk.completion)
                into.sort(key=lambda completion: completion.sample)
                status.update(f"{router.spelling}: {len(into)} of {n} answers")


def _show(columns: "Sequence[tuple[str, Sequence[Completion]]]") -> None:
    if not columns:
        return
    console = out()
    if sys.stdout.isatty() and console.width >= COLUMN_WIDTH * len(columns):
        console.print(_table(columns))
        return
    for spelling, completions in columns:
        console.print(Text(f"== {spelling}", style="bold"))
        for number, completion in enumerate(completions, 1):
            console.print(Text(f"{number}. ", style="bold"), end="")
            show(console, completion.pieces)
            console.print()
        console.print(Text(_summary(completions), style="dim"))
        console.print()
    if console.is_terminal:
        console.print(_foot(columns))
    else:
        err().print(Text(f"seed {_seed(columns)}", style="dim"))


def _table(columns: "Sequence[tuple[str, Sequence[Completion]]]") -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, expand=True, show_footer=True, footer_style="dim")
    for spelling, completions in columns:
        table.add_column(spelling, _summary(completions), ratio=1, overflow="fold")
    for row in zip_longest(*(completions for _, completions in columns)):
        cells = [Text() if cell is None else coloured(cell.pieces) for cell in row]
        table.add_row(*(cell + Text("\n") for cell in cells))
    return Group(table, _foot(columns))


def _foot(columns: "Sequence[tuple[str, Sequence[Completion]]]") -> Text:
    return legend() + Text(f" · seed {_seed(columns)}", style="dim")


def _seed(columns: "Sequence[tuple[str, Sequence[Completion]]]") -> int:
    return columns[0][1][0].seed


def _summary(completions: "Sequence[Completion]") -> str:
    base_share = share(completions)
    sources = MIXED if base_share is None else f"base share {base_share:.0%}"
    return f"{distinct(completions)} of {len(completions)} distinct\n{sources}"
