"""Trains the demo pair from a seed: text, tokenizer, base, aligned.

Every stage writes a file to the output folder's `work/`; a run that was stopped continues after the
last stage it finished. A folder with stages of another seed or recipe is refused.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers.utils.logging import disable_progress_bar

from baco.demo.align import answers_only, conversations, preferred_answers
from baco.demo.document_packing import batches, pack
from baco.demo.model import Shape, TinyLlama, to_llama
from baco.demo.optimiser import Optimiser
from baco.demo.recipe import Course, Recipe
from baco.demo.tokenizer import BASE_END, TURN_END, token_id, train_tokenizer, wrap
from baco.demo.world import Question, aligned_examples
from baco.demo.world.documents import base_corpus
from baco.demo.world.handover import Words, handed_over_examples, learnt
from baco.device import keep_memory
from baco.errors import BacoError
from baco.files import locked, replacing, write_atomic

Advance = Callable[[float], None]


def train(
    out: Path,
    seed: int = 0,
    progress: bool = True,
    recipe: Recipe | None = None,
) -> None:
    """Write a pair to `out` (`base/`, `aligned/`, `baco.json`).

    The same seed gives the same pair on the same machine and versions. With the shipped recipe it
    takes about 20 minutes on two cores. Raises `BacoError` if `out` holds another run's stages, or
    if another process trains into it.
    """
    recipe = recipe or Recipe()
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    with locked(work):
        _claim(work, seed, recipe)
        _train(out, work, seed, progress, recipe)


def _train(out: Path, work: Path, seed: int, progress: bool, recipe: Recipe) -> None:
    keep_memory()
    with _bar(progress) as stage:
        tokenizer = _tokenizer(work, seed, recipe, stage("text and tokenizer"))
        base = _base(work, tokenizer, seed, recipe, stage("base"))
        aligned = _aligned(work, tokenizer, base, seed, recipe, stage("aligned"))
        write_pair(out, tokenizer, base, aligned, recipe)


def write_pair(
    out: Path, tokenizer: Tokenizer, base: TinyLlama, aligned: TinyLlama, recipe: Recipe
) -> None:
    """Write both models in the hub's format; each folder is replaced as a whole."""
    disable_progress_bar()  # for writing one small file
    for name, model in (("base", base), ("aligned", aligned)):
        chat = name == "aligned"
        end = token_id(tokenizer, TURN_END if chat else BASE_END)
        begin = token_id(tokenizer, BASE_END)
        folder = Path(tempfile.mkdtemp(dir=out))
        folder.chmod(0o755)
        to_llama(model, end=end, begin=begin, pad=begin).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config["dtype"] = "float32"  # stored as float16; float32 is fast on CPUs
        write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
        wrap(tokenizer, context=recipe.context, chat=chat).save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)
        shutil.rmtree(out / name, ignore_errors=True)
        folder.rename(out / name)
    sampling = {"min_p": recipe.min_p, "max_tokens": recipe.max_tokens}
    config = {"name": "demo", "dtype": "float32", "sampling": sampling}
    write_atomic(out / "baco.json", json.dumps(config, indent=2) + "\n")


