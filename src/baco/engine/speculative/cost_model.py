"""Which draft pays: the expected tokens of a step against its estimated cost.

It uses acceptance rates and fixed costs, never a clock, so that a repeated run runs the same
forwards. Answers do not depend on its choices, only the number of forwards does.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from baco.engine.sequence import MAX_DRAFT_TOKENS
from baco.engine.speculative.acceptance import AcceptanceStats
from baco.engine.speculative.self_draft import SelfDraft
from baco.models.size import ModelSize
from baco.source import Drafter, Source


@dataclass(frozen=True, slots=True)
class Cost:
    """Estimated seconds of a forward, or of what follows it.

    Attributes:
        fixed: whatever the number of tokens.
        per_token: for each token of each row.
        per_column: for each token of a row after its first, in recurrent layers: these read a row's
            tokens one after the other.
    """

    fixed: float
    per_token: float
    per_column: float = 0.0

    def of(self, rows: int, columns: int = 1) -> float:
        """The cost for ``columns`` tokens of each row."""
        return self.fixed + self.per_token * rows * columns + self.per_column * (columns - 1)


@dataclass(frozen=True, slots=True)
class DeviceCosts:
    """Seconds on a kind of device. Orders of magnitude, only to compare plans.

    Attributes:
        layer: overhead of a layer.
        byte: reading a byte of weights.
        product: multiplying one more token with a byte of weights.
        attention: attention of one more token in a layer.
        verify, draft_token: overhead of verifying a step and of drawing one draft token per row.
        logit: verifying one entry of a row of logits.
        parameter: multiplying one more token with a weight, however many bytes it has.
    """

    layer: float
    byte: float
    product: float
    attention: float
    verify: float
    draft_token: float
    logit: float
    parameter: float = 0.0


_CPU = DeviceCosts(1e-4, 1 / 40e9, 1 / 800e9, 1e-5, 6e-4, 1e-4, 6e-9)
_GPU = DeviceCosts(3e-5, 1 / 2e12, 1 / 4e14, 0.0, 1.5e-3, 2e-4, 1e-12)
# llama.cpp unpacks quantised weights anew for each token of a call, except in formats that it lays
# out for batches when it loads them (`python -m benchmarks.gguf_speed --costs`).
_LLAMA_CPP = DeviceCosts(0.0, 1 / 40e9, 0.0, 1e-5, 6e-4, 1e-4, 6e-9, 1 / 25e9)
_LLAMA_CPP_BATCHES = replace(_LLAMA_CPP, parameter=1 / 70e9)
_COSTS = {"cpu": _CPU, "llama.cpp": _LLAMA_CPP, "llama.cpp, batches": _LLAMA_CPP_BATCHES}


@dataclass(frozen=True, slots=True)
class Plan:
    """How a step drafts.

    Attributes:
        drafter: the model that runs ahead; None for n-gram drafts.
        num_tokens: draft tokens of each row; for n-gram drafts, at most.
    """

    drafter: Drafter | None
    num_tokens: int


NO_DRAFT = Plan(None, 0)


@dataclass(frozen=True, slots=True)
class DraftPlanner:
    """Picks the plan with the most expected tokens per second.

    Attributes:
        forward: cost of a forward, by model: ``base``, ``aligned``, ``draft``.
        verification: cost of everything else that verifying a step takes.
        draft_token: seconds to draw one draft token for every row.
        joint: one forward reads the rows of both models of the pair, which share their weights.
    """

    forward: dict[str, Cost]
    verification: Cost
    draft_token: float
    joint: bool = False

    @classmethod
    def of(
        cls, sizes: Mapping[str, ModelSize], vocabulary: int, kernels: str, *, joint: bool = False
    ) -> "DraftPlanner":
        """The planner for models of these sizes with ``vocabulary`` tokens.

        Args:
            kernels: see `PairModel.kernels`.
        """
        costs = _COSTS.get(kernels, _GPU)
        forward = {
            name: Cost(
                costs.layer * size.layers + costs.byte * size.bytes,
                costs.attention * size.layers
                + costs.product * size.bytes
                + costs.parameter * size.parameters,
                size.recurrent * (costs.layer * size.layers + costs.byte * size.bytes),
            )
            for name, size in sizes.items()
        }
        verification = Cost(costs.verify, costs.logit * vocabulary)
        return cls(forward, verification, costs.draft_token, joint)

    def plan(
        self,
        stats: Sequence[AcceptanceStats],
        ngram_counts: Sequence[int],
        models: Collection[Source],
        base_share: float,
        room: Mapping[str, int],
        forced: Sequence[int] = (),
    ) -> Plan:
        """The plan of one step.

        Args:
            stats: acceptance rates of the rows.
            ngram_counts: draft tokens that n-grams have for each row.
            models: the models of the pair that any row needs.
            base_share: of the rows' last tokens. The model that writes more of them may run ahead.
            room: draft tokens that each model can read of every row.
            forced: the next tokens of each row that its structure forces, which are always
                accepted. They take the place of n-gram drafts.
        """
        rows = len(stats)
        forced = forced or [0] * rows
        text_counts = [own or count for own, count in zip(forced, ngram_counts, strict=True)]
        best, best_rate = NO_DRAFT, rows / self._verify(rows, 1, models)
        for steps in range(1, max(text_counts, default=0) + 1):
            counts = [min(steps, count) for count in text_counts]
            columns = zip(stats, counts, forced, strict=True)
            tokens = sum(_expected_tokens(rates.ngram, count, own) for rates, count, own in columns)
            rate = tokens / self._verify(rows, steps + 1, models)
            if rate > best_rate:
                best, best_rate = Plan(None, steps), rate
        for drafter in self._drafters(models, base_share):
            most = min(MAX_DRAFT_TOKENS, room[drafter], *(room[model] for model in models))
            for steps in range(2, most + 1):
                # No position follows the last token of a pair model's draft, so this token counts
                # as the step's own draw.
                checked = steps if drafter == "draft" else steps - 1
                tokens = sum(
                    _expected_tokens(rates.by_drafter[drafter], checked, own)
                    for rates, own in zip(stats, forced, strict=True)
                )
                rate = tokens / self._self_draft(drafter, rows, steps, models)
                if rate > best_rate:
                    best, best_rate = Plan(drafter, steps), rate
        return best

    def next_token_pays(self, draft: SelfDraft, models: Collection[Source]) -> bool:
        """Whether one more draft token per row raises the expected tokens per second."""
        rows, steps = len(draft.stats), len(draft.tokens)
        now = self._self_draft(draft.drafter, rows, steps, models)
        more = self._self_draft(draft.drafter, rows, steps + 1, models) - now
        return sum(draft.acceptance) * now > draft.expected_tokens * more

    def bonus_pays(self, draft: SelfDraft, verifying: Source) -> bool:
        """Whether the other model should read the last draft token too and predict a bonus token.

        The next step feeds it to the drafter together with the pending token. If the drafter draws
        it in every row, that saves one of the drafter's forwards.
        """
        rows = len(draft.stats)
        right = prod(draft.acceptance) * prod(stats.bonus for stats in draft.stats)
        saved = self.forward[draft.drafter].of(rows) + self.draft_token
        drafter, other = self.forward[draft.drafter], self.forward[verifying]
        more = drafter.per_token + other.per_token + self.verification.per_token
        columns = drafter.per_column + other.per_column
        return right * saved > rows * more + columns + self.draft_token

    def _drafters(self, models: Collection[Source], base_share: float) -> list[Drafter]:
        # A model that is needed alone gains nothing from running ahead of itself.
        drafters: list[Drafter] = []
        if len(models) == 2:
            drafters.append("base" if base_share > 0.5 else "aligned")
        if "draft" in self.forward:
            drafters.append("draft")
        return drafters

    def _verify(self, rows: int, columns: int, models: Collection[Source]) -> float:
        """Cost of a forward of these models over ``columns`` tokens of each row, and of verifying
        them.
        """
        if self.joint and len(models) > 1:
            forwards = self.forward["aligned"].of(len(models) * rows, columns)
        else:
            forwards = sum(self.forward[model].of(rows, columns) for model in models)
        return self.verification.of(rows, columns) + forwards

    def _self_draft(
        self, drafter: Drafter, rows: int, steps: int, models: Collection[Source]
    ) -> float:
        """Cost of a model that drafts ``steps`` tokens per row, and of verifying them."""
        # A draft token is drawn but not verified: about half of the work on its logits.
        drawing = self.draft_token + rows * self.verification.per_token / 2
        drafting = steps * (self.forward[drafter].of(rows) + drawing)
        columns = steps + (drafter == "draft")
        others = [model for model in models if model != drafter]
        return drafting + self._verify(rows, columns, others)


def _expected_tokens(rate: float, drafts: int, forced: int = 0) -> float:
    """Tokens that a step commits if each of ``drafts`` draft tokens is accepted with this rate, and
    the first ``forced`` of them always.
    """
    certain = min(forced, drafts)
    return certain + (1 - rate ** (drafts - certain + 1)) / (1 - rate)
