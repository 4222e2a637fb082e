"""Text in, text out, for many requests at once: what every front end drives, one step at a time.

A decoder is owned by one thread. It renders prompts, hands token ids to the engine, and turns what
the engine appends into text with its sources.
"""

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from baco.backends.base import Scorer, TokenEngine
from baco.engine.scoring import Scoring
from baco.engine.sequence import Request, SequenceState
from baco.errors import BacoError, failure
from baco.models.pair import Pair
from baco.outputs import Chunk, Completion, Token
from baco.routing.router import Router
from baco.routing.word_boundaries import Switch
from baco.source import Source
from baco.text.answer_text import AnswerText
from baco.text.prompts import Conversation, Prompt

log = logging.getLogger("baco")


@dataclass(slots=True)
class _Growing:
    """An answer in progress: tokens read of it, pieces and tokens handed out."""

    text: AnswerText
    started: float
    date: str | None
    read: int = 0
    pieces: int = 0
    tokens: int = 0


@dataclass(slots=True)
class _Text:
    """A text that is scored, and of how many of its tokens that has been told."""

    scoring: Scoring
    told: int = 0


@dataclass(frozen=True, slots=True)
class Scored:
    """What is new of a text that is scored.

    Attributes:
        prompt: its ticket.
        logprobs: of its next tokens, in nats; None where nothing stands before one.
        tops: the most likely tokens (id → nats) at their places.
        done: is that all?
        error: what scoring failed with.
    """

    prompt: int
    logprobs: list[float | None]
    tops: list[dict[int, float] | None]
    done: bool
    error: str | None = None


