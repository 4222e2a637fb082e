"""``echo``: how likely one model of the pair finds a text, token by token.

The decoder's engine reads texts piece by piece between its steps, as it reads prompts. With it a
server of a pair is a server of either model: who decodes elsewhere can ask how likely this model
finds a span.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

from baco.decoder import Decoder, Scored
from baco.engine.scoring import Scoring
from baco.errors import AnswerError, BacoError
from baco.models.pair import Pair
from baco.outputs import Chunk
from baco.serve.choices import by_id, finite
from baco.serve.engine_thread import EngineThread
from baco.serve.job import Job
from baco.serve.response_models import Provenance, TextChoice, TextLogprobs
from baco.source import Source
from baco.text.answer_text import name_of
from baco.text.detokenizer import Detokenizer
from baco.text.encoder import Limit
from baco.text.prompts import Limits

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Echo:
    """What a request with ``echo`` asks.

    Attributes:
        prompts: texts or token ids.
        half: the model that is to score them.
        top: most likely tokens at each place.
        first: the first token of each prompt that is scored.
        ids: tell token ids beside the text.
        named: name tokens by their ids.
    """

    prompts: tuple[str | TokenIds, ...]
    half: Source
    top: int
    first: int
    ids: bool
    named: bool

    def read(self, prompt: str | TokenIds, pair: Pair, pause: Callable[[], None]) -> TokenIds:
        """A prompt's token ids as the model reads it, made in any thread.

        Args:
            prompt: a text, or its ids.
            pair: has the tokenizer.
            pause: called between pieces of work; what it raises ends it.

        Raises:
            BacoError: a prompt that is empty, too long, or shorter than ``first``.
        """
        context = getattr(pair, self.half).context
        limits: Limits = {self.half: Limit(self.half, context, context)}
        ids = pair.renderer.read(prompt, self.half, limits=limits, pause=pause)
        if self.first >= len(ids):
            raise BacoError(f"echo_from is {self.first}: the prompt has {len(ids)} tokens")
        return ids


@dataclass(slots=True)
class _Text:
    """One of the prompts, and what came of it so far.

    Attributes:
        pair: spells its tokens.
        prompt: as it was asked.
        ids: its tokens, once they are known.
        logprobs: of its tokens so far.
        texts: of these tokens, special ones by their names; the last may still be missing.
    """

    pair: Pair
    prompt: str | TokenIds
    ids: TokenIds = ()
    logprobs: TextLogprobs = field(
        default_factory=lambda: TextLogprobs(
            tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[]
        )
    )
    texts: list[str] = field(default_factory=list)
    ordinary: Detokenizer = field(init=False)

    def __post_init__(self) -> None:
        self.ordinary = Detokenizer(self.pair.tokenizer)

    def push(self, token: int) -> None:
        """Spell the next token."""
        if self.pair.vocabulary.special[token]:
            self.texts += [*self.ordinary.close(), self.pair.spelling(token).decode()]
            self.ordinary = Detokenizer(self.pair.tokenizer)
        else:
            self.texts += self.ordinary.push(token)

    def close(self, first: int) -> None:
        """No token follows; the texts join to what the tokens from ``first`` on decode to."""
        self.texts += self.ordinary.close()
        if "".join(self.texts) != self.pair.tokenizer.decode(self.ids[first:]):
            # Decoding takes the first space off.
            at = next((index for index, text in enumerate(self.texts) if text), 0)
            self.texts[at] = self.texts[at].removeprefix(" ")
        offsets = accumulate(map(len, self.texts), initial=0)
        self.logprobs.text_offset = list(offsets)[:-1]


class Scores:
    """The scores of one request's prompts.

    Args:
        pair: tokenises and spells.
        driver: of the decoder that scores.
        echo: what is asked.
        timeout: seconds that all of it may take.
    """

    def __init__(self, pair: Pair, driver: EngineThread, echo: Echo, timeout: float) -> None:
        self._pair, self._driver, self._echo, self._timeout = pair, driver, echo, timeout
        self._texts = [_Text(pair, prompt) for prompt in echo.prompts]
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[tuple[_Text, Chunk | Scored | Exception]] = asyncio.Queue()

    @property
    def tokens(self) -> int:
        """Of all prompts, once they are scored."""
        return sum(len(text.ids) for text in self._texts)

    async def choices(self) -> list[TextChoice]:
        """One choice for every prompt.

        Raises:
            QueueFullError, ClosedError, TimeoutError, BacoError: as for answers.
            AnswerError: a prompt could not be scored.
        """
        jobs = [
            Job(
                partial(self._submit, text),
                partial(self._deliver, text),
                partial(self._prepare, text),
                len(text.prompt) if isinstance(text.prompt, str) else 0,
            )
            for text in self._texts
        ]
        self._driver.submit(jobs)
        try:
            async with asyncio.timeout(self._timeout):
                left = len(jobs)
                while left:
                    text, scored = await self._told.get()
                    left -= self._take(text, scored)
        finally:
            for job in jobs:
                self._driver.cancel(job)
        return [self._choice(index, text) for index, text in enumerate(self._texts)]

    def _prepare(self, text: _Text, pause: Callable[[], None]) -> None:
        text.ids = self._echo.read(text.prompt, self._pair, pause)

    def _submit(self, text: _Text, decoder: Decoder) -> int:
        echo = self._echo
        return decoder.submit_scoring(Scoring(text.ids, echo.half, echo.first, echo.top))

    def _deliver(self, text: _Text, told: Chunk | Scored | Exception) -> None:
        self._loop.call_soon_threadsafe(self._told.put_nowait, (text, told))

    def _take(self, text: _Text, scored: Chunk | Scored | Exception) -> bool:
        """Take up the scores of some tokens; was that all?"""
        if isinstance(scored, Exception):
            raise scored
        assert isinstance(scored, Scored)
        if scored.error is not None:
            raise AnswerError(scored.error)
        told = text.logprobs
        start = self._echo.first + len(told.tokens)
        for token in text.ids[start : start + len(scored.logprobs)]:
            told.tokens.append(self._called(token))
            text.push(token)
        told.token_logprobs += [None if one is None else finite(one) for one in scored.logprobs]
        told.top_logprobs += [
            None if top is None else {self._called(one): finite(top[one]) for one in top}
            for top in scored.tops
        ]
        if scored.done:
            text.close(self._echo.first)
        return scored.done

    def _called(self, token: int) -> str:
        return by_id(token) if self._echo.named else name_of(self._pair.spelling(token))

    def _choice(self, index: int, text: _Text) -> TextChoice:
        return TextChoice(
            index=index,
            text="".join(text.texts),
            logprobs=text.logprobs,
            finish_reason="length",
            prompt_token_ids=list(text.ids) if self._echo.ids else None,
            token_ids=[] if self._echo.ids else None,
            baco=Provenance(sources=[], base_share=0, switches=0),
        )
