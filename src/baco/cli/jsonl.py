"""``baco generate --jsonl``: many prompts from a file, resumable and atomic.

Rows are appended to ``OUT.partial``, whose first line holds the settings; when the last prompt is
answered the rows move to ``OUT`` in one step. The same command goes on where a stopped one was, and
the finished file is the same byte for byte.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from baco import BacoError
from baco.cli.console import err, note
from baco.cli.record import record
from baco.prompts import conversation

if TYPE_CHECKING:
    from baco import Baco

# Answers that are decoded together between two writes.
ANSWERS_A_WRITE = 256


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The rows of a prompt file, checked.

    Raises:
        BacoError: a file that cannot be read or holds no prompt, or a line that is not right.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BacoError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    rows = [_row(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise BacoError(f'{path} holds no prompt: give lines such as {{"prompt": "…"}}')
    return rows


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not (
        isinstance(row.get("prompt"), str) or isinstance(row.get("messages"), list)
    ):
        raise BacoError(
            f'{path}, line {number}: give a JSON object with "prompt" (text) or "messages" (a list)'
        )
    try:
        conversation(_prompt(row))
    except BacoError as error:
        raise BacoError(f"{path}, line {number}: {error}") from error
    return row


def _prompt(row: dict[str, Any]) -> Any:
    return row["prompt"] if "prompt" in row else row["messages"]


def answer_all(
    baco: "Baco", rows: Sequence[dict[str, Any]], out: Path, router: Any, settings: dict[str, Any]
) -> None:
    """Answer every row into ``out``, going on where an earlier run of the same settings was.

    Raises:
        BacoError: an ``out`` that is there or cannot be written, or rows of other settings.
    """
    if out.exists():
        raise BacoError(f"{out} is there already: remove it or choose another --output")
    told = {
        "prompts": hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest(),
        "pair": baco.pair.name,
        "router": router.spelling,
        **settings,
    }
    partial = out.with_name(out.name + ".partial")
    try:
        done, seed = _resume(partial, told)
        settings = settings | {"seed": seed}
        if done:
            note(f"{done} of {len(rows)} prompts were answered before: going on")
        _answer_rest(baco, rows, done, partial, router, settings)
        _finish(partial, out)
    except OSError as error:
        raise BacoError(f"cannot write {partial}: {error.strerror}") from error
    note(f"{len(rows)} prompts answered in {out}")


def _resume(partial: Path, told: dict[str, Any]) -> tuple[int, int]:
    """How many rows are there, and their seed; a torn last line is taken off."""
    from baco.sampling import SamplingParams

    told = json.loads(json.dumps(told))
    data = partial.read_bytes() if partial.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if not whole:
        seed = SamplingParams(seed=told.get("seed")).seeded().seed
        assert seed is not None
        partial.write_text(json.dumps({"settings": told, "seed": seed}) + "\n", encoding="utf-8")
        return 0, seed
    if len(whole) < len(data):
        with partial.open("rb+") as file:
            file.truncate(len(whole))
    head = json.loads(whole.splitlines()[0])
    if head["settings"] != told:
        differing = [k for k in told if head["settings"].get(k) != told[k]]
        raise BacoError(
            f"{partial} was begun with other settings ({', '.join(differing) or 'fewer'}): give "
            "the same ones, remove it, or choose another --output"
        )
    return whole.count(b"\n") - 1, int(head["seed"])


def _answer_rest(
    baco: "Baco",
    rows: Sequence[dict[str, Any]],
    done: int,
    partial: Path,
    router: Any,
    settings: dict[str, Any],
) -> None:
    group = max(1, ANSWERS_A_WRITE // settings["n"])
    columns = (
        TextColumn("prompts"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    console = err()
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        partial.open("a", encoding="utf-8") as file,
    ):
        task = progress.add_task("prompts", total=len(rows), completed=done, rate="")
        for start in range(done, len(rows), group):
            batch = rows[start : start + group]
            answers = baco.generate_batch(
                [_prompt(row) for row in batch], router=router, **settings
            )
            for row, completions in zip(batch, answers, strict=True):
                made = record(_prompt(row), baco, completions)
                kept = {"id": row["id"]} if "id" in row else {}
                file.write(json.dumps(kept | made, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            tokens = sum(len(c.token_ids) for samples in answers for c in samples)
            seconds = max(c.seconds for samples in answers for c in samples)
            progress.update(task, advance=len(batch), rate=f"{tokens / seconds:.0f} tokens/s")


def _finish(partial: Path, out: Path) -> None:
    """Leave the settings' line off and put the rows in their place in one step."""
    ready = out.with_name(out.name + ".ready")
    with partial.open(encoding="utf-8") as source, ready.open("w", encoding="utf-8") as target:
        next(source)
        for line in source:
            target.write(line)
        target.flush()
        os.fsync(target.fileno())
    ready.replace(out)
    partial.unlink()
