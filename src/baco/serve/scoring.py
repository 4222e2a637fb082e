"""``echo``: how likely one half of the pair finds a text, told with the text's own tokens.

One forward over the text, in the decoder's thread, between two of its steps. With it a server of a
pair is a server of either half: who decodes elsewhere can ask what this half thinks of a span.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baco.backends.described import Described
from baco.detokenizer import Detokenizer
from baco.errors import BacoError
from baco.half import Half
from baco.pair import Pair
from baco.routing.rules import Source
from baco.serve.choices import by_id, finite
from baco.serve.driver import Driver
from baco.serve.replies import Provenance, TextChoice, TextLogprobs
from baco.text import name_of

# Numbers of a block of logits that are held at once: 256 MiB.
_MOST_NUMBERS = 2**26


@dataclass(frozen=True, slots=True)
class Scored:
    """A text's tokens from some place on, as a half finds them.

    Attributes:
        logprobs: of the tokens, in nats; None where nothing stands before one.
        tops: the most likely tokens (id → nats) at their places.
    """

    logprobs: list[float | None]
    tops: list[dict[int, float] | None]


@torch.inference_mode()
def score(half: Half, ids: Sequence[int], first: int, top: int) -> Scored:
    """Read a text once.

    Args:
        half: whose opinion it is.
        ids: the text's T tokens.
        first: the first token that is told of, below T.
        top: how many most likely tokens to tell at each place.
    """
    told = Scored([None], [None]) if first == 0 else Scored([], [])
    places = torch.arange(max(first, 1), len(ids))
    tokens = torch.tensor([list(ids)], device=half.device)
    for block in places.split(max(1, _MOST_NUMBERS // half.width)):
        rows = _rows(half, tokens, block - 1)
        said = tokens[0, block.to(half.device)]
        told.logprobs.extend(rows.gather(1, said[:, None])[:, 0].tolist())
        best = rows.topk(min(top, rows.shape[-1]), dim=-1)
        each = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        told.tops.extend(dict(zip(*row, strict=True)) for row in each)
    return told


def _rows(half: Half, tokens: Tensor, places: Tensor) -> Tensor:
    """Log-probabilities after each of some places of a text [1, T]: float32 [P, V].

    Raises:
        DamagedLogitsError: logits are NaN or infinite.
    """
    output = half.run(input_ids=tokens, use_cache=False, logits_to_keep=places.to(tokens.device))
    return half.fit_checked(output.logits[0]).log_softmax(dim=-1)


@dataclass(frozen=True, slots=True)
class Scoring:
    """What a request with ``echo`` asks.

    Attributes:
        texts: token ids.
        half: whose opinion is asked.
        top: most likely tokens at each place.
        first: the first token of each text that is told of.
        ids: tell token ids beside the text.
        named: name tokens by their ids.
    """

    texts: tuple[tuple[int, ...], ...]
    half: Source
    top: int
    first: int
    ids: bool
    named: bool

    def check(self, pair: Pair) -> None:
        """BacoError for what the half cannot read."""
        half = getattr(pair, self.half)
        if isinstance(half, Described):
            raise BacoError("echo needs the weights in this process: serve with --backend local")
        for text in self.texts:
            if len(text) > half.context:
                raise BacoError(
                    f"prompt of {len(text)} tokens: the {self.half} model's context window is "
                    f"{half.context}; shorten the prompt"
                )
            if self.first >= len(text):
                raise BacoError(f"echo_from is {self.first}: the prompt has {len(text)} tokens")
            for token in text:
                if not 0 <= token < pair.vocabulary.size:
                    raise BacoError(
                        f"prompt names token {token}: the vocabulary has "
                        f"{pair.vocabulary.size} tokens"
                    )

    async def choices(self, pair: Pair, driver: Driver, timeout: float) -> list[TextChoice]:
        """One choice for every text.

        Raises:
            QueueFullError, ClosedError, TimeoutError: as for answers.
        """
        async with asyncio.timeout(timeout):
            asked = [driver.call(self._reading(pair, text)) for text in self.texts]
            scored = await asyncio.gather(*map(asyncio.wrap_future, asked))
        pairs = enumerate(zip(self.texts, scored, strict=True))
        return [self._choice(pair, index, text, one) for index, (text, one) in pairs]

    def _reading(self, pair: Pair, text: tuple[int, ...]) -> Callable[[], Scored]:
        return lambda: score(getattr(pair, self.half), text, self.first, self.top)

    def _choice(self, pair: Pair, index: int, text: tuple[int, ...], scored: Scored) -> TextChoice:
        shown = text[self.first :]

        def called(token: int) -> str:
            return by_id(token) if self.named else name_of(pair.spelling(token))

        texts = _texts(pair, shown)
        offsets = [0]
        for one in texts[:-1]:
            offsets.append(offsets[-1] + len(one))
        return TextChoice(
            index=index,
            text="".join(texts),
            logprobs=TextLogprobs(
                tokens=[called(token) for token in shown],
                token_logprobs=[None if one is None else finite(one) for one in scored.logprobs],
                top_logprobs=[
                    None if top is None else {called(one): finite(top[one]) for one in top}
                    for top in scored.tops
                ],
                text_offset=offsets,
            ),
            finish_reason="length",
            prompt_token_ids=list(text) if self.ids else None,
            token_ids=[] if self.ids else None,
            baco=Provenance(sources=[], base_share=0, switches=0),
        )


def _texts(pair: Pair, tokens: Sequence[int]) -> list[str]:
    """The text of each token, special ones by their names; they join to what the ids decode to."""
    texts, ordinary = list[str](), Detokenizer(pair.tokenizer)
    for token in tokens:
        if pair.vocabulary.special[token]:
            texts += [*ordinary.close(), pair.spelling(token).decode()]
            ordinary = Detokenizer(pair.tokenizer)
        else:
            texts += ordinary.push(token)
    texts += ordinary.close()
    if "".join(texts) != pair.tokenizer.decode(tokens):  # which takes the first space off
        first = next((index for index, text in enumerate(texts) if text), 0)
        texts[first] = texts[first].removeprefix(" ")
    return texts
