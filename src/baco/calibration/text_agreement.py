"""Sums of what two models with different tokenizers compute for the same answers, word by word.

Each model reads an answer in ids of its own. The two are compared where a word of the text starts
and both have a token boundary. Their distributions are over different vocabularies, so only the
texts of their most likely tokens are compared.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from baco.calibration.agreement import answer_logits, follow, routers
from baco.errors import BacoError
from baco.models.pair import Pair
from baco.routing.parser import router as parse
from baco.routing.parser import router_name
from baco.routing.router import Router
from baco.routing.signals import Distribution, Signals
from baco.routing.two_vocabularies import check_router, read_model
from baco.routing.word_boundaries import BoundaryState
from baco.source import MODELS, Source
from baco.text.prompts import Prompt
from baco.text.shared_text import EncodingStats, OwnTokens, SharedText, is_open
from baco.text.vocabulary import Role


@dataclass(frozen=True, slots=True)
class OwnReading:
    """An answer as both models read it.

    Attributes:
        text: its bytes, without an end token.
        ids: of each model: those that it drew, and encodings of the other's words.
        places: of each model: places in the text between two of its ids → the ids before them.
        ended: whether it ended with an end token.
    """

    text: bytes
    ids: dict[Source, list[int]]
    places: dict[Source, dict[int, int]]
    ended: bool

    @classmethod
    def of(
        cls, pair: Pair, token_ids: Sequence[int], sources: Sequence[str | None]
    ) -> "OwnReading":
        """Each model encodes what the other one wrote.

        Args:
            pair: of models with different tokenizers.
            token_ids: the tokens of an answer, each an id of its source.
            sources: of these tokens.
        """
        assert pair.own_vocabularies is not None
        own: dict[Source, OwnTokens] = {
            model: OwnTokens(tables.tokenizer) for model, tables in pair.own_vocabularies.items()
        }
        shared = SharedText(dict(own.items()))
        stats, ended = EncodingStats(), False
        for token, name in zip(token_ids, sources, strict=True):
            source: Source = "base" if name == "base" else "aligned"
            own[source].read(bytes(shared.data), stats)
            ended = token in pair.end_ids_of(source)
            if not ended:
                shared.append(source, token)
        for tokens in own.values():
            tokens.read(bytes(shared.data), stats)
        ids = {model: tokens.ids for model, tokens in own.items()}
        places = {model: tokens.places for model, tokens in own.items()}
        return cls(bytes(shared.data), ids, places, ended)

    def common_places(self, room: dict[Source, int]) -> list[int]:
        """The places where both models have a token boundary, within their room in ids."""
        base, aligned = self.places["base"], self.places["aligned"]
        return [
            place
            for place in sorted(base.keys() & aligned.keys())
            if base[place] <= room["base"] and aligned[place] <= room["aligned"]
        ]


@dataclass(slots=True)
class TextAgreement:
    """Sums over the word starts of all answers that were added.

    An answer's end is a word start too, where a model ended it.

    Attributes:
        positions: their number.
        characters: of the texts that were read.
        agree: word starts where both models begin the same word: the texts of their most likely
            tokens are equal, or one is the start of the other.
        entropy: of each model in nats, over all tokens of the texts.
        word_entropy: the same, over word starts alone.
        seams: word starts inside answers that are safe seams of each model's tokenizer.
        inner: word starts inside answers.
        by_role: role of the base model's most likely token → [positions, agreeing ones].
        partings: (its role, the base model's most likely text, the aligned model's) → how often
            they differ so.
        base_words: router → words whose source is base.
        refused: the name of each router that needs one tokenizer → why.
    """

    positions: int = 0
    characters: int = 0
    agree: int = 0
    entropy: defaultdict[Source, float] = field(default_factory=lambda: defaultdict(float))
    word_entropy: defaultdict[Source, float] = field(default_factory=lambda: defaultdict(float))
    seams: Counter[Source] = field(default_factory=Counter)
    inner: int = 0
    by_role: dict[str, list[int]] = field(default_factory=dict)
    partings: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    base_words: Counter[str] = field(default_factory=Counter)
    refused: dict[str, str] = field(default_factory=dict)
    _routers: dict[str, Router] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for spelling in routers():
            router = parse(spelling)
            try:
                check_router(router)
            except BacoError as error:
                self.refused.setdefault(router_name(spelling), str(error))
            else:
                self._routers[spelling] = router

    @torch.inference_mode()
    def add(self, pair: Pair, prompt: Prompt, answer: OwnReading) -> None:
        """Run both models over one answer, and add what they compute."""
        assert pair.own_vocabularies is not None
        prompts: dict[Source, tuple[int, ...]] = {
            "base": prompt.base_ids,
            "aligned": prompt.aligned_ids,
        }
        room = {model: pair.model(model).context - len(prompts[model]) for model in MODELS}
        common = answer.common_places(room)
        if not answer.text or not common:
            return
        places = [place for place in common if self._starts_word(pair, answer, place)]
        text = answer.text[: common[-1]]
        self.characters += len(text.decode("utf-8", errors="replace"))
        at_words: dict[Source, Distribution] = {}
        for model in MODELS:
            counts = answer.places[model]
            ids = answer.ids[model][: counts[common[-1]]]
            # One more token, which is not read, so that there are logits behind the last one too.
            logits = answer_logits(pair.model(model), prompts[model], [*ids, 0])
            self.entropy[model] += float(Distribution(logits[: len(ids)]).entropy.sum())
            at_words[model] = Distribution(logits[[counts[place] for place in places]])
            self.word_entropy[model] += float(at_words[model].entropy.sum())
        inner = [place for place in places if 0 < place < len(answer.text)]
        self.inner += len(inner)
        for model in MODELS:
            tokenizer = pair.own_vocabularies[model].tokenizer
            self.seams[model] += sum(tokenizer.is_seam(answer.text, place) for place in inner)
        self._compare(pair, at_words)

    def _starts_word(self, pair: Pair, answer: OwnReading, place: int) -> bool:
        """Whether a word of the text starts at a common place, or the answer ends there."""
        if place == 0:
            return True
        if is_open(answer.text[:place]):
            return False
        if place == len(answer.text):
            return answer.ended
        return any(
            bool(
                pair.vocabulary_of(model).word_start[answer.ids[model][answer.places[model][place]]]
            )
            for model in MODELS
        )

    def _compare(self, pair: Pair, at_words: dict[Source, Distribution]) -> None:
        """Add what the distributions at the word starts of one answer say."""
        tops = {model: at_words[model].top for model in MODELS}
        roles = pair.vocabulary_of("base").role[tops["base"]].tolist()
        pairs = zip(tops["base"].tolist(), tops["aligned"].tolist(), roles, strict=True)
        for base, aligned, number in pairs:
            same, role = _same_word(pair, base, aligned), Role(number).name.lower()
            self.positions += 1
            self.agree += same
            counts = self.by_role.setdefault(role, [0, 0])
            counts[0] += 1
            counts[1] += same
            if not same:
                one = pair.spelling(base, "base").decode(errors="replace")
                other = pair.spelling(aligned, "aligned").decode(errors="replace")
                self.partings[role, one, other] += 1
        sources = self._sources(pair, at_words).sum(dim=1).tolist()
        self.base_words.update(dict(zip(self._routers, sources, strict=True)))

    def _sources(self, pair: Pair, at_words: dict[Source, Distribution]) -> Tensor:
        """The sources of the words of one answer by every router: bool [R, N], True for base."""
        words = {model: pair.vocabulary_of(model) for model in MODELS}
        signals = {
            model: Signals(
                at_words["base"], at_words["aligned"], words[model], own_vocabularies=words
            )
            for model in MODELS
        }
        choices = torch.stack(
            [router(signals[read_model(router)]) for router in self._routers.values()]
        )
        first = torch.zeros(choices.shape[1], dtype=torch.bool)
        first[0] = True
        starts = {model: words[model].word_start[at_words[model].top] for model in MODELS}
        return follow(BoundaryState(choices, first, starts["base"], starts["aligned"]))


def _same_word(pair: Pair, base: int, aligned: int) -> bool:
    """Whether two most likely tokens can begin the same word."""
    ends = (base in pair.end_ids_of("base"), aligned in pair.end_ids_of("aligned"))
    if any(ends):
        return all(ends)
    one, other = pair.spelling(base, "base"), pair.spelling(aligned, "aligned")
    shorter, longer = sorted((one, other), key=len)
    return one == other or (longer.startswith(shorter) and bool(shorter.strip()))
