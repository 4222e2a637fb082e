"""Routers decide by their formulas, spellings are parsed, and `select` keeps words whole."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from baco import BacoError, register_router, router
from baco.routing import parser
from baco.routing.rules import RULES
from baco.routing.signals import Signals
from baco.routing.word_boundaries import NO_TOKEN, select
from baco.text.vocabulary import Role, Vocabulary

ROLES = [
    Role.FORMAT,  # 0: the end token
    Role.PUNCTUATION,  # 1: "."
    Role.FUNCTION,  # 2: " the"
    Role.NUMBER,  # 3: " 7"
    Role.NAME,  # 4: " Maui"
    Role.OPINION,  # 5: " lovely"
    Role.CONTENT,  # 6: " sea"
    Role.CONTENT,  # 7: "side", the rest of a word
    Role.FORMAT,  # 8: "\n"
]
VOCABULARY = Vocabulary(
    size=9,
    role=torch.tensor([int(role) for role in ROLES], dtype=torch.int8),
    word_start=torch.tensor([True] * 7 + [False, True]),
    ends_word=torch.tensor([False] * 8 + [True]),
    special=torch.tensor([True] + [False] * 8),
)


def rows(*likeliest: int, probability: float = 0.6) -> Tensor:
    """One row per token, with ``probability`` for it and the rest spread evenly."""
    logits = torch.full((len(likeliest), 9), math.log((1 - probability) / 8))
    logits[torch.arange(len(likeliest)), torch.tensor(likeliest)] = math.log(probability)
    return logits


def decide(
    spelling: str, base: Tensor, aligned: Tensor | None = None, coin: float = 0.5
) -> list[bool]:
    coins = torch.full((len(base),), coin)
    signals = Signals(base, base if aligned is None else aligned, VOCABULARY, coins)
    is_base: list[bool] = router(spelling)(signals).tolist()
    return is_base


def entropy_of(probability: float) -> float:
    rest = (1 - probability) / 8
    return -probability * math.log(probability) - 8 * rest * math.log(rest)


def test_p_and_nudging_compare_the_highest_base_probability_and_are_opposites() -> None:
    base = torch.cat([rows(6, probability=p) for p in (0.29, 0.31)])
    assert decide("P:0.3", base) == [True, False]
    assert decide("Nudging:0.3", base) == [False, True]


def test_h_compares_the_base_entropy_in_nats() -> None:
    base = torch.cat([rows(6, probability=p) for p in (0.5, 0.7)])
    middle = (entropy_of(0.5) + entropy_of(0.7)) / 2
    assert decide(f"H:{middle}", base) == [True, False]
    assert decide("H:0", base) == [True, True]


def test_gap_compares_the_entropies_of_both_models() -> None:
    base, aligned = rows(6, 6, probability=0.5), torch.cat([rows(6, probability=0.9), rows(6)])
    gap = entropy_of(0.5) - entropy_of(0.9)
    assert decide(f"Gap:{gap - 0.01}", base, aligned) == [True, False]
    assert decide(f"Gap:{gap + 0.01}", base, aligned) == [False, False]
    assert decide("Gap:-1", aligned, base) == [False, True]


def test_content_rules_go_by_the_role_of_the_predicted_token() -> None:
    base = rows(*range(9))
    assert decide("Punc", base) == [False, False, True, True, True, True, True, True, False]
    assert decide("FC", base) == [True, True, False, True, True, True, True, True, True]
    assert decide("Role", base) == [True, True, True, False, False, True, True, True, True]
    table = "Role:opinion=base,content=aligned,punctuation=aligned"
    assert decide(table, base) == [True, False, True, True, True, True, False, False, True]


def test_predict_sets_the_model_that_predicts_the_token() -> None:
    base, aligned = rows(1, 6, 6), rows(6, 1, 6)
    assert decide("Punc", base, aligned) == [False, True, True]
    assert decide("Punc:predict=aligned", base, aligned) == [True, False, True]
    assert decide("Punc:predict=either", base, aligned) == [False, False, True]


@given(
    logit=st.sampled_from(["P:0.7", "H:0.9", "Rand:0.4", "Nudging:0.7", "Gap:0.1"]),
    contents=st.sampled_from([["Punc"], ["FC"], ["Punc", "FC"], ["Role"], ["FC", "Role"]]),
    coin=st.floats(0.01, 0.99),
    probability=st.floats(0.2, 0.99),
)
def test_a_combination_is_base_if_its_logit_rule_is_and_no_content_rule_locks(
    logit: str, contents: list[str], coin: float, probability: float
) -> None:
    base, aligned = rows(*range(9), probability=probability), rows(*range(9))
    name, _, gamma = logit.partition(":")
    combined = decide(f"{name}-{'-'.join(contents)}:{gamma}", base, aligned, coin)
    parts = [decide(part, base, aligned, coin) for part in [logit, *contents]]
    assert combined == [all(column) for column in zip(*parts, strict=True)]


def test_rand_is_base_with_probability_gamma() -> None:
    base = rows(6)
    assert decide("Rand:0.3", base, coin=0.29) == [True]
    assert decide("Rand:0.3", base, coin=0.31) == [False]
    assert decide("Rand:0", base, coin=2.0**-24) == [False]
    assert decide("Rand:1", base, coin=1 - 2.0**-24) == [True]


@pytest.mark.parametrize("entry", parser.catalogue(), ids=lambda entry: entry.name)
def test_every_spelling_in_the_catalogue_round_trips(entry: parser.Entry) -> None:
    parsed = router(entry.example)
    assert parsed.spelling == entry.example
    assert router(parsed.spelling) == parsed


@pytest.mark.parametrize(
    "spelling",
    [
        "P:0.9999999",
        "H:1.23456789",
        "P:0.4,share=0.12345678",
        "P:0.4,distinct=0.12345678",
        "P:0.4,siblings=1.2345678",
        "Nudging:1e-09",
    ],
)
def test_a_spelling_keeps_all_digits_of_its_numbers(spelling: str) -> None:
    parsed = router(spelling)
    assert parsed.spelling == spelling
    assert router(parsed.spelling) == parsed


def test_the_order_of_names_does_not_matter() -> None:
    assert router("FC-P-Punc:0.4").spelling == "P-FC-Punc:0.4"


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("Q:0.3", "unknown router 'Q:0.3'"),
        ("", "give a spelling"),
        ("P", "needs a threshold"),
        ("P-Punc", "needs a threshold"),
        ("P:1.5", "expected a number from 0 to 1"),
        ("P:-0.1", "expected a number from 0 to 1"),
        ("H:-1", "expected a number of at least 0"),
        ("H:inf", "expected a number"),
        ("P:x", "give one number"),
        ("P:nan", "give one number"),
        ("P:", "give one number"),
        ("P:0.1,0.2", "give one number"),
        ("P-H:0.4", "combine at most one of"),
        ("P-Punc-Punc:0.4", "each once"),
        ("Punc:0.4", "takes no threshold"),
        ("Base:0.4", "takes no threshold"),
        ("Base-P:0.4", "stands alone"),
        ("Role:verb=base", "is not an argument"),
        ("Role:name=both", "is not an argument"),
        ("P:0.3,name=base", "belongs to Role"),
        ("P:0.3,predict=me", "is not an argument"),
        ("Aligned:predict=either", "takes no arguments"),
    ],
)
def test_a_wrong_spelling_is_refused_in_one_line(spelling: str, message: str) -> None:
    with pytest.raises(BacoError, match=message) as caught:
        router(spelling)
    assert "\n" not in str(caught.value)


@pytest.fixture
def own_router() -> Iterator[str]:
    def flat(signals: Signals, threshold: float) -> Tensor:
        """base where the two models' likeliest tokens differ and the coin allows it"""
        return (signals.top_base != signals.top_aligned) & (signals.tossed() < threshold)

    register_router("Differ", flat)
    yield "Differ"
    del RULES["Differ"]


