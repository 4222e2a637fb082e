"""The one error a user can cause."""


class BacoError(ValueError):
    """Bad input, told in one line: what was wrong, what was expected, what to do.

    The command line prints it to standard error and exits with 2; a server answers 4xx.
    """


class UnfitPairError(BacoError):
    """Two models that cannot be a pair as they are: to ``baco diagnose`` this is a verdict."""


class UpstreamError(RuntimeError):
    """A server that decodes for this process failed, told in one line; a server answers 502."""
