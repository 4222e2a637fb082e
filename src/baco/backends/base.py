"""The protocols of a backend and of its engine, and what a backend supports."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from baco.engine.scoring import Scoring
from baco.engine.sequence import Request, SequenceState
from baco.errors import BacoError
from baco.routing.combiners import Combination
from baco.routing.router import hidden_widths, is_stateful, reads_structure
from baco.sampling.structure import Structure


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend supports.

    Attributes:
        name: of the backend.
        replayable: the same seed gives the same answer, whatever the batch.
        explain: it can return why each token has its source.
        raw_logprobs: the number of most likely tokens that it returns at a position; None for any.
        samplers: it runs the samplers that a request names.
        thinking: it lets the aligned model think before the answer.
        combiners: it runs combiners, which need both models' whole rows.
        stateful: its routers can read the answers so far, and where they are in their structures.
        structured: it holds answers to a schema, regex, choice or grammar.
        unstructured_since: why it does not, for the error.
        hidden_states: its routers can read the models' hidden states.
    """

    name: str
    replayable: bool = True
    explain: bool = True
    raw_logprobs: int | None = None
    samplers: bool = False
    thinking: bool = False
    combiners: bool = False
    stateful: bool = False
    structured: bool = False
    unstructured_since: str = "it takes no masks"
    hidden_states: bool = False

    def check(self, request: Request) -> None:
        """Raise BacoError for a request that needs what the backend does not support."""
        logprobs = request.params.logprobs or 0
        if request.explain and not self.explain:
            raise BacoError(f"the {self.name} backend cannot tell why a word has its source")
        if request.params.samplers and not self.samplers:
            raise BacoError(
                f"the {self.name} backend cannot run {', '.join(request.params.samplers)}: leave "
                "samplers out, or use --backend local"
            )
        if request.params.structure is not None:
            self.check_structure(request.params.structure)
        if request.params.reads_history and not self.samplers:
            raise BacoError(
                f"the {self.name} backend has neither DRY nor a repetition window: leave "
                "dry_multiplier and repetition_window out, or use --backend local"
            )
        if isinstance(request.router, Combination) and not self.combiners:
            raise BacoError(
                f"the {self.name} backend cannot run the combiner {request.router.spelling}, which "
                "needs both models' whole distributions: use a router, or --backend local"
            )
        if request.thinking is not None and not self.thinking:
            raise BacoError(
                f"the {self.name} backend cannot keep the thinking of the aligned model apart: "
                "turn it off (--no-thinking), or use --backend local"
            )
        if is_stateful(request.router) and not self.stateful:
            raise BacoError(
                f"the {self.name} backend cannot run {request.router.spelling}, which reads the "
                "answer so far: use --backend local, or another router"
            )
        structure = request.params.structure
        if structure is not None and reads_structure(request.router) and not self.stateful:
            raise BacoError(
                f"the {self.name} backend cannot run {request.router.spelling} with a "
                f"{structure.kind}, since it reads where free text is in the answer: use --backend "
                "local, or another router"
            )
        if hidden_widths(request.router) and not self.hidden_states:
            raise BacoError(
                f"the {self.name} backend cannot run {request.router.spelling}, which reads hidden "
                "states: use --backend local and a pair with one tokenizer, or another router"
            )
        if self.raw_logprobs is not None and logprobs > self.raw_logprobs:
            raise BacoError(
                f"logprobs is {logprobs}: the {self.name} backend returns at most "
                f"{self.raw_logprobs}"
            )

    def check_structure(self, structure: Structure) -> None:
        """Raise BacoError where the backend cannot hold answers to a structure."""
        if not self.structured:
            raise BacoError(
                f"the {self.name} backend cannot hold answers to a {structure.kind}, since "
                f"{self.unstructured_since}: leave it out, or use --backend local or vllm"
            )


class Counts(Protocol):
    """Running totals of draft tokens."""

    @property
    def drafted(self) -> int:
        """Draft tokens."""

    @property
    def accepted(self) -> int:
        """Draft tokens that were accepted."""


class TokenEngine(Protocol):
    """Decodes token ids for one decoder; `baco.engine.engine.Engine` is the one of this process."""

    @property
    def stats(self) -> Counts:
        """Totals of draft tokens."""

    def add(self, request: Request) -> list[SequenceState]:
        """Queue the n samples of a request.

        Raises:
            BacoError: the request cannot be decoded.
        """

    def step(self) -> list[SequenceState]:
        """Decode further, or wait a moment; return the sequences that got tokens or ended."""

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
    """An engine that can also score texts."""

    def score(self, scoring: Scoring) -> None:
        """Queue a text to be scored; `Scoring.done` becomes true when it has been.

        Raises:
            BacoError: the text does not fit into memory.
        """

    def stop_scoring(self, scoring: Scoring) -> None:
        """Stop scoring a text."""


class Backend(Protocol):
    """What the engines of several decoders share, such as a process or connections."""

    @property
    def capabilities(self) -> Capabilities:
        """What it supports."""

    @property
    def ended(self) -> str | None:
        """The error that ended it for good, in one line; None while it can decode."""

    def engine(self) -> TokenEngine:
        """An engine for one decoder."""

    def close(self) -> None:
        """Close processes and connections."""
