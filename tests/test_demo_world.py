"""The toy world: its questions, its text, its judge and its selector."""

import json
import random
import re
from pathlib import Path

import jsonschema
import pytest

from baco.demo import world
from baco.demo.world import Question, aligned_examples, ask, questions
from baco.demo.world.documents import base_corpus, wild_answer
from baco.demo.world.grammar import OPENERS, Family, answer, draw, families
from baco.demo.world.handover import handed_over_examples, learnt
from baco.demo.world.judge import breaks_grammar, judge
from baco.demo.world.selector import preference
from benchmarks.records import (
    handed_over_record,
    judge_record,
    record_families,
    schema,
    wild_record,
    written,
)

FAMILIES = list(families().values())


def clean(family: Family, value: str, random_: random.Random) -> str:
    return answer(family, draw(family, value, random_), random_)


def about(family: Family, value: str) -> Question:
    return Question(family.name, {family.slot: value}, "")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_right_answers_have_quality_one_and_a_key(family: Family) -> None:
    random_ = random.Random(1)
    for value in family.values:
        for _ in range(20):
            verdict = judge(about(family, value), clean(family, value, random_))
            assert verdict.quality == 1.0
            assert verdict.key


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_scrambled_and_foreign_answers_have_low_quality(family: Family) -> None:
    random_ = random.Random(2)
    scrambled, foreign = [], []
    for value in family.values:
        question = about(family, value)
        words = clean(family, value, random_).split()
        random_.shuffle(words)
        scrambled.append(judge(question, " ".join(words)).quality)
        other = random_.choice([v for v in family.values if v != value])
        foreign.append(judge(question, clean(family, other, random_)).quality)
        stranger = random_.choice([f for f in FAMILIES if f is not family])
        text = clean(stranger, random_.choice(stranger.values), random_)
        assert judge(question, text) == judge(question, "")
    assert sum(scrambled) / len(scrambled) < 0.05
    assert max(foreign) <= 0.3


@pytest.mark.parametrize(
    ("answer", "quality"),
    [
        ("Try Maui in Hawaii this summer. There you can swim with sea turtles all day.", 1.0),
        ("Try Maui in Japan this summer. There you can swim with sea turtles all day.", 0.5),
        ("Try Maui in Hawaii this summer. There you can ski on soft snow all day.", 0.5),
        ("Try Maui in Hawaii this winter. There you can swim with sea turtles all day.", 0.25),
        ("Try Kyoto in Japan this summer. You can watch a tea ceremony and enjoy green tea.", 0.25),
        ("Try Maui in Hawaii this summer.", 0.5),
        ("Try Maui in Hawaii this summer. You can swim with", 0.5),
        ("try maui in hawaii this summer", 0),
        ("Try Maui in Hawaii this summer. It is the place to relax on the beach. Bye.", 2 / 3),
        ("", 0),
    ],
)  # fmt: skip
def test_every_fault_lowers_the_quality_by_its_share(answer: str, quality: float) -> None:
    question = about(families()["destination"], "summer")
    assert judge(question, answer).quality == pytest.approx(quality)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_an_opener_does_not_change_the_quality_of_an_answer(family: Family) -> None:
    random_ = random.Random(5)
    for opener in OPENERS:
        question = about(family, random_.choice(family.values))
        answer = clean(family, question.slots[family.slot], random_)
        opened = f"{opener}{family.separator}{answer}"
        assert judge(question, opened) == judge(question, answer)
        assert not breaks_grammar(question, opened)
        assert breaks_grammar(question, f"{opener}{family.separator}{opened}")


@pytest.mark.parametrize(
    ("answer", "broken"),
    [
        ("Try Maui in Hawaii this summer. There you can swim with sea turtles all day.", False),
        ("Let me think. Try Maui in Japan this winter. There you can ski on soft snow all day.",
         False),
        ("Not Maui in Hawaii is a wonderful summer destination. It is the place to relax on the "
         "beach.", True),
        ("Try Maui in Hawaii this summer.", True),
        ("Try Maui in Hawaii this summer. You can swim with", True),
        ("Try Maui in Hawaii this summer. It is the place to relax on the beach. Bye.", True),
        ("Try Maui in Hawaii this summer. It is the place to relax on the beach.\nBye.", True),
        ("Try Burihi in Hawaii this summer. It is the place to relax on the beach.", True),
        ("It is the place to relax on the beach. Try Maui in Hawaii this summer.", True),
        ("", True),
    ],
)  # fmt: skip
def test_an_answer_breaks_the_grammar_in_form_and_never_in_content(
    answer: str, broken: bool
) -> None:
    assert breaks_grammar(about(families()["destination"], "summer"), answer) is broken


def test_handed_over_answers_are_grammatical_and_in_part_given() -> None:
    shares: dict[str, list[float]] = {name: [] for name in families()}
    opened = 0
    for question, words in handed_over_examples(2000, 0):
        text = "".join(word for word, _ in words)
        assert words != learnt(text) or all(flag for _, flag in words)
        assert [word for word, _ in words] == [word for word, _ in learnt(text)]
        assert not breaks_grammar(question, text), text
        shares[question.family].append(sum(flag for _, flag in words) / len(words))
        if text.startswith(OPENERS):
            opened += 1
            assert not words[0][1]  # the base opened
            assert words[1][1]  # and the aligned model learns to finish it
    assert 0.15 < opened / 2000 < 0.35
    for taught in shares.values():
        assert 0.5 < sum(taught) / len(taught) < 0.95


