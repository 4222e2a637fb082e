"""A draft model changes only how often the models run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM

from baco import Baco, BacoError, Completion
from baco.engine.engine import Stats
from baco.engine.isolation import IsolatingEngine
from baco.models.known_pairs import demo_folder
from baco.models.size import ModelSize
from tests.pairs import SIZE, PairFolder
from tests.test_engine import rules

PROMPTS = ["What do you recommend for a rainy day?", "Plan a walk."]
SETTINGS: dict[str, Any] = {"n": 2, "seed": 7, "max_tokens": 24}


def tokens_and_sources(
    completions: list[Completion],
) -> list[tuple[tuple[int, ...], tuple[str | None, ...]]]:
    return [(c.token_ids, c.sources) for c in completions]


def decoded(baco: Baco, prompt: str, router: str, **settings: Any) -> tuple[list[Any], Stats]:
    decoder = baco.decoder()
    decoder.submit(prompt, router=baco.router(router), **settings)
    completions: list[Completion] = []
    while decoder.busy:
        completions += [c.completion for c in decoder.step() if c.completion is not None]
    assert isinstance(decoder.engine, IsolatingEngine)
    return tokens_and_sources(sorted(completions, key=lambda c: c.sample)), decoder.engine.stats


def big(baco: Baco) -> Baco:
    """The planner is given large sizes, so that saving a forward pays."""
    for model, layers in ((baco.pair.base, 80), (baco.pair.aligned, 80), (baco.draft, 1)):
        if model is not None:
            model.__dict__["size"] = ModelSize(layers, layers * 10**8, layers * 10**8)
    return baco


@pytest.fixture(scope="module")
def plain(loaded_pair: Callable[..., Baco]) -> Baco:
    return loaded_pair("llama", noise=0.1)


@pytest.fixture(scope="module")
def drafted(random_pair: Callable[..., PairFolder]) -> dict[str, Baco]:
    """The same pair with its own aligned model as draft model, and with an unrelated one."""
    folder = random_pair("llama", noise=0.1)
    strange = random_pair("llama", noise=None)
    return {
        name: big(
            Baco.load(
                base=str(folder.base),
                aligned=str(folder.aligned),
                dtype="float32",
                draft=str(draft),
            )
        )
        for name, draft in (("good", folder.aligned), ("bad", strange.aligned))
    }


@pytest.mark.parametrize("draft", ["good", "bad"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_the_same_with_a_draft_model(
    plain: Baco, drafted: dict[str, Baco], draft: str, temperature: float
) -> None:
    settings = SETTINGS | {"temperature": temperature}
    ran = 0
    for router in rules(plain.pair):
        for prompt in PROMPTS:
            expected, _ = decoded(plain, prompt, router, **settings)
            got, stats = decoded(drafted[draft], prompt, router, **settings)
            assert got == expected, router
            ran += stats.forwards["draft"] - 1  # the prompt's is one
    assert ran > 100


def test_a_good_draft_model_saves_forwards_and_a_bad_one_is_not_used() -> None:
    folder = demo_folder()
    without = big(Baco.load("demo"))
    good = big(Baco.load("demo", draft=str(folder / "aligned")))
    prompt, settings = "Recommend a summer destination", {"n": 1, "seed": 3, "max_tokens": 64}
    # The aligned model alone: nothing but continuations or a draft model can run ahead of it.
    expected, plainly = decoded(without, prompt, "Aligned", **settings)
    got, ahead = decoded(good, prompt, "Aligned", **settings)
    assert got == expected
    assert ahead.forwards["aligned"] < 0.4 * plainly.forwards["aligned"]
    assert ahead.accepted > 0.8 * ahead.drafted > 0


def test_a_bad_draft_model_is_soon_not_used(plain: Baco, drafted: dict[str, Baco]) -> None:
    settings = SETTINGS | {"n": 1, "max_tokens": 120}
    expected, plainly = decoded(plain, PROMPTS[0], "Aligned", **settings)
    got, ahead = decoded(drafted["bad"], PROMPTS[0], "Aligned", **settings)
    assert got == expected
    assert ahead.forwards["draft"] < 0.5 * ahead.forwards["aligned"]
    assert ahead.forwards["aligned"] <= plainly.forwards["aligned"]


def test_a_draft_model_of_another_vocabulary_is_refused_with_the_first_differing_token(
    random_pair: Callable[..., PairFolder],
) -> None:
    folder = random_pair("llama", noise=0.1)
    with pytest.raises(BacoError, match=r"differ at token '.*in the aligned.*in the draft model"):
        Baco.load("demo", draft=str(folder.base))


def test_a_draft_model_that_cannot_be_rolled_back_is_refused(
    random_pair: Callable[..., PairFolder], tmp_path: Path
) -> None:
    folder = random_pair("llama", noise=0.1)
    config = RwkvConfig(vocab_size=SIZE, hidden_size=32, num_hidden_layers=2, context_length=256)
    RwkvForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder.aligned).save_pretrained(tmp_path)
    where: dict[str, Any] = {"base": str(folder.base), "aligned": str(folder.aligned)}
    with pytest.raises(BacoError, match="use a transformer as draft model"):
        Baco.load(**where, draft=str(tmp_path))
    with pytest.raises(BacoError, match="so nothing can draft for it"):
        Baco.load(base=str(tmp_path), aligned=str(folder.aligned), draft=str(folder.aligned))


def test_a_recurrent_draft_model_does_not_change_answers(
    plain: Baco, random_pair: Callable[..., PairFolder], tmp_path: Path
) -> None:
    folder = random_pair("llama", noise=0.1)
    config = MambaConfig(vocab_size=SIZE, hidden_size=32, num_hidden_layers=2, state_size=8)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder.aligned).save_pretrained(tmp_path)
    models: dict[str, Any] = {"base": str(folder.base), "aligned": str(folder.aligned)}
    baco = big(Baco.load(**models, draft=str(tmp_path), dtype="float32"))
    for router in ("Aligned", "P-Punc:0.6"):
        expected = tokens_and_sources(plain.generate(PROMPTS[0], router=router, **SETTINGS))
        answers, stats = decoded(baco, PROMPTS[0], router, **SETTINGS)
        assert answers == expected
        assert stats.drafted


def test_a_draft_model_with_a_shorter_context_does_not_change_answers(
    plain: Baco, random_pair: Callable[..., PairFolder], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = random_pair("llama", noise=0.1)
    model = AutoModelForCausalLM.from_pretrained(folder.aligned)
    model.config.max_position_embeddings = 32
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder.aligned).save_pretrained(tmp_path)
    baco = big(
        Baco.load(
            base=str(folder.base),
            aligned=str(folder.aligned),
            dtype="float32",
            draft=str(tmp_path),
        )
    )
    settings = SETTINGS | {"max_tokens": 60}
    for router in ("Aligned", "P-Punc:0.6"):
        expected = tokens_and_sources(plain.generate(PROMPTS[0], router=router, **settings))
        assert tokens_and_sources(baco.generate(PROMPTS[0], router=router, **settings)) == expected
