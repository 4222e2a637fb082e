"""The error for bad input, and other errors in one line."""

import re
from dataclasses import dataclass
from typing import Literal


class BacoError(ValueError):
    """Bad input. The message is one line: what was wrong, what was expected, what to do.

    The command line prints it to standard error and exits with 2; a server answers 4xx.
    """


class UnfitPairError(BacoError):
    """Two models that are no pair as they are; ``baco diagnose`` reports this as its result."""


class DifferentTokenizersError(BacoError):
    """Two models whose tokenizers differ, where one tokenizer is needed."""


class ContextLengthError(BacoError):
    """A prompt that does not fit a context window; a server names it with OpenAI's code."""


class DamagedLogitsError(BacoError):
    """A model's logits are NaN or infinite; a server answers 500."""


class AnswerError(RuntimeError):
    """Decoding failed in this process, explained in one line; a server answers 500."""


class UpstreamError(RuntimeError):
    """A server that this process decodes on failed, explained in one line; a server answers 502."""


# What ended an answer in an error: its structure cannot be followed, decoding in this process
# failed, or a server that decodes it failed.
ErrorKind = Literal["structure", "process", "server"]


@dataclass(frozen=True, slots=True)
class Failure:
    """What ended an answer in an error: its kind, and the message in one line."""

    kind: ErrorKind
    message: str


def failure_message(error: Exception) -> str:
    """The message for an error that ended an answer; only its type where it is unexpected."""
    if isinstance(error, BacoError):
        return str(error)
    return f"decoding this prompt failed ({type(error).__name__}); the log says more"


# Torch's messages on a GPU and on a CPU.
OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|allocate memory", re.IGNORECASE)
# Longer messages of other libraries are whole reports.
MAX_MESSAGE = 300


def one_line(error: BaseException) -> str:
    """Another library's message on one line; only its type where the message is long or empty.

    The command line shows all of it with ``--debug``; in Python it is the error's cause.
    """
    message = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, LookupError | AttributeError | TypeError):
        message = f"{type(error).__name__}: {message}"  # unclear without it
    return shortened(message) or type(error).__name__


def shortened(message: str) -> str:
    """A message on one line; empty where it is longer than `MAX_MESSAGE`."""
    line = " ".join(message.split())
    return line if len(line) <= MAX_MESSAGE else ""


def prompt_too_long(
    tokens: int, name: str, context: int, *, more: bool = False
) -> ContextLengthError:
    """The error for a prompt that does not fit a context window.

    Args:
        tokens: of the prompt.
        name: ``base`` or ``aligned``, the model that reads it.
        context: the context window, in tokens.
        more: the prompt has more tokens than ``tokens``.
    """
    return ContextLengthError(
        f"prompt of {'more than ' if more else ''}{tokens} tokens, as the {name} model reads it: "
        f"its context window is {context}; shorten the prompt"
    )
