"""Struct: the aligned model writes the structure of an answer, the other rules its free text."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baco import Baco, BacoError, Completion, SamplingParams, register_router, router
from baco.backends.base import Capabilities
from baco.backends.vllm.options import PREFIX, PairOptions
from baco.cli import run
from baco.engine.sequence import Request
from baco.engine.shared_text_engine import check_request
from baco.routing.parser import catalogue, plain_catalogue
from baco.routing.rules import RULES
from baco.routing.signals import Allowed, Signals
from baco.sampling.constraint import Place, unpack_words
from baco.sampling.structure import Structure
from tests.fuzzing import budget

PROMPT = "What do you recommend for a rainy day?"
TRIP: dict[str, Any] = {
    "type": "object",
    "properties": {
        "place": {"type": "string", "maxLength": 16},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "kind": {"enum": ["beach", "city", "mountain"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 9}, "maxItems": 2},
    },
    "required": ["place", "days", "kind", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llama(loaded_pair: Callable[..., Baco]) -> Baco:
    return loaded_pair("llama", noise=0.3)


# An answer, and below every byte the place where it is written: structure (.), the beginning (b) or
# the inside (i) of free text. A token of several bytes has its place below the first.
CASES: list[tuple[str, Any, str, str]] = [
    (
        "schema",
        TRIP,
        '{"place": "La Paz", "days": 12, "kind": "beach", "tags": ["a b", "c"]}',
        "...........biiiiii.........................................biii...bi..",
    ),
    (
        "schema",
        {"type": "object"},
        '{"a b": {"c": "d e"}, "f": ["g", {"h": 1}], "k": "l"}',
        "...............biii..........bi...................bi.",
    ),
    ("schema", {"type": "string"}, '"für \\"x\\" \\n ü"', ".biiiii.bi.bi.iiii"),
    ("schema", {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{2}$"}, '"AB-12"', ".bi...."),
    ("schema", {"type": "string", "format": "date"}, '"2026-01-02"', "............"),
    ("regex", "[A-Z][a-z]+, [0-9]+ days", "Rome, 12 days", "biiii........"),
    ("regex", "(.|\n){0,5}", "a, b.", "biiii"),
    ("choice", [chr(97 + at) + "x" for at in range(26)], "bx", ".."),
    ("grammar", 'start: "to " /[a-z]+/ "!"?', "to go!", "...bii"),
]


@pytest.mark.parametrize(("kind", "description", "text", "expected"), CASES)
def test_free_text_is_in_values_of_strings_and_where_any_letter_may_come(
    demo: Baco, kind: Any, description: Any, text: str, expected: str
) -> None:
    texts = demo.pair.vocabulary.texts
    assert texts is not None
    described = description if isinstance(description, str) else json.dumps(description)
    constraint = demo.pair.structures.compile(Structure(kind, described))
    tokens, left, places = list[int](), text.encode(), list[Place]()
    automaton = constraint.begin()
    while left:
        allowed = unpack_words(automaton.masks(tokens, ())[0]).nonzero()[0].tolist()
        forced = len(allowed) == 1
        token = allowed[0] if forced else next(t for t in allowed if texts.data[t] == left[:1])
        [place] = automaton.places(tokens, ())
        places += [place] * len(texts.data[token])
        left = left[len(texts.data[token]) :]
        tokens.append(token)
    assert "".join(".bi"[place] for place in places) == expected
    # At once, as drafts, and after they were taken back.
    again = constraint.begin()
    drafted = again.places([], tokens)
    assert [constraint.begin().places(tokens[:at], ())[0] for at in range(len(tokens))] == (
        drafted[: len(tokens)]
    )
    assert [again.places(tokens[:at], ())[0] for at in reversed(range(len(tokens)))] == (
        drafted[: len(tokens)][::-1]
    )


def test_tokens_that_are_accepted_together_may_end_the_answer(demo: Baco) -> None:
    """The last words, what closes the structure, and the end token."""
    sentence = {"type": "string", "pattern": r"^ ?[A-Z][A-Za-z ,'-]{3,90}[.!]$"}
    schema = {"type": "array", "items": sentence, "minItems": 1, "maxItems": 1}
    structure = Structure("schema", json.dumps(schema))
    constraint = demo.pair.structures.compile(structure, joining_space=True)
    answers = demo.generate(PROMPT, n=4, seed=5, router="P-Struct:0.4", schema=schema)
    for answer in answers:
        assert answer.finish_reason == "stop"
        ids, automaton = list(answer.token_ids), constraint.begin()
        assert len(automaton.masks([], ids)) == len(ids) + 1
        # The end token comes with tokens whose masks are known already.
        automaton.masks(ids[:-4], ids[-4:])
        assert automaton.places(ids, []) == [Place.INSIDE]
        assert automaton.places(ids[:2], ids[2:])[-2] is Place.STRUCTURE


def written(answer: Completion, source: str) -> str:
    """The text of a source, with a line for each word of the other one."""
    return "".join(piece.text if piece.source == source else "\n" for piece in answer.pieces)


def test_the_base_model_writes_in_free_text_alone(demo: Baco) -> None:
    for spelling in ("Struct", "P-Struct:0.9"):
        answers = demo.generate(
            PROMPT, n=6, seed=4, max_tokens=120, router=spelling, schema=TRIP, system=None
        )
        assert any(answer.sources.count("base") > 3 for answer in answers)
        for answer in answers:
            assert answer.finish_reason == "stop"
            values = answer.parsed
            free = [values["place"], *values["tags"]]
            for part in filter(None, written(answer, "base").split("\n")):
                assert any(part in value for value in free), (part, answer.text)
    [choice] = demo.generate(PROMPT, seed=4, router="Struct", choice=["Lisbon", "Lima", "Rome"])
    assert set(choice.sources) == {"aligned"}


def test_a_forced_token_is_aligned_under_struct_and_of_the_active_source_elsewhere(
    demo: Baco,
) -> None:
    """Also after the base model has written the word before it."""
    pattern = r"[a-z]{3,9} and a fixed end"
    for spelling, source in (("Rand-Struct:1", "aligned"), ("Rand:1", "base")):
        [answer] = demo.generate(PROMPT, seed=4, router=spelling, regex=pattern)
        sources = [piece.source for piece in answer.pieces]
        assert sources[0] == "base"
        assert sources[-4:] == [source] * 4


def test_the_first_word_of_a_string_needs_no_space_before_it(llama: Baco) -> None:
    """The aligned model has written the quote, and the base model may begin with any token."""
    vocabulary, begun = llama.pair.vocabulary, list[tuple[Any, bool]]()
    schema = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 2}
    constraint = llama.pair.structures.compile(Structure("schema", json.dumps(schema)))
    for seed in range(6):
        [answer] = llama.generate("Hi", seed=seed, router="Struct", max_tokens=30, schema=schema)
        places = constraint.begin().places([], answer.token_ids)
        begun += [
            (source, bool(vocabulary.word_start[token]))
            for place, token, source in zip(places, answer.token_ids, answer.sources, strict=False)
            if place is Place.BEGINNING
        ]
    assert ("base", False) in begun


def test_struct_locks_structure_and_what_ends_a_free_text(llama: Baco) -> None:
    rows = torch.zeros(4, llama.pair.vocabulary.size)
    rows[:, 7] = 1.0
    rows[2, 9] = 2.0
    allowed = Allowed(
        at=torch.arange(3),
        tokens=torch.ones(3, rows.shape[1], dtype=torch.bool),
        forced=torch.zeros(4, dtype=torch.bool),
        text=torch.tensor([False, True, True, True]),
        begins=torch.zeros(4, dtype=torch.bool),
        ends_text=lambda position, token: (position, token) == (2, 9),
    )
    signals = Signals(rows, rows, llama.pair.vocabulary, allowed=allowed)
    assert router("Struct")(signals).tolist() == [False, True, False, True]
    assert router("Struct:predict=either")(signals).tolist() == [False, True, False, True]


@settings(max_examples=budget(8))
@given(seed=st.integers(0, 2**40), gamma=st.sampled_from([0.2, 0.7]))
def test_without_a_structure_all_is_free_text(demo: Baco, seed: int, gamma: float) -> None:
    def drawn(spelling: str) -> list[Any]:
        answers = demo.generate(PROMPT, n=2, seed=seed, max_tokens=30, router=spelling)
        return [(answer.token_ids, answer.sources, answer.text) for answer in answers]

    assert drawn(f"P-Struct:{gamma}") == drawn(f"P:{gamma}")


def test_a_rule_of_ones_own_reads_where_free_text_is(demo: Baco) -> None:
    def prose(signals: Any) -> Any:
        """base in free text"""
        return signals.in_text

    register_router("Prose", prose, reads=("in_text",))
    try:
        [answer] = demo.generate(PROMPT, seed=4, router="Prose", schema=TRIP, max_tokens=120)
        sources = [piece.source for piece in answer.pieces]
        assert sources[:3] == ["aligned"] * 3
        assert "base" in sources
        assert router("Prose").reads == frozenset()
    finally:
        del RULES["Prose"]


def test_struct_is_listed_and_not_swept_on_its_own() -> None:
    """Without a structure it is the rule that it is combined with."""
    names = {"Struct", "P-Struct"}
    assert names <= {entry.name for entry in catalogue()}
    assert not names & {entry.name for entry in plain_catalogue()}
    assert router("struct-p:0.4,predict=either").spelling == "P-Struct:0.4,predict=either"


def request(spelling: str) -> Request:
    return Request((1,), (1,), SamplingParams(regex="a+"), router(spelling), digest=b"")


def test_where_no_structure_is_known_struct_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    elsewhere = Capabilities("elsewhere", structured=True)
    elsewhere.check(request("P:0.4"))
    with pytest.raises(BacoError, match=r"elsewhere backend cannot run P-Struct:0\.4 with a regex"):
        elsewhere.check(request("P-Struct:0.4"))
    check_request(request("P:0.4"))
    with pytest.raises(BacoError, match=r"P-Struct:0\.4 with a regex needs .* one tokenizer"):
        check_request(request("P-Struct:0.4"))
    with pytest.raises(BacoError, match="reads the structure of the answer, which vLLM does not"):
        PairOptions.read({f"{PREFIX}router": "P-Struct:0.4"})
    assert run(["generate", PROMPT, "--router", "P-Struct", "--regex", "a+"]) == 2
    assert "'P-Struct' needs a threshold, such as P-Struct:0.3" in capsys.readouterr().err
