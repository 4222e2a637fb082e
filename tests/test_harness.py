"""lm-evaluation-harness evaluates a pair like any model, without a network."""

import json
from pathlib import Path
from typing import Any

import pytest

from baco import Baco, as_transformers

lm_eval = pytest.importorskip("lm_eval")

ROUTER = "P-Punc:0.4"
QUESTIONS = ("Recommend a gift.", "What is a good hobby for the summer?")
TOKENS = 24

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
ANSWERS = """\
output_type: generate_until
doc_to_target: "{{{{expected}}}}"
generation_kwargs: {{max_gen_toks: {tokens}, do_sample: false, until: []}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOICES = """\
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def results(demo: Baco, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of both tasks. The expected answer and the first choice are BACo's own answer."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    with data.open("w") as lines:
        for question in QUESTIONS:
            [completion] = demo.generate(question, router=ROUTER, temperature=0, max_tokens=TOKENS)
            text = demo.pair.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            choices = [text, " the a the a the a of of of"]
            lines.write(json.dumps({"question": question, "expected": text, "choices": choices}))
            lines.write("\n")
    for name, task in (("demo_answers", ANSWERS), ("demo_choices", CHOICES)):
        fields = {"name": name, "data": data, "cache": folder / "cache", "tokens": TOKENS}
        (folder / f"{name}.yaml").write_text((TASK + task).format(**fields))
    return evaluate(demo, folder)


def evaluate(demo: Baco, folder: Path) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = as_transformers(demo, ROUTER)
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=demo.pair.tokenizer, batch_size=2),
        tasks=["demo_answers", "demo_choices"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    return results


def test_answers_equal_those_of_baco(results: dict[str, Any]) -> None:
    for sample in results["samples"]["demo_answers"]:
        [[answer]] = sample["resps"]
        assert answer.strip() == sample["doc"]["expected"].strip()
    assert results["results"]["demo_answers"]["exact_match,none"] == pytest.approx(1.0)


def test_choices_are_scored_by_the_routed_distribution(results: dict[str, Any]) -> None:
    for sample in results["samples"]["demo_choices"]:
        [[(own, own_is_greedy)], [(other, other_is_greedy)]] = sample["resps"]
        assert own_is_greedy
        assert not other_is_greedy
        assert own > other
    assert results["results"]["demo_choices"]["acc,none"] == pytest.approx(1.0)
