"""Tasks: prompts in the hub's format, from user files and the demo world, and right answers."""

import json
from pathlib import Path
from typing import Any

import pandas
import pytest

from baco.cli.calibrate import read_prompts
from baco.demo.world import ask
from baco.demo.world.grammar import families
from baco.errors import BacoError
from baco.evaluation.metrics import MetricUnavailable
from baco.evaluation.records import Prompt
from baco.evaluation.tasks import VERIFIERS, accuracy, load_task, task_files


def rows(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
    return path


def test_every_task_file_names_its_rows_and_its_verifier() -> None:
    for file in task_files().values():
        assert file.source.keys() & {"hub", "world", "published"}
        assert file.verifier is None or file.verifier in VERIFIERS
        assert file.help


def test_demo_questions_have_wordings_that_neither_model_was_trained_on() -> None:
    task = load_task("demo")
    assert len(task.prompts) == 40 and task.judge == "demo"
    assert len({prompt.id for prompt in task.prompts}) == 40
    for prompt in task.prompts:
        family = families()[prompt.reference["family"]]
        value = prompt.reference["slots"][family.slot]
        trained = {ask(family, wording, value).text for wording in family.prompts}
        held = {ask(family, wording, value).text for wording in family.held}
        assert {prompt.text, *prompt.paraphrases} == held
        assert not held & trained


def test_demo_facts_are_the_families_of_one_answer() -> None:
    task = load_task("demo-facts", 10)
    assert {prompt.category for prompt in task.prompts} == {"opposite", "capital"}
    assert len({prompt.text for prompt in task.prompts}) == 10


def test_a_jsonl_of_prompts_keeps_ids_categories_and_conversations(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "A joke?"},
        {"role": "assistant", "content": "left out"},
    ]
    path = rows(
        tmp_path / "mine.jsonl",
        {"prompt": "One\u2028line", "id": 7, "category": "c", "paraphrases": ["1"]},
        {"messages": chat},
    )
    first, second = load_task(str(path)).prompts
    assert (first.id, first.category, first.text) == ("7", "c", "One\u2028line")
    assert first.paraphrases == ("1",)
    assert [m["content"] for m in second.messages] == ["Hello", "Hi", "A joke?"]
    assert second.id == "2" and second.category is None


def test_a_row_whose_id_is_null_has_its_number_as_id(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"id": null, "prompt": "a"}\n{"id": null, "prompt": "b"}\n', encoding="utf-8")
    assert [prompt.id for prompt in load_task(str(path)).prompts] == ["1", "2"]


def test_a_text_file_has_a_prompt_on_each_line(tmp_path: Path) -> None:
    path = tmp_path / "ideas.txt"
    path.write_text("\ufeffFirst\n\n  Second \n", encoding="utf-8")
    task = load_task(str(path))
    assert task.name == "ideas"
    assert [(p.id, p.text) for p in task.prompts] == [("1", "First"), ("3", "Second")]


def test_a_table_has_a_prompt_in_each_row(tmp_path: Path) -> None:
    path = tmp_path / "ideas.csv"
    path.write_text('id,prompt\na,First\nb,"Second\nline"\n', encoding="utf-8")
    table = tmp_path / "ideas.parquet"
    pandas.read_csv(path).to_parquet(table)
    for file in (path, table):
        prompts = load_task(str(file)).prompts
        assert [(p.id, p.text) for p in prompts] == [("a", "First"), ("b", "Second\nline")]
        assert read_prompts(file) == ["First", "Second\nline"]
    with pytest.raises(BacoError, match="cannot read"):
        load_task(f"gsm8k={tmp_path / 'none.csv'}")


def test_a_prompt_of_a_text_file_may_hold_any_line_separator_of_unicode(tmp_path: Path) -> None:
    path = tmp_path / "ideas.txt"
    path.write_text("\ufeffOne\u2028line\nSecond\n", encoding="utf-8")
    assert read_prompts(path) == ["One\u2028line", "Second"]
    assert [prompt.text for prompt in load_task(str(path)).prompts] == read_prompts(path)


def test_limit_takes_the_first_prompts() -> None:
    assert load_task("demo", 3).prompts == load_task("demo").prompts[:3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompt"),
        ("\n \n", "holds no prompt"),
        ("not json\n", "line 1: give a JSON object"),
        ('{"prompt": "a"}\n{"promt": "b"}\n', "line 2: give a JSON object"),
        ('{"prompt": " "}\n', "line 1: the prompt is empty"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}\n', "'1' comes twice"),
        ('{"messages": []}\n', "line 1: 'messages' has no message of role 'user'"),
        ('{"prompt": "a", "paraphrases": "b"}\n', "not a list of texts"),
        ('{"prompt": "a", "paraphrases": 5}\n', "not a list of texts"),
        ('{"prompt": "\\ud800"}\n', "half a surrogate pair"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BacoError, match=message) as refused:
        load_task(str(path))
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.json", b"3", "a JSON object of prompts by id, or a list"),
        ("bad.json", b'{"prompt": ', "is not JSON"),
        ("bad.json", b'["a"]', "entry 1: give a JSON object"),
        ("bad.txt", b"\xff\xfe\x00", "not valid UTF-8"),
    ],
)
def test_a_file_in_another_format_is_refused_too(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BacoError, match=message):
        load_task(str(tmp_path / name))


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(BacoError, match="unknown task 'gms8k': use gsm8k"):
        load_task("gms8k")
    with pytest.raises(BacoError, match="limit is 0"):
        load_task("demo", 0)
    with pytest.raises(BacoError, match="cannot read"):
        load_task("gsm8k=/nowhere.jsonl")


