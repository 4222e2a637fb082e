"""Nudging as its authors' code runs it (Fei et al. 2024, arXiv 2410.09300; fywalter/nudging).

The router ``Nudging`` keeps words whole. The authors' loop works on text, in calls of 16 tokens:

- The aligned model's text is split at spaces. Its first word is always taken, and further ones
  until the base model is sure there (its highest probability is not below γ), or until the base
  model's own first token begins the aligned model's next word (the agreement rule).
- The base model then writes until its first token that is not sure, in the middle of a word too.
- Three guards end repetitions: base text that is there already, the same aligned words four times,
  and a repeated end of 30 characters or more, which is cut off.

Two things differ: prompts are the pair's own, and answers are drawn at the sweep's temperature,
which the authors set to 0.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from baco.engine.scheduler import MANY_CHUNKS
from baco.errors import BacoError
from baco.evaluation.methods.method import Answer, Draw, Family, Grid, Threshold, token_count
from baco.evaluation.records import Prompt, Setting
from baco.outputs import check_whole
from baco.routing.rules import PROBABILITY_SWEEP
from baco.source import Source
from baco.text.prompts import SAME_PROMPT

if TYPE_CHECKING:
    from baco.api import Baco

CALL = 16  # tokens of one call
MOST_ROUNDS = 150
MOST_REPEATS = 3  # of the same aligned words after each other
LONGEST_NEW = 5  # words of base text that may be in the answer already
SHORTEST_CUT = 30  # characters of a repeated end
REPEATED = "repeated"  # finish reason of an answer that a guard ended

Call = tuple[Source, str]  # who goes on, after which answer so far


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model writes in one call.

    Attributes:
        texts: of its tokens.
        tops: the highest probability at each of them.
        ended: whether the text ends there.
    """

    texts: tuple[str, ...]
    tops: tuple[float, ...]
    ended: bool

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.texts)


@dataclass(slots=True)
class Written:
    """An answer while it is written, each piece with its source."""

    pieces: list[tuple[str, Source]] = field(default_factory=list)
    finish_reason: str = "length"

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(text for text, _ in self.pieces)


def nudge(gamma: float, fits: Callable[[str], bool]) -> Generator[Call, Continuation, Written]:
    """The authors' loop; it yields calls, takes their continuations, and returns the answer.

    Args:
        gamma: the threshold γ.
        fits: whether an answer may still grow.
    """
    written, last_words, repeats = Written(), "", 0
    for _ in range(MOST_ROUNDS):
        if not fits(written.text):
            break
        aligned = yield "aligned", written.text
        if aligned.ended:
            written.pieces.append((aligned.text, "aligned"))
            written.finish_reason = "stop"
            break
        spoken, base = yield from _aligned_words(gamma, aligned.text, written.text)
        repeats = repeats + 1 if spoken == last_words else 0
        if repeats >= MOST_REPEATS:
            written.finish_reason = REPEATED
            break
        last_words = spoken
        written.pieces.append((spoken, "aligned"))
        if base is not None and base.text:
            text = yield from _base_text(gamma, base, written.text, fits)
            written.pieces.append((text, "base"))
    return _cut(written)


def _aligned_words(
    gamma: float, text: str, output: str
) -> Generator[Call, Continuation, tuple[str, Continuation | None]]:
    """The aligned model's words up to where the base model takes over, and what it writes there;
    None where it does not.
    """
    words = text.lstrip(" ").split(" ")
    space = " " * (len(text) - len(text.lstrip(" ")))
    taken = 0 if len(words) > 1 else 1
    while taken < len(words) - 1:
        taken += 1
        if not words[taken]:
            continue
        spoken = space + " ".join(words[:taken])
        base = yield "base", output + spoken
        if f" {words[taken]}".startswith(base.texts[0]) or base.tops[0] >= gamma:
            return spoken, base
    return space + " ".join(words[:taken]), None


def _base_text(
    gamma: float, base: Continuation, output: str, fits: Callable[[str], bool]
) -> Generator[Call, Continuation, str]:
    """What the base model writes: its first token, and all up to the first that is not sure."""
    text, texts, tops, ended = base.texts[0], base.texts[1:], base.tops[1:], False
    while fits(output + text):
        if "".join(texts) in text:
            break
        sure = next((at for at, top in enumerate(tops) if top < gamma), len(tops))
        new = "".join(texts[:sure])
        if len(new.split(" ")) > LONGEST_NEW and new in output + text:
            break
        text += new
        if sure < len(tops) or ended:
            break
        base = yield "base", output + text
        texts, tops, ended = base.texts, base.tops, base.ended
    return text


def _cut(written: Written) -> Written:
    """The answer without white space around it and without repeated ends."""
    text = written.text
    lead = len(text) - len(text.lstrip())
    kept = text.strip()
    while length := _repeated_end(kept):
        kept = kept[:-length]
    pieces: list[tuple[str, Source]] = []
    start, end, at = lead, lead + len(kept), 0
    for piece, source in written.pieces:
        inside = piece[max(0, start - at) : max(0, end - at)]
        at += len(piece)
        if inside and pieces and pieces[-1][1] == source:
            pieces[-1] = (pieces[-1][0] + inside, source)
        elif inside:
            pieces.append((inside, source))
    return Written(pieces, written.finish_reason)


