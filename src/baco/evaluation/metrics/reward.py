"""A reward model: the quality of an answer to a conversation."""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from baco.errors import BacoError
from baco.evaluation.metrics.classifier import Classifier
from baco.evaluation.metrics.loading import Memory, origin
from baco.evaluation.metrics.protocols import Answers, MetricUnavailable, Prompts
from baco.text.prompts import chat_template_of, render_chat
from baco.text.templates import today

MODEL = "Skywork/Skywork-Reward-Gemma-2-27B-v0.2"  # NoveltyBench's
# Rewards of MODEL at which its rating rises by one, from 1 to 10 (NoveltyBench).
THRESHOLDS: dict[str, tuple[float, ...]] = {
    MODEL: (-7.71875, -6.28125, -6.0, -5.71875, -5.5, -5.0, -4.375, -3.4375, -2.046875)
}


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A sequence classifier with one class that reads the conversation in its chat template.

    Attributes:
        thresholds: the rewards at which NoveltyBench's rating rises; None where unknown.
    """

    made_by: Mapping[str, str]
    classifier: Classifier = field(repr=False)
    thresholds: tuple[float, ...] | None = None
    memory: Memory[str, float] = field(default_factory=Memory, repr=False)

    def rewards(self, prompts: Prompts, answers: Answers) -> list[list[float]]:
        """See :class:`Reward`."""
        texts = [
            [
                self._render([*prompt.messages, {"role": "assistant", "content": text}])
                for text in row
            ]
            for prompt, row in zip(prompts, answers, strict=True)
        ]
        scores = iter(self.memory.get([text for row in texts for text in row], self._judge))
        return [[next(scores) for _ in row] for row in texts]

    def ratings(self, rewards: Sequence[Sequence[float]]) -> list[list[float]]:
        """See :class:`Reward`."""
        if self.thresholds is None:
            raise MetricUnavailable(
                f"it is unknown which rewards of {self.made_by['model']!r} correspond to which "
                f"rating from 1 to 10: utility_k is defined for reward={MODEL!r}"
            )
        return [
            [1.0 + bisect.bisect_left(self.thresholds, reward) for reward in row] for row in rewards
        ]

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        tokenizer = self.classifier.tokenizer
        try:
            template = chat_template_of(tokenizer)
            return render_chat(template, tokenizer, messages, day=today(), ask=False).text
        except BacoError as error:
            raise MetricUnavailable(
                f"the reward model {self.made_by['model']!r} cannot read this conversation "
                f"({error}): name another for 'reward'"
            ) from error

    def _judge(self, texts: list[str]) -> list[float]:
        encoded = self.classifier.tokenizer(
            texts, add_special_tokens=False, truncation=True, max_length=self.classifier.window
        )
        inputs = [{key: encoded[key][row] for key in encoded} for row in range(len(texts))]
        return [float(reward) for reward in self.classifier.logits(inputs)[:, 0]]


@cache
def reward_model(name: str | None = None) -> RewardModel:
    """The reward model of a hub id or folder; by default NoveltyBench's Skywork model.

    Raises:
        MetricUnavailable: it cannot be loaded, gives more than one figure or has no chat template.
    """
    place = name or MODEL
    classifier = Classifier.load("reward", place)
    if classifier.model.config.num_labels != 1:
        raise MetricUnavailable(
            f"{place!r} has {classifier.model.config.num_labels} classes, a reward model has one: "
            "name another for 'reward'"
        )
    return RewardModel(origin(place, classifier.model), classifier, THRESHOLDS.get(place))
