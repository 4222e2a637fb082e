"""Gemma 3 270M as base model and SmolLM2-135M-Instruct as aligned model: two real tokenizers."""

from copy import deepcopy
from functools import cache
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baco import Baco
from baco.models.loading import load_tokenizer
from baco.models.model import PairModel
from baco.models.pair import make_pair
from baco.text.shared_text import TextTokenizer
from tests.test_two_tokenizers_structured import held
from tests.text_pairs import (
    PARTS,
    assert_cuts_at_seams_keep_the_ids,
    assert_is_naive,
    assert_words_begin_at_seams,
)
from tests.tokenizer_kinds import permuted
from tests_real.fetch import path_of

PROMPT = "Recommend a summer destination and say why."
NAMES = ("gemma3", "smollm2")

pytestmark = pytest.mark.skipif(
    not all(path_of(name).exists() for name in NAMES),
    reason="the models are not there: make test-real",
)


@cache
def text_tokenizer(name: str) -> TextTokenizer:
    return TextTokenizer(load_tokenizer(str(path_of(name))), name)


@pytest.fixture(scope="module")
def baco() -> Baco:
    base, aligned = (str(path_of(name)) for name in NAMES)
    loaded = Baco.load(base=base, aligned=aligned, dtype="float32", backend="local")
    loaded.pair.renderer.turn_opening = None  # the naive loop knows no text
    return loaded


@pytest.mark.parametrize("name", NAMES)
def test_words_begin_at_safe_seams(name: str) -> None:
    assert_words_begin_at_seams(text_tokenizer(name))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=14))
def test_a_text_has_the_same_ids_whether_it_is_cut_at_safe_seams_or_not(parts: list[str]) -> None:
    text = "".join(parts).encode()
    for name in NAMES:
        assert_cuts_at_seams_keep_the_ids(name, text_tokenizer(name), text)


@pytest.mark.parametrize(
    ("router", "temperature", "max_tokens"), [("P:0.4", 0.0, 10), ("Rand:0.5", 0.8, 6)]
)
def test_answers_are_those_of_the_naive_reference(
    baco: Baco, router: str, temperature: float, max_tokens: int
) -> None:
    assert baco.pair.own_vocabularies is not None  # the tokenizers were recognised as different
    drawn: dict[str, Any] = {"seed": 4, "temperature": temperature, "max_tokens": max_tokens}
    (answer,) = baco.generate(PROMPT, router=router, **drawn)
    assert {*assert_is_naive(baco, answer, PROMPT, **drawn)} == {"base", "aligned"}


@pytest.fixture(scope="module")
def smollm2() -> Baco:
    """One model under two prompts."""
    path = str(path_of("smollm2"))
    return Baco.load(base=path, aligned=path, dtype="float32", backend="local", packed=False)


@pytest.fixture(scope="module")
def identity(smollm2: Baco) -> Baco:
    """The same model as base and aligned model; the latter has a tokenizer with permuted ids."""
    aligned = smollm2.pair.aligned
    tokenizer, order = permuted(aligned.tokenizer, seed=1)
    tokenizer.chat_template = aligned.tokenizer.chat_template
    tokenizer.eos_token = aligned.tokenizer.eos_token
    model = deepcopy(aligned.model)
    tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    with torch.no_grad():
        for table in tables:
            table[torch.tensor(order)] = table[: len(order)].clone()
    ends = [order[end] for end in sorted(aligned.end_ids)]
    model.generation_config.eos_token_id = model.config.eos_token_id = ends
    return Baco(make_pair("identity", smollm2.pair.base, PairModel("permuted", model, tokenizer)))


def test_permuting_the_ids_of_a_real_tokenizer_changes_no_byte_of_any_answer(
    smollm2: Baco, identity: Baco
) -> None:
    models = smollm2.pair.base, smollm2.pair.aligned
    forced = Baco(make_pair("forced", *models, separate_tokenizers=True))
    assert identity.pair.own_vocabularies is not None  # the tokenizers were recognised as different
    expected, answers = (
        baco.generate(PROMPT, router="Rand:0.5", n=2, seed=2, max_tokens=16)
        for baco in (forced, identity)
    )
    assert [answer.pieces for answer in answers] == [answer.pieces for answer in expected]
    assert {"base", "aligned"} == {source for answer in answers for source in answer.sources}


def test_a_model_paired_with_itself_through_two_tokenizers_writes_its_own_greedy_text(
    smollm2: Baco, identity: Baco
) -> None:
    completions = []
    for baco, router in ((smollm2, "Base"), (identity, "Rand:0.5")):
        decoder = baco.decoder()
        options: dict[str, Any] = {"temperature": 0.0, "seed": 1, "max_tokens": 24}
        decoder.submit_text("The best time to see Lisbon is", router=baco.router(router), **options)
        while decoder.busy:
            completions += [chunk.completion for chunk in decoder.step() if chunk.completion]
    alone, both = completions
    assert alone.text == both.text
    assert both.switches is not None
    assert both.switches > 2


def test_structured_answers_are_valid_and_those_of_the_naive_reference(baco: Baco) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "place": {"type": "string", "maxLength": 20},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "kind": {"enum": ["beach", "city"]},
        },
        "required": ["place", "days", "kind"],
        "additionalProperties": False,
    }
    options: dict[str, Any] = {"router": "P:0.4", "seed": 4, "schema": schema}
    answers = baco.generate(PROMPT, n=4, max_tokens=60, **options)
    for answer in answers:
        assert answer.finish_reason == "stop"
        jsonschema.validate(answer.parsed, schema)
    assert {"base", "aligned"} == {source for answer in answers for source in answer.sources}
    drawn: dict[str, Any] = {"seed": 4, "temperature": 1.0, "max_tokens": 12}
    [answer] = baco.generate(PROMPT, router="P:0.4", schema=schema, **drawn)
    assert_is_naive(baco, answer, PROMPT, **held(baco, {"schema": schema}, PROMPT), **drawn)
