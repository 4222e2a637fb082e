"""Commands that stop by themselves at a given point, so that a test can end them there.

A test that watches a command and sends a signal loses the race on a busy machine: the command
ends first.
"""

import sys
from pathlib import Path

_PROGRAM = """
import sys, time
from pathlib import Path
from baco.batch import answer_file
from baco.cli import answers, main
from baco.engine.engine import Engine

def held_step(engine):
    while {when}:
        time.sleep(0.01)
    return step(engine)

answer_file.ANSWERS_A_WRITE = 2  # one prompt a write
answers.FRAMES_A_SECOND = 1e9  # what a step wrote is on the screen before the next
step, Engine.step = Engine.step, held_step
main()
"""


def held(arguments: list[str], when: str) -> list[str]:
    """`baco` in a process of its own, whose engine makes no step while ``when`` is true.

    ``when`` is a Python expression over ``engine`` and ``Path``.
    """
    return [sys.executable, "-c", _PROGRAM.format(when=when), *arguments]


def lines_in(path: Path, count: int) -> str:
    """The expression: a file has this many lines."""
    file = f"Path({str(path)!r})"
    return f"{file}.exists() and {file}.read_bytes().count(10) >= {count}"
