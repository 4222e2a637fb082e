"""Plans of studies: what they hold, what changes their hash, who sees what."""

import json
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from baco.errors import BacoError
from baco.study.build import count_words, limited
from baco.study.default_texts import CONSENT, RUBRIC
from baco.study.plan import Plan, text_hash
from baco.study.schedule import method_pairs, schedule, texts_shown, training
from baco.study.status import rater_rows
from baco.study.study import Study, amend
from tests.studies import METHODS, fill, made_plan, made_study, write_run


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return made_plan(write_run(tmp_path_factory.mktemp("plan") / "run"), prompts=9, raters=12)[0]


def test_a_plan_is_the_same_after_json_and_its_hash_follows_its_content(plan: Plan) -> None:
    value = json.loads(json.dumps(plan.to_json()))
    assert Plan.from_json(value) == plan
    assert Plan.from_json(value).hash == plan.hash
    assert Plan.from_json(value | {"raters": 13}).hash != plan.hash


def test_the_same_run_and_options_give_the_same_plan_and_another_seed_another(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "run")
    assert made_plan(run)[0].hash == made_plan(run)[0].hash
    assert made_plan(run)[0].hash != made_plan(run, seed=1)[0].hash


def test_all_texts_shown_are_kept_under_their_hashes(tmp_path: Path) -> None:
    plan, texts = made_plan(write_run(tmp_path / "run"))
    assert set(texts_shown(plan)) <= texts.keys()
    assert all(text_hash(text) == hash for hash, text in texts.items())


def test_every_rater_sees_every_prompt_once_as_sets_and_once_as_answers(plan: Plan) -> None:
    for number in range(12):
        shown = [s.item for s in schedule(plan, number) if s.item.kind == "comparison"]
        prompts = {item.prompt for item in shown}
        assert len(prompts) == 9
        for unit in ("set", "answer"):
            assert sorted(i.prompt for i in shown if i.unit == unit) == sorted(prompts)


def test_no_rater_sees_a_text_twice_except_in_checks(plan: Plan) -> None:
    for number in range(12):
        stimuli = [
            id
            for screen in schedule(plan, number)
            if screen.item.kind == "comparison"
            for id in (screen.left, screen.right)
        ]
        assert len(set(stimuli)) == len(stimuli)


def test_each_rater_sees_each_pair_of_methods_equally_often_on_both_sides(plan: Plan) -> None:
    for number in range(12):
        sides: Counter[tuple[str, str, str]] = Counter()
        for screen in schedule(plan, number):
            if screen.item.kind == "comparison":
                left, right = (plan.stimulus[id].method for id in (screen.left, screen.right))
                sides[screen.item.unit, left, right] += 1
        for unit in ("set", "answer"):
            for first, second in combinations(METHODS, 2):
                ahead, behind = sides[unit, first, second], sides[unit, second, first]
                assert ahead + behind == 3
                assert abs(ahead - behind) == 1


def test_each_prompt_has_each_pair_equally_often_over_raters_and_both_ways_round(
    plan: Plan,
) -> None:
    seen = Counter(
        (screen.item.id, screen.swapped)
        for number in range(12)
        for screen in schedule(plan, number)
        if screen.item.kind == "comparison"
    )
    assert len(seen) == 9 * 2 * len(method_pairs(plan)) * 2
    assert set(seen.values()) == {2}


def test_raters_with_a_part_of_the_prompts_cover_all_of_them_equally(plan: Plan) -> None:
    part = replace(plan, prompts_per_rater=6)
    seen: Counter[tuple[str, bool]] = Counter()
    for number in range(18):
        shown = [s for s in schedule(part, number) if s.item.kind == "comparison"]
        assert Counter(screen.item.unit for screen in shown) == {"set": 6, "answer": 6}
        assert len({s.item.prompt for s in shown if s.item.unit == "set"}) == 6
        pairs = Counter((s.item.unit, s.item.id.rpartition("/")[2]) for s in shown)
        assert set(pairs.values()) == {2}
        seen.update((screen.item.id, screen.swapped) for screen in shown)
    assert len(seen) == 9 * 2 * 3 * 2
    assert set(seen.values()) == {2}


