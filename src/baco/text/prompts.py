"""One conversation, two renderings: the aligned model's chat template and the base model's text.

The answer's tokens are shared, so its first token must be spelled alike after both renderings.
Where the aligned prompt ends in white space, the answer starts without a space, and the base prompt
ends in a new line. Elsewhere the answer starts with a space in both.

A last assistant message is continued: both renderings end with its text, in the same tokens, and
without an end mark.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from baco.errors import BacoError, UnfitPairError, prompt_too_long
from baco.text.encoder import Encoder, Limit, no_pause, tokenizing
from baco.text.invalid_characters import check_characters
from baco.text.templates import Rendering, Template, TemplateFailedError, today
from baco.text.thinking import ThinkingMarks, ThinkingStart, find_marks, is_turned_off

Message = Mapping[str, str]
Conversation = str | Sequence[Message]
# By model; a model that does not read the prompt has no limit.
Limits = Mapping[str, Limit]
NO_LIMITS: Limits = MappingProxyType({})

ROLES = ("system", "user", "assistant")

BASE_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "system" -%}{{ message.content + "\\n\\n" }}
{%- elif message.role == "user" -%}{{ "Question: " + message.content + "\\n" }}
{%- else -%}{{ "Answer:" + (answer_lead or " ") + message.content + "\\n\\n" }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "Answer:" + answer_lead }}{%- endif -%}
"""

# As ``base_template``: the base model reads the aligned model's prompt.
SAME_PROMPT = "aligned"


# Template variables that callers cannot set.
RESERVED = (
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "answer_lead",
    "chat_template",
    "tokenize",
)

