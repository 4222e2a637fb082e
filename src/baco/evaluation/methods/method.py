"""The protocol between a sweep and its methods."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

from baco.evaluation.records import Prompt, Setting
from baco.sampling.params import MAX_SEED
from baco.source import Source
from baco.text.answer_text import merge_pieces
from baco.text.prompts import Message, chat_digest

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.outputs import Completion

Preset = Literal["quick", "full"]
Family = Literal["base", "aligned", "Nudging", "prompting", "ensemble", "mixing", "BACo", "other"]
FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True, slots=True)
class Grid:
    """The size of a method's grid of operating points.

    Attributes:
        preset: ``full``, or ``quick`` for about half the points.
        n: samples per prompt.
    """

    preset: Preset
    n: int

    def thin(self, values: Sequence[float]) -> list[float]:
        """All values, or every other one for the quick preset."""
        return list(values) if self.preset == "full" else list(values[::2])


@dataclass(frozen=True, slots=True)
class Draw:
    """How the samples of all methods are drawn, unless a setting sweeps it.

    Attributes:
        n: samples per prompt.
        seed: of all draws.
        sampling: keywords of :class:`baco.SamplingParams` over the pair's own.
    """

    n: int
    seed: int
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def apart(self, *words: object) -> int:
        """A separate seed for one part of a method's draws, derived from this one.

        Draws of the same seed, prompt and sample share their noise, so samples that come from
        several calls need different seeds. A method that rewords its prompts still keys its draws
        by the task's prompt, see `sampled`, and needs a seed that other methods do not share.
        """
        text = " ".join(map(str, (self.seed, *words))).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) & MAX_SEED

    def sampling_at(self, setting: Setting) -> dict[str, Any]:
        """The sampling parameters at a setting, whose own take the place of these."""
        return {**self.sampling, **setting.options.get("sampling", {})}


@dataclass(frozen=True, slots=True)
class Answer:
    """One sample of a method; see :class:`baco.evaluation.records.Sample`."""

    text: str
    tokens: int
    finish_reason: str
    pieces: tuple[tuple[str, Source | None], ...] = ()
    base_share: float | None = None
    switches: int | None = None

    @classmethod
    def of(cls, completion: "Completion") -> "Answer":
        """A completion with its sources; neighbouring pieces of one source are joined.

        Raises:
            BacoError: it ended with an error.
        """
        from baco.outputs import check_whole

        check_whole([completion])
        return cls(
            text=completion.text,
            tokens=len(completion.token_ids),
            finish_reason=completion.finish_reason,
            pieces=tuple(merge_pieces(completion.pieces)),
            base_share=completion.base_share,
            switches=completion.switches,
        )


def sampled(
    baco: "Baco",
    router: str,
    conversations: Sequence[Sequence[Message]],
    n: int,
    seed: int,
    sampling: Mapping[str, Any],
    prompts: Sequence[Prompt] | None = None,
) -> list[list[Answer]]:
    """n samples of every conversation by a router, one model alone included.

    Args:
        prompts: of the task, where the conversations are reworded; they key the draws.
    """
    digests = None if prompts is None else [chat_digest(prompt.messages) for prompt in prompts]
    rows = baco.generate_batch(
        conversations, router=router, n=n, seed=seed, digests=digests, **sampling
    )
    return [[Answer.of(completion) for completion in row] for row in rows]


def answers_of(
    baco: "Baco", router: str, setting: Setting, prompts: Sequence[Prompt], draw: Draw
) -> list[list[Answer]]:
    """n samples of every prompt as it is, by a router at a setting."""
    conversations = [prompt.messages for prompt in prompts]
    return sampled(baco, router, conversations, draw.n, draw.seed, draw.sampling_at(setting))


def token_count(baco: "Baco", text: str) -> int:
    """Number of tokens of a text that was not decoded token by token."""
    return len(baco.pair.tokenizer(text, add_special_tokens=False)["input_ids"])


class Threshold(NamedTuple):
    """The range of the number that follows a method's name in the name of a server's model."""

    low: float
    high: float
    example: float


class Method(Protocol):
    """Turns prompts into samples.

    A method that compares or mixes the two models' distributions token by token sets
    ``needs_one_tokenizer = True``; it is then refused on pairs with different tokenizers.

    A server takes ``baco/NAME`` as a model; the request's sampling then takes the place of the
    setting's. A method whose settings have an option ``threshold`` sets ``threshold``, a
    `Threshold`, and is named with the number. A method that cannot be a server's model, because
    it decodes other than through ``baco``, sets ``not_served`` to the reason.

    Attributes:
        name: as a user types it.
        help: a sentence for lists.
        family: its row in the report's headline table; one of ``FAMILIES``.
    """

    @property
    def name(self) -> str: ...
    @property
    def help(self) -> str: ...
    @property
    def family(self) -> Family: ...

    def settings(self, grid: Grid) -> list[Setting]:
        """Its operating points; their options must be plain JSON."""

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        """`draw.n` samples of every prompt, a pure function of the arguments."""