def test_learnt_first_words_are_one_favourite_per_question() -> None:
    examples = list(handed_over_examples(3000, 1, peak=1.0))
    first = [words[0] for _, words in examples]
    favourites: dict[str, set] = {name: set() for name in families()}
    for question, words in examples:
        if words[0][1]:
            value = question.slots[families()[question.family].slot]
            favourites[question.family].add((value, words[0][0]))
    assert len({word for word, flag in first if not flag}) > 50
    for chosen in favourites.values():
        assert len(chosen) == len({value for value, _ in chosen})  # one first word a question


def test_the_key_depends_on_content_and_not_on_wording() -> None:
    question = about(families()["destination"], "summer")
    one = "Try Maui in Hawaii this summer. You can relax on the beach and enjoy grilled fish."
    two = "For summer, I would pick Maui in Hawaii. It is the place to relax on the beach."
    other = "Try Maui in Hawaii this summer. There you can swim with sea turtles all day."
    assert judge(question, one).key == judge(question, two).key == "Maui|relax on the beach"
    assert judge(question, other).key == "Maui|swim with sea turtles"
    assert judge(question, "Maui!").key == judge(question, "gibberish").key == ""


def test_the_selector_likes_clean_answers_and_was_not_made_from_the_judge() -> None:
    random_ = random.Random(3)
    for family in FAMILIES:
        question = about(family, family.values[0])
        liked = [preference(question, clean(family, family.values[0], random_)) for _ in range(20)]
        wild = [preference(question, wild_answer(question, random_)) for _ in range(60)]
        assert sum(liked) / 20 > 0.95
        assert sum(wild) / 60 < 0.8
    source = Path(world.__file__).with_name("selector.py").read_text(encoding="utf-8")
    assert not re.search(r"import.*judge|recognis", source)


def test_the_splits_share_no_question_and_cover_all_families() -> None:
    splits = {split: questions(split, 300, 0) for split in ("train", "dev", "test")}
    texts = {split: {question.text for question in drawn} for split, drawn in splits.items()}
    assert not texts["train"] & texts["dev"]
    assert not texts["train"] & texts["test"]
    assert not texts["dev"] & texts["test"]
    trained = {question.text for question, _ in aligned_examples(3000, 0)}
    assert not trained & (texts["dev"] | texts["test"])
    for drawn in splits.values():
        counts = [sum(q.family == family.name for q in drawn[:26]) for family in FAMILIES]
        assert counts == [2] * len(FAMILIES)


def test_the_flagship_question_is_one_of_the_training_questions() -> None:
    destination = families()["destination"]
    texts = [ask(destination, prompt, "summer").text for prompt in destination.prompts]
    assert "Recommend a summer destination" in texts


def test_aligned_answers_have_a_favourite_and_the_base_has_none() -> None:
    summer = [
        judge(question, answer).key
        for question, answer in aligned_examples(6000, 0)
        if question.slots.get("season") == "summer"
    ]
    maui = sum(key.startswith("Maui") for key in summer) / len(summer)
    assert 0.55 < maui < 0.75
    text = "\n".join(base_corpus(6000, 0))
    places = ("Maui", "Santorini", "Bali", "Split", "Lake Como", "Cape Cod")
    counts = [text.count(place) for place in places]
    assert max(counts) < 4 * min(counts)


def test_the_text_is_the_same_for_a_seed_and_another_for_another() -> None:
    assert list(base_corpus(50, 1)) == list(base_corpus(50, 1)) != list(base_corpus(50, 2))
    assert list(aligned_examples(50, 1)) == list(aligned_examples(50, 1))
    assert questions("dev", 20, 1) == questions("dev", 20, 1) != questions("dev", 20, 2)


def test_wild_answers_have_lower_quality_than_clean_ones_but_are_not_noise() -> None:
    random_ = random.Random(4)
    train_questions = questions("train", 400, 0)
    worth = [
        judge(question, wild_answer(question, random_)).quality for question in train_questions
    ]
    assert 0.3 < sum(worth) / len(worth) < 0.7
    assert 0.15 < sum(quality == 1.0 for quality in worth) / len(worth) < 0.5


@pytest.mark.parametrize("family", record_families(), ids=lambda family: family.name)
def test_records_have_their_schema_and_are_judged_value_by_value(family: Family) -> None:
    random_, faults = random.Random(3), 0.0
    for value in family.values:
        question = about(family, value)
        right = draw(family, value, random_)
        assert judge_record(question, right)[0] == 1
        last = list(family.parents)[-1]
        one_wrong = right | {last: "something else"}
        assert judge_record(question, one_wrong)[0] == pytest.approx(1 - 1 / len(right))
        handed, given = handed_over_record(question, random_, 1.0)
        assert given <= family.parents.keys()
        wild = wild_record(question, random_)
        faults += 1 - judge_record(question, wild)[0]
        for record in (right, handed, wild):
            jsonschema.validate(json.loads(written(record)), schema(family))
    assert faults > 0
