"""The one error a user can cause, and others in one line."""

import re


class BacoError(ValueError):
    """Bad input. The message is one line: what was wrong, what was expected, what to do.

    The command line prints it to standard error and exits with 2; a server answers 4xx.
    """


class UnfitPairError(BacoError):
    """Two models that cannot be a pair as they are: to ``baco diagnose`` this is a verdict."""


class DamagedLogitsError(BacoError):
    """A model's logits are NaN or infinite; a server answers 500."""


class AnswerError(RuntimeError):
    """An answer broke off in this process, told in one line; a server answers 500."""


class UpstreamError(RuntimeError):
    """A server that decodes for this process failed, told in one line; a server answers 502."""


def failure(error: Exception) -> str:
    """What is told of an error that ended an answer; only its kind where nobody foresaw it."""
    if isinstance(error, BacoError):
        return str(error)
    return f"decoding this prompt failed ({type(error).__name__}); the log says more"


# What torch says on a GPU and on a CPU.
OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|allocate memory", re.IGNORECASE)
# Longer messages of other libraries are reports, which do not fit into one line.
MOST_CHARACTERS = 300


def one_line(error: BaseException) -> str:
    """Another library's message joined to one line; only its type where it is long or says nothing.

    The command line shows the whole of it with ``--debug``, Python as the error's cause.
    """
    message = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, LookupError | AttributeError | TypeError):
        message = f"{type(error).__name__}: {message}"  # means nothing without it
    return message if 0 < len(message) <= MOST_CHARACTERS else type(error).__name__


def prompt_too_long(tokens: int, name: str, context: int, *, more: bool = False) -> BacoError:
    """A prompt of so many tokens, or of ``more``, does not fit the context window of the base or
    the aligned model.
    """
    return BacoError(
        f"prompt of {'more than ' if more else ''}{tokens} tokens, as the {name} model reads it: "
        f"its context window is {context}; shorten the prompt"
    )
