"""A reference language model: the likelihood of the answers to a conversation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

from baco.errors import BacoError
from baco.evaluation.metrics.loading import batches, load, origin, read_model, window
from baco.evaluation.metrics.protocols import Answers, MetricUnavailable, Prompts
from baco.text.prompts import chat_template_of, render_chat
from baco.text.templates import today

MODEL = "openai-community/gpt2-large"  # Holtzman et al. 2020, and many after them
TOKENS = 2048  # in a batch, padding included; a row of logits each


class Reading(NamedTuple):
    """Token ids of a conversation and an answer; the last `answer` ids are the answer's."""

    ids: list[int]
    answer: int


@dataclass(frozen=True, slots=True)
class ReferenceModel:
    """A causal language model that had no part in writing the answers."""

    made_by: Mapping[str, str]
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    window: int

    def logprobs(self, prompts: Prompts, answers: Answers) -> list[list[tuple[float, int]]]:
        """Log-probability in nats of every answer given its prompt, and its number of tokens.

        The end token is not counted. Texts beyond the window are cut: first the prompt's beginning,
        then the answer's end.
        """
        readings = [
            self._read(before, text)
            for before, row in zip(map(self._before, prompts), answers, strict=True)
            for text in row
        ]
        scores = iter(self._score(readings))
        return [[next(scores) for _ in row] for row in answers]

    def _before(self, prompt: Any) -> list[int]:
        if self.tokenizer.chat_template:
            text = self._render(list(prompt.messages))
        else:
            text = "".join(f"{message['content']}\n" for message in prompt.messages)
        ids = self._ids(text)
        start = self.tokenizer.bos_token_id
        if start is None:
            start = self.tokenizer.eos_token_id  # models without one begin a text after it
        return ids if start is None or ids[:1] == [start] else [start, *ids]

    def _render(self, messages: list[Mapping[str, str]]) -> str:
        try:
            template = chat_template_of(self.tokenizer)
            return render_chat(template, self.tokenizer, messages, day=today(), ask=True).text
        except BacoError as error:
            raise MetricUnavailable(
                f"the reference model {self.made_by['model']!r} cannot read this conversation "
                f"({error}): name another for 'reference'"
            ) from error

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _read(self, before: list[int], text: str) -> Reading:
        answer = self._ids(text)[: self.window - 1]
        return Reading([*before[-(self.window - len(answer)) :], *answer], len(answer))

    def _score(self, readings: Sequence[Reading]) -> list[tuple[float, int]]:
        import torch

        totals = [0.0] * len(readings)
        answered = [index for index, reading in enumerate(readings) if reading.answer]
        for batch in batches([len(readings[index].ids) for index in answered], TOKENS):
            rows = [readings[answered[place]] for place in batch]
            longest = max(len(row.ids) for row in rows)
            padding = [longest - len(row.ids) for row in rows]
            ids = torch.tensor([row.ids + [0] * n for row, n in zip(rows, padding, strict=True)])
            mask = torch.tensor([[1] * (longest - n) + [0] * n for n in padding])
            device = self.model.device
            with torch.inference_mode():
                logits = self.model(
                    input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
                ).logits
                for place, row, scores in zip(batch, rows, logits, strict=True):
                    end = len(row.ids)
                    logp = scores[end - row.answer - 1 : end - 1].float().log_softmax(-1)
                    targets = torch.tensor(row.ids[end - row.answer :], device=device)
                    total = logp.gather(-1, targets[:, None]).double().sum()
                    totals[answered[place]] = float(total)
        return [(total, reading.answer) for total, reading in zip(totals, readings, strict=True)]


@cache
def reference_model(name: str | None = None) -> ReferenceModel:
    """The language model of a hub id or folder; by default GPT-2 large.

    Raises:
        MetricUnavailable: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = name or MODEL
    tokenizer = load("reference", place, AutoTokenizer.from_pretrained)
    model = load("reference", place, partial(read_model, AutoModelForCausalLM))
    return ReferenceModel(origin(place, model), model, tokenizer, window(tokenizer, model))