# Marks the end of a message that is continued. Templates trim white space around a message but not
# inside it, so the mark also keeps the message's trailing spaces.
_END_OF_PREFILL = "qoendofprefillqo"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as each model reads it.

    Attributes:
        base_ids, aligned_ids: token ids.
        base_text, aligned_text: their text.
        digest: keys its draws, see `chat_digest`, `text_digest` and `ids_digest`.
        thinking: whether it begins the aligned model's thinking, or the model can begin it; None
            where it cannot think.
        joining_space: whether a space at the start of the answer only joins it to the prompt and is
            not part of its text. False where a message is continued.
        date: the day that a template wrote into it, as YYYY-MM-DD; None where none did.
    """

    base_ids: tuple[int, ...]
    aligned_ids: tuple[int, ...]
    base_text: str
    aligned_text: str
    digest: bytes
    thinking: ThinkingStart | None = None
    joining_space: bool = False
    date: str | None = None


def conversation(
    prompt: Conversation, system: str | None = None, continue_final: bool | None = None
) -> list[dict[str, str]]:
    """Check a prompt and convert it to a list of messages.

    Args:
        prompt: a text, or messages. A last assistant message is continued, or dropped if it is
            empty.
        system: the text of a system message to put first.
        continue_final: whether the caller expects a message to be continued; None for either.

    Raises:
        BacoError: the prompt is empty, a message has no text or an unknown role, the last message
            is neither a user's nor an assistant's, or it contradicts ``continue_final``.
    """
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    elif not isinstance(prompt, Iterable):
        raise BacoError(f"the prompt is {prompt!r}: give a text, or a list of messages")
    else:
        messages = [_message(index, message) for index, message in enumerate(prompt)]
    if system is not None:
        if not isinstance(system, str):
            raise BacoError(f"system is {system!r}: give the text of a system message")
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
        messages.pop()  # nothing to continue
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


def openai_message(message: Any) -> Any:
    """A message of OpenAI's API for `conversation`, which checks it.

    Parts of text are joined, ``developer`` is another word for ``system``, and an assistant's
    message may be null.

    Raises:
        BacoError: a part is not a text.
    """
    if not isinstance(message, Mapping):
        return message
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        content = "".join(map(_text_of_part, content))
    if content is None and role == "assistant":
        content = ""
    return {"role": "system" if role == "developer" else role, "content": content}


def _text_of_part(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise BacoError("a message has a part that is not text: the models read text alone")
    return text


def check_template_args(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Check further variables for templates.

    Raises:
        BacoError: a name is not a variable's, or one that BACo sets, or a value is not JSON.
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
    """The Jinja text of a template: itself, or the text of the file that it names.

    Raises:
        BacoError: the file cannot be read.
    """
    if "{" in template or "\n" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise BacoError(
            f"template {template!r} is neither Jinja text nor a readable file ({reason})"
        ) from error


@dataclass
class Renderer:
    """Renders conversations for both models of a pair.

    Attributes:
        base_tokenizer, aligned_tokenizer: the models' own.
        base_template: Jinja text, or a file with it, or SAME_PROMPT. Its variables are
            ``messages``, ``add_generation_prompt`` and ``answer_lead`` (a new line where the answer
            must start without a space, else empty). A file is replaced by its text.
        aligned_template: replaces the aligned tokenizer's chat template: Jinja text, a file, or the
            name of one of the tokenizer's templates.
        chat_options: further variables for the templates, such as ``enable_thinking``.
        date: the date for templates, as YYYY-MM-DD; None for the day of each rendering.
        turn_opening: what the base model writes when it opens the next turn by itself.
        marks: enclose the aligned model's thinking; None for a model that does not think.
    """

    base_tokenizer: Any
    aligned_tokenizer: Any
    base_template: str = BASE_TEMPLATE
    aligned_template: str | None = None
    chat_options: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    turn_opening: str | None = field(init=False, default=None)
    marks: ThinkingMarks | None = field(init=False)

    def __post_init__(self) -> None:
        self.encoders: dict[str, Encoder] = {
            "base": Encoder(self.base_tokenizer),
            "aligned": Encoder(self.aligned_tokenizer),
        }
        self.marks = find_marks(self.aligned_tokenizer)
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
        """Set the date and template arguments of all later prompts, over the pair's own."""
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
        """Render a conversation for both models.

        Args:
            prompt, system, continue_final: see :func:`conversation`.
            template_args: further variables for the templates, over the pair's own.
            day: the date for templates, as YYYY-MM-DD, in place of ``date``.
            limits: of the prompt's length, by model.
            pause: called between pieces of work; an exception that it raises ends the rendering.

        Raises:
            BacoError: the messages are wrong, the chat template is missing, a template fails, or
                the prompt is too long.
        """
        messages = conversation(prompt, system, continue_final)
        digest = chat_digest(messages)
        variables = {**self.chat_options, **check_template_args(template_args or {})}
        rendering = _Rendering(self, variables, day or self.date or today())
        prefill, thinking = "", None
        if messages[-1]["role"] == "assistant":
            aligned_head, prefill = rendering.split_prefill(messages)
            messages = messages[:-1]
        else:
            aligned_head, thinking = rendering.asking(messages)

        def encode(name: str, head: str, *, special: bool) -> tuple[int, ...]:
            # The prefill is tokenised by itself, so that it has the same tokens in both prompts.
            encoder, limit = self.encoders[name], limits.get(name)
            ids = encoder.encode(head, special=special, limit=limit, pause=pause)
            return ids + _encode_continuation(encoder, prefill, limit, pause, len(ids))

        aligned_ids = encode("aligned", aligned_head, special=False)
        base_ids, base_head = aligned_ids, aligned_head
        # An answer that follows a thinking begins on a line of its own.
        spaced = thinking is not None or aligned_head[-1].isspace()
        if self.base_template == SAME_PROMPT:
            if thinking == "begun":
                assert self.marks is not None
                base_head += self.marks.closing
                base_ids = encode("base", base_head, special=False)
        else:
            joined = not spaced and (not prefill or prefill[0].isspace())
            base_head = rendering.base(messages, "" if joined else "\n")
            base_ids = encode("base", base_head, special=True)
        return Prompt(
            base_ids,
            aligned_ids,
            base_head + prefill,
            aligned_head + prefill,
            digest,
            thinking,
            joining_space=not prefill and not spaced,
            date=rendering.day if rendering.reads_clock else None,
        )

    def raw(
        self,
        text: str | tuple[int, ...],
        *,
        limits: Limits = NO_LIMITS,
        pause: Callable[[], None] = no_pause,
    ) -> Prompt:
        """A text, or token ids, that both models continue as they are.

        Args:
            text: the text or the token ids.
            limits, pause: as for `render`.

        Raises:
            BacoError: the text is empty or too long.
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
        """The same for one model, ``base`` or ``aligned``: the token ids that it reads."""
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
        """The aligned model's chat template; errors as for `chat_template_of`."""
        # Not cached: a tokenizer's template can be set after it is loaded.
        return self._chat or chat_template_of(self.aligned_tokenizer)

    def _find_turn_opening(self) -> str | None:
        """What the base template writes between an answer and the next question: ``Question:``."""
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
        BacoError: it has several, and none is the default.
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
    """Render messages with a chat template.

    Args:
        template: the tokenizer's own or another.
        tokenizer: its special tokens are variables of the template.
        messages: of a conversation.
        day: the date for the template.
        ask: add the generation prompt.
        variables: further variables.

    Raises:
        BacoError: the template fails.
    """
    special = getattr(tokenizer, "special_tokens_map", {})
    # `transformers` sets these two as well, and templates rely on it.
    unset = {"tools": None, "documents": None}
    own = {"messages": messages, "add_generation_prompt": ask}
    return template.render({**unset, **special, **variables, **own}, day)


def _chat_source(template: str) -> str:
    """The Jinja text of a chat template: itself, the text of a file, or the default of several
    templates by name in JSON.

    Raises:
        BacoError: the file cannot be read, or none of several templates is the default.
    """
    source = template_source(template)
    try:
        several = json.loads(source)
    except (ValueError, RecursionError):
        return source
    named = _by_name(several)
    return _default_template(named, template) if named else source


