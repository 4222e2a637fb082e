"""A conversation as a file: JSON with the source of every word, or Markdown."""

import json
from pathlib import Path
from typing import Any

from baco.cli.chat.conversation import Answer, Conversation, Turn
from baco.files import write_output
from baco.outputs import params
from baco.text.answer_text import merge_pieces


def save(conversation: Conversation, path: Path) -> None:
    """Write a conversation, whole or not at all; an earlier file of that name is replaced.

    Args:
        conversation: what to write.
        path: gets JSON where it ends in ``.json``, Markdown otherwise.

    Raises:
        BacoError: the file cannot be written.
    """
    if path.suffix.lower() == ".json":
        text = json.dumps(_record(conversation), ensure_ascii=False, indent=1) + "\n"
    else:
        text = _markdown(conversation)
    write_output(path, text)


def _record(conversation: Conversation) -> dict[str, Any]:
    """``messages`` in the form of ``baco generate --jsonl`` and OpenAI's API, and every turn.

    A turn's ``messages``, ``router``, ``seed`` and ``params`` give its answers again.
    """
    system = conversation.settings["system"]
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in conversation.turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer.text})
    return {
        "pair": conversation.baco.pair.name,
        "messages": messages,
        "turns": [_turn(conversation, turn) for turn in conversation.turns],
    }


def _turn(conversation: Conversation, turn: Turn) -> dict[str, Any]:
    return {
        "question": turn.question,
        "router": turn.router,
        "seed": turn.settings["seed"],
        "params": params(conversation.baco.pair, turn.settings)
        | ({} if turn.date is None else {"date": turn.date}),
        "chosen": turn.chosen,
        "samples": [_sample(answer) for answer in turn.answers],
    }


def _sample(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "pieces": [
            {"source": source, "text": text} for text, source in merge_pieces(answer.pieces)
        ],
    }


def _markdown(conversation: Conversation) -> str:
    parts = [f"# A conversation with {conversation.baco.pair.name}"]
    if conversation.settings["system"] is not None:
        parts.append(f"*System:* {conversation.settings['system']}")
    for turn in conversation.turns:
        parts.append("> " + turn.question.replace("\n", "\n> "))
        parts.append(turn.answer.text)
        parts.append(f"*{turn.router}, seed {turn.settings['seed']}*")
    return "\n\n".join(parts) + "\n"
