"""The seams of scoring: what a metric is, and the two kinds of judge that some metrics stand on.

They know prompts and answers; where the answers come from, and where the figures go, is another
matter.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from baco.errors import BacoError

if TYPE_CHECKING:
    from baco.evaluation.records import Prompt

Kind = Literal["lexical", "semantic", "quality", "utility"]
Prompts = Sequence["Prompt"]
Answers = Sequence[Sequence[str]]  # [prompts][samples]


class MetricUnavailable(BacoError):  # noqa: N818  (it is no fault of the user's, it is a state)
    """A metric cannot run here: why, and what to do. It is left out, never replaced."""


class Metric(Protocol):
    """One figure for all answers to one prompt; higher is better.

    Attributes:
        name: as a user types it.
        kind: lexical or semantic (both diversity), quality, or utility.
        higher_is_better: always True: similarities are turned into one minus, perplexity into its
            negative logarithm.
        needs: the least number of samples a prompt must have.
        made_by: the models and libraries behind the figure and their versions, for the record.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def higher_is_better(self) -> bool: ...
    @property
    def needs(self) -> int: ...
    @property
    def made_by(self) -> Mapping[str, str]: ...

    def score(self, prompts: Prompts, answers: Answers) -> list[float | None]:
        """A figure for every prompt; None where there is nothing to measure (no token at all).

        Args:
            prompts: any number of them, to be scored in one go.
            answers: all samples of each, in the order they were drawn.

        Raises:
            BacoError: a prompt has fewer samples than the metric needs.
        """
        ...


@runtime_checkable
class Equivalence(Protocol):
    """Says which answers to a prompt mean the same; `made_by` as for :class:`Metric`."""

    @property
    def made_by(self) -> Mapping[str, str]: ...

    def partition(self, prompts: Prompts, answers: Answers) -> list[list[int]]:
        """The class of every answer, [prompts][samples]; classes are numbered as they turn up."""
        ...


@runtime_checkable
class Reward(Protocol):
    """Says how good an answer to a prompt is; `made_by` as for :class:`Metric`."""

    @property
    def made_by(self) -> Mapping[str, str]: ...

    def rewards(self, prompts: Prompts, answers: Answers) -> list[list[float]]:
        """The reward of every answer, [prompts][samples], on the model's own scale."""
        ...

    def ratings(self, rewards: Sequence[Sequence[float]]) -> list[list[float]]:
        """Rewards on NoveltyBench's scale of utility, 1 to 10.

        Raises:
            MetricUnavailable: nobody has said how this model's rewards map to that scale.
        """
        ...
