"""A terminal for a program: tests press keys and read the screen as a user does."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import pyte

BACO = [sys.executable, "-c", "from baco.cli import main; main()"]
WAIT_SECONDS = 240

CTRL_C, CTRL_D, ENTER, UP, TAB = "\x03", "\x04", "\r", "\x1b[A", "\t"
ALT_ENTER = "\x1b\r"


class _Screen(pyte.Screen):
    """Replies to the queries of programs, such as the position of the cursor."""

    answer: Callable[[str], None]

    def write_process_input(self, data: str) -> None:
        self.answer(data)


class Terminal:
    """``baco ARGUMENTS`` in a terminal of its own, which is also its controlling terminal."""

    def __init__(self, *arguments: str, rows: int = 40, columns: int = 100) -> None:
        self._leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._screen = _Screen(columns, rows)
        self._screen.answer = self.press
        self._stream = pyte.ByteStream(self._screen)
        environment = {
            k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, *BACO, *arguments],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=environment | {"TERM": "xterm-256color", "COLORTERM": "truecolor"},
            start_new_session=True,
        )
        os.close(follower)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._leader)

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._leader, keys.encode())

    def see(self, text: str) -> str:
        """Wait until a text is on the screen, line breaks being spaces; the screen's text."""
        end = time.monotonic() + WAIT_SECONDS
        while text not in (shown := self.text):
            assert time.monotonic() < end, f"no {text!r} in:\n" + "\n".join(self._screen.display)
            self._read()
        return shown

    def leave(self) -> int:
        """Wait for the program to end; its exit code."""
        end = time.monotonic() + WAIT_SECONDS
        while self._process.poll() is None:
            assert time.monotonic() < end, "still running:\n" + "\n".join(self._screen.display)
            self._read()
        self._read()
        return self._process.returncode

    @property
    def text(self) -> str:
        """The words on the screen."""
        return " ".join(" ".join(self._screen.display).split())

    def styled(self, colour: str) -> list[str]:
        """The words on the screen that have a colour (six hexadecimal digits)."""
        lines = (
            "".join(self._screen.buffer[y][x].data if self._screen.buffer[y][x].fg == colour
                    else " " for x in range(self._screen.columns))
            for y in range(self._screen.lines)
        )  # fmt: skip
        return " ".join(lines).split()

    def _read(self) -> None:
        if select.select([self._leader], [], [], 0.05)[0]:
            try:
                self._stream.feed(os.read(self._leader, 65536))
            except OSError:  # the other end is closed
                time.sleep(0.05)


# Makes its standard input the terminal that controls it, so that Ctrl-C is a signal.
_CHILD = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
