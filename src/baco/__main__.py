"""The program `baco`, also where none is on the path: ``python -m baco``."""

import os
import signal
from types import FrameType

_SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it


def main() -> None:
    """Run the command line. An interrupt ends it in one line from the first import on."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    from baco.cli import main as run_command_line  # it imports for half a second

    run_command_line()


def _interrupt(_: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but end at once where a module is being imported: a library whose
    import is interrupted aborts the process, or is reported as not installed.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, _SHOW_CURSOR * os.isatty(2) + b"baco: interrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
