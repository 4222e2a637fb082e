"""One size for every fuzzer: a small budget by default, a larger one with ``pytest --fuzz N``."""

times = 1  # set by `conftest.pytest_configure`


def budget(cases: int) -> int:
    """Cases for a fuzzer to try, ``cases`` by default.

    Works in decorators too: ``@settings(max_examples=budget(60))``. A fuzzer that draws its own
    cases seeds each with its number, so that a larger budget starts with the usual cases.
    """
    return cases * times