def test_a_registered_router_can_be_spelled_and_is_listed(own_router: str) -> None:
    assert decide("Differ:0.9", rows(1, 2), rows(1, 3)) == [False, True]
    assert router("Differ:0.9").spelling == "Differ:0.9"
    entry = next(entry for entry in parser.catalogue() if entry.name == "Differ")
    assert entry.sentence.startswith("base where the two models'")
    assert entry.example == "Differ:0.5"
    with pytest.raises(BacoError, match="needs a threshold"):
        router("Differ")


def test_a_class_can_be_a_router_and_bad_names_and_signatures_are_refused() -> None:
    class Always:
        """base, always"""

        def __call__(self, signals: Signals) -> Tensor:
            return torch.ones(len(signals.base), dtype=torch.bool)

    register_router("Always", Always)
    try:
        assert decide("Always", rows(1, 6)) == [True, True]
    finally:
        del RULES["Always"]
    for name, rule in (("P", Always), ("a b", Always), ("Three", lambda a, b, c: a)):
        with pytest.raises(BacoError, match="router"):
            register_router(name, rule)


@pytest.mark.parametrize("grid", [(0.5, 0.5), (0.0, 1.0, 0.5)])
def test_a_rule_whose_grid_neither_rises_nor_falls_is_refused(grid: tuple[float, ...]) -> None:
    with pytest.raises(BacoError, match="has to rise, or to fall"):
        register_router(
            "Zigzag", lambda signals, threshold: signals.max_base < threshold, grid=grid
        )
    assert "Zigzag" not in RULES


