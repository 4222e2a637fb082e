"""Text in, text out, for many requests at once. Every front end drives a decoder step by step.

One thread owns a decoder. It renders prompts, gives token ids to the engine, and turns the tokens
of its sequences into text with sources.
"""

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from baco.backends.base import Scorer, TokenEngine
from baco.engine.scoring import Scoring
from baco.engine.sequence import Request, SequenceState
from baco.errors import BacoError, Failure, failure_message
from baco.models.pair import Pair
from baco.outputs import Chunk, Completion, Token
from baco.routing.router import Router
from baco.routing.word_boundaries import Switch
from baco.sampling.constraint import Constraint
from baco.sampling.params import SamplingParams
from baco.source import Source
from baco.text.answer_text import OPENERS, AnswerText
from baco.text.prompts import Conversation, Prompt
from baco.text.thinking import ThinkingText

log = logging.getLogger("baco")


@dataclass(slots=True)
class _Answer:
    """The text of a sequence, and how much of it has been returned.

    Attributes:
        text: the answer's text so far.
        started: when it was submitted, in seconds.
        date: the date that a template wrote into the prompt.
        read: tokens of the sequence that are in the text.
        pieces, tokens: of the text, that earlier chunks have.
        thinking: the text of the thinking before it; None where there is none.
        thought: characters of the thinking that earlier chunks have.
        thinking_tokens: tokens of the thinking that earlier chunks have.
    """

    text: AnswerText
    started: float
    date: str | None
    read: int = 0
    pieces: int = 0
    tokens: int = 0
    thinking: ThinkingText | None = None
    thought: int = 0
    thinking_tokens: int = 0


@dataclass(slots=True)
class _Text:
    """A text that is scored, and how many of its scores have been returned."""

    scoring: Scoring
    returned: int = 0


