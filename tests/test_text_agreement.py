"""`baco diagnose` compares models with different tokenizers word by word."""

from itertools import accumulate

import pytest
import torch

from baco import Baco
from baco.calibration.diagnose import diagnose, judge
from baco.calibration.text_agreement import OwnReading, TextAgreement
from baco.models.model import PairModel
from baco.models.pair import Pair, make_pair
from baco.routing.signals import Distribution
from baco.source import MODELS, Source
from tests.naive_decoding import entropy, max_probability
from tests.text_pairs import PROMPT, baco_of, baco_of_kinds, permuted_model, tiny_model
from tests.tokenizer_kinds import permuted, tokenizer_of

SEVERAL = [PROMPT, "Give me a dinner idea", "夏天去海边吗?"]


WORDS = (
    "The", " sea", " near", " Lisbon", " is", " warm", ",", " 夏天去", "海边", ".", " It", " is",
    " 12,345", "!", "\n\n", "We", " walk", " along", " the", " shore", " with", " the", " dog", ".",
)  # fmt: skip


def written_in_turn(pair: Pair, turn: int) -> OwnReading:
    """The reading of an answer whose words the models write in turn; the base model ends it."""
    assert pair.own_vocabularies is not None
    tokens, sources = list[int](), list[Source]()
    for number, word in enumerate(WORDS):
        source = MODELS[(number + turn) % 2]
        ids = pair.own_vocabularies[source].tokenizer.encode(word.encode())
        tokens, sources = [*tokens, *ids], [*sources, *[source] * len(ids)]
    tokens, sources = [*tokens, min(pair.end_ids_of("base"))], [*sources, "base"]
    return OwnReading.of(pair, tokens, sources)


@pytest.mark.parametrize("kinds", [("gpt2", "gemma"), ("unigram", "llama3")])
def test_figures_are_those_of_full_forwards_at_every_word_start(kinds: tuple[str, str]) -> None:
    pair, gamma = baco_of_kinds(*kinds).pair, 0.3
    assert pair.own_vocabularies is not None
    prompt = pair.renderer.render(PROMPT)
    prompts: dict[Source, tuple[int, ...]] = {
        "base": prompt.base_ids,
        "aligned": prompt.aligned_ids,
    }
    sums = TextAgreement()
    words, base_words, seams = 0, 0, 0
    nats = dict.fromkeys(MODELS, 0.0)
    data = {model: own.tokenizer.data for model, own in pair.own_vocabularies.items()}
    for turn in (0, 1):
        reading = written_in_turn(pair, turn)
        sums.add(pair, prompt, reading)
        assert reading.text == "".join(WORDS).encode()
        assert reading.ended
        ends = {
            model: [0, *accumulate(len(data[model][token]) for token in reading.ids[model])]
            for model in MODELS
        }
        active: Source | None = None
        for place in sorted({*ends["base"]} & {*ends["aligned"]}):
            before, after = (part.decode() for part in (reading.text[:place], reading.text[place:]))
            letter = after[:1].isascii() and after[:1].isalnum()  # not one of Chinese
            if before and (before[-1].isspace() or letter):
                continue
            rows = {}
            for model in MODELS:
                read = reading.ids[model][: ends[model].index(place)]
                rows[model] = pair.model(model).score([*prompts[model], *read])[-1]
                nats[model] += float(entropy(rows[model]))
            words += 1
            if active is None or pair.vocabulary_of(active).word_start[int(rows[active].argmax())]:
                active = "base" if max_probability(rows["base"]) < gamma else "aligned"
            base_words += active == "base"
            if before and after:
                seams += pair.own_vocabularies["base"].tokenizer.is_seam(reading.text, place)
    assert sums.positions == words > 20
    assert sums.base_words[f"P:{gamma}"] == base_words
    assert 0 < base_words < words
    assert sums.seams["base"] == seams > 0
    for model in MODELS:
        assert sums.word_entropy[model] == pytest.approx(nats[model], rel=1e-4)


def test_a_model_agrees_with_itself_through_permuted_ids() -> None:
    tokenizer = tokenizer_of("llama3")
    other, order = permuted(tokenizer, seed=1)
    model = permuted_model(tokenizer, 0, other, order)
    baco = baco_of((tokenizer, tiny_model(tokenizer, 0)), (other, model))
    sums = TextAgreement()
    for turn in (0, 1):
        sums.add(baco.pair, baco.pair.renderer.raw(PROMPT), written_in_turn(baco.pair, turn))
    assert sums.agree == sums.positions > 20
    assert not sums.partings
    assert sums.entropy["base"] == pytest.approx(sums.entropy["aligned"], rel=1e-4)
    assert sums.seams["base"] == sums.seams["aligned"] > 0


