"""Verifiers: whether an answer is right, for tasks where accuracy must not fall."""

import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

from baco.evaluation.metrics import Metric, MetricUnavailable
from baco.evaluation.metrics.demo import judged
from baco.evaluation.metrics.protocols import Answers, Prompts
from baco.evaluation.metrics.registry import Figure
from baco.evaluation.records import Prompt

Verifier = Callable[[Prompt, str], bool]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def gsm8k(prompt: Prompt, answer: str) -> bool:
    """Whether the final number is the reference's: after the last ``####``, else the last one.

    Cobbe et al. 2021 (arXiv 2110.14168): exact match of the number after ``####``; the
    last number counts for models that were not trained on that form.
    """
    expected = _final_number(str(prompt.reference["answer"]))
    return expected is not None and _final_number(answer) == expected


def _final_number(text: str) -> float | None:
    marked = text.rpartition("####")[2] if "####" in text else ""
    match = _NUMBER.search(marked) if marked else None
    number = match.group() if match else next(iter(_NUMBER.findall(text)[::-1]), None)
    return None if number is None else float(number.replace(",", ""))


def ifeval(prompt: Prompt, answer: str) -> bool:
    """Whether all instructions of the prompt are kept, strictly (Zhou et al. 2023, as in lm-eval).

    Raises:
        MetricUnavailable: lm-eval's IFEval or the sentence model it counts with is missing.
    """
    utils = _lm_eval()
    example = utils.InputExample(
        key=0,
        instruction_id_list=list(prompt.reference["instruction_id_list"]),
        prompt=prompt.text,
        kwargs=[dict(kwargs) for kwargs in prompt.reference["kwargs"]],
    )
    try:
        return bool(
            utils.test_instruction_following_strict(example, answer).follow_all_instructions
        )
    except LookupError as error:
        raise MetricUnavailable(
            "accuracy on ifeval counts sentences with nltk's model punkt_tab: fetch it once with "
            "python -m nltk.downloader punkt_tab"
        ) from error


@cache
def _lm_eval() -> Any:
    try:
        from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        raise MetricUnavailable(
            "accuracy on ifeval needs lm-eval[ifeval]: pip install 'baco[evaluation]'"
        ) from error
    return utils


def demo(prompt: Prompt, answer: str) -> bool:
    """Whether the demo world's judge finds no fault."""
    return judged(prompt, answer).quality == 1.0


VERIFIERS: Mapping[str, Verifier] = {"gsm8k": gsm8k, "ifeval": ifeval, "demo": demo}


def accuracy(verifier: str) -> Metric:
    """The metric of a verifier: the share of right answers to each prompt, None without answers.

    Raises:
        MetricUnavailable: a library that the verifier needs is not installed.
    """
    verify = VERIFIERS[verifier]
    made_by = {"verifier": verifier, "baco": version("baco")}
    if verifier == "ifeval":
        _lm_eval()
        made_by["lm-eval"] = version("lm-eval")

    def share_right(prompts: Prompts, answers: Answers) -> list[float | None]:
        return [
            sum(verify(prompt, text) for text in row) / len(row) if row else None
            for prompt, row in zip(prompts, answers, strict=True)
        ]

    return Figure("accuracy", "accuracy", 0, made_by, share_right)
