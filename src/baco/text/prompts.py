"""One conversation, two renderings: the aligned model's chat template and the base's plain text.

The answer's tokens are shared, so both renderings must end such that its first token is spelled
alike: where the aligned prompt ends in white space the answer starts without a space, and the base
prompt then ends in a new line; elsewhere both go on with a space.

A conversation that ends with an assistant's message is continued: both renderings end with the text
of that message, in the same tokens, and without an end mark.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from baco.errors import BacoError, UnfitPairError, prompt_too_long
from baco.text.digest import chat_digest, text_digest
from baco.text.encoder import Encoder, Limit, no_pause, tokenizing
from baco.text.templates import Rendering, Template, TemplateFailedError, today
from baco.text.utf8 import check_characters

Message = Mapping[str, str]
Conversation = str | Sequence[Message]
# By the name of the model that a limit is for; no limit for a model that is not read.
Limits = Mapping[str, Limit]
NO_LIMITS: Limits = MappingProxyType({})

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
RESERVED = (
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "answer_lead",
    "chat_template",
    "tokenize",
)

# Marks the end of a message that is continued. Templates trim white space around a message, not
# inside it, so the mark also keeps the spaces that the message ends with.
_END_OF_PREFILL = "qoendofprefillqo"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as each half reads it.

    Attributes:
        base_ids, aligned_ids: token ids.
        base_text, aligned_text: what they spell.
        digest: what its draws are keyed by, see :mod:`baco.text.digest`.
        joining_space: a space that the answer begins with only joins it to the prompt, and is no
            part of its text. Never so where the prompt ends with the beginning of the answer.
        date: the day that a template took for today, as YYYY-MM-DD; None where none asked.
    """

    base_ids: tuple[int, ...]
    aligned_ids: tuple[int, ...]
    base_text: str
    aligned_text: str
    digest: bytes
    joining_space: bool = False
    date: str | None = None


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
    for index, message in enumerate(messages):
        check_characters(f"message {index}", message["content"])
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
        try:
            json.dumps(given[name])
        except (TypeError, ValueError, RecursionError) as error:
            raise BacoError(
                f"template argument {name} is {type(given[name]).__name__}: give what JSON can hold"
            ) from error
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
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise BacoError(
            f"template {template!r} is neither Jinja text nor a readable file ({reason})"
        ) from error


