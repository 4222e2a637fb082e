"""From chunks to what OpenAI's API calls choices: texts, log-probabilities, provenance."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby

from baco.engine.sequence import Why
from baco.models.pair import Pair
from baco.outputs import Chunk, Completion, Token
from baco.serve.response_models import (
    ChatLogprobs,
    Provenance,
    TextLogprobs,
    TokenLogprob,
    TopLogprob,
    WhyToken,
)
from baco.source import Source
from baco.text.answer_text import Piece, name_of
from baco.text.prompts import Prompt

# JSON has no infinity; this is how OpenAI writes a token that cannot be.
IMPOSSIBLE = -9999.0


@dataclass
class Choice:
    """One answer while it is told.

    Attributes:
        pair: spells its tokens.
        explain: tell of every token why it has its source.
        ids: tell token ids beside the text.
        named: name tokens by their ids in the older endpoint's log-probabilities, where end tokens
            then stand too.
        tokens: so far.
        base, switches: counted so far.
        why: of the tokens so far, if asked.
        prompt: its prompt, once the decoder has taken that.
        completion: the answer, once it has ended.
    """

    pair: Pair
    explain: bool = False
    ids: bool = False
    named: bool = False
    tokens: list[Token] = field(default_factory=list)
    base: int = 0
    switches: int = 0
    why: list[WhyToken] = field(default_factory=list)
    prompt: Prompt | None = None
    completion: Completion | None = None
    _last: Source | None = None

    def take(self, chunk: Chunk) -> Provenance:
        """Count a chunk in; what it brings, and how the answer stands with it."""
        for token in chunk.tokens:
            self.base += token.source == "base"
            self.switches += self._last not in (None, token.source)
            self._last = token.source
        self.tokens += chunk.tokens
        told = Provenance(
            sources=stretches(chunk.pieces),
            base_share=round(self.base / len(self.tokens), 4) if self.tokens else 0.0,
            switches=self.switches,
        )
        if self.explain:
            told.why = [self._why(token) for token in chunk.tokens]
            self.why += told.why
        if chunk.completion is not None:
            self.completion = chunk.completion
            _settle(told, chunk.completion)
        return told

    def whole(self) -> Provenance:
        """The provenance of the answer, which has ended."""
        assert self.completion is not None
        told = Provenance(sources=stretches(self.completion.pieces), base_share=0, switches=0)
        if self.explain:
            told.why = self.why
        _settle(told, self.completion)
        return told

    def _why(self, token: Token) -> WhyToken:
        why = token.why
        if why is None:
            return WhyToken(text=token.text, source=token.source)
        return WhyToken(
            text=token.text,
            source=token.source,
            base=math.exp(why.base_logprob),
            aligned=math.exp(why.aligned_logprob),
            max_base=why.max_base,
            entropy_base=why.entropy_base,
            predicted=self._predicted(why),
            asked=why.asked,
            wanted=why.wanted,
        )

    def _predicted(self, why: Why) -> str:
        if self.pair.vocabulary.special[why.predicted]:
            return ""
        return self.pair.spelling(why.predicted).decode(errors="replace")

    def chat_logprobs(self, tokens: Iterable[Token]) -> ChatLogprobs:
        """Of new tokens, as chat choices tell them; without what ended the answer."""
        content = [
            TokenLogprob(
                **self._logprob(token.id, token.logprob).model_dump(),
                top_logprobs=[self._logprob(*pair) for pair in (token.top_logprobs or {}).items()],
            )
            for token in tokens
            if token.id not in self.pair.end_ids
        ]
        return ChatLogprobs(content=content)

    def text_logprobs(self, tokens: Iterable[Token]) -> TextLogprobs:
        """Of new tokens, as the older endpoint's choices tell them."""
        told = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token in tokens:
            ends = token.id in self.pair.end_ids
            if ends and not self.named:
                continue
            told.tokens.append(self._called(token.id))
            told.token_logprobs.append(finite(token.logprob))
            told.top_logprobs.append(self._table(token.top_logprobs or {}))
            told.text_offset.append(token.offset)
        return told

    def _table(self, top: Mapping[int, float]) -> dict[str, float]:
        return {self._called(id_): finite(logprob) for id_, logprob in top.items()}

    def _called(self, token: int) -> str:
        return by_id(token) if self.named else name_of(self.pair.spelling(token))

    def _logprob(self, token: int, logprob: float) -> TopLogprob:
        spelled = self.pair.spelling(token)
        return TopLogprob(token=name_of(spelled), logprob=finite(logprob), bytes=list(spelled))


def by_id(token: int) -> str:
    """A token's name where it is named by its id, as vLLM does."""
    return f"token_id:{token}"


def stretches(pieces: Iterable[Piece]) -> list[tuple[str, Source]]:
    """Pieces, neighbours of one source as one."""
    return [
        ("".join(piece.text for piece in same), source)
        for source, same in groupby(pieces, key=lambda piece: piece.source)
    ]


def _settle(told: Provenance, completion: Completion) -> None:
    """What is told of whole answers only, and their own counts."""
    told.base_share, told.switches = round(completion.base_share, 4), completion.switches
    told.router, told.seed, told.date = completion.router, completion.seed, completion.date


def finite(logprob: float) -> float:
    """A log-probability as JSON can hold it."""
    return max(logprob, IMPOSSIBLE)
