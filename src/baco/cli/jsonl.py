"""``baco generate --jsonl``: many prompts from a file, resumable and atomic.

Rows are appended to ``OUT.partial``, whose first line holds the settings; when the last prompt is
answered the rows move to ``OUT`` in one step. One process at a time may do so. The same command
goes on where a stopped one was: at the first row that is not the answer to its prompt, and at the
border of a batch, so that every prompt is decoded in the company it would have had. The finished
file is the same byte for byte.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from baco.batch.rows import Row, read_rows
from baco.cli.console import note
from baco.cli.progress import answering
from baco.errors import BacoError
from baco.files import locked
from baco.outputs import params, record
from baco.sampling.seeds import NOISE_VERSION, check_version

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.outputs import Completion

# Answers that are decoded together between two writes.
ANSWERS_A_WRITE = 256


def read_prompts(path: Path) -> list[Row]:
    """The rows of a prompt file, checked.

    Raises:
        BacoError: a file that cannot be read or holds no prompt, or lines that are not right.
    """
    return read_rows([path])


@contextmanager
def reserved(out: Path) -> Iterator[None]:
    """Hold the file of answers for this process.

    Raises:
        BacoError: ``out`` is there, since finished work is never written over, or another process
            is making it.
    """
    _refuse_taken(out)
    with locked(out):
        _refuse_taken(out)  # it may have been finished since
        yield


def _refuse_taken(out: Path) -> None:
    if out.exists():
        raise BacoError(f"{out} is there already: remove it or choose another --output")


def answer_all(
    baco: "Baco",
    rows: Sequence[Row],
    out: Path,
    router: Any,
    settings: dict[str, Any],
    more: dict[str, Any] | None = None,
) -> None:
    """Answer every row into ``out``, going on where an earlier run of the same settings was.

    Args:
        baco: the pair.
        rows: the prompts.
        out: the file to make, which this process has :func:`reserved`.
        router: for all of them.
        settings: keywords of ``Baco.stream_batch``.
        more: what else the answers hang on, such as templates.

    Raises:
        BacoError: an ``out`` that cannot be written, rows of other settings, or a prompt that does
            not fit.
    """
    renderer = baco.pair.renderer
    dated = _check_fit(baco, rows, settings)
    prompts = json.dumps([(row.prompt, row.kept) for row in rows])
    told = {
        "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
        "pair": baco.pair.name,
        "weights": baco.pair.weights_formats,
        "router": router.spelling,
        "seed": settings.get("seed"),
        "noise": NOISE_VERSION,
        **params(baco.pair, settings),
        **(more or {}),
        **({"date": renderer.date} if dated else {}),
    }
    group = max(1, ANSWERS_A_WRITE // settings["n"])
    partial = out.with_name(out.name + ".partial")
    try:
        done, seed, renderer.date = _resume(partial, told, group, rows)
        if renderer.date is not None:
            note(f"the prompts hold the date {renderer.date}")
        with partial.open("a", encoding="utf-8") as file:
            _answer_rest(baco, rows, done, group, file, router, settings | {"seed": seed})
        broken = _finish(partial, out)
    except OSError as error:
        raise BacoError(f"cannot write {partial}: {error.strerror}") from error
    note(f"{len(rows)} prompts answered in {out}")
    if broken:
        first = next(s["error"] for s in json.loads(broken[0][1])["samples"] if "error" in s)
        raise BacoError(
            f"answers to {len(broken)} of {len(rows)} prompts broke off; they have the "
            f"finish_reason 'error' in {out}. The first, {rows[broken[0][0]].where}: {first}"
        )


def _check_fit(baco: "Baco", rows: Sequence[Row], settings: dict[str, Any]) -> bool:
    """Fail before the first answer where a later prompt cannot be rendered or read.

    Returns:
        Whether a template writes the date into any prompt.
    """
    dated = False
    for row in rows:
        try:
            prompt = baco.pair.renderer.render(row.prompt, settings["system"])
            baco.pair.check_prompt(prompt)
        except BacoError as error:
            raise BacoError(f"line {row.line} of the prompts: {error}") from error
        dated |= prompt.date is not None
    return dated


def _resume(
    partial: Path, told: dict[str, Any], group: int, rows: Sequence[Row]
) -> tuple[int, int, str | None]:
    """How many rows are answered, whole batches of them, their seed, and the date in their prompts,
    where there is one; the rest is taken off.
    """
    from baco.sampling.params import SamplingParams
    from baco.text.templates import today

    told = json.loads(json.dumps(told))
    data = partial.read_bytes() if partial.exists() else b""
    head, *written = data.split(b"\n")[:-1] or [b""]
    if not head:
        seed = SamplingParams(seed=told["seed"]).seeded().seed
        assert seed is not None
        date = told["date"] or today() if "date" in told else None
        kept = {"settings": told, "seed": seed} | ({} if date is None else {"date": date})
        partial.write_text(json.dumps(kept) + "\n", encoding="utf-8")
        return 0, seed, date
    try:
        begun = json.loads(head)
        settings, seed = begun["settings"], int(begun["seed"])
        names = settings.keys() | told.keys()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BacoError(f"{partial} was not begun by this command: move it away") from error
    check_version(settings.get("noise"), partial)
    differing = sorted(n for n in names if settings.get(n) != told.get(n))
    if differing:
        raise BacoError(
            f"{partial} was begun with other settings ({', '.join(differing)}): give the same "
            "ones, remove it, or choose another --output"
        )
    checked = map(_is_answered, rows, written, repeat(told["n"]))
    good = sum(takewhile(bool, checked))
    if good < min(len(written), len(rows)):
        note(
            f"line {good + 2} of {partial} is not the answer to {rows[good].where}: "
            "answering again from there"
        )
    done = good if good == len(rows) else good // group * group
    with partial.open("rb+") as file:
        file.truncate(len(head) + 1 + sum(len(line) + 1 for line in written[:done]))
    return done, seed, begun.get("date")


def _is_answered(row: Row, line: bytes, n: int) -> bool:
    """Is a line the record of this row's n answers? It holds the row's prompt and id."""
    try:
        made = json.loads(line)
        its = {name: made[name] for name in ("prompt", *row.kept)}
        whole = len(made["samples"]) == n
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    return whole and json.dumps(its) == json.dumps({"prompt": row.prompt, **row.kept})


def _answer_rest(
    baco: "Baco",
    rows: Sequence[Row],
    done: int,
    group: int,
    file: TextIO,
    router: Any,
    settings: dict[str, Any],
) -> None:
    from baco.outputs import check_group

    n = settings["n"]
    with answering("prompts", len(rows)) as bar:
        bar.skip(done)
        for start in range(done, len(rows), group):
            batch = rows[start : start + group]
            samples: list[list[Completion]] = [[] for _ in batch]
            for place, completion in _completions(baco, batch, router, settings):
                samples[place].append(completion)
                bar.advance(1 / n, len(completion.token_ids))
            check_group(samples, again=baco.backend is not None)
            for row, completions in zip(batch, samples, strict=True):
                completions.sort(key=lambda completion: completion.sample)
                made = row.kept | record(row.prompt, baco.pair, settings, completions)
                file.write(json.dumps(made, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _completions(
    baco: "Baco", batch: Sequence[Row], router: Any, settings: dict[str, Any]
) -> "Iterator[tuple[int, Completion]]":
    """The answers of a batch as they are whole, with the place of their prompt in it."""
    prompts = [row.prompt for row in batch]
    for chunk in baco.stream_batch(prompts, router=router, **settings):
        if chunk.completion is not None:
            yield chunk.prompt, chunk.completion


def _finish(partial: Path, out: Path) -> list[tuple[int, bytes]]:
    """Leave the settings' line off and put the rows in their place in one step.

    Returns:
        The rows with answers that broke off, with their numbers.
    """
    broken = []
    ready = out.with_name(out.name + ".ready")
    with partial.open("rb") as source, ready.open("wb") as target:
        next(source)
        for number, line in enumerate(source):
            target.write(line)
            if b'"finish_reason": "error"' in line:
                broken.append((number, line))
        target.flush()
        os.fsync(target.fileno())
    ready.replace(out)
    partial.unlink()
    return broken
