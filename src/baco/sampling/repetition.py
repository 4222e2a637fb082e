"""Repetition: penalties within a window, and DRY, which penalises repeated sequences.

Both read a history: the prompt of the model that writes, the answer, and draft tokens.
"""

import numpy as np
from numpy.typing import NDArray

from baco.sampling.params import SamplingParams

# Matches count up to this many tokens beyond the allowed length, and a penalty up to this many
# nats, so that it is finite.
_LONGEST = 50
_MOST = 1e9


def in_window(
    prompt: tuple[int, ...], answer: list[int], window: int
) -> tuple[tuple[int, ...], list[int]]:
    """The parts of prompt and answer among the last ``window`` tokens of both; 0 keeps all."""
    if not window:
        return prompt, answer
    left = window - len(answer)
    return (prompt[-left:], answer) if left > 0 else ((), answer[-window:])


def dry_penalties(
    history: NDArray[np.int64], breaks: NDArray[np.bool_], params: SamplingParams
) -> dict[int, float]:
    """What DRY subtracts from the logits of tokens (p-e-w 2024, text-generation-webui PR 5677).

    A token that would extend a sequence that occurred before is lowered by multiplier ·
    base^(length - allowed length), where length is that of the longest such sequence.

    Args:
        history: token ids, int64 [T].
        breaks: the tokens that no sequence goes beyond, bool [V].
        params: the ``dry_…`` fields.
    """
    allowed = params.dry_allowed_length
    lengths = repeated_lengths(history[-params.dry_window :], breaks, allowed + _LONGEST)
    return {
        token: min(params.dry_multiplier * params.dry_base ** (length - allowed), _MOST)
        for token, length in lengths.items()
        if length >= allowed
    }


def repeated_lengths(
    history: NDArray[np.int64], breaks: NDArray[np.bool_], most: int
) -> dict[int, int]:
    """For each token that followed an earlier occurrence of the history's end, the length of the
    longest end that it followed, up to ``most``.
    """
    last = len(history) - 1
    if last < 1 or breaks[history[last]]:
        return {}
    ends = np.flatnonzero(history[:-1] == history[last])
    ends = ends[~breaks[history[ends + 1]]]
    lengths: dict[int, int] = {}
    length = 1
    while len(ends):
        lengths.update(dict.fromkeys(history[ends + 1].tolist(), length))
        previous = last - length
        if length == most or breaks[history[previous]]:
            break
        ends = ends[ends >= length]
        ends = ends[history[ends - length] == history[previous]]
        length += 1
    return lengths
