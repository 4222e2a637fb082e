"""vLLM says what the engine of this process says, token by token and source by source."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from baco import Baco
from baco.backends.vllm.backend import VllmBackend, VllmEngine
from baco.completion import Completion

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


@dataclass
class Watched:
    """What a scheduler did while it was watched."""

    preemptions: int = 0
    hits: int = 0
    drafts: int = 0
    _: Any = field(default=None, repr=False)


def watch(baco: Baco) -> Watched:
    """Count what shows that a mode was really on."""
    assert isinstance(baco.backend, VllmBackend)
    scheduler = baco.backend.llm.engine_core.engine_core.scheduler
    seen = Watched()
    preempt, compute = scheduler._preempt_request, scheduler.kv_cache_manager.get_computed_blocks

    def preempts(*args: Any, **kwargs: Any) -> Any:
        seen.preemptions += 1
        return preempt(*args, **kwargs)

    def computes(request: Any) -> Any:
        found = compute(request)
        seen.hits += found[1] > 0
        return found

    scheduler._preempt_request = preempts
    scheduler.kv_cache_manager.get_computed_blocks = computes
    return seen


def answers(baco: Baco, tokens: int = 48, **settings: Any) -> dict[Any, list[Completion]]:
    """Every router's greedy answers to every prompt, all asked at once."""
    decoder = baco.decoder()
    asked = {}
    for router in ROUTERS:
        for prompt in PROMPTS:
            ticket = decoder.submit(
                prompt,
                router=baco.router(router),
                **{"temperature": 0, "max_tokens": tokens, "seed": 3, "min_p": 0.0} | settings,
            )
            asked[ticket] = (router, prompt)
    found: dict[Any, list[Completion]] = {}
    while decoder.busy:
        for chunk in decoder.step():
            if chunk.completion is not None:
                found.setdefault(asked[chunk.prompt], []).append(chunk.completion)
    assert len(found) == len(asked)
    if isinstance(decoder.engine, VllmEngine):
        found[None] = []
        DRAFTS.append(decoder.engine.stats.accepted)
    return found


DRAFTS: list[int] = []


def said(found: dict[Any, list[Completion]]) -> dict[Any, Any]:
    return {
        asked: [
            (c.token_ids, c.sources, c.text, c.finish_reason)
            for c in sorted(each, key=lambda c: c.sample)
        ]
        for asked, each in found.items()
        if asked is not None
    }


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
    mode: str, template: str | None, vllm: Callable[..., Baco], random_pair: Callable[[str], Path]
) -> None:
    # Five heads cannot be split between two devices.
    pair = str(random_pair("llama")) if mode.startswith("two tensor") else "demo"
    options = {} if template is None else {"base_template": template}
    tokens = 20 if pair != "demo" else 48
    there = vllm(pair, **MODES[mode], **options)
    here = Baco.load(pair, **options)
    seen = Watched() if mode.startswith("two") else watch(there)
    assert said(answers(there, tokens)) == said(answers(here, tokens))
    if "chunked" in mode:
        assert seen.preemptions
    if "ngram" in mode:
        assert DRAFTS[-1]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo2"])
@pytest.mark.parametrize("ngram", [0, 3])
def test_architectures_say_what_they_say_here(
    architecture: str, ngram: int, vllm: Callable[..., Baco], random_pair: Callable[[str], Path]
) -> None:
    folder = str(random_pair(architecture))
    assert said(answers(vllm(folder, ngram=ngram), 24)) == said(answers(Baco.load(folder), 24))


@pytest.mark.parametrize("template", [None, LONG_BASE], ids=["long aligned", "long base"])
def test_prompts_that_are_in_the_cache_change_nothing(
    template: str | None, vllm: Callable[..., Baco]
) -> None:
    options = {} if template is None else {"base_template": template}
    there, here = vllm(**options), Baco.load("demo", **options)
    seen = watch(there)
    first = said(answers(there))
    hits = seen.hits
    assert said(answers(there)) == first == said(answers(here))
    assert seen.hits > hits
    # Samples that part ways share the blocks of their prompt alone.
    drawn = answers(there, n=3, temperature=1.0)
    assert all(len({c.token_ids for c in each}) > 1 for asked, each in drawn.items() if asked)
    assert said(answers(there)) == first


def test_another_base_prompt_is_another_prompt(vllm: Callable[..., Baco]) -> None:
    settings = {"router": "Base", "temperature": 0, "max_tokens": 24}
    prompt = PROMPTS[1]
    plain = "Question: {{ messages[-1].content }}\nAnswer:"
    other = "Xuestion: {{ messages[-1].content }}\nAnswer:"
    there = vllm()
    told = []
    for template in (plain, other):
        here = Baco.load("demo", base_template=template)
        there.pair.renderer = here.pair.renderer
        told.append([b.generate(prompt, **settings)[0].token_ids for b in (there, here)])
    assert all(mine == theirs for mine, theirs in told)


@pytest.mark.parametrize("router", ["P-Punc:0.4", "Aligned"])
def test_penalties_and_bias_say_what_they_say_here(
    router: str, vllm: Callable[..., Baco]
) -> None:
    there, here = vllm(), Baco.load("demo")
    for settings in (
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"logit_bias": ((there.pair.tokenizer.encode(" beach")[0], -50.0),)},
        {"stop": (".",)},
    ):
        asked = {"router": router, "temperature": 0, "max_tokens": 40, "min_p": 0.0} | settings
        mine, theirs = (b.generate(PROMPTS[0], **asked)[0] for b in (there, here))
        assert (mine.text, mine.sources) == (theirs.text, theirs.sources)
