"""vLLM says what the engine of this process says, token by token and source by source."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baco import Baco
from baco.completion import Completion
from tests_vllm.engines import in_vllm, watch

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
# Read by the base half alone: its prompt is then the longer one.
LONG_BASE = (
    "Here is a long and careful list of questions that people asked, and of what they were told. "
    "Question: {{ messages[-1].content }}\nAnswer:{{ answer_lead }}"
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
    """What the answers say, and who says it."""
    found, _ = answers(baco, tokens)
    return {
        asked: [(c.token_ids, c.sources, c.text, c.finish_reason) for c in each]
        for asked, each in found.items()
    }


def said_there(baco: Baco, tokens: int) -> Any:
    """`said`, and what shows that a mode was on."""
    seen = watch(baco)
    _, drafts = answers(baco, tokens)
    return said(baco, tokens), drafts, seen


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


@pytest.mark.parametrize("template", [None, LONG_BASE], ids=["long aligned", "long base"])
@pytest.mark.parametrize("mode", MODES)
def test_every_router_says_what_it_says_here(
    mode: str, template: str | None, random_pair: Callable[[str], Path]
) -> None:
    # Five heads cannot be split between two devices.
    pair = str(random_pair("llama")) if mode == "two tensor-parallel" else "demo"
    options = {} if template is None else {"base_template": template}
    tokens = 48 if pair == "demo" else 20
    told, drafts, seen = in_vllm(said_there, pair, MODES[mode] | options, tokens)
    assert told == said(Baco.load(pair, **options), tokens)
    if "chunked" in mode:
        assert seen.preemptions
    if "ngram" in mode:
        assert drafts


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo2"])
@pytest.mark.parametrize("ngram", [0, 3])
def test_architectures_say_what_they_say_here(
    architecture: str, ngram: int, random_pair: Callable[[str], Path]
) -> None:
    folder = str(random_pair(architecture))
    assert in_vllm(said, folder, {"ngram": ngram}, 24) == said(Baco.load(folder), 24)


def said_again(baco: Baco) -> Any:
    """The same before and after the prompts are in the cache, and after samples parted ways."""
    seen = watch(baco)
    first = said(baco)
    hits = seen.hits
    second = said(baco)
    assert seen.hits > hits
    drawn, _ = answers(baco, 48, n=3, temperature=1.0)
    assert any(len({c.token_ids for c in each}) > 1 for each in drawn.values())
    return first, second, said(baco)


@pytest.mark.parametrize("template", [None, LONG_BASE], ids=["long aligned", "long base"])
def test_prompts_that_are_in_the_cache_change_nothing(template: str | None) -> None:
    options = {} if template is None else {"base_template": template}
    here = said(Baco.load("demo", **options))
    assert all(each == here for each in in_vllm(said_again, "demo", options))


QUESTION = "{}uestion: {{{{ messages[-1].content }}}}\nAnswer:"


def under_two_templates(baco: Baco) -> Any:
    """One aligned prompt, two base prompts of one length."""
    told = []
    for letter in "QX":
        baco.pair.renderer = Baco.load("demo", base_template=QUESTION.format(letter)).pair.renderer
        settings: dict[str, Any] = {"router": "Base", "temperature": 0, "max_tokens": 24}
        told.append(baco.generate(PROMPTS[1], **settings)[0].token_ids)
    return told


def test_another_base_prompt_is_another_prompt() -> None:
    assert in_vllm(under_two_templates, "demo", {}) == under_two_templates(Baco.load("demo"))


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


def test_penalties_and_biases_say_what_they_say_here() -> None:
    assert in_vllm(with_settings, "demo", {}) == with_settings(Baco.load("demo"))
