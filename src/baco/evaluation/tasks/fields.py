"""From a row of a data set to a prompt, by the names of its columns."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from baco.errors import BacoError
from baco.evaluation.records import Prompt
from baco.evaluation.tasks.rows import Row
from baco.text.prompts import ROLES, conversation


@dataclass(frozen=True, slots=True)
class Fields:
    """Names of columns, and how they become a prompt.

    Attributes:
        id: column of the prompt's id; a row without one has its number as id.
        prompt: column of its text.
        messages: column of a conversation instead of a text; its last answer is left out.
        first_of: column of a list whose first entry is the text, instead of ``prompt``.
        template: the question, with ``{prompt}`` in place of the text.
        category: column by which tables are split.
        paraphrases: column of other wordings.
        reference: columns that the verifier needs.
        least_turns: the least number of questions in a conversation; others are left out.
        skip_empty: leave out rows without a text.
    """

    id: str = "id"
    prompt: str = "prompt"
    messages: str = "messages"
    first_of: str | None = None
    template: str = "{prompt}"
    category: str = "category"
    paraphrases: str = "paraphrases"
    reference: tuple[str, ...] = ()
    least_turns: int = 1
    skip_empty: bool = False

    def prompts(self, rows: Iterator[Row], limit: int | None, place: str) -> tuple[Prompt, ...]:
        """The first `limit` prompts of the rows.

        Raises:
            BacoError: a row without a text, an invalid conversation, a repeated id, or no prompt.
        """
        prompts = tuple(islice(self._all(rows), limit))
        if not prompts:
            raise BacoError(f'{place} holds no prompt: give lines such as {{"prompt": "…"}}')
        seen: set[str] = set()
        for prompt in prompts:
            if prompt.id in seen:
                raise BacoError(f"{place}: the id {prompt.id!r} comes twice: ids must be unique")
            seen.add(prompt.id)
        return prompts

    def _all(self, rows: Iterator[Row]) -> Iterator[Prompt]:
        for row in rows:
            try:
                prompt = self._prompt(row)
            except BacoError as error:
                raise BacoError(f"{row.where}: {error}") from error
            if prompt is not None:
                yield prompt

    def _prompt(self, row: Row) -> Prompt | None:
        """The prompt of a row; None for a row that is left out."""
        if self.skip_empty and row.values.get(self.prompt) == "":
            return None
        dialogue = row.values.get(self.messages)
        messages = (
            self._dialogue(dialogue) if isinstance(dialogue, list) else self._question(row.values)
        )
        if sum(message["role"] == "user" for message in messages) < self.least_turns:
            return None
        id, category = row.values.get(self.id), row.values.get(self.category)
        paraphrases = row.values.get(self.paraphrases) or ()
        if not isinstance(paraphrases, list | tuple) or not all(
            isinstance(wording, str) for wording in paraphrases
        ):
            raise BacoError(f"{self.paraphrases!r} is not a list of texts")
        missing = [name for name in self.reference if name not in row.values]
        if missing:
            raise BacoError(f"column {missing[0]!r} is missing: this task's verifier needs it")
        return Prompt(
            id=str(row.number if id is None else id),
            messages=tuple(messages),
            category=None if category is None else str(category),
            reference=self._reference(row.values),
            paraphrases=tuple(self.template.replace("{prompt}", p) for p in paraphrases),
        )

    def _reference(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        own = values.get("reference")
        kept = dict(own) if isinstance(own, Mapping) else {}
        return kept | {name: values[name] for name in self.reference}

    def _question(self, values: Mapping[str, Any]) -> list[dict[str, str]]:
        text: Any = values.get(self.prompt)
        if self.first_of is not None and self.first_of in values:
            entries = values[self.first_of]
            text = entries[0] if isinstance(entries, list) and entries else entries
        if not isinstance(text, str):
            column = self.first_of or self.prompt
            raise BacoError(
                f'give a JSON object with "{column}" (text) or "{self.messages}" (a list)'
            )
        if not text.strip():
            raise BacoError("the prompt is empty: give some text to answer")
        return conversation(self.template.replace("{prompt}", text))

    def _dialogue(self, messages: list[Any]) -> list[dict[str, str]]:
        """The conversation up to its last question."""
        last = max(
            (
                i
                for i, m in enumerate(messages)
                if isinstance(m, Mapping) and m.get("role") == "user"
            ),
            default=None,
        )
        if last is None:
            raise BacoError(f"{self.messages!r} has no message of role 'user' ({', '.join(ROLES)})")
        return conversation(messages[: last + 1])
