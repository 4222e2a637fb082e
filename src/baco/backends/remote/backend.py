"""Two servers as one backend: reaching them, and refusing what they cannot keep."""

import asyncio
import logging
import math
import os
import threading
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from baco.backends.base import Capabilities
from baco.backends.remote.client import Patience, Server
from baco.backends.remote.engine import RemoteEngine
from baco.backends.remote.half import RemoteModel
from baco.backends.remote.probe import probe
from baco.backends.remote.view import figure
from baco.backends.remote.wire import Names
from baco.engine.sequence import Request
from baco.errors import BacoError, UpstreamError
from baco.models.known_pairs import KnownPair
from baco.models.pair import Pair
from baco.models.weightless import load_weightless_pair
from baco.source import MODELS, Source

log = logging.getLogger("baco")

T = TypeVar("T")
NAME = "remote"
CONCURRENCY = 64
_NEEDS = {"max": "probabilities", "entropy": "probabilities", "all": "whole rows"}


def connect(
    known: KnownPair,
    *,
    base_url: str | None = None,
    aligned_url: str | None = None,
    base_model: str | None = None,
    aligned_model: str | None = None,
    concurrency: int = CONCURRENCY,
    timeout: float = 60.0,
    retries: int = 6,
    base_template: str | None = None,
    chat_template: str | None = None,
    function_words: str | Iterable[str] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Pair, "RemoteBackend"]:
    """A pair whose halves run on two servers.

    Args:
        known: where its tokenizers and configurations are; no weights are loaded.
        base_url, aligned_url: OpenAI-compatible completions servers; they may be one.
        base_model, aligned_model: names of the models there, where a server has several. A
            `baco serve` is asked for ``baco/base`` and ``baco/aligned``.
        concurrency: answers that are written at once. Each has one call open at a time; where a
            server scores no prompt and takes one at a time, a call for each token of a span.
        timeout: seconds that one call may take.
        retries: of a call that meets 429, 5xx or no connection.
        base_template, chat_template, function_words, trust_remote_code: as for
            :func:`baco.models.pair.load_pair`.

    Raises:
        BacoError: a server that is not there or cannot do it, or halves that do not fit.
    """
    if base_url is None or aligned_url is None:
        raise BacoError(
            "the remote backend needs two servers: give base_url and aligned_url (--base-url, "
            "--aligned-url)"
        )
    if concurrency < 1:
        raise BacoError(f"concurrency is {concurrency}: write at least one answer at a time")
    patience = Patience(answer=timeout, tries=retries + 1)
    urls: dict[Source, str] = {"base": base_url, "aligned": aligned_url}
    models: dict[Source, str | None] = {"base": base_model, "aligned": aligned_model}
    servers = {half: (urls[half], key_of(half), patience) for half in MODELS}
    pair = load_weightless_pair(
        known,
        dict.fromkeys(MODELS, "its server"),  # an address is no part of what a pair is
        base_template=base_template,
        chat_template=chat_template,
        function_words=function_words,
        trust_remote_code=trust_remote_code,
    )
    return pair, RemoteBackend(pair, servers, models, concurrency)


def key_of(half: Source) -> str | None:
    """A server's key: BACO_BASE_API_KEY or BACO_ALIGNED_API_KEY, else OPENAI_API_KEY."""
    names = (f"BACO_{half.upper()}_API_KEY", "OPENAI_API_KEY")
    return next((key for name in names if (key := os.environ.get(name, "").strip())), None)


