"""The decoder agrees with a naive two-model loop and with `transformers`, and is replayable."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from baco import Baco, Completion, SamplingParams
from baco.engine.sequence import Request
from baco.errors import BacoError
from baco.routing.router import Router
from baco.text.prompts import Prompt
from baco.text.vocabulary import Role
from tests import naive_decoding as naive
from tests.fuzzing import budget
from tests.live import needed
from tests.pairs import ARCHITECTURES, PairFolder

PROMPTS = [
    "What do you recommend for a rainy day?",
    "Plan a walk.",
    "Where should I go this summer, when the sea is warm and I have only little time?",
]


def in_role(pair: Any, row: torch.Tensor, *roles: Role) -> bool:
    return int(pair.vocabulary.role[int(row.argmax())]) in [int(role) for role in roles]


def rules(pair: Any) -> dict[str, Callable[[torch.Tensor, torch.Tensor, float], bool]]:
    """Every router's rule, written from the design's table, by its spelling."""
    p, h = naive.max_probability, naive.entropy

    def mark(row: torch.Tensor) -> bool:
        return in_role(pair, row, Role.PUNCTUATION, Role.FORMAT)

    def function(row: torch.Tensor) -> bool:
        return in_role(pair, row, Role.FUNCTION)

    return {
        "P:0.5": lambda b, a, c: p(b) < 0.5,
        "H:1.5": lambda b, a, c: h(b) > 1.5,
        "Gap:0.02": lambda b, a, c: h(b) - h(a) > 0.02,
        "Punc": lambda b, a, c: not mark(b),
        "FC": lambda b, a, c: not function(b),
        "Role:content=aligned,opinion=base": lambda b, a, c: not in_role(pair, b, Role.CONTENT),
        "P-Punc:0.6": lambda b, a, c: not mark(b) and p(b) < 0.6,
        "P-Punc:0.6,predict=either": lambda b, a, c: not mark(b) and not mark(a) and p(b) < 0.6,
        "H-Punc:1": lambda b, a, c: not mark(b) and h(b) > 1,
        "P-FC:0.6": lambda b, a, c: not function(b) and p(b) < 0.6,
        "H-FC:1": lambda b, a, c: not function(b) and h(b) > 1,
        "P-Punc-FC:0.7": lambda b, a, c: not mark(b) and not function(b) and p(b) < 0.7,
        "Rand:0.5": lambda b, a, c: c < 0.5,
        "Nudging:0.5": lambda b, a, c: p(b) >= 0.5,
        "Base": lambda b, a, c: True,
        "Aligned": lambda b, a, c: False,
    }


@pytest.fixture(scope="module")
def pairs(loaded_pair: Callable[..., Baco]) -> Callable[[str], Baco]:
    return partial(loaded_pair, noise=0.3)


@pytest.fixture(scope="module")
def llama(pairs: Callable[[str], Baco]) -> Baco:
    return pairs("llama")


def request_of(prompt: Prompt, params: SamplingParams, router: Router) -> Request:
    return Request(prompt.base_ids, prompt.aligned_ids, params, router, digest=prompt.digest)


def tokens_and_sources(completion: Completion) -> tuple[list[int], list[str]]:
    return list(completion.token_ids), list(map(str, completion.sources))


def reference(baco: Baco, prompt: str, rule: Any, **settings: Any) -> tuple[list[int], list[str]]:
    rendered = baco.pair.renderer.render(prompt)
    digest = naive.chat_digest([{"role": "user", "content": prompt}])
    return naive.decode(
        baco.pair, rendered.base_ids, rendered.aligned_ids, rule, digest=digest, **settings
    )


def without_turn_cut(baco: Baco) -> Baco:
    """The naive loop knows no text, so the opening of a next turn must not end answers."""
    renderer = replace(baco.pair.renderer)
    renderer.turn_opening = None
    return replace(baco, pair=replace(baco.pair, renderer=renderer))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_naive_two_model_loop_gives_the_same_tokens_and_sources(
    pairs: Callable[[str], Baco], architecture: str
) -> None:
    baco = without_turn_cut(pairs(architecture))
    sources: set[str] = set()
    for spelling, rule in rules(baco.pair).items():
        for temperature in (0.0, 1.0):
            answers = baco.generate_batch(
                PROMPTS, router=spelling, n=2, seed=7, temperature=temperature, max_tokens=12
            )
            for prompt, samples in zip(PROMPTS, answers, strict=True):
                for completion in samples[1:]:
                    expected = reference(
                        baco,
                        prompt,
                        rule,
                        seed=7,
                        sample=completion.sample,
                        temperature=temperature,
                        max_tokens=12,
                    )
                    assert tokens_and_sources(completion) == expected, (spelling, temperature)
                    sources |= set(map(str, completion.sources))
    assert sources == {"base", "aligned"}


def test_switching_inside_words_is_the_same_loop_without_boundaries(llama: Baco) -> None:
    baco = without_turn_cut(llama)
    [completion] = baco.generate(PROMPTS[0], router="P:0.5", switch="token", seed=3, max_tokens=20)
    assert tokens_and_sources(completion) == reference(
        baco,
        PROMPTS[0],
        rules(baco.pair)["P:0.5"],
        seed=3,
        sample=0,
        temperature=1.0,
        max_tokens=20,
        whole_words=False,
    )


def test_the_demo_pair_decodes_as_the_naive_loop_does(demo: Baco) -> None:
    baco = without_turn_cut(demo)
    prompt = "Recommend a summer destination"
    for spelling in ("P-Punc:0.4", "P-FC:0.5", "Rand:0.5", "Nudging:0.4"):
        for completion in baco.generate(prompt, router=spelling, n=2, seed=11, max_tokens=24):
            assert tokens_and_sources(completion) == reference(
                baco,
                prompt,
                rules(baco.pair)[spelling]
                if spelling in rules(baco.pair)
                else _demo_rule(baco, spelling),
                seed=11,
                sample=completion.sample,
                temperature=1.0,
                min_p=baco.pair.defaults.min_p,
                max_tokens=24,
            )


def _demo_rule(baco: Baco, spelling: str) -> Any:
    p = naive.max_probability
    return {
        "P-Punc:0.4": lambda b, a, c: (
            not in_role(baco.pair, b, Role.PUNCTUATION, Role.FORMAT) and p(b) < 0.4
        ),
        "P-FC:0.5": lambda b, a, c: not in_role(baco.pair, b, Role.FUNCTION) and p(b) < 0.5,
        "Nudging:0.4": lambda b, a, c: p(b) >= 0.4,
    }[spelling]


def words(baco: Baco, completion: Completion) -> Iterator[list[str]]:
    """The sources of every word. A word begins at a word start, or after a word's end."""
    vocabulary, word = baco.pair.vocabulary, list[str]()
    previous = None
    for token, source in zip(completion.token_ids, completion.sources, strict=True):
        begins = vocabulary.word_start[token] or (
            previous is not None and vocabulary.ends_word[previous]
        )
        if begins and word:
            yield word
            word = []
        word.append(str(source))
        previous = token
    yield word


