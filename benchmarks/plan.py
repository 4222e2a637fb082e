"""Memory, placement, time, losses and cost of a batch, computed before it is begun.

    python -m benchmarks.plan --prompts 1e6 --n 32 --gpus 64

Nothing here is measured: it is arithmetic on a model's shape, a GPU's data sheet and a few shares
that you measure on your own machine and give. docs/planning.md explains where each comes from.
"""

import argparse
from dataclasses import dataclass

from benchmarks import launch

GB = 1e9


@dataclass(frozen=True)
class Shape:
    """One model of a pair: parameters, layers, key and value heads, and their width."""

    parameters: float
    layers: int
    kv_heads: int
    head: int

    @property
    def weights(self) -> float:
        """Bytes in bfloat16."""
        return 2 * self.parameters

    @property
    def kv_a_token(self) -> float:
        """Bytes of keys and values: 2 (K, V) × layers × heads × width × 2 bytes."""
        return 2 * self.layers * self.kv_heads * self.head * 2


# Llama 3's report (arXiv 2407.21783), Table 3, and the models' configurations.
SHAPES = {"8b": Shape(8.03e9, 32, 8, 128), "70b": Shape(70.6e9, 80, 8, 128)}


@dataclass(frozen=True)
class Gpu:
    """Figures of a data sheet: bytes, bytes per second, dense bfloat16 operations per second."""

    memory: float
    bandwidth: float
    operations: float


GPUS = {
    "h100": Gpu(80 * GB, 3.35e12, 989e12),
    "a100": Gpu(80 * GB, 2.04e12, 312e12),
    "h200": Gpu(141 * GB, 4.8e12, 989e12),
}


