"""One answer while it grows: its prompt's two token lists, its tokens, their sources."""

from dataclasses import dataclass, field
from typing import Any, Literal

from baco.routing.router import Router
from baco.routing.word_boundaries import Switch
from baco.sampling.params import SamplingParams
from baco.sampling.seeds import noise_seed
from baco.source import Source

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """n samples to draw from one prompt.

    Attributes:
        base_ids, aligned_ids: the prompt as each half reads it.
        params: seeded sampling parameters.
        router: names the source at every boundary.
        switch: ``word``, or ``token`` to let sources change inside words.
        index: which of the caller's prompts this is.
        explain: also tell why each token has its source; both halves then read every token.
        digest: of the prompt, see :mod:`baco.sampling.seeds`.
        noise_seed: of this prompt's draws.
    """

    base_ids: tuple[int, ...]
    aligned_ids: tuple[int, ...]
    params: SamplingParams
    router: Router
    switch: Switch = "word"
    index: int = 0
    explain: bool = False
    digest: bytes = field(kw_only=True)
    noise_seed: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_seed", noise_seed(self.params.seed or 0, self.digest))

    def ids(self, half: str) -> tuple[int, ...]:
        """The prompt as a half reads it; a draft model reads the aligned one's."""
        return self.base_ids if half == "base" else self.aligned_ids

    def needs(self, half: str) -> bool:
        """Is a half ever read for it? One that its router never names is not."""
        return self.explain or self.router.only is None or half in (self.router.only, "draft")


@dataclass(frozen=True, slots=True)
class Why:
    """What the router saw where a token was drawn.

    Attributes:
        base_logprob, aligned_logprob: of the token, under each half, in nats.
        max_base: max P_base.
        entropy_base: H(P_base) in nats.
        predicted: the base model's most likely token.
        asked: whether the position was a boundary; elsewhere the active source went on.
        wanted: the source the router names there.
    """

    base_logprob: float
    aligned_logprob: float
    max_base: float
    entropy_base: float
    predicted: int
    asked: bool
    wanted: Source


@dataclass(slots=True, eq=False)
class SequenceState:
    """Sample ``sample`` of a request. The engine appends; readers look.

    ``limit`` is the most tokens it may get: ``max_tokens``, or less where a context window ends.
    ``error`` says what ended an answer whose ``finish_reason`` is ``error``: a backend elsewhere
    failed, and the answer alone is lost.
    """

    request: Request
    sample: int
    limit: int
    tokens: list[int] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    why: list[Why] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def _columns(self) -> tuple[list[Any], ...]:
        return self.tokens, self.sources, self.logprobs, self.top_logprobs, self.why

    @property
    def whole(self) -> int:
        """How many tokens have all that is kept of a token."""
        tops, why = self.request.params.logprobs, self.request.explain
        kept = (True, True, True, bool(tops), why)
        return min(len(one) for one, asked in zip(self._columns, kept, strict=True) if asked)

    def cut(self, tokens: int) -> None:
        """Keep only the first ``tokens`` tokens."""
        for column in self._columns:
            del column[tokens:]

    def extend(self, other: "SequenceState", known: int) -> None:
        """Append what another sequence of the same sample has after its first ``known`` tokens."""
        for mine, theirs in zip(self._columns, other._columns, strict=True):
            mine.extend(theirs[known:])