def choose(
    base: Tensor, aligned: Tensor, previous: int, active_base: bool, spelling: str = "Base-wins"
) -> tuple[list[float], bool]:
    """One row through `select` with a router that picks the base or the aligned model."""
    wanted = router("Rand:1" if spelling == "Base-wins" else "Rand:0")
    logits, source = select(
        base,
        aligned,
        torch.tensor([previous]),
        torch.tensor([active_base]),
        router=wanted,
        vocabulary=VOCABULARY,
        banned=torch.zeros(9, dtype=torch.bool),
        coin=torch.tensor([0.5]),
    )
    return logits[0].tolist(), bool(source[0])


def test_the_router_decides_at_the_first_position_without_a_mask() -> None:
    logits, source = choose(rows(7), rows(7), NO_TOKEN, False)
    assert source and -math.inf not in logits


def test_inside_a_word_the_active_source_continues() -> None:
    logits, source = choose(rows(6), rows(7), 6, False)
    assert not source and logits == rows(7)[0].tolist()


def test_at_a_boundary_the_other_source_may_write_only_word_starts() -> None:
    logits, source = choose(rows(7), rows(6), 6, False)
    assert source
    assert [value == -math.inf for value in logits] == (~VOCABULARY.word_start).tolist()


def test_after_a_token_that_ended_a_word_the_other_source_may_write_anything() -> None:
    logits, source = choose(rows(7), rows(7), 8, False)
    assert source and -math.inf not in logits


def test_a_source_that_continues_is_never_masked() -> None:
    logits, source = choose(rows(6), rows(7), 6, True)
    assert source and -math.inf not in logits


@given(
    base=st.lists(st.floats(-5, 5), min_size=9, max_size=9),
    aligned=st.lists(st.floats(-5, 5), min_size=9, max_size=9),
    previous=st.integers(-1, 8),
    active=st.booleans(),
    spelling=st.sampled_from(["P:0.3", "H-Punc:1.5", "Gap:0", "FC", "Nudging:0.2", "Rand:0.5"]),
)
def test_a_rows_choice_does_not_depend_on_other_rows(
    base: list[float], aligned: list[float], previous: int, active: bool, spelling: str
) -> None:
    def run(copies: int) -> tuple[Tensor, Tensor]:
        other = torch.randn(copies, 9, generator=torch.Generator().manual_seed(0))
        return select(
            torch.cat([other, torch.tensor([base])]),
            torch.cat([-other, torch.tensor([aligned])]),
            torch.tensor([3] * copies + [previous]),
            torch.tensor([True] * copies + [active]),
            router=router(spelling),
            vocabulary=VOCABULARY,
            coin=torch.full((copies + 1,), 0.4),
        )

    (alone, source), (crowded, sources) = run(0), run(3)
    assert torch.equal(alone[0], crowded[-1]) and source[0] == sources[-1]
