"""A prompt that is queued or being decoded."""

from collections.abc import Callable
from dataclasses import dataclass

from baco.decoder import Decoder, Scored
from baco.outputs import Chunk

Submit = Callable[[Decoder], int]
Deliver = Callable[[Chunk | Scored | Exception], None]
# Gets a function to call between pieces of work, which raises if the job was cancelled.
Prepare = Callable[[Callable[[], None]], None]


@dataclass(eq=False, slots=True)
class Job:
    """A prompt, and where its results go.

    Attributes:
        submit: gives the prompt to a decoder and returns its ticket.
        deliver: called in the engine thread with every result. An exception is the last one.
        prepare: called before, in another thread.
        size: characters to prepare; long prompts do not delay short ones.
        answers: how many are asked for.
        ticket: in the decoder; None before it is submitted.
    """

    submit: Submit
    deliver: Deliver
    prepare: Prepare | None = None
    size: int = 0
    answers: int = 1
    ticket: int | None = None
