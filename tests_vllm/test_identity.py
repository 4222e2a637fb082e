"""vLLM and BACo's own engine give the same answers, token by token and source by source."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest

from baco import Baco
from baco.backends.vllm.backend import VllmBackend
from baco.backends.vllm.folder import export_pair, read_pair
from baco.backends.vllm.options import pair_prompt
from baco.models.known_pairs import find_pair
from baco.outputs import Completion
from baco.source import MODELS
from tests.pairs import PairFolder, save_adapter
from tests_vllm.engines import apart, in_vllm, watch

ROUTERS = (
    "Base",
    "Aligned",
    "P:0.5",
    "H:1.0",
    "Gap:0.5",
    "Punc",
    "FC",
    "P-Punc:0.4",
    "P-Punc-FC:0.4",
    "H-FC:1.2",
    "Nudging:0.5",
    "Rand:0.5",
    "Role:number=aligned,name=aligned",
    "P-Punc:0.4,predict=either",
    "Ensemble:0.3",
    "LogitEnsemble:0.6",
    "Contrast:0.5",
)
PROMPTS = (
    "Recommend a summer destination",
    "Tell me about the sea and the mountains, and what I could eat there in the winter " * 3,
    "What should I cook tonight?",
)
# The pair's own, and one for the base model that makes its prompt the longer one.
TEMPLATES = (
    None,
    "Here is a long and careful list of questions that people asked, and of what they were told. "
    "Question: {{ messages[-1].content }}\nAnswer:{{ answer_lead }}",
)

Answers = dict[tuple[str, str], list[Completion]]


def answers(baco: Baco, tokens: int, **settings: Any) -> tuple[Answers, int]:
    """Every router's greedy answers to every prompt, decoded together; and the accepted drafts."""
    decoder = baco.decoder()
    questions = {}
    for router in ROUTERS:
        for prompt in PROMPTS:
            greedy = {"temperature": 0, "max_tokens": tokens, "seed": 3, "min_p": 0.0}
            ticket = decoder.submit(prompt, router=baco.router(router), **greedy | settings)
            questions[ticket] = (router, prompt)
    completions: Answers = {each: [] for each in questions.values()}
    while decoder.busy:
        for chunk in decoder.step():
            if chunk.completion is not None:
                completions[questions[chunk.prompt]].append(chunk.completion)
    return completions, decoder.engine.stats.accepted


def greedy_answers(baco: Baco, tokens: int = 48) -> Any:
    """Greedy answers and their sources under each template, so that each prompt is once longer."""
    return [_with_template(baco, template, tokens)[0] for template in TEMPLATES]


def watched_answers(baco: Baco, tokens: int) -> Any:
    """`greedy_answers`, and for each template the accepted drafts and preemptions, which show that
    a mode was on.
    """
    seen, texts, activity = watch(baco), [], []
    for template in TEMPLATES:
        before = seen.preemptions
        each, drafts = _with_template(baco, template, tokens)
        texts.append(each)
        activity.append((drafts, seen.preemptions - before))
    return texts, activity


def _with_template(baco: Baco, template: str | None, tokens: int) -> Any:
    with read_by(baco, template):
        completions, drafts = answers(baco, tokens)
    return {
        question: [(c.token_ids, c.sources, c.text, c.finish_reason) for c in samples]
        for question, samples in completions.items()
    }, drafts


@contextmanager
def read_by(baco: Baco, template: str | None) -> Iterator[None]:
    """Give the base model another template."""
    own = baco.pair.renderer
    if template is not None:
        baco.pair.renderer = replace(own, base_template=template)
    yield
    baco.pair.renderer = own