class RemoteBackend:
    """Both servers, and the event loop that talks to them.

    Args:
        pair: the pair without its weights.
        servers: of each half, what `Server` takes.
        models: names of the models there.
        concurrency: answers that are written at once.

    Raises:
        BacoError: a server that is not there, or does not do what any router needs.
    """

    # A server that is gone may come back.
    ended: str | None = None

    def __init__(
        self,
        pair: Pair,
        servers: dict[Source, tuple[str, str | None, Patience]],
        models: dict[Source, str | None],
        concurrency: int,
    ) -> None:
        self._pair = pair
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="baco-remote", daemon=True)
        self._thread.start()
        self._servers: dict[Source, Server] = {}
        try:
            for half in MODELS:
                self._servers[half] = Server(half, *servers[half])
            self.halves = self._await(self._reach(models))
        except UpstreamError as error:
            self.close()
            raise BacoError(str(error)) from error
        except BaseException:
            self.close()
            raise
        self._places = asyncio.Semaphore(concurrency)

    @property
    def capabilities(self) -> Capabilities:
        """Draws are the servers' own, so they cannot be replayed."""
        tops = [half.ability.top for half in self.halves.values()]
        return Capabilities(NAME, replayable=False, raw_logprobs=min(tops))

    @property
    def calls(self) -> dict[Source, int]:
        """How often each server was asked so far, retries and the start included."""
        return {half: server.calls for half, server in self._servers.items()}

    def engine(self) -> RemoteEngine:
        """A view for one decoder; servers, connections and places are shared."""
        return RemoteEngine(self._pair, self.halves, self._loop, self._places, self.room)

    def room(self, request: Request) -> int:
        """How many tokens an answer may get at most.

        Raises:
            BacoError: the servers cannot keep what the request asks, or its prompt is too long.
        """
        self.capabilities.check(request)
        needed = [half for half in MODELS if request.needs(half)]
        if request.router.only is None:
            self._check_router(request)
        for half in needed:
            _check_half(request, self.halves[half])
        rooms = []
        for half in needed:
            told = self.halves[half].ability.context
            context = min(getattr(self._pair, half).context, told or math.inf)
            ids = request.ids(half)
            getattr(self._pair, half).check_prompt(half, ids, context)
            rooms.append(int(context - len(ids)))
        return min(rooms)

    def close(self) -> None:
        """Let connections go; answers that are being written end nowhere."""
        if self._loop.is_closed() or not self._thread.is_alive():
            return
        self._await(self._leave())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _reach(self, models: dict[Source, str | None]) -> dict[Source, RemoteModel]:
        names = Names(self._pair)
        found = await asyncio.gather(
            *(probe(self._servers[half], self._pair, names, models[half]) for half in MODELS)
        )
        made = {}
        for half, ability in zip(MODELS, found, strict=True):
            own = getattr(self._pair, half)
            config = own.model.config.get_text_config()
            made[half] = RemoteModel(
                half, self._servers[half], names, ability, own.end_ids, int(config.vocab_size)
            )
            log.debug("%s: %s", self._servers[half].called, ability)
        return made

    async def _leave(self) -> None:
        mine = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not mine]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self._servers.values():
            await server.close()

    def _check_router(self, request: Request) -> None:
        router, params = request.router, request.params
        needs = figure(router)
        for half in router.reads:
            ability, called = self.halves[half].ability, self.halves[half].server.called
            if needs in _NEEDS and not ability.top:
                raise BacoError(
                    f"{router.spelling} goes by {_NEEDS[needs]} and {called} tells no "
                    "log-probabilities: use Punc, FC or Role"
                )
            if needs == "all" and ability.top < self._pair.vocabulary.size:
                raise BacoError(
                    f"{router.spelling} may look at whole rows and {called} tells {ability.top} "
                    f"tokens of {self._pair.vocabulary.size}: use a built-in router"
                )
        if params.temperature > 0 and (params.top_k or params.top_p < 1):
            raise BacoError(
                "top_k and top_p cut off what is left once a word's source is known, which the "
                "remote backend cannot have its servers do: use temperature and min_p"
            )


def _check_half(request: Request, half: RemoteModel) -> None:
    params, ability, called = request.params, half.ability, half.server.called
    if params.penalises:
        raise BacoError("penalties need the weights in this process: use --backend local")
    if params.logit_bias and "logit_bias" not in ability.obeys:
        raise BacoError(f"{called} does not follow logit_bias: leave it out")
    if params.temperature == 0:
        return
    if not ability.raw and params.temperature != 1:
        raise BacoError(
            f"temperature is {params.temperature:g} and {called} tells log-probabilities that "
            "change with it: use 0 or 1"
        )
    if half.name == "base" and request.router.only == "base" and params.top_p < 1:
        raise BacoError("top_p of the base alone is not exact on a server: use min_p")
    for name in ("min_p", "top_k"):
        if getattr(params, name) and name not in ability.obeys:
            raise BacoError(f"{called} does not follow {name}: give {name} 0")
    if params.min_p and request.router.only is None and "logit_bias" not in ability.obeys:
        raise BacoError(
            f"{called} does not follow logit_bias, without which min_p is not exact where a half "
            "may say only word starts: give min_p 0"
        )
