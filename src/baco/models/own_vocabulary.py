"""What each model of a pair knows of its own token ids, where the tokenizers differ."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from baco.models.model import PairModel
from baco.source import Source
from baco.text.shared_text import TextTokenizer
from baco.text.thinking import find_marks
from baco.text.vocabulary import ENGLISH, Vocabulary


@dataclass(frozen=True, slots=True)
class OwnVocabulary:
    """The tables of one model, over its own ids.

    Attributes:
        tokenizer: encodes what the other model wrote.
        vocabulary: word starts, roles and special tokens.
        end_ids: tokens that end an answer.
        banned: tokens that the model never writes, bool [V].
        noise_words: see `TextTokenizer.noise_words`, int64 [V].
    """

    tokenizer: TextTokenizer
    vocabulary: Vocabulary
    end_ids: frozenset[int]
    banned: Tensor
    noise_words: Tensor

    @classmethod
    def of(
        cls, model: PairModel, source: Source, function_words: str | Iterable[str] = ENGLISH
    ) -> Self:
        """Compute them.

        Raises:
            BacoError: the tokenizer cannot share a text with another one.
        """
        size = max(model.tokenizer.get_vocab().values()) + 1
        end_ids = frozenset(end for end in model.end_ids if end < size)
        tokenizer = TextTokenizer(model.tokenizer, model.name, end_ids)
        vocabulary = Vocabulary.from_tokenizer(model.tokenizer, size, function_words=function_words)
        banned = torch.zeros(size, dtype=torch.bool)
        if source == "base":
            banned = special_tokens(vocabulary, end_ids, model.tokenizer)
        return cls(tokenizer, vocabulary, end_ids, banned, torch.tensor(tokenizer.noise_words))


def special_tokens(vocabulary: Vocabulary, end_ids: frozenset[int], tokenizer: Any) -> Tensor:
    """The special tokens that end no answer, and the marks of thinking: bool [V]. The base model
    never writes them, and no structure of an answer allows them.
    """
    special = vocabulary.special.clone()
    special[sorted(end_ids)] = False
    marks = find_marks(tokenizer)
    if marks is not None:  # some tokenizers do not call them special
        special[[marks.begin_id, marks.end_id]] = True
    return special
