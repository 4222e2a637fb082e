"""Answers held to a schema, a regular expression, choices or a grammar."""

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, reduce
from pathlib import Path
from typing import Any, cast

import jsonschema
import numpy as np
import pydantic
import pytest
import regex as re
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baco import Baco, BacoError, Completion, SamplingParams
from baco.backends.base import Capabilities
from baco.cli import run
from baco.decoder import Decoder
from baco.engine.engine import Engine
from baco.outputs import record
from baco.sampling import constraint
from baco.sampling.constraint import Constraint, StructureCompiler, only_token, unpack
from baco.sampling.structure import Structure
from baco.text.vocabulary import Role
from tests import naive_decoding as naive
from tests.chat_templates import QWEN_3
from tests.fuzzing import budget
from tests.thinking_pairs import LOGIT_BIAS, save_thinking_pair

PROMPTS = ["What do you recommend for a rainy day?", "Plan a walk.", "Where should I go?"]
TRIP: dict[str, Any] = {
    "type": "object",
    "properties": {
        "place": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "kind": {"enum": ["beach", "city", "mountain"]},
        "sure": {"type": "boolean"},
    },
    "required": ["place", "days", "kind"],
    "additionalProperties": False,
}
DAYS = ["2024-02-29", "2000-02-29", "1999-12-31", "1900-02-29", "2023-02-29", "2024-02-30"]
APRIL = ["2023-04-30", "2023-06-30"]
STRUCTURES: list[dict[str, Any]] = [
    {"schema": TRIP},
    {"regex": r"[A-Z][a-z]{2,9}( and [A-Z][a-z]{2,9})?, \d\d? days?[.!]"},
    {"choice": ["Lisbon", "Lima", "the lake", "the lakes of Finland"]},
    {"grammar": 'start: "Go to " PLACE ("," " then " PLACE)* "."\nPLACE: /[A-Z][a-z]{2,6}/'},
    {"schema": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 3}},
    {"regex": r"(.|\n){0,40}"},
    {},
]


@pytest.fixture(scope="module")
def llama(loaded_pair: Callable[..., Baco]) -> Baco:
    return loaded_pair("llama", noise=0.3)


def compiled(baco: Baco, **structure: Any) -> Constraint:
    wanted = SamplingParams(**structure).structure
    assert wanted is not None
    return baco.pair.structures.compile(wanted)


def fits(structure: dict[str, Any], text: str) -> bool:
    """Whether a text has the structure, decided without the code that is tested."""
    if "schema" in structure:
        try:
            jsonschema.validate(json.loads(text), structure["schema"])
        except (ValueError, jsonschema.ValidationError):
            return False
        return True
    if "regex" in structure:
        return re.fullmatch(structure["regex"], text) is not None
    if "choice" in structure:
        return text in structure["choice"]
    if "grammar" in structure:
        return re.fullmatch(r"Go to [A-Z][a-z]{2,6}(, then [A-Z][a-z]{2,6})*\.", text) is not None
    return True


def decode(
    baco: Baco,
    structures: list[dict[str, Any]],
    *,
    router: str = "P-Punc:0.7",
    speculate: bool = True,
    **sampling: Any,
) -> list[Completion]:
    """All samples of one request for each structure, decoded together."""
    decoder = Decoder(baco.pair, Engine(baco.pair, speculate=speculate))
    for number, structure in enumerate(structures):
        prompt = PROMPTS[number % len(PROMPTS)]
        decoder.submit(prompt, router=baco.router(router), **sampling, **structure)
    ended: dict[tuple[int, int], Completion] = {}
    while decoder.busy:
        for chunk in decoder.step():
            if chunk.completion is not None:
                ended[chunk.prompt, chunk.sample] = chunk.completion
    return [ended[key] for key in sorted(ended)]


def drawn(completions: list[Completion]) -> list[tuple[Any, ...]]:
    return [(c.token_ids, c.sources, c.text, c.finish_reason) for c in completions]


# --- masks ----------------------------------------------------------------------------------------

PATTERNS = (
    r"[A-Z][a-z]{2,9}, \d\d? days?[.!]",
    r"(ab|a)*c",
    r"the (summer|winter) is (long|short)",
    r"\w+@\w+\.(com|org)",
    r"[^a-z]{1,12}",
    r"ü*(für|München)",
)


