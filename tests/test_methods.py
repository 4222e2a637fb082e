"""Every method gives n samples per prompt and follows its description."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, groupby

import pytest

from baco import Baco
from baco.errors import BacoError
from baco.evaluation.methods import Draw, Grid, answer, methods, select_settings
from baco.evaluation.methods.prompting import AGAIN, with_system
from baco.evaluation.methods.verbalized import parse
from baco.evaluation.records import Prompt, Setting
from baco.evaluation.tasks import load_task
from baco.routing.parser import plain_catalogue

FULL, QUICK = Grid("full", 4), Grid("quick", 4)
DRAW = Draw(4, 11, {"max_tokens": 24})
OFFLINE = [name for name in methods() if name != "judge"]


@pytest.fixture(scope="module")
def prompts() -> tuple[Prompt, ...]:
    return load_task("demo", 2).prompts


def first(name: str) -> Setting:
    return methods()[name].settings(QUICK)[0]


@pytest.mark.parametrize("name", OFFLINE)
def test_a_method_gives_n_samples_and_the_same_ones_again(
    demo: Baco, prompts: tuple[Prompt, ...], name: str
) -> None:
    setting = methods()[name].settings(QUICK)[-1]
    rows = answer(demo, setting, prompts, DRAW)
    assert [len(row) for row in rows] == [4, 4]
    assert rows == answer(demo, setting, prompts, DRAW)
    for sample in (a for row in rows for a in row):
        assert sample.tokens > 0
        assert not sample.pieces or "".join(text for text, _ in sample.pieces) == sample.text
        assert sample.base_share is None or 0 <= sample.base_share <= 1


def test_labels_are_unique_in_a_method_and_a_full_grid_holds_the_quick_one() -> None:
    every = select_settings([], [], FULL)
    assert len({(s.method, s.label) for s in every}) == len(every)
    quick = select_settings([], [], QUICK)
    assert {(s.method, s.label) for s in quick} <= {(s.method, s.label) for s in every}
    assert len(quick) < len(every)


def test_truncation_samplers_are_rivals_of_the_aligned_model_where_they_are_named() -> None:
    settings = select_settings(["truncation"], [], FULL)
    swept = dict.fromkeys(setting.method for setting in settings)
    assert list(swept) == ["aligned, top-nσ", "aligned, p-less", "aligned, XTC"]
    assert methods()["truncation"].family == "aligned"
    assert not swept.keys() & {setting.method for setting in select_settings([], [], FULL)}


def test_every_router_of_the_catalogue_without_state_is_swept() -> None:
    swept = {setting.method for setting in methods()["routers"].settings(FULL)}
    assert {entry.name for entry in plain_catalogue()} - {"Base", "Aligned"} <= swept
    assert "Nudging" in swept


def test_a_router_is_swept_unless_its_threshold_is_given() -> None:
    swept = select_settings([], ["P-Punc"], FULL)
    assert len(swept) == 7 and all(s.method == "P-Punc" for s in swept)
    (one,) = select_settings([], ["P-Punc:0.4"], FULL)
    assert (one.label, one.value) == ("P-Punc:0.4", 0.4)
    assert {s.method for s in select_settings(["mixing"], ["Punc"], FULL)} == {"mixing", "Punc"}


@pytest.mark.parametrize("router", ["P", "H-FC", "Gap", "Rand", "Nudging"])
def test_a_routers_grid_reaches_the_aligned_model_and_goes_far_from_it(
    demo: Baco, prompts: tuple[Prompt, ...], router: str
) -> None:
    """Otherwise it would have no point in a strip that only the aligned model covers."""
    (aligned,) = select_settings([], ["Aligned"], FULL)
    alone = [a.text for row in answer(demo, aligned, prompts, DRAW) for a in row]
    grid = select_settings([], [router], FULL)
    same = [
        sum(a.text == b for a, b in zip(chain.from_iterable(rows), alone, strict=True))
        for rows in (answer(demo, setting, prompts, DRAW) for setting in (grid[0], grid[-1]))
    ]
    # A coin names the base now and then at any threshold above 0.
    assert max(same) >= (len(alone) // 2 if router == "Rand" else len(alone))
    assert min(same) < len(alone) // 2


def test_unknown_methods_and_routers_are_refused_with_similar_names() -> None:
    with pytest.raises(BacoError, match="unknown method 'mixin': use mixing"):
        select_settings(["mixin"], [], FULL)
    with pytest.raises(BacoError, match="unknown router 'Q'"):
        select_settings([], ["Q"], FULL)
    with pytest.raises(BacoError, match="--judge-url"):
        select_settings(["judge"], [], FULL)


def test_a_router_gives_the_answers_of_baco(demo: Baco, prompts: tuple[Prompt, ...]) -> None:
    (setting,) = select_settings([], ["P-Punc:0.4"], FULL)
    rows = answer(demo, setting, prompts, DRAW)
    expected = demo.generate_batch(
        [prompt.text for prompt in prompts], router="P-Punc:0.4", n=4, seed=11, max_tokens=24
    )
    assert [[a.text for a in row] for row in rows] == [[c.text for c in row] for row in expected]
    for row in rows:
        for sample in row:
            sources = [source for _, source in sample.pieces]
            assert sources == [source for source, _ in groupby(sources)]


@pytest.mark.parametrize(
    ("name", "combiner"),
    [
        ("ensemble of probabilities, w=0.3", "Ensemble:0.3"),
        ("ensemble of logits, w=0.3", "LogitEnsemble:0.3"),
        ("contrastive, β=0.5", "Contrast:0.5,0.1"),
        ("Ensemble:0.25", "Ensemble:0.25"),
    ],
)
def test_methods_that_mix_give_the_answers_of_their_combiner_without_sources(
    demo: Baco, prompts: tuple[Prompt, ...], name: str, combiner: str
) -> None:
    settings = select_settings(["ensemble", "contrastive"], ["Ensemble:0.25"], FULL)
    (setting,) = (setting for setting in settings if setting.label == name)
    assert methods()[setting.options["kind"]].family == "ensemble"
    rows = answer(demo, setting, prompts, DRAW)
    expected = demo.generate_batch(
        [prompt.text for prompt in prompts], router=combiner, n=4, seed=11, max_tokens=24
    )
    assert [[a.text for a in row] for row in rows] == [[c.text for c in row] for row in expected]
    assert {a.base_share for row in rows for a in row} == {None}
    assert {source for row in rows for a in row for _, source in a.pieces} == {None}


def test_mixing_takes_m_answers_of_base_and_the_rest_of_aligned(
    demo: Baco, prompts: tuple[Prompt, ...]
) -> None:
    settings = methods()["mixing"].settings(FULL)
    assert [s.value for s in settings] == [0, 1, 2, 3, 4]
    points = [answer(demo, setting, prompts, DRAW) for setting in settings]
    for share, rows in enumerate(points):
        for row, aligned, base in zip(rows, points[0], points[-1], strict=True):
            assert row == [*base[:share], *aligned[share:]]
            assert [a.base_share for a in row] == [1.0] * share + [0.0] * (4 - share)


@pytest.mark.parametrize("weight", [0.0001, 0.9999])
@pytest.mark.parametrize("mixed", ["probabilities", "logits"])
def test_an_ensemble_of_one_model_is_that_model(
    demo: Baco, prompts: tuple[Prompt, ...], mixed: str, weight: float
) -> None:
    """At either end of w, where the draws use the same noise as the single model's."""
    setting = Setting("e", "e", weight, {"kind": "ensemble", "mixed": mixed, "weight": weight})
    draw = Draw(6, 5, {"temperature": 1.0, "min_p": 0.1})
    samples = answer(demo, setting, prompts, draw)
    alone = demo.generate_batch(
        [prompt.text for prompt in prompts],
        router="Base" if weight > 0.5 else "Aligned",
        n=6,
        seed=5,
        temperature=1.0,
        min_p=0.1,
    )
    pairs = [
        (a.text, c.text)
        for row, completions in zip(samples, alone, strict=True)
        for a, c in zip(row, completions, strict=True)
    ]
    assert sum(a == b for a, b in pairs) >= len(pairs) - 1


