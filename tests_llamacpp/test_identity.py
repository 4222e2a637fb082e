"""Answers are those of a naive loop over llama.cpp itself: one sequence each, no drafts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baco import Baco
from baco.source import MODELS
from tests import naive_text_decoding
from tests.test_engine import reference, rules, tokens_and_sources, without_turn_cut
from tests.test_gguf import tiny_model, write_gguf
from tests.test_structured import STRUCTURES, fits, naive_answer
from tests_llamacpp.files import Alone, write_demo

PROMPT = "Recommend a summer destination"


@pytest.fixture(scope="module", params=["F32", "Q8_0"])
def paths(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_demo(tmp_path_factory.mktemp("demo"), request.param)


@pytest.fixture(scope="module")
def baco(paths: dict[str, Any]) -> Baco:
    return without_turn_cut(Baco.load(**paths))


@pytest.fixture(scope="module")
def alone(baco: Baco, paths: dict[str, Any]) -> Baco:
    """The same pair, whose models read one text token by token."""
    models: dict[str, Any] = {source: Alone(path) for source, path in paths.items()}
    return replace(baco, pair=replace(baco.pair, **models))


def test_llama_cpp_is_chosen_for_gguf_files(baco: Baco) -> None:
    assert baco.capabilities.name == "llamacpp"
    assert all("by llama.cpp on cpu" in form for form in baco.pair.weights_formats.values())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_a_naive_loop(baco: Baco, alone: Baco, temperature: float) -> None:
    settings: dict[str, Any] = {"seed": 7, "temperature": temperature, "max_tokens": 16}
    for router, rule in rules(baco.pair).items():
        for n in (1, 8):
            answers = baco.generate(PROMPT, router=router, n=n, **settings)
            for answer in answers[:1] if n == 1 else answers[1::3]:
                expected = reference(alone, PROMPT, rule, sample=answer.sample, **settings)
                assert tokens_and_sources(answer) == expected, router


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_two_files_with_different_tokenizers_answer_as_a_naive_loop_over_both(
    tmp_path: Path, temperature: float
) -> None:
    write_gguf(tmp_path / "aligned.gguf", tiny_model(0))
    base, aligned = write_demo(tmp_path)["base"], str(tmp_path / "aligned.gguf")
    baco = without_turn_cut(Baco.load(base=base, aligned=aligned))
    assert baco.capabilities.name == "llamacpp"
    models: dict[str, Any] = {"base": Alone(base), "aligned": Alone(aligned)}
    for source in MODELS:
        models[source].tokenizer = baco.pair.model(source).tokenizer
    alone, prompt = replace(baco.pair, **models), baco.pair.renderer.render(PROMPT)
    settings: dict[str, Any] = {"seed": 7, "temperature": temperature, "max_tokens": 16}
    answers = baco.generate(PROMPT, router="Rand:0.5", n=4, **settings)
    for answer in answers:
        tokens, sources = naive_text_decoding.decode(
            alone,
            prompt.base_ids,
            prompt.aligned_ids,
            lambda rows, coin: coin < 0.5,
            (),
            digest=prompt.digest,
            sample=answer.sample,
            **settings,
        )
        assert (list(answer.token_ids), list(answer.sources)) == (tokens, sources)
    assert {"base", "aligned"} == {source for answer in answers for source in answer.sources}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_structured_answers_are_those_of_a_naive_loop_and_valid(
    baco: Baco, alone: Baco, temperature: float
) -> None:
    drawn: dict[str, Any] = {"seed": 7, "temperature": temperature, "max_tokens": 24}
    sources = set[Any]()
    for structure in STRUCTURES[:4]:
        for router in ("P-Punc:0.6", "Rand:0.5"):
            for n in (1, 4):
                answers = baco.generate(PROMPT, router=router, n=n, **drawn, **structure)
                answer = answers[-1]
                expected = naive_answer(
                    alone, structure, router, PROMPT, sample=answer.sample, **drawn
                )
                assert tokens_and_sources(answer) == expected, (structure, router)
                sources |= {*answer.sources}
        for answer in baco.generate(PROMPT, n=8, **{**drawn, "max_tokens": 90}, **structure):
            assert answer.finish_reason == "stop"
            assert fits(structure, answer.text)
    assert sources == {"base", "aligned"}


def test_structured_answers_of_two_files_with_different_tokenizers_are_valid(
    tmp_path: Path,
) -> None:
    write_gguf(tmp_path / "aligned.gguf", tiny_model(0))
    base, aligned = write_demo(tmp_path)["base"], str(tmp_path / "aligned.gguf")
    baco = Baco.load(base=base, aligned=aligned)
    for structure in STRUCTURES[:4]:
        answers = baco.generate(PROMPT, router="Rand:0.5", n=4, seed=7, max_tokens=90, **structure)
        assert any(answer.finish_reason == "stop" for answer in answers)
        for answer in answers:
            assert answer.finish_reason == "length" or fits(structure, answer.text)