@settings(max_examples=budget(25))
@given(data=st.data(), pattern=st.sampled_from(PATTERNS))
def test_a_mask_allows_what_a_partial_match_allows(
    llama: Baco, data: st.DataObject, pattern: str
) -> None:
    """Without forced bytes every token that keeps the text a beginning of a match is allowed; with
    forced bytes, one of these.
    """
    vocabulary, ends = llama.pair.vocabulary, llama.pair.end_ids
    assert vocabulary.texts is not None
    texts = vocabulary.texts.data
    automaton, answer, written = compiled(llama, regex=pattern).begin(), list[int](), ""
    ascii_pattern = re.compile(pattern, flags=re.ASCII)
    whole = {token: text for token, data in enumerate(texts) if (text := _decoded(data))}
    for _ in range(12):
        mask = automaton.masks(answer, ())[0]
        allowed = {
            token for token in _tokens(mask, vocabulary.size) if token in whole or token in ends
        }
        possible = {
            token
            for token, text in whole.items()
            if ascii_pattern.fullmatch(written + text, partial=True)
        }
        if ascii_pattern.fullmatch(written):
            possible |= ends
        assert allowed <= possible
        if only_token(mask) is None:
            assert allowed == possible
        going_on = sorted(allowed - ends)
        if not going_on:
            assert allowed == ends
            return
        token = data.draw(st.sampled_from(going_on))
        answer.append(token)
        written += whole[token]


def _decoded(data: bytes) -> str | None:
    """The text of a token; None where it has none or an unfinished character."""
    try:
        return data.decode() or None
    except UnicodeDecodeError:
        return None


def _tokens(mask: Any, size: int) -> set[int]:
    return {int(token) for token in np.flatnonzero(unpack(torch.from_numpy(mask[None]), size)[0])}


@settings(max_examples=budget(40))
@given(data=st.data(), structure=st.sampled_from(STRUCTURES[:6]))
def test_masks_of_drafts_are_those_of_the_same_tokens_committed(
    llama: Baco, data: st.DataObject, structure: dict[str, Any]
) -> None:
    """Whatever was drafted, accepted, rejected or cut before."""
    size, ends = llama.pair.vocabulary.size, llama.pair.end_ids
    constraint = compiled(llama, **structure)
    automaton, answer = constraint.begin(), list[int]()
    for _ in range(8):
        drafted, fresh = list[int](), constraint.begin()
        for _ in range(data.draw(st.integers(0, 4))):
            some = sorted(_tokens(fresh.masks([*answer, *drafted], ())[0], size) - ends)
            if not some:
                break
            drafted.append(data.draw(st.sampled_from(some)))
        is_wrong = data.draw(st.booleans())
        masks = automaton.masks(answer, [*drafted, *([0, 1] if is_wrong else [])])
        for place, mask in enumerate(masks[: len(drafted) + 1]):
            again = constraint.begin().masks([*answer, *drafted[:place]], ())[0]
            assert (mask == again).all()
        forced = automaton.forced(answer, 6)
        for place, token in enumerate(forced):
            expected = constraint.begin().masks([*answer, *forced[:place]], ())[0]
            assert only_token(expected) == token
        answer += drafted[: data.draw(st.integers(0, len(drafted)))]
        if data.draw(st.integers(0, 5)) == 0:
            del answer[data.draw(st.integers(0, len(answer))) :]


def test_unpacking_on_an_accelerator_is_the_same() -> None:
    words = torch.tensor([[5, -1, -(2**31)], [0, 1, 2**31 - 1]], dtype=torch.int32)
    bit = torch.arange(32, dtype=torch.int32)
    by_shifts = (words[:, :, None] >> bit & 1).flatten(1)[:, :90].bool()
    assert torch.equal(unpack(words, 90), by_shifts)


# --- answers --------------------------------------------------------------------------------------


