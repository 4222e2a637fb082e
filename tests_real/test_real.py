"""Real weights, for what random ones cannot show: fast forwards are used and answers are exact."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from baco import Baco
from tests import naive_decoding as naive
from tests_real.fetch import path_of

PROMPT = "Recommend a summer destination and say why."
RULES: dict[str, Callable[[torch.Tensor, torch.Tensor, float], bool]] = {
    "P:0.3": lambda base, aligned, coin: naive.max_probability(base) < 0.3,
    "H:2": lambda base, aligned, coin: naive.entropy(base) > 2,
    "Rand:0.5": lambda base, aligned, coin: coin < 0.5,
    "Aligned": lambda base, aligned, coin: False,
}


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def model(request: pytest.FixtureRequest) -> str:
    path: Path = path_of(request.param)
    if not path.exists():
        pytest.skip(f"{path} is not there: python -m tests_real.fetch {request.param}")
    return str(path)


def load(model: str, dtype: str) -> Baco:
    template = "{{ messages[-1]['content'] }}" if "gemma" in model else None
    return Baco.load(base=model, aligned=model, dtype=dtype, chat_template=template)


@pytest.fixture(scope="module")
def exact(model: str) -> Baco:
    baco = load(model, "float32")
    renderer = replace(baco.pair.renderer)
    renderer.turn_opening = None  # the naive loop knows no text
    return replace(baco, pair=replace(baco.pair, renderer=renderer))


def test_the_fast_forward_is_used_in_bfloat16_and_one_model_is_held_once(model: str) -> None:
    baco = load(model, "bfloat16")
    assert baco.pair.base.model is baco.pair.aligned.model
    assert not isinstance(baco.pair.joint, str)
    own = "BACo's own forward, all rows at once"
    assert baco.pair.base.path == baco.pair.aligned.path == own
    for answer in baco.generate(PROMPT, router="P-Punc:0.3", n=3, seed=1, max_tokens=24):
        assert answer.error is None
        assert answer.text.strip()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_a_naive_loop(exact: Baco, temperature: float) -> None:
    rendered = exact.pair.renderer.render(PROMPT)
    digest = naive.chat_digest([{"role": "user", "content": PROMPT}])
    for router, rule in RULES.items():
        settings: dict[str, Any] = {"seed": 7, "temperature": temperature, "max_tokens": 10}
        for answer in exact.generate(PROMPT, router=router, n=2, **settings):
            tokens, sources = naive.decode(
                exact.pair,
                rendered.base_ids,
                rendered.aligned_ids,
                rule,
                digest=digest,
                sample=answer.sample,
                **settings,
            )
            assert (list(answer.token_ids), list(answer.sources)) == (tokens, sources), router
