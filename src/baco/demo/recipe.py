"""The sizes, amounts and rates that make the demo pair."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Course:
    """One run of training: `steps` batches of `batch` rows at peak rates `rate` and `fine`."""

    steps: int
    batch: int
    rate: float  # Muon's, for matrices
    fine: float  # AdamW's, for embeddings and norms


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything about the pair but its seed."""

    vocabulary: int = 2048
    hidden: int = 160
    layers: int = 5
    heads: int = 5
    inner: int = 432
    context: int = 512
    width: int = 128  # tokens in a training row
    documents: int = 90_000
    base: Course = field(default_factory=lambda: Course(1000, 16, 0.02, 4e-3))
    # Larger batches at low rates bring uncertain predictions near the shares in the text.
    settling: Course = field(default_factory=lambda: Course(150, 32, 0.004, 8e-4))
    examples: int = 10_000  # clean answers for fine-tuning
    handed: int = 26_000  # answers of which the base made some choices
    tuning: Course = field(default_factory=lambda: Course(800, 16, 0.006, 1e-3))
    questions: int = 600  # to the tuned model, `candidates` answers each
    candidates: int = 8
    typicality: float = 0.3  # weight of the mean log-probability in the choice of an answer
    preferring: Course = field(default_factory=lambda: Course(64, 16, 0.004, 7e-4))
    min_p: float = 0.1
    max_tokens: int = 96


MINUTE = Recipe(
    vocabulary=512,
    hidden=32,
    layers=2,
    heads=2,
    inner=64,
    documents=200,
    base=Course(8, 4, 0.02, 4e-3),
    settling=Course(2, 8, 0.004, 8e-4),
    examples=60,
    handed=30,
    tuning=Course(4, 4, 0.006, 1e-3),
    questions=4,
    candidates=2,
    preferring=Course(2, 4, 0.004, 7e-4),
    max_tokens=16,
)
"""A recipe that takes seconds; its pair loads but writes no sense."""
