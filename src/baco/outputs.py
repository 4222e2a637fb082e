"""Answers with their provenance, and the chunks in which they stream."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isnan
from typing import Any

from baco.engine.sequence import FinishReason, Why
from baco.errors import BacoError, ErrorKind
from baco.models.pair import Pair
from baco.sampling.structure import Schema
from baco.source import Source
from baco.text.answer_text import Piece


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample of an answer.

    Attributes:
        sample: which of the n samples it is, from 0.
        text: the answer, without its end token and without what a stop string cut off.
        token_ids: its tokens, with the end token if it ended with one; where the models have
            different tokenizers, each is an id of its source.
        sources: the model each token came from; None where a combiner mixed both models' rows.
        logprobs: log-probability of each token under its source, in nats, of the raw distribution;
            of a token from both models, of the mixed one.
        top_logprobs: the most likely tokens (id → nats) of the source at each position; None unless
            requested.
        finish_reason: ``stop`` (end of text or a stop string), ``length``, or ``error``.
        pieces: the text in order, each piece with its source; they join to ``text``.
        router: the spelling of its router; with ``seed`` it gives the answer again.
        seed: the seed of its draws.
        seconds: from the start of the call to the end of this answer.
        error: why it ended with ``error``; its text until then is kept.
        error_kind: what failed: ``structure``, the answer's structure cannot be followed;
            ``process``, decoding in this process; ``server``, a server that decodes it.
        date: the date that a template wrote into the prompt, as YYYY-MM-DD; None without one.
        cached_tokens: tokens of the prompt, as the aligned model reads it, that were kept from an
            earlier request and not read again.
        thinking: what the aligned model wrote before the answer, in models that think. It is in
            none of the attributes above.
        thinking_tokens: its tokens, with the marks around it.
        schema: the schema that the answer was held to; None without one.
    """

    sample: int
    text: str
    token_ids: tuple[int, ...]
    sources: tuple[Source | None, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    pieces: tuple[Piece, ...]
    router: str
    seed: int
    seconds: float
    top_logprobs: tuple[Mapping[int, float], ...] | None = None
    error: str | None = None
    error_kind: ErrorKind | None = None
    date: str | None = None
    cached_tokens: int = 0
    thinking: str = ""
    thinking_tokens: int = 0
    schema: Schema | None = None

    @property
    def parsed(self) -> Any:
        """The value of an answer that was held to a schema: an instance of the pydantic model that
        was given, else plain data; None without a schema, or where the answer broke off.

        Raises:
            ValueError: the pydantic model refuses the value, for a reason that its schema does not
                state.
        """
        if self.schema is None or self.finish_reason != "stop":
            return None
        return self.schema.parse(self.text)

    @property
    def base_share(self) -> float | None:
        """Share of the tokens whose source is base, in [0, 1]; None where tokens are mixed."""
        if None in self.sources:
            return None
        return self.sources.count("base") / len(self.sources) if self.sources else 0.0

    @property
    def switches(self) -> int | None:
        """How often the source changed from one token to the next; None where tokens are mixed."""
        if None in self.sources:
            return None
        return sum(a != b for a, b in zip(self.sources, self.sources[1:], strict=False))

    @property
    def tokens_per_second(self) -> float:
        """Tokens of this answer and its thinking per second of the call it came from."""
        tokens = self.thinking_tokens + len(self.token_ids)
        return tokens / self.seconds if self.seconds else 0.0


def check_whole(completions: Collection[Completion]) -> None:
    """Raise BacoError if any answer ended in an error, where all answers are needed."""
    broken = [sample.error for sample in completions if sample.error is not None]
    if broken:
        raise BacoError(f"{len(broken)} of {len(completions)} answers broke off: {broken[0]}")


def check_group(rows: Sequence[Sequence[Completion]], *, again: bool) -> str | None:
    """The first error among prompts that were decoded together; None where all answers are whole.

    A prompt that fails in this process fails again whenever it is decoded. So it is kept with its
    error, and the others with their answers.

    Args:
        rows: the samples of every prompt.
        again: whether decoding again may help, as it does with servers.

    Raises:
        BacoError: decoding again may help, or all of several prompts failed, which is not the fault
            of a prompt.
    """
    errors = [next((c.error for c in row if c.error is not None), None) for row in rows]
    broken = [error for error in errors if error is not None]
    if broken and (again or len(broken) == len(rows) > 1):
        check_whole([sample for row in rows for sample in row])
    return next(iter(broken), None)


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer with what is known of it.

    Attributes:
        id: its id, in its source's tokenizer where the two differ; `Pair.spelling` returns its
            bytes.
        source: the model it came from; None where a combiner mixed both models' rows.
        logprob: under its source, in nats, of the raw distribution.
        text: its part of the answer's text: the characters that it completes, without the joining
            space. A stop string may have cut off the end of the last token's.
        offset: where that begins in the answer's text, in characters.
        top_logprobs: the most likely tokens (id → nats) of the source there, if requested.
        why: what the router read there, if requested.
    """

    id: int
    source: Source | None
    logprob: float
    text: str
    offset: int
    top_logprobs: Mapping[int, float] | None = None
    why: Why | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """One step of one answer, as it streams.

    Attributes:
        prompt: the index of its prompt, from 0. From a `Decoder` it is the ticket that
            `Decoder.submit` returned.
        sample: which of its samples, from 0.
        pieces: new text with its sources; empty while a character is unfinished.
        tokens: the new tokens, none or several. Text and tokens are held back while a stop string
            may still cut them off, so all chunks together have those of the completion.
        finish_reason: set on the last chunk of a sample.
        completion: the whole answer, on the last chunk of a sample.
        thinking: new text of the thinking. It comes before all pieces and tokens.
        thinking_tokens: new tokens of the thinking, with the marks around it.
    """

    prompt: int
    sample: int
    pieces: tuple[Piece, ...]
    tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None
    completion: Completion | None = None
    thinking: str = ""
    thinking_tokens: int = 0

    @property
    def text(self) -> str:
        """The new text."""
        return "".join(piece.text for piece in self.pieces)


def record(
    prompt: Any,
    pair: Pair,
    settings: Mapping[str, Any],
    completions: Sequence[Completion],
    *,
    timed: bool = False,
) -> dict[str, Any]:
    """The answers to one prompt as JSON, with what repeats them.

    Args:
        prompt: as the caller gave it.
        pair: the pair that answered.
        settings: keywords of `Baco.stream_batch` but the router.
        completions: the samples.
        timed: include ``tokens_per_second``. Files of many prompts leave it out, so that a resumed
            run writes the same bytes.

    Returns:
        ``prompt``, ``pair``, ``weights``, ``router``, ``seed``, ``params`` and ``samples``.
    """
    first = completions[0]
    row: dict[str, Any] = {
        "prompt": prompt,
        "pair": pair.name,
        "weights": pair.weights_formats,
        "router": first.router,
        "seed": first.seed,
        "params": params(pair, settings) | ({"date": first.date} if first.date else {}),
        "samples": [
            {
                "text": c.text,
                "token_ids": list(c.token_ids),
                "sources": list(c.sources),
                # NaN, for what a server does not report, is not JSON.
                "logprobs": [None if isnan(x) else round(x, 5) for x in c.logprobs],
                "base_share": None if c.base_share is None else round(c.base_share, 5),
                "switches": c.switches,
                "finish_reason": c.finish_reason,
            }
            | (
                {"thinking": c.thinking, "thinking_tokens": c.thinking_tokens}
                if c.thinking_tokens
                else {}
            )
            | ({"error": c.error} if c.error is not None else {})
            for c in completions
        ],
    }
    if timed:
        tokens = sum(c.thinking_tokens + len(c.token_ids) for c in completions)
        row["tokens_per_second"] = round(tokens / max(c.seconds for c in completions), 1)
    return row


def params(pair: Pair, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings that the answers depend on, except prompt, pair, router and seed."""
    other = {name: settings[name] for name in ("system", "switch")}
    sampling = {name: value for name, value in settings.items() if name not in other}
    values = asdict(pair.defaults.updated(sampling)) | other
    for name in ("samplers", "repetition_window", "schema", "regex", "choice", "grammar"):
        if not values[name]:
            del values[name]
    if "schema" in values:
        values["schema"] = json.loads(values["schema"]["text"])
    if not values["dry_multiplier"]:
        values = {name: value for name, value in values.items() if not name.startswith("dry_")}
    if arguments := pair.renderer.chat_options:
        values["template_args"] = dict(arguments)
    return {name: value for name, value in values.items() if name not in ("seed", "logprobs")}