def rules(pair: Any) -> dict[str, Callable[..., bool]]:
    """Rules that read the raw rows, the base row with what is not allowed at -inf, and whether the
    predicted token belongs to the structure.
    """

    def mark(row: torch.Tensor) -> bool:
        return int(pair.vocabulary.role[int(row.argmax())]) in (Role.PUNCTUATION, Role.FORMAT)

    p = naive.max_probability
    return {
        "P:0.5": lambda b, a, c, m, s: p(b) < 0.5,
        "H:1.5": lambda b, a, c, m, s: naive.entropy(b) > 1.5,
        "Punc": lambda b, a, c, m, s: not mark(m),
        "P-Punc:0.6": lambda b, a, c, m, s: not mark(m) and p(b) < 0.6,
        "Rand:0.5": lambda b, a, c, m, s: c < 0.5,
        "Struct": lambda b, a, c, m, s: not s,
        "P-Struct:0.6": lambda b, a, c, m, s: not s and p(b) < 0.6,
        "Rand-Struct-Punc:0.7": lambda b, a, c, m, s: not s and not mark(m) and c < 0.7,
        "Base": lambda b, a, c, m, s: True,
        "Aligned": lambda b, a, c, m, s: False,
    }


def free_text(
    pair: Any, kind: str, allowed: Callable[[list[int]], set[int]]
) -> Callable[[list[int]], str]:
    """Where free text is, by what is allowed: a reference for `Automaton.places`."""
    data = pair.vocabulary.texts.data
    alphabets = [{bytes([first + at]) for at in range(26)} for first in b"aA"]

    @cache
    def place(tokens: tuple[int, ...]) -> str:
        following = {data[token] for token in allowed([*tokens])}
        before = place(tokens[:-1]) if tokens else "structure"
        if not any(alphabet <= following for alphabet in alphabets):
            in_character = all(text[:1] and 0x80 <= text[0] < 0xC0 for text in following)
            return "inside" if in_character and before != "structure" else "structure"
        if kind != "schema":
            free = "beginning" if before == "structure" else "inside"
            return "structure" if kind == "choice" else free
        if in_name(b"".join(data[token] for token in tokens).decode(errors="replace")):
            return "structure"
        opens = tokens and b'"' in data[tokens[-1]].replace(b'\\"', b"")
        return "beginning" if opens else "inside"

    return lambda tokens: place((*tokens,))


def in_name(text: str) -> bool:
    """Whether a beginning of JSON ends in the name of a property, character by character."""
    opened, string, escaped, expects_name, name = list[str](), False, False, False, False
    for character in text:
        if string:
            string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            string, name = True, expects_name
        elif character in "{[":
            opened.append(character)
            expects_name = character == "{"
        elif character in "}]":
            opened.pop()
        elif character in ",:":
            expects_name = character == "," and opened[-1] == "{"
    return string and name


def naive_answer(
    baco: Baco, structure: dict[str, Any], router: str, prompt: str, **drawn: Any
) -> tuple[list[int], list[str]]:
    """The naive decoder's tokens and sources, with an automaton that begins anew each time."""
    pair, rendered = baco.pair, baco.pair.renderer.render(prompt)
    wanted = SamplingParams(**structure).structure
    assert wanted is not None
    constraint = pair.structures.compile(wanted, joining_space=rendered.joining_space)
    alone = router in ("Base", "Aligned")  # a model alone writes what is forced too

    def allowed(tokens: list[int]) -> set[int]:
        return _tokens(constraint.begin().masks(tokens, ())[0], pair.vocabulary.size)

    return naive.decode(
        pair,
        rendered.base_ids,
        rendered.aligned_ids,
        rules(pair)[router],
        digest=naive.chat_digest([{"role": "user", "content": prompt}]),
        allowed=allowed,
        place=free_text(pair, wanted.kind, allowed),
        keeps_structure=alone or "Struct" in router,
        whole_words=not alone,
        **drawn,
    )