def fit(
    model: TinyLlama,
    rows: tuple[torch.Tensor, torch.Tensor],
    course: Course,
    seed: int,
    advance: Advance,
) -> float:
    """Train in place; returns the mean loss (nats a token) of the last tenth of the steps."""
    optimiser = Optimiser(model, course.steps, course.rate, course.fine)
    losses = []
    for inputs, targets in batches(rows, course.batch, course.steps, seed):
        learnt_positions = targets >= 0
        hidden = model(inputs)
        loss = F.cross_entropy(model.logits(hidden[learnt_positions]), targets[learnt_positions])
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        advance(1 / course.steps)
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def _tokenizer(work: Path, seed: int, recipe: Recipe, advance: Advance) -> Tokenizer:
    path = work / "tokenizer.json"
    if not path.exists():
        texts = base_corpus(recipe.documents // 4, seed)
        write_atomic(path, train_tokenizer(texts, recipe.vocabulary).to_str())
    advance(1.0)
    return Tokenizer.from_file(str(path))


def _base(
    work: Path, tokenizer: Tokenizer, seed: int, recipe: Recipe, advance: Advance
) -> TinyLlama:
    shape = Shape(
        tokenizer.get_vocab_size(), recipe.hidden, recipe.layers, recipe.heads, recipe.inner,
        recipe.context,
    )  # fmt: skip
    model = TinyLlama(shape, seed)
    if _restore(model, work / "base.pt"):
        advance(1.0)
        return model
    end = token_id(tokenizer, BASE_END)

    def documents() -> Iterator[tuple[list[int], list[bool]]]:
        for document in base_corpus(recipe.documents, seed):
            ids = [*tokenizer.encode(document).ids, end]
            yield ids, [True] * len(ids)

    rows = pack(documents(), recipe.width, end)
    fit(model, rows, recipe.base, seed, lambda part: advance(part * 0.75))
    loss = fit(model, rows, recipe.settling, seed + 1, lambda part: advance(part * 0.25))
    _save(model, work / "base.pt", loss)
    return model


def _aligned(
    work: Path, tokenizer: Tokenizer, base: TinyLlama, seed: int, recipe: Recipe, advance: Advance
) -> TinyLlama:
    model = TinyLlama(base.shape, seed)
    if _restore(model, work / "aligned.pt"):
        advance(1.0)
        return model
    if not _restore(model, work / "tuned.pt"):
        model.load_state_dict(base.state_dict())
        own = (
            (question, learnt(text)) for question, text in aligned_examples(recipe.examples, seed)
        )
        handed = handed_over_examples(recipe.handed, seed)
        rows = _rows(tokenizer, [*own, *handed], recipe, seed)
        loss = fit(model, rows, recipe.tuning, seed, lambda part: advance(part * 0.5))
        _save(model, work / "tuned.pt", loss)
    chosen = preferred_answers(model, tokenizer, recipe, seed)
    advance(0.25)
    loss = float("nan")
    if chosen:  # a model trained for seconds gives no answer that is preferred
        own = ((question, learnt(text)) for question, text in chosen)
        handed = handed_over_examples(2 * len(chosen), seed + 1, peak=1.0)
        rows = _rows(tokenizer, [*own, *handed], recipe, seed)
        loss = fit(model, rows, recipe.preferring, seed, lambda part: advance(part * 0.25))
    _save(model, work / "aligned.pt", loss)
    return model


def _rows(
    tokenizer: Tokenizer, examples: list[tuple[Question, Words]], recipe: Recipe, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Training rows of chats about the examples, shuffled."""
    random.Random(seed).shuffle(examples)
    chats = conversations(((question.text, words) for question, words in examples), seed)
    end = token_id(tokenizer, TURN_END)
    return pack(answers_only(tokenizer, chats), recipe.width, end)


def _claim(work: Path, seed: int, recipe: Recipe) -> None:
    """Record seed and recipe in `work`, or check that it has the same ones."""
    claim = json.dumps({"seed": seed, "recipe": asdict(recipe)}, indent=2) + "\n"
    path = work / "run.json"
    if path.exists() and path.read_text() != claim:
        raise BacoError(
            f"{work} holds the stages of another seed or recipe; expected those of seed {seed}: "
            "choose another --out, or remove that folder"
        )
    write_atomic(path, claim)


def _restore(model: TinyLlama, path: Path) -> bool:
    if not path.exists():
        return False
    model.load_state_dict(torch.load(path, weights_only=True)["weights"])
    return True


def _save(model: TinyLlama, path: Path, loss: float) -> None:
    with replacing(path) as partial:
        torch.save({"weights": model.state_dict(), "loss": loss}, partial)


@contextmanager
def _bar(shown: bool) -> Iterator[Callable[[str], Advance]]:
    """A progress bar; calling the yielded function begins a stage, whose parts sum to one."""
    columns = (TextColumn("{task.description:>20}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not shown) as progress:

        def stage(name: str) -> Advance:
            task: TaskID = progress.add_task(name, total=1.0)
            return lambda part: progress.advance(task, part)

        yield stage