def _by_name(several: Any) -> Mapping[str, str]:
    """Templates by name, in one of the forms of files and tokenizers; empty for anything else."""
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
    """The name of a user's template in messages: its file or name."""
    return "given" if "{" in template or "\n" in template else template


@dataclass
class _Rendering:
    """One conversation while it is rendered.

    Attributes:
        renderer: has the templates.
        variables: further variables for them.
        day: the date for them.
        reads_clock: whether a template has read the date.
    """

    renderer: Renderer
    variables: Mapping[str, Any]
    day: str
    reads_clock: bool = False

    def aligned(self, messages: Sequence[Message], *, ask: bool = True) -> str:
        """The aligned model's prompt; with ``ask``, it ends with the generation prompt.

        Raises:
            BacoError: there is no template, or it fails.
        """
        template, tokenizer = self.renderer.chat_template(), self.renderer.aligned_tokenizer
        result = render_chat(
            template, tokenizer, messages, day=self.day, ask=ask, variables=self.variables
        )
        return self._text(result)

    def asking(self, messages: Sequence[Message]) -> tuple[str, ThinkingStart | None]:
        """The aligned model's prompt for an answer, and how it leaves the model's thinking.

        A template can begin the thinking although it is turned off. Then the prompt ends it.

        Raises:
            BacoError: there is no template, or it fails.
        """
        text, marks = self.aligned(messages), self.renderer.marks
        if marks is None or marks.end not in self.renderer.chat_template().source:
            return text, None
        start = marks.start(text)
        if start == "begun" and is_turned_off(self.variables):
            return text + marks.closing, None
        return text, start

    def base(self, messages: Sequence[Message], answer_lead: str) -> str:
        """The base model's prompt.

        Raises:
            BacoError: the template fails.
        """
        if (marks := self.renderer.marks) is not None:
            messages = [
                {**message, "content": marks.without_thinking(message["content"])}
                if message["role"] == "assistant"
                else message
                for message in messages
            ]
        variables = {**self.variables, "messages": messages, "add_generation_prompt": True}
        variables |= {"answer_lead": answer_lead}
        return self._text(self.renderer._base.render(variables, self.day))

    def _text(self, result: Rendering) -> str:
        self.reads_clock |= result.reads_clock
        return result.text

    def split_prefill(self, messages: Sequence[Message]) -> tuple[str, str]:
        """The aligned prompt in two parts: before the last message, and the message.

        A space that joins an answer to its prompt belongs to the second part. The template renders
        the message, and the rendering is cut after the message's text. Some templates refuse a last
        assistant message, change its text, or drop the system message beside it. For these, the
        message is appended to the generation prompt.

        Raises:
            BacoError: the template fails at both.
        """
        *before, last = messages
        prefill = last["content"]
        marked = [*before, {**last, "content": prefill + _END_OF_PREFILL}]
        asking = end = None
        with contextlib.suppress(TemplateFailedError):
            asking = self.aligned(before)
        text = ""
        try:
            text, end, _ = self.aligned(marked, ask=False).rpartition(_END_OF_PREFILL)
        except TemplateFailedError:
            if asking is None:
                raise
        kept = prefill if text.endswith(prefill) else prefill.lstrip()
        usable = end and text.endswith(kept)
        if usable and asking is not None:
            question = next(m["content"] for m in reversed(before) if m["role"] == "user").strip()
            at = asking.rfind(question)
            usable = at < 0 or text.startswith(asking[: at + len(question)])
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


def _encode_continuation(
    encoder: Encoder, text: str, limit: Limit | None, pause: Callable[[], None], before: int
) -> tuple[int, ...]:
    """Token ids of a text that continues another one of ``before`` tokens.

    SentencePiece adds a space before a text. So the text is tokenised after a line break, whose
    tokens are then removed. Where the break merges with the text into one token, no space is added.
    """
    if not text:
        return ()
    line_break = encoder.encode("\n", special=False)
    before -= len(line_break)
    ids = encoder.encode("\n" + text, special=False, limit=limit, pause=pause, before=before)
    if ids[: len(line_break)] == line_break:
        return ids[len(line_break) :]
    return encoder.encode(text, special=False, pause=pause)


def chat_digest(messages: Sequence[Mapping[str, str]]) -> bytes:
    """The digest of a conversation, which keys the noise of its draws.

    It covers the role and the text of every message, system message and prefill included, but not
    dates and template arguments.
    """
    roles_and_texts = json.dumps([[message["role"], message["content"]] for message in messages])
    return _digest(roles_and_texts.encode())


def text_digest(text: str) -> bytes:
    """The digest of a raw text: of its UTF-8 bytes."""
    return _digest(text.encode("utf-8", "surrogatepass"))


def ids_digest(ids: Iterable[int]) -> bytes:
    """The digest of token ids whose text is not available."""
    return _digest(b"".join(token.to_bytes(8, "little") for token in ids))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
