"""Pairs of small models with different tokenizers, and what holds of every such pair."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from baco import Baco, Completion
from baco.models.model import PairModel
from baco.models.pair import make_pair
from baco.source import MODELS
from baco.text.shared_text import TextTokenizer
from baco.text.vocabulary import Role, Vocabulary
from tests import naive_text_decoding
from tests.naive_decoding import entropy, max_probability
from tests.tokenizer_kinds import tokenizer_of

PROMPT = "Where should I go this summer?"

# What texts are put together from: scripts, code, emoji, numbers, runs of white space.
PARTS = (
    "the", "sea", " warm", "Lisbon", " ", "  ", "\n", "\n\n", "\t", "\r\n", ".", ",", "?!", "…",
    "'s", "(", ")", "12", "345", "夏天", "の", "海边", "สวั", "が", "é", "e\u0301", "م", "ne",
    "한", "🌊", "x_y", ":", " Привет", "δέ", "नमस्ते", "שלום", "ကမ္ဘာ", "🏖️", "👩‍🔬", "🇵🇹", "    ",
    "\n\n\n", " \n ", "\t\t", "\u00a0", "\u3000", "\u200b", " 3.14", "1,000,000", "２０", "½", "ﬁ",
    "İ", "def f(x):\n", "    return x", "</b>", "{}", "==", "//", "#", "“a”", "—",
)  # fmt: skip


@cache
def text_tokenizer(kind: str) -> TextTokenizer:
    return TextTokenizer(tokenizer_of(kind), kind)


def tiny_model(tokenizer: Any, seed: int, order: list[int] | None = None) -> Any:
    """A model with random weights; with ``order``, the rows of its tokens in that order."""
    size = max(tokenizer.get_vocab().values()) + 1
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        model.model.norm.weight.mul_(3.0)
        if order is not None:
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                old = table.weight.clone()
                table.weight[order] = old
    return model


def permuted_model(tokenizer: Any, seed: int, other: Any, order: list[int]) -> Any:
    """`tiny_model` of a tokenizer, for another one with the same tokens at the ids of ``order``."""
    model = tiny_model(tokenizer, seed, order)
    model.config.eos_token_id = model.generation_config.eos_token_id = other.eos_token_id
    return model


def baco_of(base: Any, aligned: Any) -> Baco:
    """The pair of two (tokenizer, model)."""
    models = [
        PairModel(name, model, tokenizer)
        for name, (tokenizer, model) in (("base", base), ("aligned", aligned))
    ]
    return Baco(make_pair("two tokenizers", *models, separate_tokenizers=True))


def baco_of_kinds(base: str, aligned: str) -> Baco:
    return baco_of(
        *(
            (tokenizer_of(kind), tiny_model(tokenizer_of(kind), seed))
            for seed, kind in enumerate((base, aligned))
        )
    )


def save_pair(folder: Path, base: Any, aligned: Any) -> None:
    """Write a pair of random models with these tokenizers into a folder."""
    for seed, (source, tokenizer) in enumerate(zip(MODELS, (base, aligned), strict=True)):
        tiny_model(tokenizer, seed).save_pretrained(folder / source)
        tokenizer.save_pretrained(folder / source)


Rule = tuple[tuple[str, ...], Callable[[dict[str, torch.Tensor], float], bool]]


def rule_of(spelling: str, vocabulary: Vocabulary) -> Rule:
    """The models that a router reads, and its choice of the base model, for the naive decoder;
    ``vocabulary`` is the base model's.
    """
    name, _, number = spelling.partition(":")
    gamma = float(number or 0)

    def is_mark(rows: dict[str, torch.Tensor]) -> bool:
        role = vocabulary.role[int(rows["base allowed"].argmax())]
        return int(role) in (Role.PUNCTUATION, Role.FORMAT)

    rules: dict[str, Rule] = {
        "P": (("base",), lambda rows, _: max_probability(rows["base"]) < gamma),
        "H": (("base",), lambda rows, _: entropy(rows["base"]) > gamma),
        "Punc": (("base",), lambda rows, _: not is_mark(rows)),
        "Rand": ((), lambda _, coin: coin < gamma),
    }
    return rules[name]


def assert_is_naive(
    baco: Baco, answer: Completion, prompt: str = PROMPT, **drawn: Any
) -> list[str]:
    """Compare an answer with the naive decoder's, token for token.

    Args:
        drawn: seed, temperature, max_tokens, and further arguments of the naive decoder.

    Returns:
        The sources of the answer.
    """
    rendered = baco.pair.renderer.render(prompt)
    reads, rule = rule_of(answer.router, baco.pair.vocabulary_of("base"))
    tokens, sources = naive_text_decoding.decode(
        baco.pair,
        rendered.base_ids,
        rendered.aligned_ids,
        rule,
        reads,
        digest=rendered.digest,
        sample=answer.sample,
        **drawn,
    )
    hidden = answer.thinking_tokens
    assert list(answer.sources) == sources[hidden:]
    assert list(answer.token_ids) == tokens[hidden:]
    assert {*sources[:hidden]} <= {"aligned"}
    return sources[hidden:]


def assert_cuts_at_seams_keep_the_ids(name: str, tokenizer: TextTokenizer, text: bytes) -> None:
    whole = tokenizer.encode(text)
    for at in range(1, len(text)):
        if tokenizer.is_seam(text, at):
            cut = tokenizer.encode(text[:at]) + tokenizer.encode(text[at:])
            assert cut == whole, (name, text[:at], text[at:])


def assert_words_begin_at_seams(tokenizer: TextTokenizer) -> None:
    text = b"We walk along the shore of Lisbon with the dog"
    assert tokenizer.has_seams
    seams = [at for at in range(1, len(text)) if tokenizer.is_seam(text, at)]
    assert seams == [at for at in range(len(text)) if text[at : at + 1] == b" "]
