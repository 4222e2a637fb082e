"""One copy of the pair, in one process, and the shards it makes."""

import atexit
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from baco.batch.output import Output, read_manifest
from baco.batch.rows import Row
from baco.errors import BacoError
from baco.outputs import params, record

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.routing.router import Router

# Told as answers end: answers, tokens.
Advance = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class PairOptions:
    """How a process comes by its copy of the pair.

    Attributes:
        load: keywords of :meth:`baco.Baco.load`.
        threads: of the processor for one forward. Sums of floating-point numbers differ in their
            last digits with it, and a draw that is nearly a tie with them.
    """

    load: Mapping[str, Any]
    threads: int

    def take(self) -> "Baco":
        """Load it."""
        import torch
        from transformers.utils import logging as transformers_logging

        from baco.api import Baco

        torch.set_num_threads(self.threads)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        loaded = Baco.load(**self.load)
        atexit.register(loaded.close)
        return loaded


@dataclass(frozen=True, slots=True)
class PairInfo:
    """What only a process that holds the pair can tell.

    Attributes:
        pair: its name.
        weights: in which numbers each half is held.
        fingerprint: of :func:`baco.calibration.store.fingerprint`.
        router: the spelling with its threshold.
        params: of :func:`baco.record.params`.
        dated: a template writes the date into a prompt.
    """

    pair: str
    weights: dict[str, str]
    fingerprint: str
    router: str
    params: dict[str, Any]
    dated: bool


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What every replica of a batch needs; plain data, so that it travels.

    Attributes:
        copy: of the pair.
        output: where shards go.
        manifest: of that directory.
        settings: keywords of ``Baco.stream_batch`` with router and seed.
    """

    copy: PairOptions
    output: Output
    manifest: Mapping[str, Any]
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ShardResult:
    """A shard that is in its place.

    Attributes:
        shard: its rows.
        answers: in it.
        tokens, seconds: it took; none where it was there already.
        broken: how many prompts have answers that broke off,
        error: and of the first of them, which and why.
    """

    shard: range
    answers: int
    tokens: int
    seconds: float
    broken: int = 0
    error: str = ""


def facts(
    baco: "Baco",
    spell: "Callable[[Baco], Router]",
    settings: Mapping[str, Any],
    rows: Sequence[Row],
) -> PairInfo:
    """Look at a batch before its first answer.

    Args:
        baco: the pair.
        spell: chooses the router.
        settings: keywords of ``Baco.stream_batch`` but the router.
        rows: all of them.

    Raises:
        BacoError: a router that the pair has no threshold for, or a row that does not fit the pair.
    """
    from baco.calibration.store import fingerprint

    spelling = spell(baco).spelling
    dated = check_fit(baco, rows, settings["system"])
    pair = baco.pair
    return PairInfo(
        pair.name, pair.weights_formats, fingerprint(pair), spelling, params(pair, settings), dated
    )


def check_fit(baco: "Baco", rows: Sequence[Row], system: str | None) -> bool:
    """Render every prompt and hold it to both context windows.

    Returns:
        Whether a template writes the date into any of them.

    Raises:
        BacoError: one cannot be rendered or read, with its line.
    """
    dated = False
    for row in rows:
        try:
            prompt = baco.pair.renderer.render(row.prompt, system)
            baco.pair.check_prompt(prompt)
        except BacoError as error:
            raise BacoError(f"{row.where}: {error}") from error
        dated |= prompt.date is not None
    return dated


class Replica:
    """Makes shards of one batch."""

    def __init__(self, order: JobSpec, baco: "Baco | None" = None) -> None:
        self.order = order
        self._baco = baco

    @property
    def baco(self) -> "Baco":
        """The pair, loaded when it is first asked for and held to the manifest."""
        if self._baco is None:
            self._check_shared()
            self._baco = self.order.copy.take()
            self._check_same(self._baco)
        return self._baco

    def make(
        self, shard: range, rows: Sequence[Row], advance: Advance = lambda *_: None
    ) -> ShardResult:
        """Answer the rows of a shard and put it in its place; nothing to do where it is there.

        Raises:
            BacoError: a pair that cannot be loaded or is another one, a request that it refuses,
                an answer that broke off, storage that is not shared or cannot be written.
        """
        started, output = time.perf_counter(), self.order.output
        baco = self.baco
        baco.pair.renderer.date = self.order.manifest.get("date")
        if output.file(shard).exists():
            return ShardResult(shard, len(rows) * self.order.settings["n"], 0, 0.0)
        with output.attempt(shard):
            records, answers, tokens, broken = [], 0, 0, list[str]()
            for number, (row, completions) in zip(
                shard, self._answered(baco, rows, advance), strict=True
            ):
                if (error := next((c.error for c in completions if c.error), None)) is not None:
                    broken.append(f"{row.where}: {error}")
                told = record(row.prompt, baco.pair, self._sampling, completions)
                records.append({"row": number, "id": row.kept.get("id", number), **told})
                answers += len(completions)
                tokens += sum(len(c.token_ids) for c in completions)
            output.write(shard, records)
        seconds = time.perf_counter() - started
        return ShardResult(shard, answers, tokens, seconds, len(broken), "".join(broken[:1]))

    @property
    def _sampling(self) -> dict[str, Any]:
        return {name: value for name, value in self.order.settings.items() if name != "router"}

    def _answered(
        self, baco: "Baco", rows: Sequence[Row], advance: Advance
    ) -> Iterator[tuple[Row, list[Any]]]:
        """Every row with its samples; the shard is decoded as a whole, in the same company."""
        from baco.outputs import check_group

        samples: list[list[Any]] = [[] for _ in rows]
        prompts = [row.prompt for row in rows]
        for chunk in baco.stream_batch(prompts, **self.order.settings):
            if chunk.completion is not None:
                if chunk.completion.error is not None and baco.backend is not None:
                    raise BacoError(
                        f"{rows[chunk.prompt].where}: its answer broke off: "
                        f"{chunk.completion.error}; the same command goes on where it was"
                    )
                samples[chunk.prompt].append(chunk.completion)
                advance(1, len(chunk.completion.token_ids))
        check_group(samples, again=False)
        for row, completions in zip(rows, samples, strict=True):
            yield row, sorted(completions, key=lambda completion: completion.sample)

    def _check_shared(self) -> None:
        import platform

        path = self.order.output.path
        try:
            seen = read_manifest(path)
        except BacoError:
            seen = {}
        if seen != self.order.manifest:
            raise BacoError(
                f"{platform.node()} does not see the manifest of {path}: give a directory on "
                "storage that all nodes share, by a path that is the same on all of them"
            )

    def _check_same(self, baco: "Baco") -> None:
        import platform

        from baco.calibration.store import fingerprint

        for name, here in (
            ("fingerprint", fingerprint(baco.pair)),
            ("weights", baco.pair.weights_formats),
        ):
            if here != (begun := self.order.manifest["settings"][name]):
                raise BacoError(
                    f"{platform.node()} holds another pair than the batch was begun with "
                    f"({name} {here}, not {begun}): make its files, device and dtype the same"
                )
