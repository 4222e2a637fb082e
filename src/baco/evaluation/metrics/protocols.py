"""The protocols of scoring: a metric, and the two kinds of judge that some metrics use.

They know prompts and answers only.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

from baco.errors import BacoError
from baco.evaluation.records import Prompt

Kind = Literal["lexical", "semantic", "quality", "utility", "accuracy"]
Prompts = Sequence[Prompt]
Answers = Sequence[Sequence[str]]  # [prompts][samples]


class MetricUnavailable(BacoError):  # noqa: N818  (a state rather than an error of the user)
    """A metric cannot run here, with the reason and what to do. It is left out, never replaced."""


class Metric(Protocol):
    """One figure for all answers to one prompt. Higher is always better: a similarity counts as one
    minus itself, perplexity as its negative logarithm.

    Attributes:
        name: as a user types it.
        kind: lexical or semantic (both diversity), quality, utility, or accuracy.
        needs: the least number of samples a prompt must have.
        made_by: the models and libraries that it uses and their versions, for the record.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def needs(self) -> int: ...
    @property
    def made_by(self) -> Mapping[str, str]: ...

    def score(self, prompts: Prompts, answers: Answers) -> list[float | None]:
        """A figure for every prompt; None where there is nothing to measure, such as no token.

        Args:
            prompts: any number of them.
            answers: all samples of each, in the order they were drawn.

        Raises:
            BacoError: a prompt has fewer samples than the metric needs.
        """
        ...


@runtime_checkable
class Equivalence(Protocol):
    """Decides which answers to a prompt mean the same; `made_by` as in :class:`Metric`."""

    @property
    def made_by(self) -> Mapping[str, str]: ...

    def partition(self, prompts: Prompts, answers: Answers) -> list[list[int]]:
        """The class of every answer, [prompts][samples]; numbered in order of appearance."""
        ...


@runtime_checkable
class Reward(Protocol):
    """Scores the quality of answers; `made_by` as in :class:`Metric`."""

    @property
    def made_by(self) -> Mapping[str, str]: ...

    def rewards(self, prompts: Prompts, answers: Answers) -> list[list[float]]:
        """The reward of every answer, [prompts][samples], on the model's own scale."""
        ...

    def ratings(self, rewards: Sequence[Sequence[float]]) -> list[list[float]]:
        """Rewards on NoveltyBench's scale of utility, 1 to 10.

        Raises:
            MetricUnavailable: the mapping of this model's rewards to that scale is unknown.
        """
        ...
