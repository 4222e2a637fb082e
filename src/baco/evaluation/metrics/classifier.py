"""A sequence classifier of `transformers`, run in batches of similar length."""

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
        pads: whether a batch can hold rows of different lengths.
    """

    model: Any
    tokenizer: Any
    window: int
    pads: bool

    @classmethod
    def load(cls, role: str, name: str, tokenizer: str | None = None) -> "Classifier":
        """Load a hub id or folder; ``tokenizer`` is another one, for a model without a tokenizer.

        Raises:
            MetricUnavailable: model or tokenizer cannot be loaded.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        text_tokenizer = load(role, tokenizer or name, AutoTokenizer.from_pretrained)
        model = load(role, name, partial(read_model, AutoModelForSequenceClassification))
        # A decoder's score is at the last token that is not padding. Where the padding token is the
        # end of text, which occurs in texts, only rows without padding are scored correctly.
        pads = text_tokenizer.pad_token_id not in (None, text_tokenizer.eos_token_id)
        model.config.pad_token_id = text_tokenizer.pad_token_id if pads else None
        text_tokenizer.padding_side = "right"
        return cls(model, text_tokenizer, window(text_tokenizer, model), pads)

    def pairs(self, ones: Sequence[str], others: Sequence[str]) -> list[dict[str, list[int]]]:
        """Inputs of two texts each; where they do not fit, the longer is cut first."""
        encoded = self.tokenizer(
            list(ones), list(others), truncation="longest_first", max_length=self.window
        )
        return [{key: encoded[key][row] for key in encoded} for row in range(len(ones))]

    def logits(self, inputs: Sequence[dict[str, list[int]]]) -> NDArray[np.float64]:
        """Raw scores of every input, [N, classes]."""
        import torch

        scores = np.zeros((len(inputs), self.model.config.num_labels))
        lengths = [len(row["input_ids"]) for row in inputs]
        for batch in batches(lengths, TOKENS if self.pads else 1):
            padded = self.tokenizer.pad(
                [inputs[index] for index in batch], padding=self.pads, return_tensors="pt"
            )
            with torch.inference_mode():
                logits = self.model(**padded.to(self.model.device)).logits
            scores[batch] = logits.double().cpu().numpy()
        return scores

    def probabilities(self, inputs: Sequence[dict[str, list[int]]]) -> NDArray[np.float64]:
        """Probabilities of the classes, [N, classes]."""
        logits = self.logits(inputs)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
        probabilities: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
        return probabilities