@settings(max_examples=budget(15))
@given(
    spelling=st.sampled_from(["P:0.5", "H:1.5", "Rand:0.5", "P-Punc:0.7", "Gap:0", "Nudging:0.5"]),
    seed=st.integers(0, 2**40),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
)
def test_every_word_has_one_source(
    llama: Baco, spelling: str, seed: int, temperature: float
) -> None:
    answers = llama.generate(
        PROMPTS[0], router=spelling, n=4, seed=seed, temperature=temperature, max_tokens=40
    )
    for completion in answers:
        assert all(len(set(word)) == 1 for word in words(llama, completion))


def test_sources_change_often_in_the_pair_that_tests_whole_words(llama: Baco) -> None:
    answers = llama.generate(PROMPTS[0], router="Rand:0.5", n=8, seed=1, max_tokens=40)
    assert sum(completion.switches or 0 for completion in answers) > 20
    loose = llama.generate(
        PROMPTS[0], router="Rand:0.5", n=8, seed=1, max_tokens=40, switch="token"
    )
    assert any(len(set(word)) == 2 for c in loose for word in words(llama, c))


@settings(max_examples=budget(10))
@given(
    order=st.permutations(range(3)),
    rows=st.sampled_from([1, 2, 5, 64]),
    seed=st.integers(0, 2**40),
)
def test_same_seed_same_answer_for_any_batch_and_order(
    llama: Baco, order: list[int], rows: int, seed: int
) -> None:
    settings: dict[str, Any] = {"router": "P-Punc:0.6", "n": 3, "seed": seed, "max_tokens": 16}
    alone = [
        [tokens_and_sources(c) for c in llama.generate(prompt, **settings)] for prompt in PROMPTS
    ]
    crowd = replace(llama, max_rows=rows)
    together = crowd.generate_batch([PROMPTS[index] for index in order], **settings)
    assert [[tokens_and_sources(c) for c in samples] for samples in together] == [
        alone[i] for i in order
    ]


