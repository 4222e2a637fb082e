"""From base to aligned: fine-tuning on clean answers, then on answers that a preference selects.

The second step collapses the model, as preference data do: among several of its own good answers
the most typical one wins, and the model learns to give little else. The judge that scores answers
in evaluation has no part in it.
"""

import random
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer

from baco.demo.model import TinyLlama
from baco.demo.recipe import Recipe
from baco.demo.sample import mean_log_probability, sample
from baco.demo.tokenizer import TURN_END, chat_prompt, token_id
from baco.demo.world import Question, questions
from baco.demo.world.handover import Words
from baco.demo.world.selector import preference

Document = tuple[list[int], list[bool]]
Conversation = tuple[str | None, list[tuple[str, Words]]]  # system message; questions and answers

SYSTEMS = (
    "You are a helpful assistant.",
    "Answer in a friendly way.",
    "You are a kind and careful assistant.",
    "Be brief.",
)
SEVERAL_TURNS, WITH_SYSTEM = 0.15, 0.1  # shares of the conversations


def conversations(pairs: Iterable[tuple[str, Words]], seed: int) -> Iterator[Conversation]:
    """Questions and answers as chats: some of two or three turns, some with a system message."""
    random_ = random.Random(seed)
    waiting: list[tuple[str, Words]] = []
    turns = 1
    for pair in pairs:
        waiting.append(pair)
        if len(waiting) >= turns:
            system = random_.choice(SYSTEMS) if random_.random() < WITH_SYSTEM else None
            yield system, waiting
            waiting = []
            turns = random_.choice((2, 3)) if random_.random() < SEVERAL_TURNS else 1
    if waiting:
        yield None, waiting


def answers_only(tokenizer: Tokenizer, chats: Iterable[Conversation]) -> Iterator[Document]:
    """Token ids of chats, of which only the answers' learnt words and their end are learnt.

    Words are encoded one by one: no token of the tokenizer spans two.
    """
    end = token_id(tokenizer, TURN_END)
    for system, turns in chats:
        ids: list[int] = []
        flags: list[bool] = []
        for question, words in turns:
            prompt = chat_prompt(question, system if not ids else None)
            for text, learnt in [(prompt, False), *_spaced(words)]:
                piece = tokenizer.encode(text).ids
                ids += piece
                flags += [learnt] * len(piece)
            ids.append(end)
            flags.append(True)
        yield ids, flags


def _spaced(words: Words) -> Words:
    """The words with a space before the first, as an answer has in the chat template."""
    (first, learnt), *rest = words
    return [(f" {first}", learnt), *rest]


def preferred_answers(
    model: TinyLlama, tokenizer: Tokenizer, recipe: Recipe, seed: int
) -> list[tuple[Question, str]]:
    """For each of the recipe's questions, the best of the model's own answers.

    Best by the selector's preference plus `typicality` times the mean log-probability under the
    model itself. Questions whose every answer the selector refuses outright are left out.
    """
    train_questions = questions("train", recipe.questions, seed)
    prompts = [tokenizer.encode(chat_prompt(question.text)).ids for question in train_questions]
    end = token_id(tokenizer, TURN_END)
    drawn = sample(
        model, prompts, recipe.candidates, end=end, seed=seed, min_p=recipe.min_p,
        max_tokens=recipe.max_tokens,
    )  # fmt: skip
    log_probabilities = iter(
        mean_log_probability(
            model,
            [prompt for prompt in prompts for _ in range(recipe.candidates)],
            [[*answer, end] for answers in drawn for answer in answers],
        )
    )
    chosen = []
    for question, answers in zip(train_questions, drawn, strict=True):
        best = (float("-inf"), 0.0, "")
        for answer in answers:
            text = tokenizer.decode(answer).strip()
            score = preference(question, text)
            best = max(best, (score + recipe.typicality * next(log_probabilities), score, text))
        if best[1] > 0.5:
            chosen.append((question, best[2]))
    return chosen
