"""The demo pair's tokenizer: byte-level BPE, nearly one token a word, one for both models.

The models differ only in the end of an answer and in the chat template, which only the aligned
model has.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

BASE_END = "<|endoftext|>"
TURN_END = "<|end|>"
USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"
SPECIAL = (BASE_END, TURN_END, USER, ASSISTANT, SYSTEM)

# Every turn's text begins with a space, as it does after "Question:" and "Answer:", and the
# generation prompt ends at the role token: so both models begin an answer with the same token.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """Byte-level BPE of at most `size` entries learnt from `texts`; special tokens come first."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of one of the tokenizer's own tokens."""
    number = tokenizer.token_to_id(token)
    assert number is not None, token
    return number


def wrap(tokenizer: Tokenizer, *, context: int, chat: bool) -> PreTrainedTokenizerFast:
    """The tokenizer as `transformers` loads it: with the chat template, or the base's without."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BASE_END,
        eos_token=TURN_END if chat else BASE_END,
        pad_token=BASE_END,
        additional_special_tokens=[TURN_END, USER, ASSISTANT, SYSTEM],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    if chat:
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def chat_prompt(question: str, system: str | None = None) -> str:
    """One question as the aligned model reads it; the answer follows with a leading space."""
    opening = f"{SYSTEM} {system}{TURN_END}" if system else ""
    return f"{opening}{USER} {question}{TURN_END}{ASSISTANT}"


def base_prompt(question: str) -> str:
    """One question as the base model reads it; the answer follows with a leading space."""
    return f"Question: {question}\nAnswer:"
