"""A request, and the sequences that are its n samples while they are decoded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from baco.errors import Failure
from baco.routing.adaptive import ALIKE_TOKENS
from baco.routing.router import ConstantRouter, Router
from baco.routing.word_boundaries import Switch
from baco.sampling.constraint import Automaton, Constraint, Following
from baco.sampling.params import SamplingParams
from baco.sampling.seeds import noise_seed
from baco.source import Source
from baco.text.shared_text import SharedText
from baco.text.thinking import ThinkingTokens

FinishReason = Literal["stop", "length", "error"]
# Of a sequence: it may begin to think, it thinks, it has ended its thinking and the answer has not
# begun, it answers.
Phase = Literal["before", "thinking", "after", "answer"]


# Draft tokens of a row in one step, at most.
MAX_DRAFT_TOKENS = 8
# How many ids a model may have for the text of a token that the other model drew, on average.
_IDS_PER_TOKEN = 4
# The router while a sequence thinks.
_ALIGNED = ConstantRouter("aligned")


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """n samples to draw from one prompt.

    Attributes:
        base_ids, aligned_ids: the prompt as each model reads it.
        params: sampling parameters, with a seed.
        router: picks the source at every word boundary.
        switch: ``word``, or ``token`` to let the source change inside words.
        index: of the prompt among the caller's.
        explain: also record why each token has its source; both models then read every token.
        thinking: how the thinking of the aligned model is recognised; None where it cannot think.
        digest: of the prompt, see :mod:`baco.sampling.seeds`.
        cache_salt: requests with different salts share no kept prefix.
        shares_text: the models have different tokenizers, and ids of their own for the answer.
        constraint: what the answer has to be; None where anything goes. Where the tokenizers
            differ, over the aligned model's tokens.
        base_constraint: the same over the base model's tokens, where the tokenizers differ.
        noise_seed: of this prompt's draws.
    """

    base_ids: tuple[int, ...]
    aligned_ids: tuple[int, ...]
    params: SamplingParams
    router: Router
    switch: Switch = "word"
    index: int = 0
    explain: bool = False
    thinking: ThinkingTokens | None = None
    digest: bytes = field(kw_only=True)
    cache_salt: str = field(default="", kw_only=True)
    shares_text: bool = field(default=False, kw_only=True)
    constraint: Constraint | None = field(default=None, kw_only=True)
    base_constraint: Constraint | None = field(default=None, kw_only=True)
    noise_seed: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_seed", noise_seed(self.params.seed or 0, self.digest))

    def ids(self, model: str) -> tuple[int, ...]:
        """The prompt as a model reads it; a draft model reads the aligned model's."""
        return self.base_ids if model == "base" else self.aligned_ids

    def needs(self, model: str) -> bool:
        """Whether a model is ever run for it. A model that its router never picks is not."""
        return self.explain or self.router.only is None or model in (self.router.only, "draft")


@dataclass(frozen=True, slots=True)
class Why:
    """Why a token has its source.

    Attributes:
        base_logprob, aligned_logprob: of the token under each model, in nats.
        max_base: max P_base.
        entropy_base: H(P_base) in nats.
        predicted: the base model's most likely token.
        asked: whether the position is a boundary. Elsewhere the active source continued.
        wanted: the router's choice there; None where a combiner mixed both models' rows.
    """

    base_logprob: float
    aligned_logprob: float
    max_base: float
    entropy_base: float
    predicted: int
    asked: bool
    wanted: Source | None