def test_without_the_hub_the_error_names_the_tasks_data() -> None:
    with pytest.raises(BacoError, match="narrative-discourse=PATH"):
        load_task("narrative-discourse")


def test_an_unreachable_hub_names_the_way_round_it() -> None:
    with pytest.raises(BacoError, match=r"cannot be read .*gsm8k=PATH") as refused:
        load_task("gsm8k")
    assert "\n" not in str(refused.value)


def test_noveltybench_rows_bring_their_paraphrases(tmp_path: Path) -> None:
    row = {"id": "curated-0", "category": "Creativity", "prompt": "Tell me a story."}
    path = rows(tmp_path / "c.jsonl", row | {"prompt_paraphrases": ["Narrate.", "A story, please"]})
    (prompt,) = load_task(f"noveltybench-curated={path}").prompts
    assert prompt.category == "Creativity" and prompt.paraphrases == ("Narrate.", "A story, please")


def test_wildchat_takes_dialogues_up_to_their_last_question(tmp_path: Path) -> None:
    turns = [{"role": r, "content": r, "toxic": False} for r in ("user", "assistant") * 2]
    path = rows(
        tmp_path / "w.jsonl",
        {"conversation_hash": "short", "conversation": turns[:2]},
        {"conversation_hash": "long", "conversation": turns, "turn": 2},
    )
    (prompt,) = load_task(f"wildchat={path}").prompts
    assert prompt.id == "long" and prompt.category == "2"
    assert [m["role"] for m in prompt.messages] == ["user", "assistant", "user"]


def test_narratives_begin_with_their_first_sentence(tmp_path: Path) -> None:
    path = tmp_path / "narratives.json"
    path.write_text(json.dumps({"film": {"synopsis": ["It rains.", "It stops."]}}), "utf-8")
    (prompt,) = load_task(f"narrative-discourse={path}").prompts
    assert prompt.id == "film" and prompt.text.endswith("It rains.")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("He has 3 + 4 = 7 apples.\n#### 1,234", True),
        ("so $1,234.00 in all.", True),
        ("#### 1234 \n\nQuestion", True),
        ("The answer is 1234, not 99.", False),
        ("#### -1234", False),
        ("no idea", False),
        ("", False),
    ],
)
def test_gsm8k_reads_the_final_number(tmp_path: Path, answer: str, right: bool) -> None:
    path = rows(tmp_path / "g.jsonl", {"question": "How many?", "answer": "x <<1>>\n#### 1234"})
    task = load_task(f"gsm8k={path}")
    assert task.verifier == "gsm8k"
    assert VERIFIERS["gsm8k"](task.prompts[0], answer) is right


def test_ifeval_wants_every_instruction_kept(tmp_path: Path) -> None:
    pytest.importorskip("langdetect")
    row = {
        "key": 1000,
        "prompt": "Write in lower case, without commas.",
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
        "kwargs": [{"num_highlights": None}, {"num_highlights": None}],
    }
    task = load_task(f"ifeval={rows(tmp_path / 'i.jsonl', row)}")
    shares = accuracy("ifeval").score(
        task.prompts, [["<<a title>> and text", "<<a title>>, text", "no title", ""]]
    )
    assert shares == [0.25]


def test_ifeval_names_the_package_that_counting_words_needs(tmp_path: Path) -> None:
    nltk = pytest.importorskip("nltk")
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        pass
    else:
        pytest.skip("the sentence model is here")
    reference = {
        "instruction_id_list": ["length_constraints:number_sentences"],
        "kwargs": [{"num_sentences": 2, "relation": "at least"}],
    }
    prompt = Prompt("1", ({"role": "user", "content": "x"},), reference=reference)
    with pytest.raises(MetricUnavailable, match="punkt_tab"):
        VERIFIERS["ifeval"](prompt, "One. Two.")


def test_rows_without_the_fields_of_the_verifier_are_refused(tmp_path: Path) -> None:
    path = rows(tmp_path / "g.jsonl", {"question": "How many?"})
    with pytest.raises(BacoError, match="'answer' is missing"):
        load_task(f"gsm8k={path}")


def test_demo_accuracy_is_the_share_of_faultless_answers() -> None:
    task = load_task("demo-facts", 20)
    prompt = next(p for p in task.prompts if p.category == "capital")
    family = families()["capital"]
    land = prompt.reference["slots"][family.slot]
    right = family.options["city"][land][0]
    wrong = next(city for city in family.pool("city") if city != right)
    answers = [f"The capital of {land} is {city}." for city in (right, wrong)]
    assert accuracy("demo").score([prompt, prompt], [[*answers, right, ""], []]) == [0.25, None]


def test_the_number_that_is_marked_as_the_answer_counts_not_the_last_one() -> None:
    prompt = Prompt("p", ({"role": "user", "content": "?"},), None, {"answer": "2 + 3 = 5\n#### 5"})
    assert VERIFIERS["gsm8k"](prompt, "So it is #### 5 in all, not 7")
    assert not VERIFIERS["gsm8k"](prompt, "#### 7, that is 2 more than 5")