@dataclass
class Decoder:
    """Answers requests on one engine; they join and leave at every step.

    Attributes:
        pair: the two halves.
        engine: decodes token ids.
    """

    pair: Pair
    engine: TokenEngine
    _growing: dict[SequenceState, _Growing] = field(default_factory=dict)
    _tickets: dict[int, list[SequenceState]] = field(default_factory=dict)
    _texts: dict[int, _Text] = field(default_factory=dict)
    _next: int = 0

    def submit(
        self,
        prompt: Conversation,
        *,
        router: Router,
        system: str | None = None,
        switch: Switch = "word",
        explain: bool = False,
        template_args: Mapping[str, Any] | None = None,
        continue_final: bool | None = None,
        mixed: bool = False,
        digest: bytes | None = None,
        **sampling: Any,
    ) -> int:
        """Queue n samples of a prompt; arguments as for :meth:`baco.api.Baco.stream_batch`.

        Args:
            mixed: every token is both models', whatever its source says, so that a next turn
                counts as the base model's wherever it is opened.
            digest: keys the draws in place of the prompt's own.

        Returns:
            A ticket: ``Chunk.prompt`` of what comes of it.

        Raises:
            BacoError: at once, for any argument that is wrong or a prompt that does not fit.
        """
        rendered = self.pair.renderer.render(
            prompt,
            system,
            template_args=template_args,
            continue_final=continue_final,
            limits=self.pair.limits(router, explain),
        )
        if digest is not None:
            rendered = replace(rendered, digest=digest)
        openers: tuple[Source, ...] = ("base", "aligned") if mixed else ("base",)
        return self._submit(rendered, openers, router, switch, explain, sampling)

    def submit_text(
        self,
        text: str | tuple[int, ...],
        *,
        router: Router,
        switch: Switch = "word",
        explain: bool = False,
        **sampling: Any,
    ) -> int:
        """Queue n continuations of a text, or of token ids, that both halves read as they are.

        Else as `submit`.
        """
        if not isinstance(text, str):
            self._check_known("prompt", text)
        prompt = self.pair.renderer.raw(text, limits=self.pair.limits(router, explain))
        return self._submit(prompt, (), router, switch, explain, sampling)

    def submit_rendered(
        self,
        prompt: Prompt,
        *,
        raw: bool,
        router: Router,
        switch: Switch = "word",
        explain: bool = False,
        **sampling: Any,
    ) -> int:
        """Queue n samples of a prompt that was rendered before, in any thread; ``raw`` where that
        was not from a conversation. Else as `submit`.
        """
        openers: tuple[Source, ...] = () if raw else ("base",)
        return self._submit(prompt, openers, router, switch, explain, sampling)

    def _submit(
        self,
        prompt: Prompt,
        openers: tuple[Source, ...],
        router: Router,
        switch: Switch,
        explain: bool,
        sampling: dict[str, Any],
    ) -> int:
        if switch not in ("word", "token"):
            raise BacoError(f"switch is {switch!r}: use word or token")
        params = self.pair.defaults.updated(sampling).seeded()
        self._check_known("logit_bias", (token for token, _ in params.logit_bias))
        ticket = self._next
        request = Request(
            prompt.base_ids,
            prompt.aligned_ids,
            params,
            router,
            switch,
            ticket,
            explain,
            digest=prompt.digest,
        )
        answers = self.engine.add(request)
        self._next += 1
        self._tickets[ticket] = answers
        started = time.perf_counter()
        only = router.only  # a source that never writes opens nothing
        opening = self.pair.renderer.turn_opening if only is None or only in openers else None
        for answer in answers:
            text = AnswerText(
                self.pair.tokenizer,
                params.stop,
                opening,
                openers=openers,
                starts_line=prompt.joining_space or prompt.base_text.rstrip(" \t").endswith("\n"),
                joining_space=prompt.joining_space,
            )
            self._growing[answer] = _Growing(text, started, prompt.date)
        return ticket

    def submit_scoring(self, scoring: Scoring) -> int:
        """Queue a text to be scored; its ticket is that of what `scored` gives.

        Raises:
            BacoError: this engine scores no texts, or there is no memory for this one.
        """
        if not isinstance(self.engine, Scorer):
            raise BacoError("echo needs the weights in this process: serve with --backend local")
        self.engine.score(scoring)
        ticket = self._next
        self._next += 1
        self._texts[ticket] = _Text(scoring)
        return ticket

    def scored(self) -> list[Scored]:
        """What is new of the texts that are scored."""
        found = []
        for ticket, text in list(self._texts.items()):
            scoring, new = text.scoring, slice(text.told, None)
            logprobs, tops = scoring.logprobs[new], scoring.tops[new]
            if logprobs or scoring.done:
                found.append(Scored(ticket, logprobs, tops, scoring.done, scoring.error))
                text.told += len(logprobs)
            if scoring.done:
                del self._texts[ticket]
        return found

    def step(self) -> list[Chunk]:
        """One step of the engine; a chunk for every answer of which there is anything new."""
        grown = [answer for answer in self.engine.step() if answer in self._growing]
        chunks = map(self._told, grown)
        return [chunk for chunk in chunks if chunk.tokens or chunk.pieces or chunk.finish_reason]

    def cancel(self, ticket: int) -> None:
        """Give a request up: its rows leave the batch at the next step; nothing more comes of it.

        A ticket that is unknown or whose answers have all ended is no error.
        """
        if (text := self._texts.pop(ticket, None)) is not None and isinstance(self.engine, Scorer):
            self.engine.stop_scoring(text.scoring)
        for answer in self._tickets.pop(ticket, []):
            if self._growing.pop(answer, None) is not None:
                self.engine.stop(answer, len(answer.tokens))

    def close(self) -> None:
        """Give all requests up, so that no engine elsewhere goes on with what nobody waits for."""
        for ticket in [*self._tickets, *self._texts]:
            self.cancel(ticket)

    def holds(self, ticket: int) -> bool:
        """Has any answer of a request yet to end, or a text to be scored?"""
        return ticket in self._tickets or ticket in self._texts

    def prompt_tokens(self, ticket: int) -> int:
        """Tokens of an open request's prompt, as the aligned model reads it."""
        return len(self._tickets[ticket][0].request.aligned_ids)

    @property
    def busy(self) -> bool:
        """Is there anything left to decode?"""
        return self.engine.busy

    @property
    def waiting(self) -> int:
        """Answers that have no row yet."""
        return self.engine.waiting

    @property
    def running(self) -> int:
        """Answers that are being decoded."""
        return self.engine.running

    def _check_known(self, name: str, tokens: Iterable[int]) -> None:
        size = self.pair.vocabulary.size
        for token in tokens:
            if not 0 <= token < size:
                raise BacoError(f"{name} names token {token}: the vocabulary has {size} tokens")

    def _told(self, answer: SequenceState) -> Chunk:
        """What is new of an answer; one whose text cannot be told ends alone."""
        text = self._growing[answer].text
        try:
            stopped = self._read(answer)
        except Exception as error:
            log.error("an answer cannot be told: %r", error, exc_info=error)
            self.engine.stop(answer, text.tokens)
            answer.finish_reason, answer.error = "error", failure(error)
        else:
            if stopped:
                self.engine.stop(answer, text.tokens)
        return self._chunk(answer)

    def _read(self, answer: SequenceState) -> bool:
        """Take an answer's new tokens into its text; whether the text ends in front of some."""
        growing = self._growing[answer]
        text, new = growing.text, slice(growing.read, None)
        growing.read = len(answer.tokens)
        for token, source in zip(answer.tokens[new], answer.sources[new], strict=True):
            if text.push(token, source)[1]:
                return True
        return answer.finish_reason is not None and text.close()[1]

    def _chunk(self, answer: SequenceState) -> Chunk:
        """A chunk with what is new; the last one of an answer has its completion."""
        growing = self._growing[answer]
        pieces = tuple(growing.text.pieces[growing.pieces :])
        tokens = self._tokens(answer, growing)
        growing.pieces, growing.tokens = growing.pieces + len(pieces), growing.tokens + len(tokens)
        completion = None
        if answer.finish_reason is not None:
            completion = _complete(answer, growing, time.perf_counter() - growing.started)
            del self._growing[answer]
            siblings = self._tickets[answer.request.index]
            siblings.remove(answer)
            if not siblings:
                del self._tickets[answer.request.index]
        ticket, sample = answer.request.index, answer.sample
        return Chunk(ticket, sample, pieces, tokens, answer.finish_reason, completion)

    def _tokens(self, answer: SequenceState, growing: _Growing) -> tuple[Token, ...]:
        return tuple(
            Token(
                answer.tokens[at],
                answer.sources[at],
                answer.logprobs[at],
                growing.text.texts[at],
                growing.text.offsets[at],
                answer.top_logprobs[at] if answer.top_logprobs else None,
                answer.why[at] if answer.why else None,
            )
            for at in range(growing.tokens, growing.text.tokens)
        )


def _complete(answer: SequenceState, growing: _Growing, seconds: float) -> Completion:
    assert answer.finish_reason is not None
    assert answer.request.params.seed is not None
    return Completion(
        sample=answer.sample,
        text=growing.text.text,
        token_ids=tuple(answer.tokens),
        sources=tuple(answer.sources),
        logprobs=tuple(answer.logprobs),
        finish_reason=answer.finish_reason,
        pieces=tuple(growing.text.pieces),
        router=answer.request.router.spelling,
        seed=answer.request.params.seed,
        seconds=seconds,
        top_logprobs=tuple(answer.top_logprobs) if answer.top_logprobs else None,
        error=answer.error,
        date=growing.date,
    )
