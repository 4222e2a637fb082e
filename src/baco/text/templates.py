"""Jinja templates of prompts, rendered within bounds of time, memory and length.

A template comes with a downloaded model and may be wrong or hostile: it may loop for hours, ask for
gigabytes (``{{ "x" * 10**9 }}``), or recurse until the interpreter crashes. No hook inside Python
bounds all of these, so templates are rendered in a process of their own
(:mod:`baco.text.template_process`), which is started once, takes about 0.2 ms for a prompt, and is
replaced when a template ends it. Any thread may render.
"""

import atexit
import contextlib
import json
import os
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

from baco.errors import BacoError

Kind = Literal["chat", "base"]

# What one rendering may take: seconds of computing, bytes of the process, characters of its text.
SECONDS = 2.0
MEMORY = 512 * 2**20
CHARACTERS = 2**24
# Longer messages of a library are left out of ours.
LONGEST_MESSAGE = 300

_PROGRAM = Path(__file__).with_name("template_process.py")
_TIMED_OUT = -getattr(signal, "SIGPROF", 0)


class TemplateFailedError(BacoError):
    """A template that fails on a conversation or refuses it; it may take another."""


@dataclass(frozen=True, slots=True)
class Template:
    """A template and what to call it.

    Attributes:
        kind: ``chat`` is rendered as `transformers` renders chat templates, ``base`` with Jinja's
            own handling of white space, and variables that are not there are errors.
        source: Jinja text.
        name: for messages, such as ``the chat template of Qwen/Qwen3-8B``.
    """

    kind: Kind
    source: str
    name: str

    def render(self, variables: Mapping[str, Any], day: str) -> "Rendering":
        """The template's text for these variables.

        Args:
            variables: what JSON can hold; anything else is spelled as a text.
            day: what ``strftime_now`` takes for today, as YYYY-MM-DD.

        Raises:
            TemplateFailedError: the template fails, refuses or renders nothing.
            BacoError: it is not valid, or exceeds a bound.
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
                told = f"takes longer than {SECONDS:g} seconds of computing"
            else:
                told = f"ends the process that renders it ({error})"
            raise BacoError(self._told(told)) from None
        if "error" in reply:
            traceback = reply.get("traceback")
            raise self._failure(reply) from (traceback and RenderingError(traceback))
        text: str = reply["text"]
        if not text:
            raise TemplateFailedError(self._told("renders this conversation as an empty text"))
        return Rendering(text, bool(reply["clock"]))

    def _failure(self, reply: Mapping[str, Any]) -> BacoError:
        """The error that a reply describes."""
        kind = reply["error"]
        if kind == "MemoryError":
            return BacoError(self._told(f"needs more than {MEMORY // 2**20} MiB of memory"))
        if kind == "TooLong":
            return BacoError(self._told(f"writes more than {CHARACTERS:,} characters"))
        message = one_line(reply["message"])
        if reply["syntax"]:
            return BacoError(self._told(f"is not valid Jinja: line {reply['line']}{message}"))
        if reply["refused"]:  # by its own raise_exception, which says what is wrong
            return TemplateFailedError(f"{self.name} refuses this conversation{message}")
        return TemplateFailedError(self._told(f"fails on this conversation: {kind}{message}"))

    def _told(self, what: str) -> str:
        option = f"{self.kind}_template"
        dashed = option.replace("_", "-")
        return f"{self.name} {what}; correct it, or give another (--{dashed}, {option}=)"


@dataclass(frozen=True, slots=True)
class Rendering:
    """What a template wrote.

    Attributes:
        text: never empty.
        reads_clock: it asked for today's date.
    """

    text: str
    reads_clock: bool


class RenderingError(Exception):
    """The traceback of an error in the other process, for ``--debug``."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def one_line(message: str) -> str:
    """A library's message to be put behind ours: ``: message`` on one line; nothing where it is
    longer than `LONGEST_MESSAGE` or empty.
    """
    joined = " ".join(message.split())
    return f": {joined}" if 0 < len(joined) <= LONGEST_MESSAGE else ""


def today() -> str:
    """The current day, as YYYY-MM-DD."""
    return date.today().isoformat()


def check_date(given: str | date) -> str:
    """A day as YYYY-MM-DD.

    Raises:
        BacoError: it is none.
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
        code: its exit code; minus the number of a signal that ended it.
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
    """The process that renders templates; started when it is first asked, and when it has ended."""

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
                    self.end()  # its reply would be taken for the next request's
                    raise
                if reply.endswith(b"\n"):
                    told: dict[str, Any] = json.loads(reply)
                    if told.get("error") == "MemoryError":
                        self.end()
                    return told
                code = self.end()
                # One that was ended from outside while it waited is replaced, and asked again.
                if is_new or code == _TIMED_OUT:
                    raise _EndedError(code)

    def start(self) -> None:
        """Start the process; it gets ready while this one does something else.

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
                # -P: modules beside the program do not hide those of the standard library.
                [sys.executable, "-P", str(_PROGRAM), str(MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for the process that asks
            )
        except (OSError, TypeError) as error:
            raise BacoError(f"cannot start the process that renders templates: {error}") from error
        return self._process

    def end(self) -> int:
        """End the process, if there is one; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        with contextlib.suppress(OSError):
            process.communicate()
        return process.returncode

    def forget(self) -> None:
        """In a copy of this process: the other one is its parent's."""
        process = self._process
        self.__init__()  # type: ignore[misc]
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
            process.returncode = 0  # nothing to wait for


_process = _Process()
start = _process.start
atexit.register(_process.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_process.forget)