def test_methods_that_read_both_models_keep_the_memory_limit(
    demo: Baco, prompts: tuple[Prompt, ...]
) -> None:
    with pytest.raises(BacoError, match="lower max_tokens, shorten the prompt or raise memory"):
        answer(replace(demo, memory=1000), first("ensemble"), prompts[:1], DRAW)


def test_an_ensemble_does_not_hang_on_its_company(demo: Baco, prompts: tuple[Prompt, ...]) -> None:
    setting = first("ensemble")
    together = answer(demo, setting, prompts, DRAW)
    assert [answer(demo, setting, [p], DRAW)[0] for p in prompts] == together


class Spy:
    """A pair that records the prompts of its aligned model."""

    def __init__(self, baco: Baco) -> None:
        self._baco, self.pair = baco, baco.pair
        self.chats: list[tuple[list[dict[str, str]], dict[str, object]]] = []

    def generate_batch(self, prompts: list, **options: object) -> object:
        self.chats += [(list(prompt), options) for prompt in prompts]
        return self._baco.generate_batch(prompts, **options)  # type: ignore[arg-type]


@pytest.fixture
def spy(demo: Baco) -> Iterator[Spy]:
    spy = Spy(demo)
    yield spy
    assert all(options["router"] == "Aligned" for _, options in spy.chats)


