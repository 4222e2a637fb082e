"""What to draft, and whether drafting pays.

Drafts come from three places: from what followed the same few tokens in the prompt and in the
answers to it (`baco.engine.speculative.ngram`), from one half of the pair running ahead, or from a
small draft model that does the same. Whatever they are, the answer stays the same; they only decide
how often the halves run. Choices hang on what was accepted before and on fixed costs, never on a
clock, so that a run that is repeated runs the same forwards.
"""

from bisect import bisect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from baco.models.size import Size

if TYPE_CHECKING:
    from baco.engine.speculative.self_draft import Run

MAX_DRAFT_TOKENS = 8
# How quickly a record forgets.
_EMA_WEIGHT = 0.1
# A half that runs ahead is the likelier to be borne out the surer it is: the chance that its draft
# stands is remembered apart for positions where its most likely token has less than so much.
CONFIDENCE_EDGES = (0.5, 0.9, 0.99)
# What is taken for granted before anything was seen.
_INITIAL_ACCEPTANCE = (0.5, 0.65, 0.7, 0.97)


@dataclass(slots=True)
class AcceptanceStats:
    """How a sequence's drafts fared lately: the chance that the next drafted token stands.

    Attributes:
        known: of a token drafted from continuations.
        ahead: of a token drawn from one half, or from the draft model, by its name.
        sure: the same by how sure it was, a chance for each stretch between the numbers of SURE.
        beyond: that what the checking half says after the last draft is what the runner says.
    """

    known: float = 0.5
    beyond: float = 0.75
    ahead: dict[str, float] = field(
        default_factory=lambda: {"base": 0.8, "aligned": 0.85, "draft": 0.6}
    )
    sure: dict[str, list[float]] = field(default_factory=dict)

    def update_ngram(self, accepted: int, drafted: int) -> None:
        """``accepted`` of the drafted tokens stood; the one after them did not."""
        self.known = _ema(self.known, accepted, drafted)

    def update_self_draft(
        self, half: str, accepted: int, drafted: int, sure: Sequence[float]
    ) -> None:
        """The same for a half that ran ahead; ``sure`` are the greatest probabilities it saw, as
        far as they are known.
        """
        self.ahead[half] = _ema(self.ahead[half], accepted, drafted)
        chances = self._chances(half)
        for index in range(min(accepted + 1, len(sure))):
            at = bisect(CONFIDENCE_EDGES, sure[index])
            chances[at] = _ema(chances[at], index < accepted, 1)

    def update_bonus(self, right: bool) -> None:
        """What the checking half said after the last draft was what the runner said, or not."""
        self.beyond = _ema(self.beyond, right, 1)

    def chance(self, half: str, sure: float) -> float:
        """That a token stands which a half drafted whose most likely token has probability
        ``sure``.
        """
        return self._chances(half)[bisect(CONFIDENCE_EDGES, sure)]

    def _chances(self, half: str) -> list[float]:
        return self.sure.setdefault(half, list(_INITIAL_ACCEPTANCE))


