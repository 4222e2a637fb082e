"""The reference decoder of models with different tokenizers: full forwards, one row, no cache.

It is written from the rules alone and uses nothing of the engine or of `baco.text.shared_text`
except the encoding of a text. A model that is asked for its logits first encodes what it has no ids
for, from the last safe seam, and keeps all ids of its own that no new token overlaps.
"""

import math
import unicodedata
import zlib
from collections.abc import Callable, Collection
from typing import Any

import torch

from baco.text.segmentation import is_unspaced
from tests.naive_decoding import coin_word, prompt_seed, uniform

SPACES = b" \t\n\r"
# From a model's name, a text and the model's ids for it to the tokens that may follow.
Allowed = Callable[[str, bytes, list[int]], set[int]]


def last_character(text: bytes) -> str:
    return text.decode("utf-8", "replace")[-1:]


def is_unfinished(text: bytes) -> bool:
    """Whether further bytes can complete a character at the end."""
    for length in (1, 2, 3):
        if length <= len(text):
            try:
                text[-length:].decode("utf-8")
                return False
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data" and error.start == 0:
                    return True
    return False


def spans(token: bytes, left: bytes, right: bytes) -> bool:
    """Whether a token has the end of ``left`` before the start of ``right``."""
    for at in range(1, len(token)):
        head, tail = token[:at], token[at:]
        ends = head.endswith(left) or left.endswith(head)
        if ends and (tail.startswith(right) or right.startswith(tail)):
            return True
    return False


def is_safe(text: bytes, at: int, spanned: Collection[bytes], tokens: Collection[bytes]) -> bool:
    if at == 0:
        return True
    before, after = last_character(text[:at]), text[at:].decode("utf-8", "replace")[0]
    if all(unicodedata.category(one) == "Lo" and is_unspaced(one) for one in (before, after)):
        left, right = before.encode(), after.encode()
        known = all(bytes([byte]) in tokens for byte in left + right)
        known = known or all(any(one in token for token in tokens) for one in (left, right))
        return known and not any(spans(token, left, right) for token in tokens)
    before = last_character(text[:at])
    return (
        text[at] in SPACES
        and not before.isspace()
        and (text[at : at + 1] == b" " or before.isalnum())
        and text[at - 1 : at + 1] not in spanned
    )


class Model:
    """A model, its prompt, and its ids of the answer."""

    def __init__(
        self, pair: Any, source: str, prompt: tuple[int, ...], allowed: Allowed | None = None
    ) -> None:
        self.model, self.prompt, self.source = pair.model(source), prompt, source
        self.allowed = allowed
        self.own = pair.own_vocabularies[source]
        self.data = [self.own.tokenizer.data[token] for token in range(self.own.tokenizer.size)]
        self.vocabulary = self.own.vocabulary
        self.spanned = {
            data[at : at + 2]
            for data in self.data
            for at in range(len(data))
            if data[at + 1 : at + 2]
        }
        # (id, the place in the text after it; None where it is not known)
        self.ids: list[tuple[int, int | None]] = []
        self.fixed = 0
        self.words = self._words()

    def _words(self) -> list[int]:
        names = self.model.tokenizer.get_vocab()
        end = self.model.tokenizer.eos_token_id
        seen: dict[Any, int] = {}
        words = [0] * len(self.data)
        for name in sorted(names, key=lambda name: (names[name] != end, name)):
            token = names[name]
            if token in self.own.end_ids:
                data, start = b"", 0x5EED0E0D
            elif self.data[token]:
                data, start = self.data[token], 0
            else:
                data, start = name.encode(), 0x5EED05EC
            rank = seen[data, start] = seen.get((data, start), -1) + 1
            words[token] = zlib.crc32(data, start + rank) % 2**31
        return words

    def logits(self, text: bytes) -> torch.Tensor:
        """Raw logits after the text."""
        known = next((place for _, place in reversed(self.ids) if place is not None), 0)
        if known < len(text):
            self.encode(text)
        row: torch.Tensor = self.model.score([*self.prompt, *(token for token, _ in self.ids)])[-1]
        return row

    def following(self, text: bytes) -> set[int]:
        """The tokens that may follow the text."""
        self.logits(text)
        if self.allowed is None:
            return set(range(len(self.data)))
        return self.allowed(self.source, text, [token for token, _ in self.ids])

    def is_forced(self, text: bytes) -> bool:
        """Whether the structure of the answer allows one token, or only the end."""
        if self.allowed is None:
            return False
        following = self.following(text)
        return len(following) == 1 or following <= self.own.end_ids

    def held(self, text: bytes) -> torch.Tensor:
        """The logits with all that may not follow the text at -inf."""
        row, following = self.logits(text), torch.tensor(sorted(self.following(text)))
        masked = torch.full_like(row, -math.inf)
        masked[following] = row[following]
        return masked

    def writable(self, text: bytes, *, word_starts_only: bool) -> torch.Tensor:
        """The logits with all that the model may not write at -inf."""
        row = self.held(text)
        if self.source == "base":
            never = self.vocabulary.special.clone()
            never[sorted(self.own.end_ids)] = False
            row[never] = -math.inf
        if word_starts_only:
            row[~self.vocabulary.word_start] = -math.inf
        return row

    def encode(self, text: bytes) -> None:
        places = {0: 0} | {
            place: count for count, (_, place) in enumerate(self.ids, 1) if place is not None
        }
        seam = max(
            place
            for place, count in places.items()
            if count == self.fixed
            or (count > self.fixed and is_safe(text, place, self.spanned, self.data))
        )
        new, at = [], seam
        for token in self.own.tokenizer.encode(text[seam:]):
            at += len(self.data[token])
            new.append((token, at))
        if b"".join(self.data[token] for token, _ in new) != text[seam:]:
            unplaced = [(token, None) for token, _ in new[:-1]]
            self.ids = [*self.ids[: places[seam]], *unplaced, (new[-1][0], len(text))]
            return
        shared = max(place for place in places if place in {seam, *(place for _, place in new)})
        self.ids = self.ids[: places[shared]] + [one for one in new if one[1] > shared]


