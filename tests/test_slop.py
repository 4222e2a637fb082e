"""Slop: the base model writes a word that would begin a listed phrase."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baco import Baco, BacoError, as_transformers, router
from baco.cli import run
from baco.decoder import Decoder
from baco.engine.engine import Engine
from baco.routing.parser import named_files
from baco.text.phrases import Phrases, load_phrases
from baco.text.vocabulary import TokenTexts, Vocabulary
from tests.fuzzing import budget
from tests.serving import served

PROMPTS = ["Tell me a short story about an animal", "Give me a cosy dinner idea", "Plan a walk."]
# Phrases that the demo's aligned model writes often.
LIST = "# a comment\n\nthe end\nwise *\nhoney*\na cosy\nquiet valley\nNamed  Luna # a name\n"


@pytest.fixture(scope="module")
def phrases(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("lists") / "my-list.txt"
    file.write_text(LIST.replace("wise *", "wis*"))
    return str(file)


class Words:
    """A tokenizer of given tokens."""

    all_special_ids: tuple[int, ...] = ()

    def __init__(self, *tokens: str) -> None:
        self.added_tokens_decoder: dict[int, Any] = {}
        self.vocab = {token.replace(" ", "\u2581"): id_ for id_, token in enumerate(tokens)}

    def get_vocab(self) -> dict[str, int]:
        return self.vocab


def begins(text: str, token: str, listed: str, *other_tokens: str) -> bool:
    """Whether a token, after a text of one token per character, begins a phrase of a list."""
    # A token with a space makes the tokenizer one that marks spaces.
    tokens = list(dict.fromkeys([token, *other_tokens, " ", *text]))
    vocabulary = Vocabulary.from_tokenizer(Words(*tokens), len(tokens))
    openings = Phrases.parse(listed, "the list").openings(vocabulary)
    ids = [tokens.index(character) for character in text]
    begun = openings.begun(torch.tensor([0]), lambda _, count: ids[-count:])
    return bool(begun[0])


def test_a_phrase_begins_at_its_first_word_that_is_no_function_word() -> None:
    assert begins("It is a", " testament", "a testament to")
    assert not begins("It is the", " testament", "a testament to")
    assert not begins("It is pizza", " testament", "a testament to")
    assert begins("It is the", " testament", "testament to")
    assert not begins("It is a testament", " to", "a testament to")
    assert begins("If", " only", "if only")  # function words alone: the last is the key word


def test_case_apostrophes_and_white_space_do_not_matter() -> None:
    assert begins("AND IT\u2019S \n", "Important", "it's important to")
    assert begins("It's", " IMPORTANT", "IT\u2019S  important")


def test_a_token_inside_a_word_begins_no_phrase() -> None:
    assert begins("We ", "delve", "delve")
    assert not begins("We un", "delve", "delve")


def test_a_token_that_is_part_of_the_key_word_begins_it_from_half_its_letters_on() -> None:
    assert begins("A", " tape", "tapestry")
    assert not begins("A", " tap", "tapestry", " tape")
    assert begins("A", " tap", "tapestry")  # no token of this vocabulary has more of it
    assert not begins("A", " tapestries", "tapestry")


def test_a_star_stands_for_any_ending() -> None:
    assert begins("We", " delving", "delv*")
    assert not begins("We", " deal", "delv*", " delv")


def test_phrases_of_a_text_are_counted_whole_and_without_overlap() -> None:
    listed = Phrases.parse("a testament to\ntestament\ndelv*\nrich tapestry", "the list")
    assert listed.count("A Testament  to delving into a rich\ntapestry.") == 3
    assert listed.count("atestament, redelve, rich-tapestry, testaments") == 0


@pytest.mark.parametrize(
    ("text", "error"),
    [("# nothing\n", "lists no phrases"), ("fine\nnot; fine\n", "line 2: 'not;' is not a word")],
)
def test_a_bad_list_is_refused_in_one_line(text: str, error: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.txt"
    file.write_text(text)
    with pytest.raises(BacoError, match=error) as caught:
        router(f"Slop:{file}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/file", "src"])
def test_a_list_that_cannot_be_read_is_refused(path: str) -> None:
    with pytest.raises(BacoError, match="cannot be read"):
        router(f"P-Slop:{path},0.4")


def test_the_built_in_list_is_a_list() -> None:
    assert len(load_phrases(None).entries) > 80


def test_a_spelling_names_its_file(phrases: str) -> None:
    assert router(f"slop-P:{phrases},0.3").spelling == f"P-Slop:0.3,phrases={phrases}"
    assert router(f"P-Slop:0.3,phrases={phrases}") != router("P-Slop:0.3")
    assert router("Slop").spelling == "Slop"
    assert named_files(f"P-Slop:0.3,phrases={phrases}") == (phrases,)
    assert named_files("P-Slop:0.3") == named_files("Aligned") == ()


def decode(baco: Baco, routers: list[str], **options: Any) -> list[list[tuple[Any, ...]]]:
    """Tokens and sources of all answers, by prompt and sample."""
    sampling = {"n": 2, "max_tokens": 24, "seed": 5, **options.pop("sampling", {})}
    decoder = Decoder(baco.pair, Engine(baco.pair, **options))
    tickets = [
        decoder.submit(prompt, router=baco.router(spelling), **sampling)
        for prompt, spelling in zip(PROMPTS, routers, strict=True)
    ]
    done: dict[Any, dict[int, tuple[Any, ...]]] = {}
    while decoder.busy:
        for chunk in decoder.step():
            if chunk.completion is not None:
                drawn = (tuple(chunk.completion.token_ids), tuple(chunk.completion.sources))
                done.setdefault(chunk.prompt, {})[chunk.sample] = drawn
    return [[done[ticket][sample] for sample in sorted(done[ticket])] for ticket in tickets]


@settings(max_examples=budget(3))
@given(
    rules=st.lists(st.sampled_from(["Slop", "P-Slop", "P-Punc-Slop"]), min_size=3, max_size=3),
    seed=st.integers(0, 2**40),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_answers_do_not_depend_on_drafts_or_the_batch(
    demo: Baco, phrases: str, rules: list[str], seed: int, temperature: float
) -> None:
    spellings = [f"{rule}:{phrases}" + ",0.4" * rule.startswith("P") for rule in rules]
    sampling = {"seed": seed, "temperature": temperature}
    expected = decode(demo, spellings, speculate=False, sampling=sampling)
    assert decode(demo, spellings, speculate=True, sampling=sampling) == expected
    assert decode(demo, spellings, max_rows=1, sampling=sampling) == expected


def test_the_base_model_writes_exactly_the_words_that_begin_a_phrase(
    demo: Baco, phrases: str
) -> None:
    pair = demo.pair
    texts = TokenTexts(pair.tokenizer, pair.vocabulary.size)
    listed = ["the end", "wis", "honey", "a cosy", "quiet valley", "named luna"]
    keys = {"end": "the", "wis": "", "honey": "", "cosy": "a", "quiet": "", "named": ""}
    assert len(listed) == len(keys)
    seen = 0
    for prompt in PROMPTS:
        answer = demo.generate(prompt, router=f"Slop:{phrases}", seed=3, max_tokens=60)[0]
        rendered = pair.renderer.render(prompt)
        rows = pair.aligned.score([*rendered.aligned_ids, *answer.token_ids[:-1]])
        tops = rows[len(rendered.aligned_ids) - 1 :].argmax(-1).tolist()
        for at, (source, top) in enumerate(zip(answer.sources, tops, strict=True)):
            before = texts.decode(answer.token_ids[:at]).lower()
            word = texts.decode([top]).lower()
            if source == "base" and (at == 0 or answer.sources[at - 1] == "aligned"):
                assert any(
                    word.strip() and (key.startswith(word.strip()) or word.strip().startswith(key))
                    for key in keys
                ), (before, word)
                seen += 1
            for key, opening in keys.items():
                fits = before.split()[-1:] == [opening] if opening else True
                if word == f" {key}" and fits:
                    assert source == "base", (before, word)
    assert seen


def test_the_other_rules_decide_what_begins_no_phrase(demo: Baco, tmp_path: Path) -> None:
    file = tmp_path / "none.txt"
    file.write_text("a phrase that nobody writes xyzzy\n".replace("phrase", "qqqqqq"))
    for rule, alone in (("P-Punc-Slop:0.4,", "P-Punc:0.4"), ("Slop:", "Aligned")):
        routed = demo.generate(PROMPTS[0], router=f"{rule}{file}", seed=2, n=2)
        plain = demo.generate(PROMPTS[0], router=alone, seed=2, n=2)
        assert [a.token_ids for a in routed] == [a.token_ids for a in plain]


def test_the_transformers_object_refuses_a_router_that_reads_the_answer(demo: Baco) -> None:
    with pytest.raises(BacoError, match="cannot run Slop, which reads the answer so far"):
        as_transformers(demo, "Slop")


def test_a_server_reads_no_file_that_a_request_names(demo: Baco, phrases: str) -> None:
    with served(demo, router_files=(phrases,)) as server:
        assert server.ask(router="Slop", max_tokens=2).is_success
        assert server.ask(router=f"P-Slop:0.4,phrases={phrases}", max_tokens=2).is_success
        for path in (f"{phrases}2", "/no/such/file", __file__):
            reply = server.ask(router=f"Slop:{path}", max_tokens=2)
            assert reply.status_code == 400
            assert "names a file: this server reads only" in reply.json()["error"]["message"]


def test_an_output_is_not_continued_with_another_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, prompts = tmp_path / "list.txt", tmp_path / "prompts.txt"
    words.write_text("tapestry\n")
    prompts.write_text(f"{PROMPTS[0]}\n")
    router = ["--router", f"Slop:{words}"]
    batch = ["batch", str(prompts), str(tmp_path / "out"), *router, "--max-tokens", "3"]
    sweep = ["sweep", "--task", "demo", "--limit", "1", "-n", "1", *router, "--workers", "1"]
    sweep += ["--out", str(tmp_path / "run"), "--metric", "distinct_2"]
    for command in (batch, sweep):
        assert run(command) == 0
    words.write_text("delve\n")
    for command in (batch, sweep):
        capsys.readouterr()
        assert run(command) == 2
        assert "other settings" in capsys.readouterr().err
