"""Jinja templates of prompts, rendered within limits of time, memory and length.

A template comes with a downloaded model and may be wrong or hostile: it can loop for hours,
allocate gigabytes (``{{ "x" * 10**9 }}``), or recurse until the interpreter crashes. Nothing inside
a Python process limits all of these. So templates are rendered in a process of their own
(:mod:`baco.text.template_process`). It is started once, takes about 0.2 ms per prompt, and is
replaced when a template ends it. Any thread can render.
"""

import atexit
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from baco.errors import BacoError, shortened

Kind = Literal["chat", "base", "prompt"]

# Limits of one rendering: CPU seconds, bytes of the process, characters of the text.
SECONDS = 2.0
MEMORY = 512 * 2**20
CHARACTERS = 2**24

_PROGRAM = Path(__file__).with_name("template_process.py")
# Jinja's messages about a variable or a key that is not there.
_UNDEFINED = re.compile(r"^'(.+)' is undefined$|has no attribute '(.+)'$", re.DOTALL)
_TIMED_OUT = -getattr(signal, "SIGPROF", 0)


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
            "seconds": SECONDS,
            "characters": CHARACTERS,
        }
        started = time.monotonic()
        try:
            reply = _process.ask(json.dumps(request, default=str).encode())
        except _EndedError as error:
            late = time.monotonic() - started >= SECONDS
            if error.code == _TIMED_OUT or (not _TIMED_OUT and late):
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


class _EndedError(Exception):
    """The process ended without a reply.

    Attributes:
        code: its exit code, or minus the number of the signal that ended it.
    """

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code

    def __str__(self) -> str:
        if self.code >= 0:
            return f"exit code {self.code}"
        try:
            return signal.Signals(-self.code).name
        except ValueError:
            return f"signal {-self.code}"


class _Process:
    """The process that renders templates, started for the first request and after it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> dict[str, Any]:
        """The reply to a request.

        Raises:
            _EndedError: the request ended the process.
            BacoError: the process cannot be started.
        """
        with self._lock:
            while True:
                is_new = self._process is None
                process = self._started()
                assert process.stdin is not None
                assert process.stdout is not None
                reply = b""
                try:
                    process.stdin.write(request + b"\n")
                    process.stdin.flush()
                    reply = process.stdout.readline()
                except OSError:
                    pass  # it has ended
                except BaseException:
                    self.end()  # its reply would be read as that of the next request
                    raise
                if reply.endswith(b"\n"):
                    message: dict[str, Any] = json.loads(reply)
                    if message.get("error") == "MemoryError":
                        self.end()
                    return message
                code = self.end()
                # A process that was ended from outside while it waited is replaced.
                if is_new or code == _TIMED_OUT:
                    raise _EndedError(code)

    def start(self) -> None:
        """Start the process, which gets ready while this one does other work.

        Raises:
            BacoError: it cannot be started.
        """
        with self._lock:
            self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        path = os.pathsep.join(str(folder) for folder in sys.path if str(folder))
        try:
            self._process = subprocess.Popen(
                # -P: modules beside the program must not shadow the standard library.
                [sys.executable, "-P", str(_PROGRAM), str(MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for the parent
            )
        except (OSError, TypeError) as error:
            raise BacoError(f"cannot start the process that renders templates: {error}") from error
        return self._process

    def end(self) -> int:
        """End the process, if there is one; returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        with contextlib.suppress(OSError):
            process.communicate()
        return process.returncode

    def forget(self) -> None:
        """After a fork, in the child: the rendering process belongs to the parent."""
        process = self._process
        self.__init__()  # type: ignore[misc]
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
            process.returncode = 0  # not a child of this process


_process = _Process()
start = _process.start
atexit.register(_process.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_process.forget)