def test_paraphrases_are_used_in_turn(spy: Spy, prompts: tuple[Prompt, ...]) -> None:
    answer(spy, first("paraphrase"), prompts[:1], Draw(7, 1, {"max_tokens": 8}))  # type: ignore
    texts = [chat[-1]["content"] for chat, _ in spy.chats]
    wordings = prompts[0].paraphrases
    assert texts == [wordings[i % len(wordings)] for i in range(7)]
    seeds = [options["seed"] for _, options in spy.chats]
    assert len(set(seeds)) == 7, "samples of one prompt must not share their noise"


def test_a_prompt_without_paraphrases_is_reworded_by_the_aligned_model(spy: Spy) -> None:
    prompt = Prompt("1", ({"role": "user", "content": "Name a winter destination."},))
    answer(spy, first("paraphrase"), [prompt], Draw(2, 1, {"max_tokens": 16}))  # type: ignore
    rewording, *questions = [chat[-1]["content"] for chat, _ in spy.chats]
    assert rewording.endswith(prompt.text) and rewording != prompt.text
    assert len(questions) == 2 and prompt.text not in questions


def test_regeneration_shows_the_earlier_answers(spy: Spy, prompts: tuple[Prompt, ...]) -> None:
    draw = Draw(3, 1, {"max_tokens": 12})
    (samples,) = answer(spy, first("regeneration"), prompts[:1], draw)  # type: ignore[arg-type]
    last, _ = spy.chats[-1]
    assert [m["content"] for m in last] == [
        prompts[0].text, samples[0].text, AGAIN, samples[1].text, AGAIN,
    ]  # fmt: skip


def test_regeneration_drops_the_oldest_answers_at_the_end_of_the_context(
    spy: Spy, prompts: tuple[Prompt, ...]
) -> None:
    draw = Draw(14, 1, {"max_tokens": 96, "temperature": 2.0, "min_p": 0.0})
    setting = methods()["regeneration"].settings(FULL)[-1]
    answer(spy, setting, prompts[:1], draw)  # type: ignore[arg-type]
    chats = [chat for chat, _ in spy.chats]
    assert all(chat[0]["content"] == prompts[0].text for chat in chats)
    lengths = [len(spy.pair.renderer.render(chat).aligned_ids) for chat in chats]
    assert max(lengths) <= spy.pair.aligned.context - 96
    assert len(chats[-1]) < 1 + 2 * 13, "the context was never full: the test shows nothing"


def test_a_system_prompt_goes_before_the_users_own() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert with_system(chat, "Vary.")[0]["content"] == "Vary.\n\nBe brief."
    assert len(with_system(chat[1:], "Vary.")) == 2


