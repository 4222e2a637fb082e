"""String Seed of Thought (Misaki and Akiba 2025, arXiv 2510.21150).

The system prompt asks for a random string first, and then for an answer that is derived from it.
String and derivation are cut off before the answer is scored. The wording is ours, after the
paper's description.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from baco.evaluation.methods.method import Answer, Draw, Family, Grid, sampled
from baco.evaluation.methods.prompting import over_temperatures, with_system
from baco.evaluation.methods.verbalized import UNPARSED
from baco.evaluation.records import Prompt, Setting

if TYPE_CHECKING:
    from baco.api import Baco

SEED_TOKENS = 256  # string, derivation and tags around an answer
SYSTEM = (
    "Before you answer, write a random string of letters, digits and signs in a <random_string> "
    "tag. Then think in a <thinking> tag: list what the answer could vary in, and let the string "
    "decide each choice, for instance by the sum of its characters' codes modulo the number of "
    "options. Do not just take the obvious choice. Then write the answer that follows, and nothing "
    "else, in an <answer> tag."
)
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class StringSeed:
    """The aligned model, which derives every answer from a random string of its own."""

    name: str = "string-seed"
    family: Family = "prompting"
    help: str = "the aligned model derives answers from a random string (String Seed of Thought)"

    def settings(self, grid: Grid) -> list[Setting]:
        return over_temperatures(self.name, "string seed of thought", grid)

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        sampling = draw.sampling_at(setting)
        longest = baco.pair.defaults.updated(sampling).max_tokens
        sampling["max_tokens"] = longest + SEED_TOKENS
        conversations = [with_system(prompt.messages, SYSTEM) for prompt in prompts]
        seed = draw.apart(self.name)
        rows = sampled(baco, "Aligned", conversations, draw.n, seed, sampling, prompts)
        return [[_derived(reply) for reply in row] for row in rows]


def _derived(reply: Answer) -> Answer:
    """The answer of a reply; a reply without the tag is kept whole, marked as unparsed."""
    answer = answer_of(reply.text)
    if answer is None:
        return replace(reply, finish_reason=UNPARSED)
    return replace(reply, text=answer, pieces=((answer, "aligned"),))


def answer_of(reply: str) -> str | None:
    """The text of the last ``<answer>`` tag that is not empty; the closing one may be missing."""
    answers = [match.group(1).strip() for match in _ANSWER.finditer(reply)]
    return next((answer for answer in reversed(answers) if answer), None)