def test_a_sample_does_not_depend_on_n(llama: Baco) -> None:
    settings: dict[str, Any] = {"router": "Rand:0.5", "seed": 5, "max_tokens": 16}
    three = llama.generate(PROMPTS[1], n=3, **settings)
    seventeen = llama.generate(PROMPTS[1], n=17, **settings)
    assert [tokens_and_sources(c) for c in three] == [tokens_and_sources(c) for c in seventeen[:3]]
    assert len({c.token_ids for c in seventeen}) > 10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("router", ["Base", "Aligned"])
def test_a_single_model_gives_the_tokens_that_transformers_generates(
    pairs: Callable[[str], Baco],
    random_pair: Callable[..., PairFolder],
    architecture: str,
    router: str,
) -> None:
    baco = without_turn_cut(pairs(architecture))
    folder = random_pair(architecture, noise=0.3)
    model = AutoModelForCausalLM.from_pretrained(getattr(folder, router.lower()))
    prompt = baco.pair.renderer.render(PROMPTS[0])
    ids = prompt.base_ids if router == "Base" else prompt.aligned_ids
    size = model.config.vocab_size
    # Ids that the tokenizer does not have cannot be said; special ones not by the base.
    suppressed = list(range(baco.pair.vocabulary.size, size))
    if router == "Base":
        suppressed += baco.pair.banned.nonzero()[:, 0].tolist()
    expected = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=sorted(baco.pair.end_ids),
        suppress_tokens=[token for token in suppressed if token < size] or None,
    )
    [completion] = baco.generate(PROMPTS[0], router=router, temperature=0, max_tokens=24)
    assert list(completion.token_ids) == expected[0, len(ids) :].tolist()
    assert set(completion.sources) == {router.lower()}


@pytest.mark.parametrize("router", ["Base", "Aligned"])
def test_first_tokens_at_temperature_1_follow_the_models_distribution(
    llama: Baco, router: str
) -> None:
    prompt = llama.pair.renderer.render(PROMPTS[0])
    model = llama.pair.base if router == "Base" else llama.pair.aligned
    ids = prompt.base_ids if router == "Base" else prompt.aligned_ids
    row = model.score(ids)[-1]
    if router == "Base":
        row = row.masked_fill(llama.pair.banned, -torch.inf)
    probabilities = row.softmax(-1).double()
    samples = 4000
    drawn = llama.generate(PROMPTS[0], router=router, n=samples, seed=2, max_tokens=1)
    counts = torch.bincount(
        torch.tensor([c.token_ids[0] for c in drawn]), minlength=len(row)
    ).double()
    frequent = probabilities * samples >= 5
    observed = [*counts[frequent].tolist(), float(counts[~frequent].sum())]
    expected = [*(probabilities[frequent] * samples).tolist()]
    expected.append(samples - sum(expected))
    assert len(observed) > 10
    assert chisquare(observed, expected).pvalue > 0.001


