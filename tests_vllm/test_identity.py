"""vLLM says what the engine of this process says, token by token and source by source."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baco import Baco
from baco.backends.vllm.folder import export_pair, read_pair
from baco.backends.vllm.options import pair_prompt
from baco.models.known_pairs import find_pair
from baco.outputs import Completion
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
)
PROMPTS = (
    "Recommend a summer destination",
    "Tell me about the sea and the mountains, and what I could eat there in the winter " * 3,
    "What should I cook tonight?",
)
# The pair's own, and one that the base half alone reads: its prompt is then the longer one.
TEMPLATES = (
    None,
    "Here is a long and careful list of questions that people asked, and of what they were told. "
    "Question: {{ messages[-1].content }}\nAnswer:{{ answer_lead }}",
)

Answers = dict[tuple[str, str], list[Completion]]


def answers(baco: Baco, tokens: int, **settings: Any) -> tuple[Answers, int]:
    """Every router's greedy answers to every prompt, asked at once, and the drafts that stood."""
    decoder = baco.decoder()
    asked = {}
    for router in ROUTERS:
        for prompt in PROMPTS:
            greedy = {"temperature": 0, "max_tokens": tokens, "seed": 3, "min_p": 0.0}
            ticket = decoder.submit(prompt, router=baco.router(router), **greedy | settings)
            asked[ticket] = (router, prompt)
    found: Answers = {each: [] for each in asked.values()}
    while decoder.busy:
        for chunk in decoder.step():
            if chunk.completion is not None:
                found[asked[chunk.prompt]].append(chunk.completion)
    return found, decoder.engine.stats.accepted


def said(baco: Baco, tokens: int = 48) -> Any:
    """What the answers say and who says it, with either half's prompt the longer one."""
    return [_said(baco, template, tokens)[0] for template in TEMPLATES]


def said_there(baco: Baco, tokens: int) -> Any:
    """`said`, and for both what shows that a mode was on: drafts that stood, preemptions."""
    seen, told, shown = watch(baco), [], []
    for template in TEMPLATES:
        before = seen.preemptions
        each, drafts = _said(baco, template, tokens)
        told.append(each)
        shown.append((drafts, seen.preemptions - before))
    return told, shown


def _said(baco: Baco, template: str | None, tokens: int) -> Any:
    with read_by(baco, template):
        found, drafts = answers(baco, tokens)
    return {
        asked: [(c.token_ids, c.sources, c.text, c.finish_reason) for c in each]
        for asked, each in found.items()
    }, drafts


@contextmanager
def read_by(baco: Baco, template: str | None) -> Iterator[None]:
    """Have the base half read prompts by another template."""
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
def test_every_router_says_what_it_says_here(mode: str, random_pair: Callable[[str], Path]) -> None:
    # Five heads cannot be split between two devices.
    pair = str(random_pair("llama")) if mode == "two tensor-parallel" else "demo"
    tokens = 48 if pair == "demo" else 20
    told, shown = in_vllm(said_there, pair, MODES[mode], tokens)
    assert told == said(Baco.load(pair), tokens)
    for drafts, preemptions in shown:
        assert drafts or "ngram" not in mode
        assert preemptions or "chunked" not in mode


QUICK = ("plain", "ngram, chunked")


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo2"])
@pytest.mark.parametrize(
    "mode",
    [mode if mode in QUICK else pytest.param(mode, marks=pytest.mark.slow) for mode in MODES],
)
def test_architectures_say_what_they_say_here(
    architecture: str, mode: str, random_pair: Callable[[str], Path]
) -> None:
    folder = str(random_pair(architecture))
    assert in_vllm(said, folder, MODES[mode], 24) == said(Baco.load(folder), 24)


def said_again(baco: Baco) -> Any:
    """The same before and after the prompts are in the cache, and after samples parted ways; and
    of one aligned prompt with two base prompts of one length.
    """
    seen = watch(baco)
    first = said(baco)
    hits = seen.hits
    second = said(baco)
    assert seen.hits > hits
    for template in TEMPLATES:
        with read_by(baco, template):
            drawn, _ = answers(baco, 48, n=3, temperature=1.0)
        assert any(len({c.token_ids for c in each}) > 1 for each in drawn.values())
    return [first, second, said(baco)], under_two_templates(baco)


def under_two_templates(baco: Baco) -> Any:
    """One aligned prompt, two base prompts of one length."""
    told = []
    for letter in "QX":
        with read_by(baco, f"{letter}uestion: {{{{ messages[-1].content }}}}\nAnswer:"):
            settings: dict[str, Any] = {"router": "Base", "temperature": 0, "max_tokens": 24}
            told.append(baco.generate(PROMPTS[1], **settings)[0].token_ids)
    return told


def test_prompts_that_are_in_the_cache_change_nothing() -> None:
    told, parted = in_vllm(said_again, "demo", {})
    here = Baco.load("demo")
    expected = said(here)
    assert all(each == expected for each in told)
    assert parted == under_two_templates(here)


def with_settings(baco: Baco) -> Any:
    """Answers under penalties, biases and stop strings."""
    beach = baco.pair.tokenizer.encode(" beach")[0]
    told = []
    for router in ("P-Punc:0.4", "Aligned"):
        for settings in (
            {"presence_penalty": 1.5, "frequency_penalty": 0.5},
            {"logit_bias": ((beach, -50.0),)},
            {"stop": (".",)},
        ):
            greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "min_p": 0.0}
            answer = baco.generate(PROMPTS[0], router=router, **greedy | settings)[0]
            told.append((answer.text, answer.sources))
    return told


def offline(folder: str) -> tuple[str, str]:
    """What vLLM's own class says of a pair directory, and by whom."""
    pair = read_pair(Path(folder))
    read = pair.renderer.render(PROMPTS[0])
    ids, arguments, salt = pair_prompt(read.base_ids, read.aligned_ids, read.digest)
    # Else vLLM's own process would outlive this one.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=40, extra_args=arguments | {"baco_router": "P-Punc:0.4"}
    )
    llm = LLM(folder, dtype="float32", kv_cache_memory_bytes=2**26)
    (answer,) = llm.generate([{"prompt_token_ids": ids, "cache_salt": salt}], params)
    return answer.outputs[0].text, answer.kv_transfer_params["baco_sources"]


def test_the_class_of_vllm_says_what_is_said_here(tmp_path: Path) -> None:
    export_pair(find_pair("demo"), tmp_path / "pair")
    text, sources = apart(offline, str(tmp_path / "pair"))
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "min_p": 0.0}
    here = Baco.load("demo").generate(PROMPTS[0], router="P-Punc:0.4", **greedy)[0]
    assert text.strip() == here.text.strip()
    assert sources == "".join(source[0] for source in here.sources)


def test_penalties_and_biases_say_what_they_say_here() -> None:
    options = {"base_template": TEMPLATES[1]}
    assert in_vllm(with_settings, "demo", options) == with_settings(Baco.load("demo", **options))
