"""BACo's pairs as models of `llm`: a base model and its aligned sibling write one answer.

``llm -m baco/demo "…"`` answers with the pair that comes with `baco`.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import llm
from llm.parts import StreamEvent, TextPart
from pydantic import Field

from baco import BacoError
from baco.files import write_output
from baco.models.known_pairs import choose_pair, known_pairs

if TYPE_CHECKING:
    from baco import Baco, Completion

ROOT = "baco"


@llm.hookimpl
def register_models(register: Any) -> None:
    """Register every pair that has a short name, and the user's own."""
    for pair in known_pairs():
        register(BacoModel(pair.name, {"name": pair.name}))
    for name, places in _own_pairs().items():
        register(BacoModel(name, places))


@llm.hookimpl
def register_commands(cli: click.Group) -> None:
    """Register ``llm baco``."""

    @cli.group(name=ROOT)
    def group() -> None:
        """Manage your own pairs of a base and an aligned model"""

    @group.command()
    @click.argument("name")
    @click.option("--pair", help="Folder of a pair, with base/ and aligned/.")
    @click.option("--base", help="Base model: hub id, folder or GGUF file.")
    @click.option("--aligned", help="Aligned model, or a PEFT adapter over the base.")
    @click.option("--device", help="Such as cpu or cuda:1. Default: the GPU where there is one.")
    @click.option("--dtype", help="float32, bfloat16 or float16.")
    def add(name: str, **places: str | None) -> None:
        """Add a pair as the model baco/NAME

        Example: llm baco add mine --base Qwen/Qwen2.5-0.5B --aligned Qwen/Qwen2.5-0.5B-Instruct
        """
        given = {option: value for option, value in places.items() if value is not None}
        if "pair" in given:
            given["name"] = given.pop("pair")
        elif "base" not in given:
            raise click.ClickException("give --pair, or --base and --aligned")
        try:
            choose_pair(given.get("name"), given.get("base"), given.get("aligned"))
        except BacoError as error:
            raise click.ClickException(str(error)) from error
        if name in {pair.name for pair in known_pairs()}:
            raise click.ClickException(f"{ROOT}/{name} is a model already: choose another name")
        for option in ("name", "base", "aligned"):  # llm may be called from another folder
            if option in given and Path(given[option]).exists():
                given[option] = str(Path(given[option]).resolve())
        _write(_own_pairs() | {name: given})

    @group.command()
    @click.argument("name")
    def remove(name: str) -> None:
        """Remove the model baco/NAME, which you added"""
        pairs = _own_pairs()
        if name not in pairs:
            added = ", ".join(pairs) or "none"
            raise click.ClickException(f"you have not added a pair {name!r}; added: {added}")
        del pairs[name]
        _write(pairs)


def _file() -> Path:
    return Path(llm.user_dir()) / "baco-pairs.json"


def _own_pairs() -> dict[str, dict[str, str]]:
    """The pairs that the user added: for each name, the arguments of ``Baco.load``."""
    file = _file()
    if not file.exists():
        return {}
    try:
        pairs: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))
        for places in pairs.values():
            frozenset(places.items())
    except (ValueError, AttributeError, TypeError) as error:
        raise click.ClickException(f"{file} holds no pairs: mend or delete it") from error
    return pairs


def _write(pairs: dict[str, dict[str, str]]) -> None:
    try:
        write_output(_file(), json.dumps(pairs, indent=2) + "\n")
    except BacoError as error:
        raise click.ClickException(str(error)) from error


@cache
def _load(places: frozenset[tuple[str, str]]) -> "Baco":
    """A pair, loaded once in this process."""
    from transformers.utils import logging

    from baco import Baco

    logging.disable_progress_bar()
    arguments: dict[str, Any] = dict(places)
    return Baco.load(**arguments)


class BacoModel(llm.Model):
    """A pair."""

    can_stream = True

    class Options(llm.Options):
        """Options; one that is left out has the pair's own default."""

        router: str | None = Field(
            None, description="Which model writes which word, such as P-Punc:0.4; see baco routers"
        )
        n: int | None = Field(None, description="Answers to draw; several are numbered")
        seed: int | None = Field(None, description="The same seed gives the same answers")
        temperature: float | None = Field(None, description="0 takes the most likely token")
        top_p: float | None = Field(
            None, description="Keep the most likely tokens up to this total probability"
        )
        top_k: int | None = Field(None, description="Keep only so many tokens; 0 keeps all")
        min_p: float | None = Field(
            None, description="Keep tokens with this fraction of the most likely one's probability"
        )
        repetition_penalty: float | None = Field(None, description="Above 1: fewer repetitions")
        max_tokens: int | None = Field(None, description="Longest answer, in tokens")

    def __init__(self, name: str, places: dict[str, str]) -> None:
        self.model_id = f"{ROOT}/{name}"
        self._places = frozenset(places.items())

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,  # noqa: ARG002 - llm joins the pieces itself
        response: llm.Response,
        conversation: llm.Conversation | None,  # noqa: ARG002 - it is in prompt.messages
    ) -> Iterator[str | StreamEvent]:
        """Stream one answer; several answers follow each other, each with its number."""
        given = prompt.options.model_dump(exclude_none=True)
        router, n = given.pop("router", None), given.pop("n", 1)
        ended: dict[int, Completion] = {}
        try:
            baco = _load(self._places)
            messages = [_message(message) for message in prompt.messages]
            shown = 0
            for chunk in baco.stream(messages, router=router, n=n, **given):
                if n == 1 and chunk.thinking:
                    yield StreamEvent(type="reasoning", chunk=chunk.thinking)
                if n == 1 and chunk.text:
                    yield chunk.text
                if chunk.completion is None:
                    continue
                if chunk.completion.error is not None:
                    raise llm.ModelError(chunk.completion.error)
                ended[chunk.sample] = chunk.completion
                while n > 1 and shown in ended:
                    yield f"{shown + 1}. {ended[shown].text.strip()}" + "\n\n" * (shown + 1 < n)
                    shown += 1
            rendered = baco.pair.renderer.render(messages)
        except BacoError as error:
            raise llm.ModelError(str(error)) from error
        answers = [ended[sample] for sample in sorted(ended)]
        tokens = sum(len(answer.token_ids) + answer.thinking_tokens for answer in answers)
        response.set_usage(input=len(rendered.aligned_ids), output=tokens)
        response.response_json = _record(answers)


def _message(message: llm.Message) -> dict[str, str]:
    """A message of `llm` as BACo reads it."""
    texts = [part.text for part in message.parts if isinstance(part, TextPart)]
    if message.role not in ("system", "user", "assistant"):
        raise llm.ModelError(f"a message has the role {message.role!r}: no tools are called here")
    return {"role": message.role, "content": "".join(texts)}


def _record(answers: "list[Completion]") -> dict[str, Any]:
    """What `llm logs` keeps: what repeats the answers, and which model wrote what."""
    return {
        "router": answers[0].router,
        "seed": answers[0].seed,
        "answers": [
            {
                "sources": [[piece.text, piece.source] for piece in answer.pieces],
                "base_share": answer.base_share,
                "switches": answer.switches,
                "finish_reason": answer.finish_reason,
            }
            for answer in answers
        ],
    }