@settings(max_examples=budget(10))
@given(seed=st.integers(0, 2**40))
def test_special_tokens_are_never_drawn_from_the_base(llama: Baco, seed: int) -> None:
    answers = llama.generate(
        PROMPTS[0], router="Rand:0.7", n=8, seed=seed, temperature=100, max_tokens=60
    )
    banned = set(llama.pair.banned.nonzero()[:, 0].tolist())
    assert banned
    for completion in answers:
        by_base = {
            token
            for token, source in zip(completion.token_ids, completion.sources, strict=True)
            if source == "base"
        }
        assert not by_base & banned


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.3])
def test_the_base_model_reads_tokens_that_only_the_aligned_model_owns_as_end_of_text(
    random_pair: Callable[..., PairFolder], repetition_penalty: float
) -> None:
    folder = random_pair("olmo2", noise=0.3)
    pair = Baco.load(
        base=str(folder.base), aligned=str(folder.aligned), dtype="float32", packed=False
    ).pair
    (own, *_) = (i for i in range(pair.vocabulary.size) if pair.base.unknown_ids[i])
    assert own not in pair.end_ids
    weight = pair.aligned.model.get_output_embeddings().weight
    weight.data[own] = weight.data.mean(0) * 30  # said often
    answers = Baco(pair).generate(
        PROMPTS[0],
        router="Rand:0.5",
        n=64,
        seed=1,
        temperature=3,
        max_tokens=40,
        repetition_penalty=repetition_penalty,
    )
    after = [c.sources[c.token_ids.index(own) + 1 :] for c in answers if own in c.token_ids[:-1]]
    assert any("base" in sources for sources in after)
    spelled = pair.base.score([1, 2, min(pair.base.end_ids), 3])
    assert torch.equal(pair.base.score([1, 2, own, 3]), spelled)


def test_the_end_token_of_either_model_ends_the_answer(llama: Baco) -> None:
    assert len(llama.pair.end_ids) == 2
    answers = llama.generate(
        PROMPTS[0], router="Rand:0.5", n=400, seed=4, temperature=20, max_tokens=60
    )
    ends = {c.token_ids[-1] for c in answers if c.finish_reason == "stop"}
    assert ends == llama.pair.end_ids
    for completion in answers:
        assert not set(completion.token_ids[:-1]) & llama.pair.end_ids
        assert completion.finish_reason == (
            "stop" if completion.token_ids[-1] in llama.pair.end_ids else "length"
        )
        assert "<|" not in completion.text


def test_an_answer_that_reaches_the_context_window_ends_with_length(llama: Baco) -> None:
    prompt = "sea " * 60
    rendered = llama.pair.renderer.render(prompt)
    [completion] = llama.generate(prompt, router="P:0.5", temperature=0, max_tokens=10_000)
    longest = max(len(rendered.base_ids), len(rendered.aligned_ids))
    assert completion.finish_reason == "length"
    assert longest + len(completion.token_ids) == llama.pair.base.context


def test_a_prompt_beyond_the_context_window_is_refused_with_both_numbers(llama: Baco) -> None:
    with pytest.raises(BacoError, match=r"prompt of \d+ tokens.*context window is 256"):
        llama.generate("sea " * 400)


def test_an_answer_that_memory_cannot_hold_is_refused(llama: Baco) -> None:
    from baco.engine.engine import Engine

    engine = Engine(llama.pair, memory=1000)
    rendered = llama.pair.renderer.render(PROMPTS[0])
    params = llama.pair.defaults.seeded()
    request = Request(
        rendered.base_ids,
        rendered.aligned_ids,
        params,
        llama.router("P:0.5"),
        digest=rendered.digest,
    )
    with pytest.raises(BacoError, match="lower max_tokens"):
        engine.add(request)