def test_words_agree_where_one_text_begins_the_other_beyond_white_space() -> None:
    baco = baco_of_kinds("gemma", "gpt2")
    pair = baco.pair
    assert pair.own_vocabularies is not None
    base, aligned = (pair.own_vocabularies[model].tokenizer for model in MODELS)

    def rows(text: bytes, other: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        one = torch.zeros(1, base.size), torch.zeros(1, aligned.size)
        one[0][0, base.data.index(text)] = 9.0
        one[1][0, aligned.data.index(other)] = 9.0
        return one

    for text, other, same in (
        (b" the", b" the", True),
        (b" t", b" the", True),
        (b" ", b" the", False),
        (b" ", b" ", True),
        (b" s", b" the", False),
    ):
        sums = TextAgreement()
        first, second = rows(text, other)
        sums._compare(pair, {"base": Distribution(first), "aligned": Distribution(second)})
        assert sums.agree == same, (text, other)


def test_a_router_decides_the_first_word_even_where_no_word_start_is_likely() -> None:
    pair = baco_of_kinds("gemma", "gpt2").pair
    words = pair.vocabulary_of("aligned")
    base, aligned = torch.zeros(1, pair.vocabulary_of("base").size), torch.zeros(1, words.size)
    aligned[0, int((~words.word_start).nonzero()[0])] = 9.0
    sums = TextAgreement()
    sums._compare(pair, {"base": Distribution(base), "aligned": Distribution(aligned)})
    assert sums.base_words["P:0.3"] == 1
    assert sums.base_words["Nudging:0.3"] == 0


def test_a_diagnosis_leaves_out_what_needs_one_vocabulary_and_says_why() -> None:
    baco = baco_of_kinds("gemma", "gpt2")
    diagnosis = diagnose(baco, SEVERAL, samples=1, max_tokens=24)
    assert diagnosis.overlap is None
    assert diagnosis.left_out.keys() >= {"overlap", "Gap"}
    assert "different tokenizers" in diagnosis.left_out["Gap"]
    assert not any(spelling.startswith("Gap") for spelling in diagnosis.base_share)
    shares = [diagnosis.base_share[f"P:{gamma}"] for gamma in ("0.1", "0.3", "0.5", "0.7")]
    assert shares == sorted(shares)
    text = diagnosis.shared_text
    assert text is not None
    assert 0 < text.encoding < 1
    assert text.read > 0
    assert {*text.seams} == {*text.word_entropy} == {*MODELS}
    assert diagnosis.unit == "character"


def test_a_diagnosis_of_one_tokenizer_has_no_figures_of_shared_text() -> None:
    models = [
        PairModel(source, tiny_model(tokenizer_of("gpt2"), seed), tokenizer_of("gpt2"))
        for seed, source in enumerate(MODELS)
    ]
    diagnosis = diagnose(Baco(make_pair("one", *models)), SEVERAL, samples=1, max_tokens=8)
    assert diagnosis.shared_text is None
    assert diagnosis.overlap is not None
    assert not diagnosis.left_out
    assert diagnosis.unit == "token"


def test_the_verdict_names_what_sharing_a_text_costs() -> None:
    figures = {
        "agreement": 0.6,
        "entropy_base": 1.0,
        "entropy_aligned": 0.4,
        "prompt_gain": 0.5,
        "base_ends": 1.0,
        "aligned_ends": 1.0,
        "first_token": 1.0,
        "encoding": 0.001,
        "read_again": 0.0,
    }
    assert judge(figures) == (
        "good",
        [
            "the base model has 0.60 nats a character more entropy than the aligned model, and the "
            "base model follows the prompt"
        ],
    )
    for change, sentence in (
        ({"agreement": 0.98}, "nearly always begin the same word (98%"),
        ({"encoding": 0.05}, "encoding what the other model wrote takes 5% of the time"),
        ({"read_again": 0.2}, "20% of the tokens read are replaced"),
    ):
        verdict, (reason,) = judge(figures | change)
        assert verdict == "doubtful"
        assert sentence in reason
