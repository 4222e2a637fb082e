"""One prompt while it is open."""

from collections.abc import Callable
from dataclasses import dataclass

from baco.decoder import Decoder, Scored
from baco.outputs import Chunk

Submit = Callable[[Decoder], int]
Deliver = Callable[[Chunk | Scored | Exception], None]
# Given what is to be called between pieces of work, which raises where the job was given up.
Prepare = Callable[[Callable[[], None]], None]


@dataclass(eq=False, slots=True)
class Job:
    """A prompt and who hears of it.

    Attributes:
        submit: hands the prompt to a decoder and returns its ticket.
        deliver: called from the decoder's thread with all that comes of it; with an exception, then
            nothing more follows.
        prepare: what is to be done before, in another thread than the decoder's.
        size: characters of what is prepared; long prompts do not hold up short ones.
        answers: that it asks for.
        ticket: of the decoder that it is in, if it is in one.
    """

    submit: Submit
    deliver: Deliver
    prepare: Prepare | None = None
    size: int = 0
    answers: int = 1
    ticket: int | None = None
