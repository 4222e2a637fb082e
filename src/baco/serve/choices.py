"""Turns the chunks of answers into the choices of OpenAI's API, with their provenance."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

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
from baco.text.answer_text import merge_pieces, name_of
from baco.text.prompts import Prompt

# JSON has no infinity. OpenAI writes this for a token of probability 0.
IMPOSSIBLE = -9999.0


@dataclass
class Choice:
    """One answer while it is sent.

    Attributes:
        pair: spells the tokens.
        explain: report why each token has its source.
        ids: report token ids beside the text.
        named: in the log-probabilities of ``/v1/completions``, name tokens by their ids.
        ends: include end tokens there.
        tokens: so far.
        base: tokens so far whose source is base.
        mixed: whether any token so far comes from both models.
        switches: changes of the source so far.
        why: of the tokens so far, if asked for.
        prompt: as the decoder accepted it.
        completion: the answer, once it has ended.
    """

    pair: Pair
    explain: bool = False
    ids: bool = False
    named: bool = False
    ends: bool = False
    tokens: list[Token] = field(default_factory=list)
    base: int = 0
    mixed: bool = False
    switches: int = 0
    why: list[WhyToken] = field(default_factory=list)
    prompt: Prompt | None = None
    completion: Completion | None = None
    _last: Source | None = None

    def add(self, chunk: Chunk) -> Provenance:
        """Add a chunk, and return the provenance of its text with the totals so far."""
        for token in chunk.tokens:
            self.base += token.source == "base"
            self.mixed |= token.source is None
            self.switches += self._last not in (None, token.source)
            self._last = token.source
        self.tokens += chunk.tokens
        provenance = Provenance(
            sources=merge_pieces(chunk.pieces),
            base_share=None if self.mixed else round(self.base / max(len(self.tokens), 1), 4),
            switches=None if self.mixed else self.switches,
        )
        if self.explain:
            provenance.why = [self._why(token) for token in chunk.tokens]
            self.why += provenance.why
        if chunk.completion is not None:
            self.completion = chunk.completion
            _set_totals(provenance, chunk.completion)
        return provenance

    def whole(self) -> Provenance:
        """The provenance of the answer, which has ended."""
        assert self.completion is not None
        provenance = Provenance(
            sources=merge_pieces(self.completion.pieces), base_share=0, switches=0
        )
        if self.explain:
            provenance.why = self.why
        _set_totals(provenance, self.completion)
        return provenance

    def _why(self, token: Token) -> WhyToken:
        why = token.why
        if why is None:
            return WhyToken(text=token.text, source=token.source)
        return WhyToken(
            text=token.text,
            source=token.source,
            base=_known(math.exp(why.base_logprob)),
            aligned=_known(math.exp(why.aligned_logprob)),
            max_base=_known(why.max_base),
            entropy_base=_known(why.entropy_base),
            predicted=self._predicted(why),
            asked=why.asked,
            wanted=why.wanted,
        )

    def _predicted(self, why: Why) -> str:
        vocabulary = self.pair.vocabulary_of("base")
        if why.predicted < 0 or vocabulary.special[why.predicted]:
            return ""
        return self.pair.spelling(why.predicted, "base").decode(errors="replace")

    def chat_logprobs(self, tokens: Iterable[Token]) -> ChatLogprobs:
        """Log-probabilities of new tokens for a chat choice; end tokens are left out."""
        content = [
            TokenLogprob(
                **self._logprob(token.id, token.logprob, _owner(token)).model_dump(),
                top_logprobs=[
                    self._logprob(id_, logprob, _owner(token))
                    for id_, logprob in (token.top_logprobs or {}).items()
                ],
            )
            for token in tokens
            if token.id not in self.pair.end_ids_of(_owner(token))
        ]
        return ChatLogprobs(content=content)

    def text_logprobs(self, tokens: Iterable[Token]) -> TextLogprobs:
        """Log-probabilities of new tokens for a choice of ``/v1/completions``."""
        logprobs = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token in tokens:
            if not self.ends and token.id in self.pair.end_ids_of(_owner(token)):
                continue
            logprobs.tokens.append(self._name(token.id, _owner(token)))
            logprobs.token_logprobs.append(finite(token.logprob))
            # The drawn token is added where it is not among the most likely ones.
            top = {**(token.top_logprobs or {}), token.id: token.logprob}
            logprobs.top_logprobs.append(self._table(top, _owner(token)))
            logprobs.text_offset.append(token.offset)
        return logprobs

    def _table(self, top: Mapping[int, float], source: Source) -> dict[str, float]:
        return {self._name(id_, source): finite(logprob) for id_, logprob in top.items()}

    def _name(self, token: int, source: Source) -> str:
        return token_id_name(token) if self.named else name_of(self.pair.spelling(token, source))

    def _logprob(self, token: int, logprob: float, source: Source) -> TopLogprob:
        spelling = self.pair.spelling(token, source)
        return TopLogprob(token=name_of(spelling), logprob=finite(logprob), bytes=list(spelling))


def _owner(token: Token) -> Source:
    """The model whose id a token is; where both were mixed they have one tokenizer."""
    return token.source or "aligned"


def token_id_name(token: int) -> str:
    """The name of a token that is named by its id, as in vLLM."""
    return f"token_id:{token}"


def _set_totals(provenance: Provenance, completion: Completion) -> None:
    """Fill in the totals of a whole answer, and what repeats it."""
    share = completion.base_share
    provenance.base_share = None if share is None else round(share, 4)
    provenance.switches = completion.switches
    provenance.router, provenance.seed = completion.router, completion.seed
    provenance.date = completion.date


def _known(number: float) -> float | None:
    """None for NaN, which stands for what was not computed."""
    return None if math.isnan(number) else number


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, IMPOSSIBLE)
