"""Models that think: how thinking is recognised, and its text.

An aligned model may write its thinking before its answer, between two marks such as ``<think>`` and
``</think>``. The marks are tokens of its own, added to its tokenizer, and its chat template handles
them. No list of models is needed.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from baco.text.detokenizer import Detokenizer
from baco.text.token_bytes import spell

# The marks that model families use.
MARKS = (
    ("<think>", "</think>"),  # Qwen3, DeepSeek R1, SmolLM3, GLM
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed OSS
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
# Template variables that turn thinking on and off.
SWITCHES = ("enable_thinking", "thinking")

# How a prompt leaves the thinking: it has begun it, or the model may begin it.
ThinkingStart = Literal["begun", "possible"]


@dataclass(frozen=True, slots=True)
class ThinkingTokens:
    """The tokens by which thinking is recognised in a sequence.

    Attributes:
        begin: the first token of the thinking; None where the prompt has begun it.
        end: ends the thinking.
        separators: tokens that can follow the end before the answer begins: line breaks, and
            special tokens that do not end an answer.
    """

    begin: int | None
    end: int
    separators: Collection[int]


@dataclass(frozen=True, slots=True)
class ThinkingMarks:
    """The marks that enclose a model's thinking.

    Attributes:
        begin, end: their texts.
        begin_id, end_id: their token ids.
        others: the texts of the tokenizer's special tokens. Some can follow the end.
    """

    begin: str
    end: str
    begin_id: int
    end_id: int
    others: tuple[str, ...] = ()

    def start(self, prompt: str) -> ThinkingStart | None:
        """How a prompt leaves the thinking: None where it has ended it, as templates do that turn
        it off.
        """
        while (shorter := prompt.rstrip()) and not shorter.endswith((self.begin, self.end)):
            last = next((mark for mark in self.others if shorter.endswith(mark)), None)
            if last is None:
                return "possible"
            prompt = shorter.removesuffix(last)
        return "begun" if shorter.endswith(self.begin) else None

    @property
    def closing(self) -> str:
        """Ends a thinking that a prompt has begun."""
        return f"\n{self.end}\n\n"

    def without_thinking(self, content: str) -> str:
        """The text of an earlier answer, without a thinking that a caller left in it."""
        _, mark, answer = content.rpartition(self.end)
        return answer.lstrip("\n") if mark else content


def find_marks(tokenizer: Any) -> ThinkingMarks | None:
    """The marks among a tokenizer's added tokens; None where it has none."""
    decoder = getattr(tokenizer, "added_tokens_decoder", {})  # not every kind of tokenizer has it
    added = {str(token): id_ for id_, token in decoder.items()}
    for begin, end in MARKS:
        if begin in added and end in added:
            others = {*tokenizer.all_special_tokens} - {begin, end, ""}
            return ThinkingMarks(begin, end, added[begin], added[end], tuple(sorted(others)))
    return None


def separators(tokenizer: Any, marks: ThinkingMarks, end_ids: Collection[int]) -> frozenset[int]:
    """See `ThinkingTokens.separators`."""
    breaks = {
        token.id
        for token in spell(tokenizer)
        if (token.special and token.id not in end_ids)
        or (not token.special and token.data.isspace() and token.data.endswith(b"\n"))
    }
    return frozenset(breaks - {marks.begin_id, marks.end_id})


def is_turned_off(variables: Mapping[str, Any]) -> bool:
    """Whether template variables turn thinking off."""
    return any(variables.get(name) is False for name in SWITCHES)


def switch_variables(thinking: bool | None) -> dict[str, Any]:
    """The template variables that turn thinking on or off; none where the template decides."""
    return {} if thinking is None else dict.fromkeys(SWITCHES, thinking)


@dataclass
class ThinkingText:
    """The text of one growing thinking, without its marks and white space around it.

    Attributes:
        text: what is final.
    """

    tokenizer: Any
    marks: ThinkingMarks
    text: str = ""
    _held: str = ""  # white space that is dropped if nothing follows it
    _ended: bool = False
    _detokenizer: Detokenizer = field(init=False)

    def __post_init__(self) -> None:
        self._detokenizer = Detokenizer(self.tokenizer)

    def push(self, token: int) -> None:
        """Add a token of the thinking, or of what encloses it."""
        if token == self.marks.end_id:
            self.close()
        elif token != self.marks.begin_id and not self._ended:
            self._add(self._detokenizer.push(token))

    def close(self) -> None:
        """End the text."""
        if not self._ended:
            self._ended = True
            self._add(self._detokenizer.close())

    def _add(self, texts: Collection[str]) -> None:
        new = self._held + "".join(texts)
        if not self.text:
            new = new.lstrip()
        final = new.rstrip()
        self.text, self._held = self.text + final, new[len(final) :]
