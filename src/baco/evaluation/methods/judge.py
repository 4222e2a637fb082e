"""Judge: an external language model is asked, word by word, which of the two should speak.

Slow: a reference, not a recommendation. Any server with an OpenAI-compatible chat endpoint will do.
It is asked only where a router would be and the two models are about to say different things; where
they agree, and where its reply names neither model, aligned speaks. Its replies are its own: a run
is as reproducible as they are.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from baco.errors import BacoError
from baco.evaluation.methods.both import Row, decode, finished
from baco.evaluation.methods.protocol import Answer, Draw, Grid
from baco.evaluation.records import Prompt, Setting, Source
from baco.routing.routers import BOTH
from baco.routing.select import NOTHING, select
from baco.routing.signals import Signals

if TYPE_CHECKING:
    from baco import Baco
    from baco.pair import Pair

AT_ONCE = 16  # requests under way
TIMEOUT = 60.0  # seconds
KEY = "OPENAI_API_KEY"
INSTRUCTIONS = (
    "Two writers take turns at one answer, word by word. The base writer is full of ideas and "
    "careless; the aligned writer is careful and always says the same. The answer is to be good "
    "and yet unlike what everybody would say. Given the question, the answer so far and what each "
    "would write next, say who goes on. Reply with one word: base or aligned."
)
QUESTION = (
    "Question: {question}\nAnswer so far: {answer}\nbase would write: {base!r}\n"
    "aligned would write: {aligned!r}\nWho goes on, base or aligned?"
)


@dataclass(frozen=True, slots=True)
class Judge:
    """Judge routing.

    Attributes:
        url: of the endpoint, such as ``http://localhost:8000/v1``.
        model: what the endpoint calls its model.
    """

    url: str | None = None
    model: str | None = None
    name: str = "judge"
    help: str = (
        "an external model picks the source of every word (needs --judge-url, --judge-model)"
    )

    def settings(self, grid: Grid) -> list[Setting]:  # noqa: ARG002
        """The one setting of this judge.

        Raises:
            BacoError: nobody said where it is, or who.
        """
        if self.url is None or self.model is None:
            raise BacoError(
                "the judge is a model behind an address: give --judge-url, --judge-model"
            )
        options = {"kind": self.name, "url": self.url, "model": self.model}
        return [Setting("Judge", f"Judge by {self.model}", None, options)]

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        sampling = dict(draw.sampling) | {"n": draw.n, "seed": draw.seed}
        params = baco.pair.defaults.updated(sampling)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            asking = _Asking(baco.pair, setting.options["url"], setting.options["model"], pool)
            rows = decode(baco, prompts, params, asking)
        return [[finished(row, sourced=True) for row in samples] for samples in rows]


@dataclass(frozen=True, slots=True)
class _Told:
    """A router that has its answers already."""

    wanted: Tensor
    spelling: str = "Judge"
    only: Source | None = None
    reads: frozenset[Source] = BOTH

    def __call__(self, signals: Signals) -> Tensor:  # noqa: ARG002
        return self.wanted


class _Asking:
    """Picks the source of the next token of every row by what the judge says."""

    def __init__(self, pair: "Pair", url: str, model: str, pool: ThreadPoolExecutor) -> None:
        self.pair, self.model, self._pool = pair, model, pool
        self._client = _client(url)
        self._vocabulary = pair.vocabulary.to(pair.aligned.device)
        self._banned = pair.banned.to(pair.aligned.device)
        self._said: dict[str, bool] = {}  # samples that begin alike ask alike

    def __call__(self, base: Tensor, aligned: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        device = base.device
        last = [row.tokens[-1] if row.tokens else NOTHING for row in rows]
        previous = torch.tensor(last, device=device)
        active = torch.tensor(
            [row.sources[-1:] == ["base"] for row in rows], dtype=torch.bool, device=device
        )
        wanted = self._wanted(
            base, aligned, rows, self._boundaries(base, aligned, previous, active)
        )
        return self._select(base, aligned, previous, active, wanted)

    def _boundaries(
        self, base: Tensor, aligned: Tensor, previous: Tensor, active: Tensor
    ) -> list[bool]:
        """Where a router is listened to: there, and only there, one that says no is followed."""
        _, source = self._select(base, aligned, previous, active, ~active)
        boundaries: list[bool] = (source != active).tolist()
        return boundaries

    def _select(
        self, base: Tensor, aligned: Tensor, previous: Tensor, active: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor]:
        return select(
            base,
            aligned,
            previous,
            active,
            router=_Told(wanted),
            vocabulary=self._vocabulary,
            banned=self._banned,
        )

    def _wanted(
        self, base: Tensor, aligned: Tensor, rows: Sequence[Row], boundaries: Sequence[bool]
    ) -> Tensor:
        tops = torch.stack((base.argmax(dim=-1), aligned.argmax(dim=-1)), dim=1).tolist()
        asked: list[str | None] = []
        for row, (by_base, by_aligned), boundary in zip(rows, tops, boundaries, strict=True):
            differ = boundary and by_base != by_aligned
            asked.append(self._question(row, by_base, by_aligned) if differ else None)
        new = [q for q in dict.fromkeys(asked) if q is not None and q not in self._said]
        self._said.update(zip(new, self._pool.map(self._ask, new), strict=True))
        told = [question is not None and self._said[question] for question in asked]
        return torch.tensor(told, device=base.device)

    def _question(self, row: Row, by_base: int, by_aligned: int) -> str:
        return QUESTION.format(
            question=row.prompt.text,
            answer=self.pair.tokenizer.decode(row.tokens),
            base=self.pair.tokenizer.decode([by_base]),
            aligned=self.pair.tokenizer.decode([by_aligned]),
        )

    def _ask(self, question: str) -> bool:
        """Does the judge want the base model to speak?"""
        from openai import OpenAIError

        try:
            reply = self._client.chat.completions.create(
                model=self.model,
                messages=[
                    {"role": "system", "content": INSTRUCTIONS},
                    {"role": "user", "content": question},
                ],
                temperature=0,
                max_tokens=8,
            )
        except OpenAIError as error:
            raise BacoError(f"the judge at {self._client.base_url} failed: {error}") from error
        said = (reply.choices[0].message.content or "").lower()
        return "base" in said and "aligned" not in said


def _client(url: str) -> Any:
    """A client of the endpoint; its key is the environment's, if it needs one."""
    try:
        from openai import OpenAI
    except ImportError as error:
        raise BacoError("the judge needs a library: pip install 'baco[evaluation]'") from error
    return OpenAI(base_url=url, api_key=os.environ.get(KEY, "none"), timeout=TIMEOUT, max_retries=4)
