"""Structured answers of pairs whose models have different tokenizers: one automaton for each model
over the same text, against the naive reference.
"""

from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baco import Baco, BacoError, SamplingParams
from baco.decoder import Decoder
from baco.engine.shared_text_engine import SharedTextEngine
from baco.sampling import constraint
from baco.sampling.constraint import Constraint, unpack_words
from baco.source import MODELS, Source
from tests.chat_templates import QWEN_3
from tests.fuzzing import budget
from tests.test_structured import STRUCTURES, assert_others_go_on, fits, free_text
from tests.test_two_tokenizers import thinking_model
from tests.text_pairs import (
    PROMPT,
    assert_is_naive,
    baco_of,
    baco_of_kinds,
    permuted_model,
    text_tokenizer,
    tiny_model,
)
from tests.tokenizer_kinds import permuted, tokenizer_of

# Kinds of tokenizers that have a token for every byte.
KINDS = ("gpt2", "llama3", "qwen", "bloom", "superwords", "llama2", "gemma")
# A character that the tokenizer of Qwen's kind normalizes, so that its ids spell another text.
COMPOSED = {"choice": ["cafe\u0301 au lait", "cafe\u0301 noir!", "the sea"]}

pair_of = cache(baco_of_kinds)


def constraints_of(
    baco: Baco, structure: dict[str, Any], prompt: str = PROMPT
) -> dict[Source, Constraint]:
    wanted = SamplingParams(**structure).structure
    assert wanted is not None
    joining_space = baco.pair.renderer.render(prompt).joining_space
    return baco.pair.constraints(wanted, joining_space=joining_space)


def tokens_of(mask: Any) -> set[int]:
    return {int(token) for token in np.flatnonzero(unpack_words(mask))}


def held(baco: Baco, structure: dict[str, Any], prompt: str = PROMPT) -> dict[str, Any]:
    """For the naive decoder: what a structure allows, from automata that begin anew each time."""
    own, constraints = baco.pair.own_vocabularies, constraints_of(baco, structure, prompt)
    assert own is not None

    def following(source: Source, ids: list[int]) -> set[int]:
        return tokens_of(constraints[source].begin().masks(ids, ())[0])

    def allowed(source: Source, text: bytes, ids: list[int]) -> set[int]:
        if own[source].tokenizer.bytes_of(ids) == text:
            return following(source, ids)
        return tokens_of(constraints[source].begin().after(text, ids).mask)

    places = {
        name: free_text(
            SimpleNamespace(vocabulary=own[name].vocabulary),
            constraints[name].structure.kind,
            partial(following, name),
        )
        for name in MODELS
    }

    def begins(source: Source, ids: list[int]) -> bool:
        return "choice" not in structure and places[source](ids) == "beginning"

    return {"allowed": allowed, "begins": begins}


PAIRS = [(one, KINDS[(at + 1 + at % 3) % len(KINDS)]) for at, one in enumerate(KINDS)]


@pytest.mark.parametrize(("base", "aligned"), PAIRS)
def test_structured_answers_equal_the_naive_reference_token_for_token(
    base: str, aligned: str
) -> None:
    baco, number = pair_of(base, aligned), KINDS.index(base)
    switches = 0
    for at, structure in enumerate([*STRUCTURES[:6], COMPOSED]):
        router = ("P:0.5", "Punc", "Rand:0.5")[(number + at) % 3]
        drawn: dict[str, Any] = {
            "seed": number,
            "temperature": (1.0, 0.0)[(number + at) % 2],
            "max_tokens": 20,
        }
        answer = baco.generate(PROMPT, router=router, n=1 + 2 * (at % 2), **drawn, **structure)[-1]
        assert_is_naive(baco, answer, **held(baco, structure), **drawn)
        assert answer.finish_reason == "length" or fits(structure, answer.text)
        switches += answer.switches or 0
    assert switches


@settings(max_examples=budget(5))
@given(
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    structure=st.sampled_from([*STRUCTURES[:6], COMPOSED]),
    router=st.sampled_from(["P:0.5", "Punc", "Rand:0.5"]),
    seed=st.integers(0, 2**40),
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
)
def test_samples_equal_the_reference_whatever_is_beside_them(
    kinds: tuple[str, str],
    structure: dict[str, Any],
    router: str,
    seed: int,
    temperature: float,
) -> None:
    baco = pair_of(*kinds)
    drawn: dict[str, Any] = {"seed": seed, "temperature": temperature, "max_tokens": 16}
    answers = baco.generate(PROMPT, router=router, n=3, **drawn, **structure)
    for answer in answers:
        assert_is_naive(baco, answer, **held(baco, structure), **drawn)
        assert answer.finish_reason == "length" or fits(structure, answer.text)


