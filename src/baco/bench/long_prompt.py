"""How often a long prompt is read for its many answers."""

from dataclasses import dataclass, replace
from typing import Any

from baco.bench.contestants import Paired, Task
from baco.pair import Pair
from baco.prompts import Prompt

TOKENS, ANSWERS = 2_000, 32
_SAID = 4


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """A long prompt and its answers.

    Attributes:
        tokens: of the prompt; fewer than TOKENS where a context window ends.
        n: answers drawn.
        read: tokens that forwards of a single row read, of both halves: the prompt's.
        times: how often each half read the prompt.
        first_token_seconds: until every answer had its first token.
    """

    tokens: int
    n: int
    read: int
    times: float
    first_token_seconds: float


def long_prompt(pair: Pair, task: Task) -> LongPrompt:
    """Draw many answers to a long prompt, and count what the models were given to read."""
    window = min(pair.base.context, pair.aligned.context)
    length = min(TOKENS, window - _SAID)
    prompt = Prompt(
        _stretched(task.prompt.base_ids, length),
        _stretched(task.prompt.aligned_ids, length),
        "",
        "",
    )
    counted: list[int] = []

    def count(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        rows, width = inputs["input_ids"].shape
        if rows == 1:
            counted.append(width)

    models = {id(half.model): half.model for half in (pair.base, pair.aligned)}
    hooks = [m.register_forward_pre_hook(count, with_kwargs=True) for m in models.values()]
    try:
        run = Paired(pair).decode(replace(task.of(ANSWERS, _SAID), prompt=prompt))
    finally:
        for hook in hooks:
            hook.remove()
    read = sum(counted)
    return LongPrompt(length, ANSWERS, read, read / (2 * (length - 1)), run.first)


def _stretched(ids: tuple[int, ...], length: int) -> tuple[int, ...]:
    """The ids again and again, up to ``length``."""
    return (ids * (length // len(ids) + 1))[:length]
