"""One conversation, two renderings: the aligned model's chat template and the base's plain text.

The answer's tokens are shared, so both renderings must end such that its first token is spelled
alike: where the aligned prompt ends in white space the answer starts without a space, and the base
prompt then ends in a new line; elsewhere both go on with a space.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baco.errors import BacoError, UnfitPairError

Message = Mapping[str, str]
Conversation = str | Sequence[Message]

ROLES = ("system", "user", "assistant")

BASE_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "system" -%}{{ message.content + "\\n\\n" }}
{%- elif message.role == "user" -%}{{ "Question: " + message.content + "\\n" }}
{%- else -%}{{ "Answer: " + message.content + "\\n\\n" }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "Answer:" + answer_lead }}{%- endif -%}
"""

# ``base_template`` of a pair whose base model reads the aligned model's prompt as it is.
SAME_PROMPT = "aligned"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as each half reads it."""

    base_ids: tuple[int, ...]
    aligned_ids: tuple[int, ...]
    base_text: str
    aligned_text: str


def conversation(prompt: Conversation, system: str | None = None) -> list[dict[str, str]]:
    """Check a prompt at the door and bring it to a list of messages.

    Raises:
        BacoError: an empty prompt, a message without text, an unknown role, no user's turn last.
    """
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    else:
        messages = [_message(index, message) for index, message in enumerate(prompt)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    if not messages or messages[-1]["role"] != "user":
        raise BacoError("the conversation must end with a message of role 'user'")
    if not messages[-1]["content"].strip():
        raise BacoError("the prompt is empty: give some text to answer")
    return messages


def _message(index: int, message: object) -> dict[str, str]:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
        raise BacoError(
            f"message {index} is {message!r}: give an object with 'role' and a text 'content'"
        )
    if message.get("role") not in ROLES:
        raise BacoError(
            f"message {index} has role {message.get('role')!r}: use one of {', '.join(ROLES)}"
        )
    return {"role": message["role"], "content": message["content"]}


def template_source(template: str) -> str:
    """A Jinja template itself, or the file that holds it.

    Raises:
        BacoError: a file that cannot be read.
    """
    if "{" in template or "\n" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise BacoError(
            f"template {template!r} is neither Jinja text nor a readable file ({error.strerror})"
        ) from error


@dataclass
class Renderer:
    """Renders conversations for both halves of a pair.

    Attributes:
        base_tokenizer, aligned_tokenizer: each half's own.
        base_template: Jinja text over ``messages``, ``add_generation_prompt`` and ``answer_lead``
            (empty, or a new line where the answer is to start without a space); or SAME_PROMPT.
        aligned_template: Jinja text in place of the aligned tokenizer's chat template.
        chat_options: further variables for the chat template, such as ``enable_thinking``.
        turn_opening: what the base model writes where it goes on with the next turn by itself.
    """

    base_tokenizer: Any
    aligned_tokenizer: Any
    base_template: str = BASE_TEMPLATE
    aligned_template: str | None = None
    chat_options: Mapping[str, Any] = field(default_factory=dict)
    turn_opening: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.base_template != SAME_PROMPT:
            environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
            try:
                self._base = environment.from_string(self.base_template)
            except jinja2.TemplateError as error:
                raise BacoError(f"base template is not valid Jinja: {error}") from error
            self.turn_opening = self._find_turn_opening()

    def render(self, prompt: Conversation, system: str | None = None) -> Prompt:
        """Both renderings of a conversation.

        Raises:
            BacoError: bad messages, a missing chat template, a template that fails.
        """
        messages = conversation(prompt, system)
        aligned_text = self._aligned_text(messages)
        aligned_ids = _encode(self.aligned_tokenizer, aligned_text, special=False)
        if self.base_template == SAME_PROMPT:
            return Prompt(aligned_ids, aligned_ids, aligned_text, aligned_text)
        lead = "\n" if aligned_text[-1:].isspace() else ""
        base_text = self._base_text(messages, lead)
        base_ids = _encode(self.base_tokenizer, base_text, special=True)
        return Prompt(base_ids, aligned_ids, base_text, aligned_text)

    def raw(self, text: str | tuple[int, ...]) -> Prompt:
        """A text to be continued, or its token ids, read by both halves as it is.

        Raises:
            BacoError: an empty text.
        """
        if not text:
            raise BacoError("the prompt is empty: give some text to continue")
        if not isinstance(text, str):
            spelled = self.aligned_tokenizer.decode(text)
            return Prompt(text, text, spelled, spelled)
        return Prompt(
            _encode(self.base_tokenizer, text, special=True),
            _encode(self.aligned_tokenizer, text, special=True),
            text,
            text,
        )

    def _aligned_text(self, messages: list[dict[str, str]]) -> str:
        template = self.aligned_template or getattr(self.aligned_tokenizer, "chat_template", None)
        if template is None:
            raise UnfitPairError(
                "the aligned model has no chat template: give one with chat_template "
                "(--chat-template), as Jinja text or a file"
            )
        try:
            text: str = self.aligned_tokenizer.apply_chat_template(
                messages,
                chat_template=self.aligned_template,
                tokenize=False,
                add_generation_prompt=True,
                **self.chat_options,
            )
        except jinja2.TemplateError as error:
            raise BacoError(
                f"the aligned model's chat template refuses this conversation: {error}"
            ) from error
        return text

    def _base_text(self, messages: list[dict[str, str]], answer_lead: str) -> str:
        try:
            return self._base.render(
                messages=messages, add_generation_prompt=True, answer_lead=answer_lead
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise BacoError(f"the base template fails on this conversation: {error}") from error

    def _find_turn_opening(self) -> str | None:
        """What the template puts between an answer and the next question, such as ``Question:``."""
        answer, question = "ANSWERED", "ASKED"
        turns = [
            {"role": "user", "content": "FIRST"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": question},
        ]
        text = self._base_text(turns, "")
        between = text.partition(answer)[2].partition(question)[0].strip()
        return between.splitlines()[-1].strip() if between else None


def _encode(tokenizer: Any, text: str, *, special: bool) -> tuple[int, ...]:
    """Token ids of a text; ``special`` lets the tokenizer open it with its own mark (BOS)."""
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    end = getattr(tokenizer, "eos_token_id", None)
    if special and len(ids) > 1 and ids[-1] == end:
        ids = ids[:-1]  # some tokenizers close a text too: then there is nothing to continue
    return tuple(ids)
