"""A sequence classifier of `transformers`, asked in batches of like length."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baco.evaluation.metrics.loading import batches, load, read_model, window

TOKENS = 4096  # in a batch, padding included


@dataclass(frozen=True, slots=True)
class Classifier:
    """A model with its tokenizer.

    Attributes:
        window: the most tokens it reads.
        pads: it takes rows of different lengths in a batch.
    """

    model: Any
    tokenizer: Any
    window: int
    pads: bool

    @classmethod
    def load(cls, role: str, name: str, tokenizer: str | None = None) -> "Classifier":
        """From a hub id or folder, and the tokenizer from another where it has none.

        Raises:
            MetricUnavailable: either cannot be loaded.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        words = load(role, tokenizer or name, AutoTokenizer.from_pretrained)
        model = load(role, name, partial(read_model, AutoModelForSequenceClassification))
        # A decoder's figure stands at the last token that is no padding. Where padding is spelt as
        # the end of text, which the text has too, only rows without padding are read aright.
        pads = words.pad_token_id not in (None, words.eos_token_id)
        model.config.pad_token_id = words.pad_token_id if pads else None
        words.padding_side = "right"
        return cls(model, words, window(words, model), pads)

    def pairs(self, ones: Sequence[str], others: Sequence[str]) -> list[dict[str, list[int]]]:
        """Every two texts as one input, the longer cut first where they do not fit."""
        found = self.tokenizer(
            list(ones), list(others), truncation="longest_first", max_length=self.window
        )
        return [{key: found[key][row] for key in found} for row in range(len(ones))]

    def logits(self, inputs: Sequence[dict[str, list[int]]]) -> NDArray[np.float64]:
        """Raw scores of every input, [N, classes]."""
        import torch

        found: NDArray[np.float64] | None = None
        lengths = [len(row["input_ids"]) for row in inputs]
        for batch in batches(lengths, TOKENS if self.pads else 1):
            padded = self.tokenizer.pad(
                [inputs[index] for index in batch], padding=self.pads, return_tensors="pt"
            )
            with torch.inference_mode():
                logits = self.model(**padded.to(self.model.device)).logits.double().cpu().numpy()
            found = np.zeros((len(inputs), logits.shape[1])) if found is None else found
            found[batch] = logits
        return np.zeros((0, self.model.config.num_labels)) if found is None else found

    def probabilities(self, inputs: Sequence[dict[str, list[int]]]) -> NDArray[np.float64]:
        """Probabilities of the classes, [N, classes]."""
        logits = self.logits(inputs)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
        probabilities: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
        return probabilities