@dataclass(slots=True, eq=False)
class SequenceState:
    """Sample ``sample`` of a request while it is decoded. Only the engine changes it.

    Attributes:
        limit: the most tokens it may get: ``max_tokens``, or fewer where a context window ends.
        answer_limit: the most tokens after the thinking, where the base model's window ends there.
        tokens, sources, logprobs: of the thinking and the answer so far, one entry per token. The
            source of a token that a combiner drew from both models is None.
        top_logprobs, why: the same, where the request wants them.
        phase: the aligned model alone is read until the answer begins.
        num_thinking: how many of the tokens are thinking, the marks around it included. The base
            model does not read these.
        error: what went wrong, where ``finish_reason`` is ``error`` or will be after the step.
        cached_tokens: tokens of the aligned model's prompt that an earlier request had read.
        earlier: the lower-numbered samples of the request, where its router reads them.
        endings: each `ending` that the sequence has had → the first length at which it had it.
            Filled only where the router of the request reads it. `cut` does not shorten it.
        num_base_at, num_fresh_at: entry i counts the first i tokens: those whose source is base,
            and those that are fresh (:class:`baco.routing.signals.Siblings`). Filled where
            ``endings`` is.
        shared_text: the answer in the ids of each model, where the tokenizers differ. Then each
            token is an id of its source.
    """

    request: Request
    sample: int
    limit: int
    answer_limit: int | None = None
    tokens: list[int] = field(default_factory=list)
    sources: list[Source | None] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    why: list[Why] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: Failure | None = None
    cached_tokens: int = 0
    phase: Phase = field(init=False)
    num_thinking: int = 0
    shared_text: SharedText | None = None
    earlier: Sequence["SequenceState"] = ()
    endings: dict[tuple[int | None, ...], int] = field(default_factory=dict)
    num_base_at: list[int] = field(default_factory=lambda: [0])
    num_fresh_at: list[int] = field(default_factory=lambda: [0])
    _automata: dict[Source, Automaton] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        thinking = self.request.thinking
        self.phase = (
            "answer" if thinking is None else "before" if thinking.begin is not None else "thinking"
        )

    @property
    def router(self) -> Router:
        """Picks the source at the next boundary."""
        return self.request.router if self.phase == "answer" else _ALIGNED

    def needs(self, model: str) -> bool:
        """Whether a model is run for its next token."""
        if self.phase != "answer":
            return model != "base"
        return self.request.needs(model)

    def tokens_of(self, model: str) -> list[int]:
        """Its tokens, as a model reads them: the base model reads no thinking, and each model its
        own ids where the tokenizers differ.
        """
        if self.shared_text is not None:
            return self.shared_text.own[model].ids
        return self.answer if model == "base" else self.tokens

    @property
    def automaton(self) -> Automaton | None:
        """The automaton that follows its answer through its structure; None without a structure,
        while it thinks, and after an error.
        """
        return self._automaton_of("aligned", self.request.constraint)

    def _automaton_of(self, model: Source, constraint: Constraint | None) -> Automaton | None:
        if constraint is None or self.phase != "answer" or self.error is not None:
            return None
        if model not in self._automata:
            self._automata[model] = constraint.begin()
        return self._automata[model]

    def following(self, model: Source) -> Following | None:
        """What its structure allows a model to write next, where the tokenizers differ; None where
        anything goes. The model must have ids for the whole text.
        """
        request = self.request
        constraint = request.base_constraint if model == "base" else request.constraint
        if constraint is None:
            return None
        automaton = self._automaton_of(model, constraint)
        if automaton is None:
            return Following(constraint.before)
        assert self.shared_text is not None
        ids = self.tokens_of(model)
        ids = ids[self.num_thinking :] if model == "aligned" and self.num_thinking else ids
        return automaton.after(bytes(self.shared_text.data), ids)

    @property
    def answer(self) -> list[int]:
        """Its tokens without those of the thinking."""
        return self.tokens[self.num_thinking :] if self.num_thinking else self.tokens

    @property
    def most_ids(self) -> int:
        """The most ids that a model may hold of its answer."""
        return self.limit * _IDS_PER_TOKEN if self.request.shares_text else self.limit

    def ending(self, length: int) -> tuple[int | None, ...]:
        """The last `ALIKE_TOKENS` of its first ``length`` tokens, padded with None on the left."""
        tokens = self.tokens[max(0, length - ALIKE_TOKENS) : length]
        return (*[None] * (ALIKE_TOKENS - len(tokens)), *tokens)

    def note_endings(self, length: int) -> None:
        """Add its endings from ``length`` tokens on to ``endings``, which later samples read."""
        for position in range(length, len(self.tokens) + 1):
            self.endings.setdefault(self.ending(position), position)

    def count_tokens(self) -> None:
        """Extend ``num_base_at`` and ``num_fresh_at`` to its new tokens. Call `note_endings` first,
        on it and on the earlier samples.
        """
        for length in range(len(self.num_base_at), len(self.tokens) + 1):
            self.num_base_at.append(self.num_base_at[-1] + (self.sources[length - 1] == "base"))
            self.num_fresh_at.append(self.num_fresh_at[-1] + (self.alike(length) == 0))

    def alike(self, length: int) -> int:
        """How many earlier samples had its ending after ``length`` tokens, at that length or a
        shorter one.
        """
        ending = self.ending(length)
        return sum(other.endings.get(ending, length + 1) <= length for other in self.earlier)

    @property
    def sibling_counts(self) -> tuple[int, ...]:
        """What :class:`baco.routing.signals.Siblings` holds before its next token, in the order of
        the attributes there.
        """
        samples, length = (*self.earlier, self), len(self.tokens)
        lengths = [min(length, len(sample.num_base_at) - 1) for sample in samples]
        pairs = list(zip(samples, lengths, strict=True))
        return (
            len(self.earlier),
            self.alike(length),
            self.num_fresh_at[-1],
            sum(lengths),
            sum(sample.num_base_at[at] for sample, at in pairs),
            sum(lengths[1:]),
            sum(sample.num_fresh_at[at] for sample, at in pairs[1:]),
        )

    def think(self, token: int) -> bool:
        """Move to the phase that follows from the aligned model's next token.

        Returns:
            Whether the token belongs to the thinking. If not, drop it: the answer begins in its
            place, and the router decides which model writes there.
        """
        thinking = self.request.thinking
        assert thinking is not None
        if self.phase == "before":
            self.phase = "thinking" if token == thinking.begin else "answer"
        elif self.phase == "thinking":
            self.phase = "after" if token == thinking.end else "thinking"
        elif token not in thinking.separators:
            self.phase = "answer"
        if self.phase != "answer":
            self.num_thinking += 1
            return True
        if self.answer_limit is not None:
            self.limit = min(self.limit, self.num_thinking + self.answer_limit)
        return False

    @property
    def _columns(self) -> tuple[list[Any], ...]:
        return self.tokens, self.sources, self.logprobs, self.top_logprobs, self.why

    @property
    def num_complete(self) -> int:
        """How many tokens have all their entries. A step that raised may leave one without."""
        wanted = (True, True, True, bool(self.request.params.logprobs), self.request.explain)
        columns = zip(self._columns, wanted, strict=True)
        return min(len(column) for column, is_wanted in columns if is_wanted)

    def cut(self, tokens: int) -> None:
        """Keep only the first ``tokens`` tokens."""
        for column in self._columns:
            del column[tokens:]
        self.num_thinking = min(self.num_thinking, tokens)

    def extend(self, other: "SequenceState", start: int) -> None:
        """Append the tokens that another sequence of the same sample has from ``start`` on."""
        for mine, theirs in zip(self._columns, other._columns, strict=True):
            mine.extend(theirs[start:])
        self.phase, self.num_thinking, self.limit = other.phase, other.num_thinking, other.limit
        self.endings = other.endings
        self.num_base_at, self.num_fresh_at = other.num_base_at, other.num_fresh_at