@dataclass(frozen=True, slots=True)
class Scored:
    """New scores of a text.

    Attributes:
        prompt: the text's ticket.
        logprobs: of its next tokens, in nats; None for the text's first token.
        tops: the most likely tokens (id → nats) at their positions.
        done: whether these are the last.
        error: why scoring failed.
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
        pair: the two models.
        engine: decodes token ids.
        structured: the engine takes constraints; else its own check refuses structured answers.
    """

    pair: Pair
    engine: TokenEngine
    structured: bool = True
    _answers: dict[SequenceState, _Answer] = field(default_factory=dict)
    _tickets: dict[int, list[SequenceState]] = field(default_factory=dict)
    _texts: dict[int, _Text] = field(default_factory=dict)
    _next: int = 0

    def submit(
        self,
        prompt: Conversation,
        params: SamplingParams | None = None,
        *,
        router: Router,
        system: str | None = None,
        switch: Switch = "word",
        explain: bool = False,
        template_args: Mapping[str, Any] | None = None,
        continue_final: bool | None = None,
        digest: bytes | None = None,
        **sampling: Any,
    ) -> int:
        """Queue n samples of a prompt.

        Args:
            params: sampling parameters; by default the pair's, changed by ``sampling``.
            digest: keys the draws in place of the prompt's own.

        The other arguments are those of :meth:`baco.api.Baco.stream_batch`.

        Returns:
            A ticket, which the prompt's chunks have as ``Chunk.prompt``.

        Raises:
            BacoError: an argument is wrong, or the prompt does not fit.
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
        params = params or self.pair.defaults.updated(sampling)
        return self._submit(rendered, params, router, switch, explain, OPENERS)

    def submit_text(
        self,
        text: str | tuple[int, ...],
        params: SamplingParams | None = None,
        *,
        router: Router,
        switch: Switch = "word",
        explain: bool = False,
        **sampling: Any,
    ) -> int:
        """Queue n continuations of a text, or of token ids, which both models read as they are.
        Otherwise like `submit`.
        """
        if not isinstance(text, str):
            self.pair.check_one_tokenizer("a prompt of token ids")
            self._check_ids("prompt", text)
        prompt = self.pair.renderer.raw(text, limits=self.pair.limits(router, explain))
        params = params or self.pair.defaults.updated(sampling)
        return self._submit(prompt, params, router, switch, explain, openers=())

    def submit_rendered(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        raw: bool,
        router: Router,
        switch: Switch = "word",
        explain: bool = False,
        cache_salt: str = "",
    ) -> int:
        """Queue n samples of a prompt that was rendered before, in any thread.

        Args:
            raw: whether it is a text to continue and not a conversation.
            cache_salt: requests with different salts share no kept prefix.

        The other arguments are those of `submit`.
        """
        openers = () if raw else OPENERS
        return self._submit(prompt, params, router, switch, explain, openers, cache_salt)

    def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        router: Router,
        switch: Switch,
        explain: bool,
        openers: tuple[Source | None, ...],
        cache_salt: str = "",
    ) -> int:
        if switch not in ("word", "token"):
            raise BacoError(f"switch is {switch!r}: use word or token")
        self._check_ids("logit_bias", (token for token, _ in params.logit_bias))
        # A model that never writes does not think.
        thinks = prompt.thinking if router.only != "base" else None
        ticket, structure = self._next, params.structure
        shares_text = self.pair.own_vocabularies is not None
        constraints: Mapping[Source, Constraint] = {}
        if structure is not None and self.structured:
            constraints = self.pair.constraints(structure, joining_space=prompt.joining_space)
        request = Request(
            prompt.base_ids,
            prompt.aligned_ids,
            params.seeded(),
            router,
            switch,
            ticket,
            explain,
            self.pair.thinking_tokens(thinks),
            digest=prompt.digest,
            cache_salt=cache_salt,
            shares_text=shares_text,
            constraint=constraints.get("aligned"),
            base_constraint=constraints.get("base") if shares_text else None,
        )
        sequences = self.engine.add(request)
        self._next += 1
        self._tickets[ticket] = sequences
        started = time.perf_counter()
        only = router.only  # a source that never writes opens no turn
        opening = self.pair.renderer.turn_opening if only is None or only in openers else None
        if structure is not None:  # which says where an answer ends
            opening = None
        for sequence in sequences:
            text = AnswerText(
                self.pair.tokenizer,
                params.stop,
                opening,
                openers=openers,
                starts_line=prompt.joining_space or prompt.base_text.rstrip(" \t").endswith("\n"),
                joining_space=prompt.joining_space,
                tokenizers=self.pair.text_tokenizers,
            )
            answer = self._answers[sequence] = _Answer(text, started, prompt.date)
            if thinks is not None:
                assert self.pair.renderer.marks is not None
                answer.thinking = ThinkingText(self.pair.tokenizer, self.pair.renderer.marks)
        return ticket

    def submit_scoring(self, scoring: Scoring) -> int:
        """Queue a text to be scored, and return a ticket, which `scored` names.

        Raises:
            BacoError: this engine scores no texts, or memory cannot hold this one.
        """
        if not isinstance(self.engine, Scorer):
            raise BacoError("echo needs the weights in this process: serve with --backend local")
        self.engine.score(scoring)
        ticket = self._next
        self._next += 1
        self._texts[ticket] = _Text(scoring)
        return ticket

    def scored(self) -> list[Scored]:
        """The scores that are new since the last call."""
        scores = []
        for ticket, text in list(self._texts.items()):
            scoring, new = text.scoring, slice(text.returned, None)
            logprobs, tops = scoring.logprobs[new], scoring.tops[new]
            if logprobs or scoring.done:
                scores.append(Scored(ticket, logprobs, tops, scoring.done, scoring.error))
                text.returned += len(logprobs)
            if scoring.done:
                del self._texts[ticket]
        return scores

    def step(self) -> list[Chunk]:
        """One step of the engine; returns a chunk for every answer with anything new."""
        sequences = [stepped for stepped in self.engine.step() if stepped in self._answers]
        chunks = map(self._next_chunk, sequences)
        return [
            chunk
            for chunk in chunks
            if chunk.tokens
            or chunk.pieces
            or chunk.thinking
            or chunk.thinking_tokens
            or chunk.finish_reason
        ]

    def cancel(self, ticket: int) -> None:
        """Drop a request: its rows leave the batch at the next step, and it has no more chunks.

        An unknown ticket, or one whose answers have all ended, is ignored.
        """
        if (text := self._texts.pop(ticket, None)) is not None and isinstance(self.engine, Scorer):
            self.engine.stop_scoring(text.scoring)
        for sequence in self._tickets.pop(ticket, []):
            if self._answers.pop(sequence, None) is not None:
                self.engine.stop(sequence, len(sequence.tokens))

    def close(self) -> None:
        """Drop all requests, so that no engine elsewhere continues with them."""
        for ticket in [*self._tickets, *self._texts]:
            self.cancel(ticket)

    def holds(self, ticket: int) -> bool:
        """Whether any answer of a request has yet to end, or a text to be scored."""
        return ticket in self._tickets or ticket in self._texts

    def prompt_tokens(self, ticket: int) -> int:
        """Tokens of an open request's prompt, as the aligned model reads it."""
        return len(self._tickets[ticket][0].request.aligned_ids)

    @property
    def busy(self) -> bool:
        """Whether anything is left to decode."""
        return self.engine.busy

    @property
    def waiting(self) -> int:
        """Answers that have no row yet."""
        return self.engine.waiting

    @property
    def running(self) -> int:
        """Answers that are being decoded."""
        return self.engine.running

    def _check_ids(self, name: str, tokens: Iterable[int]) -> None:
        size = self.pair.vocabulary.size
        for token in tokens:
            if not 0 <= token < size:
                raise BacoError(f"{name} names token {token}: the vocabulary has {size} tokens")

    def _next_chunk(self, sequence: SequenceState) -> Chunk:
        """What is new of an answer. An answer whose tokens cannot be decoded ends alone."""
        text = self._answers[sequence].text
        try:
            stopped = self._extend_text(sequence)
        except Exception as error:
            log.error("an answer's text cannot be decoded: %r", error, exc_info=error)
            self.engine.stop(sequence, sequence.num_thinking + text.tokens)
            failure = Failure("process", failure_message(error))
            sequence.finish_reason, sequence.error = "error", failure
        else:
            if stopped:
                self.engine.stop(sequence, sequence.num_thinking + text.tokens)
        return self._chunk(sequence)

    def _extend_text(self, sequence: SequenceState) -> bool:
        """Add a sequence's new tokens to its text; returns whether its text ends."""
        answer = self._answers[sequence]
        text, thinking = answer.text, answer.thinking
        if thinking is not None and answer.read <= sequence.num_thinking:
            for token in sequence.tokens[answer.read : sequence.num_thinking]:
                thinking.push(token)
            if sequence.finish_reason is not None:
                thinking.close()
            answer.read = max(answer.read, sequence.num_thinking)
        new = slice(answer.read, None)
        answer.read = len(sequence.tokens)
        for token, source in zip(sequence.tokens[new], sequence.sources[new], strict=True):
            if text.push(token, source)[1]:
                return True
        return sequence.finish_reason is not None and text.close()[1]

    def _chunk(self, sequence: SequenceState) -> Chunk:
        answer = self._answers[sequence]
        pieces = tuple(answer.text.pieces[answer.pieces :])
        thinking = "" if answer.thinking is None else answer.thinking.text[answer.thought :]
        before = sequence.num_thinking
        tokens = tuple(
            Token(
                sequence.tokens[at],
                sequence.sources[at],
                sequence.logprobs[at],
                answer.text.texts[at - before],
                answer.text.offsets[at - before],
                sequence.top_logprobs[at] if sequence.top_logprobs else None,
                sequence.why[at] if sequence.why else None,
            )
            for at in range(before + answer.tokens, before + answer.text.tokens)
        )
        thinking_tokens = before - answer.thinking_tokens
        answer.thought, answer.thinking_tokens = answer.thought + len(thinking), before
        answer.pieces, answer.tokens = answer.pieces + len(pieces), answer.tokens + len(tokens)
        ticket, completion = sequence.request.index, None
        if sequence.finish_reason is not None:
            completion = _completion(sequence, answer)
            del self._answers[sequence]
            siblings = self._tickets[ticket]
            siblings.remove(sequence)
            if not siblings:
                del self._tickets[ticket]
        return Chunk(
            ticket,
            sequence.sample,
            pieces,
            tokens,
            sequence.finish_reason,
            completion,
            thinking,
            thinking_tokens,
        )


def _completion(sequence: SequenceState, answer: _Answer) -> Completion:
    assert sequence.finish_reason is not None
    assert sequence.request.params.seed is not None
    answered, tops = slice(sequence.num_thinking, None), sequence.top_logprobs
    failure = sequence.error
    return Completion(
        sample=sequence.sample,
        text=answer.text.text,
        token_ids=tuple(sequence.tokens[answered]),
        sources=tuple(sequence.sources[answered]),
        logprobs=tuple(sequence.logprobs[answered]),
        finish_reason=sequence.finish_reason,
        pieces=tuple(answer.text.pieces),
        router=sequence.request.router.spelling,
        seed=sequence.request.params.seed,
        seconds=time.perf_counter() - answer.started,
        top_logprobs=tuple(tops[answered]) if tops else None,
        error=None if failure is None else failure.message,
        error_kind=None if failure is None else failure.kind,
        date=answer.date,
        cached_tokens=sequence.cached_tokens,
        thinking="" if answer.thinking is None else answer.thinking.text,
        thinking_tokens=sequence.num_thinking,
        schema=sequence.request.params.schema,
    )
