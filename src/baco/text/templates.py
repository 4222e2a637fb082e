"""Jinja templates of prompts, rendered within limits of time, memory and length.

A template comes with a downloaded model and may be wrong or hostile: it can loop for hours,
allocate gigabytes (``{{ "x" * 10**9 }}``), or recurse until the interpreter crashes. So templates
are rendered in a process of their own (:mod:`baco.text.template_process`), which takes about 0.2 ms
per prompt. Any thread can render.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from baco.errors import BacoError, shortened
from baco.limited_process import EndedError, LimitedProcess

Kind = Literal["chat", "base", "prompt"]

# Limits of one rendering: CPU seconds, bytes of the process, characters of the text.
SECONDS = 2.0
MEMORY = 512 * 2**20
CHARACTERS = 2**24

_PROGRAM = Path(__file__).with_name("template_process.py")
# Jinja's messages about a variable or a key that is not there.
_UNDEFINED = re.compile(r"^'(.+)' is undefined$|has no attribute '(.+)'$", re.DOTALL)


class TemplateFailedError(BacoError):
    """A template fails on a conversation or refuses it; it may accept another."""


@dataclass(frozen=True, slots=True)
class Template:
    """A template and its name in messages.

    Attributes:
        kind: ``chat`` is rendered as `transformers` renders chat templates. ``base`` is rendered
            with Jinja's own handling of white space, and undefined variables are errors. ``prompt``
            is rendered like ``base``, without a clock; its variables are the columns of a row.
        source: Jinja text.
        name: for messages, such as ``the chat template of Qwen/Qwen3-8B``.
    """

    kind: Kind
    source: str
    name: str

    def render(self, variables: Mapping[str, Any], day: str) -> "Rendering":
        """The template's text for these variables.

        Args:
            variables: JSON values; anything else is converted to a text.
            day: the day for ``strftime_now``, as YYYY-MM-DD.

        Raises:
            TemplateFailedError: the template fails, refuses or renders an empty text.
            BacoError: it is not valid, or exceeds a limit.
        """
        request = {
            "kind": self.kind,
            "source": self.source,
            "variables": variables,
            "date": day,
            "characters": CHARACTERS,
        }
        try:
            reply = _process.ask(request, SECONDS)
        except EndedError as error:
            if error.timed_out:
                fault = f"takes longer than {SECONDS:g} seconds of computing"
            else:
                fault = f"ends the process that renders it ({error})"
            raise BacoError(self._message(fault)) from None
        if "error" in reply:
            traceback = reply.get("traceback")
            raise self._failure(reply) from (traceback and RenderingError(traceback))
        text: str = reply["text"]
        if not text:
            raise TemplateFailedError(self._message(f"renders this {self._given} as an empty text"))
        return Rendering(text, bool(reply["clock"]))

    def _failure(self, reply: Mapping[str, Any]) -> BacoError:
        """The error that a reply describes."""
        kind = reply["error"]
        if kind == "MemoryError":
            return BacoError(self._message(f"needs more than {MEMORY // 2**20} MiB of memory"))
        if kind == "TooLong":
            return BacoError(self._message(f"writes more than {CHARACTERS:,} characters"))
        message = shortened(reply["message"])
        message = message and f": {message}"
        if reply["syntax"]:
            return BacoError(self._message(f"is not valid Jinja: line {reply['line']}{message}"))
        if reply["refused"]:  # by raise_exception, whose message tells what is wrong
            return TemplateFailedError(f"{self.name} refuses this {self._given}{message}")
        missing = _UNDEFINED.search(reply["message"]) if self.kind == "prompt" else None
        if kind == "UndefinedError" and missing:
            name = shortened(missing[1] or missing[2])
            return TemplateFailedError(f"{self.name} needs the column {name!r}")
        return TemplateFailedError(self._message(f"fails on this {self._given}: {kind}{message}"))

    @property
    def _given(self) -> str:
        """What the template renders."""
        return "row" if self.kind == "prompt" else "conversation"

    def _message(self, fault: str) -> str:
        options = f"--{self.kind}-template"
        if self.kind != "prompt":  # which only the command line has
            options += f", {self.kind}_template="
        return f"{self.name} {fault}; correct it, or give another ({options})"


@dataclass(frozen=True, slots=True)
class Rendering:
    """The text that a template rendered.

    Attributes:
        text: never empty.
        reads_clock: whether the template read today's date.
    """

    text: str
    reads_clock: bool


class RenderingError(Exception):
    """The traceback of an error in the other process, for ``--debug``."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def today() -> str:
    """The current day, as YYYY-MM-DD."""
    return date.today().isoformat()


def check_date(given: str | date) -> str:
    """A day as YYYY-MM-DD.

    Raises:
        BacoError: it is not a day in this form.
    """
    text = str(given)
    try:
        if date.fromisoformat(text).isoformat() == text:
            return text
    except ValueError:
        pass
    raise BacoError(f"date is {text!r}: give a day as YYYY-MM-DD, as in 2025-03-31")


_process = LimitedProcess(_PROGRAM, MEMORY, "renders templates")
start = _process.start
