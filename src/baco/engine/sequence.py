"""One answer while it grows: its prompt's two token lists, its tokens, their sources."""

from dataclasses import dataclass, field
from typing import Literal

from baco.routing.routers import Source
from baco.sampling import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Request:
    """n samples to draw from one prompt.

    Attributes:
        base_ids, aligned_ids: the prompt as each half reads it.
        params: seeded sampling parameters.
        index: which of the caller's prompts this is.
    """

    base_ids: tuple[int, ...]
    aligned_ids: tuple[int, ...]
    params: SamplingParams
    index: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """Sample ``sample`` of a request. The engine appends; readers look.

    ``limit`` is the most tokens it may get: ``max_tokens``, or less where a context window ends.
    """

    request: Request
    sample: int
    limit: int
    tokens: list[int] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
