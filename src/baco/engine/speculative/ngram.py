"""Drafts from what was said before: n-grams of a prompt and of the answers to it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

# Tokens that are looked back at, most first: a longer context is the better guide.
CONTEXTS = (4, 3, 2)


@dataclass(slots=True)
class NgramTable:
    """What followed every few tokens of a prompt and of the answers to it so far.

    All samples of a prompt share one: an aligned model says nearly the same in each.
    """

    after: dict[tuple[int, ...], dict[int, int]] = field(default_factory=dict)
    _taken_up: int = 0  # of the prompt

    def take_up(self, prompt: Sequence[int], most: int) -> int:
        """Take up so many more tokens of a prompt at most; how many they were."""
        start = self._taken_up
        stop = self._taken_up = min(len(prompt), start + most)
        if stop > start:
            self.learn(prompt[max(0, start - CONTEXTS[0]) : stop], stop - start)
        return stop - start

    def learn(self, text: Sequence[int], new: int) -> None:
        """Take up the last ``new`` tokens of ``text``."""
        text = _led_in(text, new)
        for at in range(CONTEXTS[0], len(text)):
            for size in CONTEXTS:
                found = self.after.setdefault(tuple(text[at - size : at]), {})
                found[text[at]] = found.get(text[at], 0) + 1

    def guess(self, text: Sequence[int], noise: Callable[[int], float], heat: float) -> int | None:
        """The token to come after ``text``: a draw from the counts, with the draw's own noise.

        Args:
            text: the answer so far, drafts included.
            noise: token id → the Gumbel noise that the true draw will give it.
            heat: temperature; 0 takes the most frequent.
        """
        for size in CONTEXTS:
            found = self.after.get(tuple(text[-size:]))
            if found is None:
                continue
            if len(found) == 1:
                return next(iter(found))
            if heat == 0:
                return max(found, key=lambda token: (found[token], -token))
            return max(found, key=lambda token: math.log(found[token]) / heat + noise(token))
        return None

    def draft(
        self, text: Sequence[int], most: int, noise: Callable[[int, int], float], heat: float
    ) -> list[int]:
        """Up to ``most`` tokens to come after ``text``; ``noise`` takes (how far ahead, token)."""
        grown, drafted = _led_in(text, 0), list[int]()
        for ahead in range(most):
            token = self.guess(grown, partial(noise, ahead), heat)
            if token is None:
                break
            grown.append(token)
            drafted.append(token)
        return drafted


def _led_in(text: Sequence[int], new: int) -> list[int]:
    """The end of a text, its last ``new`` tokens and the context before; -1 before its start."""
    size = new + CONTEXTS[0]
    tail = list(text[-size:])
    return [-1] * (size - len(tail)) + tail
