"""One prompt while it is open."""

from collections.abc import Callable
from dataclasses import dataclass

from baco.completion import Chunk
from baco.decoder import Decoder

Submit = Callable[[Decoder], int]
Deliver = Callable[[Chunk | Exception], None]


@dataclass(eq=False, slots=True)
class Job:
    """A prompt and who hears of it.

    Attributes:
        submit: hands the prompt to a decoder and returns its ticket.
        deliver: called from the decoder's thread with every chunk; with an exception, then nothing
            more follows.
        ticket: of the decoder that it is in, if it is in one.
    """

    submit: Submit
    deliver: Deliver
    ticket: int | None = None
