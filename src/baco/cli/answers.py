"""Shows answers: on a terminal while they grow, in a pipe as they end; and figures below them."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from baco.cli.console import coloured, dimmed, err, legend, out, show, write
from baco.cli.svg import command_line, draw_svg
from baco.source import MIXED
from baco.text.answer_text import Piece

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.outputs import Chunk, Completion
    from baco.text.prompts import Conversation

FRAMES_A_SECOND = 15


class Show:
    """Shows one prompt's answers by one router.

    On a terminal all answers grow at once. Finished answers are printed above the growing ones, in
    their order, so that nothing is lost where answers are taller than the screen.
    """

    def __init__(
        self,
        baco: "Baco",
        prompt: "Conversation",
        router: Any,
        settings: dict[str, Any],
        *,
        legend: bool = True,
    ) -> None:
        self.baco, self.prompt, self.router, self.settings = baco, prompt, router, settings
        self.legend = legend
        self.growing: list[list[Piece]] = [[] for _ in range(settings["n"])]
        self.thinking = [""] * settings["n"]  # shown on a terminal only
        self.done: dict[int, Completion] = {}
        self.shown = 0  # answers that were printed in full

    def run(self, svg: Path | None = None) -> None:
        """Draw and show the answers and their figures; also as an SVG file where asked.

        Raises:
            BacoError: answers broke off; their beginnings are shown.
        """
        from baco.outputs import check_whole

        if sys.stdout.isatty():
            self._live()
        elif len(self.growing) == 1:
            self._one_piped()
        else:
            self._piped()
        if svg is not None:
            spelling, name = self.done[0].router, self.baco.pair.name
            assert isinstance(self.prompt, str)  # only a command's answers are drawn
            draw_svg(svg, command_line(self.prompt, name, spelling, self.settings), self._whole())
        check_whole(self.done.values())

    def _live(self) -> None:
        console, drawn = out(), 0.0
        try:
            with Live(console=console, auto_refresh=False, transient=True) as live:
                for chunk in self._chunks():
                    self._take(chunk)
                    while self.shown in self.done:
                        self.shown += 1
                        # Refresh first: rich redraws the last picture below what is printed.
                        live.update(self._unfinished(console), refresh=True)
                        console.print(self._answer(self.shown - 1), Text(), sep="\n")
                    if time.monotonic() - drawn > 1 / FRAMES_A_SECOND:
                        live.update(self._unfinished(console), refresh=True)
                        drawn = time.monotonic()
        except BaseException:
            # After an interrupt the answers so far stay on the screen.
            for index in range(self.shown, len(self.growing)):
                if self._begun(index):
                    console.print(self._answer(index), Text(), sep="\n")
            raise
        console.print(*self._foot(), sep="\n")

    def _one_piped(self) -> None:
        console = out()
        try:
            for chunk in self._chunks():
                self._take(chunk)
                show(console, chunk.pieces)
        finally:
            if self.growing[0]:
                write("\n")
        err().print(self._figures())

    def _piped(self) -> None:
        console = out()
        for chunk in self._chunks():
            self._take(chunk)
            while self.shown in self.done:
                write(f"\n{self.shown + 1}. " if self.shown else "1. ")
                show(console, self.growing[self.shown])
                write("\n")
                self.shown += 1
        err().print(self._figures())

    def _chunks(self) -> "Iterator[Chunk]":
        return self.baco.stream(self.prompt, router=self.router, **self.settings)

    def _take(self, chunk: "Chunk") -> None:
        self.growing[chunk.sample] += chunk.pieces
        self.thinking[chunk.sample] += chunk.thinking
        if chunk.completion is not None:
            self.done[chunk.sample] = chunk.completion

    def _answer(self, index: int) -> Text:
        text = self._text(index)
        return text if len(self.growing) == 1 else Text.assemble((f"{index + 1}. ", "bold"), text)

    def _text(self, index: int) -> Text:
        """An answer in colours, its thinking dimmed before it."""
        text = coloured(self.growing[index])
        if not self.thinking[index]:
            return text
        gap = "\n\n" if self.growing[index] else ""
        return dimmed(self.thinking[index] + gap) + text

    def _unfinished(self, console: Console) -> Group:
        """The last lines of the growing answers, as many as the screen has room for."""
        growing = [i for i in range(self.shown, len(self.growing)) if self._begun(i)]
        room = max(console.height - 2, 1)
        growing = growing[:room]
        budget = room // max(len(growing), 1)
        lines = [self._end_of(index, budget, console) for index in growing]
        count = Text(f"{len(self.done)} of {len(self.growing)} answers", style="dim")
        return Group(*lines, count)

    def _begun(self, index: int) -> bool:
        return bool(self.growing[index] or self.thinking[index])

    def _end_of(self, index: int, budget: int, console: Console) -> Text:
        answer = self._answer(index)
        lines = answer.wrap(console, console.width)
        if len(lines) <= budget:
            return answer
        mark = f"{index + 1}. … "
        lines = self._text(index).wrap(console, console.width - len(mark))
        return Text.assemble((mark, "bold"), Text("\n").join(lines[-budget:]))

    def _whole(self) -> Group:
        lines: list[RenderableType] = []
        for index in range(len(self.growing)):
            lines += [self._answer(index), Text()]
        return Group(*lines, *self._foot())

    def _foot(self) -> list[Text]:
        return [*([legend()] if self.legend else []), self._figures()]

    def _figures(self) -> Text:
        return figures([self.done[index] for index in range(len(self.growing))])


def figures(completions: "Sequence[Completion]") -> Text:
    """The line of figures; tokens/s counts all answers of the call together."""
    count = len(completions)
    tokens = sum(c.thinking_tokens + len(c.token_ids) for c in completions)
    speed = tokens / max(c.seconds for c in completions)
    parts = [
        *_sources(completions),
        f"{speed:.0f} tokens/s",
        f"distinct answers {distinct(completions)} of {count}",
        f"seed {completions[0].seed}",
        completions[0].router,
    ]
    return Text(" · ".join(parts), style="dim")


def _sources(completions: "Sequence[Completion]") -> list[str]:
    """The base share and the switches; one word where a combiner mixed both models."""
    base_share, switches = share(completions), [c.switches for c in completions]
    if base_share is None:
        return [MIXED]
    mean = sum(number or 0 for number in switches) / len(switches)
    return [f"base share {base_share:.0%}", f"switches {mean:.1f}"]


def share(completions: "Sequence[Completion]") -> float | None:
    """Base share over all tokens of the answers, in [0, 1]; None where tokens are mixed."""
    if any(c.base_share is None for c in completions):
        return None
    tokens = sum(len(c.token_ids) for c in completions)
    return sum(c.sources.count("base") for c in completions) / max(tokens, 1)


def distinct(completions: "Sequence[Completion]") -> int:
    """Number of different texts."""
    return len({c.text for c in completions})