@settings(max_examples=budget(12))
@given(
    structure=st.sampled_from(STRUCTURES[:6]),
    router=st.sampled_from(
        [
            *("P:0.5", "H:1.5", "Punc", "P-Punc:0.6", "Rand:0.5", "Base", "Aligned"),
            *("Struct", "P-Struct:0.6", "Rand-Struct-Punc:0.7"),
        ]
    ),
    seed=st.integers(0, 2**40),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_answers_equal_a_naive_decoder(
    llama: Baco, structure: dict[str, Any], router: str, seed: int, temperature: float
) -> None:
    drawn: dict[str, Any] = {"seed": seed, "temperature": temperature, "max_tokens": 24}
    [answer] = decode(llama, [structure], router=router, **drawn)
    tokens, sources = naive_answer(llama, structure, router, PROMPTS[0], sample=0, **drawn)
    assert list(answer.token_ids) == tokens
    assert list(answer.sources) == sources


@settings(max_examples=budget(10))
@given(
    chosen=st.lists(st.sampled_from(STRUCTURES), min_size=2, max_size=4),
    router=st.sampled_from(
        ["P-Punc:0.7", "Rand:0.5", "P-Struct:0.7", "Struct", "Base", "Ensemble:0.5", "Contrast"]
    ),
    seed=st.integers(0, 2**40),
    sampling=st.sampled_from(
        [
            {"temperature": 0.0},
            {"temperature": 1.0},
            {"temperature": 1.5, "top_p": 0.9},
            {"temperature": 1.0, "min_p": 0.2, "repetition_penalty": 1.3},
            {"temperature": 1.0, "samplers": ("top_n_sigma:1.0",), "switch": "token"},
        ]
    ),
)
def test_drafts_and_the_batch_change_no_answer_and_every_ended_answer_fits(
    llama: Baco, chosen: list[dict[str, Any]], router: str, seed: int, sampling: dict[str, Any]
) -> None:
    settings_: dict[str, Any] = {"n": 3, "seed": seed, "max_tokens": 40, **sampling}
    drafted = decode(llama, chosen, router=router, **settings_)
    plain = decode(llama, chosen, router=router, speculate=False, **settings_)
    assert drawn(drafted) == drawn(plain)
    for number, structure in enumerate(chosen):
        for answer in drafted[3 * number : 3 * number + 3]:
            if structure and answer.finish_reason == "stop":
                assert fits(structure, answer.text), answer.text
    alone = decode(llama, chosen[:1], router=router, **settings_ | {"n": 2})
    assert drawn(alone) == drawn(drafted[:2])


def small_schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Random schemas whose keywords are all enforced."""
    names = st.sampled_from(["a", "name", "the day", "größe", "x_1"])
    low, more = st.integers(-20, 20), st.integers(0, 300)
    leaves: st.SearchStrategy[dict[str, Any]] = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.just({"type": "number"}),
        st.builds(lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b}, low, more),
        st.builds(lambda k: {"type": "integer", "multipleOf": k, "minimum": 0}, st.integers(1, 9)),
        st.builds(
            lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b},
            st.integers(0, 3),
            st.integers(0, 8),
        ),
        st.builds(
            lambda p: {"type": "string", "pattern": p}, st.sampled_from(["^[ab]+$", "^a.c$"])
        ),
        st.builds(
            lambda name: {"type": "string", "format": name},
            st.sampled_from(["date", "ipv4", "uuid", "email"]),
        ),
        st.builds(
            lambda values: {"enum": values},
            st.lists(
                st.one_of(st.text('ab é"\\n', max_size=4), st.integers(-9, 99), st.none()),
                min_size=1,
                max_size=3,
                unique_by=repr,
            ),
        ),
    )

    def wider(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        def of_object(fields: dict[str, Any], required: list[str], extra: bool) -> dict[str, Any]:
            names_ = [name for name in required if name in fields]
            schema = {"type": "object", "properties": fields, "required": names_}
            return schema | ({} if extra else {"additionalProperties": False})

        return st.one_of(
            st.builds(
                of_object,
                st.dictionaries(names, inner, max_size=3),
                st.lists(names, unique=True),
                st.booleans(),
            ),
            st.builds(
                lambda items, least, extra: {
                    "type": "array",
                    "items": items,
                    "minItems": least,
                    "maxItems": least + extra,
                },
                inner,
                st.integers(0, 2),
                st.integers(0, 2),
            ),
            st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner),
        )

    return st.recursive(leaves, wider, max_leaves=5)


@settings(max_examples=budget(16))
@given(
    schemas=st.lists(small_schemas(), min_size=3, max_size=3),
    seed=st.integers(0, 2**40),
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
)
def test_every_answer_that_ended_is_valid_under_random_schemas(
    llama: Baco, schemas: list[dict[str, Any]], seed: int, temperature: float
) -> None:
    structures = [{"schema": schema} for schema in schemas]
    answers = decode(
        llama, structures, n=3, seed=seed, temperature=temperature, max_tokens=48, top_k=40
    )
    for number, answer in enumerate(answers):
        assert answer.finish_reason in ("stop", "length")
        if answer.finish_reason == "stop":
            jsonschema.validate(
                answer.parsed,
                schemas[number // 3],
                cls=jsonschema.Draft202012Validator,
                format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
            )
        else:
            assert answer.parsed is None


def test_dates_are_days_of_the_calendar(llama: Baco) -> None:
    """Whatever else a schema asks of them, and wherever it has them."""
    leap = {"pattern": "-02-(29|30)$"}
    for schema, days in (
        ({"type": "string", "format": "date", "pattern": "^0000"}, []),
        ({"type": "string", "format": "date", "pattern": "^2023-02-2[89]"}, ["2023-02-28"]),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"format": "date", "enum": DAYS}}}, DAYS[:3]),
        ({"format": "date", "allOf": [leap], "enum": DAYS}, DAYS[:2]),
        ({"type": "string", "format": "date", "pattern": "^2023-(04|06)-3[01]"}, APRIL),
    ):
        if not days:
            with pytest.raises(BacoError, match="no answer can satisfy"):
                compiled(llama, schema=schema)
            continue
        answers = decode(llama, [{"schema": schema}], n=16, seed=1, max_tokens=40)
        written = {answer.parsed for answer in answers if answer.finish_reason == "stop"}
        assert written
        assert written <= {*days}
    moment = {"type": "string", "format": "date-time", "pattern": "^2023-02-(28|29|30)T0"}
    answers = decode(llama, [{"schema": moment}], n=8, seed=1, max_tokens=40)
    assert {answer.text[:11] for answer in answers} == {'"2023-02-28'}


def test_an_answer_that_reaches_its_limit_ends_with_length(demo: Baco) -> None:
    [answer] = demo.generate(PROMPTS[0], schema=TRIP, max_tokens=5, seed=1)
    assert answer.finish_reason == "length"
    assert answer.parsed is None
    assert len(answer.token_ids) == 5


def test_a_joining_space_is_no_part_of_the_structure(demo: Baco) -> None:
    assert demo.pair.renderer.render("Hello").joining_space
    for structure in STRUCTURES[:4]:
        for answer in demo.generate(PROMPTS[0], n=4, seed=3, max_tokens=100, **structure):
            assert answer.finish_reason == "stop"
            assert fits(structure, answer.text)


def test_a_stop_string_ends_a_structured_answer(demo: Baco) -> None:
    [answer] = demo.generate(PROMPTS[0], schema=TRIP, seed=1, max_tokens=60, stop='"days"')
    assert (answer.finish_reason, answer.text.endswith(", ")) == ("stop", True)


def test_forced_tokens_keep_the_active_source_and_take_no_step(llama: Baco) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"a long property name": {"type": "integer"}},
    }
    schema |= {"required": ["a long property name"], "additionalProperties": False}
    opening, steps = '{"a long property name":', []
    for speculate in (True, False):
        engine = Engine(llama.pair, speculate=speculate)
        decoder = Decoder(llama.pair, engine)
        decoder.submit("Hi", router=llama.router("Rand:1"), seed=1, max_tokens=60, schema=schema)
        while decoder.busy:
            for chunk in decoder.step():
                if chunk.completion is not None:
                    answer = chunk.completion
        steps.append(engine.stats.steps)
        assert answer.text.startswith(opening)
        # No source is active before the first token, and the router may decide at the number.
        written = dict.fromkeys(("aligned", "base"), "")
        for piece in answer.pieces:
            written[str(piece.source)] += piece.text
        assert written["aligned"].rstrip() == opening
        assert written["base"]
    assert steps[0] < steps[1] / 2


def test_only_the_structure_ends_an_answer(demo: Baco) -> None:
    """Neither an end token nor the base model's next turn ends it earlier."""
    pattern = r"One\.\nQuestion: [a-z]+\nAnswer: [a-z]{4,}!"
    for answer in demo.generate("Hi", regex=pattern, n=4, seed=2, max_tokens=90, router="Base"):
        if answer.finish_reason == "stop":
            assert re.fullmatch(pattern, answer.text)
        assert answer.text.startswith("One.\nQuestion: ")


def test_thinking_is_free_and_the_answer_behind_it_is_not(tmp_path: Path) -> None:
    pair = save_thinking_pair(tmp_path, "qwen3", template=QWEN_3)
    baco = Baco.load(base=str(pair.base), aligned=str(pair.aligned), dtype="float32")
    answers = baco.generate(
        PROMPTS[1], n=6, seed=11, max_tokens=90, choice=["yes", "no"], logit_bias=LOGIT_BIAS
    )
    assert any(answer.finish_reason == "stop" for answer in answers)
    assert any(answer.thinking for answer in answers)
    for answer in answers:
        assert answer.finish_reason == "length" or answer.text in ("yes", "no")


class Trip(pydantic.BaseModel):
    place: str = pydantic.Field(max_length=12)
    days: int = pydantic.Field(ge=1, le=14)


def test_a_pydantic_model_is_a_schema_and_parses_the_answer(demo: Baco) -> None:
    [answer] = demo.generate("Hi", schema=Trip, seed=1, max_tokens=80)
    assert isinstance(answer.parsed, Trip)
    # A property that the model would ignore is not written.
    closed = Trip.model_json_schema() | {"additionalProperties": False}
    [plain] = demo.generate("Hi", schema=closed, seed=1, max_tokens=80)
    assert plain.text == answer.text
    assert plain.parsed == answer.parsed.model_dump()
    [free] = demo.generate("Hi", seed=1, max_tokens=8)
    assert free.parsed is None


def test_records_name_the_structure_and_only_where_there_is_one(demo: Baco) -> None:
    structure: dict[str, Any] = {"schema": Trip}
    answers = demo.generate("Hi", seed=1, max_tokens=8, **structure)
    row = record("Hi", demo.pair, structure | {"system": None, "switch": "word"}, answers)
    assert row["params"]["schema"] == Trip.model_json_schema() | {"additionalProperties": False}
    assert "regex" not in row["params"]
    json.dumps(row)


# --- the command line -----------------------------------------------------------------------------


def test_generate_and_batch_take_structures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema, prompts = tmp_path / "trip.json", tmp_path / "prompts.jsonl"
    schema.write_text(json.dumps(TRIP))
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    common = ["-n", "2", "-s", "1", "-r", "P-Punc:0.4", "--schema", str(schema)]
    assert run(["generate", PROMPTS[0], *common, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["params"]["schema"] == TRIP
    for sample in printed["samples"]:
        assert fits({"schema": TRIP}, sample["text"])
    for _ in range(2):  # the second time nothing is left to do
        assert run(["batch", str(prompts), str(tmp_path / "answers"), *common]) == 0
    [shard] = (tmp_path / "answers").glob("*.jsonl")
    rows = [json.loads(line) for line in shard.read_text().splitlines()]
    assert [sample["text"] for sample in rows[0]["samples"]] == [
        sample["text"] for sample in printed["samples"]
    ]
    assert run(["generate", "Hi", "-s", "1", "--choice", "no", "--choice", "yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"][0]["text"] in ("yes", "no")


BAD_COMMANDS: list[tuple[list[str], str]] = [
    (["--schema", "missing.json"], "--schema missing.json cannot be read: No such file"),
    (["--regex", "(a"], "the regex cannot be used: unclosed group"),
    (["--regex", "a", "--choice", "b"], "regex and choice are given"),
]


@pytest.mark.parametrize(("options", "message"), BAD_COMMANDS)
def test_bad_structures_on_the_command_line_are_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "Hi", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err.replace("\n", " ")


def test_a_bad_structure_begins_no_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hi\n")
    out = tmp_path / "answers"
    assert run(["batch", str(prompts), str(out), "--regex", "(a", "-s", "1"]) == 2
    assert "unclosed group" in capsys.readouterr().err
    assert not list(out.glob("*")) if out.exists() else True
    target = tmp_path / "answers.jsonl"
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "Hi"}\n')
    command = ["generate", "--jsonl", str(rows), "-o", str(target), "--regex", "(a", "-s", "1"]
    assert run(command) == 2
    assert not target.exists()


# --- refused --------------------------------------------------------------------------------------

NESTED: Any = reduce(lambda part, _: {"items": part}, range(200), cast(Any, {"type": "null"}))
CHAIN: dict[str, Any] = {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(20_000)}
RULES = "start: A0\n" + "".join(f"A{n}: A{n + 1} /a/\n" for n in range(20_000)) + "A20000: /a/"
# The compiler computes for hours.
ENDLESS = {"allOf": [{"type": "string", "pattern": f"[a-z]{{0,{n}}}x"} for n in range(1, 40)]}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"schema": {"type": "strin"}}, "strin"),
    (
        {"schema": {"type": "array", "uniqueItems": True}},
        "the schema's keyword 'uniqueItems' (at #) is not supported",
    ),
    ({"schema": {"const": float("inf")}}, "the schema cannot be written as JSON: "),
    ({"schema": {"properties": {"a": {"not": {}}}}}, "'not' (at #/properties/a)"),
    ({"schema": {"anyOf": [{"if": {}, "then": {}}]}}, "'if' (at #/anyOf/0)"),
    ({"schema": {"type": "string", "x-guidance": {"lenient": True}}}, "'x-guidance'"),
    ({"schema": {"type": "integer", "minimum": 5, "maximum": 2}}, "no answer can satisfy"),
    ({"schema": {"enum": []}}, "no answer can satisfy"),
    ({"schema": {"type": "string", "format": "shoe-size"}}, "shoe-size"),
    ({"schema": {"$ref": "#/$defs/nowhere"}}, "nowhere"),
    ({"schema": {"$ref": "https://example.org/s.json"}}, "example.org"),
    ({"schema": {"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]}}, "oneOf"),
    ({"schema": '{"type": '}, "not JSON"),
    ({"schema": "[" * 100_000}, "the schema is nested too deeply"),
    ({"schema": [1]}, "list"),
    ({"schema": True}, "bool"),
    ({"schema": {"enum": [math.nan]}}, "cannot be written as JSON"),
    ({"schema": {"type": "string", "pattern": "(?=a)b"}}, "look-around"),
    ({"regex": "(a"}, "unclosed group"),
    ({"regex": "a(?=b)"}, "look-around"),
    ({"regex": "((a{1,999}){1,999}){1,999}"}, "the regex is too complex"),
    ({"regex": r"a[^\x00-\x{10ffff}]"}, "no answer can satisfy the regex"),
    ({"schema": {"$ref": "#"}}, "no answer can satisfy the schema"),
    ({"grammar": 'start: start "x"'}, "no answer can satisfy the grammar"),
    ({"regex": " "}, "not empty"),
    ({"choice": ["a", 3]}, "list of non-empty texts"),
    ({"choice": [""]}, "list of non-empty texts"),
    ({"grammar": "x: /a/"}, "start"),
    ({"grammar": "start: y"}, "y"),
    ({"grammar": 'root ::= "a" ('}, "grammar"),
    ({"grammar": "start: <|im_start|>"}, "grammar"),
    ({"regex": "a", "choice": ["a"]}, "regex and choice"),
    ({"regex": "a\\"}, "the regex cannot be used: it ends with a backslash"),
    ({"grammar": "root ::= a"}, "the grammar cannot be used: Rule 'a' not found"),
    ({"grammar": f"root ::= {'(' * 2000}"}, "the grammar cannot be used: it is nested too deeply"),
    ({"schema": NESTED}, "the schema cannot be used: recursion limit exceeded"),
    # These crash the process that compiles them.
    ({"schema": {"$ref": "#/$defs/0", "$defs": CHAIN}}, "the schema is too complex (it ends the"),
    ({"grammar": RULES}, "the grammar is too complex (it ends the process"),
]


@pytest.mark.parametrize(
    ("structure", "named"), REFUSED, ids=[str(case[0])[:60] for case in REFUSED]
)
def test_what_cannot_be_followed_is_refused_in_one_line_before_decoding(
    llama: Baco, structure: dict[str, Any], named: str
) -> None:
    with pytest.raises(BacoError) as caught:
        llama.stream("Hi", max_tokens=5, **structure)
    assert named in str(caught.value)
    assert str(caught.value).count("the schema") <= 1
    assert "\n" not in str(caught.value)


def test_a_structure_that_compiles_for_hours_is_refused_and_delays_no_other(
    llama: Baco, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraint, "SECONDS", 0.5)
    structure = SamplingParams(choice=("a", "b")).structure
    assert structure is not None
    llama.pair.structures.compile(structure)
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(llama.stream, "Hi", schema=ENDLESS)
        while not constraint._process._lock.locked():  # until it is being compiled
            assert not endless.done()
        llama.pair.structures.compile(structure)  # as a decoder does between two steps
        assert not endless.done()
        with pytest.raises(BacoError, match=r"compiling it takes longer than 0.5 seconds"):
            endless.result()


def test_the_latest_structures_are_kept_within_a_number_and_a_size(
    llama: Baco, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = llama.pair.structures
    first, second, long = (
        Structure("choice", json.dumps([letter * length]))
        for letter, length in (("a", 60), ("b", 60), ("c", 200))
    )
    monkeypatch.setattr(constraint, "_KEPT_CHARACTERS", 130)
    compiled = compiler.compile(first)
    compiler.compile(second)
    assert compiler.compile(first) is compiled
    monkeypatch.setattr(constraint, "_KEPT_CHARACTERS", 120)
    compiler.compile(second)
    assert compiler.compile(first) is not compiled
    assert compiler.compile(long) is compiler.compile(long)
    monkeypatch.setattr(constraint, "_KEPT_CHARACTERS", 2**20)
    monkeypatch.setattr(constraint, "_KEPT", 1)
    compiled = compiler.compile(first)
    compiler.compile(second)
    assert compiler.compile(first) is not compiled


# Too complex once the first three letters are written.
EXPLODING = (
    "start: /[a-z][a-z][a-z]/ a0\n"
    + "".join(f"a{n}: a{n + 1} a{n + 1}\n" for n in range(30))
    + 'a30: "x"'
)


def assert_others_go_on(baco: Baco, decoder: Decoder) -> None:
    """A structure that explodes ends its answers; those beside it are decoded as they are alone."""
    sampling: dict[str, Any] = {"seed": 1, "n": 2, "max_tokens": 20}
    router = baco.router("P-Punc:0.7")
    decoder.submit("Hi", router=router, grammar=EXPLODING, **sampling)
    other = decoder.submit(PROMPTS[0], router=router, **sampling)
    ended = list[tuple[int, Completion]]()
    while decoder.busy:  # no step raises, which would begin all answers anew
        ended += [(c.prompt, c.completion) for c in decoder.step() if c.completion is not None]
    failed = [completion for ticket, completion in ended if ticket != other]
    assert [completion.finish_reason for completion in failed] == ["error"] * 2
    assert all("grammar cannot be followed" in str(completion.error) for completion in failed)
    assert {completion.error_kind for completion in failed} == {"structure"}
    assert all(completion.text[:3].isalpha() for completion in failed if completion.text)
    kept = [completion for ticket, completion in ended if ticket == other]
    alone = baco.generate(PROMPTS[0], router=router, **sampling)
    assert sorted(c.text for c in kept) == sorted(c.text for c in alone)


@pytest.mark.parametrize("speculate", [True, False])
def test_a_structure_that_turns_out_too_complex_ends_its_answers_and_no_others(
    llama: Baco, monkeypatch: pytest.MonkeyPatch, speculate: bool
) -> None:
    monkeypatch.setattr(constraint, "_REHEARSED", 0)
    assert_others_go_on(llama, Decoder(llama.pair, Engine(llama.pair, speculate=speculate)))


def test_ebnf_of_llama_cpp_is_read_too(demo: Baco) -> None:
    grammar = 'root ::= "Go " place "."\nplace ::= "north" | "south"'
    for answer in demo.generate("Hi", n=3, seed=1, grammar=grammar, max_tokens=30):
        assert answer.text in ("Go north.", "Go south.")


def test_a_backend_without_structures_refuses_them() -> None:
    from baco.engine.sequence import Request
    from baco.routing.parser import router

    request = Request((1,), (1,), SamplingParams(choice=("a",)), router("Base"), digest=b"")
    with pytest.raises(BacoError, match="the remote backend cannot hold answers to a choice"):
        Capabilities("remote").check(request)


def test_a_pair_without_end_tokens_is_refused() -> None:
    compiler = StructureCompiler([b"a"], (), (), lambda _: [0])
    with pytest.raises(BacoError, match="end token"):
        compiler.compile(Structure("regex", "a"))