def _repeated_end(text: str) -> int:
    """The length of a repeated end, as the authors' bisection finds it; 0 without one."""
    low, high, length = 0, len(text), 0
    while low <= high:
        middle = (low + high) // 2
        if middle >= SHORTEST_CUT and text[:-middle].endswith(text[-middle:]):
            length, low = middle, middle + 1
        else:
            high = middle - 1
    return length


class AuthorsNudging:
    """Nudging over a grid of thresholds."""

    name = "nudging-authors"
    family: Family = "Nudging"
    help = "Nudging as its authors' code runs it: cut inside words, and the agreement rule"
    threshold = Threshold(0, 1, 0.3)

    def settings(self, grid: Grid) -> list[Setting]:
        return [
            Setting(
                "Nudging, authors' code",
                f"Nudging by its authors, γ={gamma:g}",
                gamma,
                {"kind": self.name, "threshold": gamma},
            )
            for gamma in grid.thin(PROBABILITY_SWEEP)
        ]

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        calls = _Calls(baco, prompts, draw)
        places = [(index, sample) for index in range(len(prompts)) for sample in range(draw.n)]
        loops = {
            place: nudge(setting.options["threshold"], calls.fits(place[0])) for place in places
        }
        waiting = {place: next(loop) for place, loop in loops.items()}
        written: dict[tuple[int, int], Written] = {}
        step = 0
        while waiting:
            replies, waiting = calls.make(waiting, draw.apart(self.name, step)), {}
            for place, reply in replies.items():
                try:
                    waiting[place] = loops[place].send(reply)
                except StopIteration as end:
                    written[place] = end.value
            step += 1
        return [
            [calls.answer(written[index, sample]) for sample in range(draw.n)]
            for index in range(len(prompts))
        ]


class _Calls:
    """Calls of both models, many at once."""

    def __init__(self, baco: "Baco", prompts: Sequence[Prompt], draw: Draw) -> None:
        self.baco, self.pair = baco, baco.pair
        self.params = self.pair.defaults.updated(draw.sampling)
        limits = self.pair.limits(baco.router("Nudging:0.5"))
        self.prompts = [
            self.pair.renderer.render(prompt.messages, limits=limits) for prompt in prompts
        ]
        if any(prompt.thinking is not None for prompt in self.prompts):
            raise BacoError("Nudging's own loop reads no thinking: turn it off (--no-thinking)")

    def fits(self, index: int) -> Callable[[str], bool]:
        """Whether an answer to a prompt may grow by another call."""
        prompt = self.prompts[index]
        room = min(
            self.pair.base.context - len(prompt.base_ids),
            self.pair.aligned.context - len(prompt.aligned_ids),
        )
        longest = min(self.params.max_tokens, room - 2 * CALL)
        return lambda text: token_count(self.baco, text) < longest

    def make(
        self, calls: dict[tuple[int, int], Call], seed: int
    ) -> dict[tuple[int, int], Continuation]:
        """The continuations of calls, by prompt and sample."""
        decoder = self.baco.decoder(chunks_per_step=MANY_CHUNKS)
        places: dict[int, tuple[int, int]] = {}
        texts: dict[tuple[int, int], list[str]] = {place: [] for place in calls}
        tops: dict[tuple[int, int], list[float]] = {place: [] for place in calls}
        ended: dict[tuple[int, int], bool] = {}
        try:
            for place, (source, text) in calls.items():
                places[self._submit(decoder, place, source, text, seed)] = place
            while decoder.busy:
                for chunk in decoder.step():
                    place = places[chunk.prompt]
                    for token in chunk.tokens:
                        texts[place].append(token.text)
                        tops[place].append(math.exp(max((token.top_logprobs or {0: 0.0}).values())))
                    if chunk.completion is not None:
                        check_whole([chunk.completion])
                        ended[place] = chunk.finish_reason == "stop"
        finally:
            decoder.close()
        for place in calls:
            # Servers list no end token, unless there is nothing else.
            if ended[place] and len(texts[place]) > 1 and not texts[place][-1]:
                del texts[place][-1], tops[place][-1]
        return {
            place: Continuation(tuple(texts[place]), tuple(tops[place]), ended[place])
            for place in calls
        }

    def _submit(
        self, decoder: Any, place: tuple[int, int], source: Source, text: str, seed: int
    ) -> int:
        index, sample = place
        prompt, renderer = self.prompts[index], self.pair.renderer
        same = renderer.base_template == SAME_PROMPT
        base_text, aligned_text = prompt.base_text + text, prompt.aligned_text + text
        continued = replace(
            prompt,
            base_ids=renderer.encoders["base"].encode(base_text, special=not same),
            aligned_ids=renderer.encoders["aligned"].encode(aligned_text, special=False),
            joining_space=False,
        )
        # Samples are requests of their own, so each has a seed of its own.
        params = replace(
            self.params, n=1, seed=(seed + sample) % 2**62, max_tokens=CALL, logprobs=1, stop=()
        )
        router = self.baco.router(source.capitalize())
        ticket: int = decoder.submit_rendered(continued, params, raw=True, router=router)
        return ticket

    def answer(self, written: Written) -> Answer:
        """An answer as the sweep keeps it; tokens are counted piece by piece."""
        counts = [(token_count(self.baco, text), source) for text, source in written.pieces]
        tokens = sum(count for count, _ in counts)
        base = sum(count for count, source in counts if source == "base")
        return Answer(
            written.text,
            tokens,
            written.finish_reason,
            tuple(written.pieces),
            base / tokens if tokens else 0.0,
            max(0, len(counts) - 1),
        )
