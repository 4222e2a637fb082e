"""The one thread that owns the decoder: it admits, steps and cancels what other threads ask for.

It knows nothing of HTTP. Callers hand over a submission and a function that is called, from this
thread, with every chunk of the answer or with the error that ended it.
"""

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

from baco.completion import Chunk
from baco.decoder import Decoder

Deliver = Callable[[Chunk | Exception], None]
Submit = Callable[[Decoder], int]


class QueueFullError(Exception):
    """More requests are open than the driver was told to hold."""


@dataclass
class Driver:
    """Steps a decoder for as long as there is work.

    Attributes:
        make: builds an empty decoder; called in the thread that owns it.
        most: how many requests may be open at once, waiting ones included.
    """

    make: Callable[[], Decoder]
    most: int
    _asked: SimpleQueue[Callable[[], None] | None] = field(default_factory=SimpleQueue)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _open: dict[int, Deliver] = field(default_factory=dict)
    _keys: dict[int, int] = field(default_factory=dict)
    _tickets: dict[int, int] = field(default_factory=dict)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="baco-decoder", daemon=True)
        self._thread.start()

    def submit(self, submit: Submit, deliver: Deliver) -> int:
        """Queue a request from any thread.

        Args:
            submit: hands the request to the decoder and returns its ticket; what it raises is
                delivered and touches no other request.
            deliver: called with every chunk; with an exception, then nothing more follows.

        Returns:
            A key for `cancel`.

        Raises:
            QueueFullError: as many requests are open as may be.
        """
        with self._lock:
            if len(self._open) >= self.most:
                raise QueueFullError
            key = next(self._numbers)
            self._open[key] = deliver
        self._asked.put(lambda: self._admit(key, submit))
        return key

    def cancel(self, key: int) -> None:
        """Give a request up from any thread; its rows leave the batch before the next step."""
        self._asked.put(lambda: self._give_up(key))

    def close(self) -> None:
        """Stop the thread after what it is doing; open requests get nothing more."""
        self._asked.put(None)
        self._thread.join()

    @property
    def open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def _run(self) -> None:
        self._decoder = self.make()
        while True:
            while not (self._asked.empty() and self._decoder.busy):
                task = self._asked.get()
                if task is None:
                    return
                task()
            try:
                chunks = self._decoder.step()
            except Exception as error:
                self._fail(error)
                continue
            for chunk in chunks:
                self._tell(chunk)

    def _admit(self, key: int, submit: Submit) -> None:
        if key not in self._open:
            return
        try:
            ticket = submit(self._decoder)
        except Exception as error:
            self._end(key)(error)
            return
        self._tickets[key], self._keys[ticket] = ticket, key

    def _give_up(self, key: int) -> None:
        if key in self._tickets:
            self._decoder.cancel(self._tickets[key])
        if key in self._open:
            self._end(key)

    def _tell(self, chunk: Chunk) -> None:
        key = self._keys.get(chunk.prompt)
        if key is None:
            return
        deliver = self._open[key]
        if chunk.finish_reason is not None and not self._decoder.holds(chunk.prompt):
            self._end(key)
        deliver(chunk)

    def _fail(self, error: Exception) -> None:
        """A step that raised leaves the batch unknown: its requests end, a new decoder follows."""
        for key in list(self._tickets):
            self._end(key)(error)
        self._decoder = self.make()

    def _end(self, key: int) -> Deliver:
        ticket = self._tickets.pop(key, None)
        if ticket is not None:
            del self._keys[ticket]
        with self._lock:
            return self._open.pop(key)