@dataclass(frozen=True)
class Plan:
    """A batch on a cluster; arguments are those of the command line."""

    shape: Shape
    gpu: Gpu
    prompts: float
    n: int
    gpus: int
    gpus_a_pair: int
    prompt_tokens: int
    answer_tokens: int
    usable: float
    efficiency: float
    most_rows: int
    shard_answers: int
    load_minutes: float
    check_ms: float
    mtbf_hours: float

    @property
    def weights(self) -> float:
        """Bytes of both models' weights on one GPU."""
        return 2 * self.shape.weights / self.gpus_a_pair

    @property
    def row(self) -> float:
        """Bytes of keys and values of one answer at its longest, in both models, on one GPU."""
        tokens = self.prompt_tokens + self.answer_tokens
        return 2 * self.shape.kv_a_token * tokens / self.gpus_a_pair

    @property
    def fit(self) -> int:
        """Answers for which there is room."""
        return max(0, int((self.gpu.memory * self.usable - self.weights) / self.row))

    @property
    def rows(self) -> int:
        """Answers decoded at once by one replica."""
        return min(self.fit, self.most_rows)

    @property
    def memory_seconds(self) -> float:
        """Seconds of a step that reads all weights and the rows' keys and values, half grown."""
        grown = (self.prompt_tokens + self.answer_tokens / 2) / (
            self.prompt_tokens + self.answer_tokens
        )
        return (self.weights + self.rows * self.row * grown) / self.gpu.bandwidth

    @property
    def compute_seconds(self) -> float:
        """Of its products: two operations a parameter of each half and row."""
        return 4 * self.shape.parameters * self.rows / self.gpus_a_pair / self.gpu.operations

    @property
    def bound(self) -> float:
        """Tokens a second of one replica, if nothing but the greater of the two took time."""
        return self.rows / max(self.memory_seconds, self.compute_seconds)

    @property
    def replicas(self) -> int:
        """Copies of the pair."""
        return self.gpus // self.gpus_a_pair

    @property
    def tokens(self) -> float:
        """Of all answers."""
        return self.prompts * self.n * self.answer_tokens

    def hours(self, efficiency: float) -> float:
        """Of the whole batch: every prompt is checked, read once for its answers, and answered."""
        reading = (
            4
            * self.shape.parameters
            * self.prompts
            * self.prompt_tokens
            / (self.gpu.operations * self.gpus_a_pair)
        )
        decoding = self.tokens / self.bound
        # One replica looks at every prompt before the others load.
        before = 2 * self.load_minutes * 60 + self.prompts * self.check_ms / 1e3
        return ((reading + decoding) / efficiency / self.replicas + before) / 3600

    def lost(self, hours: float) -> tuple[float, float]:
        """Failures to expect, and GPU hours they cost: half a shard and a load each."""
        failures = hours * self.gpus / self.mtbf_hours
        shard = self.shard_answers * self.answer_tokens / (self.bound * self.efficiency) / 3600
        each = (shard / 2 + self.load_minutes / 60) * self.gpus_a_pair
        return failures, failures * each

    def lines(self) -> list[tuple[str, str]]:
        """The table's rows."""
        shards = self.prompts * self.n / self.shard_answers
        bound, likely = self.hours(1), self.hours(self.efficiency)
        failures, lost = self.lost(likely)
        shard_seconds = self.shard_answers * self.answer_tokens / (self.bound * self.efficiency)
        return [
            ("placement", f"{self.replicas} pairs, {self.gpus_a_pair} GPU(s) each"),
            ("both models' weights a GPU", f"{self.weights / GB:.1f} GB"),
            (
                "keys and values a token, both models",
                f"{2 * self.shape.kv_a_token / 1024:.0f} KiB",
            ),
            ("keys and values an answer a GPU", f"{self.row / GB:.3f} GB"),
            ("answers that fit a replica", f"{self.fit:,}"),
            ("answers decoded at once", f"{self.rows:,}"),
            (
                "a step: memory / products",
                f"{self.memory_seconds * 1e3:.1f} ms / {self.compute_seconds * 1e3:.1f} ms",
            ),
            ("bound, tokens/s a replica", f"{self.bound:,.0f}"),
            ("tokens of all answers", f"{self.tokens:.3g}"),
            ("hours at the bound", f"{bound:.2f}"),
            (f"hours at {self.efficiency:.0%} of it", f"{likely:.2f}"),
            (f"GPU hours at {self.efficiency:.0%}", f"{likely * self.gpus:,.0f}"),
            ("shards, seconds each", f"{shards:,.0f}, {shard_seconds:.0f}"),
            ("failures to expect", f"{failures:.3f}"),
            ("GPU hours they cost", f"{lost:.4f}"),
        ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=float, default=1e6)
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--pair", choices=SHAPES, default="8b", help="size of each model")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--gpus-per-worker", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--answer-tokens", type=int, default=256)
    parser.add_argument("--usable", type=float, default=0.85, help="of a GPU's memory")
    parser.add_argument("--efficiency", type=float, default=0.41, help="of the bound")
    parser.add_argument("--max-rows", type=int, default=256)
    parser.add_argument("--shard-answers", type=int, default=1024)
    parser.add_argument("--load-minutes", type=float, default=3)
    parser.add_argument("--check-ms", type=float, default=0.15, help="of one prompt")
    parser.add_argument("--mtbf", type=float, default=50_000, help="hours of one GPU")
    parser.add_argument("--price", type=float, help="of a GPU hour")
    given = parser.parse_args()
    plan = Plan(
        SHAPES[given.pair],
        GPUS[given.gpu],
        given.prompts,
        given.n,
        given.gpus,
        given.gpus_per_worker,
        given.prompt_tokens,
        given.answer_tokens,
        given.usable,
        given.efficiency,
        given.max_rows,
        given.shard_answers,
        given.load_minutes,
        given.check_ms,
        given.mtbf,
    )
    if plan.rows < 1:
        parser.error(f"a pair of {given.pair} does not fit: raise --gpus-per-worker")
    lines = plan.lines()
    hours = plan.hours(plan.efficiency) * plan.gpus
    lines.append(
        (
            "bill",
            f"{hours:,.0f} × your price" if given.price is None else f"{hours * given.price:,.0f}",
        )
    )
    for name, value in lines:
        print(f"{name:40}{value}")


if __name__ == "__main__":
    launch(main)