@settings(max_examples=budget(12))
@given(data=st.data(), kind=st.sampled_from(KINDS), structure=st.sampled_from(STRUCTURES[:6]))
def test_a_mask_depends_on_the_ids_alone_however_they_came_about(
    data: st.DataObject, kind: str, structure: dict[str, Any]
) -> None:
    """Whether tokens were appended, or others took the place of some."""
    constraint = constraints_of(pair_of(kind, kind), structure)["aligned"]
    tokenizer, automaton, text = text_tokenizer(kind), constraint.begin(), b""
    for _ in range(8):
        mask = constraint.begin().after(text, tokenizer.encode(text)).mask
        going_on = [token for token in sorted(tokens_of(mask)) if tokenizer.data[token]]
        if not going_on:
            return
        text += tokenizer.data[data.draw(st.sampled_from(going_on))]
        ids = data.draw(st.sampled_from([tokenizer.encode(text), tokenizer.encode(text[:3])]))
        ids += tokenizer.encode(text[len(tokenizer.bytes_of(ids)) :])
        expected = constraint.begin().after(text, ids).mask
        assert (automaton.after(text, ids).mask == expected).all()


@pytest.mark.parametrize("kind", ["gemma", "gpt2"])
def test_permuting_the_ids_of_a_tokenizer_changes_no_byte_of_a_structured_answer(kind: str) -> None:
    partner = tokenizer_of("llama3"), tiny_model(tokenizer_of("llama3"), 0)
    tokenizer, order = permuted(tokenizer_of(kind), seed=1)
    changed = permuted_model(tokenizer_of(kind), 1, tokenizer, order)
    plain = tokenizer_of(kind), tiny_model(tokenizer_of(kind), 1)
    for structure in STRUCTURES[:4]:
        answers, others = (
            baco_of(partner, aligned).generate(
                PROMPT, router="P-Punc:0.5", n=3, seed=2, max_tokens=30, **structure
            )
            for aligned in (plain, (tokenizer, changed))
        )
        assert [answer.pieces for answer in answers] == [answer.pieces for answer in others]


def test_the_active_source_continues_where_the_other_may_write_no_word_start() -> None:
    """The base model has no token for the brace, and all its other tokens continue the word."""
    baco = pair_of("unigram first", "gpt2")
    structure: dict[str, Any] = {"choice": ["sun{", "sunny"]}
    drawn: dict[str, Any] = {"seed": 5, "temperature": 1.0, "max_tokens": 8}
    answers = baco.generate(PROMPT, router="Rand:1", n=8, **drawn, **structure)
    assert any(answer.text == "sun{" for answer in answers)
    for answer in answers:
        assert_is_naive(baco, answer, **held(baco, structure), **drawn)
        assert answer.text in structure["choice"]


def test_a_text_is_followed_by_its_bytes_where_a_tokenizer_changes_it() -> None:
    """Qwen's kind reads e and a combining accent as one letter, of other bytes."""
    text, baco = "cafe\u0301", pair_of("qwen", "gemma")
    qwen = text_tokenizer("qwen")
    assert qwen.bytes_of(qwen.encode(text.encode())) != text.encode()
    structure: dict[str, Any] = {"choice": [f"{text} au lait", f"{text} noir!", f"{text} or tea"]}
    answers = baco.generate(PROMPT, router="Rand:0.5", n=8, seed=1, max_tokens=40, **structure)
    for answer in answers:
        assert (answer.finish_reason, answer.error) == ("stop", None)
        assert answer.text in structure["choice"]
    assert {"base", "aligned"} == {source for answer in answers for source in answer.sources}


def test_thinking_is_free_and_the_answer_behind_it_is_not() -> None:
    base = tokenizer_of("gemma"), tiny_model(tokenizer_of("gemma"), 0)
    baco = baco_of(base, thinking_model("gpt2", QWEN_3))
    answers = baco.generate(
        PROMPT, router="Rand:0.5", n=8, seed=3, max_tokens=90, choice=["yes", "no", "the sea"]
    )
    assert any(answer.thinking for answer in answers)
    assert any(answer.finish_reason == "stop" for answer in answers)
    for answer in answers:
        assert answer.finish_reason == "length" or answer.text in ("yes", "no", "the sea")


def test_explained_tokens_name_a_predicted_token_that_is_allowed() -> None:
    baco = pair_of("gpt2", "gemma")
    decoder, predicted = baco.decoder(), set[int]()
    decoder.submit(
        PROMPT, router=baco.router("Punc"), explain=True, seed=3, max_tokens=8, regex="[0-9]{6}!"
    )
    while decoder.busy:
        for chunk in decoder.step():
            predicted |= {token.why.predicted for token in chunk.tokens if token.why}
    predicted -= {-1, *baco.pair.end_ids_of("base")}
    texts = {baco.pair.spelling(token, "base").decode() for token in predicted}
    assert texts
    assert all(text.strip(" 0123456789!") == "" for text in texts)


@pytest.mark.parametrize("kinds", [("unigram", "gpt2"), ("gpt2", "unigram")])
def test_a_structure_that_a_tokenizer_cannot_spell_is_refused_in_one_line(
    kinds: tuple[str, str],
) -> None:
    with pytest.raises(BacoError, match="the tokenizer has no token for what has to come next"):
        pair_of(*kinds).stream(PROMPT, schema={"type": "object"})


def test_a_structure_that_cannot_be_followed_ends_its_answers_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constraint, "_REHEARSED", 0)
    baco = pair_of("gpt2", "gemma")
    assert_others_go_on(baco, Decoder(baco.pair, SharedTextEngine(baco.pair)))
