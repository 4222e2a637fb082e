"""One conversation, two renderings: the aligned model's chat template and the base's plain text.

The answer's tokens are shared, so both renderings must end such that its first token is spelled
alike: where the aligned prompt ends in white space the answer starts without a space, and the base
prompt then ends in a new line; elsewhere both go on with a space.

A conversation that ends with an assistant's message is continued: both renderings end with the text
of that message, in the same tokens, and without an end mark.
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


# Variables of a template that its caller does not choose.
RESERVED = ("messages", "add_generation_prompt", "continue_final_message", "answer_lead")

# Marks the end of a message that is continued. Templates trim white space around a message, not
# inside it, so the mark also keeps the spaces that the message ends with.
_END_OF_PREFILL = "qoendofprefillqo"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as each half reads it.

    Attributes:
        base_ids, aligned_ids: token ids.
        base_text, aligned_text: what they spell.
        joining_space: a space that the answer begins with only joins it to the prompt, and is no
            part of its text. Never so where the prompt ends with the beginning of the answer.
    """

    base_ids: tuple[int, ...]
    aligned_ids: tuple[int, ...]
    base_text: str
    aligned_text: str
    joining_space: bool = False


def conversation(
    prompt: Conversation, system: str | None = None, continue_final: bool | None = None
) -> list[dict[str, str]]:
    """Check a prompt at the door and bring it to a list of messages.

    Args:
        prompt: a text, or messages. A last assistant's message is continued; one without text is
            left out.
        system: the text of a system message to put first.
        continue_final: None, or whether the caller expects the last message to be continued.

    Raises:
        BacoError: an empty prompt, a message without text, an unknown role, a last message that is
            neither a user's nor an assistant's, or one that ``continue_final`` does not expect.
    """
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    else:
        messages = [_message(index, message) for index, message in enumerate(prompt)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    last = messages[-1]["role"] if messages else None
    if last not in ("user", "assistant"):
        raise BacoError(
            "the conversation must end with a message of role 'user', "
            "or of role 'assistant' to be continued"
        )
    if continue_final is not None and continue_final != (last == "assistant"):
        raise BacoError(
            "continue_final_message is true: end the conversation with a message of role "
            "'assistant'"
            if continue_final
            else "continue_final_message is false, but a last message of role 'assistant' is "
            "continued: end the conversation with a message of role 'user'"
        )
    while messages and messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages.pop()  # it says nothing yet
    questions = [message["content"] for message in messages if message["role"] == "user"]
    if not questions:
        raise BacoError("the conversation has no message of role 'user': give one to answer")
    if not questions[-1].strip():
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


def check_template_args(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Further variables for templates, if they are that.

    Raises:
        BacoError: a name that is no variable's, or one whose value BACo itself gives.
    """
    for name in given:
        if not isinstance(name, str) or not name.isidentifier():
            raise BacoError(
                f"template argument {name!r}: give the name of a variable, as in enable_thinking"
            )
        if name in RESERVED:
            raise BacoError(f"template argument {name}: BACo sets this one itself; leave it out")
    return given


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
        chat_options: further variables for the templates, such as ``enable_thinking``.
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

    def render(
        self,
        prompt: Conversation,
        system: str | None = None,
        *,
        template_args: Mapping[str, Any] | None = None,
        continue_final: bool | None = None,
    ) -> Prompt:
        """Both renderings of a conversation.

        Args:
            prompt, system, continue_final: see :func:`conversation`.
            template_args: further variables for the templates, over the pair's own.

        Raises:
            BacoError: bad messages, a missing chat template, a template that fails.
        """
        messages = conversation(prompt, system, continue_final)
        variables = {**self.chat_options, **check_template_args(template_args or {})}
        if messages[-1]["role"] == "assistant":
            return self._continued(messages, variables)
        aligned_text = self._aligned_text(messages, variables)
        aligned_ids = _encode(self.aligned_tokenizer, aligned_text, special=False)
        spaced = aligned_text[-1:].isspace()
        if self.base_template == SAME_PROMPT:
            return Prompt(
                aligned_ids, aligned_ids, aligned_text, aligned_text, joining_space=not spaced
            )
        base_text = self._base_text(messages, "\n" if spaced else "", variables)
        base_ids = _encode(self.base_tokenizer, base_text, special=True)
        return Prompt(base_ids, aligned_ids, base_text, aligned_text, joining_space=not spaced)

    def _continued(self, messages: list[dict[str, str]], variables: dict[str, Any]) -> Prompt:
        """Both renderings of a conversation that ends with the beginning of the answer."""
        head, begun = self._before_prefill(messages, variables)
        # The prefill is tokenised by itself, as its tokens would have come from the models: so they
        # are the same in both prompts.
        aligned_ids = (
            *_encode(self.aligned_tokenizer, head, special=False),
            *_encode_inside(self.aligned_tokenizer, begun),
        )
        if self.base_template == SAME_PROMPT:
            return Prompt(aligned_ids, aligned_ids, head + begun, head + begun)
        lead = "" if begun[0].isspace() and not head[-1:].isspace() else "\n"
        base_head = self._base_text(messages[:-1], lead, variables)
        base_ids = (
            *_encode(self.base_tokenizer, base_head, special=True),
            *_encode_inside(self.base_tokenizer, begun),
        )
        return Prompt(base_ids, aligned_ids, base_head + begun, head + begun)

    def _before_prefill(
        self, messages: list[dict[str, str]], variables: dict[str, Any]
    ) -> tuple[str, str]:
        """The aligned prompt in two parts, split in front of the last message.

        The space that joins an answer to its prompt, where there is one, comes with the second.
        The template's own rendering of the message is taken, cut behind its text. Some templates
        refuse a last assistant's message, change its text, or drop the system message beside it;
        then the message follows what asks for an answer.

        Raises:
            BacoError: a template that fails at both.
        """
        *before, last = messages
        prefill = last["content"]
        marked = [*before, {**last, "content": prefill + _END_OF_PREFILL}]
        try:
            asking = self._aligned_text(before, variables)
        except UnfitPairError:
            raise
        except BacoError:
            asking = None
        try:
            text, found, _ = self._aligned_text(marked, variables, ask=False).rpartition(
                _END_OF_PREFILL
            )
        except BacoError:
            if asking is None:
                raise
            found = text = ""
        kept = prefill if text.endswith(prefill) else prefill.lstrip()
        usable = found and text.endswith(kept)
        if usable and asking is not None:
            question = next(m["content"] for m in reversed(before) if m["role"] == "user").strip()
            asked = asking.rfind(question)
            usable = asked < 0 or text.startswith(asking[: asked + len(question)])
        if usable:
            head = text[: len(text) - len(kept)]
            ordinary = head[:-1] if asking is None else asking
            joined = head.endswith(" ") and not ordinary[-1:].isspace()
            return (head[:-1], " " + prefill) if joined else (head, prefill)
        if asking is None:
            raise BacoError(
                "the aligned model's chat template can neither be asked for an answer to this "
                "conversation nor continue its last message"
            )
        return asking, prefill if asking[-1:].isspace() else " " + prefill

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

    def _aligned_text(
        self, messages: list[dict[str, str]], variables: dict[str, Any], *, ask: bool = True
    ) -> str:
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
                add_generation_prompt=ask,
                **variables,
            )
        except jinja2.TemplateError as error:
            raise BacoError(
                f"the aligned model's chat template refuses this conversation: {error}"
            ) from error
        return text

    def _base_text(
        self, messages: list[dict[str, str]], answer_lead: str, variables: dict[str, Any]
    ) -> str:
        try:
            return self._base.render(
                {
                    **variables,
                    "messages": messages,
                    "add_generation_prompt": True,
                    "answer_lead": answer_lead,
                }
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
        text = self._base_text(turns, "", dict(self.chat_options))
        between = text.partition(answer)[2].partition(question)[0].strip()
        return between.splitlines()[-1].strip() if between else None


def _encode(tokenizer: Any, text: str, *, special: bool) -> tuple[int, ...]:
    """Token ids of a text; ``special`` lets the tokenizer open it with its own mark (BOS)."""
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    end = getattr(tokenizer, "eos_token_id", None)
    if special and len(ids) > 1 and ids[-1] == end:
        ids = ids[:-1]  # some tokenizers close a text too: then there is nothing to continue
    return tuple(ids)


def _encode_inside(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of a text that goes on with another.

    SentencePiece puts a space before a text; so it is tokenised behind a line break, which is then
    taken off. Where the break melts into a token of the text, there is no such space.
    """
    line_break = _encode(tokenizer, "\n", special=False)
    ids = _encode(tokenizer, "\n" + text, special=False)
    if ids[: len(line_break)] == line_break:
        return ids[len(line_break) :]
    return _encode(tokenizer, text, special=False)