MODES: dict[str, dict[str, Any]] = {
    "plain": {"engine": {"async_scheduling": False, "enable_prefix_caching": False}},
    "async": {"engine": {"async_scheduling": True}},
    "chunked": {"engine": {"max_num_batched_tokens": 40, "num_gpu_blocks_override": 40}},
    "ngram": {"ngram": 4},
    "ngram, chunked": {
        "ngram": 3,
        "engine": {"max_num_batched_tokens": 160, "num_gpu_blocks_override": 40},
    },
    "two tensor-parallel": {"tensor_parallel": 2},
    "two pipeline stages": {"pipeline_parallel": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_router_gives_the_answers_of_this_process(
    mode: str, random_pair: Callable[[str], Path]
) -> None:
    # Five heads cannot be split between two devices.
    pair = str(random_pair("llama")) if mode == "two tensor-parallel" else "demo"
    tokens = 48 if pair == "demo" else 20
    answered, activity = in_vllm(watched_answers, pair, MODES[mode], tokens)
    assert answered == greedy_answers(Baco.load(pair), tokens)
    drafts, preemptions = (sum(counts) for counts in zip(*activity, strict=True))
    assert drafts or "ngram" not in mode
    assert preemptions or "chunked" not in mode


QUICK = ("plain", "ngram, chunked")


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo2", "gemma2", "mistral"])
@pytest.mark.parametrize(
    "mode",
    [mode if mode in QUICK else pytest.param(mode, marks=pytest.mark.slow) for mode in MODES],
)
def test_every_architecture_gives_the_answers_of_this_process(
    architecture: str, mode: str, random_pair: Callable[[str], Path]
) -> None:
    folder = str(random_pair(architecture))
    assert in_vllm(greedy_answers, folder, MODES[mode], 24) == greedy_answers(Baco.load(folder), 24)


def answers_and_sharing(baco: Baco, tokens: int) -> tuple[Any, list[bool]]:
    """Greedy answers, and whether one model reads both prompts in each worker."""
    assert isinstance(baco.backend, VllmBackend)
    return greedy_answers(baco, tokens), baco.backend.llm.collective_rpc(_holds_one_model)


def _holds_one_model(worker: Any) -> bool:
    model = worker.get_model()
    return model.base is model.aligned


ADAPTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "every layer": {"r": 4},
    "some layers, rank-stabilised": {
        "r": 2,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "gate_proj", "o_proj"],
    },
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    ("architecture", "mode"),
    [
        ("llama", "plain"),
        ("llama", "ngram, chunked"),
        ("llama", "two tensor-parallel"),
        ("qwen3", "two pipeline stages"),
    ],
)
def test_weights_of_one_model_are_held_once_and_give_the_answers_of_this_process(
    adapter: str,
    architecture: str,
    mode: str,
    random_pair: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = PairFolder(*(random_pair(architecture) / source for source in MODELS))
    models = {"base": str(folder.aligned), "aligned": str(folder.aligned)}
    if adapter != "none":
        models = save_adapter(folder, tmp_path, **ADAPTERS[adapter])
    here = Baco.load(**models, dtype="float32")
    options: dict[str, Any] = models | {"dtype": "float32"} | MODES[mode]
    answered, shared = in_vllm(answers_and_sharing, None, options, 20)
    assert answered == greedy_answers(here, 20)
    assert all(shared)


def repeated_answers(baco: Baco) -> Any:
    """Greedy answers before and after the prompts are in the cache, and after diverging samples;
    and `under_two_templates`.
    """
    seen = watch(baco)
    first = greedy_answers(baco)
    hits = seen.hits
    second = greedy_answers(baco)
    assert seen.hits > hits
    for template in TEMPLATES:
        with read_by(baco, template):
            drawn, _ = answers(baco, 48, n=3, temperature=1.0)
        assert any(len({c.token_ids for c in each}) > 1 for each in drawn.values())
    return [first, second, greedy_answers(baco)], under_two_templates(baco)


def under_two_templates(baco: Baco) -> Any:
    """Tokens for one aligned prompt with two base prompts of equal length."""
    tokens = []
    for letter in "QX":
        with read_by(baco, f"{letter}uestion: {{{{ messages[-1].content }}}}\nAnswer:"):
            settings: dict[str, Any] = {"router": "Base", "temperature": 0, "max_tokens": 24}
            tokens.append(baco.generate(PROMPTS[1], **settings)[0].token_ids)
    return tokens


def test_prompts_in_the_prefix_cache_do_not_change_answers() -> None:
    rounds, two_templates = in_vllm(repeated_answers, "demo", {})
    here = Baco.load("demo")
    expected = greedy_answers(here)
    assert all(answered == expected for answered in rounds)
    assert two_templates == under_two_templates(here)


def tokens_of_clients(baco: Baco) -> list[tuple[bool, bool]]:
    """Of two prompts that begin alike for one model and are the same for the other: do the greedy
    answers differ, and are they the same decoded together as each under a salt of its own?
    """
    assert isinstance(baco.backend, VllmBackend)
    from vllm import SamplingParams

    llm, number = baco.backend.llm, count()

    def answered(router: str, requests: Any) -> list[Any]:
        names = []
        for ids, arguments, salt in requests:
            names.append(f"client {next(number)}")
            given = arguments | {"baco_router": router}
            params = SamplingParams(temperature=0, max_tokens=24, extra_args=given)
            llm.add_request(names[-1], {"prompt_token_ids": ids, "cache_salt": salt}, params)
        outputs = {}
        while len(outputs) < len(names):
            ended = [output for output in llm.step() if output.finished]
            outputs |= {output.request_id: output.outputs[0].token_ids for output in ended}
        return [outputs[name] for name in names]

    draw = Random(1)
    long, begin, *ends = (draw.choices(range(5, 250), k=k) for k in (110, 40, 40, 40))
    bases = [pair_prompt(begin + end, long) for end in ends]
    # The base prompt is longer, so the aligned model lags behind vLLM's blocks.
    aligned = [pair_prompt(long, begin + end) for end in ends]
    found = []
    for router, prompts in (("Base", bases), ("Aligned", aligned)):
        alone = [answered(router, [(*p, f"{router} {at}")])[0] for at, p in enumerate(prompts)]
        together = answered(router, [(*prompt, None) for prompt in prompts])
        found.append((alone[0] != alone[1], alone == together))
    return found


def test_requests_share_no_blocks_in_which_their_prompts_differ(
    random_pair: Callable[[str], Path],
) -> None:
    options = {"engine": {"async_scheduling": False}}
    found = in_vllm(tokens_of_clients, str(random_pair("llama")), options)
    assert found == [(True, True), (True, True)]


def with_settings(baco: Baco) -> Any:
    """Answers under penalties, biases and stop strings."""
    beach = baco.pair.tokenizer.encode(" beach")[0]
    answered = []
    for router in ("P-Punc:0.4", "Aligned"):
        for settings in (
            {"presence_penalty": 1.5, "frequency_penalty": 0.5},
            {"logit_bias": ((beach, -50.0),)},
            {"stop": (".",)},
        ):
            greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "min_p": 0.0}
            answer = baco.generate(PROMPTS[0], router=router, **greedy | settings)[0]
            answered.append((answer.text, answer.sources))
    return answered