TAGGED = "<response><text>One</text><probability>0.2</probability></response>"


@pytest.mark.parametrize(
    ("reply", "texts"),
    [
        (TAGGED * 2, ["One", "One"]),
        ("Here:\n<response>\n<text>\nA\nB </text>\n<probability>0.1</probability>", ["A\nB"]),
        ("<response><text>A<probability>0.1</probability></response>", ["A"]),
        ("<response>A <probability>1</probability></response><response>B</response>", ["A", "B"]),
        (TAGGED + "<response><text>cut of", ["One"]),
        ("<Response><Text>A</Text></Response>", ["A"]),
        ("<text>A</text> <text>B</text>", ["A", "B"]),
        ("<response><text>A, cut <response><text>B</text></response>", ["B"]),
        ("<response>A <response>B</response><response>cut of", ["A", "B"]),
        ("<response>A <probability>1</response>", ["A"]),
        (TAGGED + "<response><text>B</text><probability>0.", ["One", "B"]),
        ("In <text>tags</text>: " + TAGGED + " That is <text>all</text>.", ["One"]),
        ('{"responses": [{"text": "A", "probability": 0.1}, {"text": "B"}]}', ["A", "B"]),
        ('Sure!\n```json\n[{"response": "A"}, {"answer": "B"}]\n```\nDone.', ["A", "B"]),
        ('As ["asked"]:\n```json\n["A",\n"B"]\n```', ["A", "B"]),
        ('As ["asked"]:\n```\n["A"]\n```', ["A"]),
        ('["A", "B"]', ["A", "B"]),
        ('["A", 2, null, ["B"]]', ["A"]),
        ('{"text": "A", "tags": ["short"]}', ["A"]),
        ('{"first": ["A"], "second": ["B"]}', []),
        ('[{"content": "A"}, {"content": "no", "answer": "B"}]', ["A", "B"]),
        ('{"answer": "no", "response": "A"}', ["A"]),
        ('{"response": "no", "text": "A"}', ["A"]),
        ("[" * 2000, []),
        ('{"responses": [{"text": "A"}, {"text": "B"}, {"te', ["A", "B"]),
        ('{"text": "A"}\n{"text": "B"}', ["A", "B"]),
        ("no form at all", []),
        ("<response><text>  </text></response>", []),
        ("", []),
    ],
)
def test_verbalized_answers_are_read_in_every_form(reply: str, texts: list[str]) -> None:
    assert parse(reply) == texts


class Telling(Spy):
    """A pair whose aligned model answers in the requested form."""

    def generate_batch(self, prompts: list, **options: object) -> object:
        from dataclasses import replace

        rows = super().generate_batch(prompts, **options)
        reply = TAGGED.replace("One", "A") + TAGGED.replace("One", "B") + "<response><text>C"
        return [[replace(c, text=reply) for c in row] for row in rows]  # type: ignore


def test_verbalized_sampling_asks_until_it_has_n(demo: Baco, prompts: tuple[Prompt, ...]) -> None:
    telling = Telling(demo)
    draw = Draw(3, 1, {"max_tokens": 8})
    rows = answer(telling, first("verbalized"), prompts, draw)  # type: ignore[arg-type]
    assert [[a.text for a in row] for row in rows] == [["A", "B", "A"]] * 2
    assert {a.finish_reason for row in rows for a in row} == {"stop"}
    assert len(telling.chats) == 4, "two calls for each of two prompts"
    assert "set of 3" in telling.chats[0][0][0]["content"]
    assert telling.chats[0][1]["max_tokens"] == 3 * (8 + 40)


def test_answers_without_the_requested_form_are_kept_whole_and_marked(
    demo: Baco, prompts: tuple[Prompt, ...]
) -> None:
    rows = answer(demo, first("verbalized"), prompts, Draw(3, 1, {"max_tokens": 8}))
    assert all(len(row) == 3 for row in rows)
    assert {a.finish_reason for row in rows for a in row} == {"unparsed"}