@dataclass
class Renderer:
    """Renders conversations for both halves of a pair.

    Attributes:
        base_tokenizer, aligned_tokenizer: each half's own.
        base_template: Jinja text, or a file of it, over ``messages``, ``add_generation_prompt`` and
            ``answer_lead`` (empty, or a new line where the answer is to start without a space); or
            SAME_PROMPT. A file is replaced by its text.
        aligned_template: the same in place of the aligned tokenizer's chat template; or the name of
            one of its templates, where it has several.
        chat_options: further variables for the templates, such as ``enable_thinking``.
        date: what templates take for today, as YYYY-MM-DD; None: the day of each rendering.
        turn_opening: what the base model writes where it goes on with the next turn by itself.
    """

    base_tokenizer: Any
    aligned_tokenizer: Any
    base_template: str = BASE_TEMPLATE
    aligned_template: str | None = None
    chat_options: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    turn_opening: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.encoders: dict[str, Encoder] = {
            "base": Encoder(self.base_tokenizer),
            "aligned": Encoder(self.aligned_tokenizer),
        }
        self._chat: Template | None = None
        if self.aligned_template is not None:
            given = self.aligned_template
            named = _by_name(getattr(self.aligned_tokenizer, "chat_template", None))
            source = named[given] if given in named else _chat_source(given)
            self.aligned_template = source
            self._chat = Template("chat", source, f"the chat template {_shown(given)}")
        if self.base_template != SAME_PROMPT:
            given, self.base_template = self.base_template, template_source(self.base_template)
            self._base = Template("base", self.base_template, f"the base template {_shown(given)}")
            self.turn_opening = self._find_turn_opening()

    def set_defaults(self, date: str | None, template_args: Mapping[str, Any]) -> None:
        """Take a date and template arguments for every prompt from now on, over the pair's own."""
        self.date = date
        self.chat_options = {**self.chat_options, **template_args}

    def render(
        self,
        prompt: Conversation,
        system: str | None = None,
        *,
        template_args: Mapping[str, Any] | None = None,
        continue_final: bool | None = None,
        day: str | None = None,
        limits: Limits = NO_LIMITS,
        pause: Callable[[], None] = no_pause,
    ) -> Prompt:
        """Both renderings of a conversation.

        Args:
            prompt, system, continue_final: see :func:`conversation`.
            template_args: further variables for the templates, over the pair's own.
            day: what templates take for today, as YYYY-MM-DD, in place of ``date``.
            limits: how long the prompt may be, as the models read it.
            pause: called between pieces of work; what it raises ends the rendering.

        Raises:
            BacoError: bad messages, a missing chat template, a template that fails, a prompt that
                is too long.
        """
        messages = conversation(prompt, system, continue_final)
        digest = chat_digest(messages)
        variables = {**self.chat_options, **check_template_args(template_args or {})}
        one = _Rendering(self, variables, day or self.date or today())
        begun = ""
        if messages[-1]["role"] == "assistant":
            aligned_head, begun = one.before_prefill(messages)
            messages = messages[:-1]
        else:
            aligned_head = one.aligned(messages)

        def encode(name: str, head: str, *, special: bool) -> tuple[int, ...]:
            # The prefill is tokenised by itself, as its tokens would have come from the models: so
            # they are the same in both prompts.
            encoder, limit = self.encoders[name], limits.get(name)
            ids = encoder.encode(head, special=special, limit=limit, pause=pause)
            return ids + _encode_inside(encoder, begun, limit, pause, len(ids))

        aligned_ids = encode("aligned", aligned_head, special=False)
        base_ids, base_head, spaced = aligned_ids, aligned_head, aligned_head[-1].isspace()
        if self.base_template != SAME_PROMPT:
            joined = not spaced and (not begun or begun[0].isspace())
            base_head = one.base(messages, "" if joined else "\n")
            base_ids = encode("base", base_head, special=True)
        return Prompt(
            base_ids,
            aligned_ids,
            base_head + begun,
            aligned_head + begun,
            digest,
            joining_space=not begun and not spaced,
            date=one.day if one.reads_clock else None,
        )

    def raw(
        self,
        text: str | tuple[int, ...],
        *,
        limits: Limits = NO_LIMITS,
        pause: Callable[[], None] = no_pause,
    ) -> Prompt:
        """A text to be continued, or its token ids, read by both halves as it is.

        Args:
            text: what to continue.
            limits, pause: as for `render`.

        Raises:
            BacoError: an empty text, or one that is too long.
        """
        aligned_ids, base_ids = (
            self.read(text, name, limits=limits, pause=pause) for name in ("aligned", "base")
        )
        if isinstance(text, str):
            spelled = text
        else:
            with tokenizing(self.aligned_tokenizer):
                spelled = self.aligned_tokenizer.decode(text)
        return Prompt(base_ids, aligned_ids, spelled, spelled, text_digest(spelled))

    def read(
        self,
        text: str | tuple[int, ...],
        name: str,
        *,
        limits: Limits = NO_LIMITS,
        pause: Callable[[], None] = no_pause,
    ) -> tuple[int, ...]:
        """Token ids of a text, or ids as they are, for ``base`` or ``aligned``; else as `raw`."""
        if not text:
            raise BacoError("the prompt is empty: give some text to continue")
        limit = limits.get(name)
        if isinstance(text, str):
            check_characters("the prompt", text)
            return self.encoders[name].encode(text, special=True, limit=limit, pause=pause)
        if limit is not None and len(text) > limit.most:
            raise prompt_too_long(len(text), limit.name, limit.context)
        return text

    def chat_template(self) -> Template:
        """The aligned model's; errors as for `chat_template_of`."""
        # Read anew each time: a tokenizer's template may be set after it is loaded.
        return self._chat or chat_template_of(self.aligned_tokenizer)

    def _find_turn_opening(self) -> str | None:
        """What the template puts between an answer and the next question, such as ``Question:``."""
        answer, question = "ANSWERED", "ASKED"
        turns = [
            {"role": "user", "content": "FIRST"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": question},
        ]
        text = _Rendering(self, dict(self.chat_options), self.date or today()).base(turns, "")
        between = text.partition(answer)[2].partition(question)[0].strip()
        return between.splitlines()[-1].strip() if between else None


def chat_template_of(tokenizer: Any) -> Template:
    """A tokenizer's own chat template.

    Raises:
        UnfitPairError: it has none.
        BacoError: it has several, of which none is the default.
    """
    own = getattr(tokenizer, "chat_template", None)
    model = getattr(tokenizer, "name_or_path", "") or "the aligned model"
    if own is None:
        raise UnfitPairError(
            f"{model} has no chat template: give one with chat_template (--chat-template), "
            "as Jinja text or a file"
        )
    if not isinstance(own, str):
        own = _default_template(_by_name(own), model)
    return Template("chat", own, f"the chat template of {model}")


def render_chat(
    template: Template,
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    day: str,
    ask: bool,
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> Rendering:
    """Messages as a chat template writes them for its tokenizer.

    Args:
        template: the tokenizer's own or another.
        tokenizer: whose special tokens the template may name.
        messages: of a conversation.
        day: what the template takes for today.
        ask: end with what asks for an answer.
        variables: further ones.

    Raises:
        BacoError: the template fails.
    """
    special = getattr(tokenizer, "special_tokens_map", {})
    # `transformers` sets these two as well, and templates count on it.
    unset = {"tools": None, "documents": None}
    given = {"messages": messages, "add_generation_prompt": ask}
    return template.render({**unset, **special, **variables, **given}, day)


def _chat_source(template: str) -> str:
    """A chat template itself, or the file that holds it, or several by name in JSON.

    Raises:
        BacoError: a file that cannot be read, or of several templates none is the default.
    """
    source = template_source(template)
    try:
        several = json.loads(source)
    except (ValueError, RecursionError):
        return source
    named = _by_name(several)
    return _default_template(named, template) if named else source


def _by_name(several: Any) -> Mapping[str, str]:
    """Templates by name, as files and tokenizers keep them; nothing where these are none."""
    if isinstance(several, Mapping):
        return several
    try:
        return {entry["name"]: entry["template"] for entry in several}
    except (TypeError, KeyError):
        return {}


def _default_template(named: Mapping[str, str], place: str) -> str:
    if "default" not in named:
        raise BacoError(
            f"{place} has several chat templates ({', '.join(map(str, named))}) and none is the "
            "default: choose one with chat_template (--chat-template)"
        )
    return named["default"]


def _shown(template: str) -> str:
    """What to call a template that a user gave: its file or name, if it is that."""
    return "given" if "{" in template or "\n" in template else template


@dataclass
class _Rendering:
    """One conversation being rendered.

    Attributes:
        renderer: whose templates are rendered,
        variables: with these,
        day: on this day.
        reads_clock: a template has asked for the day.
    """

    renderer: Renderer
    variables: Mapping[str, Any]
    day: str
    reads_clock: bool = False

    def aligned(self, messages: Sequence[Message], *, ask: bool = True) -> str:
        """What the aligned model reads; ``ask`` for an answer at its end.

        Raises:
            BacoError: there is no template, or it fails.
        """
        template, tokenizer = self.renderer.chat_template(), self.renderer.aligned_tokenizer
        made = render_chat(
            template, tokenizer, messages, day=self.day, ask=ask, variables=self.variables
        )
        return self._text(made)

    def base(self, messages: Sequence[Message], answer_lead: str) -> str:
        """What the base model reads.

        Raises:
            BacoError: the template fails.
        """
        variables = {**self.variables, "messages": messages, "add_generation_prompt": True}
        variables |= {"answer_lead": answer_lead}
        return self._text(self.renderer._base.render(variables, self.day))

    def _text(self, made: Rendering) -> str:
        self.reads_clock |= made.reads_clock
        return made.text

    def before_prefill(self, messages: Sequence[Message]) -> tuple[str, str]:
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
        asking = found = None
        with contextlib.suppress(TemplateFailedError):
            asking = self.aligned(before)
        text = ""
        try:
            text, found, _ = self.aligned(marked, ask=False).rpartition(_END_OF_PREFILL)
        except TemplateFailedError:
            if asking is None:
                raise
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
                f"{self.renderer.chat_template().name} can neither ask for an answer to this "
                "conversation nor continue its last message: end it with a user's message"
            )
        return asking, prefill if asking[-1:].isspace() else " " + prefill


def _encode_inside(
    encoder: Encoder, text: str, limit: Limit | None, pause: Callable[[], None], before: int
) -> tuple[int, ...]:
    """Token ids of a text that goes on with another, of ``before`` tokens.

    SentencePiece puts a space before a text; so it is tokenised behind a line break, which is then
    taken off. Where the break melts into a token of the text, there is no such space.
    """
    if not text:
        return ()
    line_break = encoder.encode("\n", special=False)
    before -= len(line_break)
    ids = encoder.encode("\n" + text, special=False, limit=limit, pause=pause, before=before)
    if ids[: len(line_break)] == line_break:
        return ids[len(line_break) :]
    return encoder.encode(text, special=False, pause=pause)