STRUCTURES: dict[str, dict[str, Any]] = {
    "schema": {
        "schema": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "maxLength": 24},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
                "kind": {"enum": ["beach", "city"]},
            },
            "required": ["place", "days", "kind"],
            "additionalProperties": False,
        }
    },
    "regex": {"regex": "[A-Z][a-z]+, [0-9]+ days"},
    "choice": {"choice": ("Lisbon", "Rome", "Lima")},
    "grammar": {"grammar": 'root ::= "go " ("on" | "home")'},
    "none": {},
}


def structured_answers(baco: Baco) -> Any:
    """Greedy answers of different structures, decoded together."""
    decoder = baco.decoder()
    questions, answered = {}, {}
    greedy = {"temperature": 0, "max_tokens": 60, "seed": 3, "min_p": 0.0}
    for router in ("Base", "Aligned", "P:0.5", "P-Punc:0.4", "H:1.0", "Rand:0.5", "Ensemble:0.3"):
        for kind, structure in STRUCTURES.items():
            for prompt in PROMPTS:
                params = baco.pair.defaults.updated(greedy | structure)
                ticket = decoder.submit(prompt, params, router=baco.router(router))
                questions[ticket] = (router, kind, prompt)
    while decoder.busy:
        for chunk in decoder.step():
            if (c := chunk.completion) is not None:
                answered[questions[chunk.prompt]] = (c.text, c.sources, c.finish_reason, c.error)
    return answered


@pytest.mark.parametrize(
    "mode",
    [
        mode if mode in ("async", "ngram, chunked") else pytest.param(mode, marks=pytest.mark.slow)
        for mode in MODES
        if mode != "two tensor-parallel"  # the demo pair's heads cannot be split
    ],
)
def test_structured_answers_are_those_of_this_process(mode: str) -> None:
    here = structured_answers(Baco.load("demo"))
    assert in_vllm(structured_answers, "demo", MODES[mode]) == here
    for (_, kind, _), (text, _, reason, _) in here.items():
        if kind == "schema" and reason == "stop":
            assert list(json.loads(text)) == ["place", "days", "kind"]


def offline(folder: str) -> tuple[str, str]:
    """The answer of vLLM's own class for a pair directory, and its sources."""
    pair = read_pair(Path(folder))
    read = pair.renderer.render(PROMPTS[0])
    ids, arguments = pair_prompt(read.base_ids, read.aligned_ids, read.digest)
    # Else vLLM's own process would outlive this one.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=40, extra_args=arguments | {"baco_router": "P-Punc:0.4"}
    )
    llm = LLM(folder, dtype="float32", kv_cache_memory_bytes=2**26)
    (answer,) = llm.generate([{"prompt_token_ids": ids}], params)
    return answer.outputs[0].text, answer.kv_transfer_params["baco_sources"]


def test_vllms_own_class_gives_the_answers_of_this_process(tmp_path: Path) -> None:
    export_pair(find_pair("demo"), tmp_path / "pair")
    text, sources = apart(offline, str(tmp_path / "pair"))
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "min_p": 0.0}
    here = Baco.load("demo").generate(PROMPTS[0], router="P-Punc:0.4", **greedy)[0]
    assert text.strip() == here.text.strip()
    assert sources == "".join(source[0] for source in here.sources)


def test_penalties_and_biases_give_the_answers_of_this_process() -> None:
    options = {"base_template": TEMPLATES[1]}
    assert in_vllm(with_settings, "demo", options) == with_settings(Baco.load("demo", **options))
