"""Measurements and studies, run from the repository as ``python -m benchmarks.NAME``."""

import sys
from collections.abc import Callable

from baco.cli.console import complain
from baco.errors import BacoError


def launch(main: Callable[[], int | None]) -> None:
    """Run a benchmark and exit. Bad input, or a file that is not there, is one line on standard
    error and exit code 2.
    """
    try:
        code = main()
    except (BacoError, OSError) as error:
        complain(str(error), error)
        code = 2
    sys.exit(code)