def test_sets_come_first_for_half_of_the_raters_with_either_order_of_sides(plan: Plan) -> None:
    orders = Counter((schedule(plan, number)[0].item.unit, number // 3 % 2) for number in range(12))
    assert orders == {(unit, sides): 3 for unit in ("set", "answer") for sides in (0, 1)}


def test_every_rater_gets_all_checks_and_never_first(plan: Plan) -> None:
    for number in range(12):
        screens = schedule(plan, number)
        checks = [screen.item.check for screen in screens if screen.item.kind == "check"]
        assert sorted(filter(None, checks)) == ["equal", "repeated", "shuffled"]
        firsts = [
            s
            for s, before in zip(screens, [None, *screens[:-1]], strict=True)
            if before is None or before.item.unit != s.item.unit
        ]
        assert all(screen.item.kind == "comparison" for screen in firsts)
        assert [screen.position for screen in screens] == list(range(len(screens)))


def test_checks_have_texts_with_a_known_answer(tmp_path: Path) -> None:
    study = made_study(tmp_path)
    items = {item.check: item for item in study.plan.items if item.check}
    sides = {
        check: [study.answers(study.plan.stimulus[id]) for id in (item.first, item.second)]
        for check, item in items.items()
    }
    assert sides["equal"][0] == sides["equal"][1]
    assert len(set(sides["repeated"][1])) == 1
    assert len(set(sides["repeated"][0])) >= 4
    (text,), (shuffled,) = sides["shuffled"]
    assert text != shuffled
    assert sorted(text.split()) == sorted(shuffled.split())
    assert items["repeated"].expected == {"diversity": "first", "diversity_rating": "first"}
    compared = {item.prompt for item in study.plan.items if item.kind == "comparison"}
    assert not {item.prompt for item in items.values()} & compared


def shuffled_check(study: Study) -> list[str]:
    """Both texts of the check on shuffled words."""
    (item,) = (item for item in study.plan.items if item.check == "shuffled")
    return [study.answers(study.plan.stimulus[id])[0] for id in (item.first, item.second)]


def test_words_of_scripts_without_spaces_are_shuffled_too(tmp_path: Path) -> None:
    text = "我喜欢在夏天去海边游泳，因为海水很凉快。"
    study = made_study(tmp_path, run={"text": lambda *_: text})
    (item,) = (item for item in study.plan.items if item.check == "shuffled")
    (shown,), (shuffled,) = (
        study.answers(study.plan.stimulus[i]) for i in (item.first, item.second)
    )
    assert shown == text != shuffled
    assert sorted(shown) == sorted(shuffled)


def test_an_answer_of_one_repeated_word_is_not_shuffled(tmp_path: Path) -> None:
    study = made_study(tmp_path, run={"text": lambda *_: "no " * 12})
    (item,) = (item for item in study.plan.items if item.check == "shuffled")
    (shown,), (shuffled,) = (
        study.answers(study.plan.stimulus[i]) for i in (item.first, item.second)
    )
    assert shown != shuffled


def test_training_comes_with_feedback_and_sets_of_the_studys_size(plan: Plan) -> None:
    screens = training(plan)
    assert [screen.position for screen in screens] == list(range(-len(screens), 0))
    for screen in screens:
        assert screen.item.feedback
        assert screen.item.expected
        size = plan.set_size if screen.item.unit == "set" else 1
        assert len(plan.stimulus[screen.left].texts) == size


def test_long_answers_are_cut_at_one_limit_and_counted(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        text=lambda m, p, s: f"{p} {s} " + "word " * (20 + 20 * m.startswith("Base")),
    )
    plan, texts = made_plan(run, word_limit=30)
    assert plan.cut == {"P-Punc:0.4": 0, "Aligned T=1": 0, "Base T=1": 6 * 6}
    cut = [text for text in texts.values() if text.endswith("[…]")]
    assert cut
    assert {count_words(text) for text in cut} == {31}


def test_words_of_scripts_without_spaces_are_their_characters() -> None:
    assert count_words("Good morning, 東京へ行く") == 7
    assert limited("東京へ行く", 2) == ("東京 […]", True)


def test_the_default_contrasts_test_diversity_quality_and_no_loss(plan: Plan) -> None:
    contrasts = {(c.question, c.control, c.test, c.primary) for c in plan.contrasts}
    assert contrasts == {
        ("diversity", "Aligned T=1", "superiority", True),
        ("quality_rating", "Aligned T=1", "equivalence", False),
        ("quality", "Base T=1", "superiority", False),
    }


def test_a_plan_changed_before_the_first_answer_stays_the_first_version(tmp_path: Path) -> None:
    study = made_study(tmp_path)
    change(study.path, raters=5)
    again = Study.open(study.path)
    assert (again.version, again.plan.raters) == (1, 5)
    assert len(again.store.versions()) == 1


def test_a_plan_changed_after_the_first_answer_is_refused_until_it_is_amended(
    tmp_path: Path,
) -> None:
    study = made_study(tmp_path)
    fill(study, 1)
    change(study.path, raters=5)
    with pytest.raises(BacoError, match=r"changed after the first answer.*baco study amend"):
        Study.open(study.path)
    again = amend(study.path, "one more rater")
    assert (again.version, again.plan.raters) == (2, 5)
    assert [v.reason for v in again.store.versions()] == ["", "one more rater"]
    assert {judgment.version for judgment in again.judgments()} == {1}
    with pytest.raises(BacoError, match="is unchanged"):
        amend(study.path, "again")


def test_a_plan_changed_after_all_raters_withdrew_is_the_only_one(tmp_path: Path) -> None:
    study = made_study(tmp_path)
    fill(study, 1)
    change(study.path, raters=5)
    study = amend(study.path, "one more rater")
    (rater,) = study.store.raters()
    study.store.withdraw(rater.id)
    change(study.path, raters=6)
    study = Study.open(study.path)
    fill(study, 1)
    again = Study.open(study.path)
    assert [v.plan.raters for v in again.store.versions()] == [6]


def test_the_minutes_of_a_rater_are_those_of_all_answers(tmp_path: Path) -> None:
    study = made_study(tmp_path)
    fill(study, 1)
    (row,) = rater_rows(study)
    seconds = [answer.seconds for answer in study.store.answers()]
    assert row.minutes == pytest.approx(sum(seconds) / 60)
    assert any(second % 1 for second in seconds)


def test_a_changed_text_is_refused(tmp_path: Path) -> None:
    study = made_study(tmp_path)
    path = study.path / "texts.json"
    path.write_text(
        path.read_text(encoding="utf-8").replace("worth a visit", "worth it"), encoding="utf-8"
    )
    with pytest.raises(BacoError, match=r"text \w+ was changed after the plan"):
        Study.open(study.path)


def test_the_committed_example_is_a_plan_with_all_its_texts(tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "docs" / "results" / "study-demo"
    for name in ("plan.json", "texts.json"):
        (tmp_path / name).write_bytes((example / name).read_bytes())
    study = Study.open(tmp_path)
    assert study.plan.methods == ("P-Punc:0.4", "Aligned", "Base")
    assert len(schedule(study.plan, 0)) == 2 * 40 + 3
    study.close()


def test_the_documentation_has_the_default_texts() -> None:
    page = (Path(__file__).parent.parent / "docs" / "study.md").read_text(encoding="utf-8")
    shown = " ".join(page.replace("> ", "").replace(">", "").split())
    for text in (*CONSENT, *(text for text in RUBRIC if not text.startswith("# "))):
        assert " ".join(text.split()) in shown


def change(folder: Path, **fields: object) -> None:
    path = folder / "plan.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(value | fields), encoding="utf-8")
