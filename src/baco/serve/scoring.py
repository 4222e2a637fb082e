"""``echo``: the log-probabilities of a text's tokens under one model of the pair.

The engine reads texts in pieces between steps, as it reads prompts. This lets a server of a pair
serve either model of a pair that is decoded elsewhere (the remote backend).
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

from baco.decoder import Decoder, Scored
from baco.engine.scoring import Scoring
from baco.errors import AnswerError, BacoError
from baco.models.pair import Pair
from baco.outputs import Chunk
from baco.serve.choices import finite, token_id_name
from baco.serve.engine_thread import EngineThread, Job
from baco.serve.response_models import Provenance, TextChoice, TextLogprobs
from baco.source import Source
from baco.text.answer_text import name_of
from baco.text.detokenizer import Detokenizer
from baco.text.encoder import Limit
from baco.text.prompts import Limits

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Echo:
    """A request with ``echo``.

    Attributes:
        prompts: texts or token ids.
        source: the model that scores them.
        top: how many most likely tokens to report at each position.
        first: the first token of each prompt to report.
        ids: report token ids beside the text.
        named: name tokens by their ids.
    """

    prompts: tuple[str | TokenIds, ...]
    source: Source
    top: int
    first: int
    ids: bool
    named: bool

    def read(self, prompt: str | TokenIds, pair: Pair, pause: Callable[[], None]) -> TokenIds:
        """The token ids of a prompt; may be called in any thread.

        Args:
            prompt: a text, or its ids.
            pair: has the model's tokenizer.
            pause: called between pieces of work; an exception that it raises ends the work.

        Raises:
            BacoError: a prompt that is empty, too long, or shorter than ``first``.
        """
        context = pair.model(self.source).context
        limits: Limits = {self.source: Limit(self.source, context, context)}
        ids = pair.renderer.read(prompt, self.source, limits=limits, pause=pause)
        if self.first >= len(ids):
            raise BacoError(f"echo_from is {self.first}: the prompt has {len(ids)} tokens")
        return ids


@dataclass(slots=True)
class _Text:
    """One of the prompts, and what came of it so far.

    Attributes:
        pair: spells its tokens.
        source: the model that scores it.
        prompt: as it was asked.
        ids: its tokens, once they are known.
        logprobs: of its tokens so far.
        texts: of these tokens, special ones by their names; the last may still be missing.
    """

    pair: Pair
    source: Source
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
        self.ordinary = Detokenizer(self._tokenizer)

    @property
    def _tokenizer(self) -> Any:
        return self.pair.tokenizer_of(self.source)

    def push(self, token: int) -> None:
        """Spell the next token."""
        if self.pair.vocabulary_of(self.source).special[token]:
            name = self.pair.spelling(token, self.source).decode()
            self.texts += [*self.ordinary.close(), name]
            self.ordinary = Detokenizer(self._tokenizer)
        else:
            self.texts += self.ordinary.push(token)

    def close(self, first: int) -> None:
        """End the text. The texts then join to the decoded tokens from ``first`` on."""
        self.texts += self.ordinary.close()
        if "".join(self.texts) != self._tokenizer.decode(self.ids[first:]):
            # Decoding removes the first space.
            at = next((index for index, text in enumerate(self.texts) if text), 0)
            self.texts[at] = self.texts[at].removeprefix(" ")
        offsets = accumulate(map(len, self.texts), initial=0)
        self.logprobs.text_offset = list(offsets)[:-1]


class Scores:
    """The scores of one request's prompts.

    Args:
        pair: tokenises the prompts and spells their tokens.
        engine_thread: scores them.
        echo: the request.
        timeout: seconds for the whole request.
    """

    def __init__(self, pair: Pair, engine_thread: EngineThread, echo: Echo, timeout: float) -> None:
        self._pair, self._engine_thread, self._echo, self._timeout = (
            pair,
            engine_thread,
            echo,
            timeout,
        )
        self._texts = [_Text(pair, echo.source, prompt) for prompt in echo.prompts]
        self._loop = asyncio.get_running_loop()
        self._results: asyncio.Queue[tuple[_Text, Chunk | Scored | Exception]] = asyncio.Queue()

    @property
    def tokens(self) -> int:
        """Tokens of all prompts, once they are scored."""
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
        self._engine_thread.submit(jobs)
        try:
            async with asyncio.timeout(self._timeout):
                left = len(jobs)
                while left:
                    text, scored = await self._results.get()
                    left -= self._add(text, scored)
        finally:
            for job in jobs:
                self._engine_thread.cancel(job)
        return [self._choice(index, text) for index, text in enumerate(self._texts)]

    def _prepare(self, text: _Text, pause: Callable[[], None]) -> None:
        text.ids = self._echo.read(text.prompt, self._pair, pause)

    def _submit(self, text: _Text, decoder: Decoder) -> int:
        echo = self._echo
        return decoder.submit_scoring(Scoring(text.ids, echo.source, echo.first, echo.top))

    def _deliver(self, text: _Text, result: Chunk | Scored | Exception) -> None:
        self._loop.call_soon_threadsafe(self._results.put_nowait, (text, result))

    def _add(self, text: _Text, scored: Chunk | Scored | Exception) -> bool:
        """Add the scores of some tokens. Whether these are the last ones."""
        if isinstance(scored, Exception):
            raise scored
        assert isinstance(scored, Scored)
        if scored.error is not None:
            raise AnswerError(scored.error)
        logprobs = text.logprobs
        start = self._echo.first + len(logprobs.tokens)
        ids = text.ids[start : start + len(scored.logprobs)]
        for token, logprob, top in zip(ids, scored.logprobs, scored.tops, strict=True):
            logprobs.tokens.append(self._name(token))
            text.push(token)
            if logprob is None or top is None:  # a text's first token
                logprobs.token_logprobs.append(None)
                logprobs.top_logprobs.append(None)
                continue
            logprobs.token_logprobs.append(finite(logprob))
            both = top | {token: logprob}  # it is added where it is not among the most likely ones
            logprobs.top_logprobs.append(
                {self._name(id_): finite(value) for id_, value in both.items()}
            )
        if scored.done:
            text.close(self._echo.first)
        return scored.done

    def _name(self, token: int) -> str:
        if self._echo.named:
            return token_id_name(token)
        return name_of(self._pair.spelling(token, self._echo.source))

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