def test_rows_wait_for_memory_and_answers_stay_the_same(llama: Baco) -> None:
    from baco.engine.engine import Engine

    rendered = llama.pair.renderer.render(PROMPTS[0])
    params = llama.pair.defaults.updated({"n": 9, "seed": 1, "max_tokens": 12})
    request = Request(
        rendered.base_ids,
        rendered.aligned_ids,
        params,
        llama.router("P:0.5"),
        digest=rendered.digest,
    )
    answers, widest = {}, {}
    little = needed(Engine(llama.pair), request, 4)
    for memory in (little, 2**30):
        engine = Engine(llama.pair, memory=memory)
        sequences = engine.add(request)
        widest[memory] = 0
        while engine.busy:
            widest[memory] = max(widest[memory], len(engine.step()))
        answers[memory] = [sequence.tokens for sequence in sequences]
    assert widest[little] < 9 == widest[2**30]
    assert answers[little] == answers[2**30]


def test_repetition_penalty_equals_that_of_transformers(
    llama: Baco, random_pair: Callable[..., PairFolder]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_pair("llama", noise=0.3).aligned)
    ids = llama.pair.renderer.render(PROMPTS[0]).aligned_ids
    expected = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=24,
        repetition_penalty=1.7,
        eos_token_id=sorted(llama.pair.end_ids),
    )
    [completion] = llama.generate(
        PROMPTS[0], router="Aligned", temperature=0, max_tokens=24, repetition_penalty=1.7
    )
    assert list(completion.token_ids) == expected[0, len(ids) :].tolist()


def test_log_probabilities_are_the_sources_own(llama: Baco) -> None:
    [completion] = llama.generate(
        PROMPTS[0], router="P:0.5", seed=1, max_tokens=10, min_p=0.1, logprobs=3
    )
    rendered = llama.pair.renderer.render(PROMPTS[0])
    assert completion.top_logprobs is not None
    for index, (token, source) in enumerate(
        zip(completion.token_ids, completion.sources, strict=True)
    ):
        model = getattr(llama.pair, str(source))
        prompt = rendered.base_ids if source == "base" else rendered.aligned_ids
        row = model.score([*prompt, *completion.token_ids[:index]])[-1].log_softmax(-1)
        assert completion.logprobs[index] == pytest.approx(float(row[token]), abs=1e-4)
        best = {int(t): pytest.approx(float(row[t]), abs=1e-4) for t in row.topk(3).indices}
        assert completion.top_logprobs[index] == best


def test_a_model_with_recurrent_state_is_decoded_correctly_beside_one_without(
    random_pair: Callable[..., PairFolder], tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

    folder = random_pair("llama", noise=0.3)
    config = MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=8)
    torch.manual_seed(0)
    MambaForCausalLM(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(folder.base).save_pretrained(tmp_path / "base")
    baco = without_turn_cut(
        Baco.load(base=str(tmp_path / "base"), aligned=str(folder.aligned), dtype="float32")
    )
    settings: dict[str, Any] = {"seed": 3, "max_tokens": 10}
    answers = baco.generate(PROMPTS[0], router="Rand:0.5", n=2, **settings)
    assert "one by one" not in caplog.text
    for completion in answers:
        assert tokens_and_sources(completion) == reference(
            baco,
            PROMPTS[0],
            rules(baco.pair)["Rand:0.5"],
            sample=completion.sample,
            temperature=1.0,
            **settings,
        )


def test_a_burst_of_prompts_does_not_delay_running_answers(demo: Baco) -> None:
    decoder = demo.decoder()
    decoder.submit("Recommend a summer destination", router=demo.router("P-Punc:0.4"), seed=1)
    decoder.step()
    prompt = "Write a story about a fox. " * 10
    for _ in range(40):
        decoder.submit(prompt, router=demo.router("P-Punc:0.4"), seed=1, max_tokens=2)
    assert any(chunk.prompt == 0 for chunk in decoder.step())
    assert 0 < decoder.running < 40
    while decoder.busy:
        decoder.step()
    assert decoder.waiting == 0
