"""Rows of prompts, answered by one copy of the pair in one process."""

import atexit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from baco.batch.job import Advance
from baco.batch.rows import Row
from baco.errors import BacoError
from baco.outputs import Completion, check_group, params
from baco.routing.router import file_digests

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.routing.router import Router


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """How a process loads its copy of the pair.

    Attributes:
        arguments: keywords of :meth:`baco.Baco.load`.
        threads: processor threads of one forward. The last digits of sums depend on them, and so
            does a draw that is nearly a tie.
    """

    arguments: Mapping[str, Any]
    threads: int

    def load(self) -> "Baco":
        """Load the pair, with its backend closed when the process ends."""
        import torch
        from transformers.utils import logging as transformers_logging

        from baco.api import Baco

        torch.set_num_threads(self.threads)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        baco = Baco.load(**self.arguments)
        atexit.register(baco.close)
        return baco


@dataclass(frozen=True, slots=True)
class PairInfo:
    """What only a process that has loaded the pair knows.

    Attributes:
        pair: its name.
        weights: the number format of each model.
        fingerprint: of :class:`baco.models.pair.Pair`.
        router: the spelling with its threshold.
        router_files: of :func:`baco.routing.router.file_digests`.
        params: of :func:`baco.outputs.params`.
        dated: a template writes the date into a prompt.
    """

    pair: str
    weights: dict[str, str]
    fingerprint: str
    router: str
    router_files: dict[str, dict[str, str]]
    params: dict[str, Any]
    dated: bool


def inspect(
    baco: "Baco",
    choose_router: "Callable[[Baco], Router]",
    settings: Mapping[str, Any],
    rows: Sequence[Row],
) -> PairInfo:
    """Check all rows before the first is answered, and describe the pair.

    Args:
        baco: the pair.
        choose_router: gives the router.
        settings: keywords of ``Baco.stream_batch`` but the router.
        rows: all of them.

    Raises:
        BacoError: a router that the pair has no threshold for, or a row that does not fit the pair.
    """
    router = choose_router(baco)
    dated = check_fit(baco, rows, settings)
    pair = baco.pair
    return PairInfo(
        pair.name,
        pair.weights_formats,
        pair.fingerprint,
        router.spelling,
        file_digests(router),
        params(pair, settings),
        dated,
    )


def check_fit(baco: "Baco", rows: Sequence[Row], settings: Mapping[str, Any]) -> bool:
    """Render every prompt and check it against both context windows, and compile the structure of
    the answers.

    Returns:
        Whether a template writes the date into any of them.

    Raises:
        BacoError: one cannot be rendered or read, with its line; or the structure cannot be used.
    """
    sampling = {name: value for name, value in settings.items() if name not in ("system", "switch")}
    baco.check_structure(baco.pair.defaults.updated(sampling))
    dated, system = False, settings["system"]
    for row in rows:
        try:
            prompt = baco.pair.renderer.render(row.prompt, system)
            baco.pair.check_prompt(prompt)
        except BacoError as error:
            raise BacoError(f"{row.where}: {error}") from error
        dated |= prompt.date is not None
    return dated


def answer(
    baco: "Baco", rows: Sequence[Row], settings: Mapping[str, Any], advance: Advance
) -> list[list[Completion]]:
    """The samples of every row; rows are decoded together.

    Args:
        baco: the pair.
        rows: the prompts.
        settings: keywords of ``Baco.stream_batch``.
        advance: receives the progress after each answer.

    Raises:
        BacoError: a request is refused; an answer broke off on a server, where the same command
            may succeed; or all answers to several prompts broke off.
    """
    answers: list[list[Completion]] = [[] for _ in rows]
    for chunk in baco.stream_batch([row.prompt for row in rows], **settings):
        if (completion := chunk.completion) is None:
            continue
        if completion.error is not None and baco.backend is not None:
            raise BacoError(
                f"{rows[chunk.prompt].where}: its answer broke off: {completion.error}; the same "
                "command continues the work"
            )
        answers[chunk.prompt].append(completion)
        advance(1 / settings["n"], len(completion.token_ids))
    check_group(answers, again=False)
    return [sorted(samples, key=lambda completion: completion.sample) for samples in answers]


def broke_off(count: int, total: int, output: object, first: str) -> BacoError:
    """The error at the end of a job some of whose answers broke off.

    Args:
        count: prompts with such answers,
        total: of all.
        output: where the answers are.
        first: which and why, of the first such prompt.
    """
    return BacoError(
        f"answers to {count} of {total} prompts broke off; they have the finish_reason 'error' in "
        f"{output}. The first, {first}"
    )
