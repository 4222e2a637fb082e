"""A rule carries everything known about it, and all other parts read it there."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from baco import Baco, BacoError, register_router, router
from baco.backends.remote.view import needed_quantity
from baco.calibration.agreement import routers as diagnosed
from baco.calibration.measure import calibrate, grid_of
from baco.evaluation.methods.method import Grid
from baco.evaluation.methods.routed import Routed
from baco.routing.parser import logit_rule_of, router_name, rules
from baco.routing.rules import BUILT_IN, RULES, ContentRule, LogitRule, UndeclaredReadError
from baco.routing.signals import Signals
from tests.registries import restored
from tests.serving import served

LOGIT = [rule for rule in RULES.values() if isinstance(rule, LogitRule) and rule.file is None]
CONTENT = [rule for rule in RULES.values() if isinstance(rule, ContentRule)]


@pytest.fixture
def margin() -> Iterator[str]:
    """A user's rule: base if its two likeliest tokens are close."""

    def close(signals: Any, gamma: float) -> Tensor:
        """base where its two likeliest tokens are within γ of each other"""
        top = signals.base.softmax(-1).topk(2, dim=-1).values
        near: Tensor = top[:, 0] - top[:, 1] < gamma
        return near

    register_router("Margin", close, low=0, high=1, grid=(0.0, 0.3, 1.0), sweep=(0.2, 0.6))
    yield "Margin"
    del RULES["Margin"]


@pytest.mark.parametrize("rule", LOGIT, ids=lambda rule: rule.name)
def test_a_built_in_logit_rule_has_a_range_grid_sweep_and_page_sentence(rule: LogitRule) -> None:
    assert rule.threshold and rule.help and rule.page
    assert rule.low <= rule.example <= rule.high
    for values in (rule.grid, rule.sweep):
        assert len(values) >= 5
        assert all(rule.low <= value <= rule.high for value in values)
    assert set(rule.grid) >= {value for value in (rule.low, rule.high) if math.isfinite(value)}
    assert "{gamma}" in rule.page or "{percent}" in rule.page
    if rule.compares is not None:
        assert rule.reads == (rule.compares[0],)


@pytest.mark.parametrize("rule", CONTENT, ids=lambda rule: rule.name)
def test_a_built_in_content_rule_says_what_it_locks(rule: ContentRule) -> None:
    assert rule.help and all(rule.page)
    assert bool(rule.roles) != bool(rule.locks)
    assert router(rule.example).spelling == rule.example


@pytest.mark.parametrize("rule", LOGIT, ids=lambda rule: rule.name)
def test_a_grid_runs_from_the_lowest_base_share_to_the_highest(rule: LogitRule, demo: Baco) -> None:
    rows = torch.randn(400, 9, generator=torch.Generator().manual_seed(1))
    aligned = rows * 2
    coins = torch.rand(400, generator=torch.Generator().manual_seed(2))
    signals = Signals(rows, aligned, demo.pair.vocabulary, coins)
    shares = [float(rule(signals, gamma).float().mean()) for gamma in rule.grid]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


def test_reading_more_than_a_rule_declares_is_an_error(demo: Baco) -> None:
    def sly(signals: Any, gamma: float) -> Tensor:
        """base where the aligned model is unsure"""
        flat: Tensor = signals.entropy_aligned > gamma
        return flat

    register_router("Sly", sly, reads=("max_base",))
    try:
        rows = torch.zeros(1, 9)
        with pytest.raises(UndeclaredReadError, match=r"Sly reads entropy_aligned.*add it"):
            router("Sly:1")(Signals(rows, rows, demo.pair.vocabulary))
    finally:
        del RULES["Sly"]


@pytest.mark.parametrize(
    ("spelling", "quantity"),
    [
        ("P-Punc:0.4", "max"),
        ("Nudging:0.4", "max"),
        ("H-FC:1", "entropy"),
        ("Gap:1", "entropy"),
        ("Punc-FC", "top"),
        ("Rand:0.4", "top"),
        ("Rand-Punc:0.4", "top"),
        ("Base", "nothing"),
    ],
)
def test_servers_are_asked_for_the_quantities_that_rules_read(spelling: str, quantity: str) -> None:
    assert needed_quantity(router(spelling)) == quantity


