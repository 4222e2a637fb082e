"""Answers that another program gave, as a method of a run: `baco sweep -m generations.jsonl`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from baco.errors import BacoError
from baco.evaluation.answer_files import SUFFIXES, read_answers
from baco.evaluation.methods.method import Answer, Draw, Family, token_count
from baco.evaluation.records import Prompt, Setting
from baco.text.prompts import chat_digest

if TYPE_CHECKING:
    from baco.api import Baco


@dataclass(frozen=True, slots=True)
class AnswersOfFile:
    """The first n answers of a file to every prompt; nothing is drawn.

    The method has the file's name without its suffix, or its folder's where the file is named as
    those that NoveltyBench publishes: `google/gemma-2-2b-it/generations.jsonl`. Answers have no
    sources. A prompt is found by its conversation, or by its last turn if the file has this once.
    """

    name: str = "file"
    family: Family = "other"

    @staticmethod
    def names(spelling: str) -> bool:
        """Whether a method's spelling is the name of a file."""
        return Path(spelling).suffix.lower() in SUFFIXES

    def setting(self, spelling: str) -> Setting:
        """The one setting of a file; its content is part of the run's plan.

        Raises:
            BacoError: it cannot be read.
        """
        path = Path(spelling)
        read_answers(path)
        options = {"kind": self.name, "file": str(path.resolve()), "digest": _digest(path)}
        named = path.resolve().parent.name if path.stem == "generations" else path.stem
        return Setting(named, named, None, options)

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        path = Path(setting.options["file"])
        file = read_answers(path)
        if _digest(path) != setting.options["digest"]:
            raise BacoError(f"{path} has changed since the run began: sweep into another --out")
        by_conversation, by_text = dict[bytes, Sequence[str]](), dict[str, Sequence[str]]()
        for prompt, answers in zip(file.prompts, file.answers, strict=True):
            by_conversation[chat_digest(prompt.messages)] = answers
            # Two conversations may end alike; then the last turn alone names neither.
            by_text[prompt.text] = () if prompt.text in by_text else answers
        rows = []
        for prompt in prompts:
            digest = chat_digest(prompt.messages)
            answers = by_conversation.get(digest) or by_text.get(prompt.text, ())
            if len(answers) < draw.n:
                raise BacoError(
                    f"{path} has {len(answers)} answers to prompt {prompt.id!r}, and the run has "
                    f"{draw.n} to a prompt: give a file of this task, or a smaller -n"
                )
            own = answers[: draw.n]
            rows.append([Answer(text, token_count(baco, text), "stop") for text in own])
        return rows


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