def decode(
    pair: Any,
    base_prompt: tuple[int, ...],
    aligned_prompt: tuple[int, ...],
    rule: Callable[[dict[str, torch.Tensor], float], bool],
    reads: tuple[str, ...],
    *,
    digest: bytes,
    seed: int,
    sample: int,
    temperature: float,
    max_tokens: int,
    shape: Callable[[torch.Tensor, list[int], list[int]], torch.Tensor] | None = None,
    thinking: Any = None,
    allowed: Allowed | None = None,
    begins: Callable[[str, list[int]], bool] | None = None,
) -> tuple[list[int], list[str]]:
    """Tokens and sources of the thinking and the answer.

    Args:
        rule: gets the logits of the models that it ``reads`` and the coin.
        shape: changes a row of logits before the draw; gets the prompt and the answer in the ids of
            the source.
        thinking: the ids that begin it (None where the prompt has begun it) and end it, and those
            that may follow.
        allowed: see `Allowed`. The rows of the rule then also have ``base allowed``, the base row
            with all that is not allowed at -inf.
        begins: whether a free text of the structure begins after some ids of a model.
    """
    models = {
        "base": Model(pair, "base", base_prompt, allowed),
        "aligned": Model(pair, "aligned", aligned_prompt, allowed),
    }
    seed, text, position = prompt_seed(seed, digest), b"", 0
    tokens: list[int] = []
    sources: list[str] = []
    if thinking is not None:
        tokens, position = think(
            models["aligned"], thinking, (seed, sample), temperature, max_tokens
        )
        sources = ["aligned"] * len(tokens)
        if tokens and tokens[-1] in models["aligned"].own.end_ids:
            return tokens, sources
    hidden = len(tokens)
    while len(tokens) < max_tokens:
        source = sources[-1] if len(tokens) > hidden else None
        boundary, free = source is None, source is None
        if models[source or "aligned"].is_forced(text):
            boundary, source = False, source or "aligned"
        elif source is not None:
            likeliest = int(models[source].held(text).argmax())
            ids = [token for token, _ in models[source].ids]
            free = begins is not None and begins(source, ids)
            starts = bool(models[source].vocabulary.word_start[likeliest])
            boundary = starts and not last_character(text).isspace() and not is_unfinished(text)
            boundary = boundary or free
        wanted = source
        if boundary:
            rows = {name: models[name].logits(text) for name in reads}
            if "base" in reads:
                rows["base allowed"] = models["base"].held(text)
            coin = uniform(seed, sample, position, coin_word("router"))
            wanted = "base" if rule(rows, coin) else "aligned"
        assert wanted is not None
        model = models[wanted]
        switched = not free and wanted != source
        row = model.writable(text, word_starts_only=switched)
        if source is not None and bool(row.isinf().all()):  # the active source continues
            wanted, model = source, models[source]
            row = model.writable(text, word_starts_only=False)
        if shape is not None:
            row = shape(row, list(model.prompt), [token for token, _ in model.ids])
        token = _drawn(row, temperature, (seed, sample, position), model.words)
        tokens.append(token)
        sources.append(wanted)
        text += model.data[token]
        position += max(1, len(model.data[token]))
        model.ids.append((token, len(text)))
        if not model.data[token]:
            model.fixed = len(model.ids)
        if token in model.own.end_ids:
            break
    return tokens, sources


def think(
    model: Model, marks: Any, key: tuple[int, int], temperature: float, max_tokens: int
) -> tuple[list[int], int]:
    """The tokens of the thinking, which the model keeps, and the position after them."""
    begin, end, separators = marks
    phase, tokens, position = "thinking" if begin is None else "before", list[int](), 0
    while len(tokens) < max_tokens and (not tokens or tokens[-1] not in model.own.end_ids):
        token = _drawn(model.logits(b""), temperature, (*key, position), model.words)
        if (phase == "before" and token != begin) or (phase == "after" and token not in separators):
            break
        if phase == "before":
            phase = "thinking"
        elif token == end:
            phase = "after"
        tokens.append(token)
        position += max(1, len(model.data[token]))
        model.ids.append((token, 0))
        model.fixed = len(model.ids)
    return tokens, position


def _drawn(
    row: torch.Tensor, temperature: float, key: tuple[int, int, int], words: list[int]
) -> int:
    if temperature > 0:
        row = row / temperature
        noise = torch.full_like(row, -math.inf)
        # Noise lies between -3 and 17, so no other token can win.
        for token in (row > row.max() - 30).nonzero()[:, 0].tolist():
            noise[token] = -math.log(-math.log(uniform(*key, words[token])))
        row = row + noise
    return int(row.argmax())
