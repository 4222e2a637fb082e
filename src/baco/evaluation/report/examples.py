"""The answers a reader may look at: a few prompts, the first samples of every setting.

A page must stay a file one can send: how many prompts are shown follows from how much text the
run holds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baco.evaluation.records import Group, Prompt, Sample

SAMPLES = 6  # of a prompt at a setting
PROMPTS = 24  # at most,
CHARACTERS = 2_500_000  # and no more than this much text in all
LONGEST = 700  # characters of an answer


@dataclass(frozen=True, slots=True)
class Examples:
    """Prompts to choose from and their answers.

    Attributes:
        prompts: the ones shown.
        answers: by (method, setting): for every prompt shown, its first samples as `coded`.
    """

    prompts: Sequence[Prompt]
    answers: Mapping[tuple[str, str], Sequence[Sequence[list[Any]]]]


def choose(prompts: Sequence[Prompt], settings: int, characters: float) -> list[Prompt]:
    """Prompts to show, every category in turn, in the task's order.

    Args:
        prompts: of the task.
        settings: how many there are.
        characters: of a mean answer.
    """
    one_prompt = settings * SAMPLES * (min(characters, LONGEST) + 40)  # 40: quotes and sources
    count = max(1, min(PROMPTS, len(prompts), int(CHARACTERS / one_prompt)))
    by_category: dict[str | None, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_category.setdefault(prompt.category, []).append(place)
    turns = sorted(
        (turn, place) for places in by_category.values() for turn, place in enumerate(places)
    )
    return [prompts[place] for place in sorted(place for _, place in turns[:count])]


def collect(groups: Iterable[Group], shown: Sequence[Prompt]) -> Examples:
    """The first samples of the shown prompts, from all groups of one pair and task."""
    place = {prompt.id: index for index, prompt in enumerate(shown)}
    answers: dict[tuple[str, str], list[list[list[Any]]]] = {}
    for group in groups:
        if group.prompt.id in place:
            rows = answers.setdefault((group.method, group.setting), [[] for _ in shown])
            rows[place[group.prompt.id]] = [coded(sample) for sample in group.samples[:SAMPLES]]
    return Examples(shown, answers)


def coded(sample: Sample) -> list[Any]:
    """An answer for the page's script: who speaks first, then text in turns.

    `["b", "Go to ", "Oslo."]` is base, then aligned; `["", "Go to Oslo."]` has no sources.
    """
    if not sample.pieces:
        return ["", _cut(sample.text)]
    turns: list[Any] = [sample.pieces[0][1][0]]
    left, last = LONGEST, ""
    for text, source in sample.pieces:
        if left <= 0:
            break
        said = text if len(text) <= left else _cut(text, left)
        left -= len(text)
        if source == last:
            turns[-1] += said
        else:
            turns.append(said)
        last = source
    return turns


def _cut(text: str, length: int = LONGEST) -> str:
    return text if len(text) <= length else text[:length] + "…"
