"""The aligned model without its chat template (Yun et al. 2025, "The Price of Format", 2505.18949).

The template itself makes answers alike, so leaving it out is a rival that costs nothing. Either the
model continues the bare text of the messages ("simple steer"), or roles and messages stand on lines
of their own ("minimum dialog").
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from baco.engine.scheduler import MANY_CHUNKS
from baco.evaluation.methods.method import Answer, Draw, Family, Grid
from baco.evaluation.methods.prompting import over_temperatures
from baco.evaluation.records import Prompt, Setting
from baco.text.prompts import Message, chat_digest

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.outputs import Completion

Format = Literal["plain", "minimal"]
NEXT_TURN = "\nuser\n"  # where the model goes on to the user's next message


@dataclass(frozen=True, slots=True)
class Unformatted:
    """The aligned model alone, under a prompt that is not its chat template's."""

    format: Format

    @property
    def name(self) -> str:
        return f"{self.format}-prompt"

    @property
    def family(self) -> Family:
        return "prompting"

    @property
    def help(self) -> str:
        how = "without its chat template" if self.format == "plain" else "with minimal format"
        return f"the aligned model {how} (The Price of Format)"

    def settings(self, grid: Grid) -> list[Setting]:
        title = "no chat template" if self.format == "plain" else "minimal format"
        return over_temperatures(self.name, f"aligned, {title}", grid)

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        seed = draw.apart(self.name)
        params = baco.pair.defaults.updated(
            {**draw.sampling_at(setting), "n": draw.n, "seed": seed}
        )
        if self.format == "minimal":
            params = replace(params, stop=(*params.stop, NEXT_TURN))
        decoder, router = baco.decoder(chunks_per_step=MANY_CHUNKS), baco.router("Aligned")
        limits = baco.pair.limits(router, False)
        places: dict[int, int] = {}
        answers: list[list[Completion]] = [[] for _ in prompts]
        try:
            for index, prompt in enumerate(prompts):
                raw = baco.pair.renderer.raw(text_of(prompt.messages, self.format), limits=limits)
                raw = replace(raw, digest=chat_digest(prompt.messages))
                places[decoder.submit_rendered(raw, params, raw=True, router=router)] = index
            while decoder.busy:
                for chunk in decoder.step():
                    if chunk.completion is not None:
                        answers[places[chunk.prompt]].append(chunk.completion)
        finally:
            decoder.close()
        return [[Answer.of(c) for c in sorted(row, key=lambda c: c.sample)] for row in answers]


def text_of(messages: Sequence[Message], format: Format) -> str:
    """The text that the aligned model continues."""
    if format == "plain":
        return "\n\n".join(message["content"] for message in messages)
    turns = "".join(f"{message['role']}\n{message['content']}\n" for message in messages)
    return f"{turns}assistant\n"