def test_a_rule_that_declares_nothing_needs_all_logits(margin: str) -> None:
    assert needed_quantity(router("Margin:0.4")) == "all"
    assert router("Margin:0.4").reads == {"base", "aligned"}


def test_entropies_decide_from_bounds_only_if_the_rule_is_monotone() -> None:
    def band(signals: Any, gamma: float) -> Tensor:
        """base where the entropy lies near γ"""
        near: Tensor = (signals.entropy_base - gamma).abs() < 1
        return near

    register_router("Band", band, reads=("entropy_base",))
    try:
        assert needed_quantity(router("Band:2")) == "all"
    finally:
        del RULES["Band"]


def test_a_rule_may_decode_with_the_pair_that_it_routes(demo: Baco) -> None:
    inner: list[str] = []

    def second_opinion(signals: Signals) -> Any:
        if not inner:
            inner.append("")  # the inner call routes too
            inner[0] = demo.generate("a song", router="P:0.4", seed=1, max_tokens=3)[0].text
        return signals.max_base < 0.4

    with restored():
        register_router("Opinion", second_opinion)
        outer = demo.generate("Recommend a summer destination", router="Opinion", seed=1)
    plain = demo.generate("Recommend a summer destination", router="P:0.4", seed=1)
    assert outer[0].token_ids == plain[0].token_ids
    assert inner == [demo.generate("a song", router="P:0.4", seed=1, max_tokens=3)[0].text]


def test_a_registered_rule_is_listed_combined_calibrated_diagnosed_and_swept(
    margin: str, demo: Baco
) -> None:
    assert rules()["Margin"].help.startswith("base where its two likeliest")
    assert router("margin-punc:0.5").spelling == "Margin-Punc:0.5"
    assert grid_of("Margin-Punc") == (0.0, 0.3, 1.0)
    assert {"Margin:0.2", "Margin:0.6"} <= set(diagnosed())
    swept = [setting.label for setting in Routed().settings(Grid("full", 2))]
    assert {"Margin:0.2", "Margin:0.6"} <= set(swept)
    curve = calibrate(demo, "Margin", ["Recommend a gift."], samples=2, max_tokens=8)
    assert curve.thresholds == (0.0, 0.3, 1.0)


def test_a_rule_without_a_grid_is_refused_by_calibration_in_one_line(demo: Baco) -> None:
    register_router("Gridless", lambda signals, gamma: signals.max_base < gamma)
    try:
        with pytest.raises(BacoError, match=r"Gridless names no thresholds.*grid"):
            grid_of("Gridless")
    finally:
        del RULES["Gridless"]


def test_the_server_lists_a_registered_rule_and_decodes_with_it(margin: str, demo: Baco) -> None:
    with served(demo) as server, server.client as client:
        entries = {entry["name"]: entry for entry in client.get("/baco/routers").json()}
        assert (entries["Margin"]["low"], entries["Margin"]["high"]) == (0.0, 1.0)
        assert entries["P"]["compares"] == ["max_base", "below"]
        assert entries["Punc"]["keeps"][0] == "punctuation, format or end of text"
        body = {
            "messages": [{"role": "user", "content": "Recommend a gift."}],
            "router": "MARGIN:0.5",
            "max_tokens": 8,
        }
        answer = client.post("/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["baco"]["router"] == "Margin:0.5"


def test_names_match_in_any_case_and_are_shown_in_canonical_case() -> None:
    assert router("p-PUNC-fc:0.4").spelling == "P-Punc-FC:0.4"
    assert router("ROLE:Number=Aligned,predict=Either").spelling == (
        "Role:number=aligned,predict=either"
    )
    assert router_name("nudging") == "Nudging"
    assert router("aligned").spelling == "Aligned"
    with pytest.raises(BacoError, match="is built in"):
        register_router("punc", lambda signals: signals.top_base > 0)


def test_every_built_in_rule_is_known() -> None:
    assert set(rules()) >= BUILT_IN
    assert logit_rule_of("Punc-FC") is None
