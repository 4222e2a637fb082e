"""The one error a user can cause, and how others are told."""


class BacoError(ValueError):
    """Bad input, told in one line: what was wrong, what was expected, what to do.

    The command line prints it to standard error and exits with 2; a server answers 4xx.
    """


class UnfitPairError(BacoError):
    """Two models that cannot be a pair as they are: to ``baco diagnose`` this is a verdict."""


class AnswerError(RuntimeError):
    """An answer broke off in this process, told in one line; a server answers 500."""


class UpstreamError(RuntimeError):
    """A server that decodes for this process failed, told in one line; a server answers 502."""


def failure(error: Exception) -> str:
    """What is told of an error that ended an answer; only its kind where nobody foresaw it."""
    if isinstance(error, BacoError):
        return str(error)
    return f"decoding this prompt failed ({type(error).__name__}); the log says more"


def prompt_too_long(tokens: int, name: str, context: int, *, more: bool = False) -> BacoError:
    """A prompt of so many tokens, or of ``more``, does not fit the context window of the base or
    the aligned model.
    """
    return BacoError(
        f"prompt of {'more than ' if more else ''}{tokens} tokens, as the {name} model reads it: "
        f"its context window is {context}; shorten the prompt"
    )
