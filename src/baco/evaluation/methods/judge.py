"""Judge: an external language model picks the source of every word.

It is slow: a reference, not a recommendation. Any server with an OpenAI-compatible chat endpoint
can be the judge. It is called only at word boundaries where the two models would write different
tokens; where they agree, and where its reply names neither model, aligned writes. A run is as
reproducible as the judge's replies.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from baco.engine.draft import Draft
from baco.engine.sequence import SequenceState
from baco.engine.verify import Choice, Verifier, choose_by
from baco.errors import BacoError
from baco.evaluation.methods.custom_mixing import decode
from baco.evaluation.methods.method import Answer, Draw, Family, Grid
from baco.evaluation.records import Prompt, Setting
from baco.routing.signals import Signals

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.models.pair import Pair

AT_ONCE = 16  # concurrent requests
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
        model: its name at the endpoint.
    """

    url: str | None = None
    model: str | None = None
    name: str = "judge"
    family: Family = "BACo"
    needs_one_tokenizer: ClassVar[bool] = True
    not_served: ClassVar[str] = "it asks another model at every word, which a sweep does"
    help: str = (
        "an external model picks the source of every word (needs --judge-url, --judge-model)"
    )

    def settings(self, grid: Grid) -> list[Setting]:  # noqa: ARG002
        """The one setting of this judge.

        Raises:
            BacoError: no address or no model; or the address, which is written into the run, holds
                secrets.
        """
        if self.url is None or self.model is None:
            raise BacoError(
                "the judge is a model behind an address: give --judge-url, --judge-model"
            )
        address = urlsplit(self.url)
        if address.username or address.password or address.query:
            raise BacoError(
                "--judge-url holds a password or a query: give the address alone, and the key in "
                f"{KEY}"
            )
        options = {"kind": self.name, "url": self.url, "model": self.model}
        return [Setting("Judge", f"Judge by {self.model}", None, options)]

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        sampling = dict(draw.sampling) | {"n": draw.n, "seed": draw.seed}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            choice = _JudgeChoice(baco.pair, setting.options, prompts, pool)
            rows = decode(baco, prompts, sampling, setting.label, choice.choose)
        return [[Answer.of(completion) for completion in row] for row in rows]


class _JudgeChoice:
    """Picks the source of the next word of every row by the judge's replies."""

    def __init__(
        self,
        pair: "Pair",
        judge: Mapping[str, Any],
        prompts: Sequence[Prompt],
        pool: ThreadPoolExecutor,
    ) -> None:
        self.pair, self.model, self.prompts, self._pool = pair, judge["model"], prompts, pool
        self._client = _client(judge["url"])
        self._replies: dict[str, bool] = {}  # samples with equal beginnings share a reply

    def choose(self, verifier: Verifier, draft: Draft, signals: Signals) -> Choice:
        """See :data:`baco.engine.verify.Choose`; nothing is drafted, so a row has one position."""
        state = verifier.boundary_state(draft, signals)
        boundary = state.is_boundary(draft.active)
        if draft.batch.thinking is not None:
            boundary = boundary & ~draft.batch.thinking
        wanted = self._wanted(draft.batch.rows, signals, boundary)
        return choose_by(verifier, draft, signals, replace(state, router_choice=wanted))

    def _wanted(self, rows: Sequence[SequenceState], signals: Signals, boundary: Tensor) -> Tensor:
        """Where the judge picks the base, bool [B]; it is called at boundaries only."""
        differ = (boundary & (signals.top_base != signals.top_aligned)).tolist()
        tops = zip(signals.top_base.tolist(), signals.top_aligned.tolist(), strict=True)
        questions = [
            self._question(row, *top) if differs else None
            for row, top, differs in zip(rows, tops, differ, strict=True)
        ]
        new = [q for q in dict.fromkeys(questions) if q is not None and q not in self._replies]
        self._replies.update(zip(new, self._pool.map(self._ask, new), strict=True))
        picks = [question is not None and self._replies[question] for question in questions]
        return torch.tensor(picks, device=boundary.device)

    def _question(self, row: SequenceState, base: int, aligned: int) -> str:
        return QUESTION.format(
            question=self.prompts[row.request.index].text,
            answer=self.pair.tokenizer.decode(row.tokens[row.num_thinking :]),
            base=self.pair.tokenizer.decode([base]),
            aligned=self.pair.tokenizer.decode([aligned]),
        )

    def _ask(self, question: str) -> bool:
        """Whether the judge picks the base model."""
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
        text = (reply.choices[0].message.content or "").lower()
        return "base" in text and "aligned" not in text


def _client(url: str) -> Any:
    """A client of the endpoint, with the key from the environment, if any."""
    try:
        from openai import OpenAI
    except ImportError as error:
        raise BacoError("the judge needs a library: pip install 'baco[evaluation]'") from error
    return OpenAI(base_url=url, api_key=os.environ.get(KEY, "none"), timeout=TIMEOUT, max_retries=4)
