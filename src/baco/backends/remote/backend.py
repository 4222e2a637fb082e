"""Two servers as one backend: connecting to them, and refusing what they cannot decode."""

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
from baco.backends.remote.model import RemoteModel
from baco.backends.remote.probe import probe
from baco.backends.remote.view import needed_quantity
from baco.backends.remote.wire import Names
from baco.engine.sequence import Request
from baco.engine.shared_text_engine import check_request
from baco.errors import BacoError, UpstreamError
from baco.models.known_pairs import KnownPair
from baco.models.pair import Pair
from baco.models.weightless import load_weightless_pair
from baco.source import MODELS, Source

log = logging.getLogger("baco")

T = TypeVar("T")
NAME = "remote"
CONCURRENCY = 64
_QUANTITIES = {"max": "probabilities", "entropy": "probabilities", "all": "whole rows"}


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
    separate_tokenizers: bool | None = None,
) -> tuple[Pair, "RemoteBackend"]:
    """A pair whose models run on two servers.

    Args:
        known: where its tokenizers and configurations are; no weights are loaded.
        base_url, aligned_url: OpenAI-compatible completions servers, or the same one twice.
        base_model, aligned_model: names of the models there, where a server has several. The
            default for a `baco serve` is ``baco/base`` and ``baco/aligned``.
        concurrency: answers that are decoded at once. Each has one open call at a time; where a
            server cannot score a prompt and accepts one prompt per call, one for each token of a
            span.
        timeout: seconds that one call may take.
        retries: of a call that gets 429, 5xx or no connection.
        base_template, chat_template, function_words, trust_remote_code, separate_tokenizers: as for
            :func:`baco.models.pair.load_pair`.

    Raises:
        BacoError: a server cannot be reached or used, or the models are no pair.
    """
    if base_url is None or aligned_url is None:
        raise BacoError(
            "the remote backend needs two servers: give base_url and aligned_url (--base-url, "
            "--aligned-url)"
        )
    if concurrency < 1:
        raise BacoError(f"concurrency is {concurrency}: decode at least one answer at a time")
    patience = Patience(answer=timeout, tries=retries + 1)
    urls: dict[Source, str] = {"base": base_url, "aligned": aligned_url}
    models: dict[Source, str | None] = {"base": base_model, "aligned": aligned_model}
    servers = {source: (urls[source], key_of(source), patience) for source in MODELS}
    pair = load_weightless_pair(
        known,
        dict.fromkeys(MODELS, "its server"),  # an address is not part of a pair
        base_template=base_template,
        chat_template=chat_template,
        function_words=function_words,
        trust_remote_code=trust_remote_code,
        separate_tokenizers=separate_tokenizers,
    )
    return pair, RemoteBackend(pair, servers, models, concurrency)


def key_of(source: Source) -> str | None:
    """A server's key: BACO_BASE_API_KEY or BACO_ALIGNED_API_KEY, else OPENAI_API_KEY."""
    names = (f"BACO_{source.upper()}_API_KEY", "OPENAI_API_KEY")
    return next((key for name in names if (key := os.environ.get(name, "").strip())), None)


