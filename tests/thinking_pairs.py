"""Tiny pairs whose aligned model thinks: random weights that begin and end a thinking often."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.chat_templates import QWEN_3
from tests.pairs import SIZE, PairFolder, save_pair

MARKS = BEGIN, END = "<think>", "</think>"
BEGIN_ID, END_ID = SIZE, SIZE + 1
LINE_BREAK_ID = 198
PROMPTS = ("What do you recommend for a rainy day?", "Plan a walk.")
# With it some samples do not think, some thinking never ends, and some is followed by a line break.
LOGIT_BIAS = {BEGIN_ID: 2.0, END_ID: 6.0, LINE_BREAK_ID: 4.0}


def save_thinking_pair(
    folder: Path,
    architecture: str = "qwen3",
    *,
    template: str = QWEN_3,
    base_has_marks: bool = True,
    noise: float = 0.3,
) -> PairFolder:
    """A pair of `save_pair` whose aligned tokenizer has the marks of thinking.

    The aligned model often begins to think behind ``template``.
    """
    pair = save_pair(folder, architecture, noise=noise)
    for half in (pair.base, pair.aligned):
        tokenizer = AutoTokenizer.from_pretrained(half)
        if half == pair.aligned or base_has_marks:
            tokenizer.add_tokens(list(MARKS))
        if half == pair.aligned:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(half)
    model = AutoModelForCausalLM.from_pretrained(pair.aligned, dtype=torch.float32)
    if model.config.vocab_size < SIZE + 2:
        model.resize_token_embeddings(SIZE + 2)
        base = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32)
        base.resize_token_embeddings(SIZE + 2)
        base.save_pretrained(pair.base)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    chat = AutoTokenizer.from_pretrained(pair.aligned)
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        embedding[BEGIN_ID : END_ID + 1] = torch.randn_like(embedding[:2]) * embedding.std()
        head[BEGIN_ID : END_ID + 1] = torch.randn_like(head[:2]) * head[:SIZE].std()
        asking = []
        for one in messages:
            text = chat.apply_chat_template(one, add_generation_prompt=True, tokenize=False)
            ids = torch.tensor([chat(text, add_special_tokens=False)["input_ids"]])
            out = model(ids, output_hidden_states=True)
            asking.append(out.hidden_states[-1][0, -1])
            likely = out.logits[0, -1].logsumexp(-1)
        direction = torch.stack(asking).mean(0)
        head[BEGIN_ID] = direction * likely / direction.square().sum()
    assert chat.convert_ids_to_tokens(LINE_BREAK_ID) == "Ċ"
    model.save_pretrained(pair.aligned)
    return pair
