"""Verbalized Sampling (Zhang et al. 2025, arXiv 2510.01171): one call returns several answers.

The prompt requests a set of answers with their probabilities, each in a tag. The answers of as many
calls as needed are the samples, in the order they were given.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from baco.evaluation.methods.method import Answer, Draw, Family, Grid, sampled, token_count
from baco.evaluation.methods.prompting import ask_again, over_temperatures, with_system
from baco.evaluation.records import Prompt, Setting

if TYPE_CHECKING:
    from baco.api import Baco

A_CALL = 5  # the paper's k
FORM_TOKENS = 40  # tags and number around one answer
SYSTEM = (
    "You are a helpful assistant. For each query, please generate a set of {count} possible "
    "responses, each within a separate <response> tag. Responses should each include a <text> and "
    "a numeric <probability>. Please sample at random from the full distribution."
)
UNPARSED = "unparsed"  # finish reason of a reply without tags or JSON


@dataclass(frozen=True, slots=True)
class Verbalized:
    """The paper's VS-Standard, k answers a call."""

    name: str = "verbalized"
    family: Family = "prompting"
    help: str = "the aligned model names several answers a call (Verbalized Sampling)"

    def settings(self, grid: Grid) -> list[Setting]:
        return over_temperatures(self.name, "verbalized sampling", grid)

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        return verbalize(baco, self.name, SYSTEM, setting, prompts, draw)


def verbalize(
    baco: "Baco",
    name: str,
    system: str,
    setting: Setting,
    prompts: Sequence[Prompt],
    draw: Draw,
    *,
    again: str | None = None,
    reasoning_tokens: int = 0,
) -> list[list[Answer]]:
    """n answers to every prompt, from as many calls as that takes.

    Args:
        name: of the method; it keys the draws.
        system: the system prompt, with ``{count}`` in the place of k.
        setting: its ``sampling`` is over that of ``draw``.
        again: asks for more answers after the first call, in the same conversation; by default
            every call begins a new one.
        reasoning_tokens: room for what comes before the answers.
    """
    count = min(A_CALL, draw.n)
    sampling = draw.sampling_at(setting)
    answer_tokens = baco.pair.defaults.updated(sampling).max_tokens
    sampling["max_tokens"] = count * (answer_tokens + FORM_TOKENS) + reasoning_tokens
    system = system.replace("{count}", str(count))
    rows: list[list[Answer]] = [[] for _ in prompts]
    earlier: list[list[Answer]] = [[] for _ in prompts]
    # Every call gives at least one answer, so n calls are enough.
    for call in range(draw.n):
        due = [index for index, row in enumerate(rows) if len(row) < draw.n]
        if not due:
            break
        conversations = [with_system(prompts[index].messages, system) for index in due]
        if again is not None:
            request = again.replace("{count}", str(count))
            conversations = [
                ask_again(baco, messages, earlier[index], sampling, request)
                for index, messages in zip(due, conversations, strict=True)
            ]
        seed, own = draw.apart(name, call), [prompts[index] for index in due]
        replies = sampled(baco, "Aligned", conversations, 1, seed, sampling, own)
        for index, (reply,) in zip(due, replies, strict=True):
            rows[index] += _answers(baco, reply)
            earlier[index].append(reply)
    return [row[: draw.n] for row in rows]


def _answers(baco: "Baco", reply: Answer) -> list[Answer]:
    """The answers of one reply; without tags or JSON the whole reply, marked as unparsed."""
    texts = parse(reply.text)
    if not texts:
        return [replace(reply, finish_reason=UNPARSED)]
    return [
        Answer(text, token_count(baco, text), "stop", ((text, "aligned"),), 0.0, 0)
        for text in texts
    ]


_ANY = re.DOTALL | re.IGNORECASE
_RESPONSE = re.compile(r"<response>(.*?)(?:</response>|(?=<response>)|\Z)", _ANY)
_ENDED = re.compile(r"<response>(.*?)(?:</response>|(?=<response>))", _ANY)
_TEXT = re.compile(r"<text>(.*?)(?:</text>|(?=<probability>))", _ANY)
_PROBABILITY = re.compile(r"<probability>.*", _ANY)
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
_OPENING = re.compile(r"[\[{]")
_TEXT_KEYS = ("text", "response", "answer", "content")


def parse(reply: str) -> list[str]:
    """The answers in a model's reply, in tags or as JSON.

    Closing tags may be missing; an answer that the end of the reply cuts off is left out. JSON may
    be in a code fence or between other words, as a list or under a single key.
    """
    tagged = [match.group(1) for match in _RESPONSE.finditer(reply)]
    texts = [match.group(1) for inner in tagged or [reply] for match in _TEXT.finditer(inner)]
    if not texts:
        texts = [_PROBABILITY.sub("", match.group(1)) for match in _ENDED.finditer(reply)]
    texts = texts or _of_json(reply)
    return [text.strip() for text in texts if text.strip()]


def _of_json(reply: str) -> list[str]:
    """The texts of all complete JSON values; of a list that was cut off, its complete entries."""
    fenced = _FENCE.search(reply)
    source = fenced.group(1) if fenced else reply
    texts: list[str] = []
    at = 0
    while opening := _OPENING.search(source, at):
        try:
            value, at = json.JSONDecoder().raw_decode(source, opening.start())
        except (ValueError, RecursionError):
            at = opening.end()
        else:
            texts += _texts(value)
    return texts


def _texts(value: dict[str, Any] | list[Any]) -> list[str]:
    if isinstance(value, dict):
        lists = [entry for entry in value.values() if isinstance(entry, list)]
        value = lists[0] if _text(value) is None and len(lists) == 1 else [value]
    texts = [_text(entry) if isinstance(entry, dict) else entry for entry in value]
    return [text for text in texts if isinstance(text, str)]


def _text(entry: dict[str, Any]) -> str | None:
    texts = (entry.get(key) for key in _TEXT_KEYS)
    return next((text for text in texts if isinstance(text, str)), None)