class RemoteBackend:
    """Both servers, and the event loop that talks to them.

    Args:
        pair: the pair without its weights.
        servers: the arguments of each `Server`.
        names: of the models there.
        concurrency: answers that are decoded at once.

    Raises:
        BacoError: a server cannot be reached, or lacks what every router needs.
    """

    # A server that is gone may come back.
    ended: str | None = None

    def __init__(
        self,
        pair: Pair,
        servers: dict[Source, tuple[str, str | None, Patience]],
        names: dict[Source, str | None],
        concurrency: int,
    ) -> None:
        self._pair = pair
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="baco-remote", daemon=True)
        self._thread.start()
        self._servers: dict[Source, Server] = {}
        try:
            for source in MODELS:
                self._servers[source] = Server(source, *servers[source])
            self.models = self._await(self._probe(names))
        except UpstreamError as error:
            self.close()
            raise BacoError(str(error)) from error
        except BaseException:
            self.close()
            raise
        self._slots = asyncio.Semaphore(concurrency)

    @property
    def capabilities(self) -> Capabilities:
        """The servers draw tokens themselves, so answers cannot be replayed."""
        tops = [model.ability.top for model in self.models.values()]
        return Capabilities(
            NAME,
            replayable=False,
            raw_logprobs=min(tops),
            unstructured_since="a server constrains whole answers, not the words of one source",
        )

    @property
    def calls(self) -> dict[Source, int]:
        """The number of calls to each server so far, retries and probes included."""
        return {source: server.calls for source, server in self._servers.items()}

    def engine(self) -> RemoteEngine:
        """An engine for one decoder; servers, connections and slots are shared."""
        return RemoteEngine(self._pair, self.models, self._loop, self._slots, self.room)

    def room(self, request: Request) -> int:
        """How many tokens an answer may get at most.

        Raises:
            BacoError: the servers cannot decode the request, or its prompt is too long.
        """
        self.capabilities.check(request)
        if self._pair.own_vocabularies is not None:
            check_request(request)
        needed = [source for source in MODELS if request.needs(source)]
        if request.router.only is None:
            self._check_router(request)
        for source in needed:
            _check_params(request, self.models[source])
        rooms = []
        for source in needed:
            model, ids = self._pair.model(source), request.ids(source)
            context = min(model.context, self.models[source].ability.context or math.inf)
            model.check_prompt(source, ids, context)
            rooms.append(int(context - len(ids)))
        return min(rooms)

    def close(self) -> None:
        """Close connections; answers that are being decoded never end."""
        if self._loop.is_closed() or not self._thread.is_alive():
            return
        self._await(self._disconnect())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _probe(self, names: dict[Source, str | None]) -> dict[Source, RemoteModel]:
        ids = {source: Names(self._pair, source) for source in MODELS}
        abilities = await asyncio.gather(
            *(
                probe(self._servers[source], self._pair, ids[source], names[source])
                for source in MODELS
            )
        )
        models: dict[Source, RemoteModel] = {}
        for source, ability in zip(MODELS, abilities, strict=True):
            model, server = self._pair.model(source), self._servers[source]
            models[source] = RemoteModel(
                source, server, ids[source], ability, model.end_ids, model.embedding_rows
            )
            log.debug("%s: %s", server.called, ability)
        return models

    async def _disconnect(self) -> None:
        current = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not current]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self._servers.values():
            await server.close()

    def _check_router(self, request: Request) -> None:
        router, params = request.router, request.params
        needs = needed_quantity(router)
        if needs == "all" and self._pair.own_vocabularies is not None:
            raise BacoError(
                f"{router.spelling} may read whole rows, which servers of two tokenizers are not "
                "requested to return: use a built-in router, or --backend local"
            )
        for source in router.reads:
            ability, called = self.models[source].ability, self.models[source].server.called
            if needs in _QUANTITIES and not ability.top:
                raise BacoError(
                    f"{router.spelling} needs {_QUANTITIES[needs]} and {called} returns no "
                    "log-probabilities: use Punc, FC or Role"
                )
            if needs == "all" and ability.top < self._pair.vocabulary.size:
                raise BacoError(
                    f"{router.spelling} may read whole rows and {called} returns {ability.top} "
                    f"tokens of {self._pair.vocabulary.size}: use a built-in router"
                )
        if params.temperature > 0 and (params.top_k or params.top_p < 1):
            raise BacoError(
                "top_k and top_p truncate the row after a word's source is known, which the "
                "servers of the remote backend cannot do: use temperature and min_p"
            )


def _check_params(request: Request, model: RemoteModel) -> None:
    params, ability, called = request.params, model.ability, model.server.called
    if params.penalises:
        raise BacoError("penalties need the weights in this process: use --backend local")
    if params.logit_bias and "logit_bias" not in ability.obeys:
        raise BacoError(f"{called} does not follow logit_bias: leave it out")
    if params.temperature == 0:
        return
    if not ability.raw and params.temperature != 1:
        raise BacoError(
            f"temperature is {params.temperature:g} and {called} returns log-probabilities "
            "that change with it: use 0 or 1"
        )
    if model.source == "base" and request.router.only == "base" and params.top_p < 1:
        raise BacoError("top_p of the base alone is not exact on a server: use min_p")
    for name in ("min_p", "top_k"):
        if getattr(params, name) and name not in ability.obeys:
            raise BacoError(f"{called} does not follow {name}: give {name} 0")
    if ability.truncates_first and params.temperature != 1 and (params.min_p or params.top_p < 1):
        raise BacoError(
            f"{called} truncates before it applies the temperature, so min_p and top_p differ "
            "there: use temperature 1, or min_p 0 and top_p 1"
        )
    if params.min_p and request.router.only is None and "logit_bias" not in ability.obeys:
        raise BacoError(
            f"{called} does not follow logit_bias, without which min_p is not exact where a "
            "model may write only word starts: give min_p 0"
        )
