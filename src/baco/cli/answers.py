"""Answers on a terminal while they grow, in a pipe once they are whole, and on an SVG drawing."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from baco.cli.console import coloured, err, legend, out
from baco.text import Piece

if TYPE_CHECKING:
    from baco import Baco, Completion

SVG_WIDTH = 96


class Show:
    """One prompt's answers by one router, shown as they come."""

    def __init__(self, baco: "Baco", prompt: str, router: Any, settings: dict[str, Any]) -> None:
        self.baco, self.prompt, self.router, self.settings = baco, prompt, router, settings
        self.growing: list[list[Piece]] = [[] for _ in range(settings["n"])]
        self.done: dict[int, Completion] = {}

    def run(self, svg: Path | None = None) -> None:
        """Draw and show the answers and their figures; also as an SVG file where asked."""
        if sys.stdout.isatty():
            self._live()
        else:
            self._plain()
        if svg is not None:
            draw_svg(svg, self.prompt, self._view())

    def _live(self) -> None:
        console = out()
        with Live(self._view(), console=console, auto_refresh=False, transient=True) as live:
            for number, chunk in enumerate(self._chunks()):
                if number % len(self.growing) == 0:  # about once per step of all answers
                    live.update(self._view(), refresh=True)
                self._take(chunk)
        console.print(self._view())

    def _plain(self) -> None:
        console, shown = out(), 0
        for chunk in self._chunks():
            self._take(chunk)
            while shown in self.done:
                if shown:
                    console.print()
                console.print(self._answer(shown))
                sys.stdout.flush()
                shown += 1
        err().print(self._figures())

    def _chunks(self) -> Any:
        return self.baco.stream(self.prompt, router=self.router, **self.settings)

    def _take(self, chunk: Any) -> None:
        self.growing[chunk.sample] += chunk.pieces
        if chunk.completion is not None:
            self.done[chunk.sample] = chunk.completion

    def _answer(self, index: int) -> Text:
        text = coloured(self.growing[index])
        return text if len(self.growing) == 1 else Text(f"{index + 1}. ", style="bold") + text

    def _view(self) -> Group:
        lines: list[RenderableType] = []
        for index in range(len(self.growing)):
            lines += [self._answer(index), Text()]
        lines.append(self._figures())
        return Group(*lines)

    def _figures(self) -> Text:
        if len(self.done) < len(self.growing):
            return Text(f"{len(self.done)} of {len(self.growing)} answers", style="dim")
        return figures([self.done[index] for index in range(len(self.growing))])


def figures(completions: "Sequence[Completion]") -> Text:
    """The line under the answers."""
    count = len(completions)
    tokens = sum(len(c.token_ids) for c in completions)
    share = sum(c.sources.count("base") for c in completions) / tokens
    switches = sum(c.switches for c in completions) / count
    speed = tokens / max(c.seconds for c in completions)
    parts = [
        f"base share {share:.0%}",
        f"switches {switches:.1f}",
        f"{speed:.0f} tokens/s",
        f"distinct answers {len({c.text for c in completions})} of {count}",
        f"{completions[0].router}",
        f"seed {completions[0].seed}",
    ]
    return legend() + Text(" · " + " · ".join(parts), style="dim")


def show_comparison(
    baco: "Baco", prompt: str, routers: Sequence[Any], settings: dict[str, Any], svg: Path | None
) -> None:
    """The two single models and BACo next to each other, on the same seed."""
    console, columns = out(), []
    for router in routers:
        with err().status(f"{router.spelling} …"):
            columns.append(baco.generate(prompt, router=router, **settings))
    table = _comparison_table(columns)
    if sys.stdout.isatty():
        console.print(table)
    else:
        for completions in columns:
            console.print(Text(f"== {completions[0].router}"))
            for number, completion in enumerate(completions, 1):
                console.print(Text(f"{number}. ") + coloured(completion.pieces))
            console.print(Text(_summary(completions)))
            console.print()
    if svg is not None:
        draw_svg(svg, prompt, Group(table, legend()))


def _comparison_table(columns: "Sequence[Sequence[Completion]]") -> Table:
    table = Table(box=box.SIMPLE_HEAD, expand=True, show_lines=True)
    for completions in columns:
        table.add_column(
            completions[0].router, ratio=1, footer=_summary(completions), overflow="fold"
        )
    table.show_footer = True
    for row in zip(*columns, strict=True):
        table.add_row(*(coloured(completion.pieces) for completion in row))
    return table


def _summary(completions: "Sequence[Completion]") -> str:
    distinct = len({c.text for c in completions})
    share = sum(c.base_share for c in completions) / len(completions)
    return f"{distinct} of {len(completions)} distinct, base share {share:.0%}"


def draw_svg(path: Path, prompt: str, view: RenderableType) -> None:
    """What the terminal shows, as an SVG file (written whole or not at all)."""
    console = Console(
        record=True,
        width=SVG_WIDTH,
        file=io.StringIO(),
        force_terminal=True,
        highlight=False,
        color_system="truecolor",
        no_color=False,
    )
    console.print(Text(f"$ baco generate {prompt!r}", style="bold"))
    console.print()
    console.print(view)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(console.export_svg(title="baco generate"), encoding="utf-8")
    partial.replace(path)
