"""What a backend is: the engine that a decoder drives, and what it can keep of the laws."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from baco.engine.scoring import Scoring
from baco.engine.sequence import Request, SequenceState
from baco.errors import BacoError


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend keeps and can tell.

    Attributes:
        name: of the backend.
        replayable: the same seed gives the same answer, whatever the batch.
        explain: it can tell why each token has its source.
        token_switch: sources may change inside words (``switch="token"``).
        raw_logprobs: most likely tokens it tells at a position; None: any number.
        samplers: it runs the samplers that a request names.
    """

    name: str
    replayable: bool = True
    explain: bool = True
    token_switch: bool = True
    raw_logprobs: int | None = None
    samplers: bool = False

    def check(self, request: Request) -> None:
        """BacoError where a request asks for what the backend cannot give."""
        asked = request.params.logprobs or 0
        if request.explain and not self.explain:
            raise BacoError(f"the {self.name} backend cannot tell why a word has its source")
        if request.switch == "token" and not self.token_switch:
            raise BacoError(f"the {self.name} backend changes sources between words only")
        if request.params.samplers and not self.samplers:
            raise BacoError(
                f"the {self.name} backend cannot run {', '.join(request.params.samplers)}: leave "
                "samplers out, or use --backend local"
            )
        if self.raw_logprobs is not None and asked > self.raw_logprobs:
            raise BacoError(
                f"logprobs is {asked}: the {self.name} backend tells {self.raw_logprobs} at most"
            )


class Counts(Protocol):
    """Running totals of drafts."""

    @property
    def drafted(self) -> int:
        """Tokens that were drafted."""

    @property
    def accepted(self) -> int:
        """How many of them stood."""


class TokenEngine(Protocol):
    """Decodes token ids for one decoder; `baco.engine.engine.Engine` is the one of this process."""

    @property
    def stats(self) -> Counts:
        """What drafts came to."""

    def add(self, request: Request) -> list[SequenceState]:
        """Queue the n samples of a request.

        Raises:
            BacoError: a request that cannot be decoded.
        """

    def step(self) -> list[SequenceState]:
        """Go on, and wait a moment for news if need be; the sequences that got tokens or ended."""

    def stop(self, sequence: SequenceState, tokens: int) -> None:
        """End a sequence early and keep its first ``tokens`` tokens."""

    @property
    def busy(self) -> bool:
        """Is there anything left to decode?"""

    @property
    def waiting(self) -> int:
        """Sequences that are not being decoded yet."""

    @property
    def running(self) -> int:
        """Sequences that are being decoded."""


@runtime_checkable
class Scorer(Protocol):
    """An engine that can also tell how likely a text is."""

    def score(self, scoring: Scoring) -> None:
        """Queue a text to be scored; `Scoring.done` says when it was.

        Raises:
            BacoError: a text that there is no memory for.
        """

    def stop_scoring(self, scoring: Scoring) -> None:
        """Give a text up."""


class Backend(Protocol):
    """What decoders share: an engine's process, connections."""

    @property
    def capabilities(self) -> Capabilities:
        """What it keeps and can tell."""

    @property
    def ended(self) -> str | None:
        """What ended it for good, in one line; None while it decodes."""

    def engine(self) -> TokenEngine:
        """An engine for one decoder."""

    def close(self) -> None:
        """Let go of processes and connections."""
