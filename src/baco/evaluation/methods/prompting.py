"""Prompting baselines: the aligned model alone, prompted for diversity.

Paraphrased prompts and in-context regeneration are NoveltyBench's (Zhang et al. 2025, arXiv
2504.05228, section 5); the latter requests one answer after another in one conversation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from baco.evaluation.methods.method import Answer, Draw, Family, Grid, sampled
from baco.evaluation.records import Prompt, Setting
from baco.text.prompts import Message

if TYPE_CHECKING:
    from baco.api import Baco

TEMPERATURES = (1.0, 0.7, 1.3)
AGAIN = "Can you generate a different answer?"
PARAPHRASE = (
    "Rewrite the following request in other words, keeping its meaning. "
    "Reply with the rewritten request only.\n\n{prompt}"
)
SYSTEM = (
    "Whenever you are asked something that has many good answers, pick one at random from all of "
    "them, the unusual ones included; never just give the most obvious one."
)


def over_temperatures(name: str, method: str, grid: Grid) -> list[Setting]:
    """A prompting method's operating points; only the temperature is swept."""
    temperatures = TEMPERATURES if grid.preset == "full" else TEMPERATURES[:1]
    return [
        Setting(method, f"{method} T={t:g}", t, {"kind": name, "sampling": {"temperature": t}})
        for t in sorted(temperatures)
    ]


@dataclass(frozen=True, slots=True)
class SystemPrompt:
    """A system prompt that asks for diversity."""

    name: str = "system-prompt"
    family: Family = "prompting"
    help: str = "the aligned model under a system prompt that asks for diversity"

    def settings(self, grid: Grid) -> list[Setting]:
        return over_temperatures(self.name, "diversity system prompt", grid)

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        conversations = [with_system(prompt.messages, SYSTEM) for prompt in prompts]
        seed = draw.apart(self.name)
        sampling = draw.sampling_at(setting)
        return sampled(baco, "Aligned", conversations, draw.n, seed, sampling, prompts)


@dataclass(frozen=True, slots=True)
class Paraphrase:
    """Sample i answers the i-th wording of the prompt, cycling through the wordings.

    Wordings are the task's; where it has none the aligned model rewords the prompt.
    """

    name: str = "paraphrase"
    family: Family = "prompting"
    help: str = "the aligned model, every sample from another wording of the prompt"

    def settings(self, grid: Grid) -> list[Setting]:
        return over_temperatures(self.name, "paraphrased prompts", grid)

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        wordings = self._wordings(baco, prompts, draw)
        rows: list[list[Answer]] = [[] for _ in prompts]
        for sample in range(draw.n):
            conversations = [
                [*prompt.messages[:-1], {"role": "user", "content": texts[sample % len(texts)]}]
                for prompt, texts in zip(prompts, wordings, strict=True)
            ]
            seed = draw.apart(self.name, sample)
            new = sampled(
                baco, "Aligned", conversations, 1, seed, draw.sampling_at(setting), prompts
            )
            rows = [[*row, *answers] for row, answers in zip(rows, new, strict=True)]
        return rows

    def _wordings(
        self, baco: "Baco", prompts: Sequence[Prompt], draw: Draw
    ) -> list[tuple[str, ...]]:
        bare = [prompt for prompt in prompts if not prompt.paraphrases]
        conversations = [
            [{"role": "user", "content": PARAPHRASE.replace("{prompt}", prompt.text)}]
            for prompt in bare
        ]
        seed = draw.apart(self.name, "wordings")
        rows = (
            sampled(baco, "Aligned", conversations, draw.n, seed, draw.sampling, bare)
            if conversations
            else []
        )
        generated = {
            prompt.id: tuple(dict.fromkeys(a.text.strip() for a in row if a.text.strip()))
            for prompt, row in zip(bare, rows, strict=True)
        }
        return [prompt.paraphrases or generated[prompt.id] or (prompt.text,) for prompt in prompts]


@dataclass(frozen=True, slots=True)
class Regeneration:
    """In-context regeneration: every sample is requested to differ from the earlier ones.

    Where the conversation exceeds the context window its oldest answers are left out.
    """

    name: str = "regeneration"
    family: Family = "prompting"
    help: str = "the aligned model, asked again and again for a different answer in one chat"

    def settings(self, grid: Grid) -> list[Setting]:
        return over_temperatures(self.name, "in-context regeneration", grid)

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        sampling = draw.sampling_at(setting)
        rows: list[list[Answer]] = [[] for _ in prompts]
        for sample in range(draw.n):
            conversations = [
                ask_again(baco, prompt.messages, row, sampling)
                for prompt, row in zip(prompts, rows, strict=True)
            ]
            seed = draw.apart(self.name, sample)
            new = sampled(baco, "Aligned", conversations, 1, seed, sampling, prompts)
            rows = [[*row, *answers] for row, answers in zip(rows, new, strict=True)]
        return rows


def ask_again(
    baco: "Baco",
    messages: Sequence[Message],
    earlier: Sequence[Answer],
    sampling: Mapping[str, Any],
    request: str = AGAIN,
) -> list[Message]:
    """The chat that requests one more answer, with as many earlier ones as leave room for it."""
    wanted = baco.pair.defaults.updated(sampling).max_tokens
    room = baco.pair.aligned.context - min(wanted, baco.pair.aligned.context // 4)
    for start in range(len(earlier) + 1):
        chat = list(messages)
        for answer in earlier[start:]:
            chat += [
                {"role": "assistant", "content": answer.text},
                {"role": "user", "content": request},
            ]
        if len(baco.pair.renderer.render(chat).aligned_ids) <= room:
            break
    return chat


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """The conversation under a system prompt, put before an existing one."""
    if messages[0]["role"] == "system":
        first = {"role": "system", "content": system + "\n\n" + messages[0]["content"]}
        return [first, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]
