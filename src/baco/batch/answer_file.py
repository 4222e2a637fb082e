"""The job of ``baco generate --jsonl``: answers to many prompts in one file of JSON lines.

Rows are appended to ``OUT.partial``, whose first line is the manifest. When the last prompt is
answered the rows move to ``OUT`` in one step. A job continues at the first row that is not the
answer to its prompt, at the border of a group: so every prompt is decoded together with the same
others, and the finished file is the same byte for byte.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baco.backends import backend_of
from baco.batch.answering import answer, check_fit
from baco.batch.job import Advance, append, check_settings, cut_back, digest, ignore, line, matches
from baco.batch.rows import Row
from baco.errors import BacoError
from baco.files import locked
from baco.outputs import params, record
from baco.routing.router import file_digests
from baco.sampling.params import SamplingParams
from baco.sampling.seeds import NOISE_VERSION
from baco.text.templates import today

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.routing.router import Router

log = logging.getLogger("baco")

# Answers that are decoded together between two writes.
ANSWERS_A_WRITE = 256
OTHER = "another --output, or remove it"


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that were answered together, as lines of the file."""

    lines: list[str]
    tokens: int

    @property
    def prompts(self) -> int:
        """Rows in the group."""
        return len(self.lines)


class AnswerFile:
    """The file of answers.

    Attributes:
        path: the finished file; ``partial`` is beside it until then.
        rows: the prompts.
        settings: keywords of ``Baco.stream_batch``; `begin` sets the seed and the router.
        date: the day in the prompts, where a template reads the clock.
    """

    ordered = True

    def __init__(self, path: Path, rows: Sequence[Row], settings: Mapping[str, Any]) -> None:
        self.path, self.rows, self.settings = path, rows, dict(settings)
        self.partial = path.with_name(path.name + ".partial")
        self.rows_a_group = max(1, ANSWERS_A_WRITE // settings["n"])
        self.date: str | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the file for this process.

        Raises:
            BacoError: it is there, since finished work is never overwritten, or another process
                makes it.
        """
        self._check_free()
        with locked(self.path):
            self._check_free()  # another process may have finished it since
            yield

    def _check_free(self) -> None:
        if self.path.exists():
            raise BacoError(f"{self.path} is there already: remove it or choose another --output")

    def begin(self, baco: "Baco", router: "Router", more: Mapping[str, Any]) -> None:
        """Write the manifest, or check the one that is there and take its seed and date.

        Args:
            baco: the pair.
            router: of all rows.
            more: what else the answers depend on, such as templates.

        Raises:
            BacoError: a prompt that does not fit, or rows of other settings.
        """
        pair, renderer = baco.pair, baco.pair.renderer
        dated = check_fit(baco, self.rows, self.settings)
        asked = {
            "prompts": digest([(row.prompt, row.kept) for row in self.rows]),
            "pair": pair.name,
            "fingerprint": pair.fingerprint,
            "weights": pair.weights_formats,
            "router": router.spelling,
            **file_digests(router),
            "seed": self.settings.get("seed"),
            "noise": NOISE_VERSION,
            **params(pair, self.settings),
            **more,
            **({"date": renderer.date} if dated else {}),
        }
        asked = json.loads(json.dumps(asked))
        begun = self._begun()
        if begun is None:
            seed = SamplingParams(seed=asked["seed"]).seeded().seed
            begun = {"settings": asked, "seed": seed}
            if dated:
                begun["date"] = asked["date"] or today()
            self.partial.write_text(json.dumps(begun) + "\n", encoding="utf-8")
        else:
            check_settings(self.partial, begun["settings"], asked, OTHER)
        self.date = renderer.date = begun.get("date")
        self.settings |= {"seed": begun["seed"], "router": router}

    def begun_backend(self) -> str | None:
        """The backend of this process that the rows there were answered by; None without any."""
        begun = self._begun()
        return None if begun is None else backend_of(begun["settings"].get("weights", {}))

    def _begun(self) -> dict[str, Any] | None:
        """The manifest; None where it is not there or not whole."""
        if not self.partial.exists():
            return None
        with self.partial.open("rb") as file:
            head = file.readline()
        if not head.endswith(b"\n") or not head.strip():
            return None
        try:
            begun: dict[str, Any] = json.loads(head)
            {**begun["settings"], "seed": int(begun["seed"])}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BacoError(
                f"{self.partial} was not begun by this command: move it away"
            ) from error
        return begun

    def missing(self) -> tuple[list[range], int]:
        """See `baco.batch.job.Output`."""
        with self.partial.open("rb") as file:
            next(file)
            whole = sum(text.endswith(b"\n") for text in file)
        with self.partial.open("rb") as file:
            next(file)
            good = sum(takewhile(bool, map(self._is_answered, file, self.rows)))
        if good < min(whole, len(self.rows)):
            log.warning(
                "line %d of %s is not the answer to %s: answering again from there",
                good + 2,
                self.partial,
                self.rows[good].where,
            )
        total, size = len(self.rows), self.rows_a_group
        done = good if good == total else good // size * size
        cut_back(self.partial, done + 1)
        return [range(at, min(at + size, total)) for at in range(done, total, size)], done

    def _is_answered(self, text: bytes, row: Row) -> bool:
        """Whether a line is the record of this row's n answers."""
        if not matches(text, {"prompt": row.prompt, **row.kept}):
            return False
        samples = json.loads(text).get("samples")
        return isinstance(samples, list) and len(samples) == self.settings["n"]

    def keep(self, result: Group) -> None:
        """See `baco.batch.job.Output`."""
        append(self.partial, result.lines)

    def finish(self) -> list[str]:
        """Leave the manifest off and put the rows into their place in one step.

        Returns:
            Which answers broke off, and why.
        """
        broken = []
        ready = self.path.with_name(self.path.name + ".ready")
        with self.partial.open("rb") as source, ready.open("wb") as target:
            next(source)
            for text, row in zip(source, self.rows, strict=True):
                target.write(text)
                if b'"finish_reason": "error"' in text:  # messages of a prompt may have it too
                    samples = json.loads(text)["samples"]
                    errors = [sample["error"] for sample in samples if "error" in sample]
                    broken += [f"{row.where}: {error}" for error in errors[:1]]
            target.flush()
            os.fsync(target.fileno())
        ready.replace(self.path)
        self.partial.unlink()
        return broken

    def worker(self, baco: "Baco", advance: Advance | None = None) -> Callable[[range], Group]:
        """A function that answers the rows of a group; arguments as for :func:`answer`."""
        sampling = {name: value for name, value in self.settings.items() if name != "router"}

        def answered(part: range) -> Group:
            rows = self.rows[part.start : part.stop]
            answers = answer(baco, rows, self.settings, advance or ignore)
            return Group(
                [
                    line(row.kept | record(row.prompt, baco.pair, sampling, completions))
                    for row, completions in zip(rows, answers, strict=True)
                ],
                sum(len(c.token_ids) for completions in answers for c in completions),
            )

        return answered