def _ema(before: float, accepted: int, drafted: int) -> float:
    tried = min(accepted + 1, drafted)
    for index in range(tried):
        before += _EMA_WEIGHT * ((index < accepted) - before)
    return min(max(before, 0.02), 0.98)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a forward, or what follows it, costs, in seconds of an idealised device."""

    fixed: float  # at all
    token: float  # for every token of every row

    def of(self, tokens: int) -> float:
        """Of ``tokens`` tokens in all rows."""
        return self.fixed + self.token * tokens


@dataclass(frozen=True, slots=True)
class DeviceCosts:
    """How quick a kind of device is, in seconds. Orders of magnitude only: they weigh plans against
    each other.

    Attributes:
        layer: of a forward, whatever it computes.
        byte: of weights that are read.
        product: of multiplying one more token with a byte of weights.
        attention: of one more token in a layer.
        round, step: what deciding a round, and drawing one draft, take beside all that.
        entry: of a row of logits that is decided.
    """

    layer: float
    byte: float
    product: float
    attention: float
    round: float
    step: float
    entry: float


_CPU = DeviceCosts(1e-4, 1 / 40e9, 1 / 800e9, 1e-5, 6e-4, 1e-4, 6e-9)
_GPU = DeviceCosts(3e-5, 1 / 2e12, 1 / 4e14, 0.0, 1.5e-3, 2e-4, 1e-12)


@dataclass(frozen=True, slots=True)
class Plan:
    """How one round goes.

    Attributes:
        runner: who runs ahead, ``base``, ``aligned`` or ``draft``; None where nobody does.
        steps: for how many tokens; or, with nobody ahead, the most to draft from continuations.
    """

    runner: str | None
    steps: int


PLAIN = Plan(None, 0)


def priced(halves: Mapping[str, "Size"], vocabulary: int, device: str) -> "DraftPlanner":
    """The planner for halves of these sizes, with so many tokens in their vocabulary, on a kind of
    device (``cpu``, ``cuda`` …).
    """
    pace = _CPU if device == "cpu" else _GPU
    costs = {
        name: Cost(
            pace.layer * size.layers + pace.byte * size.bytes,
            pace.attention * size.layers + pace.product * size.bytes,
        )
        for name, size in halves.items()
    }
    return DraftPlanner(costs, Cost(pace.round, pace.entry * vocabulary), pace.step)


@dataclass(frozen=True, slots=True)
class DraftPlanner:
    """Picks the plan that promises the most tokens for what it costs.

    Attributes:
        costs: of a forward of each half, and of the draft model.
        round: of all else that deciding tokens in a round needs.
        step: of drawing one draft of every row.
    """

    costs: dict[str, Cost]
    round: Cost
    step: float

    def plan(
        self,
        records: Sequence[AcceptanceStats],
        known: Sequence[int],
        halves: Collection[str],
        base_share: float,
        room: Mapping[str, int],
    ) -> Plan:
        """The plan of one round.

        Args:
            records: of the rows.
            known: how many tokens continuations can draft for each row.
            halves: the halves that any row needs.
            base_share: of what the rows said lately; the half that says more runs ahead.
            room: how many drafts each half, or the draft model, can read of every row.
        """
        rows = len(records)
        best, most = PLAIN, rows / self._check(rows, halves)
        for steps in range(1, max(known, default=0) + 1):
            counts = [min(steps, count) for count in known]
            each = zip(records, counts, strict=True)
            gain = sum(_expected(record.known, count) for record, count in each)
            rate = gain / self._check(rows * (steps + 1), halves)
            if rate > most:
                best, most = Plan(None, steps), rate
        for runner in self._runners(halves, base_share):
            most_steps = min(MAX_DRAFT_TOKENS, room[runner], *(room[half] for half in halves))
            for steps in range(2, most_steps + 1):
                # A half's own last draft is not read: no position is left to decide after it.
                decided = steps if runner == "draft" else steps - 1
                gain = sum(_expected(record.ahead[runner], decided) for record in records)
                rate = gain / self._run(runner, rows, steps, halves)
                if rate > most:
                    best, most = Plan(runner, steps), rate
        return best

    def worth_a_step(self, run: "Run", halves: Collection[str]) -> bool:
        """Does one more draft of every row promise more for its cost than the round has without?"""
        rows, steps = len(run.records), len(run.tokens)
        now = self._run(run.runner, rows, steps, halves)
        more = self._run(run.runner, rows, steps + 1, halves) - now
        return sum(run.chances) * now > run.gain * more

    def bonus_pays(self, run: "Run", checker: str) -> bool:
        """Is the checking half to read the last drafts too, for a chance that the tokens it then
        says are what the runner says, which spares the next round a step?

        One row of which something does not stand, or is not what was expected, spares nothing.
        """
        rows = len(run.records)
        right = prod(run.chances) * prod(record.beyond for record in run.records)
        step = self.costs[run.runner].of(rows) + self.step
        more = self.costs[run.runner].token + self.costs[checker].token + self.round.token
        return right * step > rows * more + self.step

    def _runners(self, halves: Collection[str], base_share: float) -> list[str]:
        # A lone half that runs ahead of itself gains nothing.
        lead = ["base" if base_share > 0.5 else "aligned"] if len(halves) == 2 else []
        return lead + (["draft"] if "draft" in self.costs else [])

    def _check(self, tokens: int, halves: Collection[str]) -> float:
        """The halves reading so many tokens, and deciding them."""
        return self.round.of(tokens) + sum(self.costs[half].of(tokens) for half in halves)

    def _run(self, runner: str, rows: int, steps: int, halves: Collection[str]) -> float:
        """One running ahead, and the halves reading what it drafted."""
        drawing = self.step + rows * self.round.token / 2  # a draft is drawn, and not judged
        run = steps * (self.costs[runner].of(rows) + drawing)
        tokens = rows * (steps + (runner == "draft"))
        return run + self._check(tokens, [half for half in halves if half != runner])


def _expected(chance: float, drafts: int) -> float:
    """Tokens that a round gives, where each of ``drafts`` drafts stands with ``chance``."""
    return (1 - chance ** (drafts + 1)) / (1 - chance)
