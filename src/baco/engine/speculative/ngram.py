"""Prompt-lookup drafting: n-grams of a prompt and of the answers to it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

# Lengths of the contexts that are looked up, the longest first: it predicts best.
CONTEXTS = (4, 3, 2)


@dataclass(slots=True)
class NgramTable:
    """The tokens that followed every context in a prompt and in its answers so far, counted.

    All samples of a prompt share one table, since an aligned model writes nearly the same in each.
    """

    counts: dict[tuple[int, ...], dict[int, int]] = field(default_factory=dict)
    _prompt_read: int = 0  # tokens of the prompt that are in the table

    def add_prompt(self, prompt: Sequence[int], most: int) -> int:
        """Add up to ``most`` further tokens of the prompt; returns how many were added."""
        start = self._prompt_read
        stop = self._prompt_read = min(len(prompt), start + most)
        if stop > start:
            self.add(prompt[max(0, start - CONTEXTS[0]) : stop], stop - start)
        return stop - start

    def add(self, tokens: Sequence[int], new: int) -> None:
        """Add the last ``new`` tokens of a text."""
        tokens, counts = _with_context(tokens, new), self.counts
        for at in range(CONTEXTS[0], len(tokens)):
            token, context = tokens[at], tuple(tokens[at - CONTEXTS[0] : at])
            for size in CONTEXTS:
                following = counts.setdefault(context[-size:], {})
                following[token] = following.get(token, 0) + 1

    def predict(
        self, tokens: Sequence[int], noise: Callable[[int], float], temperature: float
    ) -> int | None:
        """Predict the token after ``tokens``: a draw from the counts with the real draw's noise.

        Args:
            tokens: the answer so far, draft tokens included.
            noise: from token id to the Gumbel noise that the real draw will add to it.
            temperature: 0 takes the most frequent token.
        """
        for size in CONTEXTS:
            following = self.counts.get(tuple(tokens[-size:]))
            if following is None:
                continue
            if len(following) == 1:
                return next(iter(following))
            if temperature == 0:
                return max(following, key=lambda token: (following[token], -token))
            scores = {
                token: math.log(count) / temperature + noise(token)
                for token, count in following.items()
            }
            return max(scores, key=lambda token: scores[token])
        return None

    def draft(
        self,
        tokens: Sequence[int],
        most: int,
        noise: Callable[[int, int], float],
        temperature: float,
    ) -> list[int]:
        """Up to ``most`` draft tokens; ``noise`` takes (offset from the next token, token id)."""
        context, draft_tokens = _with_context(tokens, 0), list[int]()
        for offset in range(most):
            token = self.predict(context, partial(noise, offset), temperature)
            if token is None:
                break
            context.append(token)
            draft_tokens.append(token)
        return draft_tokens


def _with_context(tokens: Sequence[int], new: int) -> list[int]:
    """The last ``new`` tokens and the longest context before them; -1 before the text's start."""
    size = new + CONTEXTS[0]
    tail = list(tokens[-size:])
    return [-1] * (size - len(tail)) + tail
